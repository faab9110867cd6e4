"""Masks that are a band: the keys that a query may see follow each other, and are known in O(T).

Causal masks, windows, prefixes and key padding are bands, and so is whatever is an intersection of
them.  Libraries take a band as a few numbers where they would need other masks as an array.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.core.masks import Causal, Full, KeyPadding, Mask, Prefix, SlidingWindow, _And
from attnlab.core.reference import Call


class Band(NamedTuple):
    """Row i sees columns i - left to i + right, both included, below `lengths` "B"; None: no bound.

    Rows and columns are counted from zero, whatever the offsets; B is all batch axes in one.
    """

    left: int | None = None
    right: int | None = None
    lengths: Int[Array, " B"] | None = None

    def both(self, other: "Band") -> "Band":
        """What two bands have in common."""

        def least(a: Any, b: Any, smaller: Callable[[Any, Any], Any]) -> Any:
            return b if a is None else a if b is None else smaller(a, b)

        return Band(
            least(self.left, other.left, min),
            least(self.right, other.right, min),
            least(self.lengths, other.lengths, jnp.minimum),
        )

    def rows(self, rows: int, cols: int) -> tuple[Int[Array, "#B 1 T"], Int[Array, "#B 1 T"]]:
        """The first visible column of every row, and one past the last."""
        row = np.arange(rows)
        first = np.zeros_like(row) if self.left is None else np.maximum(row - self.left, 0)
        last = np.full_like(row, cols) if self.right is None else row + self.right + 1
        begin = jnp.asarray(first[None, None], jnp.int32)
        end = jnp.asarray(np.clip(last, 0, cols)[None, None], jnp.int32)
        if self.lengths is not None:
            end = jnp.minimum(end, jnp.clip(self.lengths, 0, cols)[:, None, None])
        return begin, end

    def fills(self, rows: int, cols: int) -> bool:
        """Whether each row is sure to see a column, entries of length 0 apart."""
        left, right = self.left, self.right
        if right is not None and right < 0:
            return False  # the first row sees nothing
        if left is not None and (rows - left > cols or self.lengths is not None):
            return False  # the last rows may see nothing
        return left is None or right is None or left + right >= 0


def band_of(call: Call) -> Band | None:
    """The mask of a call as a band, or None if it is not one, or its offsets are traced."""
    if not all(isinstance(offset, int) for offset in (call.query_offset, call.key_offset)):
        return None
    return _band(call.mask, call)


def _band(mask: Mask, call: Call) -> Band | None:
    shift = call.query_offset - call.key_offset
    kind = type(mask)  # a subclass may mean something else
    if isinstance(mask, _And):
        a, b = _band(mask.a, call), _band(mask.b, call)
        return None if a is None or b is None else a.both(b)
    if kind is Full:
        return Band()
    if kind is Causal:
        return Band(right=shift)
    if isinstance(mask, SlidingWindow) and kind is SlidingWindow:
        left = None if mask.left is None else mask.left - shift
        return Band(left, None if mask.right is None else mask.right + shift)
    lengths: Any = None
    if isinstance(mask, KeyPadding) and kind is KeyPadding:
        lengths = mask.lengths
    elif isinstance(mask, Prefix) and kind is Prefix:
        lengths = mask.length if mask.fixed is None else mask.fixed
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths, jnp.int32) - call.key_offset
    return Band(lengths=jnp.broadcast_to(lengths, call.query.shape[:-3]).reshape(-1))


def some_between(
    flags: Bool[Array, "B N S"], first: Int[Array, "#B 1 T"], last: Int[Array, "#B 1 T"]
) -> Bool[Array, "B N T"]:
    """Whether some flag in [first, last) of each row is up; `last` is at least `first`."""
    before = jnp.pad(jnp.cumsum(flags, axis=-1, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
    shape = (*flags.shape[:-1], first.shape[-1])

    def count(index: Int[Array, "#B 1 T"]) -> Int[Array, "B N T"]:
        return jnp.take_along_axis(before, jnp.broadcast_to(index, shape), axis=-1)

    return count(last) > count(first)
