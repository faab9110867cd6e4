"""The backward pass on Hopper GPUs: one kernel for dq, one for dk and dv, others where needed.

No sum crosses blocks, so gradients are the same in every run.  In the kernel of dk and dv tiles lie
with keys first: what multiplies from the left must come from registers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.flash import hopper, tile
from pallas_kernels.flash.hopper import LOG2E, Cut, Feed, M, Ring, Team, Walk, div, rem
from pallas_kernels.flash.legal import legal
from pallas_kernels.flash.problem import Arrays, Spec, leading


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a kernel is specialised to.

    `wanted`: leaves whose gradient it sums.  `size`: keys (or queries) per step.  `entries`: those
    of a table, in a kernel that sums nothing else.
    """

    spec: Spec
    plain: bool
    team: Team
    stages: int
    size: int
    wanted: tuple[int, ...]
    interpret: Any
    entries: range | None = None
    with_key: bool = True
    with_value: bool = True


def _gradient(
    cut: Cut, head: Any, plain: bool, masked: bool, wanted: Sequence[int], whole: bool = False
) -> Callable:
    """The gradient of a tile, as a function of arrays.

    It gives the weights as they were used, the cotangent of the products and those of wanted
    leaves, each summed along the second axis of the tile unless `whole`; where there is no
    cotangent of the weights, only the weights.
    """
    spec = cut.spec

    def run(
        products: Array, d_weights: Array | None, parts: list[Any], statistics: Any, row: Any,
        col: Any,
    ) -> tuple[Array, Array | None, list[Any]]:  # fmt: skip
        leaves = cut.expand(parts)
        at, inside = cut.at(leaves, row, col, head)
        allowed = tile.allowed_pairs(spec, leaves, at, inside) if masked else None
        lse = tile.finite(statistics[0])
        if plain:
            exponent = products * (spec.scale * LOG2E) - cut.spread(lse * LOG2E, "t")
            weights = jnp.exp2(exponent)
            # The row of a NaN that is seen has a NaN log-sum-exp; the rest of it stays zero.
            weights = weights if allowed is None else jnp.where(allowed, weights, 0.0)
        else:
            weights, pull = tile.pull_back(
                spec, leaves, products, at, allowed, cut.spread(lse, "t"), wanted
            )
        keep = tile.kept(spec, leaves, at)
        used = weights if keep is None else weights * keep
        if d_weights is None:
            return used, None, []
        d_weights = d_weights if keep is None else d_weights * keep
        if spec.program.shared:
            d_weights = d_weights + cut.spread(statistics[1], "t")
        if plain:
            return used, weights * d_weights * spec.scale, []
        d_products, d_leaves = pull(d_weights)
        if not whole:
            d_leaves = [x if isinstance(x, tile.Table) else jnp.sum(x, axis=1) for x in d_leaves]
        return used, d_products, d_leaves

    return legal(run)


