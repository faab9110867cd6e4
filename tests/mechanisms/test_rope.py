"""RoPE: scores depend on positions only through their difference; rotations keep lengths."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.rotary import rotate
from attnlab.positional.rope import rope_attention
from tests import oracles
from tests.core import draw
from tests.tolerances import as_float64, assert_close


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("offset", [0, 37])
def test_the_rotation_is_the_formula(interleaved, theta, offset, rng):
    x = rng.standard_normal((2, 9, 2, 8)).astype(np.float32)
    turn = oracles.rope_interleaved if interleaved else oracles.rope
    ours = rotate(jnp.asarray(x), offset=offset, theta=theta, interleaved=interleaved)
    assert_close(ours, turn(as_float64(x), offset=offset, base=theta), np.float32)


def test_two_thetas_are_two_rotations(rng):
    """No cache may hand the frequencies of one theta to another."""
    x = jnp.asarray(rng.standard_normal((64, 1, 8)), jnp.float32)
    first, second = rotate(x, theta=1e4), rotate(x, theta=5e5)
    assert np.max(np.abs(first - second)) > 0.5


@pytest.mark.parametrize("interleaved", [True, False])
def test_products_depend_on_the_difference_alone(interleaved, rng):
    query, key = (jnp.asarray(rng.standard_normal((1, 1, 16)), jnp.float32) for _ in range(2))

    def product(i, j):
        turned = (
            rotate(query, offset=i, interleaved=interleaved),
            rotate(key, offset=j, interleaved=interleaved),
        )
        return float(jnp.sum(turned[0] * turned[1]))

    for difference in (0, 1, 7, -5):
        at_start = product(10, 10 + difference)
        for shift in (1, 90, 400):
            assert abs(product(10 + shift, 10 + shift + difference) - at_start) < 1e-3
    assert abs(product(0, 1) - product(0, 2)) > 1e-3


def test_rotations_keep_lengths_and_start_at_rest(rng):
    x = rng.standard_normal((50, 2, 8)).astype(np.float32)
    turned = as_float64(rotate(jnp.asarray(x)))
    assert_close(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(as_float64(x), axis=-1), np.float32
    )
    np.testing.assert_array_equal(turned[0], as_float64(x)[0])


def test_the_two_pairings_are_one_up_to_a_permutation(rng):
    x = rng.standard_normal((9, 1, 8)).astype(np.float32)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    halves = rotate(jnp.asarray(x[..., order]), interleaved=False)
    np.testing.assert_allclose(halves, np.asarray(rotate(jnp.asarray(x)))[..., order], rtol=1e-6)


def test_bad_widths_and_bases_are_refused(as_users_run_it):
    x = jnp.ones((4, 1, 5))
    with pytest.raises(ValueError, match="even head width, got 5"):
        rope_attention(x, x, x)
    with pytest.raises(ValueError, match="theta: expected a positive number, got 0"):
        rotate(jnp.ones((4, 1, 4)), theta=0)


def test_attention_with_offsets_of_a_decoder():
    query, key, value = draw.inputs(draw.Sizes((), 1, 12, 2, 1, 8, 8), 0)
    ours = rope_attention(*map(jnp.asarray, (query, key, value)), query_offset=11)
    exact = oracles.attention(
        oracles.rope_interleaved(query, offset=11), oracles.rope_interleaved(key), as_float64(value)
    )
    assert_close(ours, exact, np.float32)
