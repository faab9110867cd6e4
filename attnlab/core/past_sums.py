"""Sums over the past of each position, or over its whole document, and where a query finds them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.core.documents import document_ends
from attnlab.core.linear_attention import _same


def past_sums(
    x: Float[Array, "*B S K X"],
    start: Bool[Array, "*B S"] | None,
    *,
    causal: bool,
    before: Float[Array, "*B K X"] | None = None,
) -> Float[Array, "*B _ K X"]:
    """Sums up to each position, itself included, from where `start` is True; `before` comes first.

    Not causal: sums over all positions, the axis S of length 1, or over each one's document.
    """
    axis = x.ndim - 3
    if not causal and start is None:
        return jnp.sum(x, axis, keepdims=True)
    if start is None:
        sums = jnp.cumsum(x, axis)
        return sums if before is None else sums + before[..., None, :, :]
    kept = jnp.where(start, 0, 1).astype(x.dtype)[..., None, None]
    if before is not None:
        first = (slice(None),) * axis + (slice(0, 1),)
        x = x.at[first].add(kept[first] * before[..., None, :, :])
    _, sums = jax.lax.associative_scan(_sum, (kept, x), axis=axis)
    if causal:
        return sums
    return jnp.take_along_axis(sums, document_ends(start)[..., None, None], axis)


def _sum(a: Any, b: Any) -> Any:
    return a[0] * b[0], b[0] * a[1] + b[1]


def at_queries(
    sums: Float[Array, "*B S K X"], lengths: tuple[int, int], offsets: tuple[Any, Any]
) -> Float[Array, "*B T K X"]:
    """Sums of the past as they are where each query stands; zeros before the first key."""
    if lengths[0] == lengths[1] and _same(*offsets):
        return sums
    place = jnp.arange(lengths[0], dtype=jnp.int32)
    place = place + jnp.asarray(offsets[0], jnp.int32) - jnp.asarray(offsets[1], jnp.int32)
    found = jnp.take(sums, jnp.clip(place, 0, lengths[1] - 1), axis=sums.ndim - 3)
    return jnp.where((place >= 0)[:, None, None], found, jnp.zeros((), sums.dtype))
