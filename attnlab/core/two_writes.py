r"""A step that writes two directions: what is erased along one, and a value along another.

    S_t = (diag(exp(g_t)) - b_t e_t^T) S_{t-1} + k_t v_t^T,      o_t = S_t^T q_t

A step of `linear_recurrence` writes along one key.  Here a token takes two of its steps: the first
decays, and writes minus what e reads along b, its value 0; the second writes v along k and is read.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.linear_attention import linear_attention
from attnlab.core.mask_layout import layout
from attnlab.core.masks import Full, Segments, as_mask, check_mask


def two_writes(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    log_decay: Float[Array, "..."] | None,
    erase: Float[Array, "*B S K H"],
    direction: Float[Array, "*B S K H"],
    mask: Any = None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> Any:
    """The recurrence above: "*B T N D", and the state where `options` ask for it.

    Args:
      log_decay: "*B S K" or "*B S K H"; None: nothing is forgotten.
      erase: e, what is read from the state before it decays.
      direction: b, along which that is taken away.
      mask: Causal (implied), KeyPadding, QueryPadding, Segments and what `&` makes of them.
      options: as for `attnlab.linear_attention`.

    Raises:
      NotImplementedError: a mask that picks pairs.
    """
    mask = Full() if mask is None else as_mask(mask)
    lengths = query.shape[-3], key.shape[-3]
    check_mask(mask, query.shape[:-3], {"N": query.shape[-2], "T": lengths[0], "S": lengths[1]})
    known = layout(mask, lengths, (query_offset, key_offset))
    if known is None:
        raise NotImplementedError(
            f"mask: {type(mask).__name__} picks pairs, which a state cannot; attnlab.attention "
            "takes any mask."
        )
    key, value, erase, direction = (_real(x, known.keys) for x in (key, value, erase, direction))
    if log_decay is not None:
        log_decay = _real(log_decay, known.keys, log_decay.ndim - key.ndim + 2)
        log_decay = _woven(log_decay, jnp.zeros_like(log_decay), key.ndim - 3)
    nothing, axis = jnp.zeros_like(key), key.ndim - 3
    first = 2 * query_offset  # the same number for both, where it is: a state asks for that
    offsets = first, first if query_offset is key_offset else 2 * key_offset
    result = linear_attention(
        _woven(jnp.zeros_like(query), query, axis),
        _woven(direction, key, axis),
        _woven(jnp.zeros_like(value), value, axis),
        log_decay=log_decay,
        erase=_woven(erase, nothing, axis),
        mask=None if known.ids is None else Segments(jnp.repeat(known.ids, 2, axis=-1)),
        query_offset=offsets[0],
        key_offset=offsets[1],
        **options,
    )
    out, state = result if isinstance(result, tuple) else (result, None)
    out = _real(out[(*(slice(None),) * axis, slice(1, None, 2))], known.queries)
    return (out, state) if isinstance(result, tuple) else out


def _woven(first: Array, second: Array, axis: int) -> Array:
    """first_0, second_0, first_1, second_1, ... along an axis."""
    both = jnp.stack([first, second], axis + 1)
    return both.reshape(*first.shape[:axis], 2 * first.shape[axis], *first.shape[axis + 1 :])


def _real(x: Array, real: Any, trailing: int = 2) -> Array:
    if real is None:
        return x
    real = jnp.broadcast_to(real, x.shape[: x.ndim - trailing])
    return jnp.where(real.reshape(*real.shape, *(1,) * trailing), x, jnp.zeros((), x.dtype))
