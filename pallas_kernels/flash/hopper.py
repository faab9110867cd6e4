"""What the Hopper kernels are made of: products, tiles in registers, walks, and rings of slots.

Every array of a tile is kept in the layout of a wgmma accumulator, so that the caller's masks,
modifiers and normalizers run on registers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.flash import tile
from pallas_kernels.flash.problem import Arrays, Spec, leading

M = 64  # rows of a wgmma tile: what one warpgroup owns
LOG2E = math.log2(math.e)
_LAYOUT = plgpu.Layout.WGMMA
# The interpreter's own work is in Python; compiling what is left of a kernel would take longer.
_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_SHARED_MEMORY = 220 * 1024  # of 227 KB; the rest is for barriers, reductions and alignment


def div(a: Any, b: int) -> Any:
    """Divide numbers that are not negative."""
    return a if b == 1 else jax.lax.div(a, jnp.int32(b))


def rem(a: Any, b: int) -> Any:
    """What is left of a division of numbers that are not negative."""
    return jnp.int32(0) if b == 1 else jax.lax.rem(a, jnp.int32(b))


# -- products ------------------------------------------------------------------------------------


def operand(shape: tuple[int, ...], dtype: Any, swizzle: int = 128) -> Any:
    """Shared memory that TMA fills and wgmma reads; rows of `swizzle` bytes."""
    across = swizzle // jnp.dtype(dtype).itemsize
    tiling: Any = plgpu.TilingTransform  # for type checkers, that take both to be abstract
    swizzling: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, across)), swizzling(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def zeros(shape: tuple[int, ...]) -> Array:
    """Zeros as an accumulator, or as a vector along its rows."""
    layout = _LAYOUT if len(shape) == 2 else _LAYOUT.reduce(1)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def along_rows(x: Any) -> Array:
    """A scalar as a vector along the rows of an accumulator."""
    return plgpu.layout_cast(jnp.broadcast_to(x, (M,)), _LAYOUT.reduce(1))


def multiply(pairs: Sequence[tuple[Any, Any]], issued: Callable | None = None) -> list[Array]:
    """The products a b of operands in shared memory, all in flight together."""

    def run(*sums: Any) -> list[Array]:
        for total, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(total, a, b)
        if issued is not None:
            issued()
        return [total[...] for total in sums]

    shapes = [(a.shape[0], b.shape[1]) for a, b in pairs]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def multiply_add(
    totals: Sequence[Array], pairs: Sequence[tuple[Array, Any]], interpret: Any
) -> list[Array]:
    """Add a product a b, a in registers, to each total."""
    if interpret:  # which multiplies only what lies in shared memory, and starts from zero
        sums = [
            total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
            for total, (a, b) in zip(totals, pairs, strict=True)
        ]
        plgpu.commit_smem()  # ordinary reads, unlike those of wgmma, must be fenced from TMA
        return sums

    def run(refs: Any) -> None:
        for ref, (a, b) in zip(refs, pairs, strict=True):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(run)([plgpu.ACC.init(total) for total in totals])


def send(x: Array, buffer: Any, target: Any) -> None:
    """Store a warpgroup's result through shared memory; to be waited for."""
    buffer[...] = x.astype(buffer.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)


def store(x: Array, target: Any) -> None:
    """Store registers to global memory as they lie."""
    if hasattr(plgpu, "store"):
        plgpu.store(target, x, optimized=False)
    else:  # JAX 0.11
        target[...] = x


# -- tiles in registers --------------------------------------------------------------------------


def tile_axes(axes: str) -> str:
    """Those of a leaf's axes that lie within a tile."""
    return "".join(a for a in axes if a in "ts")


