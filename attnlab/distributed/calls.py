"""What a call of attention is told of where its part lies, whichever way it is cut."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.core.masks import Prefix
from attnlab.core.reference import Call
from attnlab.core.terms import axes_of, sized_axes
from attnlab.core.tiles import pad_terms
from attnlab.distributed.meshes import axis_names


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
