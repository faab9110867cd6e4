"""The fused kernels behind the front door: a call becomes the problem that a kernel solves.

Forward and backward run in `pallas_kernels.flash`; forward-mode and higher derivatives, which no
kernel has, come from the folds in plain JAX that compute the same function in O(T + S) memory.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.core.derivatives import make_solver
from attnlab.core.folds import Folds
from attnlab.core.masks import Full, Mask, Span
from attnlab.core.reference import Call, isolate_bad, zero_bad
from attnlab.core.scores import apply_modifiers
from attnlab.core.terms import align, axes_of, restrict, sized_axes
from attnlab.core.tiles import Leaves, Signature, pad_terms
from pallas_kernels.flash import plan
from pallas_kernels.flash.problem import Arrays, Leaf, Spec, reduce_leaf
from pallas_kernels.flash.tile import Table, TileAt

BACKENDS = ("triton", "mosaic_gpu", "tpu")

_interpret: contextvars.ContextVar[bool] = contextvars.ContextVar("interpret", default=False)


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Within this context kernels run interpreted, on any machine: slow, for tests and teaching.

    What was traced inside stays interpreted, also where `jax.jit` runs it later.
    """
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def body(backend: str) -> Any:
    """The module with the kernels of a backend, imported when first needed."""
    return importlib.import_module(f"pallas_kernels.flash.{backend}")


def device() -> tuple[str, str]:
    """Platform and kind of the device that is traced for: an abstract mesh's, else the default."""
    mesh = jax.sharding.get_abstract_mesh()
    abstract = getattr(mesh, "abstract_device", None)
    if abstract is not None:
        platform = "gpu" if abstract.platform in ("gpu", "cuda") else abstract.platform
        return platform or "", abstract.device_kind
    found = jax.devices()[0]
    return ("gpu" if found.platform == "cuda" else found.platform), found.device_kind


def missing(backend: str) -> str | None:
    """Why a backend cannot run on the present device, or None."""
    if _interpret.get():
        return None
    platform, kind = device()
    if backend == "tpu":
        return None if platform == "tpu" else f"needs a TPU; the device here is {kind}"
    if platform != "gpu":
        return f"needs an NVIDIA GPU; the device here is {kind}"
    if backend == "mosaic_gpu" and not any(name in kind for name in ("H100", "H200", "GH200")):
        return f"needs a Hopper GPU; the device here is {kind}"
    return None


@dataclasses.dataclass(frozen=True)
class TermProgram:
    """Masks, modifiers and normalizer as the program of a kernel (`problem.Program`)."""

    mask: Any  # tree of the mask
    terms: Any  # tree of (modifiers, normalizer)
    shared: bool

    def allowed(self, leaves: list[Any], at: Any) -> Any:
        count = self.mask.num_leaves
        return jax.tree.unflatten(self.mask, leaves[:count]).allowed(at)

    def evaluate(self, leaves: list[Any], products: Array, at: Any) -> Array:
        first = self.mask.num_leaves
        own = leaves[first : first + self.terms.num_leaves]
        modifiers, normalizer = jax.tree.unflatten(self.terms, own)
        scores = apply_modifiers(modifiers, products, at)
        return normalizer.log_weight(scores) if self.shared else normalizer.weight(scores)


def _tags(call: Call) -> tuple[str, ...]:
    return axes_of(call.mask) + axes_of(call.modifiers) + call.normalizer.axes()


def leaf_limit(x: Any, tag: str) -> str | None:
    """What keeps an array with these axes from entering a kernel, or None."""
    shape = jnp.shape(x)
    if not tag:
        if math.prod(shape) == 1:
            return None
        return (
            f"takes arrays that are tagged by the axes they are indexed by; one of shape {shape} "
            "is not"
        )
    axes = sized_axes(tag, len(shape))
    if "*" in tag and (tag.split().count("*") > 1 or any(a != "N" for a, _, _ in axes)):
        return f"looks up tables 'N *', 'B N *' and '*', not '{tag}'"
    blocks = [block for letter, _, block in axes if letter in "TS"]
    if any(block > 1 for block in blocks) and any(block == 1 for block in blocks):
        return f"takes blocks along both axes or along one alone, not '{tag}'"
    return None


