r"""Exponentials relative to a running maximum, and their running sums.

    m_t = max_{s <= t} k_s,    f_s = exp(k_s - m_s),    z_t = sum_{s <= t} exp(k_s - m_t)

What was summed before a new maximum shrinks by exp(m_{t-1} - m_t), a decay: nothing overflows, and
z_t is at least 1 once there is a key.  Padding is `LOWEST`, documents are told apart by `start`.
Maxima are shifts that cancel from what they are used for; their gradients are stopped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.core.documents import document_ends

LOWEST = -1e30  # a maximum over no keys; finite, so that differences are numbers


class Past(NamedTuple):
    """f and m at each key, z and m at each query, and log m_{t-1} - m_t or None: "*B S K X"."""

    features: Array
    peak: Array
    total: Array
    log_decay: Array | None


def running(
    key: Float[Array, "*B S K X"],
    start: Bool[Array, "*B S"] | None,
    before: tuple[Array, Array] | None = None,
) -> Past:
    """Over the past of each position, itself included; from where `start` is True.

    `before` holds m and z, "*B K X", of what came before the first position.
    """
    axis, zero = key.ndim - 3, jnp.zeros((), key.dtype)
    first = jnp.full_like(key[..., 0, :, :], LOWEST)
    peak, total = (first, jnp.zeros_like(first)) if before is None else before
    new = jnp.zeros(key.shape[:-2], bool) if start is None else start
    new = jnp.concatenate([jnp.zeros_like(new[..., :1]), new], -1)[..., None, None]
    logits = jnp.concatenate([peak[..., None, :, :], jax.lax.stop_gradient(key)], axis)
    _, peaks = jax.lax.associative_scan(_highest, (new, logits), axis=axis)
    peaks = jax.lax.stop_gradient(peaks)
    log_decay = jnp.where(new[..., 1:, :, :], zero, peaks[..., :-1, :, :] - peaks[..., 1:, :, :])
    features = exponentials(key, peaks[..., 1:, :, :])
    kept = jnp.where(new[..., 1:, :, :], zero, jnp.exp(log_decay))
    kept = jnp.concatenate([jnp.ones_like(total)[..., None, :, :], kept], axis)
    added = jnp.concatenate([total[..., None, :, :], features], axis)
    _, totals = jax.lax.associative_scan(_decayed_sum, (kept, added), axis=axis)
    return Past(features, peaks[..., 1:, :, :], totals[..., 1:, :, :], log_decay)


def whole(key: Float[Array, "*B S K X"], start: Bool[Array, "*B S"] | None) -> Past:
    """Over all positions (axis S of length 1 in peak and total), or over each one's document."""
    axis = key.ndim - 3
    if start is None:
        peak = jax.lax.stop_gradient(jnp.max(key, axis, keepdims=True))
        features = exponentials(key, peak)
        return Past(features, peak, jnp.sum(features, axis, keepdims=True), None)
    past = running(key, start)
    end = document_ends(start)[..., None, None]
    peak, total = (jnp.take_along_axis(x, end, axis) for x in (past.peak, past.total))
    return Past(exponentials(key, peak), peak, total, None)


def exponentials(key: Array, peak: Array) -> Array:
    """Exp of key - peak; 0 for padding, also where nothing but padding has been."""
    return jnp.where(key == LOWEST, jnp.zeros((), key.dtype), jnp.exp(key - peak))


def _highest(a: Any, b: Any) -> Any:
    (before, one), (new, two) = a, b
    return before | new, jnp.where(new, two, jnp.maximum(one, two))


def _decayed_sum(a: Any, b: Any) -> Any:
    return a[0] * b[0], b[0] * a[1] + b[1]
