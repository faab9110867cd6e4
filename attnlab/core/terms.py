"""Terms: the small pytrees that masks and score modifiers are made of.

A term is a function of *where* a pair lies (which head, which query, which key) together with the
arrays that function needs.  Each array is tagged with the axes it is indexed by, so the same term
can be evaluated on the whole score matrix, on one tile of it in plain JAX, or inside a kernel: only
the slice of each array that belongs to the tile is ever touched.

Axes: B any leading batch axes, N query heads, T queries, S keys, * further axes left whole.
"T/64" and "S/64" are axes with one entry for each block of 64 queries or keys.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

LETTERS = ("N", "T", "S")

# An array of JAX or NumPy, or a number.  Its axes stand in the field's tag; `attention` checks them
# against the call and says what does not fit, which an annotation could not.
ArrayLeaf = Any


def leaf(axes: str, **options: Any) -> Any:
    """A field holding arrays indexed by `axes`, such as `"N"`, `"B T"` or `"B N T S"`."""
    return dataclasses.field(metadata={"axes": axes}, **options)


def static(**options: Any) -> Any:
    """A field that is part of the term's type: hashable, never traced."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclasses.dataclass(frozen=True)
class At:
    """Where the pairs of a tile lie; every array has the rank of the scores "*B N T S".

    `query`, `key`: absolute positions, shapes "... 1 t 1" and "... 1 1 s".
    `head`: query-head numbers, shape "... N 1 1".
    """

    query: Int[Array, "..."]
    key: Int[Array, "..."]
    head: Int[Array, "..."]

    @property
    def relative(self) -> Int[Array, "..."]:
        """Key position minus query position: negative in the past."""
        return self.key - self.query

    def look_up(self, table: Any, index: Int[Array, "..."]) -> Any:
        """Entry `index` of a table with axes "N *", "B N *" or "*": "*B N t s".

        Use this instead of indexing: kernels, which cannot gather, look up in their own way.
        """
        if table.ndim == 1:
            return table[index]
        if table.ndim == 2:
            # By place: where heads are shared out, a table holds those that are here.
            place = jnp.arange(self.head.size, dtype=jnp.int32).reshape(self.head.shape)
            return table[place, index]
        shape = np.broadcast_shapes((*table.shape[:-1], 1, 1), index.shape)
        flat = jnp.broadcast_to(index, shape).reshape(*shape[:-2], -1)
        return jnp.take_along_axis(table, flat, axis=-1).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A rectangle of the score matrix: `rows` x `cols` pairs from (`row`, `col`), all heads.

    `row` and `col` may be traced; the sizes are static.  `rank` is that of the scores.  Offsets are
    positions less indices: a number, or one for each query or key.  `first`: see `Call`.
    """

    row: Any
    col: Any
    rows: int
    cols: int
    heads: int
    rank: int
    query_offset: Any = 0
    key_offset: Any = 0
    first: tuple[Any, ...] = (0, 0, 0, 0)

    def at(self) -> At:
        def along(places: Array, axis: int) -> Int[Array, "..."]:
            shape = [1] * self.rank
            shape[axis] = places.shape[0]
            return places.reshape(shape)

        return At(
            along(_places(self.row, self.rows, self.query_offset), -2),
            along(_places(self.col, self.cols, self.key_offset), -1),
            along(_places(0, self.heads, self.first[1]), -3),
        )

    def indices(self, letter: str) -> Int[Array, "..."]:
        """Which queries ("T") or keys ("S") of the whole call those of the tile are."""
        start, size, offset, first = (
            (self.row, self.rows, self.query_offset, self.first[2])
            if letter == "T"
            else (self.col, self.cols, self.key_offset, self.first[3])
        )
        if not jnp.ndim(offset):
            return _places(start, size, 0)
        return _places(start, size, offset) - first


def _places(start: Any, size: int, offset: Any) -> Int[Array, "..."]:
    """start, start + 1, ... with the offset added, which may be one for each index."""
    if jnp.ndim(offset) and offset.shape[0] != size:
        offset = jax.lax.dynamic_slice_in_dim(offset, start, size)
    if jnp.ndim(offset):
        return jnp.arange(size, dtype=jnp.int32) + jnp.asarray(start, jnp.int32) + offset
    return jnp.arange(size, dtype=jnp.int32) + jnp.asarray(start + offset, jnp.int32)


@dataclass_transform(frozen_default=True, eq_default=False)
class Term:
    """Base of masks and score modifiers; subclasses become frozen dataclasses and pytrees."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclasses.dataclass(frozen=True, eq=False)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        data = tuple(f.name for f in fields if not f.metadata.get("static"))
        meta = tuple(f.name for f in fields if f.metadata.get("static"))

        def flatten(term: Any) -> tuple[list, tuple]:
            children = [(jax.tree_util.GetAttrKey(n), getattr(term, n)) for n in data]
            return children, tuple(getattr(term, n) for n in meta)

        def unflatten(aux: tuple, children: Iterable[Any]) -> Any:
            # Not through __init__: JAX also unflattens with placeholders in place of arrays.
            term = object.__new__(cls)
            for name, value in zip((*data, *meta), (*children, *aux), strict=True):
                object.__setattr__(term, name, value)
            return term

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)

    def axes(self) -> tuple[str, ...]:
        """The axes of each array leaf, in the order of `jax.tree.leaves(self)`."""
        tags: list[str] = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.metadata.get("static"):
                continue
            value = getattr(self, field.name)
            if isinstance(value, Term):
                tags += value.axes()
            else:
                tags += [field.metadata.get("axes", "")] * len(jax.tree.leaves(value))
        return tuple(tags)


