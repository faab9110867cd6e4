"""`jax.nn.dot_product_attention`, served by attnlab."""

from typing import Any

import jax.numpy as jnp

from attnlab.core.attention import attention
from attnlab.core.masks import Causal, KeyPadding, Mask, QueryPadding, SlidingWindow, as_mask
from attnlab.core.scores import Bias, ScoreModifier


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`, served by attnlab: swap the one for the other.

    Shapes, dtypes and the meaning of each argument are those of `jax.nn.dot_product_attention`;
    see there.  What differs: any number of batch axes, a value width unlike the key width,
    `implementation` also takes attnlab's own names (None: "auto"), memory is O(n) at length, and
    rows that may see no key (or lie beyond `query_seq_lengths`) are zeros instead of a mean.

    Args:
      query, key, value: "*B T N H", "*B S K H", "*B S K D".
      bias: added to the scaled scores; broadcasts to "*B N T S".
      mask: boolean, broadcasts to "*B N T S".
      query_seq_lengths, key_value_seq_lengths: integers "*B"; what lies beyond is masked.
      local_window_size: (left, right), or one int for both sides.
      return_residual: also return the log-sum-exp, "*B T N".

    Raises:
      As `attnlab.attention`.
    """
    masks: Mask | None = None if mask is None else as_mask(mask)

    def also(other: Mask) -> Mask:
        return other if masks is None else masks & other

    if is_causal:
        masks = also(Causal())
    if local_window_size is not None:
        window = local_window_size
        left, right = window if isinstance(window, tuple) else (window, window)
        masks = also(SlidingWindow(left, right))
    if key_value_seq_lengths is not None:
        masks = also(KeyPadding(jnp.asarray(key_value_seq_lengths)))
    if query_seq_lengths is not None:
        masks = also(QueryPadding(jnp.asarray(query_seq_lengths)))
    modifiers: tuple[ScoreModifier, ...] = ()
    if bias is not None:
        bias = jnp.asarray(bias)
        modifiers = (Bias(bias.reshape((1,) * max(0, 3 - bias.ndim) + bias.shape)),)
    out = attention(
        query,
        key,
        value,
        mask=masks,
        modifiers=modifiers,
        scale=scale,
        implementation=implementation or "auto",
        return_lse=return_residual,
    )
    if return_residual:
        return out[0], jnp.swapaxes(out[1], -1, -2)
    return out