class _At(tile.TileAt):
    """Positions of a tile whose tables hold scalars, or vectors along the queries."""

    def __init__(self, at: tile.TileAt, query_axis: int) -> None:
        super().__init__(at.query, at.key, at.head)
        object.__setattr__(self, "query_axis", query_axis)

    def look_up(self, table: tile.Table, index: Array) -> Array:
        axis = self.query_axis  # type: ignore[attr-defined]
        found = jnp.zeros(index.shape, table.entries[0].dtype)
        for number, entry in enumerate(table.entries):
            along = (axis,) if entry.ndim else ()
            spread = jax.lax.broadcast_in_dim(entry, index.shape, along)
            found = jnp.where(index == number, spread, found)
        return found


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a warpgroup sees a tile: `rows` queries by `cols` keys, or with keys first."""

    spec: Spec
    rows: int
    cols: int
    flipped: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return (self.cols, self.rows) if self.flipped else (self.rows, self.cols)

    def axis(self, letter: str) -> int:
        return int((letter == "s") != self.flipped)

    def spread(self, x: Array, axis: str) -> Array:
        """A vector along the queries ("t") or keys ("s"), or a scalar (""), over the tile."""
        along = () if not axis else (self.axis(axis),)
        return jax.lax.broadcast_in_dim(x, self.shape, along)

    def vector(self, ref: Any, letter: str, start: Any) -> Array:
        """A vector along the queries or keys, in the layout in which it spreads over the tile."""
        size = self.rows if letter == "t" else self.cols
        layout = _LAYOUT.reduce(1 - self.axis(letter))
        return plgpu.load(ref.at[pl.ds(start, size)], layout=layout, optimized=False)

    def part(self, number: int, ref: Any, b: Any, n: Any, row: Any, col: Any) -> Any:
        """The part of a leaf that belongs to the tile, not yet spread."""
        leaf = self.spec.leaves[number]
        b, n = leading(ref, b, n)
        if leaf.table:
            if "t" in leaf.axes:
                entries = [self.vector(ref.at[b, n, r], "t", row) for r in range(ref.shape[2])]
            else:
                entries = [ref[b, n, r, 0] for r in range(ref.shape[2])]
            return tile.Table(tuple(entries))
        if leaf.blocks != (0, 0):
            t, s = (
                div(first, size) if size else 0
                for size, first in zip(leaf.blocks, (row, col), strict=True)
            )
            return ref[b, n, t, s]
        axes = tile_axes(leaf.axes)
        if axes == "ts":
            spans = (pl.ds(row, self.rows), pl.ds(col, self.cols))
            spans = spans[::-1] if self.flipped else spans
            return plgpu.load(ref.at[b, n, *spans], layout=_LAYOUT, optimized=False)
        if axes:
            return self.vector(ref.at[b, n], axes, row if axes == "t" else col)
        return ref[b, n, 0]

    def parts(
        self, refs: Sequence[Any], b: Any, n: Any, row: Any, col: Any, known: dict[int, Any]
    ) -> list[Any]:
        """The parts of all leaves; `known` ones are at hand already."""
        return [
            known[number] if number in known else self.part(number, ref, b, n, row, col)
            for number, ref in enumerate(refs)
        ]

    def steady_parts(
        self, refs: Sequence[Any], b: Any, n: Any, letter: str, start: Any
    ) -> dict[int, Any]:
        """Parts that stay the same along a walk: those with no axis, or with the owner's."""
        row, col = (start, None) if letter == "t" else (None, start)
        return {
            number: self.part(number, refs[number], b, n, row, col)
            for number, leaf in enumerate(self.spec.leaves)
            if not leaf.table and leaf.blocks == (0, 0) and tile_axes(leaf.axes) in ("", letter)
        }

    def expand(self, parts: Sequence[Any]) -> list[Any]:
        """Parts of leaves as user code sees them: spread over the tile, but tables as they are."""
        return [
            self._expand(leaf, part) for leaf, part in zip(self.spec.leaves, parts, strict=True)
        ]

    def _expand(self, leaf: Any, part: Any) -> Any:
        if leaf.table:
            return tile.Table(tuple(tile.in_tile(leaf, x) for x in part.entries))
        axes = "" if leaf.blocks != (0, 0) else tile_axes(leaf.axes)
        return tile.in_tile(leaf, part if axes == "ts" else self.spread(part, axes))

    def at(self, leaves: list[Any], row: Any, col: Any, head: Any) -> tuple[_At, Array]:
        """Where the tile's pairs lie, and which of them are not padding."""

        def iota(axis: int) -> Array:
            axis = 1 - axis if self.flipped else axis
            return plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=_LAYOUT)

        at, inside = tile.where_pairs_lie(self.spec, leaves, row, col, head, iota)
        return _At(at, self.axis("t")), inside


