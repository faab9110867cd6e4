"""Flash attention for TPUs, through Mosaic.

The grid walks the list of live tiles that `plan.make_flat` writes: it is prefetched into scalar
memory, and the index maps read from it which blocks to bring in, so empty tiles cost nothing.  What
belongs to an owner (a row of tiles in the forward pass and for dq, a column for dk and dv) is
summed in scratch from its FIRST step to its LAST.

Tiles of the row kernels are "rows cols".  Those of the column kernel are transposed, "cols rows":
the log-sum-exp of the queries then lies along the lanes as it comes from memory, and dk and dv are
plain products.  The mathematics (`pallas_kernels.flash.tile`) is elementwise and does not notice.

Dao 2023, arXiv:2307.08691 is the algorithm; masks, modifiers and normalizers are the caller's.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.flash import plan, tile
from pallas_kernels.flash.plan import FIRST, LAST
from pallas_kernels.flash.problem import Arrays, Flat, Spec
from pallas_kernels.flash.tpu_code import lowered
from pallas_kernels.flash.tpu_layout import (
    FULL,
    KIND,
    LANES,
    PARTIAL,
    Bits,
    LaneAt,
    Layout,
    Words,
    div,
    edge,
    from_tiled,
    mod,
    other_of,
    owner_of,
    supported,
    tiled,
    vectors,
)

# -- what fits -----------------------------------------------------------------------------------


def limits(query: Any, value: Any, spec: Spec | None = None) -> str | None:
    """What keeps these bodies from serving arrays of this dtype and width, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"computes in bfloat16, float16 and float32, not {query.dtype}"
    for name, x in (("keys", query), ("values", value)):
        if x.shape[-1] > 256:
            return f"holds {name} up to 256 wide, got {x.shape[-1]}"
    return None


def padded_width(width: int) -> int:
    """Any width will do: a block holds all of it."""
    return width


def block_limit(block_sizes: tuple[int, int]) -> str | None:
    """What is wrong with these block sizes, or None."""
    if all(block % 16 == 0 for block in block_sizes):
        return None
    return f"takes block_sizes that are multiples of 16, not {block_sizes}"


