"""Score modifiers: what is done to a score before it becomes a weight.

A modifier is a pytree and a function `(score, at) -> score`.  Its floating-point arrays are
trainable: every implementation of `attention` differentiates them, tile by tile, in O(n) memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.core.terms import ArrayLeaf, At, Term, leaf, static


class ScoreModifier(Term):
    """Base of all modifiers.  A subclass defines `__call__`; leaves are tagged by `leaf(axes)`.

    Scores arrive as "*B N t s" in the accumulation dtype; floating-point leaves are cast to it.
    `additive` says that the modifier adds something that does not depend on the score.
    """

    additive: ClassVar[bool] = False

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        raise NotImplementedError


def as_modifiers(modifiers: Any) -> tuple[ScoreModifier, ...]:
    """One modifier or a sequence of them, as a tuple.

    Raises:
      TypeError: something else.
    """
    if isinstance(modifiers, ScoreModifier):
        return (modifiers,)
    if modifiers is None:
        return ()
    if not isinstance(modifiers, Sequence):
        raise TypeError(
            "modifiers: expected a ScoreModifier or a sequence of them, "
            f"got {type(modifiers).__name__}."
        )
    for one in modifiers:
        if not isinstance(one, ScoreModifier):
            raise TypeError(f"modifiers: expected ScoreModifiers, got {type(one).__name__}.")
    return tuple(modifiers)


def after(own: ScoreModifier | Sequence[ScoreModifier], options: dict[str, Any]) -> dict[str, Any]:
    """`options` of `attention` in which a mechanism's `own` modifiers come before the caller's."""
    return options | {"modifiers": (*as_modifiers(own), *as_modifiers(options.get("modifiers")))}


def apply_modifiers(
    modifiers: Sequence[ScoreModifier], score: Float[Array, "..."], at: At
) -> Float[Array, "..."]:
    """The modifiers in order, their arrays cast to the dtype of the scores."""
    dtype = score.dtype

    def cast(x: Array) -> Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    for modifier in modifiers:
        score = jnp.broadcast_to(jax.tree.map(cast, modifier)(score, at), score.shape)
    return score


class Bias(ScoreModifier):
    """Add an array that broadcasts to "*B N T S"."""

    additive: ClassVar[bool] = True
    bias: ArrayLeaf = leaf("B N T S")

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        return score + self.bias


def alibi_slopes(num_heads: int) -> Float[Array, " N"]:
    """ALiBi's slopes: 2^(-8/N), 2^(-16/N), ..., 2^-8 when N is a power of two.

    For other head counts the paper gives no rule; the authors' code takes the slopes of the power
    of two below, then every second slope of the power of two above.  Press et al. 2022,
    arXiv:2108.12409, section 3.

    Raises:
      ValueError: num_heads is not positive.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: expected a positive int, got {num_heads}.")
    power = 1 << (num_heads.bit_length() - 1)  # the largest power of two that is not larger
    exponents = [8 * (n + 1) / power for n in range(power)]
    exponents += [4 * (2 * n + 1) / power for n in range(num_heads - power)]
    return jnp.exp2(-jnp.asarray(exponents, jnp.float32))


class AlibiSlopes(ScoreModifier):
    """Subtract slope * |i - j|, with one slope per head: `slopes` "N"."""

    additive: ClassVar[bool] = True
    slopes: ArrayLeaf = leaf("N")

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        return score - self.slopes * jnp.abs(at.relative).astype(score.dtype)


def relative_bucket(
    relative: Int[Array, "..."], num_buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "..."]:
    """T5's bucket of a relative position (key minus query): exact when near, logarithmic when far.

    Half of the buckets serve distances below num_buckets / 2 one by one, the other half the
    distances up to `max_distance` logarithmically; all beyond share the last.  Bidirectional
    tables keep one half of all buckets for keys after the query; otherwise those keys share
    bucket 0.  Raffel et al. 2020, arXiv:1910.10683; details follow the released implementation.
    """
    ret = jnp.zeros_like(relative)
    if bidirectional:
        num_buckets //= 2
        ret = ret + jnp.where(relative > 0, num_buckets, 0)
        distance = jnp.abs(relative)
    else:
        distance = jnp.maximum(-relative, 0)
    exact = num_buckets // 2
    # Integer thresholds instead of a logarithm in floating point: where the distance crosses from
    # one bucket to the next must not depend on the device's rounding of log.
    steps = num_buckets - exact
    ratio = max_distance / exact
    thresholds = [int(np.ceil(exact * ratio ** (b / steps) - 1e-9)) for b in range(1, steps)]
    far = exact + sum((distance >= t).astype(relative.dtype) for t in thresholds)
    return ret + jnp.where(distance < exact, distance, far)


class RelativeBias(ScoreModifier):
    """Add a learned bias per head and bucket of relative position: `table` "N R", R buckets.

    Raises:
      ValueError: `table` has fewer than 2 buckets (4 when bidirectional), or max_distance does
        not exceed the number of exactly represented distances.
    """

    additive: ClassVar[bool] = True
    table: ArrayLeaf = leaf("N *")
    bidirectional: bool = static(default=False)
    max_distance: int = static(default=128)

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        buckets = self.table.shape[-1]
        exact = buckets // (4 if self.bidirectional else 2)
        if exact < 1 or self.max_distance <= exact:
            raise ValueError(
                "RelativeBias: expected at least one exact bucket and max_distance beyond the "
                f"exact ones, got {buckets} buckets, {self.bidirectional=}, {self.max_distance=}."
            )
        bucket = relative_bucket(at.relative, buckets, self.max_distance, self.bidirectional)
        return score + at.look_up(self.table, bucket)


class SoftCap(ScoreModifier):
    """cap * tanh(score / cap): scores stay within (-cap, cap).  `cap`: a scalar, or "N"."""

    cap: ArrayLeaf = leaf("")

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        return self.cap * jnp.tanh(score / self.cap)


class Temperature(ScoreModifier):
    """Divide by a positive temperature that broadcasts to "*B N T S", or a scalar."""

    temperature: ArrayLeaf = leaf("B N T S")

    def __post_init__(self) -> None:
        if jnp.ndim(self.temperature) == 0:
            object.__setattr__(self, "temperature", jnp.reshape(self.temperature, (1, 1, 1)))

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        return score / self.temperature


class ScoreFunction(ScoreModifier):
    """Any function: `fn(score, at)`, or `fn(score, at, params)` when `params` are given.

    `params` is any pytree of arrays, trainable where floating-point; `tags` names the axes each is
    indexed by, one tag for all or a tuple with one per leaf, in the order of `jax.tree.leaves`
    (`"N"`: one number per head, `"T"`: per query, `"B N T S"`: per pair).  Untagged leaves are
    handed over whole, and should be scalars or have the rank of the scores.
    """

    fn: Callable[..., Float[Array, "..."]] = static()
    params: Any = leaf("", default=None)
    tags: str | tuple[str, ...] = static(default="")

    def axes(self) -> tuple[str, ...]:
        count = len(jax.tree.leaves(self.params))
        return self.tags if isinstance(self.tags, tuple) else (self.tags,) * count

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        return self.fn(score, at) if self.params is None else self.fn(score, at, self.params)
