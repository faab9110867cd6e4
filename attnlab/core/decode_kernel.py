"""A call of decoding as the problem of a flash kernel: see `pallas_kernels.decode.plan`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.core.cache import ordered
from attnlab.core.decode_memory import DecodeCall
from attnlab.core.kernels import device, term_limits
from attnlab.core.launch import body, launch_forward
from attnlab.core.masks import Full
from attnlab.core.partial import Partial
from attnlab.core.problems import TermProgram, canonical_leaf
from attnlab.core.reference import Call, isolate_bad
from attnlab.core.terms import axes_of
from pallas_kernels.decode import plan
from pallas_kernels.flash.plan import make_flat, make_lists, padded
from pallas_kernels.flash.problem import Arrays, Leaf, Spec


def kernel_limit(backend: str, arrays: Any, num_splits: int | None) -> str | None:
    """What keeps a backend from serving a call, or None."""
    query, memory, prefix, (mask, modifiers, normalizer), _ = arrays
    able = plan.ABILITIES[backend]
    small = any(part is not None and part.key_scale is not None for part in (memory, prefix))
    if small and "scales" not in able:
        return "does not read int8 keys and values"
    if num_splits is not None and num_splits > 1 and "splits" not in able:
        return f"does not divide the keys, got {num_splits=}"
    limit = plan.page_limit(backend, memory.page_size)
    if limit:
        return limit
    start = 0 if prefix is None else prefix.num_keys
    shape = (*query.shape[:-3], memory.num_kv_heads, start + memory.num_keys)
    key: Any
    value: Any
    key, value = (jax.ShapeDtypeStruct((*shape, w), query.dtype) for w in memory.widths)
    call = Call(query, key, value, modifiers, normalizer, mask, 0, 0, None, 1.0, 0.0)
    return term_limits(call, backend)


@dataclasses.dataclass(frozen=True)
class _Program:
    """The caller's terms, with an end to the keys that a sequence has.

    `end`: the number of the leaf that says after which position there are no more.
    """

    terms: TermProgram
    end: int | None

    @property
    def shared(self) -> bool:
        return self.terms.shared

    def allowed(self, leaves: list[Any], at: Any) -> Any:
        allowed = self.terms.allowed(leaves, at)
        return allowed if self.end is None else allowed & (at.key < leaves[self.end])

    def evaluate(self, leaves: list[Any], products: Array, at: Any) -> Array:
        return self.terms.evaluate(leaves, products, at)


class _Problem:
    """One memory, ready for a kernel."""

    def __init__(self, call: DecodeCall, backend: str, part: bool) -> None:
        self.call, self.backend, self.module = call, backend, body(backend)
        self.able = plan.ABILITIES[backend]
        memory, (heads, shared, length) = call.memory, call.sizes
        self.batch = math.prod(call.batch)
        # Keys without a batch axis: the queries of all sequences are rows of one problem.
        self.together = self.batch if memory.pages is None and memory.key.ndim == 3 else 0
        self.num_rows = heads // shared * length * (self.together or 1)
        itemsize = call.query.dtype.itemsize
        rows = plan.row_block(backend, self.num_rows, itemsize)
        preferred = self.module.block_sizes(
            *memory.widths, itemsize, (self.num_rows, memory.num_keys), False, device()[1]
        )[1]
        cols, self.page = plan.column_block(backend, preferred, memory.num_keys, memory.page_size)
        self.blocks = rows, cols
        self.padded = padded(self.num_rows, rows), padded(memory.num_keys, cols)
        self.in_place = memory.pages is None and "heads_last" in self.able
        self.loose = memory.length is not None or not isinstance(call.mask, Full)
        leaves, described, self.places = self._leaves()
        self.leaves = leaves
        terms = TermProgram(
            jax.tree.structure(call.mask),
            jax.tree.structure((call.modifiers, call.normalizer)),
            call.normalizer.kind == "shared",
        )
        self.spec = Spec(
            _Program(terms, self.places.get("end")),
            tuple(described),
            call.scale,
            (self.num_rows, memory.num_keys),
            self.blocks,
            (0, call.start),
            (self.places["first"], None),
            scales=None if memory.key_scale is None else (
                self.places["key_scale"], self.places["value_scale"]
            ),
            packed=(length, heads // shared),
            isolated=self.loose and "isolated" in self.able,
            page=self.page,
            heads_last=self.in_place,
            part=part,
        )  # fmt: skip

    def _leaves(self) -> tuple[list[Array], list[Leaf], dict[str, int]]:
        """Arrays for packed rows, what they are, and where those stand that no term knows of."""
        call, memory = self.call, self.call.memory
        num_keys = memory.num_keys
        lengths = (call.query.shape[-2], num_keys)
        terms = (call.mask, call.modifiers, call.normalizer)
        raw = [jnp.asarray(x) for x in jax.tree.leaves(terms)]
        tags = [*axes_of(call.mask), *axes_of(call.modifiers), *call.normalizer.axes()]
        places = {"first": len(raw)}
        raw.append(call.first)
        if memory.length is not None:
            places["end"] = len(raw)
            raw.append(memory.length + call.start)
        tags += ["B"] * (len(raw) - len(tags))
        leaves, described = [], []
        for x, tag in zip(raw, tags, strict=True):
            x, leaf = canonical_leaf(x, tag, call.batch, lengths)
            x, leaf = plan.unfold(leaf, x, lengths)
            x, leaf = plan.pack(leaf, x, call.sizes, self.together)
            leaves.append(x)
            described.append(leaf)
        for name, scale in zip(("key_scale", "value_scale"), self._scales(), strict=False):
            places[name] = len(leaves)
            axes = [a for a, n in zip("bn", scale.shape, strict=False) if n > 1]
            leaves.append(scale)
            described.append(Leaf("".join(axes) + ("s" if num_keys > 1 else "")))
        return [self._pad_leaf(*z) for z in zip(leaves, described, strict=True)], described, places

    def _pad_leaf(self, x: Array, leaf: Leaf) -> Array:
        rows, cols = self.padded
        by_key = "s" in leaf.axes and not leaf.table
        short = (rows - x.shape[2] if "t" in leaf.axes else 0, cols - x.shape[3] if by_key else 0)
        if not any(short):
            return x
        return jnp.pad(x, [(0, 0), (0, 0), (0, short[0]), (0, short[1])], mode="edge")

    def _scales(self) -> list[Array]:
        """Scales of keys and values, "b K 1 S"."""
        memory = self.call.memory
        if memory.key_scale is None or memory.value_scale is None:
            return []
        found = []
        for scale in (memory.key_scale, memory.value_scale):
            if memory.pages is not None:
                scale = ordered(scale, jnp.clip(memory.pages, 0, scale.shape[1] - 1))
            scale = scale.reshape(-1, *scale.shape[-2:])
            found.append(jnp.swapaxes(scale, 1, 2)[:, :, None, :].astype(jnp.float32))
        if self.loose and "isolated" not in self.able:
            bad = ~jnp.isfinite(found[1])
            found = [jnp.where(bad, jnp.nan, found[0]), jnp.where(bad, 0.0, found[1])]
        return found

    def _query(self) -> Array:
        """The queries as rows: "B K G*T H", or "1 K G*B*T H" where all sequences stand together."""
        query, (heads, shared, length) = self.call.query, self.call.sizes
        width = query.shape[-1]
        query = query.reshape(self.batch, shared, heads // shared, length, width)
        if self.together:
            query = jnp.moveaxis(query, 0, 2)
        query = query.reshape(1 if self.together else self.batch, shared, self.num_rows, width)
        return self._widen(query, self.padded[0], 2)

    def _widen(self, x: Array, length: int, axis: int) -> Array:
        """Zeros up to the width and the length that a kernel reads; a copy, where needed."""
        short = length - x.shape[axis]
        thin = self.module.padded_width(x.shape[-1]) - x.shape[-1]
        if not short and not thin:
            return x
        widths = [(0, 0)] * x.ndim
        widths[axis], widths[-1] = (0, short), (0, thin)
        return jnp.pad(x, widths)

    def _keys(self) -> list[Array]:
        """Keys and values as the kernel reads them."""
        memory = self.call.memory
        pair = [memory.key, memory.value]
        if self.loose and "isolated" not in self.able and memory.key_scale is None:
            pair = list(isolate_bad(*pair))
        if memory.pages is not None:
            pools = [x.reshape(1, x.shape[0], -1, x.shape[-1]) for x in pair]
            return [self._widen(x, x.shape[2], 2) for x in pools]
        pair = [x.reshape(-1, *x.shape[-3:]) for x in pair]
        if not self.in_place:
            pair = [jnp.swapaxes(x, 1, 2) for x in pair]
        return [self._widen(x, self.padded[1], 1 if self.in_place else 2) for x in pair]

    def _lists(self) -> Any:
        """The live blocks of keys, for each block of rows."""
        heads, shared, _ = self.call.sizes
        rank = len(self.call.batch)
        found = []
        for table, reduce in zip(self.call.tables(self.blocks[1]), (jnp.any, jnp.all), strict=True):
            lead = table.shape[:rank]
            if math.prod(lead) > 1:
                table = jnp.broadcast_to(table, (*self.call.batch, *table.shape[rank:]))
            table = table.reshape(-1, *table.shape[rank:])
            if self.together:
                table = reduce(table, axis=0, keepdims=True)
            if table.shape[1] > 1:
                table = table.reshape(table.shape[0], shared, heads // shared, 1, -1)
                table = reduce(table, axis=2)
            found.append(table)
        blocks = self.padded[0] // self.blocks[0]
        shape = jnp.broadcast_shapes(found[0].shape, found[1].shape)
        some, every = (jnp.broadcast_to(x, (*shape[:2], blocks, shape[3])) for x in found)
        return (make_flat if self.backend == "tpu" else make_lists)(some, every)

    def arrays(self) -> Arrays:
        """What the kernel is called with."""
        memory, pages = self.call.memory, None
        if memory.pages is not None:
            pages = memory.pages.reshape(-1, memory.pages.shape[-1])
            block = memory.page_size if self.page else self.blocks[1]
            pages = plan.block_table(pages, memory.key.shape[1], memory.page_size, block)
        key, value = self._keys()
        return Arrays(self._query(), key, value, self.leaves, self._lists(), None, pages)

    def restore(self, out: Array, width: int) -> Array:
        """From rows "splits . K R D" to "splits *B N T D"."""
        heads, shared, length = self.call.sizes
        out = out[..., : self.num_rows, :width]
        if self.together:
            out = out.reshape(-1, shared, heads // shared, self.batch, length, width)
            out = jnp.moveaxis(out, 3, 1)
        return out.reshape(-1, *self.call.batch, heads, length, width)


def kernel_parts(
    call: DecodeCall, backend: str, splits: int | None, interpreted: bool, part: bool
) -> list[Partial]:
    """Attention over each part of the keys, by a kernel.  `part`: more is to be merged with it."""
    problem = _Problem(call, backend, part)
    if splits is None:
        splits = 1
        if "splits" in problem.able:
            programs = problem.padded[0] // problem.blocks[0] * problem.call.sizes[1]
            programs *= 1 if problem.together else problem.batch
            splits = plan.num_splits(device()[1], programs, call.memory.num_keys)
    limit = problem.module.limits(call.query, call.query, problem.spec)
    if limit:
        raise NotImplementedError(
            f'implementation="{backend}" {limit}; implementation="blockwise" can.'
        )
    launch: Callable = launch_forward
    if call.memory.pages is not None:
        launch = _launch_paged
    out, lse = launch(backend, problem.spec, interpreted, splits, problem.arrays())
    out = problem.restore(out.astype(jnp.float32), call.memory.widths[1])
    if call.normalizer.kind != "shared":
        zeros = jnp.zeros(out.shape[1:-1], out.dtype)
        return [Partial(x, zeros, zeros) for x in out]
    lse = problem.restore(lse[..., None], 1)[..., 0]
    return [
        Partial(x, top, (top != -jnp.inf).astype(top.dtype))
        for x, top in zip(out, lse, strict=True)
    ]


def _launch_paged(
    backend: str, spec: Spec, interpreted: bool, splits: int, arrays: Arrays
) -> tuple[Array, Array]:
    """Under `vmap` one pool after the other: a kernel reads one."""

    @jax.custom_batching.sequential_vmap
    def run(arrays: Arrays) -> tuple[Array, Array]:
        return body(backend).forward(spec, arrays, splits=splits, interpret=interpreted)

    return run(arrays)
