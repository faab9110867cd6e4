r"""cosFormer: rectified queries and keys, and a cosine of their distance that splits into features.

    w_ts = relu(q_t) . relu(k_s) cos(pi/2 (t - s) / M) / max(sum over keys of the same, eps)

As cos(a - b) = cos a cos b + sin a sin b, the weight is a product of features [x sin a, x cos a] of
twice the width, a = pi t / (2 M).  Qin et al. 2022, arXiv:2202.08791: weights are not negative and
favour what is near, at linear cost, if no two positions are further apart than M.

The authors' code takes M from the lengths of each call, and clamps the denominator at 1e-6; a query
whose products all vanish gives zeros.  Decoding needs one M from the first token to the last:
`max_length`.  Their biases of the projections belong to `MultiHeadAttention(use_bias=True)`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import PATTERNS, RECURRENCE, Entry, Paper
from attnlab.core.linear_attention import linear_attention, linear_state, real_inputs
from attnlab.core.modules import Mechanism
from attnlab.core.recurrence import state_dtype

EPSILON = 1e-6


def cosformer_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    max_length: int | None = None,
    epsilon: float = EPSILON,
    **options: Any,
) -> Any:
    """Attention re-weighted by the cosine of the distance, O(T + S): "*B T N D".

    Args:
      max_length: M, the distance at which a weight reaches 0; max(T, S) by default.  The larger it
        is, the less distance matters.  A state goes with one M from its first token on.
      epsilon: the least denominator.
      options: as for `attnlab.linear_attention`; a state is "*B K 2H D+1".

    Raises:
      ValueError: an M that is not positive, or positions further apart than that, where weights
        would be negative (under `jit` offsets are not known; keep them within M).
    """
    query, key, value = real_inputs(query, key, value, options)
    offsets = (options.get("query_offset", 0), options.get("key_offset", 0))
    period = _checked_length(max_length, (query.shape[-3], key.shape[-3]), offsets)
    dtype, wide = query.dtype, state_dtype(query.dtype)
    rows, cols = (
        _features(x.astype(wide), offset, period)
        for x, offset in zip((query, key), offsets, strict=True)
    )
    value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1).astype(wide)
    found = linear_attention(rows, cols, value, **options)
    out, *state = found if options.get("return_state") else (found,)
    out = (out[..., :-1] / jnp.maximum(out[..., -1:], epsilon)).astype(dtype)
    return (out, *state) if state else out


def _features(x: Array, offset: Any, period: int) -> Array:
    """[x sin a, x cos a] of the rectified x, a being the angle of its position."""
    place = jnp.arange(x.shape[-3], dtype=jnp.int32) + jnp.asarray(offset, jnp.int32)
    # Whole turns are taken off while positions are integers, before they are rounded.
    angle = (math.pi / 2 / period) * jnp.mod(place, 4 * period).astype(x.dtype)
    angle = jnp.expand_dims(angle, (*range(x.ndim - 3), x.ndim - 2, x.ndim - 1))
    x = jax.nn.relu(x)
    return jnp.concatenate([x * jnp.sin(angle), x * jnp.cos(angle)], -1)


def _checked_length(max_length: Any, lengths: tuple[int, int], offsets: tuple[Any, Any]) -> int:
    period = max(lengths) if max_length is None else max_length
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"max_length: expected a positive int, got {max_length!r}.")
    moved = 0
    if all(isinstance(x, int) for x in offsets):
        moved = offsets[0] - offsets[1]
    elif offsets[0] is not offsets[1]:  # somewhere among the keys
        return period
    furthest = max(moved + lengths[0] - 1, lengths[1] - 1 - moved)
    if furthest > period:
        raise ValueError(
            f"max_length: expected at least {furthest}, the largest distance between a query and "
            f"a key, got {max_length}."
        )
    return period


class CosFormer(Mechanism):
    """cosFormer; no parameters.  With `max_length` it decodes from a state."""

    def __init__(self, max_length: int | None = None, *, epsilon: float = EPSILON) -> None:
        _checked_length(max_length, (1, 1), (0, 0))
        self.max_length, self.epsilon = max_length, epsilon

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Any:
        if self.max_length is None:
            return None  # keys have to be turned again whenever M changes
        return linear_state(batch_shape, num_kv_heads, 2 * head_width, value_width + 1)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return cosformer_attention(
            query, key, value, max_length=self.max_length, epsilon=self.epsilon, **options
        )


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> CosFormer:
    return CosFormer(4096)


ENTRY = Entry(
    id="cosformer",
    title="cosFormer",
    family="linear",
    paper=Paper(
        "cosFormer: Rethinking Softmax in Attention",
        "Qin, Sun, Deng, Li, Wei, Lv, Yan, Kong & Zhong",
        2022,
        "2202.08791",
    ),
    summary="Rectified products, re-weighted by a cosine of the distance that splits into features "
    "of each position: near keys count more, at linear cost.",
    formula=r"w_{ts} \propto \mathrm{relu}(q_t)^\top \mathrm{relu}(k_s)\,"
    r"\cos\!\left(\frac{\pi}{2}\,\frac{t-s}{M}\right)",
    patterns=PATTERNS,
    time="O((T + S)·H·D)",
    memory="O(T + S)",
    exact="Exact; weights are those of its kernel, not of softmax.",
    properties=frozenset({"translation-invariant", "decode", "gqa", "linear-memory", "state"}),
    function=cosformer_attention,
    module=CosFormer,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
