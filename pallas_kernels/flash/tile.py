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
from pallas_kernels.flash.threefry import threefry_2x32


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


class _Looks:
    """The indices of the look-ups in one table, in order."""

    def __init__(self) -> None:
        self.indices: list[Array] = []


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Probed:
    """A table that notes each look-up and adds a probe to what is found.

    The cotangent of a probe, with the indices, is the gradient of the table before any sum.
    """

    table: Table
    probes: list[Any]
    looks: _Looks

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Looks]:
        return (self.table, self.probes), self.looks

    @classmethod
    def tree_unflatten(cls, looks: _Looks, children: Any) -> "_Probed":
        table, probes = children
        return cls(table, probes, looks)


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

    def look_up(self, table: Any, index: Array) -> Array:
        """Entry `index` of the head's table: a chain of selections, as kernels cannot gather."""
        if isinstance(table, _Probed):
            number = len(table.looks.indices)
            table.looks.indices.append(index)
            found = self.look_up(table.table, index)
            return found + table.probes[number] if table.probes else found
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
        length, group = spec.packed
        query = jax.lax.rem(rows, jnp.zeros_like(rows) + jnp.int32(length))
        member = jax.lax.div(rows, jnp.zeros_like(rows) + jnp.int32(num_rows // group))
        heads = head * group + member
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


def isolate(products: Array, value: Array, row: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Products and values of a tile with NaN and infinity of a value moved to its products.

    A weight of zero times NaN is NaN, a masked product is not.  `row` takes the largest entry of
    each row of an array like `value`, "cols D", to where it broadcasts against the products.
    """
    bad = jnp.where(jnp.abs(value) < jnp.inf, 0.0, 1.0)
    return jnp.where(row(bad) > 0, jnp.nan, products), clean(value)


def scaled(spec: Spec, leaves: list[Any], weights: Array, allowed: Array | None) -> Array:
    """Weights times the scales of int8 values, where there are any."""
    if spec.scales is None:
        return weights
    weights = weights * leaves[spec.scales[1]]
    # What lies on an unused page may have any scale.
    return weights if allowed is None else jnp.where(allowed, weights, 0.0)


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


def pull_back_looks(
    spec: Spec, leaves: list[Any], products: Array, at: TileAt, allowed: Array | None, lse: Array,
    wanted: Sequence[int],
) -> tuple[Array, Callable[[Array], tuple[Array, list[Any]]]]:  # fmt: skip
    """As `pull_back`, but the cotangent of a table is a list of (index, cotangent), "rows cols".

    Summing a tile for each entry of a table is then the kernel's, which need not do all at once.
    """
    tables = [i for i in wanted if spec.leaves[i].table]
    if not tables:
        return pull_back(spec, leaves, products, at, allowed, lse, wanted)
    others = [i for i in wanted if not spec.leaves[i].table]

    def weigh(products: Array, chosen: list[Any], probes: list[Any]) -> Any:
        full = list(leaves)
        for place, value in zip(others, chosen, strict=True):
            full[place] = value
        looks = [_Looks() for _ in tables]
        for place, probe, look in zip(tables, probes, looks, strict=True):
            full[place] = _Probed(leaves[place], probe, look)
        weights = weights_given_lse(spec, full, products, at, allowed, lse)
        return weights, [look.indices for look in looks]

    plain = [leaves[i] for i in others]
    _, found = jax.eval_shape(lambda: weigh(products, plain, [[] for _ in tables]))
    probes = [[jnp.zeros_like(products) for _ in indices] for indices in found]
    weights, pull, indices = jax.vjp(weigh, products, plain, probes, has_aux=True)

    def pull_all(d_weights: Array) -> tuple[Array, list[Any]]:
        d_products, d_plain, d_probes = pull(d_weights)
        by_number = dict(zip(others, d_plain, strict=True))
        for place, index, d_probe in zip(tables, indices, d_probes, strict=True):
            by_number[place] = list(zip(index, d_probe, strict=True))
        return d_products, [by_number[i] for i in wanted]

    return weights, pull_all


def clean(x: Array) -> Array:
    """Zeros in place of NaN and infinity."""
    return jnp.where(jnp.abs(x) < jnp.inf, x, jnp.zeros_like(x))


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

    bits, _ = threefry_2x32((first, second), (word(at.query), word(at.key)))
    threshold = np.uint32(min(round(spec.dropout_rate * 2**32), 2**32 - 1))
    return jnp.where(bits >= threshold, 1 / (1 - spec.dropout_rate), 0.0).astype(jnp.float32)
