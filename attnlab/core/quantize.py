r"""Keys and values in int8: half the memory to read, an error that can be bounded.

    x ~ values * scale,  values = round(x / scale) in [-127, 127],  scale = max |x| / 127

with one scale for each position and head ("token"), or for a block of positions ("block").  The
scale of a key multiplies its product with a query and that of a value multiplies its weight, so
attention reads int8 and never forms the keys and values again.

Rounding errs by at most half a step, |x - values * scale| <= scale / 2.  What follows from that for
attention is derived at `quantization_error_bound`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

_LEVELS = 127
# The quotient x / scale is rounded before it is rounded to an integer: one part in 2^23 of up to
# 127, twice.
_STEP = 0.5 + 2 * _LEVELS * 2.0**-23


@struct.dataclass
class Quantized:
    """An array in int8; a pytree.

    `values` "*B S K H" are int8; `scale` "*B J K", float32, holds for blocks of `block` positions,
    J * block >= S.
    """

    # Any: what stands for arrays where a program is only traced or compiled is welcome as well.
    values: Any
    scale: Any
    block: int = struct.field(pytree_node=False, default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def token_scale(self) -> Float[Array, "*B S K"]:
        """One scale for each position."""
        if self.block == 1:
            return self.scale
        return jnp.repeat(self.scale, self.block, -2)[..., : self.values.shape[-3], :]

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "*B S K H"]:
        """The array again, up to rounding."""
        x = self.values.astype(jnp.float32) * self.token_scale()[..., None]
        return x.astype(dtype)


def quantize(x: Float[Array, "*B S K H"], scale: str = "token", block: int = 64) -> Quantized:
    """`x` in int8 with a scale for each position and head, or for `block` positions and a head.

    A position (or block) that holds NaN or infinity becomes NaN as a whole.

    Raises:
      TypeError: `x` is not floating-point.
      ValueError: fewer than three axes, an unknown kind of scale, a block that is not positive.
    """
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: expected a floating-point array, got {getattr(x, 'dtype', type(x))}.")
    if x.ndim < 3:
        raise ValueError(f"x: expected an array (*B, S, K, H), got shape {x.shape}.")
    if scale not in ("token", "block"):
        raise ValueError(f'scale: expected "token" or "block", got {scale!r}.')
    if scale == "block" and (not isinstance(block, int) or block < 1):
        raise ValueError(f"block: expected a positive int, got {block!r}.")
    size = block if scale == "block" else 1
    x = jnp.asarray(x).astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    if size > 1:
        short = -x.shape[-3] % size
        lead = [(0, 0)] * (x.ndim - 3)
        largest = jnp.pad(largest, [*lead, (0, short), (0, 0)])
        largest = largest.reshape(*largest.shape[:-2], -1, size, largest.shape[-1]).max(-2)
    # Not below the smallest normal number: a subnormal scale may be taken for zero.
    found = jnp.maximum(largest / _LEVELS, jnp.finfo(jnp.float32).tiny)
    found = jnp.where(jnp.isfinite(largest), found, jnp.nan)
    empty = Quantized(jnp.zeros(x.shape, jnp.int8), found, size)
    each = empty.token_scale()[..., None]
    steps = jnp.clip(jnp.round(x / each), -_LEVELS, _LEVELS)
    steps = jnp.where(jnp.isnan(steps), 0, steps)
    return Quantized(steps.astype(jnp.int8), found, size)


class QuantizationBound(NamedTuple):
    """By how much scores "*B N T S" and the output "*B T N D" may be off."""

    scores: Float[Array, "*B N T S"]
    output: Float[Array, "*B T N D"]


def quantization_error_bound(
    query: Float[Array, "*B T N H"],
    key: Any,
    value: Any,
    *,
    visible: Bool[Array, "..."] | None = None,
    scale: float | None = None,
    lipschitz: float = 1.0,
) -> QuantizationBound:
    r"""How far attention over int8 keys and values may be from attention over what they stand for.

    With ~ marking what int8 gives, c the scale of scores, a_j and b_j the scales of key and value
    j, and modifiers m that stretch no distance between scores by more than L (`lipschitz`: biases,
    slopes and soft caps have L = 1, a temperature t has 1/t):

        |k_jh - k~_jh| <= a_j / 2, hence    |s_ij - s~_ij| <= e_ij = L c ||q_i||_1 a_j / 2.

    Let E_i = max_j e_ij over the keys that i sees.  Each unnormalized weight changes by a factor
    within [e^-E, e^E]; a set of keys of weight p then has at most p e^E / (p e^E + (1 - p) e^-E),
    and the gain is largest, tanh(E / 2), at p = 1 / (1 + e^E).  So the weights move at most
    tanh(E / 2) of their mass from some keys to others.  As weights sum to one,

        out~ - out = sum_j (w~_j - w_j) v~_j + sum_j w_j (v~_j - v_j)
        |out~ - out|_d <= tanh(E_i / 2) (max_j v~_jd - min_j v~_jd) + max_j b_j / 2.

    Both can be attained: by two keys whose errors are along q and have opposite signs.  Random
    errors cancel: of normal inputs with 64 channels and 37 keys the largest error of a score is
    between a sixth and a half of its bound, that of an output about a twenty-fifth.

    Args:
      query: in floating point.
      key, value: from `quantize`.
      visible: boolean, broadcasts to "*B N T S"; None: every query sees every key.
      scale: of the scores; 1/sqrt(H) by default.
      lipschitz: of the modifiers together.

    Returns:
      Bounds for softmax; for sinks the output's holds as well if zero is among the values of each
      channel.  Rounding of sums is not included.

    Raises:
      TypeError: `key` or `value` is not `Quantized`.
      ValueError: head counts that do not divide.
    """
    for name, x in (("key", key), ("value", value)):
        if not isinstance(x, Quantized):
            raise TypeError(f"{name}: expected Quantized, got {type(x).__name__}.")
    heads, shared = query.shape[-2], key.shape[-2]
    if heads % shared:
        raise ValueError(f"query: {heads} heads are not a multiple of {shared} key heads.")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale

    axis = key.values.ndim - 3

    def by_query_head(x: Array) -> Array:
        """ "*B S K ..." to "*B N S ..."."""
        return jnp.repeat(jnp.moveaxis(x, axis + 1, axis), heads // shared, axis)

    size = jnp.sum(jnp.abs(query.astype(jnp.float32)), axis=-1)
    size = jnp.swapaxes(size, -1, -2)[..., None]  # *B N T 1
    key_step = _STEP * by_query_head(key.token_scale())[..., None, :]
    value_step = _STEP * by_query_head(value.token_scale())[..., None, :]
    scores = abs(scale) * lipschitz * size * key_step
    seen = jnp.ones((1,) * scores.ndim, bool) if visible is None else jnp.asarray(visible)
    seen = jnp.broadcast_to(
        seen.reshape((1,) * (scores.ndim - seen.ndim) + seen.shape), scores.shape
    )
    most = jnp.max(jnp.where(seen, scores, 0), axis=-1)[..., None]

    def over_seen(x: Array, reduce: Any, start: float) -> Array:
        """Reduce "*B N S D" over the keys that each query sees: "*B N T D"."""

        def one(channel: Array) -> Array:
            return reduce(jnp.where(seen, channel[..., None, :], start), axis=-1)

        return jnp.moveaxis(jax.lax.map(one, jnp.moveaxis(x, -1, 0)), 0, -1)

    v = by_query_head(value.dequantize())
    spread = over_seen(v, jnp.max, -np.inf) - over_seen(v, jnp.min, np.inf)
    spread = jnp.where(seen.any(-1)[..., None], spread, 0)
    rounding = jnp.max(jnp.where(seen, value_step, 0), axis=-1)[..., None]
    output = jnp.tanh(most / 2) * spread + rounding
    return QuantizationBound(scores, jnp.swapaxes(output, -3, -2))
