"""Flash attention for GPUs from Ampere on, through Triton.

One program owns one block of query rows (forward, dq) or of keys (dk, dv) and walks the list of
live tiles; lists may come from data.  Dao 2023, arXiv:2307.08691 is the algorithm; masks, modifiers
and normalizers are the caller's, see `pallas_kernels.flash.tile`.
"""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.flash import plan, tile
from pallas_kernels.flash.problem import Arrays, Lists, Spec, leading


def limits(query: Any, value: Any, spec: Spec | None = None) -> str | None:
    """What keeps these bodies from serving arrays of this dtype and width, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"computes in bfloat16, float16 and float32, not {query.dtype}"
    for name, x in (("keys", query), ("values", value)):
        if x.shape[-1] > 256:
            return f"holds {name} up to 256 wide, got {x.shape[-1]}"
    return None


def padded_width(width: int) -> int:
    """Triton's arrays have powers of two as sizes."""
    return plan.power_of_two(width)


def block_sizes(
    key_width: int, value_width: int, itemsize: int, lengths: tuple[int, int], backward: bool,
    kind: str,
) -> tuple[int, int]:  # fmt: skip
    """Rows and columns of a tile."""
    sizes = plan.triton_block_sizes(key_width, value_width, itemsize, backward)
    return tuple(min(b, plan.power_of_two(n)) for b, n in zip(sizes, lengths, strict=True))  # type: ignore[return-value]


def block_limit(block_sizes: tuple[int, int]) -> str | None:
    """What is wrong with these block sizes, or None."""
    if all(b >= 16 and b & (b - 1) == 0 for b in block_sizes):
        return None
    return f"takes block_sizes that are powers of two from 16 on, not {block_sizes}"


def _iota(rows: int, cols: int) -> Callable[[int], Array]:
    return lambda axis: jax.lax.broadcasted_iota(jnp.int32, (rows, cols), axis)


def _dot(a: Array, b: Array, trans_a: bool = False, trans_b: bool = False) -> Array:
    precision = None
    if a.dtype == jnp.float32:
        # Three products in tf32 keep float32's precision, on the tensor cores; interpreted, XLA
        # multiplies in float32 itself.
        three = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = jax.lax.Precision.HIGHEST if _interpreted.get() else three
    return plgpu.dot(a, b, trans_a, trans_b, precision=precision).astype(jnp.float32)


# Set while a kernel is traced for the interpreter.
_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


