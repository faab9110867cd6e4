"""What a query reads of its own token beside the state, and whether it reads anything at all.

Mamba-2's skip and RWKV-7's bonus add a multiple of the token's own value.  They obey the mask: a
query that does not see its own token gets none of it.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.core.linear_attention import _same
from attnlab.core.mask_layout import layout
from attnlab.core.masks import Full, Mask, as_mask


def own_token(
    x: Float[Array, "*B S N D"], query: Float[Array, "*B T N H"], options: dict[str, Any]
) -> Float[Array, "*B T N D"]:
    """`x` of each query's own token; zeros where there is none, or the query does not see it.

    `options`, of `attnlab.linear_attention`: the mask and offsets count.
    """
    mask, offsets = _said(options)
    seen = _sees_itself(mask, query.shape, x.shape[-3], offsets)
    return jnp.where(seen[..., None], _moved(x, query.shape[-3], offsets, x.ndim - 3), 0)


def sees_any(
    query: Float[Array, "*B T N H"], key: Float[Array, "*B S K H"], options: dict[str, Any]
) -> Bool[Array, "*B T"]:
    """Which queries see a key, their own token's or an earlier one, or follow a given state.

    Raises:
      NotImplementedError: a mask that picks pairs.
    """
    mask, offsets = _said(options)
    lengths = query.shape[-3], key.shape[-3]
    known = layout(mask, lengths, offsets)
    if known is None:
        raise NotImplementedError(
            f"mask: {type(mask).__name__} picks pairs, which a state cannot; attnlab.attention "
            "takes any mask."
        )
    batch = query.shape[:-3]
    real = jnp.ones((*batch, lengths[1]), bool) if known.keys is None else known.keys
    real = jnp.broadcast_to(real, (*batch, lengths[1]))
    if options.get("initial_state") is not None:
        seen = jnp.ones((*batch, lengths[0]), bool)
    else:
        place = _place(lengths[0], offsets)
        count = _moved(jnp.cumsum(real, -1), lengths[0], offsets, len(batch))
        before = jnp.expand_dims(place >= 0, range(len(batch)))
        seen = (count > 0) & before
    return seen if known.queries is None else seen & known.queries


def _said(options: dict[str, Any]) -> tuple[Mask, tuple[Any, Any]]:
    mask = options.get("mask")
    offsets = options.get("query_offset", 0), options.get("key_offset", 0)
    return Full() if mask is None else as_mask(mask), offsets


def _place(length: int, offsets: tuple[Any, Any]) -> Array:
    """Which token is each query's own."""
    first = jnp.asarray(offsets[0], jnp.int32) - jnp.asarray(offsets[1], jnp.int32)
    return first + jnp.arange(length, dtype=jnp.int32)


def _moved(x: Array, length: int, offsets: tuple[Any, Any], axis: int) -> Array:
    if length == x.shape[axis] and _same(*offsets):
        return x
    return jnp.take(x, jnp.clip(_place(length, offsets), 0, x.shape[axis] - 1), axis=axis)


def _sees_itself(
    mask: Mask, shape: tuple[int, ...], keys: int, offsets: tuple[Any, Any]
) -> Bool[Array, "*B T N"]:
    *batch, length, heads, _ = shape
    known, place = layout(mask, (length, keys), offsets), _place(length, offsets)
    inside = ((place >= 0) & (place < keys))[:, None]
    seen = jnp.broadcast_to(inside, (*batch, length, heads))
    if known is None:
        pairs = mask.dense(
            length, keys, query_offset=offsets[0], key_offset=offsets[1], num_heads=heads
        )
        pairs = jnp.broadcast_to(pairs, (*batch, heads, length, keys))
        at = jnp.broadcast_to(jnp.clip(place, 0, keys - 1)[:, None], (*pairs.shape[:-1], 1))
        own = jnp.take_along_axis(pairs, at, axis=-1)[..., 0]
        return seen & jnp.swapaxes(own, -1, -2)
    if known.keys is not None:
        own = jnp.broadcast_to(known.keys, (*batch, keys))
        seen = seen & _moved(own, length, offsets, own.ndim - 1)[..., None]
    return seen if known.queries is None else seen & known.queries[..., None]
