"""Dropout from a counter: whether a pair is kept depends on its position and the key alone.

Every implementation, whatever its tiles, therefore drops the same pairs, and the backward pass
recomputes the mask instead of storing it.  The counter is hashed by Threefry-2x32 with 20 rounds
(Salmon et al. 2011), the function behind JAX's default random bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

from attnlab.core.terms import At
from pallas_kernels.flash.threefry import threefry_2x32


def key_words(key: Any, name: str = "dropout_key") -> UInt32[Array, "2"]:
    """Two words of any JAX random key, typed or raw; `name` is the argument's.

    Raises:
      TypeError: `key` is not a random key.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    if getattr(key, "dtype", None) != jnp.uint32 or key.ndim != 1:
        raise TypeError(f"{name}: expected one JAX random key, got {key!r}.")
    if key.shape[0] > 2:  # implementations with longer keys
        key = key[:2] ^ key[-2:]
    return key


def keep_mask(
    words: UInt32[Array, "2"], rate: float, at: At, batch: tuple[int, ...], first: Any = 0
) -> Bool[Array, "*B N t s"]:
    """True for the pairs that are kept, each with probability 1 - rate.

    `first`: number of the first batch entry.
    """
    return pair_bits(words, at, batch, first) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def pair_bits(
    words: UInt32[Array, "2"], at: At, batch: tuple[int, ...], first: Any = 0
) -> UInt32[Array, "*B N t s"]:
    """Random bits of each pair: of its batch entry, head and positions, whatever the tile."""
    rank = at.query.ndim
    number = jnp.arange(int(np.prod(batch, dtype=np.int64)), dtype=jnp.uint32)
    number = (number + jnp.asarray(first, jnp.uint32)).reshape(*batch, 1, 1, 1)

    def word(x: Array) -> UInt32[Array, "..."]:
        return jnp.broadcast_to(x, x.shape).astype(jnp.uint32)

    def spread(x: Array, shape: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(x, shape)

    heads = np.broadcast_shapes(number.shape, at.head.shape)
    first, second = (words[i].reshape((1,) * rank) for i in range(2))
    own = threefry_2x32((first, second), (spread(number, heads), spread(word(at.head), heads)))
    shape = np.broadcast_shapes(heads, at.query.shape, at.key.shape)
    bits, _ = threefry_2x32(own, (spread(word(at.query), shape), spread(word(at.key), shape)))
    return bits