class _Tiles:
    """The refs of a call, read tile by tile."""

    def __init__(self, spec: Spec, refs: Arrays, b: Any, n: Any) -> None:
        self.spec, self.refs, self.b, self.n = spec, refs, b, n
        self.rows, self.cols = spec.block_sizes
        self.group = refs.query.shape[1] // refs.key.shape[2 if spec.heads_last else 1]

    def query_block(self, ref: Any, i: Any) -> Array:
        return ref[self.b, self.n, pl.ds(i * self.rows, self.rows), :]

    def query_vector(self, ref: Any, i: Any) -> Array:
        return ref[self.b, self.n, pl.ds(i * self.rows, self.rows)]

    def key_block(self, ref: Any, j: Any, like: Any) -> Array:
        head, pages = self.n // self.group, self.refs.pages
        if pages is None:
            span = pl.ds(j * self.cols, self.cols)
            if self.spec.heads_last:
                return ref[self.b, span, head].astype(like)
            return ref[self.b, head, span].astype(like)
        if not self.spec.page:
            return ref[0, head, pl.ds(pages[self.b, j] * self.cols, self.cols)].astype(like)
        page = jnp.full((self.cols,), self.spec.page, jnp.int32)
        position = j * self.cols + jax.lax.iota(jnp.int32, self.cols)
        number = jnp.minimum(jax.lax.div(position, page), pages.shape[1] - 1)
        place = pages[self.b, number] * page + jax.lax.rem(position, page)
        return ref[0, head, place].astype(like)

    def leaf(self, number: int, i: Any, j: Any) -> Any:
        """The part of a leaf that belongs to tile (i, j): "rows cols", or a Table."""
        leaf, ref = self.spec.leaves[number], self.refs.leaves[number]
        b, n = leading(ref, self.b, self.n)
        full = (self.rows, self.cols)
        if leaf.table:
            size = ref.shape[3]
            if "t" in leaf.axes:
                span = pl.ds(i * self.rows, self.rows)
                columns = (ref[b, n, span, r][:, None] for r in range(size))
                return tile.Table(tuple(tile.in_tile(leaf, x) for x in columns))
            entries = (ref[b, n, 0, r] for r in range(size))
            return tile.Table(tuple(tile.in_tile(leaf, x) for x in entries))
        if leaf.blocks != (0, 0):
            t, s = (
                0 if not r else first // r
                for r, first in zip(leaf.blocks, (i * self.rows, j * self.cols), strict=True)
            )
            return jnp.broadcast_to(tile.in_tile(leaf, ref[b, n, t, s]), full)
        t = pl.ds(i * self.rows, self.rows) if "t" in leaf.axes else 0
        s = pl.ds(j * self.cols, self.cols) if "s" in leaf.axes else 0
        x = ref[b, n, t, s]
        if "t" in leaf.axes and "s" not in leaf.axes:
            x = x[:, None]
        elif "s" in leaf.axes and "t" not in leaf.axes:
            x = x[None, :]
        return jnp.broadcast_to(tile.in_tile(leaf, x), full)

    def leaves(self, i: Any, j: Any) -> list[Any]:
        return [self.leaf(number, i, j) for number in range(len(self.spec.leaves))]

    def at(self, leaves: list[Any], i: Any, j: Any) -> tuple[tile.TileAt, Array]:
        iota = _iota(self.rows, self.cols)
        return tile.where_pairs_lie(self.spec, leaves, i * self.rows, j * self.cols, self.n, iota)

    def walk(self, lists: Lists, owner: Any, step: Callable, state: Any, split: Any = None) -> Any:
        """`step(masked)(other, state)` for each live tile of `owner`, or for part of them."""
        b, n = leading(lists.index, self.b, self.n)
        full, count = lists.full[b, n, owner], lists.count[b, n, owner]
        first = jnp.int32(0)
        if split is not None:
            number, splits = split
            first, end = number * count // splits, (number + 1) * count // splits
            full, count = jnp.clip(full, first, end), end

        def visit(masked: bool) -> Callable:
            act = step(masked)
            return lambda m, state: act(lists.index[b, n, owner, m], state)

        state = jax.lax.fori_loop(first, full, visit(False), state)
        return jax.lax.fori_loop(full, count, visit(True), state)


