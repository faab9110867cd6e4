"""One call cut into tiles: which to visit, how to slice and put back, and the formula on each."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from attnlab.core.masks import Mask, Span
from attnlab.core.normalizers import Normalizer
from attnlab.core.partial import finite
from attnlab.core.reference import (
    Call,
    grouped_matmul,
    isolate_bad,
    log_weights,
    product,
    zero_bad,
)
from attnlab.core.terms import Tile, axes_of, named_axes, restrict, sized_axes

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
class Signature:
    """What is static about a call.  Its arrays travel as `x` and `aux`:

    x: [query, key, value, *trainable leaves], everything that has a derivative;
    aux: mask, traced offsets, words of the dropout key, and the other leaves of the terms.
    """

    tree: Any  # of (modifiers, normalizer)
    trainable: tuple[int, ...]  # which of their leaves are floating-point
    tags: tuple[str, ...]  # axes of all their leaves
    scale: float
    dropout_rate: float
    places: tuple[int | None, ...]  # offsets and `first`; None where traced
    forward_blocks: tuple[int, int]
    backward_blocks: tuple[int, int]

    @classmethod
    def of(
        cls, call: Call, forward_blocks: tuple[int, int], backward_blocks: tuple[int, int]
    ) -> tuple["Signature", Leaves, dict[str, Any]]:
        """The signature of a call, with its `x` and `aux`."""
        terms = (call.modifiers, call.normalizer)
        leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, terms))
        trainable = tuple(i for i, z in enumerate(leaves) if jnp.issubdtype(z.dtype, jnp.floating))
        places = (call.query_offset, call.key_offset, *call.first)
        aux = {
            "mask": jax.tree.map(jnp.asarray, call.mask),
            "places": tuple(jnp.asarray(o, jnp.int32) for o in places),
            "dropout_key": call.dropout_key,
            "fixed": [None if i in trainable else z for i, z in enumerate(leaves)],
        }
        x = [call.query, call.key, call.value, *(leaves[i] for i in trainable)]
        known = tuple(o if isinstance(o, int) else None for o in places)
        tags = axes_of(call.modifiers) + call.normalizer.axes()
        signature = cls(
            tree, trainable, tags, call.scale, call.dropout_rate, known, forward_blocks,
            backward_blocks,
        )  # fmt: skip
        return signature, x, aux

    def call(self, x: Leaves, aux: dict[str, Any]) -> Call:
        """The call again."""
        modifiers, normalizer = jax.tree.unflatten(
            self.tree, replaced(aux["fixed"], x[3:], self.trainable)
        )
        query_offset, key_offset, *first = (
            traced if known is None else known
            for known, traced in zip(self.places, aux["places"], strict=True)
        )
        return Call(
            x[0], x[1], x[2], modifiers, normalizer, aux["mask"], query_offset, key_offset,
            aux["dropout_key"], self.scale, self.dropout_rate, tuple(first),
        )  # fmt: skip


def replaced(x: Leaves, values: Sequence[Any], places: Sequence[int]) -> Leaves:
    """`x` with `values` at `places`."""
    full = list(x)
    for place, value in zip(places, values, strict=True):
        full[place] = value
    return full


@dataclasses.dataclass(frozen=True)
class Work:
    """One call, padded to whole blocks, with the slicing that the folds need."""

    signature: Signature
    block_sizes: tuple[int, int]
    call: Call  # padded; keys carry NaN where key or value is bad
    clean: Array  # keys with bad entries zeroed, for products with cotangents
    params: Leaves  # trainable leaves, padded, in the accumulator's dtype
    tiles: Tiles
    lengths: tuple[int, int]

    @classmethod
    def of(
        cls, signature: Signature, x: Leaves, aux: dict[str, Any], block_sizes: tuple[int, int]
    ) -> "Work":
        """The call cut into tiles of `block_sizes`."""
        call = signature.call(x, aux)
        lengths, offsets = call.lengths, (call.query_offset, call.key_offset)
        tiles = plan_tiles(call.mask, lengths, block_sizes, offsets)
        rows, cols = (-n % b for n, b in zip(lengths, block_sizes, strict=True))
        key, value = isolate_bad(call.key, call.value)
        key, value = _pad(key, cols), _pad(value, cols)
        terms = pad_terms((call.modifiers, call.normalizer), signature.tags, rows, cols)
        mask = pad_terms(call.mask, axes_of(call.mask), rows, cols)
        leaves = jax.tree.leaves(terms)
        padded = call._replace(
            query=_pad(call.query, rows),
            key=key,
            value=value,
            modifiers=terms[0],
            normalizer=terms[1],
            mask=jax.tree.map(jax.lax.stop_gradient, mask),
            query_offset=pad_offset(call.query_offset, rows),
            key_offset=pad_offset(call.key_offset, cols),
        )
        params = [leaves[i].astype(call.accumulator) for i in signature.trainable]
        return cls(signature, block_sizes, padded, zero_bad(key), params, tiles, lengths)

    query = property(lambda self: self.call.query)
    key = property(lambda self: self.call.key)
    value = property(lambda self: self.call.value)
    shared = property(lambda self: self.call.normalizer.kind == "shared")

    # -- slices ----------------------------------------------------------------------------------

    def rows(self, x: Array, tile: Tile) -> Array:
        return _slice(x, tile.row, tile.rows)

    def cols(self, x: Array, tile: Tile) -> Array:
        return _slice(x, tile.col, tile.cols)

    def columns(self, x: Array, start: Any, size: int) -> Array:
        """Part of the last axis, of arrays that are kept transposed."""
        return x if x.shape[-1] == size else jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)

    def put_rows(self, x: Array, new: Array, tile: Tile) -> Array:
        return _put(x, new, tile.row)

    def add_columns(self, x: Array, new: Array, tile: Tile) -> Array:
        """`x`, kept transposed, with `new` added to the tile's keys."""
        total = self.columns(x, tile.col, tile.cols) + new
        if x.shape == total.shape:
            return total
        return jax.lax.dynamic_update_slice_in_dim(x, total, tile.col, axis=-1)

    def pad_rows(self, x: Array) -> Array:
        return _pad(x, self.query.shape[-2] - x.shape[-2])

    def pad_cols(self, x: Array) -> Array:
        return _pad(x, self.key.shape[-2] - x.shape[-2])

    def pad_leaf(self, x: Array, i: int) -> Array:
        rows, cols = (-n % b for n, b in zip(self.lengths, self.block_sizes, strict=True))
        return _pad_named(x, self.signature.tags[i], rows, cols)

    def _where(self, x: Array, i: int, tile: Tile) -> tuple[list[Any], list[int]]:
        starts: list[Any] = [jnp.int32(0)] * x.ndim
        sizes = list(x.shape)
        for letter, axis in named_axes(self.signature.tags[i], x.ndim):
            if letter in "TS" and x.shape[axis] != 1:
                row = letter == "T"
                starts[axis] = jnp.int32(tile.row if row else tile.col)
                sizes[axis] = tile.rows if row else tile.cols
        return starts, sizes

    def cuts(self, leaves: Leaves, tile: Tile) -> Leaves:
        """The parts of the trainable leaves that belong to the tile, not yet aligned."""
        return [
            jax.lax.dynamic_slice(x, *self._where(x, i, tile))
            for i, x in zip(self.signature.trainable, leaves, strict=True)
        ]

    def add_cut(self, total: Array, part: Array, i: int, tile: Tile) -> Array:
        starts, sizes = self._where(total, i, tile)
        old = jax.lax.dynamic_slice(total, starts, sizes)
        return jax.lax.dynamic_update_slice(total, old + part, starts)

    # -- the mathematics of one tile -------------------------------------------------------------

    def multiply(self, a: Array, b: Array) -> Array:
        """The product of a and b transposed, in the accumulator's dtype."""
        return grouped_matmul(a, jnp.swapaxes(b, -1, -2), self.call.accumulator)

    def sum_rows(self, a: Array, b: Array) -> Array:
        """The product of a "*B N x t" and b "*B N t s", summed over heads that share a key head."""
        *batch, heads, width, rows = a.shape
        shared = self.key.shape[-3]
        group = heads // shared
        a = jnp.moveaxis(a.reshape(*batch, shared, group, width, rows), -3, -2)
        a = a.reshape(*batch, shared, width, group * rows)
        b = b.reshape(*batch, shared, group * rows, b.shape[-1])
        return product(a, b, self.call.accumulator)

    def products(self, tile: Tile) -> Array:
        return self.multiply(self.rows(self.query, tile), self.cols(self.key, tile))

    def terms(self, tile: Tile, slices: Leaves) -> tuple[Any, Normalizer]:
        """Modifiers and normalizer for a tile, with given slices in place of trainable leaves."""
        leaves, tree = jax.tree.flatten((self.call.modifiers, self.call.normalizer))
        # A slice that has the tile's size already is only aligned.
        leaves = replaced(leaves, slices, self.signature.trainable)
        return restrict(jax.tree.unflatten(tree, leaves), self.signature.tags, tile)

    def log_weights(self, tile: Tile, allowed: Any, products: Array, slices: Any) -> Array:
        modifiers, normalizer = self.terms(tile, slices)
        scaled = products * self.signature.scale
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
        rate = self.signature.dropout_rate
        if not rate:
            return weights
        return jnp.where(self.call.kept(tile), weights / (1 - rate), 0)

    # -- visiting --------------------------------------------------------------------------------

    def sweep(self, visit: Callable, state: Any) -> Any:
        """`visit(state, tile, allowed)` for every tile that is not empty."""
        rows, cols = self.block_sizes

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
                inside.append((jnp.arange(size, dtype=jnp.int32) + first < length).reshape(shape))
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


def _pad(x: Array, amount: int, axis: int = -2, mode: str = "constant") -> Array:
    if not amount:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, amount)
    return jnp.pad(x, widths, mode=mode)


def pad_offset(offset: Any, amount: int) -> Any:
    """An offset for `amount` more positions: a number as it is."""
    return _pad(offset, amount, -1, "edge") if jnp.ndim(offset) else offset


def pad_terms(terms: Any, tags: Sequence[str], rows: int, cols: int) -> Any:
    """Masks, modifiers and normalizers with `rows` more queries and `cols` more keys."""
    leaves, tree = jax.tree.flatten(terms)
    return jax.tree.unflatten(
        tree,
        [_pad_named(jnp.asarray(z), t, rows, cols) for z, t in zip(leaves, tags, strict=True)],
    )


def _pad_named(x: Array, tag: str, rows: int, cols: int) -> Array:
    """Repeat the last entry along T and S, so that padding never holds an unusual number."""
    for letter, axis, block in sized_axes(tag, x.ndim) if tag else ():
        if letter in "TS" and block == 1 and x.shape[axis] != 1:
            x = _pad(x, rows if letter == "T" else cols, axis, "edge")
    return x
