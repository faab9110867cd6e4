r"""Exponentials of keys in a linear state, finite whatever the logits.

Two kinds of attention keep sums of exp(k_sh) over the keys that a query sees, channel by channel:

    exponential_attention        w_ts = sum_h exp(q_th + k_sh) / sum_s' sum_h exp(q_th + k_s'h)
    channel_softmax_attention    w_ts = sum_h q_th exp(k_sh) / sum_s' exp(k_s'h)

The first divides once per query, the second once per channel.  What is written is relative to the
running maximum of its channel (`peaks`), so both are a `linear_recurrence` with a log decay per
channel: no logit overflows, nothing of the future enters, and no denominator is below 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.decay_tree import product
from attnlab.core.linear_attention import (
    linear_attention,
    real_inputs,
    refuse_softmax,
    repeat_heads,
)
from attnlab.core.mask_layout import layout
from attnlab.core.masks import Causal, Full, Mask, as_mask
from attnlab.core.past_sums import at_queries
from attnlab.core.peaks import LOWEST, Past, exponentials, running, whole
from attnlab.core.recurrence import check_implementation, resets, state_dtype
from attnlab.core.reference import heads_first


class PeakState(NamedTuple):
    """The past: sums of exp(key - peak) times (value, 1), and the maxima of its channels."""

    sums: Float[Array, "*B K H E"]
    peak: Float[Array, "*B K H"]


def peak_state(
    batch_shape: tuple[int, ...], num_heads: int, width: int, value_width: int
) -> PeakState:
    """The state before the first token, in float32."""
    shape = (*batch_shape, num_heads, width)
    sums = jnp.zeros((*shape, value_width + 1), jnp.float32)
    return PeakState(sums, jnp.full(shape, LOWEST, jnp.float32))


def exponential_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    **options: Any,
) -> Any:
    """Weights sum_h exp(q_th + k_sh), normalized over the keys seen: "*B T N D".

    Args:
      query, key: logarithms of features.
      options: as for `attnlab.linear_attention`; a state is a `PeakState`.  A mask that picks pairs
        takes O(T S H) memory.

    Raises:
      TypeError, ValueError, NotImplementedError: as `attnlab.linear_attention`.
    """
    return _attend(query, key, value, by_channel=False, **options)


def channel_softmax_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    **options: Any,
) -> Any:
    """Weights sum_h q_th softmax_s(k_sh), each softmax over the keys seen: "*B T N D".

    A row sums to sum_h q_th.  Arguments as for `exponential_attention`, but the query is no
    logarithm.
    """
    return _attend(query, key, value, by_channel=True, **options)


def latent_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    **options: Any,
) -> Any:
    """Weights sum_h softmax_h(q_th) softmax_s(k_sh), which sum to one: "*B T N D".

    A channel is a latent that a query picks and that picks keys.  Arguments as for
    `exponential_attention`.
    """
    query, key, value = real_inputs(query, key, value, options)
    wide = [x.astype(state_dtype(query.dtype)) for x in (query, key, value)]
    found = channel_softmax_attention(jax.nn.softmax(wide[0], -1), *wide[1:], **options)
    out, *state = found if options.get("return_state") else (found,)
    out = out.astype(query.dtype)
    return (out, *state) if state else out


def _attend(
    query: Array, key: Array, value: Array, *, by_channel: bool, causal: bool = False,
    initial_state: Any = None, return_state: bool = False, **options: Any,
) -> Any:  # fmt: skip
    if initial_state is not None and not isinstance(initial_state, PeakState):
        raise TypeError(f"initial_state: expected a PeakState, got {type(initial_state).__name__}.")
    arrays = real_inputs(query, key, value, options)
    dtype = arrays[0].dtype
    query, key, value = (x.astype(state_dtype(dtype)) for x in arrays)
    mask = Full() if options.get("mask") is None else as_mask(options["mask"])
    lengths = (query.shape[-3], key.shape[-3])
    offsets = (options.get("query_offset", 0), options.get("key_offset", 0))
    known = layout(mask, lengths, offsets)
    stateful = initial_state is not None or return_state
    if known is None:
        _check_pairs(mask, stateful, dict(options))
        mask = mask & Causal() if causal else mask
        return _pairs(query, key, value, mask, offsets, by_channel).astype(dtype)
    if known.keys is not None:
        real = jnp.broadcast_to(known.keys, key.shape[:-2])[..., None, None]
        key = jnp.where(real, key, jnp.asarray(LOWEST, key.dtype))
    start = None if known.ids is None else resets(jnp.broadcast_to(known.ids, key.shape[:-2]))
    causal = causal or known.causal
    if causal:
        past = running(key, start, initial_state and _before(initial_state))
    else:
        past = whole(key, start)
    query = _query_features(query, _at_queries(past, lengths, offsets), by_channel)
    if by_channel and stateful:  # the state holds the sums of features too
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)
    found = linear_attention(
        query, past.features, value, log_decay=past.log_decay, normalize=not by_channel,
        causal=causal, initial_state=initial_state and initial_state.sums,
        return_state=return_state, **options,
    )  # fmt: skip
    out, *sums = found if return_state else (found,)
    out = (out[..., :-1] if by_channel and stateful else out).astype(dtype)
    return (out, PeakState(sums[0], past.peak[..., -1, :, :])) if return_state else out


def _before(state: PeakState) -> tuple[Array, Array]:
    return state.peak, state.sums[..., -1]


def _at_queries(past: Past, lengths: tuple[int, int], offsets: tuple[Any, Any]) -> Past:
    """Peaks and sums as they are where each query stands; those over all keys stand everywhere."""
    if past.log_decay is None:
        return past
    peak, total = (at_queries(x, lengths, offsets) for x in (past.peak, past.total))
    return past._replace(peak=peak, total=total)


def _query_features(query: Array, past: Past, by_channel: bool) -> Array:
    heads = query.shape[-2]
    if by_channel:
        total = repeat_heads(past.total, heads)
        return query / jnp.where(total == 0, jnp.ones_like(total), total)
    moved = query + repeat_heads(past.peak, heads)
    return jnp.exp(moved - jax.lax.stop_gradient(jnp.max(moved, -1, keepdims=True)))


def _check_pairs(mask: Mask, stateful: bool, options: dict[str, Any]) -> None:
    """Options of a call whose mask picks pairs."""
    implementation = options.pop("implementation", "auto")
    taken = ("mask", "query_offset", "key_offset", "chunk_size")
    refuse_softmax({name: x for name, x in options.items() if name not in taken})
    check_implementation(implementation)
    if implementation not in ("auto", "parallel") or stateful:
        raise NotImplementedError(
            f"mask: {type(mask).__name__} picks pairs, which a state cannot; "
            'implementation="parallel" without states takes any mask, and attnlab.attention any at '
            "O(n) memory."
        )


def _pairs(
    query: Array, key: Array, value: Array, mask: Mask, offsets: tuple[Any, Any], by_channel: bool
) -> Array:
    """All pairs and channels at once, under any mask: O(T S H) memory."""
    heads = query.shape[-2]
    allowed = mask.dense(
        query.shape[-3], key.shape[-3], query_offset=offsets[0], key_offset=offsets[1],
        num_heads=heads,
    )  # fmt: skip
    allowed = jnp.broadcast_to(allowed, (*query.shape[:-3], *allowed.shape[-3:]))
    query, key, value = (heads_first(repeat_heads(x, heads)) for x in (query, key, value))
    logits = key[..., None, :, :]
    if not by_channel:
        logits = jax.nn.logsumexp(query[..., :, None, :] + logits, -1, keepdims=True)
    logits = jnp.where(allowed[..., None], logits, jnp.asarray(LOWEST, key.dtype))
    weights = exponentials(logits, jax.lax.stop_gradient(jnp.max(logits, -2, keepdims=True)))
    total = jnp.sum(weights, -2, keepdims=True)
    weights = weights / jnp.where(total == 0, jnp.ones_like(total), total)
    if by_channel:
        weights = product("...tsh,...th->...ts", weights, query)[..., None]
    return heads_first(product("...ts,...sd->...td", weights[..., 0], value))