_NO_KERNEL = (
    "gather", "dynamic_slice", "dynamic_update_slice", "scatter", "scatter-add", "sort",
    "dot_general", "cumsum", "cumprod", "cummax", "cumlogsumexp", "top_k", "argmax", "argmin",
    "conv_general_dilated",
)  # fmt: skip


def kernel_limits(call: Call, backend: str) -> str | None:
    """What keeps a kernel from serving a call, or None."""
    if call.normalizer.kind == "row":
        return f"streams over keys, which {type(call.normalizer).__name__} does not"
    limit = body(backend).limits(call.query, call.value)
    if limit:
        return str(limit)
    leaves = jax.tree.leaves((call.mask, call.modifiers, call.normalizer))
    for x, tag in zip(leaves, _tags(call), strict=True):
        limit = leaf_limit(x, tag)
        if limit:
            return limit
    return _code_limit(call)


def _code_limit(call: Call) -> str | None:
    """What of a mask's or modifier's code no kernel can run, or None."""
    # Small blocks: only what happens within a tile matters here.
    spec = Problem(call, "triton", (16, 16)).spec
    arrays = jax.tree.leaves((call.mask, call.modifiers, call.normalizer))

    def look(leaf: Leaf, x: Any) -> Any:
        dtype = jnp.float32 if leaf.trainable else jnp.bool_ if leaf.boolean else x.dtype
        if leaf.table:
            return Table((jnp.zeros((), dtype),) * x.shape[-1])
        return jnp.zeros(_TILE, dtype)

    def code(*_: Any) -> Any:
        leaves = [look(leaf, x) for leaf, x in zip(spec.leaves, arrays, strict=False)]
        at = TileAt(*(jax.lax.broadcasted_iota(jnp.int32, _TILE, axis) for axis in (0, 1, 1)))
        products = jnp.zeros(_TILE, jnp.float32)
        return spec.program.allowed(leaves, at), spec.program.evaluate(leaves, products, at)

    try:
        jaxpr = jax.make_jaxpr(code)()
    except (TypeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        return f"evaluates masks and modifiers on a tile of rank 2, which fails here ({reason})"
    found = set(_primitives(jaxpr.jaxpr)) & set(_NO_KERNEL)
    return None if not found else f"has no {', '.join(sorted(found))} within a tile"


_TILE = (2, 4)


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)


# -- from a call to arrays of a problem -----------------------------------------------------------


def _flat_batch(x: Array, batch: tuple[int, ...], rest: int) -> Array:
    """All batch axes as one: of length one where nothing depends on them."""
    lead, shape = x.shape[: x.ndim - rest], x.shape[x.ndim - rest :]
    lead = (1,) * (len(batch) - len(lead)) + lead
    if math.prod(lead) == 1:
        return x.reshape(1, *shape)
    if lead != batch:
        x = jnp.broadcast_to(x.reshape(*lead, *shape), (*batch, *shape))
    return x.reshape(-1, *shape)


def canonical_leaf(
    x: Array, tag: str, batch: tuple[int, ...], padded: tuple[int, int]
) -> tuple[Array, Leaf]:
    """A leaf with the axes "b n t s" of a kernel, padded to whole blocks, and its description."""
    trainable = jnp.issubdtype(x.dtype, jnp.floating)
    boolean = x.dtype == jnp.bool_
    if boolean:
        x = x.astype(jnp.int8)
    elif not trainable and x.dtype != jnp.uint32:
        x = x.astype(jnp.int32)
    if not tag:
        return x.reshape(1, 1, 1, 1), Leaf("", trainable, boolean=boolean)
    if "*" in tag:
        if "N" not in tag.split():
            x = x[..., None, :]
        x = _flat_batch(x, batch, 2)[:, :, None, :]
        return x, Leaf(_full_axes(x.shape[:2]), trainable, table=True, boolean=boolean)
    sizes = {letter: block for letter, _, block in sized_axes(tag, x.ndim)}
    blocks = tuple(sizes.get(a, 1) if sizes.get(a, 1) > 1 else 0 for a in "TS")
    x = _flat_batch(align(x, tag, len(batch) + 3), batch, 3)
    if any(blocks):
        return x, Leaf(
            _full_axes(x.shape), trainable, blocks=(blocks[0], blocks[1]), boolean=boolean
        )
    widths = [(0, 0), (0, 0)] + [
        (0, full - n if n > 1 else 0) for n, full in zip(x.shape[2:], padded, strict=True)
    ]
    leaf = Leaf(_full_axes(x.shape), trainable, boolean=boolean)
    return (jnp.pad(x, widths, mode="edge") if any(map(any, widths)) else x), leaf