def as_stored(spec: Spec, leaves: Sequence[Any], flipped: bool) -> list[Any]:
    """Leaves as the kernels read them: vectors without axes of length one, tables by entry.

    `flipped`: pairs with keys first.
    """
    stored = []
    for leaf, x in zip(spec.leaves, leaves, strict=True):
        axes = tile_axes(leaf.axes)
        if leaf.table or (axes == "ts" and flipped and leaf.blocks == (0, 0)):
            x = jnp.swapaxes(x, 2, 3)
        elif leaf.blocks == (0, 0) and axes != "ts":
            x = x.reshape(*x.shape[:2], -1)
        stored.append(x)
    return stored


def is_plain(spec: Spec, stored: Sequence[Any]) -> bool:
    """Whether scores are the scaled products as they are, so that the scale joins the exponent."""
    if not spec.program.shared or spec.scales is not None or spec.scale <= 0:
        return False
    shape = (M, M)

    def evaluate(products: Array) -> Array:
        leaves: list[Any] = []
        for leaf, x in zip(spec.leaves, stored, strict=True):
            entry = tile.in_tile(leaf, jnp.zeros((), x.dtype))
            table = tile.Table((entry,) * x.shape[2]) if leaf.table else None
            leaves.append(table or jnp.broadcast_to(entry, shape))
        nowhere = jnp.zeros(shape, jnp.int32)
        at = _At(tile.TileAt(nowhere, nowhere, nowhere), 0)
        return spec.program.evaluate(leaves, products, at)

    jaxpr = jax.make_jaxpr(evaluate)(jax.ShapeDtypeStruct(shape, jnp.float32)).jaxpr
    return jaxpr.outvars[0] is jaxpr.invars[0]


def is_heavy(spec: Spec) -> bool:
    """Whether user code needs so many registers that steps should be half as long."""
    pairs = any(tile_axes(leaf.axes) == "ts" and leaf.blocks == (0, 0) for leaf in spec.leaves)
    return pairs or bool(spec.dropout_rate) or any(leaf.table for leaf in spec.leaves)


# -- walks ---------------------------------------------------------------------------------------


class Walk:
    """The live tiles of one owner block, cut into steps: what every warpgroup counts alike.

    `lists`: `Lists` of refs.  `pieces`: steps per tile.  `share`: which part of the list to walk,
    (number, of how many).
    """

    def __init__(
        self, lists: Any, b: Any, n: Any, owner: Any, pieces: int, share: Any = (0, 1)
    ) -> None:
        b, n = leading(lists.index, b, n)
        self._index: Any = lists.index.at[b, n, owner]
        self._pieces = pieces
        number, of = share
        full, count = lists.full[b, n, owner], lists.count[b, n, owner]
        first, end = jnp.int32(0), count
        if of > 1:
            first, end = div(number * count, of), div((number + 1) * count, of)
            full = jnp.clip(full, first, end)
        self._first, self._full, self._end = first * pieces, full * pieces, end * pieces

    @property
    def length(self) -> Any:
        return self._end - self._first

    def __getitem__(self, number: Any) -> Any:
        """The piece that is visited at a step, counted from zero."""
        step = number + self._first
        block = self._index[div(step, self._pieces)]
        return block * self._pieces + rem(step, self._pieces)

    def run(self, step: Callable[[bool], Callable], state: Any) -> Any:
        """`step(masked)(number, piece, state)` along the walk, full tiles first."""

        def visit(masked: bool) -> Callable:
            act = step(masked)
            return lambda number, state: act(number, self[number], state)

        full = self._full - self._first
        state = jax.lax.fori_loop(jnp.int32(0), full, visit(False), state)
        return jax.lax.fori_loop(full, self.length, visit(True), state)


