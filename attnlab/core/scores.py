"""Score modifiers: what is done to a score before it becomes a weight.

A modifier is a pytree and a function `(score, at) -> score`.  Its floating-point arrays are
trainable: every implementation of `attention` differentiates them, tile by tile, in O(n) memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attnlab.core.terms import ArrayLeaf, At, Term, leaf, static


class ScoreModifier(Term):
    """Base of all modifiers.  A subclass defines `__call__`; leaves are tagged by `leaf(axes)`.

    Scores arrive as "*B N t s" in the accumulation dtype; floating-point leaves are cast to it.
    `additive` says that the modifier adds something that does not depend on the score.
    """

    additive: ClassVar[bool] = False

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        raise NotImplementedError


class RowModifier(ScoreModifier):
    """A modifier that reads a query's scores of all keys at once; a subclass defines `rows`.

    Served by implementations that hold rows: "reference", and "blockwise" some rows at a time,
    O(S) memory for a block of queries, forward and backward.
    """

    def rows(
        self, score: Float[Array, "... S"], at: At, allowed: Bool[Array, "... S"]
    ) -> Float[Array, "... S"]:
        """New scores; those that are not `allowed` are 0 and what becomes of them is ignored."""
        raise NotImplementedError


def whole_rows(modifiers: Sequence[ScoreModifier]) -> str | None:
    """The name of a modifier that needs whole rows, if there is one."""
    return next((type(x).__name__ for x in modifiers if isinstance(x, RowModifier)), None)


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
    modifiers: Sequence[ScoreModifier],
    score: Float[Array, "..."],
    at: At,
    allowed: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """The modifiers in order, their arrays cast to the dtype of the scores.

    `allowed`: which pairs may meet, for those that read whole rows.
    """
    dtype = score.dtype

    def cast(x: Array) -> Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    for modifier in modifiers:
        own = jax.tree.map(cast, modifier)
        if isinstance(own, RowModifier):
            seen = jnp.broadcast_to(True if allowed is None else allowed, score.shape)
            new = own.rows(jnp.where(seen, score, 0), at, seen)
        else:
            new = own(score, at)
        score = jnp.broadcast_to(new, score.shape)
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


class PairScale(ScoreModifier):
    """Multiply by a number of the query and one of the key: `rows` "B N T", `cols` "B N S"."""

    rows: ArrayLeaf = leaf("B N T")
    cols: ArrayLeaf = leaf("B N S")

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        return score * self.rows * self.cols


class PairNetwork(ScoreModifier):
    """Add what a small network makes of a query's and a key's numbers: additive attention.

        h = f(rows + cols);   h = f(h W + b) for each of `layers`;   score + h . last

    `rows` and `cols` are tuples of arrays "B N T" and "B N S", one to a unit; `layers` are pairs
    (W, b) of tuples of scalars, W by columns; `last` are scalars, one to a unit.  Kernels have no
    matrix product within a tile, so all is written out: compiling takes long for more than about
    16 units.  Bahdanau et al. 2014, arXiv:1409.0473 is one layer of tanh.
    """

    additive: ClassVar[bool] = True
    rows: Any = leaf("B N T")
    cols: Any = leaf("B N S")
    layers: Any = leaf("")
    last: Any = leaf("")
    activation: Callable[[Array], Array] = static(default=jax.nn.relu)

    @classmethod
    def of(
        cls,
        rows: Float[Array, "*B N T P"],
        cols: Float[Array, "*B N S P"],
        layers: Sequence[tuple[Float[Array, "_ _"], Float[Array, " _"]]],
        last: Float[Array, " _"],
        activation: Callable[[Array], Array] = jax.nn.relu,
    ) -> "PairNetwork":
        """The modifier from arrays."""
        units = [tuple(x[..., p] for p in range(x.shape[-1])) for x in (rows, cols)]
        deep = tuple((tuple(map(tuple, w.T)), tuple(b)) for w, b in layers)
        return cls(units[0], units[1], deep, tuple(last), activation)

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        units = [self.activation(a + c) for a, c in zip(self.rows, self.cols, strict=True)]
        for columns, biases in self.layers:
            units = [
                self.activation(_weighed(units, column) + bias)
                for column, bias in zip(columns, biases, strict=True)
            ]
        return score + _weighed(units, self.last)


def _weighed(units: Sequence[Any], weights: Sequence[Any]) -> Any:
    return sum(unit * weight for unit, weight in zip(units, weights, strict=True))


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
