"""How tiles reach the TPU kernels: lists in scalar memory, arrays in blocks of whole registers.

A vector along queries or keys lies along the lanes, one block to a row of its array; tiles of an
array with both axes come as they are; one number to a head waits in scalar memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.flash import tile
from pallas_kernels.flash.plan import DEAD, FIRST, LAST, MASKED, SKIP
from pallas_kernels.flash.problem import Flat, Leaf, Spec

LANES = 128
_SCALAR_MEMORY = 1 << 20  # bytes, on every kind up to v6e
_SCALAR_RESERVE = 1 << 16  # left to the compiler
_BLOCK_BITS = 14
_OWNER, _OTHER = 18, 4  # where the block numbers stand in a word of the list

# What a step does, in the two bits above FIRST and LAST.
FULL, PARTIAL, NOTHING, SKIPPED = (kind << 2 for kind in range(4))
KIND = 3 << 2


# -- the list of tiles ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Words:
    """A list of tiles as one int32 to a step, "b n L" flattened."""

    words: Array
    shape: tuple[int, ...]
    total: Any

    @classmethod
    def of(cls, flat: Flat, blocks: tuple[int, int]) -> "Words":
        """`blocks`: how many owners there are, and others."""
        size = math.prod(flat.owner.shape)
        if size * 4 > _SCALAR_MEMORY - _SCALAR_RESERVE:
            raise NotImplementedError(
                f'implementation="tpu" holds its list of tiles in 1 MiB of scalar memory; this one '
                f"has {size:,} entries, shape {flat.owner.shape}. Use larger block_sizes, or "
                'implementation="blockwise".'
            )
        if max(blocks) > 1 << _BLOCK_BITS:
            raise NotImplementedError(
                f'implementation="tpu" numbers up to {1 << _BLOCK_BITS} blocks to an axis, got '
                f'{blocks}. Use larger block_sizes, or implementation="blockwise".'
            )
        owner, other, flags = (jnp.asarray(x, jnp.int32) for x in flat[:3])
        kind = jnp.where(
            (flags & SKIP) != 0,
            SKIPPED,
            jnp.where(
                (flags & DEAD) != 0, NOTHING, jnp.where((flags & MASKED) != 0, PARTIAL, FULL)
            ),
        )
        words = (owner << _OWNER) | (other << _OTHER) | kind | (flags & (FIRST | LAST))
        total = flat.total if isinstance(flat.total, int) else jnp.asarray(flat.total, jnp.int32)
        return cls(words.reshape(-1), owner.shape, total)

    def at(self, ref: Any, b: Any, n: Any, step: Any) -> Any:
        """The word of a step."""
        batches, heads, steps = self.shape
        place = (b if batches > 1 else 0) * heads + (n if heads > 1 else 0)
        return ref[place * steps + step]


def div(x: Any, y: int) -> Any:
    """Of block numbers: x // y, without the care that `//` takes of signs."""
    return x if y == 1 else jax.lax.div(jnp.int32(x), jnp.int32(y))


def mod(x: Any, y: int) -> Any:
    """Of block numbers: x % y."""
    return jax.lax.rem(jnp.int32(x), jnp.int32(y))


def edge(word: Any, flag: int) -> Any:
    """Whether a step is the FIRST or the LAST of its owner."""
    return ((word & flag) != 0) & ((word & KIND) != SKIPPED)


def owner_of(word: Any) -> Any:
    """The block that a step adds to."""
    return jax.lax.shift_right_logical(word, jnp.int32(_OWNER))


def other_of(word: Any) -> Any:
    """The block that it meets."""
    return (word >> _OTHER) & ((1 << _BLOCK_BITS) - 1)