def key_place(arrays: Arrays, b: Any, n: Any, piece: Any, pieces: int, cols: int) -> Any:
    """Where a piece of a key block lies in keys and values: an index of their first three axes."""
    shared = div(n, arrays.query.shape[1] // arrays.key.shape[1])
    if arrays.pages is not None:
        block = arrays.pages[b, div(piece, pieces)]
        b, piece = 0, block * pieces + rem(piece, pieces)
    return b, shared, pl.ds(piece * cols, cols)


# -- warpgroups and what they pass on ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Team:
    """The warpgroups of a block: `readers` compute; tiles are fetched by one more of them, or,
    without `fetcher`, by the last reader, which leaves every one 255 registers instead of 168.

    (A fetcher could pass its registers on, but not every compiler lets it: where PTX is compiled
    for linking, `setmaxnreg` is ignored.)
    """

    readers: int
    fetcher: bool

    @property
    def size(self) -> int:
        return self.readers + self.fetcher

    @property
    def number(self) -> Any:
        return jax.lax.axis_index("wg")

    def run(self, compute: Callable, feeds: Callable[[], Sequence["Feed"]]) -> None:
        """Readers run `compute`; a fetcher fills the rings of `feeds`."""
        if not self.fetcher:
            compute()
            return

        @pl.when(self.number < self.readers)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            compute()

        @pl.when(self.number == self.readers)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")
            own = feeds()

            def fill(number: Any, _: None) -> None:
                for feed in own:
                    feed.fill(number)

            jax.lax.fori_loop(jnp.int32(0), own[0].walk.length, fill, None)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots in shared memory, each filled, read and filled again."""

    stages: int
    ready: Any
    free: Any


def num_stages(slot: int, resident: int) -> int:
    """How many slots of this size fit into shared memory beside what stays there (bytes)."""
    return max(1, min(4, (_SHARED_MEMORY - resident) // slot))


def ring_barriers(stages: int, readers: int, copies: Sequence[int]) -> list[Any]:
    """Barriers of one ring for each number of copies that fill a slot."""
    return [
        (
            plgpu.Barrier(num_arrivals=number, num_barriers=stages),
            plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
        )
        for number in copies
    ]


@dataclasses.dataclass(frozen=True)
class Feed:
    """A ring that is filled along a walk: `copies(piece)` says from where to where.

    `done`: slots filled by walks before this one.
    """

    team: Team
    ring: Ring
    walk: Walk
    copies: Callable[[Any], Iterable[tuple[Any, Any]]]
    done: Any = 0

    def fill(self, number: Any) -> None:
        """Fetch what a step reads, as soon as the last content of its slot has been read."""
        count = self.done + number
        slot = rem(count, self.ring.stages)

        @pl.when(count >= self.ring.stages)
        def _() -> None:
            plgpu.barrier_wait(self.ring.free.at[slot])

        for source, target in self.copies(self.walk[number]):
            plgpu.copy_gmem_to_smem(source, target.at[slot], self.ring.ready.at[slot])

    def start(self) -> None:
        """Before the first step: without a fetcher, fill all slots."""
        if self.team.fetcher:
            return

        @pl.when(self.team.number == self.team.readers - 1)
        def _() -> None:
            for number in range(self.ring.stages):
                pl.when(number < self.walk.length)(functools.partial(self.fill, jnp.int32(number)))

    def wait(self, number: Any) -> Any:
        """The slot that a step reads, when it is filled."""
        if not self.team.fetcher:
            # Refill what all have read by now: the slot of the step before.
            later = number - 1 + self.ring.stages
            due = (number > 0) & (later < self.walk.length)

            @pl.when(due & (self.team.number == self.team.readers - 1))
            def _() -> None:
                self.fill(later)

        slot = rem(self.done + number, self.ring.stages)
        plgpu.barrier_wait(self.ring.ready.at[slot])
        return slot

    def release(self, slot: Any) -> None:
        plgpu.barrier_arrive(self.ring.free.at[slot])


def launch(
    body: Callable, inputs: Any, out: Any, scratch: Any, grid: dict[str, int], warpgroups: int,
    name: str, interpret: Any,
) -> Any:  # fmt: skip
    """Run `body(tree of inputs, *refs)` over a grid with named axes.

    `interpret`: False, `plgpu.InterpretGPUParams`, or True.
    """
    flat, tree = jax.tree.flatten(inputs)
    if interpret is True:
        # The interpreter's ordered effects are refused within custom rules, so they stay within a
        # callback, which is pure: it computes an output from inputs.
        kernel = functools.partial(
            launch, body, out=out, scratch=scratch, grid=grid, warpgroups=warpgroups, name=name,
            interpret=plgpu.InterpretGPUParams(),
        )  # fmt: skip
        run = jax.jit(lambda *flat: kernel(jax.tree.unflatten(tree, flat)), compiler_options=_FAST)

        def host(*flat: Any) -> Any:
            return jax.tree.map(np.asarray, run(*flat))

        return jax.pure_callback(host, out, *flat)
    return plgpu.kernel(
        functools.partial(body, tree),
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
        kernel_name=name,
    )(*flat)
