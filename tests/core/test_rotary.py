"""Rotations by given positions: those of the formula, in any order, per batch entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.rotary import rotate
from tests import oracles
from tests.tolerances import as_float64, assert_close


def numbers(rng):
    return jnp.asarray(rng.standard_normal((2, 7, 3, 8)), jnp.float32)


@pytest.mark.parametrize("interleaved", [True, False])
def test_each_token_is_turned_by_its_own_position(rng, interleaved):
    x, place = numbers(rng), rng.integers(0, 50, (2, 7))
    formula = oracles.rope_interleaved if interleaved else oracles.rope
    exact = np.zeros(x.shape)
    for b, t in np.ndindex(2, 7):
        exact[b, t] = formula(as_float64(x)[b, t : t + 1], offset=place[b, t])[0]
    out = rotate(x, position=jnp.asarray(place), interleaved=interleaved)
    assert_close(out, exact, np.float32)
    shared = rotate(x, position=jnp.asarray(place[0]), interleaved=interleaved)
    np.testing.assert_array_equal(shared[0], out[0])


def test_consecutive_positions_are_what_is_meant_by_none(rng):
    x = numbers(rng)
    place = jnp.arange(7)
    np.testing.assert_array_equal(rotate(x, position=place + 3), rotate(x, offset=3))
    np.testing.assert_array_equal(rotate(x, position=place, offset=3), rotate(x, offset=3))


def test_positions_may_be_traced_and_mapped(rng):
    x, place = numbers(rng), jnp.asarray(rng.integers(0, 50, (2, 7)))
    mapped = jax.jit(jax.vmap(lambda y, p: rotate(y, position=p)))(x, place)
    assert_close(mapped, as_float64(rotate(x, position=place)), np.float32)


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        (jnp.arange(6), ValueError, r"position.*\(7,\) or \(2, 7\).*\(6,\)"),
        (jnp.zeros((3, 7), jnp.int32), ValueError, r"position.*\(2, 7\).*\(3, 7\)"),
        (jnp.zeros((7,)), TypeError, r"position.*integers.*float32"),
    ],
)
def test_bad_positions_are_refused_by_name(rng, place, error, words, as_users_run_it):
    with pytest.raises(error, match=words):
        rotate(numbers(rng), position=place)
