"""Normalisers, row by row, against their formulas, and what each promises about its rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import attention, normalizers
from attnlab import scores as modifiers
from tests import oracles
from tests.tolerances import assert_close

SINK = np.array([0.3, -1.0], np.float32)
NORMALIZERS = {
    "softmax": (normalizers.Softmax(), oracles.softmax()),
    "softmax with sink": (normalizers.Softmax(jnp.asarray(SINK)), oracles.softmax(SINK)),
    "softmax plus one": (normalizers.SoftmaxPlusOne(), oracles.softmax_plus_one()),
    "sigmoid": (normalizers.Sigmoid(), oracles.sigmoid()),
    "softplus l1": (normalizers.SoftplusL1(), oracles.softplus_l1()),
    "relu squared": (normalizers.ReluSquared(), oracles.relu_squared()),
    "sparsemax": (normalizers.Sparsemax(), oracles.sparsemax()),
    "entmax 1.5": (normalizers.Entmax15(), oracles.entmax15()),
}
SUM_TO_ONE = ("softmax", "softplus l1", "sparsemax", "entmax 1.5")
ROW_ONLY = ("sparsemax", "entmax 1.5")


def weights_of(normalizer, scores, mask=None, implementation="reference"):
    """The weights themselves: scores come in as a bias on nothing, values are the unit vectors."""
    out = _read_unit_vectors(jnp.asarray(scores), mask, normalizer, implementation)
    return np.moveaxis(np.asarray(out), -2, -3)


@functools.partial(jax.jit, static_argnames="implementation")
def _read_unit_vectors(scores, mask, normalizer, implementation):
    heads, queries, keys = scores.shape[-3:]
    return attention(
        jnp.zeros((queries, heads, 2)),
        jnp.zeros((keys, heads, 2)),
        jnp.broadcast_to(jnp.eye(keys)[:, None, :], (keys, heads, keys)),
        mask=mask,
        modifiers=modifiers.Bias(scores),
        normalizer=normalizer,
        implementation=implementation,
    )


def rows(seed, magnitude, keys=9):
    rng = np.random.default_rng(seed)
    scores = (magnitude * rng.standard_normal((2, 4, keys))).astype(np.float32)
    allowed = rng.random((2, 4, keys)) < 0.8
    allowed[0, 1], allowed[1, 2] = False, np.arange(keys) == 3
    scores[0, 0] = scores[0, 0, 0]  # all alike
    scores[1, 0, :4] = scores[1, 0].max()  # a tie at the top
    return scores, allowed


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("name", NORMALIZERS)
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), magnitude=st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0, 1e4]))
def test_weights_equal_the_formula(name, implementation, seed, magnitude):
    if implementation == "blockwise" and name in ROW_ONLY:
        return
    scores, allowed = rows(seed, magnitude)
    normalizer, oracle = NORMALIZERS[name]
    expected, _ = oracle(scores.astype(np.float64), allowed, np.asarray)
    got = weights_of(normalizer, scores, jnp.asarray(allowed), implementation)
    assert_close(got, expected, np.float32)
    np.testing.assert_array_equal(got[~allowed], 0.0)
    if name in SUM_TO_ONE:
        sums = np.sum(got, axis=-1)
        assert_close(sums, np.where(allowed.any(-1), 1.0, 0.0), np.float32)


@pytest.mark.parametrize("name", ROW_ONLY)
def test_sparse_weights_have_exact_zeros_and_the_right_support(name):
    rng = np.random.default_rng(0)
    scores = (3 * rng.standard_normal((1, 50, 100))).astype(np.float32)
    normalizer, oracle = NORMALIZERS[name]
    expected, _ = oracle(scores.astype(np.float64), np.ones_like(scores, bool), np.asarray)
    got = weights_of(normalizer, scores)
    assert_close(got, expected, np.float32)
    assert np.mean(got == 0) > 0.5
    clear = np.abs(expected) > 1e-5
    np.testing.assert_array_equal((got > 0)[clear], (expected > 0)[clear])


@pytest.mark.parametrize("name", ROW_ONLY)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_long_nearly_flat_rows_stay_exact(name, spread):
    rng = np.random.default_rng(1)
    scores = (spread * rng.standard_normal((1, 2, 1000))).astype(np.float32)
    normalizer, oracle = NORMALIZERS[name]
    expected, _ = oracle(scores.astype(np.float64), np.ones_like(scores, bool), np.asarray)
    got = weights_of(normalizer, scores)
    # A weight is of the size 1/1000; it should be right relative to that, not to one.
    assert np.max(np.abs(got - expected)) < 1e-3 * np.max(expected)
    assert_close(np.sum(got, -1), np.ones((1, 2)), np.float32)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_gradients_equal_differences_of_the_formula(name, rng):
    normalizer, oracle = NORMALIZERS[name]
    scores, allowed = rows(7, 1.0)
    scores[1, 0] += 0.1 * rng.standard_normal(9).astype(np.float32)  # no ties: kinks have no slope
    scores[0, 0] += 0.1 * rng.standard_normal(9).astype(np.float32)
    read = rng.standard_normal(scores.shape)

    def value(scores):
        return jnp.sum(weights_in_jax(scores) * jnp.asarray(read, jnp.float32))

    def weights_in_jax(scores):
        out = _read_unit_vectors(scores, jnp.asarray(allowed), normalizer, "reference")
        return jnp.moveaxis(out, -2, -3)

    gradient = np.asarray(jax.grad(value)(jnp.asarray(scores)))
    np.testing.assert_array_equal(gradient[~allowed], 0.0)
    for _ in range(3):
        direction = rng.standard_normal(scores.shape)
        slope = oracles.directional(
            lambda s: np.sum(oracle(s, allowed, np.asarray)[0] * read),
            (scores.astype(np.float64),),
            (direction,),
            step=1e-6,
        )
        assert_close(np.sum(gradient * direction), slope, np.float32, "gradient")


def test_softplus_does_not_underflow_to_nothing():
    scores = np.full((2, 1, 5), -200.0, np.float32)
    scores[:, :, 1] = -201.0
    expected = np.exp(scores[0, 0] - scores[0, 0].max())
    got = weights_of(normalizers.SoftplusL1(), scores)
    assert_close(got[0, 0], expected / expected.sum(), np.float32)


def test_a_sink_takes_weight_from_the_keys():
    scores = np.zeros((2, 1, 3), np.float32)
    got = weights_of(normalizers.Softmax(jnp.asarray([np.log(3.0), -50.0], jnp.float32)), scores)
    assert_close(got[0, 0].sum(), 0.5, np.float32)
    assert_close(got[1, 0].sum(), 1.0, np.float32)
    plus_one = weights_of(normalizers.SoftmaxPlusOne(), scores)
    assert_close(plus_one[0, 0].sum(), 0.75, np.float32)