def _forward_kernel(spec: Spec, tree: Any, splits: int, *refs: Any) -> None:
    *inputs, out_ref, lse_ref = refs
    arrays = jax.tree.unflatten(tree, inputs)
    program, n, b = (pl.program_id(axis) for axis in range(3))
    i, number = (op(program, jnp.int32(splits)) for op in (jax.lax.div, jax.lax.rem))
    tiles = _Tiles(spec, arrays, b, n)
    rows = spec.block_sizes[0]
    query = tiles.query_block(arrays.query, i)
    width = arrays.value.shape[-1]
    dtype = query.dtype

    def step(masked: bool) -> Callable:
        def act(j: Any, state: Any) -> Any:
            acc, top, total = state
            leaves = tiles.leaves(i, j)
            at, inside = tiles.at(leaves, i, j)
            allowed = tile.allowed_pairs(spec, leaves, at, inside) if masked else None
            products = _dot(query, tiles.key_block(arrays.key, j, dtype), trans_b=True)
            value = tiles.key_block(arrays.value, j, dtype)
            if spec.isolated and masked:
                products, value = tile.isolate(
                    products, value, lambda bad: jnp.max(bad, axis=1)[None, :]
                )
            scores = tile.evaluate(spec, leaves, products, at, allowed)
            if spec.program.shared:
                new = jnp.maximum(top, jnp.max(scores, axis=1))
                shift = tile.finite(new)
                weights = jnp.exp(scores - shift[:, None])
                old = jnp.exp(top - shift)
                top, total = new, total * old + jnp.sum(weights, axis=1)
                acc = acc * old[:, None]
            else:
                weights = scores
            keep = tile.kept(spec, leaves, at)
            if keep is not None:
                weights = weights * keep
            weights = tile.scaled(spec, leaves, weights, allowed)
            return acc + _dot(weights.astype(dtype), value), top, total

        return act

    state = (
        jnp.zeros((rows, width), jnp.float32),
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    split = (number, splits) if splits > 1 else None
    acc, top, total = tiles.walk(arrays.rows, i, step, state, split)
    lse = jnp.zeros_like(top)
    if spec.program.shared:
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        # A NaN in the row must survive: `seen` is false for it.
        acc = jnp.where(seen[:, None], acc / safe[:, None], acc)
        lse = jnp.where(seen, tile.finite(top) + jnp.log(safe), jnp.where(total == 0, top, total))
    span = pl.ds(i * rows, rows)
    out_ref[number, b, n, span, :] = acc.astype(out_ref.dtype)
    lse_ref[number, b, n, span] = lse


def _row_kernel(spec: Spec, tree: Any, wanted: tuple[int, ...], *refs: Any) -> None:
    """The gradients of queries and of leaves that have no key axis."""
    inputs, outputs = refs[: tree.num_leaves], refs[tree.num_leaves :]
    arrays, d_out_ref, lse_ref, shift_ref = jax.tree.unflatten(tree, inputs)
    d_query_ref, *d_leaf_refs = outputs
    i, n, b = (pl.program_id(axis) for axis in range(3))
    tiles = _Tiles(spec, arrays, b, n)
    rows = spec.block_sizes[0]
    query, d_out = tiles.query_block(arrays.query, i), tiles.query_block(d_out_ref, i)
    backward = _Backward(spec, tiles, wanted)
    tables = [spec.leaves[number].table for number in wanted]
    table_refs = [ref for ref, table in zip(d_leaf_refs, tables, strict=True) if table]
    plain_refs = [ref for ref, table in zip(d_leaf_refs, tables, strict=True) if not table]
    for ref in table_refs:
        for entry in range(ref.shape[3]):
            ref[b, n, i, entry] = jnp.float32(0)

    def step(masked: bool) -> Callable:
        def act(j: Any, state: Any) -> Any:
            d_query, totals = state
            key = tiles.key_block(arrays.key, j, query.dtype)
            value = tiles.key_block(arrays.value, j, query.dtype)
            statistics = tiles.query_vector(lse_ref, i), tiles.query_vector(shift_ref, i)
            _, d_products, d_leaves = backward(i, j, masked, query, key, value, d_out, statistics)
            parts = [d for d, table in zip(d_leaves, tables, strict=True) if not table]
            looks = [d for d, table in zip(d_leaves, tables, strict=True) if table]
            for ref, found in zip(table_refs, looks, strict=True):
                for index, d_found in found:
                    _add_to_table(ref, (b, n, i), index, d_found)
            totals = [t + part for t, part in zip(totals, parts, strict=True)]
            if not spec.program.shared:
                key = tile.clean(key)  # no log-sum-exp carries a NaN to its rows, the key did
            return d_query + _dot(d_products.astype(query.dtype), key), totals

        return act

    start = [
        jnp.zeros((rows,) if "t" in spec.leaves[number].axes else (), jnp.float32)
        for number, table in zip(wanted, tables, strict=True)
        if not table
    ]
    state = (jnp.zeros(query.shape, jnp.float32), start)
    d_query, totals = tiles.walk(arrays.rows, i, step, state)
    span = pl.ds(i * rows, rows)
    d_query_ref[b, n, span, :] = d_query.astype(d_query_ref.dtype)
    for ref, total in zip(plain_refs, totals, strict=True):
        ref[b, n, span if total.ndim else i] = total


def _add_to_table(ref: Any, place: tuple[Any, ...], index: Array, d_found: Array) -> None:
    """Add each pair's cotangent to the entry that was looked up, one entry after the other.

    The place belongs to this program alone, so the order of the sum is always the same.
    """

    def one(entry: Any, _: Any) -> Any:
        part = jnp.sum(jnp.sum(jnp.where(index == entry, d_found, 0.0), axis=1), axis=0)
        plgpu.atomic_add(ref, (*place, entry), part)
        return _

    jax.lax.fori_loop(0, ref.shape[3], one, jnp.int32(0))


class _Backward:
    """The gradient of one tile."""

    def __init__(self, spec: Spec, tiles: _Tiles, wanted: tuple[int, ...]) -> None:
        self.spec, self.tiles, self.wanted = spec, tiles, wanted

    def __call__(
        self, i: Any, j: Any, masked: bool, query: Array, key: Array, value: Array, d_out: Array,
        statistics: tuple[Array, Array], reduce: bool = True,
    ) -> tuple[Array, Array, list[Any]]:  # fmt: skip
        """Weights that were used, cotangents of the products and of wanted leaves, summed.

        A table's are the look-ups and their cotangents, not yet summed.
        """
        spec, tiles = self.spec, self.tiles
        lse, shift = (jnp.broadcast_to(x[:, None], spec.block_sizes) for x in statistics)
        leaves = tiles.leaves(i, j)
        at, inside = tiles.at(leaves, i, j)
        allowed = tile.allowed_pairs(spec, leaves, at, inside) if masked else None
        products = _dot(query, key, trans_b=True)
        weights, pull = tile.pull_back_looks(
            spec, leaves, products, at, allowed, tile.finite(lse), self.wanted
        )
        d_weights = _dot(d_out, value, trans_b=True)
        keep = tile.kept(spec, leaves, at)
        used = weights
        if keep is not None:
            d_weights, used = d_weights * keep, weights * keep
        if spec.program.shared:
            d_weights = d_weights + shift
        d_products, d_leaves = pull(d_weights)
        if not reduce:
            return used, d_products, d_leaves
        parts: list[Any] = []
        for number, d_leaf in zip(self.wanted, d_leaves, strict=True):
            axes = spec.leaves[number].axes
            if spec.leaves[number].table:
                parts.append(d_leaf)
            elif "t" in axes:
                parts.append(jnp.sum(d_leaf, axis=1))
            elif "s" in axes:
                parts.append(jnp.sum(d_leaf, axis=0))
            else:
                parts.append(jnp.sum(jnp.sum(d_leaf, axis=1), axis=0))
        return used, d_products, parts


def _column_kernel(spec: Spec, tree: Any, wanted: tuple[int, ...], *refs: Any) -> None:
    """The gradients of keys, of values and of leaves that have a key axis but no query axis."""
    inputs, outputs = refs[: tree.num_leaves], refs[tree.num_leaves :]
    arrays, d_out_ref, lse_ref, shift_ref = jax.tree.unflatten(tree, inputs)
    d_key_ref, d_value_ref, *d_leaf_refs = outputs
    j, shared, b = (pl.program_id(axis) for axis in range(3))
    cols = spec.block_sizes[1]
    group = arrays.query.shape[1] // arrays.key.shape[1]
    dtype = arrays.query.dtype
    span = pl.ds(j * cols, cols)
    first = _Tiles(spec, arrays, b, shared * group)
    key, value = (first.key_block(ref, j, dtype) for ref in (arrays.key, arrays.value))

    def one_head(member: Any, state: Any) -> Any:
        n = shared * group + member
        tiles = _Tiles(spec, arrays, b, n)
        backward = _Backward(spec, tiles, wanted)

        def step(masked: bool) -> Callable:
            def act(i: Any, state: Any) -> Any:
                d_key, d_value, totals = state
                query, d_out = (tiles.query_block(x, i) for x in (arrays.query, d_out_ref))
                statistics = tiles.query_vector(lse_ref, i), tiles.query_vector(shift_ref, i)
                used, d_products, d_leaves = backward(
                    i, j, masked, query, key, value, d_out, statistics
                )
                d_value = d_value + _dot(used.astype(dtype), d_out, trans_a=True)
                d_key = d_key + _dot(d_products.astype(dtype), query, trans_a=True)
                totals = [t + part for t, part in zip(totals, d_leaves, strict=True)]
                return d_key, d_value, totals

            return act

        start = [jnp.zeros((cols,), jnp.float32) for _ in wanted]
        d_key, d_value, totals = tiles.walk(arrays.columns, j, step, (*state, start))
        for ref, total in zip(d_leaf_refs, totals, strict=True):
            ref[b, n, span] = total
        return d_key, d_value

    state = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    d_key, d_value = jax.lax.fori_loop(0, group, one_head, state)
    for ref, total in ((d_key_ref, d_key), (d_value_ref, d_value)):
        ref[b, shared, span, :] = total.astype(ref.dtype)


def _pair_kernel(spec: Spec, tree: Any, number: int, sums: tuple[int, int], *refs: Any) -> None:
    """The gradient of a leaf with query and key axes: one tile of it, summed over (b, n)."""
    inputs, (d_leaf_ref,) = refs[: tree.num_leaves], refs[tree.num_leaves :]
    (arrays, d_out_ref, lse_ref, shift_ref), live_ref = jax.tree.unflatten(tree, inputs)
    program, n0, b0 = (pl.program_id(axis) for axis in range(3))
    rows, cols = spec.block_sizes
    across = arrays.leaves[number].shape[3] // cols
    i, j = (op(program, jnp.int32(across)) for op in (jax.lax.div, jax.lax.rem))
    dtype = arrays.query.dtype

    def one(count: Any, total: Array) -> Array:
        b = b0 + jax.lax.div(count, jnp.int32(sums[1]))
        n = n0 + jax.lax.rem(count, jnp.int32(sums[1]))
        tiles = _Tiles(spec, arrays, b, n)
        backward = _Backward(spec, tiles, (number,))

        def work(total: Array) -> Array:
            key, value = (tiles.key_block(x, j, dtype) for x in (arrays.key, arrays.value))
            query, d_out = (tiles.query_block(x, i) for x in (arrays.query, d_out_ref))
            statistics = tiles.query_vector(lse_ref, i), tiles.query_vector(shift_ref, i)
            _, _, (d_leaf,) = backward(
                i, j, True, query, key, value, d_out, statistics, reduce=False
            )
            return total + d_leaf.astype(jnp.float32)

        live = live_ref[(*leading(live_ref, b, n), i, j)]
        return jax.lax.fori_loop(0, live, lambda _, total: work(total), total)

    total = jax.lax.fori_loop(0, sums[0] * sums[1], one, jnp.zeros((rows, cols), jnp.float32))
    span = pl.ds(i * rows, rows), pl.ds(j * cols, cols)
    d_leaf_ref[b0, n0, *span] = total


def _call(kernel: Callable, grid: tuple[int, ...], inputs: Any, out: Any, name: str,
          interpret: Any, stages: int, warps: int) -> Any:  # fmt: skip
    flat, tree = jax.tree.flatten(inputs)

    def traced(*refs: Any) -> None:
        token = _interpreted.set(bool(interpret))
        try:
            kernel(tree, *refs)
        finally:
            _interpreted.reset(token)

    return pl.pallas_call(
        traced,
        grid=grid,
        out_shape=out,
        interpret=bool(interpret),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        name=name,
    )(*flat)


def forward(
    spec: Spec, arrays: Arrays, *, splits: int = 1, interpret: Any = False
) -> tuple[Array, Array]:
    """Output "splits B N T D" and log-sum-exp "splits B N T", for each part of the keys.

    The output is float32 where there are several parts, to be merged; else of the query's dtype.
    """
    batch, heads, rows, _ = arrays.query.shape
    dtype = arrays.query.dtype if splits == 1 and not spec.part else jnp.float32
    out = (
        jax.ShapeDtypeStruct((splits, batch, heads, rows, arrays.value.shape[-1]), dtype),
        jax.ShapeDtypeStruct((splits, batch, heads, rows), jnp.float32),
    )
    grid = (rows // spec.block_sizes[0] * splits, heads, batch)

    def kernel(tree: Any, *refs: Any) -> None:
        _forward_kernel(spec, tree, splits, *refs)

    return _call(
        kernel, grid, arrays, out, "flash_forward", interpret, 2, _warps(spec, arrays, False)
    )


def _warps(spec: Spec, arrays: Arrays, backward: bool) -> int:
    return plan.triton_warps(
        arrays.query.shape[-1], arrays.value.shape[-1], arrays.query.dtype.itemsize,
        spec.block_sizes[0], backward, bool(spec.leaves),
    )  # fmt: skip


def backward(
    spec: Spec, arrays: Arrays, live: Array, d_out: Array, lse: Array, shift: Array,
    wanted: tuple[int, ...], *, interpret: Any = False,
) -> tuple[Array, Array, Array, list[Array]]:  # fmt: skip
    """Gradients: query "B N T H", key "B K S H", value "B K S D", and wanted leaves in float32.

    `shift` "B N T": the cotangent of lse minus sum(d_out * out); `live`
    (b, n, I, J): 1 for tiles with work to do, else 0.
    """
    batch, heads, num_rows, _ = arrays.query.shape
    _, shared, num_cols, _ = arrays.key.shape
    rows, cols = spec.block_sizes
    inputs = (arrays, d_out, lse, shift)
    owned = {
        owner: tuple(i for i in wanted if spec.leaves[i].owner == owner)
        for owner in ("row", "column", "pair")
    }
    gradients: dict[int, Array] = {}
    warps = _warps(spec, arrays, True)

    dtype = jnp.float32 if spec.part else arrays.query.dtype

    outs = [jax.ShapeDtypeStruct(arrays.query.shape, dtype)]
    for number in owned["row"]:
        leaf = spec.leaves[number]
        blocks = num_rows if "t" in leaf.axes else num_rows // rows
        entries = arrays.leaves[number].shape[3:] if leaf.table else ()
        outs.append(jax.ShapeDtypeStruct((batch, heads, blocks, *entries), jnp.float32))
    d_query, *sums = _call(
        lambda tree, *refs: _row_kernel(spec, tree, owned["row"], *refs),
        (num_rows // rows, heads, batch), inputs, tuple(outs), "flash_rows", interpret, 2,
        warps,
    )  # fmt: skip
    for number, part in zip(owned["row"], sums, strict=True):
        leaf = spec.leaves[number]
        part = part if leaf.table else part[..., None]
        gradients[number] = part if "t" in leaf.axes else part.sum(2, keepdims=True)

    outs = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (arrays.key, arrays.value)]
    outs += [jax.ShapeDtypeStruct((batch, heads, num_cols), jnp.float32)] * len(owned["column"])
    d_key, d_value, *sums = _call(
        lambda tree, *refs: _column_kernel(spec, tree, owned["column"], *refs),
        (num_cols // cols, shared, batch), inputs, tuple(outs), "flash_columns", interpret, 2,
        warps,
    )  # fmt: skip
    for number, total in zip(owned["column"], sums, strict=True):
        gradients[number] = total[:, :, None, :]

    for number in owned["pair"]:
        x = arrays.leaves[number]
        over = (batch // x.shape[0], heads // x.shape[1])
        grid = (num_rows // rows * (num_cols // cols), x.shape[1], x.shape[0])
        gradients[number] = _call(
            functools.partial(_bind_pair, spec, number, over), grid, (inputs, live),
            jax.ShapeDtypeStruct(x.shape, jnp.float32), "flash_pairs", interpret, 1, warps,
        )  # fmt: skip
    return d_query, d_key, d_value, [gradients[i] for i in wanted]


def _bind_pair(spec: Spec, number: int, sums: tuple[int, int], tree: Any, *refs: Any) -> None:
    _pair_kernel(spec, tree, number, sums, *refs)
