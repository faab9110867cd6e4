"""The mathematics of one tile, the same on every device.

A kernel loads, multiplies and stores; what happens between the product of queries and keys and the
weights is here, in elementwise code on arrays "rows cols".  Every leaf is expanded to that shape
before user code sees it: then `jax.vjp` of user code never has to transpose a broadcast, and its
cotangents are reduced by the kernel, which knows how sums are done on its device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.flash.problem import Leaf, Spec

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Table:
    """Entries to be looked up, each a scalar or a column; the tile's view of a table leaf."""

    entries: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.entries),)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return self.entries, None

    @classmethod
    def tree_unflatten(cls, _: None, entries: Sequence[Any]) -> "Table":
        return cls(tuple(entries))


@dataclasses.dataclass(frozen=True)
class TileAt:
    """Where the pairs of a tile lie: absolute positions and head numbers, int32 "rows cols"."""

    query: Array
    key: Array
    head: Array

    @property
    def relative(self) -> Array:
        """Key position minus query position."""
        return self.key - self.query

    def look_up(self, table: Table, index: Array) -> Array:
        """Entry `index` of the head's table: a chain of selections, as kernels cannot gather."""
        found = jnp.zeros(index.shape, table.entries[0].dtype)
        for number, entry in enumerate(table.entries):
            found = jnp.where(index == number, jnp.broadcast_to(entry, index.shape), found)
        return found


def in_tile(leaf: Leaf, x: Array) -> Array:
    """What was loaded of a leaf, as user code sees it: float32 where trainable, or boolean."""
    if leaf.boolean:
        return x != 0
    return x.astype(jnp.float32) if leaf.trainable else x


def where_pairs_lie(
    spec: Spec, leaves: Sequence[Any], row: Any, col: Any, head: Any, iota: Callable[[int], Array]
) -> tuple[TileAt, Array]:
    """Positions of the tile whose first pair is (`row`, `col`), and which pairs are not padding.

    `iota(axis)` gives int32 "rows cols" counting along an axis, in the layout of the device.
    """
    rows, cols = iota(0) + row, iota(1) + col
    num_rows = spec.lengths[0]
    if spec.packed:
        length = jnp.int32(spec.packed)
        query = jax.lax.rem(rows, jnp.zeros_like(rows) + length)
        member = jax.lax.div(rows, jnp.zeros_like(rows) + length)
        heads = head * (num_rows // spec.packed) + member
    else:
        query, heads = rows, jnp.zeros_like(rows) + head
    inside = (rows < num_rows) & (cols < spec.lengths[1])
    first_query, first_key = (
        known if place is None else leaves[place]
        for known, place in zip(spec.known_offsets, spec.offsets, strict=True)
    )
    return TileAt(query + first_query, cols + first_key, heads), inside


def allowed_pairs(spec: Spec, leaves: list[Any], at: TileAt, inside: Array) -> Array:
    """The pairs of a tile that may meet."""
    allowed = spec.program.allowed(leaves, at)
    return jnp.broadcast_to(allowed, inside.shape) & inside


def evaluate(
    spec: Spec, leaves: list[Any], products: Array, at: TileAt, allowed: Array | None
) -> Array:
    """Log-weights (or weights) of a tile; -inf (or zero) where a pair is not allowed."""
    products = products * spec.scale
    if spec.scales is not None:
        products = products * leaves[spec.scales[0]]
    if allowed is not None:
        products = jnp.where(allowed, products, 0.0)
    result = spec.program.evaluate(leaves, products, at)
    if allowed is None:
        return result
    return jnp.where(allowed, result, -jnp.inf if spec.program.shared else 0.0)


def weights_given_lse(
    spec: Spec, leaves: list[Any], products: Array, at: TileAt, allowed: Array | None, lse: Array
) -> Array:
    """Final weights, when the log-sum-exp of each row is known (`finite`, "rows cols")."""
    result = evaluate(spec, leaves, products, at, allowed)
    if not spec.program.shared:
        return result
    weights = jnp.exp(result - lse)
    # The row of a NaN that is seen has a NaN log-sum-exp; what it does not see stays zero.
    return weights if allowed is None else jnp.where(allowed, weights, 0.0)


def pull_back(
    spec: Spec, leaves: list[Any], products: Array, at: TileAt, allowed: Array | None, lse: Array,
    wanted: Sequence[int],
) -> tuple[Array, Callable[[Array], tuple[Array, list[Any]]]]:  # fmt: skip
    """Weights, and the map from their cotangent to those of the products and of wanted leaves."""

    def weigh(products: Array, chosen: list[Any]) -> Array:
        full = list(leaves)
        for place, value in zip(wanted, chosen, strict=True):
            full[place] = value
        return weights_given_lse(spec, full, products, at, allowed, lse)

    return jax.vjp(weigh, products, [leaves[i] for i in wanted])


def finite(x: Array) -> Array:
    """-inf replaced by zero, so that subtracting it from -inf leaves -inf, not NaN."""
    return jnp.where(x == -jnp.inf, 0.0, x)


def kept(spec: Spec, leaves: list[Any], at: TileAt) -> Array | None:
    """The factor of dropout for each pair, zero or 1 / (1 - rate); None without dropout.

    Threefry-2x32 of (query, key) under the key of (b, n): the same pairs on every device.
    """
    if not spec.dropout_rate or spec.dropout is None:
        return None
    first, second = (leaves[i] for i in spec.dropout)

    def word(x: Array) -> Array:
        return x.astype(jnp.uint32)

    bits = _threefry(first, second, word(at.query), word(at.key))
    threshold = np.uint32(min(round(spec.dropout_rate * 2**32), 2**32 - 1))
    return jnp.where(bits >= threshold, 1 / (1 - spec.dropout_rate), 0.0).astype(jnp.float32)


def _threefry(first: Array, second: Array, x: Array, y: Array) -> Array:
    schedule = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    x, y = x + schedule[0], y + schedule[1]
    for block in range(5):
        for bits in _ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(bits)) | (y >> np.uint32(32 - bits)))
        x = x + schedule[(block + 1) % 3]
        y = y + schedule[(block + 2) % 3] + np.uint32(block + 1)
    return x
