"""Rotations of pairs of channels by an angle proportional to position."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.terms import accumulator


def turned(
    x: Float[Array, "*B T N H"],
    frequency: Float[Array, " P"],
    *,
    offset: Any = 0,
    interleaved: bool = True,
) -> Float[Array, "*B T N H"]:
    """`x` with its P = H / 2 pairs at position t turned by (offset + t) frequency.

    Pairs are neighbours (2c, 2c + 1), or (c, c + P) where not `interleaved`.  Angles are computed
    in float32 at least.

    Raises:
      ValueError: H is not twice the number of frequencies.
    """
    width = x.shape[-1]
    if width != 2 * frequency.shape[-1]:
        raise ValueError(
            "query, key: rotations need an even head width, twice the number of frequencies, "
            f"{frequency.shape[-1]}, got {width}."
        )
    dtype = accumulator(x.dtype)
    position = (jnp.arange(x.shape[-3], dtype=jnp.int32) + offset).astype(dtype)
    angle = position[:, None] * frequency.astype(dtype)[None, :]
    angle = angle.reshape((1,) * (x.ndim - 3) + (angle.shape[0], 1, width // 2))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    wide = x.astype(dtype)
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    if interleaved:
        return jnp.stack(pair, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(pair, axis=-1).astype(x.dtype)