@dataclasses.dataclass(frozen=True)
class Bits:
    """A boolean table "b n I J", 32 entries to a word of scalar memory."""

    words: Array
    shape: tuple[int, ...]

    @classmethod
    def of(cls, table: Any) -> "Bits":
        table = jnp.asarray(table)
        short = -table.shape[3] % 32
        table = jnp.pad(table, [(0, 0)] * 3 + [(0, short)])
        table = table.reshape(*table.shape[:3], -1, 32)
        powers = jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)
        words = jnp.sum(jnp.where(table, powers, jnp.uint32(0)), -1, dtype=jnp.uint32)
        if words.size * 4 > _SCALAR_MEMORY - _SCALAR_RESERVE:
            raise NotImplementedError(
                'implementation="tpu" holds which tiles are live in 1 MiB of scalar memory, which '
                f"has no room for {words.shape[:3]} rows of {table.shape[3] * 32}. Use larger "
                'block_sizes, or implementation="blockwise".'
            )
        words = jax.lax.bitcast_convert_type(words, jnp.int32)
        return cls(words.reshape(-1), words.shape)

    def at(self, ref: Any, b: Any, n: Any, i: Any, j: Any) -> Any:
        batches, heads, rows, size = self.shape
        place = ((b if batches > 1 else 0) * heads + (n if heads > 1 else 0)) * rows + i
        return (ref[place * size + (j >> 5)] >> (j & 31)) & 1 != 0


def supported(x: Any) -> Any:
    """Vector units know no float16."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


# -- leaves --------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class LaneTable:
    """A table as it lies in vector memory: "1 R", or "rows R" with one for each query."""

    values: Array
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    def tree_flatten(self) -> tuple[tuple[Any], int]:
        return (self.values,), self.size

    @classmethod
    def tree_unflatten(cls, size: int, children: Sequence[Any]) -> "LaneTable":
        return cls(children[0], size)


@dataclasses.dataclass(frozen=True)
class LaneAt(tile.TileAt):
    """Where pairs lie, with tables looked up by gathers along the lanes."""

    transposed: bool = False

    def look_up(self, table: Any, index: Array) -> Array:
        index = jnp.broadcast_to(index, self.query.shape)
        return look_up_lanes(table.size, self.transposed, table.values, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up_lanes(size: int, transposed: bool, values: Array, index: Array) -> Array:
    """values[.., index], zero where there is no such entry."""
    if values.shape[0] > 1 and transposed:
        return look_up_lanes(size, False, values, index.T).T
    rows, cols = index.shape
    short = -cols % LANES
    if short:
        index = jnp.concatenate([index, jnp.zeros((rows, short), index.dtype)], 1)
    pieces = []
    for start in range(0, cols, LANES):
        piece = index[:, start : start + LANES]
        found = jnp.zeros(piece.shape, values.dtype)
        for first in range(0, values.shape[1], LANES):
            entries = jnp.broadcast_to(values[:, first : first + LANES], (rows, LANES))
            local = piece - first
            inside = (local >= 0) & (local < min(LANES, size - first))
            local = jnp.where(inside, local, 0)
            got = jnp.take_along_axis(entries, local, axis=1, mode="promise_in_bounds")
            found = jnp.where(inside, got, found)
        pieces.append(found)
    return jnp.concatenate(pieces, 1)[:, :cols] if len(pieces) > 1 or short else pieces[0]


def _look_up_forward(
    size: int, transposed: bool, values: Array, index: Array
) -> tuple[Array, tuple[Array, Array]]:
    return look_up_lanes(size, transposed, values, index), (values, index)


def _look_up_backward(
    size: int, transposed: bool, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None]:
    values, index = residuals
    if transposed:
        index, cotangent = index.T, cotangent.T
    lane = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)

    def add(entry: Any, total: Array) -> Array:
        hit = jnp.where(index == entry, cotangent, 0.0)
        part = jnp.sum(hit, axis=1, keepdims=True)
        if values.shape[0] == 1:
            part = jnp.sum(part, axis=0, keepdims=True)
        return total + jnp.where(lane == entry, part, 0.0)

    # Only entries that occur in the tile cost anything: away from the diagonal, few do.
    first, last = jnp.maximum(jnp.min(index), 0), jnp.minimum(jnp.max(index), size - 1)
    total = jax.lax.fori_loop(first, last + 1, add, jnp.zeros(values.shape, jnp.float32))
    return total, None


look_up_lanes.defvjp(_look_up_forward, _look_up_backward)


def _plain(x: Array) -> Array:
    """In a dtype of 32 bits that vector units compute in."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.float32)
    return x if x.dtype == jnp.uint32 else x.astype(jnp.int32)


