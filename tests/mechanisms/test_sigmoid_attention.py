"""Ramapuram et al.: b = -log n keeps rows near one at any length; tiles simply add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.normalization.sigmoid_attention import SigmoidAttention, sigmoid_attention
from tests import oracles
from tests.core import draw
from tests.tolerances import as_float64, assert_close


@pytest.mark.parametrize("n", [64, 512, 4096])
def test_rows_sum_to_about_one_with_the_bias_and_to_half_n_without(n, rng):
    query = jnp.asarray(0.1 * rng.standard_normal((8, 1, 16)), jnp.float32)
    key = jnp.asarray(0.1 * rng.standard_normal((n, 1, 16)), jnp.float32)
    ones = jnp.ones((n, 1, 1))
    with_bias = np.asarray(sigmoid_attention(query, key, ones))
    assert np.all(np.abs(with_bias - 1) < 0.05)
    without = np.asarray(sigmoid_attention(query, key, ones, bias=0.0))
    assert np.all(np.abs(without / (n / 2) - 1) < 0.05)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_tiles_of_keys_add_up_to_the_whole(implementation):
    query, key, value = map(jnp.asarray, draw.inputs(draw.SIZES[3], 0))
    options = {"bias": -3.7, "implementation": implementation}
    whole = sigmoid_attention(query, key, value, **options)
    parts = [
        sigmoid_attention(query, key[:, :, a:b], value[:, :, a:b], key_offset=a, **options)
        for a, b in ((0, 13), (13, 26), (26, 40))
    ]
    assert np.max(np.abs(sum(map(as_float64, parts)) - as_float64(whole))) < 1e-6


def test_the_default_bias_is_minus_log_of_the_number_of_keys():
    arrays = draw.inputs(draw.SIZES[1], 0)
    exact = oracles.attention(
        *map(as_float64, arrays),
        modifiers=[oracles.bias(np.full((1, 1, 1), -np.log(7.0)))],
        normalizer=oracles.sigmoid(),
    )
    assert_close(sigmoid_attention(*map(jnp.asarray, arrays)), exact, np.float32)
    assert_close(SigmoidAttention()(*map(jnp.asarray, arrays)), exact, np.float32)
    assert_close(SigmoidAttention(length=7)(*map(jnp.asarray, arrays)), exact, np.float32)


def test_the_bias_may_be_learned_per_head():
    arrays = tuple(map(jnp.asarray, draw.inputs(draw.SIZES[1], 0)))
    bias = jnp.asarray([-1.0, -2.0, 0.0, 1.0])

    def loss(bias):
        return jnp.sum(sigmoid_attention(*arrays, bias=bias))

    gradient = jax.grad(loss)(bias)
    for n in range(4):
        step = jnp.zeros(4).at[n].set(1e-2)
        slope = (loss(bias + step) - loss(bias - step)) / 2e-2
        assert abs(float(gradient[n] - slope)) < 1e-2 * max(1.0, abs(float(slope)))


def test_bad_calls_are_refused():
    x = jnp.ones((4, 1, 2))
    with pytest.raises(ValueError, match="length: expected a positive int or None, got 0"):
        SigmoidAttention(length=0)
    with pytest.raises(ValueError, match="return_lse: Sigmoid"):
        sigmoid_attention(x, x, x, return_lse=True)
