"""Groups of query heads that differ in size: how many, and which key head each reads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.core.gates import widened


def gather_heads(x: Array, assignment: Any) -> Array:
    """Of "*B S K H" the head that each query head reads: "*B S N H".

    Args:
      assignment: integers from 0 to K - 1, "N" or "*B N", as a tuple or an array; those of a traced
        array are clipped to that.

    Raises:
      TypeError: no integers.
      ValueError: another shape, or a head that there is not.
    """
    traced = isinstance(assignment, jax.core.Tracer)
    place = assignment if traced else np.asarray(assignment)
    if not jnp.issubdtype(place.dtype, jnp.integer):
        raise TypeError(f"assignment: expected integers, got dtype {place.dtype}.")
    if not place.ndim or place.shape[:-1] not in ((), x.shape[:-3]):
        raise ValueError(
            f"assignment: expected shape (N,) or {(*x.shape[:-3], 'N')}, got {place.shape}."
        )
    if not traced and (np.any(place < 0) or np.any(place >= x.shape[-2])):
        raise ValueError(
            f"assignment: expected key heads from 0 to {x.shape[-2] - 1}, got {place.tolist()}."
        )
    if place.ndim == 1:
        return jnp.take(x, place, axis=x.ndim - 2, mode="clip")
    return jnp.take_along_axis(x, place[..., None, :, None], axis=-2, mode="clip")


def assigned(sizes: Any, num_heads: int) -> Int[Array, "*B N"]:
    """The key head of each of N query heads, in order: `sizes` "*B K" says how many read each.

    Raises:
      TypeError: no integers.
      ValueError: an empty group, or sizes that do not sum to N.
    """
    counts = jnp.asarray(sizes)
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise TypeError(f"sizes: expected integers, got dtype {counts.dtype}.")
    if not counts.ndim or not counts.shape[-1]:
        raise ValueError(f"sizes: expected shape (*B, K), got {counts.shape}.")
    if not isinstance(counts, jax.core.Tracer):
        known = np.asarray(counts)
        if np.any(known < 1) or np.any(known.sum(-1) != num_heads):
            raise ValueError(
                f"sizes: expected positive ints that sum to {num_heads}, got {known.tolist()}."
            )
    ends = jnp.cumsum(counts, axis=-1)[..., None, :]
    head = jnp.arange(num_heads, dtype=ends.dtype)[:, None]
    later = jnp.expand_dims(head, range(ends.ndim - 2)) >= ends
    return jnp.sum(later, axis=-1, dtype=jnp.int32)


def allocate(norms: Float[Array, "*B K"], num_heads: int) -> Int[Array, "*B K"]:
    """How many of N query heads read each key head: about in proportion to `norms`, 1 at least.

    A norm that is not finite counts as 0, as does a negative one that is traced.

    Raises:
      ValueError: fewer query heads than key heads, or a negative norm.
    """
    groups = norms.shape[-1]
    if not 1 <= groups <= num_heads:
        raise ValueError(
            f"num_heads: expected at least one query head to each of {groups} key heads, got "
            f"{num_heads}."
        )
    if not isinstance(norms, jax.core.Tracer) and np.any(np.asarray(norms) < 0):
        raise ValueError(f"norms: expected no negative number, got {norms}.")
    return _allocated(jax.lax.stop_gradient(norms), num_heads)


@functools.partial(jax.jit, static_argnums=1)
def _allocated(norms: Float[Array, "*B K"], num_heads: int) -> Int[Array, "*B K"]:
    (wide,) = widened(norms)
    groups = norms.shape[-1]
    # Small enough that neither the sum nor its reciprocal leaves the range of float32.
    wide = jnp.where(jnp.isfinite(wide) & (wide > 0), wide, 0) * 2.0**-16
    total = jnp.sum(wide, axis=-1, keepdims=True)
    share = jnp.where(total > 0, wide / jnp.where(total > 0, total, 1), 1 / groups)
    wanted = num_heads * share

    def one(at: Array, condition: Array) -> Array:
        return jax.nn.one_hot(at, groups, dtype=jnp.int32) * condition.astype(jnp.int32)

    def step(_: Any, sizes: Array) -> Array:
        missing = num_heads - jnp.sum(sizes, axis=-1, keepdims=True)
        rest = wanted - sizes.astype(wanted.dtype)
        more = one(jnp.argmax(rest, axis=-1), missing > 0)
        fewer = one(jnp.argmin(jnp.where(sizes > 1, rest, jnp.inf), axis=-1), missing < 0)
        return sizes + more - fewer

    start = jnp.maximum(jnp.floor(wanted), 1).astype(jnp.int32)
    return jax.lax.fori_loop(0, groups, step, start)
