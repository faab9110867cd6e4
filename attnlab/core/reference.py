"""Attention with the whole score matrix in memory: the formula, and what all else is measured by.

Also holds the pieces of the formula that every plain-JAX implementation shares, written for one
tile; the reference is the case in which the tile is the whole matrix.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.core.dropout import keep_mask
from attnlab.core.masks import Mask
from attnlab.core.normalizers import Normalizer
from attnlab.core.partial import block_weights, finite
from attnlab.core.scores import ScoreModifier, apply_modifiers
from attnlab.core.terms import At, Tile, accumulator, align, axes_of, restrict


class Call(NamedTuple):
    """One call of attention, heads before positions: query "*B N T H", key "*B K S H".

    What is part of a larger call says where it lies: offsets may be one number or one for each
    query or key; `first` has the numbers of its first batch entry and head, and the positions of
    the larger call's first query and key.
    """

    query: Float[Array, "*B N T H"]
    key: Float[Array, "*B K S H"]
    value: Float[Array, "*B K S D"]
    modifiers: tuple[ScoreModifier, ...]
    normalizer: Normalizer
    mask: Mask
    query_offset: Any
    key_offset: Any
    dropout_key: Any
    scale: float
    dropout_rate: float
    first: tuple[Any, ...] = (0, 0, 0, 0)

    @property
    def lengths(self) -> tuple[int, int]:
        return self.query.shape[-2], self.key.shape[-2]

    @property
    def accumulator(self) -> jnp.dtype:
        """The dtype of scores and sums: float32, or float64 for float64 inputs."""
        return accumulator(self.query.dtype)

    def tile(self, row: Any, col: Any, rows: int, cols: int) -> Tile:
        return Tile(
            row,
            col,
            rows,
            cols,
            self.query.shape[-3],
            self.query.ndim,
            self.query_offset,
            self.key_offset,
            self.first,
        )

    def kept(self, tile: Tile) -> Bool[Array, "*B N t s"]:
        """The pairs of a tile that dropout keeps."""
        batch = self.query.shape[:-3]
        return keep_mask(self.dropout_key, self.dropout_rate, tile.at(), batch, self.first[0])

    def allowed(self, tile: Tile) -> Bool[Array, "..."]:
        return restrict(self.mask, axes_of(self.mask), tile).allowed(tile.at())


def isolate_bad(
    key: Float[Array, "*B K S H"], value: Float[Array, "*B K S D"]
) -> tuple[Float[Array, "*B K S H"], Float[Array, "*B K S D"]]:
    """Move NaN and infinity of a value into its key, so that only queries that see it are touched.

    In a matrix product a weight of zero times NaN is NaN; a masked score is not.
    """
    return jnp.where(bad_rows(value)[..., None], jnp.nan, key), zero_bad(value)


def bad_rows(x: Float[Array, "*B N T H"]) -> Bool[Array, "*B N T"]:
    """True where a vector has an entry that is not finite."""
    return ~jnp.all(jnp.isfinite(x), axis=-1)


def _repeat_heads(x: Bool[Array, "*B K S"], query: Array) -> Bool[Array, "*B N S"]:
    return jnp.repeat(x, query.shape[-3] // x.shape[-2], axis=-2)


def zero_bad(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Zeros in place of NaN and infinity."""
    return jnp.where(jnp.isfinite(x), x, 0)


def product(a: Array, b: Array, dtype: Any) -> Array:
    """The matrix product a b of arrays of one dtype, accumulated in `dtype`."""
    if a.dtype == dtype:
        return jnp.matmul(a, b)

    def widened(a: Array, b: Array) -> Array:
        # XLA for CPUs multiplies bfloat16 in float32 anyway, but refuses some layouts of it.
        return jnp.matmul(a.astype(dtype), b.astype(dtype))

    def narrow(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, preferred_element_type=dtype)

    return jax.lax.platform_dependent(a, b, cpu=widened, default=narrow)


