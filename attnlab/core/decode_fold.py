"""Decoding in plain JAX: one block of keys after another."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from attnlab.core.cache import ordered
from attnlab.core.decode_memory import DecodeCall, Memory
from attnlab.core.partial import Partial, block_weights, merge
from attnlab.core.reference import isolate_bad, log_weights, product
from attnlab.core.terms import At, Tile, accumulator, axes_of, restrict

_BLOCK = 512  # keys that are looked at together


def _block_of(memory: Memory, start: Array, size: int, dtype: Any) -> list[Array]:
    """Keys and values from `start` on, "*B K s H", as floating-point numbers."""
    parts = []
    for x, scale in (
        (memory.key, memory.key_scale),
        (memory.value, memory.value_scale),
    ):
        if memory.pages is None:
            part = jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim - 3)
            if scale is not None:
                scale = jax.lax.dynamic_slice_in_dim(scale, start, size, scale.ndim - 2)
        else:
            page = memory.page_size
            pages = jax.lax.dynamic_slice_in_dim(
                memory.pages, start // page, size // page, memory.pages.ndim - 1
            )
            pages = jnp.clip(pages, 0, x.shape[1] - 1)
            part = ordered(x, pages)
            scale = None if scale is None else ordered(scale, pages)
        if scale is not None:
            part = part.astype(dtype) * scale[..., None].astype(dtype)
        parts.append(jnp.swapaxes(part, -3, -2))
    return parts


def _grouped(a: Array, b: Array, dtype: Any) -> Array:
    """A "*B N t x" times b "*B K x y" or "K x y": the rows of heads, and of the batch where b has
    none, that share a matrix are multiplied by it together.
    """
    *batch, heads, rows, inner = a.shape
    shared = b.shape[-3]
    a = a.reshape(*batch, shared, heads // shared * rows, inner)
    if b.ndim == 3 and batch:
        together = jnp.moveaxis(a.reshape(-1, *a.shape[-3:]), 0, 1)
        out = product(together.reshape(shared, -1, inner), b, dtype)
        out = jnp.moveaxis(out.reshape(*together.shape[:-1], b.shape[-1]), 1, 0)
    else:
        out = product(a, b, dtype)
    return out.reshape(*batch, heads, rows, b.shape[-1])


def fold_parts(call: DecodeCall, splits: int) -> list[Partial]:
    """Attention over each part of the keys, a block at a time: O(block) memory.

    For a normalizer without a sum, `max` and `sum` are zero.
    """
    memory, query = call.memory, call.query
    dtype = accumulator(query.dtype)
    if memory.key_scale is not None:
        query = query.astype(dtype)
    page = memory.page_size or 1
    size = min(max(1, _BLOCK // page) * page, memory.num_keys)
    heads, _, length = call.sizes
    rank, shared = query.ndim, call.normalizer.kind == "shared"
    terms = (*call.modifiers, call.normalizer)
    tags = axes_of(terms)
    at_query = call.shaped(call.first) + _along(length, rank, -2)
    end = call.end()

    def visit(number: Array, state: Partial) -> Partial:
        # The last block is moved back to end with the last key; what it repeats is masked.
        start = jnp.minimum(number * size, memory.num_keys - size)
        tile = Tile(0, start, length, size, heads, rank)
        column = _along(size, rank, -1) + start
        at = At(at_query, column + call.start, _along(heads, rank, -3))
        allowed = restrict(call.mask, axes_of(call.mask), tile).allowed(at)
        allowed = allowed & (column >= number * size) & (at.key < end)
        key, value = isolate_bad(*_block_of(memory, start, size, dtype))
        products = _grouped(query, jnp.swapaxes(key, -1, -2), dtype) * call.scale
        *modifiers, normalizer = restrict(terms, tags, tile)
        scores = log_weights(tuple(modifiers), normalizer, products, at, allowed)
        if shared:
            weights, top, total = block_weights(scores)
        else:
            weights = normalizer.weight(scores)
            top = total = jnp.zeros(scores.shape[:-1], dtype)
        acc = _grouped(weights.astype(value.dtype), value, dtype)
        new = Partial(acc, top, total)
        return merge(state, new) if shared else Partial(state.acc + acc, top, total)

    live = call.tables(size)[0]
    live = live.any(tuple(range(live.ndim - 1)))
    first = jnp.argmax(live).astype(jnp.int32)
    count = jnp.where(live.any(), live.size - jnp.argmax(live[::-1]).astype(jnp.int32) - first, 0)
    parts = []
    for number in range(splits):
        start = Partial.identity(query.shape[:-1], memory.widths[1], dtype)
        if not shared:
            start = start._replace(max=jnp.zeros_like(start.max))
        begin, stop = (first + count * i // splits for i in (number, number + 1))
        parts.append(jax.lax.fori_loop(begin, stop, visit, start))
    return parts


def _along(size: int, rank: int, axis: int) -> Int[Array, "..."]:
    shape = [1] * rank
    shape[axis] = size
    return jnp.arange(size, dtype=jnp.int32).reshape(shape)
