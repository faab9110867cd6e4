"""What a call of attention is told of where its part lies, whichever way it is cut."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from attnlab.core.choice import Choice
from attnlab.core.masks import Prefix
from attnlab.core.reference import Call
from attnlab.core.terms import axes_of, sized_axes
from attnlab.core.tiles import pad_terms
from attnlab.distributed.meshes import axis_names, on_devices

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What is static about a call that is cut over a mesh, so that it is compiled once.

    Attributes:
      mesh: whose devices run it.
      cuts_batch: the mesh axis, or axes, over which the first batch axis is cut, or None.
      tree, tags: of the arrays of mask, modifiers and normalizer.
      batch: the whole call's batch axes.
      offsets: of queries and keys, None where traced.
      by_index: some array holds for whole blocks of queries or keys, found by their numbers.
      implementation, block_sizes, with_lse: as `attnlab.core.attention.solve` takes them.
    """

    mesh: Mesh
    cuts_batch: str | tuple[str, ...] | None
    tree: Any
    tags: tuple[str, ...]
    batch: tuple[int, ...]
    scale: float
    dropout_rate: float
    offsets: tuple[int | None, int | None]
    by_index: bool
    implementation: str
    block_sizes: tuple[int, int] | None
    with_lse: bool

    @classmethod
    def of(
        cls, mesh: Mesh, cuts_batch: Any, call: Call, implementation: str, block_sizes: Any,
        with_lse: bool,
    ) -> tuple["Fixed", Arrays]:  # fmt: skip
        """What is static, and the arrays."""
        terms = (call.mask, call.modifiers, call.normalizer)
        leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, terms))
        offsets = (call.query_offset, call.key_offset)
        tags = axes_of((call.mask, *call.modifiers, call.normalizer))
        fixed = cls(
            mesh, cuts_batch, tree, tags, call.query.shape[:-3], call.scale, call.dropout_rate,
            tuple(o if isinstance(o, int) else None for o in offsets),  # type: ignore[arg-type]
            by_index(call), implementation, block_sizes, with_lse,
        )  # fmt: skip
        arrays = {
            "inputs": (call.query, call.key, call.value),
            "leaves": leaves,
            "offsets": tuple(jnp.asarray(o, jnp.int32) for o in offsets),
            "dropout_key": call.dropout_key,
        }
        return fixed, arrays

    def spec(self, cut: Any) -> P:
        """Of arrays "*B N T H" whose T is cut so."""
        lead = (self.cuts_batch, *(None,) * (len(self.batch) - 1)) if self.batch else ()
        return P(*lead, None, cut, None)

    def on_mesh(
        self, body: Callable[[Arrays], tuple[Array, Array]], arrays: Arrays, rows: Any, cols: Any,
        leaves: Sequence[P],
    ) -> tuple[Array, Array]:  # fmt: skip
        """`body` on every device, of its parts: queries cut by `rows`, keys by `cols`."""
        out = self.spec(rows)
        specs = {
            "inputs": (out, self.spec(cols), self.spec(cols)),
            "leaves": list(leaves),
            "offsets": (P(), P()),
            "dropout_key": None if arrays["dropout_key"] is None else P(),
        }
        return on_devices(body, self.mesh, (specs,), (out, P(*out[:-1])))(arrays)

    def explain(self, look: Callable[[Arrays], Choice], arrays: Arrays, *cuts: Any) -> Choice:
        """What `look` finds on a device; `cuts` as for `on_mesh`, and nothing is computed."""
        found = []

        def body(arrays: Arrays) -> tuple[Array, Array]:
            found.append(look(arrays))
            out = jax.lax.full_like(arrays["inputs"][0], 0)
            return out, out[..., 0]

        jax.eval_shape(lambda arrays: self.on_mesh(body, arrays, *cuts), arrays)
        return found[0]

    def here(self, arrays: Arrays, head: Any = 0) -> Call:
        """A device's call, of its parts of the arrays; offsets are those of the whole call."""
        query, key, value = arrays["inputs"]
        entry = first_entry(self.mesh, self.cuts_batch, query.shape[: len(self.batch)])
        row, col = (
            traced if known is None else known
            for known, traced in zip(self.offsets, arrays["offsets"], strict=True)
        )
        mask, modifiers, normalizer = jax.tree.unflatten(self.tree, arrays["leaves"])
        return Call(
            query, key, value, modifiers, normalizer, mask, row, col, arrays["dropout_key"],
            self.scale, self.dropout_rate, (entry, head, row, col),
        )  # fmt: skip


def padded(call: Call, rows: int, cols: int) -> Call:
    """A call with so many more queries and keys; what was added is seen by nothing."""
    if not rows and not cols:
        return call

    def pad(x: Array, amount: int) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, amount), (0, 0)])

    mask, modifiers = (
        pad_terms(terms, axes_of(terms), rows, cols) for terms in (call.mask, call.modifiers)
    )
    if cols:
        mask = mask & Prefix(call.key_offset + call.lengths[1])
    return call._replace(
        query=pad(call.query, rows), key=pad(call.key, cols), value=pad(call.value, cols),
        mask=mask, modifiers=modifiers,
    )  # fmt: skip


def batch_is_cut(x: Any, tag: str, batch: tuple[int, ...]) -> bool:
    """Whether the first axis of an array with these axes is the first batch axis of the call."""
    named = sized_axes(tag, x.ndim) if tag else []
    first = min((axis for _, axis, _ in named), default=x.ndim)
    return "B" in tag.split() and first == len(batch) > 0 and x.shape[0] == batch[0] > 1


def first_entry(mesh: Any, batch: Any, shape: tuple[int, ...]) -> Any:
    """The number of a device's first batch entry; `shape`: the batch axes that it has."""
    if batch is None:
        return 0
    entry = jnp.int32(0)
    for name in axis_names(batch):
        entry = entry * mesh.shape[name] + jax.lax.axis_index(name)
    return entry * math.prod(shape)


def by_index(call: Call) -> bool:
    """Whether some array holds for whole blocks of queries or keys, found by their numbers."""
    terms = (call.mask, *call.modifiers, call.normalizer)
    return any(
        block > 1
        for x, tag in zip(jax.tree.leaves(terms), axes_of(terms), strict=True) if tag
        for _, _, block in sized_axes(tag, jnp.ndim(x))
    )  # fmt: skip
