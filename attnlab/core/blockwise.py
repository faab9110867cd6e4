"""Exact attention in O(T + S) memory, in plain JAX, differentiable every way.

The score matrix is visited tile by tile.  A static plan leaves out tiles that the mask empties and
spares full tiles its arithmetic; a tile whose emptiness is a matter of data is looked at first and
skipped if empty.  Three folds over the same tiles do all the work:

    forward   x            -> out, lse        merging partial softmaxes
    tangent   x, dx        -> d out, d lse    the derivative in a direction
    backward  x, cotangent -> d x             the gradient, parameters of modifiers included

Given lse, the weights of a tile are known without a second pass (Dao et al. 2022,
arXiv:2205.14135), so tangent and backward are single folds.  Reverse mode is the tangent with the
backward as its transpose.  Second derivatives need no fourth fold: the Hessian is symmetric, so the
transpose of the derivative of the backward is that derivative itself, and each of the three serves
the others, always in O(T + S) memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from attnlab.core.dropout import keep_mask
from attnlab.core.linear_map import custom_linear
from attnlab.core.masks import Mask, Span
from attnlab.core.normalizers import Normalizer
from attnlab.core.partial import Partial, block_weights, finish, finite, merge
from attnlab.core.reference import (
    Call,
    dense_tile,
    grouped_matmul,
    isolate_bad,
    log_weights,
    zero_bad,
)
from attnlab.core.terms import Tile, axes_of, named_axes, restrict

Leaves = list[Any]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles to visit, as block numbers, and whether a tile must be looked at before work."""

    full: tuple[tuple[int, int], ...]
    partial: tuple[tuple[int, int], ...]
    look: bool