def accumulator(dtype: Any) -> jnp.dtype:
    """The dtype in which scores and sums of arrays of `dtype` are kept: float32 at least."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def axes_of(terms: Any) -> tuple[str, ...]:
    """The axes of every leaf of a term or a sequence of terms."""
    if isinstance(terms, Term):
        return terms.axes()
    return tuple(tag for term in terms for tag in term.axes())


def named_axes(tag: str, ndim: int) -> list[tuple[str, int]]:
    """Pairs (letter, axis) of the axes of a leaf that are indexed by head, query or key."""
    return [(letter, axis) for letter, axis, _ in sized_axes(tag, ndim)]


def sized_axes(tag: str, ndim: int) -> list[tuple[str, int, int]]:
    """Triples (letter, axis, block): block is 1 unless an entry holds for several positions."""
    letters = [a for a in tag.split() if a != "B"]
    free = letters.count("*")
    named = [a for a in letters if a != "*"]
    start = ndim - len(named) - free
    return [(a[0], start + i, int(a[2:] or 1)) for i, a in enumerate(named)]


def slice_leaf(x: Array, tag: str, tile: Tile) -> Array:
    """The part of `x` that belongs to `tile`, aligned with the scores "*B N t s"."""
    if not tag:
        return x
    for letter, axis, block in sized_axes(tag, x.ndim):
        start, size = (tile.row, tile.rows) if letter == "T" else (tile.col, tile.cols)
        if block > 1:
            x = jnp.take(x, tile.indices(letter) // block, axis, mode="clip")
        elif letter in "TS" and x.shape[axis] not in (1, size):
            x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    if "*" in tag:
        return x
    return align(x, tag, tile.rank)


def align(x: Array, tag: str, rank: int) -> Array:
    """Insert axes of length one, so that `x` broadcasts against scores of the given rank."""
    present = [a for a, _ in named_axes(tag, x.ndim)]
    batch = x.shape[: x.ndim - len(present)]
    sizes = dict(zip(present, x.shape[len(batch) :], strict=True))
    shape = (1,) * (rank - 3 - len(batch)) + batch + tuple(sizes.get(a, 1) for a in LETTERS)
    return x.reshape(shape)


def restrict(terms: Any, tags: Sequence[str], tile: Tile) -> Any:
    """The same term or terms, holding only what `tile` needs of each array."""
    leaves, tree = jax.tree.flatten(terms)
    return jax.tree.unflatten(
        tree, [slice_leaf(jnp.asarray(x), t, tile) for x, t in zip(leaves, tags, strict=True)]
    )


def check_leaves(
    name: str, terms: Any, tags: Sequence[str], batch: tuple[int, ...], sizes: dict[str, int]
) -> None:
    """Raise ValueError where an array of a term cannot broadcast to the scores."""
    for x, tag in zip(jax.tree.leaves(terms), tags, strict=True):
        shape = jnp.shape(x)
        if not tag:
            continue
        named = sized_axes(tag, len(shape))
        if named and named[0][1] < 0:
            raise ValueError(f"{name}: expected an array with axes '{tag}', got shape {shape}.")
        for letter, axis, block in named:
            size = -(-sizes[letter] // block)
            if shape[axis] not in ((size,) if block > 1 else (1, size)):
                raise ValueError(
                    f"{name}: axis {letter} of an array with axes '{tag}' should be "
                    f"{size if block > 1 else f'1 or {size}'}, got {shape[axis]} in shape {shape}."
                )
            if block > 1 and jnp.issubdtype(jnp.result_type(x), jnp.floating):
                raise ValueError(
                    f"{name}: an array with one entry for a block of {block} (axes '{tag}') "
                    "cannot be floating-point; repeat its entries."
                )
        lead = shape[: named[0][1]] if named else shape
        if "*" in tag:
            continue
        if "B" not in tag.split() and lead:
            raise ValueError(f"{name}: expected an array with axes '{tag}', got shape {shape}.")
        try:
            fits = len(lead) <= len(batch) and jnp.broadcast_shapes(lead, batch) == batch
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name}: batch axes {lead} of shape {shape} (axes '{tag}') do not broadcast to "
                f"the batch axes {batch} of query."
            )