def _full_axes(shape: tuple[int, ...]) -> str:
    return "".join(letter for letter, n in zip("bnts", shape, strict=False) if n > 1)


def _pad_to(x: Array, length: int, width: int) -> Array:
    short, thin = length - x.shape[-2], width - x.shape[-1]
    if not short and not thin:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, short), (0, thin)])


class Problem:
    """One call, ready for a kernel: what is static, the arrays, and the way back."""

    def __init__(self, call: Call, backend: str, block_sizes: tuple[int, int]) -> None:
        self.call, self.backend, self.block_sizes = call, backend, block_sizes
        self.batch = call.query.shape[:-3]
        rows, cols = (
            plan.padded(n, b) for n, b in zip(call.lengths, block_sizes, strict=True)
        )
        self.padded = (rows, cols)
        terms = (call.mask, call.modifiers, call.normalizer)
        arrays = [jnp.asarray(x) for x in jax.tree.leaves(terms)]
        tags = list(_tags(call))
        offsets, known = [], []
        for offset in (call.query_offset, call.key_offset):
            fixed = isinstance(offset, int)
            known.append(offset if fixed else 0)
            offsets.append(None if fixed else len(arrays))
            if not fixed:
                arrays.append(jnp.asarray(offset, jnp.int32))
                tags.append("")
        dropout = None
        if call.dropout_rate:
            dropout = (len(arrays), len(arrays) + 1)
            arrays += _dropout_words(call)
            tags += ["B N", "B N"]
        self.raw, self.tags = arrays, tags
        described = [canonical_leaf(x, t, self.batch, self.padded)[1] for x, t in
                     zip(arrays, tags, strict=True)]  # fmt: skip
        program = TermProgram(
            jax.tree.structure(call.mask),
            jax.tree.structure((call.modifiers, call.normalizer)),
            call.normalizer.kind == "shared",
        )
        self.spec = Spec(
            program, tuple(described), call.scale, call.lengths, block_sizes,
            (known[0], known[1]), (offsets[0], offsets[1]), call.dropout_rate, dropout,
        )  # fmt: skip

    def prepare(self, query: Array, key: Array, value: Array, trainable: list[Any]) -> Any:
        """The padded arrays, as a differentiable function of what has a derivative."""
        pad_width: Callable[[int], int] = body(self.backend).padded_width
        rows, cols = self.padded
        raw = list(self.raw)
        for place, x in zip(self.spec.trainable, trainable, strict=True):
            raw[place] = x
        leaves = [
            canonical_leaf(x, t, self.batch, self.padded)[0]
            for x, t in zip(raw, self.tags, strict=True)
        ]
        return (
            _pad_to(_flat(query), rows, pad_width(query.shape[-1])),
            _pad_to(_flat(key), cols, pad_width(key.shape[-1])),
            _pad_to(_flat(value), cols, pad_width(value.shape[-1])),
            leaves,
        )

    def tables(self) -> tuple[Any, Any]:
        """For each tile: may it hold an allowed pair, are all allowed?  Boolean (b, n, I, J)."""
        some, every = tile_tables(self.call, self.block_sizes)
        return tuple(_as_table(x, self.batch) for x in (some, every))  # type: ignore[return-value]

    def restore(self, out: Array, width: int) -> Array:
        """Undo padding and flattening of an array of the query's or the value's shape."""
        out = out[..., : self.call.lengths[0], :width]
        return out.reshape(*self.batch, *out.shape[1:])


