r"""The partial-softmax monoid: attention over some of the keys, ready to be merged with the rest.

    Partial(acc, max, sum):  max = max_j s_j
                             sum = sum_j e^(s_j - max),  acc = sum_j e^(s_j - max) v_j
    merge:  rescale both to the larger maximum and add
    finish: acc / sum,  log-sum-exp = max + log sum

`merge` is associative and commutative and `identity` is its unit, so blocks of keys can be folded
in any order and any bracketing: blockwise attention, split decoding, rings and shared prefixes are
the same fold.  Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Partial(NamedTuple):
    """Attention of T queries over a set of keys.

    `acc` "*B T D": weighted values; `max`, `sum` "*B T": running maximum and normalizing sum.
    """

    acc: Float[Array, "*B T D"]
    max: Float[Array, "*B T"]
    sum: Float[Array, "*B T"]

    @classmethod
    def identity(
        cls, rows: tuple[int, ...], value_width: int, dtype: Any = jnp.float32
    ) -> "Partial":
        """Nothing seen yet, for query rows of shape `rows`."""
        return cls(
            jnp.zeros((*rows, value_width), dtype),
            jnp.full(rows, -jnp.inf, dtype),
            jnp.zeros(rows, dtype),
        )

    @classmethod
    def of(
        cls,
        scores: Float[Array, "*B T S"],
        value: Float[Array, "*B S D"],
        allowed: Bool[Array, "*B T S"] | None = None,
    ) -> "Partial":
        """The summary of one block of keys; scores of pairs not allowed count as -inf."""
        if allowed is not None:
            scores = jnp.where(allowed, scores, -jnp.inf)
        weights, top, total = block_weights(scores)
        return cls(jnp.matmul(weights.astype(value.dtype), value).astype(scores.dtype), top, total)


def block_weights(
    scores: Float[Array, "*B T S"],
) -> tuple[Float[Array, "*B T S"], Float[Array, "*B T"], Float[Array, "*B T"]]:
    """e^(s - max), max and sum of one block; zeros in a row that is -inf throughout."""
    # The result does not depend on the shift, so neither should its derivative.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - finite(top)[..., None])
    return weights, top, jnp.sum(weights, axis=-1)


def finite(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """-inf replaced by zero, so that subtracting it from -inf leaves -inf, not NaN."""
    return jnp.where(x == -jnp.inf, 0, x)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both."""
    top = jnp.maximum(a.max, b.max)
    scale_a, scale_b = jnp.exp(a.max - finite(top)), jnp.exp(b.max - finite(top))
    return Partial(
        a.acc * scale_a[..., None] + b.acc * scale_b[..., None],
        top,
        a.sum * scale_a + b.sum * scale_b,
    )


def finish(p: Partial) -> tuple[Float[Array, "*B T D"], Float[Array, "*B T"]]:
    """The attention output and the log-sum-exp; zeros and -inf where no key was seen."""
    seen = p.sum > 0
    total = jnp.where(seen, p.sum, 1)
    # A NaN anywhere in the row must survive: `seen` is false for it.
    out = jnp.where(seen[..., None], p.acc / total[..., None], p.acc)
    return out, jnp.where(seen, finite(p.max) + jnp.log(total), p.max)
