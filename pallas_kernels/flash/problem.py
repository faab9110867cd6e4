"""What a call of attention looks like to a kernel, whatever the device.

Batch axes are one, heads come before positions, lengths are whole blocks, and every array that a
mask, a score modifier or a normalizer holds is a *leaf* with the axes "b n t s", each of length one
or full, so that a kernel can cut out what belongs to a tile without knowing what it means.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, Int


class Program(Protocol):
    """The user's code: what happens to the scores of one tile.  Hashable; holds no arrays.

    `leaves` are the tile's parts of the arrays (see `tile.expand`), `at` says where its pairs lie.
    """

    @property
    def shared(self) -> bool:
        """Whether weights are exp(u) over the row's sum; otherwise each pair has its own."""
        ...

    def allowed(self, leaves: list[Any], at: Any) -> Any:
        """Which pairs may meet, boolean "rows cols"."""
        ...

    def evaluate(self, leaves: list[Any], products: Array, at: Any) -> Array:
        """From scaled products "rows cols" to log-weights u (shared) or to weights."""
        ...


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a term.  `axes`: those of "bnts" along which it is full.

    `blocks`: with (r, c), entry [.., i, j] holds for whole blocks of r rows by c columns, (0, 0)
    for none.  `table`: the last axis holds entries to be looked up, not keys.  `boolean`: stored as
    int8, which every device can load.
    """

    axes: str
    trainable: bool = False
    table: bool = False
    blocks: tuple[int, int] = (0, 0)
    boolean: bool = False

    @property
    def owner(self) -> str:
        """Which kernel sums its gradient: "row" (dq), "column" (dk, dv) or "pair" (its own)."""
        if "t" in self.axes and "s" in self.axes and not self.table:
            return "pair"
        return "column" if "s" in self.axes and not self.table else "row"


@dataclasses.dataclass(frozen=True)
class Spec:
    """All that is static about a call.

    `lengths`: queries and keys that are real; beyond them lies padding.  `offsets`, `dropout`,
    `scales`: numbers of the leaves that hold the traced offsets of positions, the two words of the
    dropout key of each (b, n), and the scales of int8 keys and values.

    For decoding: `packed` is (T, G) when the rows are G heads that share a key head, each with some
    multiple of T queries.  `isolated`: keys and values may hold NaN where they are not seen, and
    tiles with a mask keep it from rows that do not see it.  `page`: the number of keys on a page
    where pages are not the blocks of a tile, else 0.  `heads_last`: keys and values come as
    "B S K H".  `part`: results, and gradients, are merged with others, so they stay in float32.
    """

    program: Program
    leaves: tuple[Leaf, ...]
    scale: float
    lengths: tuple[int, int]
    block_sizes: tuple[int, int]
    known_offsets: tuple[int, int] = (0, 0)
    offsets: tuple[int | None, int | None] = (None, None)
    dropout_rate: float = 0.0
    dropout: tuple[int, int] | None = None
    scales: tuple[int, int] | None = None
    packed: tuple[int, int] | None = None
    isolated: bool = False
    page: int = 0
    heads_last: bool = False
    part: bool = False

    @property
    def trainable(self) -> tuple[int, ...]:
        return tuple(i for i, leaf in enumerate(self.leaves) if leaf.trainable)


class Lists(NamedTuple):
    """For each owner block (a row of tiles, or a column), the other blocks it meets.

    `index[b, n, i, :count[b, n, i]]`, of which the first `full[b, n, i]` need no mask; b and n have
    length one where all share a list.
    """

    index: Int[Array, "b n I M"]  # type: ignore[assignment]
    full: Int[Array, "b n I"]
    count: Int[Array, "b n I"]  # type: ignore[assignment]


class Flat(NamedTuple):
    """The same as one sequence of tiles for each (b, n): a grid that visits live tiles only.

    `flags` are sums of FIRST, LAST, MASKED, DEAD, SKIP; `total` is the number of steps to take.
    """

    owner: Int[Array, "b n L"]
    other: Int[Array, "b n L"]
    flags: Int[Array, "b n L"]
    total: Any


class Arrays(NamedTuple):
    """The arrays of a call.  `pages` "B J": where block j of the keys (or page j, see `Spec.page`)
    lies in a pool, or None when it lies in place.  A pool has the shape (1, K, pages * page, H).

    `rows` are the lists by row of tiles, `columns` by column (needed by the backward pass only).
    They are `Lists` for GPUs and `Flat` for TPUs.
    """

    query: Float[Array, "B N T H"]
    key: Any
    value: Any
    leaves: list[Any]
    rows: Lists | Flat
    columns: Lists | Flat | None = None
    pages: Int[Array, "B J"] | None = None


def leading(x: Any, b: Any, n: Any) -> tuple[Any, Any]:
    """Where to find (b, n) in an array whose first two axes may have length one."""
    return (b if x.shape[0] > 1 else 0), (n if x.shape[1] > 1 else 0)


def reduce_leaf(gradient: Array, leaf_shape: tuple[int, ...], dtype: Any) -> Array:
    """Sum a gradient over the axes along which the leaf has length one."""
    axes = tuple(
        i for i, (g, n) in enumerate(zip(gradient.shape, leaf_shape, strict=True)) if g != n
    )
    total = gradient.sum(axes, keepdims=True) if axes else gradient
    return jax.numpy.asarray(total, dtype)