def vectors(x: Array, size: int) -> Array:
    """Vectors "b n T" as "b n I 1 r": along the lanes, in blocks of any size."""
    return x.reshape(*x.shape[:2], -1, 1, size)


def tiled(shape: tuple[int, ...], cols: int) -> tuple[tuple[int, ...], Callable]:
    """How tiles "b n T S" lie in memory, "b n x T y", and which (x, row, y) tile (i, j) is.

    Blocks of the last axis are whole registers or all of it: for others, strips are set apart.
    """
    *lead, num_rows, num_cols = shape
    if cols % LANES == 0 or cols == num_cols:
        return (*lead, 1, num_rows, num_cols), lambda i, j: (0, i, j)
    return (*lead, num_cols // cols, num_rows, cols), lambda i, j: (j, i, 0)


def to_tiled(x: Array, cols: int) -> Array:
    """Tiles "b n T S" as they lie in memory."""
    shape, _ = tiled(x.shape, cols)
    return jnp.moveaxis(x.reshape(*x.shape[:3], shape[2], shape[4]), 3, 2)


def from_tiled(x: Array) -> Array:
    """The inverse of `to_tiled`."""
    x = jnp.moveaxis(x, 2, 3)
    return x.reshape(*x.shape[:3], -1)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array on its way into a kernel: how it lies in memory, how it is cut, how it is read.

    `read(ref, b, n, i, j)` gives the tile's part, in the layout of the tile.
    """

    array: Array
    spec: pl.BlockSpec
    read: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a kernel sees the tiles: `place(*grid, *prefetched) -> (b, n, i, j)`."""

    spec: Spec
    group: int  # query heads to a key head
    transposed: bool
    place: Callable[..., tuple[Any, Any, Any, Any]]
    pages: int = 0  # blocks to a row of the page table, or 0 for none

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.spec.block_sizes
        return (cols, rows) if self.transposed else (rows, cols)

    def block(self, shape: tuple[int, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        """`index(b, n, i, j)`: which block of `shape`."""
        return pl.BlockSpec(shape, lambda *grid: index(*self.place(*grid)))

    def rows_of(self, x: Any) -> pl.BlockSpec:
        """Blocks of an array "B N T w"."""
        shape = (1, 1, self.spec.block_sizes[0], x.shape[-1])
        return self.block(shape, lambda b, n, i, j: (b, n, i, 0))

    def cols_of(self, x: Any) -> pl.BlockSpec:
        """Blocks of an array "B K S w", or of a pool of pages."""
        shape = (1, 1, self.spec.block_sizes[1], x.shape[-1])
        if not self.pages:
            return self.block(shape, lambda b, n, i, j: (b, div(n, self.group), j, 0))

        def index(*grid: Any) -> tuple[Any, ...]:
            b, n, _, j = self.place(*grid)
            return 0, div(n, self.group), grid[-1][b * self.pages + j], 0

        return pl.BlockSpec(shape, index)

    def query_vector(self) -> pl.BlockSpec:
        """Blocks of an array "B N I 1 r": see `vectors`."""
        shape = (1, 1, 1, 1, self.spec.block_sizes[0])
        return self.block(shape, lambda b, n, i, j: (b, n, i, 0, 0))

    def spread(self, vector: Array, axis: int) -> Array:
        """A vector "1 n" along queries (axis 0) or keys (axis 1) as a whole tile."""
        if (axis == 0) != self.transposed:
            vector = vector.T
        return jnp.broadcast_to(vector, self.shape)

    def iota(self, axis: int) -> Array:
        own = 1 - axis if self.transposed else axis
        return jax.lax.broadcasted_iota(jnp.int32, self.shape, own)

    def at(self, leaves: list[Any], n: Any, i: Any, j: Any) -> tuple[LaneAt, Array]:
        rows, cols = self.spec.block_sizes
        at, inside = tile.where_pairs_lie(self.spec, leaves, i * rows, j * cols, n, self.iota)
        return LaneAt(at.query, at.key, at.head, self.transposed), inside

    def operand(self, leaf: Leaf, x: Array) -> Operand:
        """A leaf "b n t s" on its way into the kernel."""
        rows, cols = self.spec.block_sizes
        batches, heads = x.shape[0] > 1, x.shape[1] > 1

        def lead(b: Any, n: Any) -> tuple[Any, Any]:
            return (b if batches else 0), (n if heads else 0)

        finish = functools.partial(tile.in_tile, leaf)

        def vector(axis: int) -> Operand:
            size = (rows, cols)[axis]
            return Operand(
                vectors(_plain(x).reshape(*x.shape[:2], -1), size),
                self.block(
                    (1, 1, 1, 1, size), lambda b, n, i, j: (*lead(b, n), (i, j)[axis], 0, 0)
                ),
                lambda ref, b, n, i, j: finish(self.spread(ref[0, 0, 0], axis)),
            )

        if leaf.table:
            return self._table(leaf, x, lead)
        if leaf.blocks != (0, 0):
            return self._per_block(leaf, x, lead, finish)
        if "t" in leaf.axes and "s" in leaf.axes:

            def read(ref: Any, b: Any, n: Any, i: Any, j: Any) -> Array:
                value = _plain(ref[0, 0, 0])
                return finish(value.T if self.transposed else value)

            _, where = tiled(x.shape, cols)
            block = self.block(
                (1, 1, 1, rows, cols), lambda b, n, i, j: (*lead(b, n), *where(i, j))
            )
            return Operand(to_tiled(supported(x), cols), block, read)
        if "t" in leaf.axes:
            return vector(0)
        if "s" in leaf.axes:
            return vector(1)

        def scalar(ref: Any, b: Any, n: Any, i: Any, j: Any) -> Array:
            b, n = lead(b, n)
            return finish(jnp.full(self.shape, ref[b * x.shape[1] + n]))

        return Operand(_plain(x).reshape(-1), pl.BlockSpec(memory_space=pltpu.SMEM), scalar)

    def _table(self, leaf: Leaf, x: Array, lead: Callable) -> Operand:
        size = x.shape[3]
        array = jnp.pad(_plain(x), [(0, 0)] * 3 + [(0, -size % LANES)])
        by_row = "t" in leaf.axes
        shape = (1, 1, self.spec.block_sizes[0] if by_row else 1, array.shape[3])
        return Operand(
            array,
            self.block(shape, lambda b, n, i, j: (*lead(b, n), i if by_row else 0, 0)),
            lambda ref, b, n, i, j: LaneTable(ref[0, 0], size),
        )

    def _per_block(self, leaf: Leaf, x: Array, lead: Callable, finish: Callable) -> Operand:
        """One entry for whole blocks of pairs, picked from a register of them."""
        shape = tuple(min(n, most) for n, most in zip(x.shape[2:], (8, LANES), strict=True))
        short = [(0, -n % size) for n, size in zip(x.shape[2:], shape, strict=True)]
        array = jnp.pad(_plain(x), [(0, 0), (0, 0), *short])

        def entry(i: Any, j: Any) -> list[Any]:
            first = (i * self.spec.block_sizes[0], j * self.spec.block_sizes[1])
            return [div(f, r) if r else 0 for f, r in zip(first, leaf.blocks, strict=True)]

        def index(b: Any, n: Any, i: Any, j: Any) -> tuple[Any, ...]:
            return (
                *lead(b, n),
                *(div(e, size) for e, size in zip(entry(i, j), shape, strict=True)),
            )

        def read(ref: Any, b: Any, n: Any, i: Any, j: Any) -> Array:
            chosen = jnp.ones(shape, bool)
            for axis, (e, size) in enumerate(zip(entry(i, j), shape, strict=True)):
                chosen &= jax.lax.broadcasted_iota(jnp.int32, shape, axis) == mod(e, size)
            value = jnp.where(chosen, ref[0, 0], jnp.zeros((), array.dtype))
            value = jnp.sum(jnp.sum(value, 1, keepdims=True, dtype=array.dtype), 0, keepdims=True)
            return finish(jnp.broadcast_to(value, self.shape))

        return Operand(array, self.block((1, 1, *shape), index), read)