def grouped_matmul(
    a: Float[Array, "*B N t x"], b: Float[Array, "*B K x y"], dtype: jnp.dtype
) -> Float[Array, "*B N t y"]:
    """A @ b where N / K consecutive heads of `a` share a head of `b`; accumulated in `dtype`."""
    *batch, heads, rows, inner = a.shape
    shared = b.shape[-3]
    a = a.reshape(*batch, shared, heads // shared * rows, inner)
    out = product(a, b, dtype)
    return out.reshape(*batch, heads, rows, b.shape[-1])


def log_weights(
    modifiers: tuple[ScoreModifier, ...],
    normalizer: Normalizer,
    products: Float[Array, "*B N t s"],
    at: At,
    allowed: Bool[Array, "..."] | None,
) -> Float[Array, "*B N t s"]:
    """Scores after modifiers (for a shared normalizer, after its logarithm too); -inf if masked."""
    if allowed is not None:
        # Twice `where`: what a modifier makes of a masked score must not reach a gradient.
        products = jnp.where(allowed, products, 0)
    scores = apply_modifiers(modifiers, products, at, allowed)
    if normalizer.kind == "shared":
        scores = normalizer.log_weight(scores)
    return scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)


def join_extra(
    out: Float[Array, "*B N T D"],
    lse: Float[Array, "*B N T"],
    extra: Float[Array, "..."],
) -> tuple[Float[Array, "*B N T D"], Float[Array, "*B N T"]]:
    """Merge with a key of logit `extra` (a scalar or "N") whose value is zero."""
    extra = jnp.asarray(extra, lse.dtype)
    extra = align(extra, "N" if extra.ndim else "", lse.ndim + 1)[..., 0] if extra.ndim else extra
    total = jnp.logaddexp(lse, extra)
    kept = jnp.exp(lse - finite(total))
    return out * kept[..., None].astype(out.dtype), total


def dense_tile(
    call: Call, tile: Tile, query: Float[Array, "*B N t H"]
) -> tuple[Float[Array, "*B N t D"], Float[Array, "*B N t"]]:
    """Rows of attention over all keys at once: output in the accumulator's dtype, and lse."""
    dtype = call.accumulator
    key, value = isolate_bad(call.key, call.value)
    # The products are taken of clean arrays, or gradients through masked pairs would be 0 * NaN.
    products = grouped_matmul(zero_bad(query), jnp.swapaxes(zero_bad(key), -1, -2), dtype)
    bad = bad_rows(query)[..., :, None] | _repeat_heads(bad_rows(key), query)[..., None, :]
    products = jnp.where(bad, jnp.nan, products * call.scale)
    at, allowed = tile.at(), call.allowed(tile)
    modifiers = restrict(call.modifiers, axes_of(call.modifiers), tile)
    scores = log_weights(modifiers, call.normalizer, products, at, allowed)
    allowed = jnp.broadcast_to(allowed, scores.shape)
    lse = jnp.zeros(scores.shape[:-1], dtype)
    if call.normalizer.kind == "shared":
        weights, top, total = block_weights(scores)
        weights = weights / jnp.where(total > 0, total, 1)[..., None]
        lse = jnp.where(total > 0, finite(top) + jnp.log(jnp.where(total > 0, total, 1)), top)
    elif call.normalizer.kind == "separate":
        weights = call.normalizer.weight(scores)
    else:
        weights = call.normalizer.row_weights(scores, allowed)
    if call.dropout_rate:
        weights = jnp.where(call.kept(tile), weights / (1 - call.dropout_rate), 0)
    out = grouped_matmul(weights.astype(value.dtype), value, dtype)
    return out, lse


def reference_attention(
    call: Call,
) -> tuple[Float[Array, "*B N T D"], Float[Array, "*B N T"]]:
    """All rows at once: O(T S) memory."""
    return dense_tile(call, call.tile(0, 0, *call.lengths), call.query)


def default_scale(head_width: int) -> float:
    """1 / sqrt(H)."""
    return 1 / math.sqrt(head_width)


def heads_first(x: Array) -> Array:
    """Positions before heads to heads before positions, "*B N T H", and back."""
    return jnp.swapaxes(x, -3, -2)
