"""Sinusoidal positions: known values, and a shift that is a rotation, as section 3.5 hopes."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention
from attnlab.positional.sinusoidal import (
    Sinusoidal,
    sinusoidal_attention,
    sinusoidal_encoding,
)
from tests import oracles
from tests.core import draw
from tests.tolerances import as_float64, assert_close


@pytest.mark.parametrize(("length", "features"), [(1, 2), (50, 16), (9, 7)])
@pytest.mark.parametrize("offset", [0, 13])
def test_the_encoding_is_the_formula(length, features, offset):
    ours = sinusoidal_encoding(length, features, offset=offset)
    assert_close(ours, oracles.sinusoidal(length, features, offset=offset), np.float32)


def test_known_values():
    ours = sinusoidal_encoding(2, 4)
    assert_close(ours[0], [0, 1, 0, 1], np.float32)
    assert_close(ours[1], [np.sin(1), np.cos(1), np.sin(0.01), np.cos(0.01)], np.float32)


def test_a_shift_is_one_linear_map_for_all_positions():
    waves = as_float64(sinusoidal_encoding(60, 8))
    shift, *_ = np.linalg.lstsq(waves[:40], waves[7:47], rcond=None)
    assert np.max(np.abs(waves[:50] @ shift - waves[7:57])) < 1e-4


def test_the_module_adds_waves_to_embeddings_and_attends_plainly(rng):
    x = rng.standard_normal((2, 9, 16)).astype(np.float32)
    ours = Sinusoidal().embed(jnp.asarray(x), offset=4)
    assert_close(ours, x + oracles.sinusoidal(9, 16, offset=4), np.float32)
    arrays = tuple(map(jnp.asarray, draw.inputs(draw.SIZES[1], 0)))
    np.testing.assert_array_equal(Sinusoidal()(*arrays), attention(*arrays))


def test_the_function_adds_them_to_queries_and_keys():
    query, key, value = map(as_float64, draw.inputs(draw.SIZES[1], 0))
    ours = sinusoidal_attention(
        *(jnp.asarray(x, jnp.float32) for x in (query, key, value)), query_offset=3
    )
    exact = oracles.attention(
        query + oracles.sinusoidal(5, 8, offset=3)[:, None],
        key + oracles.sinusoidal(7, 8)[:, None],
        value,
    )
    assert_close(ours, exact, np.float32)
