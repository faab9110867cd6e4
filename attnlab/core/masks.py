"""Which pairs may meet: a small algebra of masks, evaluated lazily on positions.

A mask is a pytree and a function of positions.  Masks combine with `&`, `|` and `~`; none of them
builds the "*B N T S" matrix unless `dense` is asked for.  What a kernel needs to know, which tiles
of the score matrix are empty, full or partial, comes from `plan`, by interval reasoning where the
mask is a formula and by looking, one tile at a time, where it is data.

True means the query may look at the key.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from attnlab.core.spans import Span, TilePlan, same_rank
from attnlab.core.terms import (
    ArrayLeaf,
    At,
    Term,
    Tile,
    axes_of,
    check_leaves,
    leaf,
    restrict,
    static,
)


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


class Mask(Term):
    """Base of all masks.  A subclass defines `allowed`, and `bounds` if it is a formula."""

    def allowed(self, at: At) -> Bool[Array, "..."]:
        """True where the pairs `at` may meet, broadcastable to "*B N t s"."""
        raise NotImplementedError

    def bounds(self, span: Span) -> tuple[Any, Any]:
        """For each tile: may some pair be allowed?  Is every pair certainly allowed?

        Both answers may err, but only towards (True, False), "unknown".
        """
        return np.True_, np.False_

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        """The same from the arrays the mask holds, possibly traced: "*B N I J", axes of 1 allowed.

        What a kernel's list of live tiles is made from while the program runs.
        """
        return self.bounds(span)

    @property
    def exact_bounds(self) -> bool:
        """Whether `bounds` settles each tile, so that no tile need be looked at again."""
        return False

    @property
    def opaque(self) -> bool:
        """Whether nothing is known of a tile but by evaluating each of its pairs."""
        own = type(self)
        return own.bounds is Mask.bounds and own.data_bounds is Mask.data_bounds

    def __and__(self, other: "Mask") -> "Mask":
        return _And(self, as_mask(other))

    def __rand__(self, other: "Mask") -> "Mask":
        return _And(as_mask(other), self)

    def __or__(self, other: "Mask") -> "Mask":
        return _Or(self, as_mask(other))

    def __ror__(self, other: "Mask") -> "Mask":
        return _Or(as_mask(other), self)

    def __invert__(self) -> "Mask":
        return _Not(self)

    def dense(
        self,
        num_queries: int,
        num_keys: int,
        *,
        query_offset: int = 0,
        key_offset: int = 0,
        num_heads: int = 1,
    ) -> Bool[Array, "*B N T S"]:
        """The whole mask as an array: for looking at, and for implementations that need it.

        Batch axes are those of the arrays the mask holds; a mask without data has none.
        """
        rank = 3 + max(
            (x.ndim - len([a for a in tag.split() if a != "B"])
             for x, tag in zip(map(jnp.asarray, jax.tree.leaves(self)), self.axes(), strict=True)
             if "B" in tag.split()),
            default=0,
        )  # fmt: skip
        tile = Tile(0, 0, num_queries, num_keys, num_heads, rank, query_offset, key_offset)
        allowed = restrict(self, self.axes(), tile).allowed(tile.at())
        shape = (*allowed.shape[:-3], num_heads, num_queries, num_keys)
        return jnp.broadcast_to(allowed, shape)

    def plan(
        self,
        num_queries: int,
        num_keys: int,
        block_sizes: tuple[int, int] = (128, 128),
        *,
        query_offset: int = 0,
        key_offset: int = 0,
        num_heads: int = 1,
    ) -> TilePlan:
        """Which tiles are empty, full or partial, over all batch entries and heads; exact.

        Formulas decide whole tiles from their corners; only tiles that stay undecided are looked
        at, one at a time, so memory is that of one tile.

        Raises:
          ValueError: the lengths or block sizes are not positive, or the mask is traced.
        """
        if min(num_queries, num_keys, *block_sizes) < 1:
            raise ValueError(
                "plan: lengths and block_sizes should be positive, got "
                f"{num_queries=}, {num_keys=}, {block_sizes=}."
            )
        if any(map(_is_traced, jax.tree.leaves(self))):
            raise ValueError("plan: the mask holds traced arrays; plan it outside of jit.")
        span = Span.of((num_queries, num_keys), block_sizes, (query_offset, key_offset))
        shape = (span.query_first.shape[0], span.key_first.shape[1])
        some, every = (np.broadcast_to(x, shape).copy() for x in self.bounds(span))
        tags = self.axes()
        rows, cols = block_sizes
        batch_rank = max(jnp.ndim(x) for x in [0, *jax.tree.leaves(self)])
        for i, j in [] if self.exact_bounds else np.argwhere(some & ~every):
            tile = Tile(
                int(i) * rows,
                int(j) * cols,
                min(rows, num_queries - int(i) * rows),
                min(cols, num_keys - int(j) * cols),
                num_heads,
                3 + batch_rank,
                query_offset,
                key_offset,
            )
            allowed = np.asarray(restrict(self, tags, tile).allowed(tile.at()))
            some[i, j], every[i, j] = allowed.any(), allowed.all()
        return TilePlan(block_sizes, ~some, every)


def as_mask(mask: Any) -> Mask:
    """A Mask as it is; a boolean array as an `ArrayMask`.

    Raises:
      TypeError: neither a Mask nor a boolean array.
    """
    if isinstance(mask, Mask):
        return mask
    if hasattr(mask, "dtype") and mask.dtype == jnp.bool_:
        return ArrayMask(mask)
    got = getattr(mask, "dtype", type(mask).__name__)
    raise TypeError(f"mask: expected a Mask or a boolean array, got {got}.")


class Full(Mask):
    """Every pair may meet."""

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return jnp.ones((1,) * at.query.ndim, bool)

    def bounds(self, span: Span) -> tuple[Any, Any]:
        return np.True_, np.True_

    @property
    def exact_bounds(self) -> bool:
        return True


class Causal(Mask):
    """A query sees keys at its own position and before."""

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return at.key <= at.query

    def bounds(self, span: Span) -> tuple[Any, Any]:
        return span.key_first <= span.query_last, span.key_last <= span.query_first

    @property
    def exact_bounds(self) -> bool:
        return True


class SlidingWindow(Mask):
    """A query at i sees keys from i - left to i + right, both included; None means no bound.

    `SlidingWindow(255) ` is the causal window of 256 keys.

    Raises:
      ValueError: a bound is negative or not an integer.
    """

    left: int | None = static()
    right: int | None = static(default=0)

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            bound = getattr(self, name)
            if bound is not None and (not isinstance(bound, int) or bound < 0):
                raise ValueError(
                    f"SlidingWindow: {name} should be a non-negative int or None, got {bound!r}."
                )

    def allowed(self, at: At) -> Bool[Array, "..."]:
        inside = jnp.ones((1,) * at.query.ndim, bool)
        if self.left is not None:
            inside = inside & (at.relative >= -self.left)
        if self.right is not None:
            inside = inside & (at.relative <= self.right)
        return inside

    def bounds(self, span: Span) -> tuple[Any, Any]:
        some, every = np.True_, np.True_
        if self.left is not None:
            some = some & (span.key_last - span.query_first >= -self.left)
            every = every & (span.key_first - span.query_last >= -self.left)
        if self.right is not None:
            some = some & (span.key_first - span.query_last <= self.right)
            every = every & (span.key_last - span.query_first <= self.right)
        return some, every

    @property
    def exact_bounds(self) -> bool:
        return True


class Prefix(Mask):
    """Every query sees the keys at positions before `length`; `| Causal()` makes a prefix LM.

    `length`: an int, or an integer array "*B" with one length per batch entry.
    """

    length: ArrayLeaf = leaf("B")
    fixed: int | None = static(default=None)

    def __post_init__(self) -> None:
        # A plain int becomes part of the type, so that empty tiles are known before running.
        if isinstance(self.length, int):
            if self.length < 0:
                raise ValueError(f"Prefix: length should not be negative, got {self.length}.")
            object.__setattr__(self, "fixed", self.length)
            object.__setattr__(self, "length", None)

    def allowed(self, at: At) -> Bool[Array, "..."]:
        length: Any = self.length if self.fixed is None else self.fixed
        return at.key < length

    def bounds(self, span: Span) -> tuple[Any, Any]:
        if self.fixed is None:
            return np.True_, np.False_
        return span.key_first < self.fixed, span.key_last < self.fixed

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        if self.fixed is not None:
            return self.bounds(span)
        return _before(span.key_first, span.key_last, self.length)

    @property
    def exact_bounds(self) -> bool:
        return self.fixed is not None


class Segments(Mask):
    """Packed documents: a query sees the keys of its own segment.

    `query_ids` "*B T" and `key_ids` "*B S" (the query's, when left out) are integers; a negative
    id marks padding, which sees nothing and is seen by nothing.
    """

    query_ids: ArrayLeaf = leaf("B T")
    key_ids: ArrayLeaf = leaf("B S", default=None)

    def __post_init__(self) -> None:
        if self.key_ids is None:
            object.__setattr__(self, "key_ids", self.query_ids)

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return (self.query_ids == self.key_ids) & (self.key_ids >= 0)

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        query_low, query_high, key_low, key_high = _ends(self.query_ids, self.key_ids, span)
        some = (query_low <= key_high) & (key_low <= query_high) & (key_high >= 0)
        one = (query_low == query_high) & (key_low == key_high) & (query_low == key_low)
        return some & (query_high >= 0), one & (key_low >= 0)


def _ends(queries: Any, keys: Any, span: Span) -> list[Array]:
    """Least and largest number of each block of queries "... I 1", and of keys "... 1 J"."""
    ends = []
    for axis, numbers in enumerate((queries, keys)):
        blocks = span.in_blocks(jnp.asarray(numbers)[..., None, :], axis)
        shape = (*blocks.shape[:-2], -1, 1) if axis == 0 else (*blocks.shape[:-2], 1, -1)
        ends += [blocks.min(-1).reshape(shape), blocks.max(-1).reshape(shape)]
    return ends


class CausalBy(Mask):
    """Causal by given positions: a query sees keys whose position is not after its own.

    `query_place` "*B T" and `key_place` "*B S" (the query's, when left out) are integers in any
    order; tokens with the same one see each other.
    """

    query_place: ArrayLeaf = leaf("B T")
    key_place: ArrayLeaf = leaf("B S", default=None)

    def __post_init__(self) -> None:
        if self.key_place is None:
            object.__setattr__(self, "key_place", self.query_place)

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return self.key_place <= self.query_place

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        query_low, query_high, key_low, key_high = _ends(self.query_place, self.key_place, span)
        return key_low <= query_high, key_high <= query_low


class KeyPadding(Mask):
    """Only keys at positions before `lengths` are real.  `lengths`: integers "*B"."""

    lengths: ArrayLeaf = leaf("B")

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return at.key < self.lengths

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        return _before(span.key_first, span.key_last, self.lengths)


class QueryPadding(KeyPadding):
    """Only queries at positions before `lengths` are real; the others see nothing."""

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return at.query < self.lengths

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        return _before(span.query_first, span.query_last, self.lengths)


def _before(first: Any, last: Any, lengths: Any) -> tuple[Any, Any]:
    first, last, lengths = same_rank(first, last, jnp.asarray(lengths)[..., None, None, None])
    return first < lengths, last < lengths


class Strided(Mask):
    """A query at i sees keys at distance offset, offset + stride, ... (modulo the stride)."""

    stride: int = static()
    offset: int = static(default=0)

    def __post_init__(self) -> None:
        if not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"Strided: stride should be a positive int, got {self.stride!r}.")

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return (-at.relative - self.offset) % self.stride == 0


class ArrayMask(Mask):
    """Any boolean array that broadcasts to "*B N T S"."""

    array: ArrayLeaf = leaf("B N T S")

    def __post_init__(self) -> None:
        array = jnp.asarray(self.array)
        if array.dtype != jnp.bool_:
            raise TypeError(f"mask: expected a boolean array, got dtype {array.dtype}.")
        object.__setattr__(self, "array", array.reshape((1,) * (3 - array.ndim) + array.shape))

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return self.array

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        some = every = self.array
        for axis in (-2, -1):
            if self.array.shape[axis] == 1:
                continue
            last = [jnp.moveaxis(x, axis, -1) for x in (some, every)]
            cut = [span.in_blocks(x, axis + 2) for x in last]
            some = jnp.moveaxis(cut[0].any(-1), -1, axis)
            every = jnp.moveaxis(cut[1].all(-1), -1, axis)
        return some, every


class Blocks(Mask):
    """Whole blocks of pairs: `live` "*B N I J", boolean, one entry for each tile of the scores.

    A tile is `block_sizes` = (queries, keys) large, counted from the first query and the first key
    of the call.  This is how a selector says what it found; it may be data.  From lists of blocks:
    `Blocks.from_lists`.

    Raises:
      TypeError: `live` is not boolean.
      ValueError: block sizes that are not positive.
    """

    live: ArrayLeaf = leaf("")
    block_sizes: tuple[int, int] = static(default=(128, 128))

    def __post_init__(self) -> None:
        live = jnp.asarray(self.live)
        if live.dtype != jnp.bool_:
            raise TypeError(f"Blocks: live should be a boolean array, got dtype {live.dtype}.")
        if min(self.block_sizes) < 1:
            raise ValueError(f"Blocks: block_sizes should be positive, got {self.block_sizes}.")
        object.__setattr__(self, "live", live.reshape((1,) * (3 - live.ndim) + live.shape))

    @classmethod
    def from_lists(
        cls, index: Array, num_blocks: int, block_sizes: tuple[int, int] = (128, 128)
    ) -> "Blocks":
        """From `index` "*B N I M": the key blocks that query block i meets, in any order.

        -1 fills a list that is shorter than M.  `num_blocks`: how many key blocks there are.

        Raises:
          TypeError: `index` does not hold integers.
          ValueError: a block outside [-1, num_blocks).  Under `jit` the numbers are not known, and
            one that is out of range meets nothing.
        """
        index = jnp.asarray(index)
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise TypeError(f"index: expected integers, got dtype {index.dtype}.")
        if not _is_traced(index) and index.size:
            low, high = int(index.min()), int(index.max())
            if low < -1 or high >= num_blocks:
                raise ValueError(
                    f"index: expected block numbers from -1 to {num_blocks - 1}, got "
                    f"{low if low < -1 else high}."
                )
        blocks = jnp.arange(num_blocks, dtype=index.dtype)

        def add(live: Array, one: Array) -> tuple[Array, None]:
            return live | (one[..., None] == blocks.reshape((1,) * one.ndim + (-1,))), None

        start = jnp.zeros((*index.shape[:-1], num_blocks), bool)
        return cls(jax.lax.scan(add, start, jnp.moveaxis(index, -1, 0))[0], block_sizes)

    def axes(self) -> tuple[str, ...]:
        rows, cols = self.block_sizes
        return (f"B N T/{rows} S/{cols}",)

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return self.live

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        live = self.live
        for axis in (0, 1):
            first = np.arange(0, span.lengths[axis], span.block_sizes[axis])
            last = np.minimum(first + span.block_sizes[axis], span.lengths[axis]) - 1
            block = self.block_sizes[axis]
            if np.any(first // block != last // block):
                return np.True_, np.False_
            live = jnp.take(live, first // block, axis - 2, mode="clip")
        return live, live


class Predicate(Mask):
    """Any function of positions: `fn(at)`, or `fn(at, params)` when `params` are given.

    `at.query`, `at.key`, `at.head` and `at.relative` broadcast against each other; the result is
    boolean.  `params` is any pytree of arrays; `axes` tags them, one tag for all or a tuple with
    one per leaf (see `attnlab.core.terms`); by default each is handed over whole.
    """

    fn: Callable[..., Bool[Array, "..."]] = static()
    params: Any = leaf("", default=None)
    tags: str | tuple[str, ...] = static(default="")

    def axes(self) -> tuple[str, ...]:
        count = len(jax.tree.leaves(self.params))
        return self.tags if isinstance(self.tags, tuple) else (self.tags,) * count

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return self.fn(at) if self.params is None else self.fn(at, self.params)


class _And(Mask):
    a: Mask = leaf("")
    b: Mask = leaf("")

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return self.a.allowed(at) & self.b.allowed(at)

    def bounds(self, span: Span) -> tuple[Any, Any]:
        return self._join(self.a.bounds(span), self.b.bounds(span))

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        return self._join(self.a.data_bounds(span), self.b.data_bounds(span))

    def _join(self, a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
        (some_a, some_b), (every_a, every_b) = same_rank(a[0], b[0]), same_rank(a[1], b[1])
        return some_a & some_b, every_a & every_b

    @property
    def opaque(self) -> bool:
        return self.a.opaque or self.b.opaque


class _Or(Mask):
    a: Mask = leaf("")
    b: Mask = leaf("")

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return self.a.allowed(at) | self.b.allowed(at)

    def bounds(self, span: Span) -> tuple[Any, Any]:
        return self._join(self.a.bounds(span), self.b.bounds(span))

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        return self._join(self.a.data_bounds(span), self.b.data_bounds(span))

    def _join(self, a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
        (some_a, some_b), (every_a, every_b) = same_rank(a[0], b[0]), same_rank(a[1], b[1])
        return some_a | some_b, every_a | every_b

    @property
    def opaque(self) -> bool:
        return self.a.opaque or self.b.opaque


class _Not(Mask):
    a: Mask = leaf("")

    def allowed(self, at: At) -> Bool[Array, "..."]:
        return ~self.a.allowed(at)

    def bounds(self, span: Span) -> tuple[Any, Any]:
        some, every = self.a.bounds(span)
        return ~every, ~some

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        some, every = self.a.data_bounds(span)
        return ~every, ~some

    @property
    def exact_bounds(self) -> bool:
        return self.a.exact_bounds

    @property
    def opaque(self) -> bool:
        return self.a.opaque


def check_mask(mask: Mask, batch: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Raise ValueError where an array of the mask cannot broadcast to the scores."""
    check_leaves("mask", mask, axes_of(mask), batch, sizes)
