"""NoPE: no positions, so order is invisible without a mask, and visible through a causal one."""

import jax.numpy as jnp
import numpy as np

from attnlab import atlas, masks
from tests.core import draw
from tests.tolerances import as_float64, assert_reordered

nope = atlas.get("nope").function


def test_without_a_mask_the_order_of_keys_cannot_be_told(rng):
    query, key, value = map(jnp.asarray, draw.inputs(draw.SIZES[3], 0))
    order = rng.permutation(40)
    shuffled = nope(query, key[:, :, order], value[:, :, order])
    assert_reordered(shuffled, as_float64(nope(query, key, value)), np.float32)


def test_a_causal_mask_alone_tells_the_order():
    """Haviv et al. 2022, Kazemnejad et al. 2023: position is 1 / (weight of the first key)."""
    zero = jnp.zeros((9, 1, 2))
    first = jnp.zeros((9, 1, 1)).at[0].set(1.0)
    weight = np.asarray(nope(zero, zero, first, mask=masks.Causal()))[:, 0, 0]
    np.testing.assert_allclose(1 / weight, np.arange(1, 10), rtol=1e-6)
