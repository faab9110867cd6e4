"""The linear-state recurrence in its three forms, heads before positions, nothing checked.

Axes here: query "*B K G T H" (G queries share a key head), key "*B K T H", value "*B K T D",
log_decay "*B K T X" (X = H, or 1 where all channels decay alike) or None, erase "*B K T H" or None,
state "*B K H D"; in the forms, all of one floating-point dtype.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from attnlab.core.decay_tree import (
    Sums,
    block_sums,
    damped_product,
    damping,
    product,
    unit_triangle_inverse,
)


class Steps(NamedTuple):
    """What enters at each step."""

    query: Array
    key: Array
    value: Array
    log_decay: Array | None = None
    erase: Array | None = None


def cleared(steps: Steps, reset: Bool[Array, "*B T"], dtype: Any) -> Steps:
    """Steps that see nothing of the state before a reset: it is decayed and read as zero.

    `dtype` is that of decays.
    """
    key, erase = steps.key, steps.erase
    here = reset[..., None, :, None]
    decay = jnp.zeros((*key.shape[:-1], 1), dtype) if steps.log_decay is None else steps.log_decay
    decay = jnp.where(here, jnp.asarray(-jnp.inf, dtype), decay)
    erase = None if erase is None else jnp.where(here, jnp.zeros((), erase.dtype), erase)
    return steps._replace(log_decay=decay, erase=erase)


@jax.jit  # called outside of jit, the loop would otherwise be compiled anew at each call
def recurrent(steps: Steps, state: Array) -> tuple[Array, Array]:
    """One step after the other: "*B K G T D" and the state."""

    def step(state: Array, now: Steps) -> tuple[Array, Array]:
        write = now.value
        if now.erase is not None:
            write = write - product("...hd,...h->...d", state, now.erase)
        if now.log_decay is not None:
            state = state * jnp.exp(now.log_decay)[..., None]
        state = state + now.key[..., :, None] * write[..., None, :]
        return state, product("...gh,...hd->...gd", now.query, state)

    in_time = jax.tree.map(lambda x: jnp.moveaxis(x, -2, 0), steps)
    state, out = jax.lax.scan(step, state, in_time)
    return jnp.moveaxis(out, 0, -2), state


@partial(jax.jit, static_argnums=2)
def chunked(steps: Steps, state: Array, chunk_size: int) -> tuple[Array, Array]:
    """Chunk after chunk, each by matrix products; O(T) memory, with gradients as well."""
    length = steps.key.shape[-2]
    size = min(chunk_size, length)
    count = -(-length // size)
    whole = 1 << (size - 1).bit_length()  # halving wants a power of two

    def split(x: Array) -> Array:
        x = _pad(x, count * size)
        x = x.reshape(*x.shape[:-2], count, size, x.shape[-1])
        return jnp.moveaxis(_pad(x, whole), -3, 0)

    # Within a chunk all is computed again for the gradient: only states are kept.
    step = jax.checkpoint(lambda state, part: _chunk(part, state), prevent_cse=False)
    state, out = jax.lax.scan(step, state, jax.tree.map(split, steps))
    out = jnp.moveaxis(out, 0, -3)[..., :size, :]
    return out.reshape(*out.shape[:-3], count * size, out.shape[-1])[..., :length, :], state


def parallel(steps: Steps, state: Array) -> tuple[Array, Array]:
    """All positions at once, in O(T²) memory: a single chunk."""
    return chunked(steps, state, steps.key.shape[-2])


def _pad(x: Array, length: int) -> Array:
    """Zeros behind the last step; they neither write, decay nor erase."""
    missing = length - x.shape[-2]
    widths = [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]
    return jnp.pad(x, widths) if missing else x


def _chunk(part: Steps, state: Array) -> tuple[Array, Array]:
    """The state behind a chunk, and its outputs: the WY form of the delta rule, if it erases."""
    query, key, write, decay, erase = part
    levels = None if decay is None else block_sums(decay)
    top = None if levels is None else Sums(*(jnp.exp(x[..., 0, :, :]) for x in levels[-1]))
    if erase is not None:
        seen = erase if top is None else erase * top.before
        write = write - product("...ch,...hd->...cd", seen, state)
        lower = _products(erase, key, levels, through=False)
        write = product("...ij,...jd->...id", unit_triangle_inverse(lower), write)
    seen = query if top is None else query * top.through[..., None, :, :]
    shared = None if levels is None else [Sums(*(x[..., None, :, :, :] for x in s)) for s in levels]
    weights = _products(query, key[..., None, :, :], shared, through=True)
    out = product("...gij,...jd->...gid", weights, write)
    out = out + product("...gch,...hd->...gcd", seen, state)
    left = key if top is None else key * top.after
    if top is not None:
        state = state * jnp.swapaxes(top.total, -1, -2)
    return state + product("...ch,...cd->...hd", left, write), out


def _products(rows: Array, keys: Array, levels: list[Sums] | None, *, through: bool) -> Array:
    """What each row reads of each key up to it, damped by the decays between."""
    if levels is not None and levels[0].total.shape[-1] > 1:
        return damped_product(rows, keys, levels, through=through)
    plain = product("...ih,...jh->...ij", rows, keys)
    if levels is not None:
        return plain * damping(levels, through=through)
    seen = jnp.tri(keys.shape[-2], k=0 if through else -1, dtype=keys.dtype)
    return plain * jnp.expand_dims(seen, range(plain.ndim - 2))