def _flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[-3:])


def _dropout_words(call: Call) -> list[Array]:
    """The two words of the dropout key of each (batch entry, head), as `keep_mask` derives them."""
    from attnlab.core.dropout import threefry_2x32

    batch, heads = call.query.shape[:-3], call.query.shape[-3]
    shape = (math.prod(batch), heads)
    number, head = (
        jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1)
    )
    words = tuple(jnp.broadcast_to(call.dropout_key[i], shape) for i in (0, 1))
    return [x.reshape(*batch, heads) for x in threefry_2x32(words, (number, head))]


def _as_table(x: Any, batch: tuple[int, ...]) -> Any:
    """A table "*B N I J" with one batch axis; NumPy stays NumPy."""
    x = x.reshape((1,) * max(0, 3 - x.ndim) + x.shape)
    if isinstance(x, jax.Array):
        return _flat_batch(x, batch, 3)
    lead = (1,) * (len(batch) + 3 - x.ndim) + x.shape[:-3]
    if math.prod(lead) > 1:
        x = np.broadcast_to(x.reshape(*lead, *x.shape[-3:]), (*batch, *x.shape[-3:]))
    return x.reshape(-1, *x.shape[-3:])


def tile_tables(call: Call, block_sizes: tuple[int, int]) -> tuple[Any, Any]:
    """Which tiles hold some allowed pair and which only allowed ones: "*B N I J" or "I J".

    NumPy where the mask is a formula and offsets are known; a mask of which nothing else is known
    is evaluated, a strip of tiles at a time.
    """
    mask, lengths = call.mask, call.lengths
    shape = tuple(-(-n // b) for n, b in zip(lengths, block_sizes, strict=True))
    span = Span.of(lengths, block_sizes, (call.query_offset, call.key_offset))
    some, every = mask.data_bounds(span)
    if mask.opaque:
        some, every = _look(call, block_sizes)
    whole = np.ones(shape, bool)
    # Blocks that reach beyond the end hold padding, which is masked like everything else.
    if lengths[0] % block_sizes[0]:
        whole[-1, :] = False
    if lengths[1] % block_sizes[1]:
        whole[:, -1] = False
    some, every = some & np.ones(shape, bool), every & whole
    return some, every


def _look(call: Call, block_sizes: tuple[int, int]) -> tuple[Array, Array]:
    rows, cols = block_sizes
    num_rows, num_cols = (
        plan.padded(n, b) for n, b in zip(call.lengths, block_sizes, strict=True)
    )
    mask: Mask = pad_terms(
        call.mask, axes_of(call.mask), num_rows - call.lengths[0], num_cols - call.lengths[1]
    )

    def strip(start: Array) -> tuple[Array, Array]:
        tile = call.tile(start, 0, rows, num_cols)
        at = tile.at()
        allowed = restrict(mask, axes_of(mask), tile).allowed(at)
        shape = (*allowed.shape[:-2], rows, num_cols)
        row = jnp.arange(rows, dtype=jnp.int32)[:, None] + start < call.lengths[0]
        inside = row & (jnp.arange(num_cols, dtype=jnp.int32)[None, :] < call.lengths[1])
        inside = inside.reshape((1,) * (len(shape) - 2) + inside.shape)
        allowed = (jnp.broadcast_to(allowed, shape) & inside).reshape(*shape[:-1], -1, cols)
        return allowed.any((-3, -1)), allowed.all((-3, -1))

    found = jax.lax.map(strip, jnp.arange(0, num_rows, rows, dtype=jnp.int32))
    some, every = (jnp.moveaxis(x, 0, -2) for x in found)
    return some, every


# -- the folds -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KernelFolds(Folds):
    """The three folds, forward and backward by a kernel."""

    backend: str
    interpreted: bool

    def _problem(self, x: Leaves, aux: dict[str, Any], blocks: tuple[int, int]) -> Problem:
        return Problem(self.signature.call(x, aux), self.backend, blocks)

    def forward(self, x: Leaves, aux: dict[str, Any]) -> tuple[Array, Array]:
        problem = self._problem(x, aux, self.signature.forward_blocks)
        key, value = x[1], x[2]
        if not isinstance(problem.call.mask, Full):
            key, value = isolate_bad(key, value)
        query, key, value, leaves = problem.prepare(x[0], key, value, x[3:])
        lists = self._lists(*problem.tables())
        arrays = Arrays(query, key, value, leaves, lists)
        out, lse = launch_forward(self.backend, problem.spec, self.interpreted, 1, arrays)
        out = problem.restore(out[0], x[2].shape[-1]).astype(problem.call.accumulator)
        return out, problem.restore(lse[0][..., None], 1)[..., 0]

    def backward(
        self,
        wanted: tuple[int, ...],
        x: Leaves,
        aux: dict[str, Any],
        out: Array,
        lse: Array,
        cotangent: tuple[Array, Array],
    ) -> Leaves:
        problem = self._problem(x, aux, self.signature.backward_blocks)
        d_out, d_lse = cotangent
        shift = d_lse - jnp.sum(d_out * out, axis=-1)
        inputs = x[:3] if isinstance(problem.call.mask, Full) else [zero_bad(z) for z in x[:3]]
        shared = problem.spec.program.shared
        if not shared:  # no lse carries a NaN to where it is seen: the key does
            inputs[1] = isolate_bad(x[1], x[2])[0]
        (query, key, value, leaves), pull = jax.vjp(problem.prepare, *inputs, x[3:])
        some, every = problem.tables()
        turned = (np.swapaxes if isinstance(some, np.ndarray) else jnp.swapaxes)
        arrays = Arrays(
            query, key, value, leaves, self._lists(some, every),
            self._lists(turned(some, -1, -2), turned(every, -1, -2)),
        )  # fmt: skip
        rows = problem.padded[0]
        d_out = _pad_to(_flat(d_out), rows, value.shape[-1]).astype(query.dtype)
        lse, shift = (_pad_to(_flat(z[..., None]), rows, 1)[..., 0] for z in (lse, shift))
        # Which trainable leaves are wanted: `x` counts them after query, key and value.
        chosen = tuple(problem.spec.trainable[i - 3] for i in wanted if i > 2)
        live = jnp.asarray(some).astype(jnp.int32)
        d_query, d_key, d_value, d_leaves = launch_backward(
            self.backend, problem.spec, self.interpreted, chosen,
            (arrays, live, d_out, lse, shift),
        )  # fmt: skip
        full = [jnp.zeros_like(z) if jnp.issubdtype(z.dtype, jnp.floating) else
                np.zeros(z.shape, jax.dtypes.float0) for z in leaves]  # fmt: skip
        for place, d in zip(chosen, d_leaves, strict=True):
            full[place] = reduce_leaf(d, leaves[place].shape, leaves[place].dtype)
        found = pull((d_query, d_key, d_value, full))
        found = [*found[:3], *found[3]]
        return [found[i].astype(x[i].dtype) for i in wanted]

    def _lists(self, some: Any, every: Any) -> Any:
        make = plan.make_flat if self.backend == "tpu" else plan.make_lists
        return jax.tree.map(jnp.asarray, make(some, every))


def _over_batch(function: Callable, split: bool) -> Callable:
    """`function(arrays)` with a rule for `vmap`: the mapped axis joins the batch.

    Every array has a batch axis in front, of length one where nothing depends on it.  With `split`
    the outputs have one more axis before the batch.
    """
    from jax.custom_batching import custom_vmap

    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, batched: Any, arrays: Any) -> Any:
        flat, tree = jax.tree.flatten(arrays)
        marks = jax.tree.leaves(batched)
        batch = max(x.shape[1] if m else x.shape[0] for x, m in zip(flat, marks, strict=True)
                    if x.ndim > int(m))  # fmt: skip

        def join(x: Array, is_mapped: bool, must: bool) -> Array:
            if x.ndim == int(is_mapped):  # the length of a list of tiles
                return x.max() if is_mapped else x
            lead = x.shape[1] if is_mapped else x.shape[0]
            if not is_mapped and lead == 1 and not must:
                return x
            x = x if is_mapped else x[None]
            rest = x.shape[2:]
            return jnp.broadcast_to(x, (size, batch, *rest)).reshape(size * batch, *rest)

        required = _required(arrays)
        joined = [join(x, m, id(x) in required) for x, m in zip(flat, marks, strict=True)]
        result = mapped(jax.tree.unflatten(tree, joined))

        def part(x: Array) -> Array:
            if split:
                return jnp.moveaxis(x.reshape(x.shape[0], size, batch, *x.shape[2:]), 1, 0)
            return x.reshape(size, x.shape[0] // size, *x.shape[1:])

        return jax.tree.map(part, result), jax.tree.map(lambda _: True, result)

    return mapped


def _required(arrays: Any) -> set[int]:
    """Arrays that must have the whole batch axis: query, key, value and what goes with queries."""
    first = arrays if isinstance(arrays, Arrays) else arrays[0]
    more = [] if isinstance(arrays, Arrays) else list(arrays[2:])
    return {id(x) for x in (first.query, first.key, first.value, *more)}


@functools.cache
def _launcher(kind: str, backend: str, spec: Spec, interpreted: bool, option: Any) -> Callable:
    module = body(backend)
    if kind == "forward":
        return _over_batch(
            lambda arrays: module.forward(spec, arrays, splits=option, interpret=interpreted), True
        )
    return _over_batch(
        lambda inputs: module.backward(spec, *inputs, option, interpret=interpreted), False
    )


def launch_forward(
    backend: str, spec: Spec, interpreted: bool, splits: int, arrays: Arrays
) -> tuple[Array, Array]:
    """Output "splits B N T D" and log-sum-exp "splits B N T" of a problem."""
    return _launcher("forward", backend, spec, interpreted, splits)(arrays)


def launch_backward(
    backend: str, spec: Spec, interpreted: bool, wanted: tuple[int, ...], inputs: Any
) -> tuple[Array, Array, Array, list[Array]]:
    """dq, dk, dv and gradients of leaves, each with a batch axis of its own."""
    return _launcher("backward", backend, spec, interpreted, wanted)(inputs)


def kernel_attention(
    call: Call, backend: str, block_sizes: tuple[int, int] | None = None
) -> tuple[Array, Array]:
    """Attention by a fused kernel: output in the accumulator's dtype, and the log-sum-exp."""
    module, kind = body(backend), device()[1]
    blocks = []
    for backward in (False, True):
        chosen = block_sizes or module.block_sizes(
            call.query.shape[-1], call.value.shape[-1], call.query.dtype.itemsize, call.lengths,
            backward, kind,
        )  # fmt: skip
        blocks.append(_within(chosen, call))
    signature, x, aux = Signature.of(call, blocks[0], blocks[1])
    return _solve(signature, backend, _interpret.get(), x, aux)


def _within(block_sizes: tuple[int, int], call: Call) -> tuple[int, int]:
    """Tiles that lie within the blocks of every array that holds for whole blocks."""
    for x, tag in zip(
        jax.tree.leaves((call.mask, call.modifiers, call.normalizer)), _tags(call), strict=True
    ):
        sizes = {letter: block for letter, _, block in sized_axes(tag, jnp.ndim(x))} if tag else {}
        rows, cols = (sizes.get(a, 1) if sizes.get(a, 1) > 1 else 0 for a in "TS")
        block_sizes = plan.divide_blocks(block_sizes, (rows, cols))
    return block_sizes


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(
    signature: Signature, backend: str, interpreted: bool, x: Leaves, aux: dict[str, Any]
) -> tuple[Array, Array]:
    folds = KernelFolds(signature, backend, interpreted)
    return make_solver(folds, Folds(signature))(x, aux)
