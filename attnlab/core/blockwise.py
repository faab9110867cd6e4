"""Exact attention in O(T + S) memory, in plain JAX, differentiable every way.

The score matrix is visited tile by tile.  A static plan leaves out tiles that the mask empties and
spares full tiles its arithmetic; a tile whose emptiness is a matter of data is looked at first and
skipped if empty.  Three folds over the same tiles do all the work (`attnlab.core.folds`):

    forward   x            -> out, lse        merging partial softmaxes
    tangent   x, dx        -> d out, d lse    the derivative in a direction
    backward  x, cotangent -> d x             the gradient, parameters of modifiers included

Given lse, the weights of a tile are known without a second pass (Dao et al. 2022,
arXiv:2205.14135), so tangent and backward are single folds; how all derivatives come from these
three is told in `attnlab.core.derivatives`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.derivatives import make_solver
from attnlab.core.folds import Folds
from attnlab.core.reference import Call, dense_tile
from attnlab.core.scores import whole_rows
from attnlab.core.terms import axes_of
from attnlab.core.tiles import Leaves, Signature, pad_offset, pad_terms, plan_tiles

# Costs in entries of the score matrix, as measured on a two-core CPU: a tile of up to _ONE_CORE
# entries is too small to be split over cores, and visiting a tile costs as much as _VISIT entries.
# What a fold touches at once should stay within the cache; the backward fold, with four arrays of a
# tile's size at hand, leaves it sooner than the forward.
_ONE_CORE, _VISIT = 2**17, 6_000
FORWARD = ((512, 1024), (512, 512), (256, 256), (128, 128))
BACKWARD = ((256, 256), (128, 128))
_LARGEST = 2**20
_ROWS = 2**18  # of whole rows, of which derivatives hold many arrays of this size


def default_block_sizes(
    call: Call, candidates: tuple[tuple[int, int], ...] = FORWARD
) -> tuple[int, int]:
    """The candidate of least estimated cost: entries visited, plus what every visit costs.

    Small batches want large tiles, so that a tile keeps all cores busy; large batches want smaller
    ones, so that a tile's scores stay in the cache; narrow windows want small ones, which waste
    less at the edges.
    """
    together = math.prod(call.query.shape[:-2])
    offsets = (call.query_offset, call.key_offset)
    fitted = [(_even(call.lengths[0], r), _even(call.lengths[1], c)) for r, c in candidates]

    def cost(block_sizes: tuple[int, int]) -> float:
        entries = together * math.prod(block_sizes)
        if entries > _LARGEST and block_sizes != fitted[-1]:
            return math.inf
        tiles = plan_tiles(call.mask, call.lengths, block_sizes, offsets)
        each = entries * (2 if entries <= _ONE_CORE else 1) + _VISIT
        return float(each * (len(tiles.full) + len(tiles.partial)))

    return min(fitted, key=cost)


def _even(length: int, block: int) -> int:
    """The block size that cuts `length` into equal parts of about `block`, padded the least."""
    parts = -(-length // block)
    size = -(-length // parts)
    return size if parts == 1 else min(-(-size // 8) * 8, length)


def blockwise_attention(
    call: Call, block_sizes: tuple[int, int] | None = None
) -> tuple[Float[Array, "*B N T D"], Float[Array, "*B N T"]]:
    """Attention in O(T + S) memory; output in the accumulator's dtype, and the log-sum-exp."""
    if call.normalizer.kind == "row" or whole_rows(call.modifiers):
        return _row_blocks(call, _row_block(call, block_sizes))
    if block_sizes is None:
        forward_blocks = default_block_sizes(call)
        backward_blocks = default_block_sizes(call, BACKWARD)
    else:
        rows, cols = call.lengths
        forward_blocks = (min(block_sizes[0], rows), min(block_sizes[1], cols))
        backward_blocks = forward_blocks
    return _solve(*Signature.of(call, forward_blocks, backward_blocks))


@functools.partial(jax.jit, static_argnums=0)
def _solve(signature: Signature, x: Leaves, aux: dict[str, Any]) -> tuple[Array, Array]:
    return make_solver(Folds(signature))(x, aux)


def _row_block(call: Call, block_sizes: tuple[int, int] | None) -> int:
    """How many whole rows at a time: of a bounded number of scores, but not one by one."""
    rows, cols = call.lengths
    if block_sizes is not None:
        return min(block_sizes[0], rows)
    together = math.prod(call.query.shape[:-2]) * cols
    return min(max(_ROWS // max(together, 1), 8), rows)


def _row_blocks(call: Call, block: int) -> tuple[Array, Array]:
    """For what needs whole rows of scores: some at a time, recomputed for derivatives."""
    num_queries, num_keys = call.lengths
    padding = -num_queries % block
    query = jnp.pad(call.query, [(0, 0)] * (call.query.ndim - 2) + [(0, padding), (0, 0)])
    call = call._replace(
        mask=pad_terms(call.mask, axes_of(call.mask), padding, 0),
        modifiers=pad_terms(call.modifiers, axes_of(call.modifiers), padding, 0),
        query_offset=pad_offset(call.query_offset, padding),
    )

    @jax.checkpoint
    def rows(start: Array) -> tuple[Array, Array]:
        part = jax.lax.dynamic_slice_in_dim(query, start, block, axis=-2)
        tile = call.tile(start, 0, block, num_keys)
        return dense_tile(call, tile, part)

    out, lse = jax.lax.map(rows, jnp.arange(0, num_queries, block, dtype=jnp.int32))
    out = jnp.moveaxis(out, 0, -3).reshape(*query.shape[:-1], out.shape[-1])
    lse = jnp.moveaxis(lse, 0, -2).reshape(query.shape[:-1])
    return out[..., :num_queries, :], lse[..., :num_queries]
