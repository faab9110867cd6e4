"""Where the documents of a packed sequence begin and end, counted by position; each in one piece.

`attnlab.resets` tells where a new one begins.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from attnlab.core.recurrence import resets


def place_in_document(ids: Int[Array, "*B T"]) -> Int[Array, "*B T"]:
    """How many tokens of a token's document come before it."""
    place = _places(ids.shape)
    first = jnp.where(resets(ids), place, 0)
    return place - jax.lax.cummax(first, axis=first.ndim - 1)


def document_ends(start: Bool[Array, "*B S"]) -> Int[Array, "*B S"]:
    """The last position of each position's document, from where documents start."""
    last = jnp.roll(start, -1, -1).at[..., -1].set(True)
    place = jnp.where(last, _places(start.shape), start.shape[-1] - 1)
    return jax.lax.cummin(place, axis=place.ndim - 1, reverse=True)


def _places(shape: tuple[int, ...]) -> Int[Array, "*B T"]:
    return jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
