"""Convolutions over a matrix of scores or weights: a pair meets the pairs beside it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def convolved(
    scores: Float[Array, "*B N T S"], kernel: Any, ids: Any = None
) -> Float[Array, "*B N T S"]:
    """sum_ab kernel[n, C - 1 - a, b] s[n, i - a, j + b - E // 2], zeros beyond the edges.

    Past queries only, and keys on both sides.  Where pairs across documents are zero, and later
    hidden again, no document touches another: what is left of it are the last queries of the
    document before, which do not count.

    Args:
      kernel: "N C E", E odd; None for no convolution.
      ids: documents of the queries, "*B T"; None for one.
    """
    if kernel is None:
        return scores
    rows, cols = kernel.shape[-2:]
    kernel = jnp.expand_dims(kernel.astype(scores.dtype), range(scores.ndim - 3))
    lead = [(0, 0)] * (scores.ndim - 2)
    padded = jnp.pad(scores, [*lead, (rows - 1, 0), (cols // 2, cols // 2)])
    total = jnp.zeros_like(scores)
    for a in range(rows):
        first = rows - 1 - a
        back = jax.lax.slice_in_dim(padded, first, first + scores.shape[-2], axis=-2)
        part = sum(
            kernel[..., first, b, None, None]
            * jax.lax.slice_in_dim(back, b, b + scores.shape[-1], axis=-1)
            for b in range(cols)
        )
        total = total + (part if ids is None else jnp.where(_same(ids, a, scores.ndim), part, 0))
    return total


def _same(ids: Any, a: int, rank: int) -> Bool[Array, "*B 1 T 1"]:
    """Whether query i - a is of the document of query i; of the rank of the scores."""
    place = jnp.maximum(jnp.arange(ids.shape[-1], dtype=jnp.int32) - a, 0)
    same = (jnp.take(ids, place, axis=-1) == ids)[..., None, :, None]
    return jnp.expand_dims(same, range(rank - same.ndim))