def block_sizes(
    key_width: int, value_width: int, itemsize: int, lengths: tuple[int, int], backward: bool,
    kind: str,
) -> tuple[int, int]:  # fmt: skip
    """Rows and columns of a tile: large, as far as the vector memory of a kind of TPU allows.

    Sizes are multiples of 128, or, where a length is shorter, that length in whole registers.
    """
    rows, cols = (512, 512) if backward else (512, 1024)
    available = vector_memory(kind) * 2 // 3
    while vector_bytes((rows, cols), key_width, value_width, itemsize, backward) > available:
        rows, cols = (rows, cols // 2) if cols > rows else (rows // 2, cols)

    def fit(block: int, length: int) -> int:
        return min(block, plan.padded(length, LANES if length > LANES else 32))

    return fit(rows, lengths[0]), fit(cols, lengths[1])


def vector_memory(kind: str) -> int:
    """Bytes of vector memory that a kernel may take on a kind of TPU: three quarters of it.

    All of it where there is little, as on v4.
    """
    sizes = {"v4": 16, "v5 lite": 96, "v5e": 96, "v5": 48, "v6": 96, "7": 48}
    return next((size for name, size in sizes.items() if name in kind), 16) << 20


def vector_bytes(
    blocks: tuple[int, int], key_width: int, value_width: int, itemsize: int, backward: bool
) -> int:
    """An estimate of the vector memory that a kernel takes, in bytes."""
    rows, cols = blocks
    wide = plan.padded(key_width, LANES) + plan.padded(value_width, LANES)
    streamed = 2 * itemsize * (rows + cols) * wide  # two buffers of each block
    summed = 4 * max(rows, cols) * (wide + 2 * LANES)
    tiles = 4 * rows * cols * (10 if backward else 6)  # values that are alive at once, or spilled
    return streamed + summed + tiles


def _precision(dtype: Any) -> Any:
    """Of products: exact in the dtype of the inputs; float16 is widened by `supported`."""
    if dtype == jnp.bfloat16:
        return jax.lax.Precision.DEFAULT
    return jax.lax.Precision.HIGHEST


def _dot(a: Array, b: Array, precision: Any, transposed: bool = False) -> Array:
    """The product a b, or a b^T, summed in float32."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


# -- kernels -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of a grid: which tile, and what to do with it."""

    layout: Layout
    reads: Sequence[Callable[..., Any]]
    refs: Sequence[Any]
    where: tuple[Any, Any, Any, Any]

    def leaves(self) -> list[Any]:
        return [read(ref, *self.where) for read, ref in zip(self.reads, self.refs, strict=True)]

    def at(self, leaves: list[Any]) -> tuple[LaneAt, Array]:
        _, n, i, j = self.where
        return self.layout.at(leaves, n, i, j)


class Beside(Protocol):
    """What a kernel does while its tiles are computed, as `pallas_kernels.ring` sends keys on.

    `arrays` and `outputs` stay in main memory.  `before` runs in the first step of the grid and
    `after` in the last, with references to arrays, outputs and scratch; both steps are one core's.
    """

    @property
    def arrays(self) -> Sequence[Array]: ...

    @property
    def outputs(self) -> Sequence[Any]: ...

    @property
    def scratch(self) -> Sequence[Any]: ...

    @property
    def collective_id(self) -> int | None: ...

    def before(self, arrays: Any, outputs: Any, scratch: Any) -> None: ...

    def after(self, arrays: Any, outputs: Any, scratch: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Nothing:
    """Nothing beside."""

    arrays: tuple[()] = ()
    outputs: tuple[()] = ()
    scratch: tuple[()] = ()
    collective_id: None = None

    def before(self, arrays: Any, outputs: Any, scratch: Any) -> None: ...

    def after(self, arrays: Any, outputs: Any, scratch: Any) -> None: ...


def _memory_limit() -> int | None:
    """How much vector memory to ask for on the device that is compiled for."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None) or jax.devices()[0]
    return vector_memory(device.device_kind) if device.platform == "tpu" else None


def _call(
    body: Callable, layout: Layout, arrays: Arrays, prefetched: Sequence[Array],
    inputs: Sequence[tuple[Array, pl.BlockSpec]], outputs: Sequence[tuple[Any, pl.BlockSpec]],
    scratch: Sequence[Any], grid: tuple[Any, ...], sequential: int, name: str, interpret: Any,
    beside: Beside,
) -> tuple[list[Array], list[Array]]:  # fmt: skip
    """Run `body(step, *inputs, *outputs, *scratch)` over the grid, and something `beside`.

    The last `sequential` axes of the grid share outputs and scratch; the others may be divided
    between cores, unless something is done beside.  Returns the outputs, and those of `beside`.
    """
    leaves = [
        layout.operand(leaf, x) for leaf, x in zip(layout.spec.leaves, arrays.leaves, strict=True)
    ]
    reads = [leaf.read for leaf in leaves]
    if layout.pages:
        assert arrays.pages is not None
        prefetched = [*prefetched, jnp.asarray(arrays.pages, jnp.int32).reshape(-1)]
    count = len(prefetched)
    parts = (prefetched, leaves, inputs, beside.arrays, outputs, beside.outputs, scratch)
    ends = list(itertools.accumulate(len(part) for part in parts))

    def kernel(*refs: Any) -> None:
        starts = zip([0, *ends], [*ends, len(refs)], strict=True)
        lists, places, own, there, outs, arrived, sums, more = (refs[a:b] for a, b in starts)
        ids = [pl.program_id(axis) for axis in range(len(grid))]
        where = layout.place(*ids, *lists)
        if beside.outputs:
            _when_at(ids, [0] * len(grid), lambda: beside.before(there, arrived, more))
        body(_Step(layout, reads, places, where), ids, lists[0], *own, *outs, *sums)
        if beside.outputs:
            last = [pl.num_programs(axis) - 1 for axis in range(len(grid))]
            _when_at(ids, last, lambda: beside.after(there, arrived, more))

    if beside.outputs:
        sequential = len(grid)
    semantics: Any = ("parallel",) * (len(grid) - sequential) + ("arbitrary",) * sequential
    afar = pl.BlockSpec(memory_space=pltpu.HBM)
    found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=count,
            grid=grid,
            in_specs=[
                *(leaf.spec for leaf in leaves),
                *(spec for _, spec in inputs),
                *(afar for _ in beside.arrays),
            ],
            out_specs=[*(spec for _, spec in outputs), *(afar for _ in beside.outputs)],
            scratch_shapes=[*scratch, *beside.scratch],
        ),
        out_shape=[*(shape for shape, _ in outputs), *beside.outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=_memory_limit(),
            collective_id=beside.collective_id,
        ),
        interpret=interpret,
        name=name,
    )(*prefetched, *(leaf.array for leaf in leaves), *(x for x, _ in inputs), *beside.arrays)
    return found[: len(outputs)], found[len(outputs) :]


def _when_at(ids: Sequence[Any], step: Sequence[Any], act: Callable[[], None]) -> None:
    """`act()` in one step of the grid."""
    here = functools.reduce(jnp.logical_and, [a == b for a, b in zip(ids, step, strict=True)])
    pl.when(here)(act)


def _lanes(x: Array, width: int) -> Array:
    """An array "n 128", all lanes alike, as "n width"."""
    copies = -(-width // LANES)
    x = jnp.concatenate([x] * copies, 1) if copies > 1 else x
    return x if x.shape[1] == width else x[:, :width]


def _summed(spec: Spec, arrays: Arrays) -> Any:
    """The dtype in which sums leave a kernel."""
    return jnp.float32 if spec.part else arrays.query.dtype


def _float32(shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _when_live(word: Any, act: Callable[[bool], None]) -> None:
    """`act(masked)` if the step has a tile to visit."""
    kind = word & KIND
    pl.when(kind == FULL)(lambda: act(False))
    pl.when(kind == PARTIAL)(lambda: act(True))


def _by_row(spec: Spec, arrays: Arrays) -> tuple[Layout, Words]:
    rows, cols = spec.block_sizes
    assert isinstance(arrays.rows, Flat)
    num_cols = arrays.pages.shape[1] if arrays.pages is not None else arrays.key.shape[2] // cols
    words = Words.of(arrays.rows, (arrays.query.shape[2] // rows, num_cols))

    def place(b: Any, n: Any, step: Any, ref: Any, *_: Any) -> tuple[Any, Any, Any, Any]:
        word = words.at(ref, b, n, step)
        return b, n, owner_of(word), other_of(word)

    pages = 0 if arrays.pages is None else num_cols
    group = arrays.query.shape[1] // arrays.key.shape[1]
    return Layout(spec, group, False, place, pages), words


def forward(
    spec: Spec, arrays: Arrays, *, splits: int = 1, interpret: Any = False
) -> tuple[Array, Array]:
    """Output "1 B N T D" and log-sum-exp "1 B N T"; the first axis is that of splits.

    Raises:
      NotImplementedError: more splits than one, or a list too long for scalar memory.
    """
    out, lse, _ = forward_beside(spec, arrays, Nothing(), splits=splits, interpret=interpret)
    return out, lse


def forward_beside(
    spec: Spec, arrays: Arrays, beside: Beside, *, splits: int = 1, interpret: Any = False
) -> tuple[Array, Array, list[Array]]:
    """`forward`, while something is done beside; its outputs come last."""
    if splits != 1:
        raise NotImplementedError(
            f'implementation="tpu" does not divide the keys, got {splits=}; a core walks all of '
            'them. implementation="triton" can.'
        )
    dtype = arrays.query.dtype
    arrays = arrays._replace(
        query=supported(arrays.query), key=supported(arrays.key), value=supported(arrays.value)
    )
    layout, words = _by_row(spec, arrays)
    batch, heads, num_rows, _ = arrays.query.shape
    width, rows = arrays.value.shape[-1], spec.block_sizes[0]
    (out, lse), arrived = _call(
        functools.partial(_forward_body, words),
        layout,
        arrays,
        [words.words],
        [
            (arrays.query, layout.rows_of(arrays.query)),
            (arrays.key, layout.cols_of(arrays.key)),
            (arrays.value, layout.cols_of(arrays.value)),
        ],
        [
            (
                jax.ShapeDtypeStruct((batch, heads, num_rows, width), _summed(spec, arrays)),
                layout.rows_of(arrays.value),
            ),
            (_float32((batch, heads, num_rows // rows, 1, rows)), layout.query_vector()),
        ],
        [pltpu.VMEM(shape, jnp.float32) for shape in ((rows, width), (rows, LANES), (rows, LANES))],
        (batch, heads, words.total),
        1,
        "flash_forward",
        interpret,
        beside,
    )
    out = out if spec.part else out.astype(dtype)
    return out[None], lse.reshape(1, batch, heads, num_rows), arrived


def _forward_body(
    words: Words, step: _Step, ids: Sequence[Any], list_ref: Any, query_ref: Any, key_ref: Any,
    value_ref: Any, out_ref: Any, lse_ref: Any, acc_ref: Any, top_ref: Any, sum_ref: Any,
) -> None:  # fmt: skip
    spec = step.layout.spec
    word = words.at(list_ref, *ids)
    width, cols = acc_ref.shape[1], spec.block_sizes[1]

    @pl.when(edge(word, FIRST))
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        top_ref[...] = jnp.full(top_ref.shape, -jnp.inf, jnp.float32)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def act(masked: bool) -> None:
        query = query_ref[0, 0]
        key, value = (ref[0, 0].astype(query.dtype) for ref in (key_ref, value_ref))
        precision = _precision(query.dtype)
        leaves = step.leaves()
        products = _dot(query, key, precision, transposed=True)
        if spec.isolated and masked:
            products, clean = tile.isolate(
                products,
                value.astype(jnp.float32),
                lambda bad: jnp.max(bad, axis=1, keepdims=True).T,
            )
            value = clean.astype(query.dtype)

        def weigh(leaves: list[Any], products: Array) -> tuple[Array, Any, Any]:
            at, inside = step.at(leaves)
            allowed = tile.allowed_pairs(spec, leaves, at, inside) if masked else None
            weights = tile.evaluate(spec, leaves, products, at, allowed)
            return weights, allowed, tile.kept(spec, leaves, at)

        weights, allowed, keep = lowered(weigh)(leaves, products)
        acc = acc_ref[...]
        if spec.program.shared:
            old = top_ref[...]
            top = jnp.maximum(old, jnp.max(weights, axis=1, keepdims=True))
            shift = tile.finite(top)
            weights = jnp.exp(weights - _lanes(shift, cols))
            factor = jnp.exp(old - shift)
            top_ref[...] = top
            sum_ref[...] = sum_ref[...] * factor + jnp.sum(weights, axis=1, keepdims=True)
            acc = acc * _lanes(factor, width)
        if keep is not None:
            weights = weights * keep
        weights = tile.scaled(spec, leaves, weights, allowed)
        acc_ref[...] = acc + _dot(weights.astype(query.dtype), value, precision)

    _when_live(word, act)

    @pl.when(edge(word, LAST))
    def _() -> None:
        acc, top, total = acc_ref[...], top_ref[...], sum_ref[...]
        lse = jnp.zeros_like(top)
        if spec.program.shared:
            seen = total > 0
            safe = jnp.where(seen, total, 1.0)
            # A NaN in the row must survive: `seen` is false for it, and `safe` one.
            acc = acc / _lanes(safe, width)
            unseen = jnp.where(total == 0, top, total)
            lse = jnp.where(seen, tile.finite(top) + jnp.log(safe), unseen)
        out_ref[0, 0] = acc.astype(out_ref.dtype)
        lse_ref[0, 0, 0] = lse[:, :1].T


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """The gradient of one tile, in the layout of the step."""

    weights: Array  # those that were used, after dropout
    products: Array  # cotangent
    leaves: list[Any]  # cotangents of the wanted leaves

    @classmethod
    def of(
        cls, step: _Step, masked: bool, products: Array, d_weights: Array, lse: Array,
        shift: Array, wanted: tuple[int, ...],
    ) -> "_Gradient":  # fmt: skip
        """From the products of the tile and the cotangent of its weights, "rows cols"."""
        spec = step.layout.spec

        def pull_back(
            leaves: list[Any], products: Array, d_weights: Array, lse: Array, shift: Array
        ) -> tuple[Array, Array, list[Any]]:
            at, inside = step.at(leaves)
            allowed = tile.allowed_pairs(spec, leaves, at, inside) if masked else None
            weights, pull = tile.pull_back(
                spec, leaves, products, at, allowed, tile.finite(lse), wanted
            )
            keep = tile.kept(spec, leaves, at)
            used = weights
            if keep is not None:
                d_weights, used = d_weights * keep, weights * keep
            if spec.program.shared:
                d_weights = d_weights + shift
            return used, *pull(d_weights)

        return cls(*lowered(pull_back)(step.leaves(), products, d_weights, lse, shift))


def backward(
    spec: Spec, arrays: Arrays, live: Array, d_out: Array, lse: Array, shift: Array,
    wanted: tuple[int, ...], *, interpret: Any = False,
) -> tuple[Array, Array, Array, list[Array]]:  # fmt: skip
    """Gradients: dq "B N T H", dk "B K S H", dv "B K S D", and of wanted leaves, in float32.

    `shift` "B N T": the cotangent of lse minus sum(d_out * out); `live` boolean (b, n, I, J).
    `arrays.columns` lists tiles by column, for all heads alike, for each key head or for each query
    head.

    Raises:
      NotImplementedError: a list too long for scalar memory, or the gradient of an array that has
        one entry for a block of pairs.
    """
    statistics = (live, d_out, lse, shift)
    found, _ = backward_beside(
        spec, arrays, statistics, wanted, (Nothing(), Nothing()), interpret=interpret
    )
    return found


def backward_beside(
    spec: Spec, arrays: Arrays, statistics: Sequence[Array], wanted: tuple[int, ...],
    beside: tuple[Beside, Beside], *, interpret: Any = False,
) -> tuple[Any, tuple[list[Array], list[Array]]]:  # fmt: skip
    """`backward`, while something is done beside the kernel of rows and that of columns."""
    live, d_out, lse, shift = statistics
    if any(spec.leaves[i].blocks != (0, 0) for i in wanted):
        raise NotImplementedError(
            'implementation="tpu" has no gradient for an array with one entry per block of pairs; '
            'implementation="blockwise" does.'
        )
    dtype = arrays.query.dtype
    arrays = arrays._replace(
        query=supported(arrays.query), key=supported(arrays.key), value=supported(arrays.value)
    )
    rows = spec.block_sizes[0]
    statistics = [supported(d_out), *(vectors(x, rows) for x in (lse, shift))]
    owned = {
        owner: tuple(i for i in wanted if spec.leaves[i].owner == owner)
        for owner in ("row", "column", "pair")
    }
    d_query, found, by_rows = _backward_rows(
        spec, arrays, statistics, owned["row"], interpret, beside[0]
    )
    d_key, d_value, more, by_columns = _backward_columns(
        spec, arrays, statistics, owned["column"], interpret, beside[1]
    )
    found |= more
    for number in owned["pair"]:
        found[number] = _backward_pair(spec, arrays, live, statistics, number, interpret)
    if not spec.part:
        d_query, d_key, d_value = (x.astype(dtype) for x in (d_query, d_key, d_value))
    return (d_query, d_key, d_value, [found[i] for i in wanted]), (by_rows, by_columns)


def _inputs(layout: Layout, arrays: Arrays, statistics: Sequence[Array]) -> list[Any]:
    """What every backward kernel reads, beside leaves."""
    d_out, lse, shift = statistics
    return [
        (arrays.query, layout.rows_of(arrays.query)),
        (arrays.key, layout.cols_of(arrays.key)),
        (arrays.value, layout.cols_of(arrays.value)),
        (d_out, layout.rows_of(d_out)),
        (lse, layout.query_vector()),
        (shift, layout.query_vector()),
    ]


def _backward_rows(
    spec: Spec, arrays: Arrays, statistics: Sequence[Array], wanted: tuple[int, ...],
    interpret: Any, beside: Beside,
) -> tuple[Array, dict[int, Array], list[Array]]:  # fmt: skip
    """dq, and the gradients of leaves without keys."""
    layout, words = _by_row(spec, arrays)
    batch, heads, num_rows, width = arrays.query.shape
    rows, cols = spec.block_sizes
    outputs = [(jax.ShapeDtypeStruct(arrays.query.shape, _summed(spec, arrays)),
                layout.rows_of(arrays.query))]  # fmt: skip
    scratch = [pltpu.VMEM((rows, width), jnp.float32)]
    scratch += [pltpu.VMEM((rows, LANES), jnp.float32) for _ in range(2)]
    for number in wanted:
        leaf, x = spec.leaves[number], arrays.leaves[number]
        size = plan.padded(x.shape[3], LANES) if leaf.table else cols
        if leaf.table and "t" in leaf.axes:
            shape: tuple[int, ...] = (batch, heads, num_rows, size)
            outputs.append((_float32(shape), layout.rows_of(_float32(shape))))
        elif "t" in leaf.axes:
            vector = _float32((batch, heads, num_rows // rows, 1, rows))
            outputs.append((vector, layout.query_vector()))
            scratch.append(pltpu.VMEM((rows, LANES), jnp.float32))
        else:
            block = layout.block((1, 1, 1, size), lambda b, n, i, j: (b, n, 0, 0))
            outputs.append((_float32((batch, heads, 1, size)), block))
    (d_query, *sums), arrived = _call(
        functools.partial(_rows_body, words, wanted),
        layout,
        arrays,
        [words.words],
        _inputs(layout, arrays, statistics),
        outputs,
        scratch,
        (batch, heads, words.total),
        1,
        "flash_rows",
        interpret,
        beside,
    )
    found = {}
    for number, total in zip(wanted, sums, strict=True):
        leaf = spec.leaves[number]
        if leaf.table:
            found[number] = total[..., : arrays.leaves[number].shape[3]]
        elif "t" in leaf.axes:
            found[number] = total.reshape(batch, heads, num_rows, 1)
        else:
            found[number] = total.sum(-1, keepdims=True)
    return d_query, found, arrived


def _rows_body(
    words: Words, wanted: tuple[int, ...], step: _Step, ids: Sequence[Any], list_ref: Any,
    query_ref: Any, key_ref: Any, value_ref: Any, d_out_ref: Any, lse_ref: Any, shift_ref: Any,
    d_query_ref: Any, *rest: Any,
) -> None:  # fmt: skip
    spec = step.layout.spec
    word = words.at(list_ref, *ids)
    cols = spec.block_sizes[1]
    d_leaf_refs, (acc_ref, lse_full, shift_full, *by_row) = (
        rest[: len(wanted)],
        rest[len(wanted) :],
    )
    # What is summed over the steps of an owner, what over all steps, and where.
    leaves = [spec.leaves[number] for number in wanted]
    waiting = iter(by_row)
    totals = [
        next(waiting) if "t" in leaf.axes and not leaf.table else ref.at[0, 0]
        for leaf, ref in zip(leaves, d_leaf_refs, strict=True)
    ]

    @pl.when(ids[-1] == 0)
    def _() -> None:
        for leaf, total in zip(leaves, totals, strict=True):
            if "t" not in leaf.axes:
                total[...] = jnp.zeros_like(total)

    @pl.when(edge(word, FIRST))
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        for full, ref in ((lse_full, lse_ref), (shift_full, shift_ref)):
            full[...] = jnp.broadcast_to(ref[0, 0, 0].T, full.shape)
        for leaf, total in zip(leaves, totals, strict=True):
            if "t" in leaf.axes:
                total[...] = jnp.zeros_like(total)

    def act(masked: bool) -> None:
        query, key, value, d_out = (ref[0, 0] for ref in (query_ref, key_ref, value_ref, d_out_ref))
        precision = _precision(query.dtype)
        gradient = _Gradient.of(
            step,
            masked,
            _dot(query, key, precision, transposed=True),
            _dot(d_out, value, precision, transposed=True),
            _lanes(lse_full[...], cols),
            _lanes(shift_full[...], cols),
            wanted,
        )
        if not spec.program.shared:
            # No log-sum-exp carries a NaN to the rows that see it: the key did.
            key = tile.clean(key.astype(jnp.float32)).astype(key.dtype)
        acc_ref[...] += _dot(gradient.products.astype(key.dtype), key, precision)
        for leaf, total, part in zip(leaves, totals, gradient.leaves, strict=True):
            if leaf.table:
                total[...] += part.values
            elif "t" in leaf.axes:
                total[...] += jnp.sum(part, axis=1, keepdims=True)
            else:
                total[...] += jnp.sum(part, axis=0, keepdims=True)

    _when_live(word, act)

    @pl.when(edge(word, LAST))
    def _() -> None:
        d_query_ref[0, 0] = acc_ref[...].astype(d_query_ref.dtype)
        for leaf, ref, total in zip(leaves, d_leaf_refs, totals, strict=True):
            if "t" in leaf.axes and not leaf.table:
                ref[0, 0, 0] = total[...][:, :1].T


def _backward_columns(
    spec: Spec, arrays: Arrays, statistics: Sequence[Array], wanted: tuple[int, ...],
    interpret: Any, beside: Beside,
) -> tuple[Array, Array, dict[int, Array], list[Array]]:  # fmt: skip
    """dk, dv, and the gradients of leaves with keys but without queries."""
    assert isinstance(arrays.columns, Flat)
    batch, heads, num_rows, _ = arrays.query.shape
    _, shared, num_cols, _ = arrays.key.shape
    rows, cols = spec.block_sizes
    group = heads // shared
    words = Words.of(arrays.columns, (num_cols // cols, num_rows // rows))
    # Heads that share a key head are walked together, tile by tile, unless each has its own list.
    members = 1 if words.shape[1] == heads else group
    owners = heads // members

    def place(
        b: Any, owner: Any, step: Any, member: Any, ref: Any, *_: Any
    ) -> tuple[Any, Any, Any, Any]:
        word = words.at(ref, b, owner, step)
        return b, owner * members + member, other_of(word), owner_of(word)

    layout = Layout(spec, group, True, place)
    by_owner = dataclasses.replace(layout, group=members)
    partial_sums = owners != shared
    outputs = [
        (
            jax.ShapeDtypeStruct(
                (batch, owners, *x.shape[2:]),
                jnp.float32 if partial_sums else _summed(spec, arrays),
            ),
            by_owner.cols_of(x),
        )
        for x in (arrays.key, arrays.value)
    ]
    scratch = [pltpu.VMEM((cols, x.shape[3]), jnp.float32) for x in (arrays.key, arrays.value)]
    for _ in wanted:
        block = layout.block(
            (1, members, 1, 1, cols), lambda b, n, i, j: (b, div(n, members), j, 0, 0)
        )
        outputs.append((_float32((batch, heads, num_cols // cols, 1, cols)), block))
        scratch.append(pltpu.VMEM((members, cols, LANES), jnp.float32))
    (d_key, d_value, *sums), arrived = _call(
        functools.partial(_columns_body, words, members, wanted),
        layout,
        arrays,
        [words.words],
        _inputs(layout, arrays, statistics),
        outputs,
        scratch,
        (batch, owners, words.total, members),
        2,
        "flash_columns",
        interpret,
        beside,
    )
    if partial_sums:
        d_key, d_value = (
            x.reshape(batch, shared, group, *x.shape[2:]).sum(2) for x in (d_key, d_value)
        )
    sums = [x.reshape(batch, heads, 1, num_cols) for x in sums]
    return d_key, d_value, dict(zip(wanted, sums, strict=True)), arrived


def _columns_body(
    words: Words, members: int, wanted: tuple[int, ...], step: _Step, ids: Sequence[Any],
    list_ref: Any, query_ref: Any, key_ref: Any, value_ref: Any, d_out_ref: Any, lse_ref: Any,
    shift_ref: Any, d_key_ref: Any, d_value_ref: Any, *rest: Any,
) -> None:  # fmt: skip
    b, owner, number, member = ids
    layout = step.layout
    word = words.at(list_ref, b, owner, number)
    d_leaf_refs, (key_sum, value_sum, *totals) = rest[: len(wanted)], rest[len(wanted) :]

    @pl.when(edge(word, FIRST))
    def _() -> None:
        @pl.when(member == 0)
        def _() -> None:
            key_sum[...] = jnp.zeros_like(key_sum)
            value_sum[...] = jnp.zeros_like(value_sum)

        for total in totals:
            total[member] = jnp.zeros(total.shape[1:], jnp.float32)

    def act(masked: bool) -> None:
        query, key, value, d_out = (ref[0, 0] for ref in (query_ref, key_ref, value_ref, d_out_ref))
        precision = _precision(query.dtype)
        gradient = _Gradient.of(
            step,
            masked,
            _dot(key, query, precision, transposed=True),
            _dot(value, d_out, precision, transposed=True),
            layout.spread(lse_ref[0, 0, 0], 0),
            layout.spread(shift_ref[0, 0, 0], 0),
            wanted,
        )
        value_sum[...] += _dot(gradient.weights.astype(d_out.dtype), d_out, precision)
        key_sum[...] += _dot(gradient.products.astype(query.dtype), query, precision)
        for total, part in zip(totals, gradient.leaves, strict=True):
            total[member] += jnp.sum(part, axis=1, keepdims=True)

    _when_live(word, act)

    @pl.when(edge(word, LAST) & (member == members - 1))
    def _() -> None:
        d_key_ref[0, 0] = key_sum[...].astype(d_key_ref.dtype)
        d_value_ref[0, 0] = value_sum[...].astype(d_value_ref.dtype)
        for ref, total in zip(d_leaf_refs, totals, strict=True):
            for one in range(members):
                ref[0, one, 0] = total[one][:, :1].T


def _backward_pair(
    spec: Spec, arrays: Arrays, live: Array, statistics: Sequence[Array], number: int,
    interpret: Any,
) -> Array:  # fmt: skip
    """The gradient of a leaf with queries and keys: each tile of it, summed over (b, n)."""
    x = arrays.leaves[number]
    batch, heads, num_rows, _ = arrays.query.shape
    rows, cols = spec.block_sizes
    own_batches, own_heads = x.shape[:2]
    across = heads // own_heads
    blocks = (num_rows // rows, x.shape[3] // cols)
    bits = Bits.of(live)

    def place(b: Any, n: Any, i: Any, j: Any, count: Any, *_: Any) -> tuple[Any, Any, Any, Any]:
        # One of the two terms is zero: an axis is summed over, or it is the leaf's own.
        return b + div(count, across), n + mod(count, across), i, j

    layout = Layout(spec, heads // arrays.key.shape[1], False, place)
    shape, where = tiled(x.shape, cols)
    block = pl.BlockSpec((1, 1, 1, rows, cols), lambda b, n, i, j, *_: (b, n, *where(i, j)))
    (found,), _ = _call(
        functools.partial(_pair_body, bits, number),
        layout,
        arrays,
        [bits.words],
        _inputs(layout, arrays, statistics),
        [(_float32(shape), block)],
        [],
        (own_batches, own_heads, *blocks, batch // own_batches * across),
        1,
        "flash_pairs",
        interpret,
        Nothing(),
    )
    return from_tiled(found)


def _pair_body(
    bits: Bits, number: int, step: _Step, ids: Sequence[Any], live_ref: Any, query_ref: Any,
    key_ref: Any, value_ref: Any, d_out_ref: Any, lse_ref: Any, shift_ref: Any, total_ref: Any,
) -> None:  # fmt: skip
    @pl.when(ids[-1] == 0)
    def _() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(bits.at(live_ref, *step.where))
    def _() -> None:
        query, key, value, d_out = (ref[0, 0] for ref in (query_ref, key_ref, value_ref, d_out_ref))
        precision = _precision(query.dtype)
        gradient = _Gradient.of(
            step,
            True,
            _dot(query, key, precision, transposed=True),
            _dot(d_out, value, precision, transposed=True),
            step.layout.spread(lse_ref[0, 0, 0], 0),
            step.layout.spread(shift_ref[0, 0, 0], 0),
            (number,),
        )
        total_ref[0, 0, 0] += gradient.leaves[0]
