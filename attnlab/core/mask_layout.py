"""What of a mask a recurrence can keep: causality, which keys and queries are real, documents.

A state cannot forget a pair; it can leave out a key, and be cleared between documents.  `layout`
takes a mask apart into these; what it cannot take apart needs all pairs at once.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.core.masks import Causal, Full, KeyPadding, Mask, QueryPadding, Segments, _And


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mask, taken apart; None stands for all."""

    causal: bool = False
    keys: Bool[Array, "*B S"] | None = None
    queries: Bool[Array, "*B T"] | None = None
    ids: Int[Array, "*B T"] | None = None


def layout(
    mask: Mask, lengths: tuple[int, int], offsets: tuple[Any, Any] = (0, 0)
) -> Layout | None:
    """The mask as a `Layout`, or None if it says more than that.

    `lengths` are T and S, `offsets` the positions of the first query and the first key.

    Raises:
      ValueError: documents (`Segments`) that come back after another began; a state that was
        cleared cannot.
    """
    found = Layout()
    for part in _parts(mask):
        new = _one(part, lengths, offsets)
        if new is None or (found.ids is not None and new.ids is not None):
            return None
        found = Layout(
            found.causal or new.causal,
            _both(found.keys, new.keys),
            _both(found.queries, new.queries),
            found.ids if new.ids is None else new.ids,
        )
    return found


def without_causal(mask: Mask) -> Mask | None:
    """The mask without its causal parts, or None if it has none that can be told."""
    parts = _parts(mask)
    kept = [part for part in parts if not isinstance(part, Causal)]
    if len(kept) == len(parts):
        return None
    rest: Mask = Full()
    for part in kept:
        rest = rest & part
    return rest


def _parts(mask: Mask) -> list[Mask]:
    return [*_parts(mask.a), *_parts(mask.b)] if isinstance(mask, _And) else [mask]


def _one(mask: Mask, lengths: tuple[int, int], offsets: tuple[Any, Any]) -> Layout | None:
    if isinstance(mask, Full):
        return Layout()
    if isinstance(mask, Causal):
        return Layout(causal=True)
    if isinstance(mask, QueryPadding):  # before its base, KeyPadding
        return Layout(queries=_below(mask.lengths, lengths[0], offsets[0]))
    if isinstance(mask, KeyPadding):
        return Layout(keys=_below(mask.lengths, lengths[1], offsets[1]))
    if isinstance(mask, Segments) and lengths[0] == lengths[1]:
        return _documents(mask)
    return None


def _below(limit: Any, length: int, offset: Any) -> Bool[Array, "*B L"]:
    limit = jnp.asarray(limit)[..., None]
    place = jnp.arange(length, dtype=limit.dtype) + jnp.asarray(offset, limit.dtype)
    return jnp.expand_dims(place, range(limit.ndim - 1)) < limit


def _documents(mask: Segments) -> Layout | None:
    ids = jnp.asarray(mask.query_ids)
    if mask.key_ids is not mask.query_ids:
        both = (mask.query_ids, mask.key_ids)
        if any(isinstance(x, jax.core.Tracer) for x in both) or not np.array_equal(*both):
            return None
    if not isinstance(ids, jax.core.Tracer):
        _check_contiguous(np.asarray(ids))
    real = ids >= 0
    return Layout(keys=real, queries=real, ids=ids)


def _check_contiguous(ids: np.ndarray) -> None:
    for row in ids.reshape(-1, ids.shape[-1]):
        starts = row[np.concatenate([[True], row[1:] != row[:-1]])]
        starts = starts[starts >= 0]
        if len(np.unique(starts)) < len(starts):
            raise ValueError(
                "mask: the documents of Segments should be contiguous for a recurrence; an id came "
                'back after another. Sort them, or use implementation="parallel" with an ArrayMask.'
            )


def _both(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a & b