def plan_tiles(
    mask: Mask, lengths: tuple[int, int], block_sizes: tuple[int, int], offsets: tuple[Any, Any]
) -> Tiles:
    """What is known before running: traced offsets and masks made of data leave tiles partial."""
    shape = tuple(-(-n // b) for n, b in zip(lengths, block_sizes, strict=True))
    known = all(isinstance(o, int) for o in offsets)
    if known:
        some, every = mask.bounds(Span.of(lengths, block_sizes, offsets))
    else:
        some, every = np.True_, np.False_
    some, every = (np.broadcast_to(np.asarray(x), shape).copy() for x in (some, every))
    # Blocks that reach beyond the end hold padding, which is masked like everything else.
    if lengths[0] % block_sizes[0]:
        every[-1, :] = False
    if lengths[1] % block_sizes[1]:
        every[:, -1] = False

    def listed(chosen: np.ndarray) -> tuple[tuple[int, int], ...]:
        return tuple((int(i), int(j)) for i, j in np.argwhere(chosen))

    return Tiles(listed(some & every), listed(some & ~every), not (known and mask.exact_bounds))


@dataclasses.dataclass(frozen=True)
class Folds:
    """The folds for one static shape of call; `x` is [query, key, value, *trainable leaves]."""

    tree: Any  # of (modifiers, normalizer)
    trainable: tuple[int, ...]  # which of their leaves are floating-point
    tags: tuple[str, ...]  # axes of all their leaves
    block_sizes: tuple[int, int]
    scale: float
    dropout_rate: float
    static_offsets: tuple[int | None, int | None]

    def call(self, x: Leaves, aux: dict[str, Any]) -> Call:
        leaves = list(aux["fixed"])
        for i, leaf in zip(self.trainable, x[3:], strict=True):
            leaves[i] = leaf
        modifiers, normalizer = jax.tree.unflatten(self.tree, leaves)
        offsets = (
            traced if known is None else known
            for known, traced in zip(self.static_offsets, aux["offsets"], strict=True)
        )
        return Call(
            x[0], x[1], x[2], modifiers, normalizer, aux["mask"], *offsets,
            aux["dropout_key"], self.scale, self.dropout_rate,
        )  # fmt: skip

    # -- the folds -------------------------------------------------------------------------------

    def forward(self, x: Leaves, aux: dict[str, Any]) -> tuple[Array, Array]:
        work = _Work.of(self, x, aux)
        dtype = work.call.accumulator
        *batch, heads, rows, _ = work.query.shape
        start = Partial.identity((*batch, heads, rows), work.value.shape[-1], dtype)

        def visit(state: Partial, tile: Tile, allowed: Any) -> Partial:
            slices = work.cuts(work.params, tile)
            scores = work.log_weights(tile, allowed, work.products(tile), slices)
            value = work.cols(work.value, tile)
            if work.shared:
                weights, top, total = block_weights(scores)
            else:
                weights = work.terms(tile, slices)[1].weight(scores)
                top = total = jnp.zeros(scores.shape[:-1], dtype)
            kept = work.dropped(weights, tile)
            new = Partial(grouped_matmul(kept.astype(value.dtype), value, dtype), top, total)
            old = Partial(
                work.rows(state.acc, tile),
                *(work.rows(s[..., None], tile)[..., 0] for s in (state.max, state.sum)),
            )
            both = merge(old, new) if work.shared else Partial(old.acc + new.acc, new.max, new.sum)
            return Partial(
                work.put_rows(state.acc, both.acc, tile),
                *(
                    work.put_rows(s[..., None], b[..., None], tile)[..., 0]
                    for s, b in ((state.max, both.max), (state.sum, both.sum))
                ),
            )

        done = work.sweep(visit, start)
        out, lse = finish(done) if work.shared else (done.acc, jnp.zeros_like(done.sum))
        num_queries = x[0].shape[-2]
        return out[..., :num_queries, :], lse[..., :num_queries]

    def tangent(
        self, x: Leaves, aux: dict[str, Any], out: Array, lse: Array, dx: Leaves
    ) -> tuple[Array, Array]:
        """`dx` mirrors `x`; None marks a direction that is zero."""
        work = _Work.of(self, x, aux)
        dtype = work.call.accumulator
        lse = work.pad_rows(lse[..., None])
        d_query, d_key, d_value = (
            None if d is None else pad(d)
            for d, pad in zip(dx[:3], (work.pad_rows, work.pad_cols, work.pad_cols), strict=True)
        )
        params = work.params
        d_params = [
            jnp.zeros_like(p) if d is None else work.pad_leaf(d.astype(p.dtype), i)
            for i, p, d in zip(self.trainable, params, dx[3:], strict=True)
        ]
        *batch, heads, rows, _ = work.query.shape
        start = (
            jnp.zeros((*batch, heads, rows, work.value.shape[-1]), dtype),
            jnp.zeros((*batch, heads, rows, 1), dtype),
        )

        def visit(state: tuple[Array, Array], tile: Tile, allowed: Any) -> tuple[Array, Array]:
            products = work.products(tile)
            d_products = jnp.zeros_like(products)
            if d_query is not None:
                d_products += work.multiply(work.rows(d_query, tile), work.cols(work.clean, tile))
            if d_key is not None:
                query = zero_bad(work.rows(work.query, tile))
                d_products += work.multiply(query, work.cols(d_key, tile))
            stat = work.rows(lse, tile)
            weigh = functools.partial(work.weights, tile, allowed, stat)
            slices, d_slices = work.cuts(params, tile), work.cuts(d_params, tile)
            weights, d_weights = jax.jvp(weigh, (products, slices), (d_products, d_slices))
            value = work.cols(work.value, tile)
            moved = work.dropped(d_weights, tile).astype(value.dtype)
            acc = grouped_matmul(moved, value, dtype)
            if d_value is not None:
                kept = work.dropped(weights, tile).astype(value.dtype)
                acc += grouped_matmul(kept, zero_bad(work.cols(d_value, tile)), dtype)
            total = jnp.sum(d_weights, axis=-1, keepdims=True)
            return tuple(
                work.put_rows(s, work.rows(s, tile) + new, tile)
                for s, new in zip(state, (acc, total), strict=True)
            )

        acc, total = work.sweep(visit, start)
        num_queries = x[0].shape[-2]
        acc, total = acc[..., :num_queries, :], total[..., :num_queries, :]
        if not work.shared:
            return acc, jnp.zeros_like(total[..., 0])
        return acc - total * out, total[..., 0]

    def backward(
        self,
        wanted: tuple[int, ...],
        x: Leaves,
        aux: dict[str, Any],
        out: Array,
        lse: Array,
        cotangent: tuple[Array, Array],
    ) -> Leaves:
        """The cotangents of `x[i]` for i in `wanted`."""
        work = _Work.of(self, x, aux)
        dtype = work.call.accumulator
        d_out, d_lse = cotangent
        shift = d_lse[..., None] - jnp.sum(d_out * out, axis=-1, keepdims=True)
        d_out, lse, shift = (work.pad_rows(z) for z in (d_out, lse[..., None], shift))
        params, d_out_low = work.params, d_out.astype(work.value.dtype)
        shapes = [work.query.shape, work.key.shape, work.value.shape, *(p.shape for p in params)]
        start = [jnp.zeros(shapes[i], dtype) for i in wanted]

        def visit(state: Leaves, tile: Tile, allowed: Any) -> Leaves:
            stat = work.rows(lse, tile)
            weigh = functools.partial(work.weights, tile, allowed, stat)
            weights, pull = jax.vjp(weigh, work.products(tile), work.cuts(params, tile))
            value, d_rows = work.cols(work.value, tile), work.rows(d_out_low, tile)
            d_weights = work.dropped(work.multiply(d_rows, value), tile)
            if work.shared:
                d_weights = d_weights + work.rows(shift, tile)
            d_products, d_slices = pull(d_weights)
            d_products = d_products.astype(work.query.dtype)
            state = list(state)
            for n, i in enumerate(wanted):
                if i == 0:
                    new = grouped_matmul(d_products, work.cols(work.clean, tile), dtype)
                    state[n] = work.put_rows(state[n], work.rows(state[n], tile) + new, tile)
                elif i == 1:
                    query = zero_bad(work.rows(work.query, tile))
                    new = work.grouped_outer(d_products, query)
                    state[n] = work.put_cols(state[n], work.cols(state[n], tile) + new, tile)
                elif i == 2:
                    kept = work.dropped(weights, tile).astype(value.dtype)
                    new = work.grouped_outer(kept, d_rows)
                    state[n] = work.put_cols(state[n], work.cols(state[n], tile) + new, tile)
                else:
                    state[n] = work.add_cut(state[n], d_slices[i - 3], self.trainable[i - 3], tile)
            return state

        done = work.sweep(visit, start)
        return [_crop(d, x[i].shape).astype(x[i].dtype) for d, i in zip(done, wanted, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Work:
    """One call, padded to whole blocks, with the slicing that the folds need."""

    folds: Folds
    call: Call  # padded; keys carry NaN where key or value is bad
    clean: Array  # keys with bad entries zeroed, for products with cotangents
    params: Leaves  # trainable leaves, padded, in the accumulator's dtype
    tiles: Tiles
    lengths: tuple[int, int]

    @classmethod
    def of(cls, folds: Folds, x: Leaves, aux: dict[str, Any]) -> "_Work":
        call = folds.call(x, aux)
        key, value = isolate_bad(call.key, call.value)
        lengths = call.lengths
        offsets = (call.query_offset, call.key_offset)
        tiles = plan_tiles(call.mask, lengths, folds.block_sizes, offsets)
        rows, cols = (-n % b for n, b in zip(lengths, folds.block_sizes, strict=True))
        key, value = _pad(key, -2, cols), _pad(value, -2, cols)
        leaves, tree = jax.tree.flatten((call.modifiers, call.normalizer))
        leaves = [_pad_named(jnp.asarray(z), t, rows, cols) for z, t in zip(leaves, folds.tags)]
        params = [leaves[i].astype(call.accumulator) for i in folds.trainable]
        modifiers, normalizer = jax.tree.unflatten(tree, leaves)
        mask_leaves, mask_tree = jax.tree.flatten(call.mask)
        mask = jax.tree.unflatten(
            mask_tree,
            [
                jax.lax.stop_gradient(_pad_named(jnp.asarray(z), t, rows, cols))
                for z, t in zip(mask_leaves, axes_of(call.mask), strict=True)
            ],
        )
        padded = call._replace(
            query=_pad(call.query, -2, rows), key=key, value=value,
            modifiers=modifiers, normalizer=normalizer, mask=mask,
        )  # fmt: skip
        return cls(folds, padded, zero_bad(key), params, tiles, lengths)

    query = property(lambda self: self.call.query)
    key = property(lambda self: self.call.key)
    value = property(lambda self: self.call.value)
    shared = property(lambda self: self.call.normalizer.kind == "shared")

    # -- slices ----------------------------------------------------------------------------------

    def rows(self, x: Array, tile: Tile) -> Array:
        return _slice(x, tile.row, tile.rows)

    def cols(self, x: Array, tile: Tile) -> Array:
        return _slice(x, tile.col, tile.cols)

    def put_rows(self, x: Array, new: Array, tile: Tile) -> Array:
        return _put(x, new, tile.row)

    def put_cols(self, x: Array, new: Array, tile: Tile) -> Array:
        return _put(x, new, tile.col)

    def pad_rows(self, x: Array) -> Array:
        return _pad(x, -2, self.query.shape[-2] - x.shape[-2])

    def pad_cols(self, x: Array) -> Array:
        return _pad(x, -2, self.key.shape[-2] - x.shape[-2])

    def pad_leaf(self, x: Array, i: int) -> Array:
        rows, cols = (-n % b for n, b in zip(self.lengths, self.folds.block_sizes, strict=True))
        return _pad_named(x, self.folds.tags[i], rows, cols)

    def _where(self, x: Array, i: int, tile: Tile) -> tuple[list[Any], list[int]]:
        starts, sizes = [0] * x.ndim, list(x.shape)
        for letter, axis in named_axes(self.folds.tags[i], x.ndim):
            if letter in "TS" and x.shape[axis] != 1:
                row = letter == "T"
                starts[axis] = tile.row if row else tile.col
                sizes[axis] = tile.rows if row else tile.cols
        return starts, sizes

    def cuts(self, leaves: Leaves, tile: Tile) -> Leaves:
        """The parts of the trainable leaves that belong to the tile, not yet aligned."""
        return [
            jax.lax.dynamic_slice(x, *self._where(x, i, tile))
            for i, x in zip(self.folds.trainable, leaves, strict=True)
        ]

    def add_cut(self, total: Array, part: Array, i: int, tile: Tile) -> Array:
        starts, sizes = self._where(total, i, tile)
        old = jax.lax.dynamic_slice(total, starts, sizes)
        return jax.lax.dynamic_update_slice(total, old + part, starts)

    # -- the mathematics of one tile -------------------------------------------------------------

    def multiply(self, a: Array, b: Array) -> Array:
        """A b^T in the accumulator's dtype."""
        return grouped_matmul(a, jnp.swapaxes(b, -1, -2), self.call.accumulator)

    def grouped_outer(self, a: Array, b: Array) -> Array:
        """a^T b, summed over the query heads that share a key head."""
        *batch, heads, rows, cols = a.shape
        shared = self.key.shape[-3]
        a = a.reshape(*batch, shared, heads // shared * rows, cols)
        b = b.reshape(*batch, shared, heads // shared * rows, b.shape[-1])
        return jnp.matmul(jnp.swapaxes(a, -1, -2), b, preferred_element_type=self.call.accumulator)

    def products(self, tile: Tile) -> Array:
        return self.multiply(self.rows(self.query, tile), self.cols(self.key, tile))

    def terms(self, tile: Tile, slices: Leaves) -> tuple[Any, Normalizer]:
        """Modifiers and normalizer for a tile, with given slices in place of trainable leaves."""
        leaves, tree = jax.tree.flatten((self.call.modifiers, self.call.normalizer))
        # A slice that has the tile's size already is only aligned.
        leaves = _merge(leaves, slices, self.folds.trainable)
        return restrict(jax.tree.unflatten(tree, leaves), self.folds.tags, tile)

    def log_weights(self, tile: Tile, allowed: Any, products: Array, slices: Any) -> Array:
        modifiers, normalizer = self.terms(tile, slices)
        scaled = products * self.folds.scale
        return log_weights(modifiers, normalizer, scaled, tile.at(), allowed)

    def weights(
        self, tile: Tile, allowed: Any, lse: Array, products: Array, slices: Leaves
    ) -> Array:
        """Final weights of a tile, given the log-sum-exp of its rows."""
        scores = self.log_weights(tile, allowed, products, slices)
        if self.shared:
            return jnp.exp(scores - finite(lse))
        return self.terms(tile, slices)[1].weight(scores)

    def dropped(self, weights: Array, tile: Tile) -> Array:
        rate = self.folds.dropout_rate
        if not rate:
            return weights
        keep = keep_mask(self.call.dropout_key, rate, tile.at(), weights.shape[:-3])
        return jnp.where(keep, weights / (1 - rate), 0)

    # -- visiting --------------------------------------------------------------------------------

    def sweep(self, visit: Callable, state: Any) -> Any:
        """`visit(state, tile, allowed)` for every tile that is not empty."""
        rows, cols = self.folds.block_sizes

        def tile_at(row: Any, col: Any) -> Tile:
            return self.call.tile(row * rows, col * cols, rows, cols)

        def on_full(row: Any, col: Any, state: Any) -> Any:
            return visit(state, tile_at(row, col), None)

        def on_partial(row: Any, col: Any, state: Any) -> Any:
            tile = tile_at(row, col)
            allowed = self._allowed(tile)
            if not self.tiles.look:
                return visit(state, tile, allowed)
            return jax.lax.cond(
                jnp.any(allowed), lambda s: visit(s, tile, allowed), lambda s: s, state
            )

        for tiles, step in ((self.tiles.full, on_full), (self.tiles.partial, on_partial)):
            state = _for_each(tiles, step, state)
        return state

    def _allowed(self, tile: Tile) -> Bool[Array, "..."]:
        allowed = self.call.allowed(tile)
        inside = []
        for axis, length, first, size in (
            (-2, self.lengths[0], tile.row, tile.rows),
            (-1, self.lengths[1], tile.col, tile.cols),
        ):
            if length % size:
                shape = [1] * tile.rank
                shape[axis] = size
                inside.append((jnp.arange(size) + first < length).reshape(shape))
        for part in inside:
            allowed = allowed & part
        return allowed


def _for_each(tiles: Sequence[tuple[int, int]], step: Callable, state: Any) -> Any:
    if len(tiles) <= 1:
        for row, col in tiles:
            state = step(row, col, state)
        return state
    table = jnp.asarray(np.array(tiles, np.int32))
    return jax.lax.fori_loop(0, len(tiles), lambda n, s: step(table[n, 0], table[n, 1], s), state)


def _slice(x: Array, start: Any, size: int) -> Array:
    if x.shape[-2] == size:
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=-2)


def _put(x: Array, new: Array, start: Any) -> Array:
    if x.shape == new.shape:
        return new
    return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=-2)


def _pad(x: Array, axis: int, amount: int, mode: str = "constant") -> Array:
    if not amount:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, amount)
    return jnp.pad(x, widths, mode=mode)


def _pad_named(x: Array, tag: str, rows: int, cols: int) -> Array:
    """Repeat the last entry along T and S, so that padding never holds an unusual number."""
    for letter, axis in named_axes(tag, x.ndim) if tag else ():
        if letter in "TS" and x.shape[axis] != 1:
            x = _pad(x, axis, rows if letter == "T" else cols, "edge")
    return x


def _crop(x: Array, shape: tuple[int, ...]) -> Array:
    return x if x.shape == shape else x[tuple(slice(n) for n in shape)]


# -- derivatives: each fold serves the others ------------------------------------------------------


def _spread(values: Sequence[Any], places: Sequence[int], size: int) -> Leaves:
    full: Leaves = [None] * size
    for place, value in zip(places, values, strict=True):
        full[place] = value
    return full


def _moving(tangents: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero))


def _directional(function: Callable, x: Leaves, dx: Leaves) -> Any:
    """The derivative of `function(x)` along `dx`, where None means zero."""
    places = [i for i, d in enumerate(dx) if d is not None]

    def along(*values: Any) -> Any:
        return function([*_merge(x, values, places)])

    return jax.jvp(along, tuple(x[i] for i in places), tuple(dx[i] for i in places))[1]


def _merge(x: Leaves, values: Sequence[Any], places: Sequence[int]) -> Leaves:
    full = list(x)
    for place, value in zip(places, values, strict=True):
        full[place] = value
    return full


def _no_change(result: Any) -> tuple[Any, Any]:
    return result, jax.tree.map(jnp.zeros_like, result)


def make_solver(folds: Folds) -> Callable:
    """`solve(x, aux) -> (out, lse)`, differentiable in `x` to any order, forward and reverse."""

    def total_tangent(x: Leaves, aux: Any, dx: Leaves) -> Any:
        return folds.tangent(x, aux, *folds.forward(x, aux), dx)

    def total_backward(wanted: tuple[int, ...], x: Leaves, aux: Any, cotangent: Any) -> Leaves:
        return folds.backward(wanted, x, aux, *folds.forward(x, aux), cotangent)

    @jax.custom_jvp
    def forward(x: Leaves, aux: Any) -> tuple[Array, Array]:
        return folds.forward(x, aux)

    def forward_rule(primals: Any, tangents: Any) -> Any:
        x, aux = primals
        out = forward(x, aux)
        moving = _moving(tangents[0])
        if not moving:
            return _no_change(out)

        def push(residuals: Any, dx: Leaves) -> Any:
            return tangent(moving)(*residuals, dx)

        def pull(residuals: Any, cotangent: Any) -> Leaves:
            return backward(moving)(*residuals, cotangent)

        dx = [tangents[0][i] for i in moving]
        return out, custom_linear(push, pull, (x, aux, *out), dx)

    # The derivatives of the two other folds.  `out` and `lse` are functions of x, so the rules take
    # total derivatives in x and ignore the tangents of `out` and `lse`.

    @functools.cache
    def tangent(moving: tuple[int, ...]) -> Callable:
        @jax.custom_jvp
        def apply(x: Leaves, aux: Any, out: Array, lse: Array, dx: Leaves) -> Any:
            return folds.tangent(x, aux, out, lse, _spread(dx, moving, len(x)))

        def rule(primals: Any, tangents: Any) -> Any:
            result = apply(*primals)
            in_x, in_dx = _moving(tangents[0]), _moving(tangents[4])
            if not in_x and not in_dx:
                return _no_change(result)

            def push(residuals: Any, operand: Any) -> Any:
                x, aux, _, _, dx = residuals
                n = len(x)
                return _directional(
                    lambda both: total_tangent(both[:n], aux, _spread(both[n:], moving, n)),
                    [*x, *dx],
                    [*_spread(operand[0], in_x, n), *_spread(operand[1], in_dx, len(dx))],
                )

            def pull(residuals: Any, cotangent: Any) -> Any:
                x, aux, out, lse, dx = residuals
                curved = _directional(
                    lambda y: total_backward(in_x, y, aux, cotangent),
                    x,
                    _spread(dx, moving, len(x)),
                )
                chosen = tuple(moving[i] for i in in_dx)
                return curved, folds.backward(chosen, x, aux, out, lse, cotangent)

            operand = [tangents[0][i] for i in in_x], [tangents[4][i] for i in in_dx]
            return result, custom_linear(push, pull, primals, operand)

        apply.defjvp(rule, symbolic_zeros=True)
        return apply

    @functools.cache
    def backward(wanted: tuple[int, ...]) -> Callable:
        @jax.custom_jvp
        def apply(x: Leaves, aux: Any, out: Array, lse: Array, cotangent: Any) -> Leaves:
            return folds.backward(wanted, x, aux, out, lse, cotangent)

        def rule(primals: Any, tangents: Any) -> Any:
            result = apply(*primals)
            in_x, in_cotangent = _moving(tangents[0]), _moving(tangents[4])
            if not in_x and not in_cotangent:
                return _no_change(result)

            def push(residuals: Any, operand: Any) -> Leaves:
                x, aux, _, _, cotangent = residuals
                n = len(x)
                return _directional(
                    lambda both: total_backward(wanted, both[:n], aux, tuple(both[n:])),
                    [*x, *cotangent],
                    [*_spread(operand[0], in_x, n), *_spread(operand[1], in_cotangent, 2)],
                )

            def pull(residuals: Any, u: Leaves) -> Any:
                x, aux, out, lse, cotangent = residuals
                direction = _spread(u, wanted, len(x))
                curved = _directional(
                    lambda y: total_backward(in_x, y, aux, cotangent), x, direction
                )
                moved = folds.tangent(x, aux, out, lse, direction)
                return curved, [moved[i] for i in in_cotangent]

            operand = [tangents[0][i] for i in in_x], [tangents[4][i] for i in in_cotangent]
            return result, custom_linear(push, pull, primals, operand)

        apply.defjvp(rule, symbolic_zeros=True)
        return apply

    forward.defjvp(forward_rule, symbolic_zeros=True)
    return forward


# -- the call --------------------------------------------------------------------------------------


# Costs in entries of the score matrix, as measured on a two-core CPU by `attnlab bench time`: a tile
# of up to _ONE_CORE entries is too small to be split over cores, visiting a tile costs as much as
# _VISIT entries, and the scores of a tile should stay within _LARGEST entries (16 MB of float32).
_ONE_CORE, _VISIT, _LARGEST = 2**17, 6_000, 2**22
_CANDIDATES = ((512, 1024), (512, 512), (256, 256), (128, 128))


def default_block_sizes(call: Call) -> tuple[int, int]:
    """The candidate of least estimated cost: entries visited, plus what every visit costs.

    Small batches want large tiles, so that a tile keeps all cores busy; large batches want smaller
    ones, so that a tile's scores stay small; narrow windows want small ones, which waste less at
    the edges.
    """
    together = math.prod(call.query.shape[:-2])
    offsets = (call.query_offset, call.key_offset)

    def cost(block_sizes: tuple[int, int]) -> float:
        entries = together * math.prod(block_sizes)
        tiles = plan_tiles(call.mask, call.lengths, block_sizes, offsets)
        each = entries * (2 if entries <= _ONE_CORE else 1) + _VISIT
        too_large = entries > _LARGEST and block_sizes != candidates[-1]
        return math.inf if too_large else each * (len(tiles.full) + len(tiles.partial))

    candidates = [
        (_even(call.lengths[0], rows), _even(call.lengths[1], cols)) for rows, cols in _CANDIDATES
    ]
    return min(candidates, key=cost)


def _even(length: int, block: int) -> int:
    """The block size that cuts `length` into equal parts of about `block`, padded the least."""
    parts = -(-length // block)
    size = -(-length // parts)
    return size if parts == 1 else min(-(-size // 8) * 8, length)


def blockwise_attention(
    call: Call, block_sizes: tuple[int, int] | None = None
) -> tuple[Float[Array, "*B N T D"], Float[Array, "*B N T"]]:
    """Attention in O(T + S) memory; output in the accumulator's dtype, and the log-sum-exp."""
    if block_sizes is None:
        block_sizes = default_block_sizes(call)
    block_sizes = (min(block_sizes[0], call.lengths[0]), min(block_sizes[1], call.lengths[1]))
    offsets = (call.query_offset, call.key_offset)
    static_offsets = tuple(o if isinstance(o, int) else None for o in offsets)
    aux = {
        "mask": jax.tree.map(jnp.asarray, call.mask),
        "offsets": tuple(jnp.asarray(o, jnp.int32) for o in offsets),
        "dropout_key": call.dropout_key,
    }
    terms = (call.modifiers, call.normalizer)
    tags = axes_of(call.modifiers) + call.normalizer.axes()
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, terms))
    trainable = tuple(i for i, z in enumerate(leaves) if jnp.issubdtype(z.dtype, jnp.floating))
    if call.normalizer.kind == "row":
        return _row_blocks(call, block_sizes[0])
    aux["fixed"] = [None if i in trainable else z for i, z in enumerate(leaves)]
    x = [call.query, call.key, call.value, *(leaves[i] for i in trainable)]
    folds = Folds(tree, trainable, tags, block_sizes, call.scale, call.dropout_rate, static_offsets)
    return _solve(folds, x, aux)


@functools.partial(jax.jit, static_argnums=0)
def _solve(folds: Folds, x: Leaves, aux: dict[str, Any]) -> tuple[Array, Array]:
    return make_solver(folds)(x, aux)


def _row_blocks(call: Call, block: int) -> tuple[Array, Array]:
    """Normalizers that need whole rows: a block of rows at a time, recomputed when differentiated."""
    num_queries, num_keys = call.lengths
    padding = -num_queries % block
    query = _pad(call.query, -2, padding)

    def padded(terms: Any, tags: Sequence[str]) -> Any:
        leaves, tree = jax.tree.flatten(terms)
        return jax.tree.unflatten(
            tree, [_pad_named(jnp.asarray(z), t, padding, 0) for z, t in zip(leaves, tags)]
        )

    call = call._replace(
        mask=padded(call.mask, axes_of(call.mask)),
        modifiers=padded(call.modifiers, axes_of(call.modifiers)),
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