def _blemished(
    products: Array, cut: Cut, arrays: Arrays, blemish: Any, b: Any, n: Any, col: Any
) -> Array:
    """Products, NaN where the key or its value is not finite; `blemish` "B K S" or None."""
    if blemish is None:
        return products
    shared = div(n, arrays.query.shape[1] // arrays.key.shape[1])
    return products + cut.spread(cut.vector(blemish.at[b, shared], "s", col), "s")


def _row_body(plan: _Plan, tree: Any, *refs: Any) -> None:
    """Sum dq and the gradients of leaves without a key axis, or of some entries of a table."""
    inputs, (*outs, buffers, barriers) = refs[: tree.num_leaves], refs[tree.num_leaves :]
    arrays, d_out_ref, lse_ref, shift_ref, blemish_ref = jax.tree.unflatten(tree, inputs)
    q_smem, o_smem, k_smem, v_smem = buffers
    q_ready, *pairs = barriers
    spec, team, cols, dtype = plan.spec, plan.team, plan.size, arrays.query.dtype
    rows = spec.block_sizes[0]
    program, n, b = (jax.lax.axis_index(name) for name in ("rows", "heads", "batch"))
    i = arrays.query.shape[2] // rows - 1 - program
    pieces = spec.block_sizes[1] // cols
    walk = Walk(arrays.rows, b, n, i, pieces)
    wg = team.number
    row = i * rows + wg * M
    span = pl.ds(row, M)
    cut = Cut(spec, M, cols)
    query, d_out = q_smem.at[wg], o_smem.at[wg]
    plgpu.copy_gmem_to_smem(arrays.query.at[b, n, span], query, q_ready.at[wg])
    plgpu.copy_gmem_to_smem(d_out_ref.at[b, n, span], d_out, q_ready.at[wg])

    def feed(pair: Any, source: Any, target: Any) -> Feed:
        def copies(piece: Any) -> list[tuple[Any, Any]]:
            return [(source.at[hopper.key_place(arrays, b, n, piece, pieces, cols)], target)]

        return Feed(team, Ring(plan.stages, *pair), walk, copies)

    keys, values = feed(pairs[0], arrays.key, k_smem), feed(pairs[1], arrays.value, v_smem)
    keys.start()
    values.start()
    statistics = tuple(cut.vector(ref.at[b, n], "t", row) for ref in (lse_ref, shift_ref))
    steady = cut.steady_parts(arrays.leaves, b, n, "t", row)
    plgpu.barrier_wait(q_ready.at[wg])

    def step(masked: bool) -> Callable:
        gradient = _gradient(cut, n, plan.plain, masked, plan.wanted)

        def act(number: Any, piece: Any, state: Any) -> Any:
            d_query, totals = state
            col = piece * cols
            parts = cut.parts(arrays.leaves, b, n, row, col, steady)
            if plan.entries is not None:  # vectors, so that their gradients are summed by row
                table = parts[plan.wanted[0]].entries
                table = [x if x.ndim else hopper.along_rows(x) for x in table]
                parts[plan.wanted[0]] = tile.Table(tuple(table))
            slot = keys.wait(number)
            values.wait(number)
            key, value = k_smem.at[slot], v_smem.at[slot]
            products, d_weights = hopper.multiply(
                [(query, key.transpose((1, 0))), (d_out, value.transpose((1, 0)))]
            )
            values.release(slot)
            products = _blemished(products, cut, arrays, blemish_ref, b, n, col)
            _, d_products, d_leaves = gradient(products, d_weights, parts, statistics, row, col)
            if plan.entries is not None:
                d_leaves = [d_leaves[0].entries[entry] for entry in plan.entries]
            else:
                pair = (d_products.astype(dtype), key)
                (d_query,) = hopper.multiply_add([d_query], [pair], plan.interpret)
            keys.release(slot)
            totals = [total + x for total, x in zip(totals, d_leaves, strict=True)]
            return d_query, totals

        return act

    number = len(plan.wanted if plan.entries is None else plan.entries)
    start = hopper.zeros((M, q_smem.shape[-1])) if plan.entries is None else None
    d_query, totals = walk.run(step, (start, [hopper.zeros((M,)) for _ in range(number)]))
    if plan.entries is None:
        hopper.send(d_query, query, outs.pop(0).at[b, n, span])
    for ref, total in zip(outs, totals, strict=True):
        hopper.store(total, ref.at[b, n, span])
    plgpu.wait_smem_to_gmem(0)


def _column_body(plan: _Plan, tree: Any, *refs: Any) -> None:
    """Sum dk, dv, or both, and the gradients of leaves with a key axis but no query axis."""
    inputs, (*outs, buffers, barriers) = refs[: tree.num_leaves], refs[tree.num_leaves :]
    arrays, d_out_ref, lse_ref, shift_ref, blemish_ref = jax.tree.unflatten(tree, inputs)
    k_smem, v_smem, q_smem, o_smem, lse_smem, shift_smem = buffers
    k_ready, pair = barriers
    spec, team, rows, dtype = plan.spec, plan.team, plan.size, arrays.query.dtype
    j, shared, b = (jax.lax.axis_index(name) for name in ("columns", "heads", "batch"))
    group = arrays.query.shape[1] // arrays.key.shape[1]
    pieces = spec.block_sizes[0] // rows
    wg = team.number
    col = j * spec.block_sizes[1] + wg * M
    cut = Cut(spec, rows, M, flipped=True)
    key, value = k_smem.at[wg], v_smem.at[wg]
    place = hopper.key_place(arrays, b, shared * group, j * team.readers + wg, team.readers, M)
    plgpu.copy_gmem_to_smem(arrays.key.at[place], key, k_ready.at[wg])
    if plan.with_key:
        plgpu.copy_gmem_to_smem(arrays.value.at[place], value, k_ready.at[wg])
    targets = [outs.pop(0) if wish else None for wish in (plan.with_key, plan.with_value)]

    sources = [(arrays.query, q_smem), (d_out_ref, o_smem), (lse_ref, lse_smem)]
    if plan.with_key:
        sources.append((shift_ref, shift_smem))

    def one_head(member: Any, state: Any) -> Any:
        done, d_key, d_value = state
        n = shared * group + member
        walk = Walk(arrays.rows, b, n, j, pieces)  # this kernel's rows are columns

        def copies(piece: Any) -> list[tuple[Any, Any]]:
            span = pl.ds(piece * rows, rows)
            return [(x.at[b, n, span], buffer) for x, buffer in sources]

        feed = Feed(team, Ring(plan.stages, *pair), walk, copies, done)
        feed.start()
        steady = cut.steady_parts(arrays.leaves, b, n, "s", col)

        def step(masked: bool) -> Callable:
            gradient = _gradient(cut, n, plan.plain, masked, plan.wanted)

            def act(number: Any, piece: Any, state: Any) -> Any:
                d_key, d_value, totals = state
                row = piece * rows
                slot = feed.wait(number)
                query, d_out = q_smem.at[slot], o_smem.at[slot]
                operands = [(key, query.transpose((1, 0)))]
                if plan.with_key:
                    operands.append((value, d_out.transpose((1, 0))))
                products, *d_weights = hopper.multiply(operands)
                products = _blemished(products, cut, arrays, blemish_ref, b, n, col)
                # Registers are short while products are under way: all else is read after them.
                parts = cut.parts(arrays.leaves, b, n, row, col, steady)
                statistics = [cut.vector(lse_smem.at[slot], "t", 0)]
                if plan.with_key:
                    statistics.append(cut.vector(shift_smem.at[slot], "t", 0))
                used, d_products, d_leaves = gradient(
                    products, d_weights[0] if d_weights else None, parts, statistics, row, col
                )
                totals = [total + x for total, x in zip(totals, d_leaves, strict=True)]
                sums, operands = [], []
                if plan.with_value:
                    sums.append(d_value)
                    operands.append((used.astype(dtype), d_out))
                if plan.with_key:
                    sums.append(d_key)
                    operands.append((d_products.astype(dtype), query))
                sums = hopper.multiply_add(sums, operands, plan.interpret)
                feed.release(slot)
                d_value = sums.pop(0) if plan.with_value else None
                d_key = sums.pop(0) if plan.with_key else None
                return d_key, d_value, totals

            return act

        start = [hopper.zeros((M,)) for _ in plan.wanted]
        d_key, d_value, totals = walk.run(step, (d_key, d_value, start))
        for ref, total in zip(outs, totals, strict=True):
            hopper.store(total, ref.at[b, n, pl.ds(col, M)])
        return done + walk.length, d_key, d_value

    plgpu.barrier_wait(k_ready.at[wg])
    state = (
        jnp.int32(0),
        hopper.zeros((M, k_smem.shape[-1])) if plan.with_key else None,
        hopper.zeros((M, v_smem.shape[-1])) if plan.with_value else None,
    )
    if group == 1:
        _, *sums = one_head(0, state)
    else:
        _, *sums = jax.lax.fori_loop(0, group, one_head, state)
    # Keys and values have been read for the last time: their places hold the results.
    for total, buffer, target in zip(sums, (key, value), targets, strict=True):
        if target is not None:
            hopper.send(total, buffer, target.at[b, shared, pl.ds(col, M)])
    plgpu.wait_smem_to_gmem(0)


def _pair_body(plan: _Plan, tree: Any, sums: tuple[int, int], *refs: Any) -> None:
    """The gradient of a leaf with query and key axes: one tile of it, summed over (b, n)."""
    inputs, (d_leaf_ref, buffers, barriers) = refs[: tree.num_leaves], refs[tree.num_leaves :]
    arrays, d_out_ref, lse_ref, shift_ref, blemish_ref, live_ref = jax.tree.unflatten(tree, inputs)
    q_smem, o_smem, k_smem, v_smem = buffers
    ready, free = barriers
    spec, cols = plan.spec, plan.size
    program, n0, b0 = (jax.lax.axis_index(name) for name in ("tiles", "heads", "batch"))
    across = arrays.key.shape[2] // cols
    row, col = div(program, across) * M, rem(program, across) * cols
    i, j = div(row, spec.block_sizes[0]), div(col, spec.block_sizes[1])
    cut = Cut(spec, M, cols)

    def one(count: Any, total: Array) -> Array:
        b, n = b0 + div(count, sums[1]), n0 + rem(count, sums[1])

        def work(total: Array) -> Array:
            span = pl.ds(row, M)
            place = hopper.key_place(arrays, b, n, rem(program, across), 1, cols)
            for source, target in (
                (arrays.query.at[b, n, span], q_smem),
                (d_out_ref.at[b, n, span], o_smem),
                (arrays.key.at[place], k_smem),
                (arrays.value.at[place], v_smem),
            ):
                plgpu.copy_gmem_to_smem(source, target, ready)
            statistics = tuple(cut.vector(ref.at[b, n], "t", row) for ref in (lse_ref, shift_ref))
            parts = cut.parts(arrays.leaves, b, n, row, col, {})
            plgpu.barrier_wait(ready)
            products, d_weights = hopper.multiply(
                [(q_smem, k_smem.transpose((1, 0))), (o_smem, v_smem.transpose((1, 0)))]
            )
            # All warps have read the tiles before the next ones are fetched.
            plgpu.barrier_arrive(free)
            plgpu.barrier_wait(free)
            products = _blemished(products, cut, arrays, blemish_ref, b, n, col)
            gradient = _gradient(cut, n, plan.plain, True, plan.wanted, whole=True)
            _, _, (d_leaf,) = gradient(products, d_weights, parts, statistics, row, col)
            return total + d_leaf

        live = live_ref[(*leading(live_ref, b, n), i, j)]
        return jax.lax.cond(live != 0, work, lambda total: total, total)

    total = jax.lax.fori_loop(0, sums[0] * sums[1], one, hopper.zeros((M, cols)))
    hopper.store(total, d_leaf_ref.at[b0, n0, pl.ds(row, M), pl.ds(col, cols)])


def backward(
    spec: Spec, arrays: Arrays, live: Array, d_out: Array, lse: Array, shift: Array,
    wanted: tuple[int, ...], *, interpret: Any = False,
) -> tuple[Array, Array, Array, list[Array]]:  # fmt: skip
    """Gradients: dq "B N T H", dk "B K S H", dv "B K S D" and those of wanted leaves, in float32.

    `shift` "B N T": the cotangent of lse minus sum(d_out * out); `live` (b, n, I, J), not zero
    where a tile holds an allowed pair.
    """
    launches = _Launches(spec, arrays, d_out, lse, shift, interpret)
    owned = {
        owner: tuple(i for i in wanted if spec.leaves[i].owner == owner)
        for owner in ("row", "column", "pair")
    }
    d_query, gradients = launches.rows(tuple(i for i in owned["row"] if not spec.leaves[i].table))
    for number in owned["row"]:
        if spec.leaves[number].table:
            gradients[number] = launches.table(number)
    d_key, d_value, more = launches.columns(owned["column"])
    gradients |= more
    for number in owned["pair"]:
        gradients[number] = launches.pairs(number, live)
    return d_query, d_key, d_value, [gradients[i] for i in wanted]


class _Launches:
    """The kernels of one backward pass."""

    def __init__(
        self, spec: Spec, arrays: Arrays, d_out: Array, lse: Array, shift: Array, interpret: Any
    ) -> None:
        self.spec, self.arrays, self.interpret = spec, arrays, interpret
        blemish = None
        if not spec.program.shared:
            # No log-sum-exp carries a NaN to the rows that see it: the key does.  Multiplied as a
            # zero, what remains of it is added to the products.
            clean = jnp.isfinite(arrays.key)
            blemish = jnp.where(clean.all(-1), 0.0, jnp.nan).astype(jnp.float32)
            self.arrays = arrays._replace(key=jnp.where(clean, arrays.key, 0))
        self.statistics = (d_out, lse, shift, blemish)
        self.batch, self.heads, self.num_rows, key_width = arrays.query.shape
        _, self.shared, self.num_cols, value_width = arrays.value.shape
        self.widths = key_width, value_width
        self.plain = hopper.is_plain(spec, hopper.as_stored(spec, arrays.leaves, False))
        # Registers hold sums as wide as keys or values beside scores as wide as a step.
        self.wide = sum(self.widths) > 256
        broad = sum(self.widths) > 192
        fine = self.wide or hopper.is_heavy(spec)
        self.row_step = M // 2 if fine or (broad and not self.plain) else M
        self.column_step = M // 2 if fine or broad else M

    def operands(self, count: int, rows: int, step: int) -> list[Any]:
        # Half as wide as usual where a step has half as many rows: wgmma's blocks are square.
        lead = (count,) if count else ()
        return [
            hopper.operand((*lead, rows, width), self.arrays.query.dtype, 2 * step)
            for width in self.widths
        ]

    def stages(self, resident_rows: int, step: int) -> int:
        row = sum(self.widths) * self.arrays.query.dtype.itemsize
        return hopper.num_stages(step * (row + 8), resident_rows * row)

    def inputs(self, flipped: bool) -> tuple[Any, ...]:
        leaves = hopper.as_stored(self.spec, self.arrays.leaves, flipped)
        arrays = self.arrays._replace(leaves=leaves, columns=None)
        if flipped:
            lists: Any = self.arrays.columns
            arrays = arrays._replace(rows=lists)
        return arrays, *self.statistics

    def sums(self, length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.heads, length), jnp.float32)

    def rows(self, wanted: tuple[int, ...]) -> tuple[Array, dict[int, Array]]:
        query = self.arrays.query
        out = (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            *(self.sums(self.num_rows) for _ in wanted),
        )
        d_query, *sums = self._rows(wanted, None, out, "flash_rows")
        return d_query, {
            number: self._by_row(number, total[..., None])
            for number, total in zip(wanted, sums, strict=True)
        }

    def table(self, number: int, at_once: int = 8) -> Array:
        """Sum a table's gradient, as many entries at a time as registers have room for."""
        size = self.arrays.leaves[number].shape[3]
        sums: list[Array] = []
        for first in range(0, size, at_once):
            entries = range(first, min(first + at_once, size))
            out = tuple(self.sums(self.num_rows) for _ in entries)
            sums += self._rows((number,), entries, out, "flash_table")
        return self._by_row(number, jnp.stack(sums, -1))

    def _by_row(self, number: int, total: Array) -> Array:
        along = "t" in self.spec.leaves[number].axes
        return total if along else total.sum(2, keepdims=True)

    def _rows(self, wanted: tuple[int, ...], entries: Any, out: Any, name: str) -> Any:
        rows, step = self.spec.block_sizes[0], self.row_step
        team, stages = Team(rows // M, fetcher=False), self.stages(rows, step)
        plan = _Plan(self.spec, self.plain, team, stages, step, wanted, self.interpret, entries)
        buffers = self.operands(team.readers, M, step) + self.operands(stages, step, step)
        barriers = [
            plgpu.Barrier(num_arrivals=2, num_barriers=team.readers),
            *hopper.ring_barriers(stages, team.readers, (1, 1)),
        ]

        def body(tree: Any, *refs: Any) -> None:
            _row_body(plan, tree, *refs)

        grid = {"rows": self.num_rows // rows, "heads": self.heads, "batch": self.batch}
        return hopper.launch(
            body, self.inputs(False), out, (buffers, barriers), grid, team.size, name,
            self.interpret,
        )  # fmt: skip

    def columns(self, wanted: tuple[int, ...]) -> tuple[Array, Array, dict[int, Array]]:
        if self.wide:  # registers hold one of the two sums
            (d_value,) = self._columns((), False, True)
            d_key, *sums = self._columns(wanted, True, False)
        else:
            d_key, d_value, *sums = self._columns(wanted, True, True)
        gradients = {number: total[:, :, None] for number, total in zip(wanted, sums, strict=True)}
        return d_key, d_value, gradients

    def _columns(self, wanted: tuple[int, ...], with_key: bool, with_value: bool) -> Any:
        cols, step = self.spec.block_sizes[1], self.column_step
        team, stages = Team(cols // M, fetcher=False), self.stages(cols, step)
        plan = _Plan(
            self.spec, self.plain, team, stages, step, wanted, self.interpret, None, with_key,
            with_value,
        )  # fmt: skip
        buffers = self.operands(team.readers, M, step) + self.operands(stages, step, step)
        buffers += [plgpu.SMEM((stages, step), jnp.float32)] * 2
        copies = 2 if with_key else 1
        barriers = [
            plgpu.Barrier(num_arrivals=copies, num_barriers=team.readers),
            *hopper.ring_barriers(stages, team.readers, (2 + copies,)),
        ]
        wishes = ((self.arrays.key, with_key), (self.arrays.value, with_value))
        out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x, wish in wishes if wish]
        out += [self.sums(self.num_cols) for _ in wanted]

        def body(tree: Any, *refs: Any) -> None:
            _column_body(plan, tree, *refs)

        grid = {"columns": self.num_cols // cols, "heads": self.shared, "batch": self.batch}
        return hopper.launch(
            body, self.inputs(True), tuple(out), (buffers, barriers), grid, team.size,
            "flash_columns", self.interpret,
        )  # fmt: skip

    def pairs(self, number: int, live: Array) -> Array:
        x = self.arrays.leaves[number]
        sums = self.batch // x.shape[0], self.heads // x.shape[1]
        step, team = self.row_step, Team(1, fetcher=False)
        plan = _Plan(self.spec, self.plain, team, 1, step, (number,), self.interpret)
        buffers = self.operands(0, M, step) + self.operands(0, step, step)
        barriers = [plgpu.Barrier(num_arrivals=4), plgpu.Barrier(num_arrivals=1)]
        arrays, *statistics = self.inputs(False)
        inputs = (arrays._replace(rows=None), *statistics, live)

        def body(tree: Any, *refs: Any) -> None:
            _pair_body(plan, tree, sums, *refs)

        tiles = self.num_rows // M * (self.num_cols // step)
        grid = {"tiles": tiles, "heads": x.shape[1], "batch": x.shape[0]}
        out = (jax.ShapeDtypeStruct(x.shape, jnp.float32),)
        return hopper.launch(
            body, inputs, out, (buffers, barriers), grid, 1, "flash_pairs", self.interpret
        )[0]
