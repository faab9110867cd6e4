"""Rotations of pairs of channels by an angle proportional to position."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.core.terms import accumulator


def rotate(
    x: Float[Array, "*B T N H"], *, offset: Any = 0, position: Int[Array, "*P T"] | None = None,
    theta: float = 10_000.0, interleaved: bool = True,
) -> Float[Array, "*B T N H"]:  # fmt: skip
    """`x` with position t rotated by offset + t; angles are computed in float32 at least.

    Pair c of H / 2 has the frequency theta^(-2c/H).  `position` "*B T" or "T": other positions.

    Raises:
      ValueError: H is odd, or theta is not positive.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"query, key: rotations need an even head width, got {width}.")
    if theta <= 0:
        raise ValueError(f"theta: expected a positive number, got {theta}.")
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=accumulator(x.dtype)) / width)
    return turned(x, frequency, offset=offset, position=position, interleaved=interleaved)


def turned(
    x: Float[Array, "*B T N H"],
    frequency: Float[Array, " P"],
    *,
    offset: Any = 0,
    position: Int[Array, "*Q T"] | None = None,
    interleaved: bool = True,
) -> Float[Array, "*B T N H"]:
    """`x` with its P = H / 2 pairs at position t turned by (offset + t) frequency.

    Pairs are neighbours (2c, 2c + 1), or (c, c + P) where not `interleaved`.  Angles are computed
    in float32 at least.  `position`: integers "*B T" or "T" in place of 0, 1, 2, ...

    Raises:
      TypeError: positions that are no integers.
      ValueError: H is not twice the number of frequencies, or positions of another length.
    """
    width = x.shape[-1]
    if width != 2 * frequency.shape[-1]:
        raise ValueError(
            "query, key: rotations need an even head width, twice the number of frequencies, "
            f"{frequency.shape[-1]}, got {width}."
        )
    dtype = accumulator(x.dtype)
    place = jnp.arange(x.shape[-3], dtype=jnp.int32) if position is None else jnp.asarray(position)
    _check_places(place, x)
    place = (place.astype(jnp.int32) + offset).astype(dtype)
    place = jnp.expand_dims(place, range(x.ndim - 2 - place.ndim))
    angle = place[..., None, None] * jnp.expand_dims(frequency.astype(dtype), range(x.ndim - 1))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    wide = x.astype(dtype)
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    if interleaved:
        return jnp.stack(pair, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(pair, axis=-1).astype(x.dtype)


def _check_places(place: Array, x: Array) -> None:
    if not jnp.issubdtype(place.dtype, jnp.integer):
        raise TypeError(f"position: expected integers, got dtype {place.dtype}.")
    shape, batch = place.shape, x.shape[:-3]
    fits = shape[-1:] == x.shape[-3:-2] and shape[:-1] in ((), batch)
    if not fits:
        raise ValueError(
            f"position: expected shape {x.shape[-3:-2]} or {(*batch, x.shape[-3])}, got {shape}."
        )
