"""From a call of attention to the problem that a kernel solves, and back."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab.core.dropout import threefry_2x32
from attnlab.core.masks import Mask
from attnlab.core.reference import Call
from attnlab.core.scores import apply_modifiers
from attnlab.core.spans import Span, same_rank
from attnlab.core.terms import At, align, axes_of, restrict, sized_axes
from attnlab.core.tiles import pad_offset, pad_terms
from pallas_kernels.flash import plan
from pallas_kernels.flash.problem import Leaf, Spec


@dataclasses.dataclass(frozen=True)
class _InTile(At):
    """The positions of a kernel's tile, looked up in the kernel's way."""

    tile: Any = None

    def look_up(self, table: Any, index: Array) -> Any:
        return self.tile.look_up(table, index)


def _seen(at: Any) -> At:
    return _InTile(at.query, at.key, at.head, at)


@dataclasses.dataclass(frozen=True)
class TermProgram:
    """Masks, modifiers and normalizer as the program of a kernel (`problem.Program`)."""

    mask: Any  # tree of the mask
    terms: Any  # tree of (modifiers, normalizer)
    shared: bool

    def allowed(self, leaves: list[Any], at: Any) -> Any:
        count = self.mask.num_leaves
        return jax.tree.unflatten(self.mask, leaves[:count]).allowed(_seen(at))

    def evaluate(self, leaves: list[Any], products: Array, at: Any) -> Array:
        first = self.mask.num_leaves
        own = leaves[first : first + self.terms.num_leaves]
        modifiers, normalizer = jax.tree.unflatten(self.terms, own)
        scores = apply_modifiers(modifiers, products, _seen(at))
        return normalizer.log_weight(scores) if self.shared else normalizer.weight(scores)


def tags_of(call: Call) -> tuple[str, ...]:
    """The axes of every array of the mask, the modifiers and the normalizer."""
    return axes_of(call.mask) + axes_of(call.modifiers) + call.normalizer.axes()


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


def pad_to(x: Array, length: int, width: int) -> Array:
    """`x` "... T H" with zeros appended up to a length and a width."""
    short, thin = length - x.shape[-2], width - x.shape[-1]
    if not short and not thin:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, short), (0, thin)])


class Problem:
    """One call, ready for a kernel: what is static, the arrays, and the way back."""

    def __init__(
        self,
        call: Call,
        block_sizes: tuple[int, int],
        pad_width: Callable[[int], int],
    ) -> None:
        self.call, self.block_sizes, self.pad_width = call, block_sizes, pad_width
        self.batch = call.query.shape[:-3]
        rows, cols = (plan.padded(n, b) for n, b in zip(call.lengths, block_sizes, strict=True))
        self.padded = (rows, cols)
        terms = (call.mask, call.modifiers, call.normalizer)
        arrays = [jnp.asarray(x) for x in jax.tree.leaves(terms)]
        tags = list(tags_of(call))
        offsets, known = [], []
        # One number, or where positions come in any order (as in a ring), one for each.
        for offset, axis in ((call.query_offset, "T"), (call.key_offset, "S")):
            fixed = isinstance(offset, int)
            known.append(offset if fixed else 0)
            offsets.append(None if fixed else len(arrays))
            if not fixed:
                arrays.append(jnp.asarray(offset, jnp.int32))
                tags.append(axis if jnp.ndim(offset) else "")
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
        pad_width = self.pad_width
        rows, cols = self.padded
        raw = list(self.raw)
        for place, x in zip(self.spec.trainable, trainable, strict=True):
            raw[place] = x
        leaves = [
            canonical_leaf(x, t, self.batch, self.padded)[0]
            for x, t in zip(raw, self.tags, strict=True)
        ]
        return (
            pad_to(flat(query), rows, pad_width(query.shape[-1])),
            pad_to(flat(key), cols, pad_width(key.shape[-1])),
            pad_to(flat(value), cols, pad_width(value.shape[-1])),
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


def flat(x: Array) -> Array:
    """All batch axes of an array "*B N T H" as one."""
    return x.reshape(-1, *x.shape[-3:])


def _dropout_words(call: Call) -> list[Array]:
    """The two words of the dropout key of each (batch entry, head), as `keep_mask` derives them."""
    batch, heads = call.query.shape[:-3], call.query.shape[-3]
    shape = (math.prod(batch), heads)
    number, head = (
        jax.lax.broadcasted_iota(jnp.uint32, shape, axis) + jnp.asarray(first, jnp.uint32)
        for axis, first in enumerate(call.first[:2])
    )
    first, second = (jnp.broadcast_to(call.dropout_key[i], shape) for i in (0, 1))
    return [x.reshape(*batch, heads) for x in threefry_2x32((first, second), (number, head))]


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
    some, every, whole, anything = same_rank(some, every, whole, np.ones(shape, bool))
    return some & anything, every & whole


def _look(call: Call, block_sizes: tuple[int, int]) -> tuple[Array, Array]:
    rows, cols = block_sizes
    num_rows, num_cols = (plan.padded(n, b) for n, b in zip(call.lengths, block_sizes, strict=True))
    short = (num_rows - call.lengths[0], num_cols - call.lengths[1])
    mask: Mask = pad_terms(call.mask, axes_of(call.mask), *short)
    call = call._replace(
        query_offset=pad_offset(call.query_offset, short[0]),
        key_offset=pad_offset(call.key_offset, short[1]),
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
