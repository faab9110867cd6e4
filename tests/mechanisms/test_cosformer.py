"""cosFormer: the cosine of a distance splits into features; weights are local and not negative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.linear.cosformer import CosFormer, cosformer_attention
from tests import oracles
from tests.contract.feature_formulas import cosformer
from tests.tolerances import as_float64, assert_close, assert_reordered


def problem(rng, queries=17, keys=17):
    shapes = ((2, queries, 4, 3), (2, keys, 2, 3), (2, keys, 2, 5))
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("max_length", [None, 17, 40])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_features_are_the_cosine(mask, max_length, rng):
    arrays = problem(rng)
    ours = cosformer_attention(
        *map(jnp.asarray, arrays), max_length=max_length, mask=mask and masks.Causal()
    )
    exact = cosformer(max_length or 17)(
        {}, *map(as_float64, arrays), mask=mask and oracles.causal()
    )
    assert_close(ours, exact, np.float32)


def test_features_are_the_cosine_across_sequences(rng):
    arrays = problem(rng, 5, 23)
    ours = cosformer_attention(*map(jnp.asarray, arrays), query_offset=2)
    exact = cosformer(23)({}, *map(as_float64, arrays), query_offset=2)
    assert_close(ours, exact, np.float32)


def weights_of(query, key, **options):
    """The weights of each query, by values that are unit vectors."""
    count = len(key)
    eye = jnp.broadcast_to(jnp.eye(count)[:, None], (count, 1, count))
    out = cosformer_attention(jnp.asarray(query), jnp.asarray(key), eye, **options)
    return as_float64(out)[:, 0]


def test_weights_are_a_distribution(rng):
    query, key = (rng.standard_normal((17, 1, 16)).astype(np.float32) for _ in range(2))
    weights = weights_of(query, key)
    assert np.all(weights >= -1e-7)
    assert_close(weights.sum(-1), np.ones(17), np.float32)


def test_weights_fall_with_the_distance():
    ones = np.ones((17, 1, 4), np.float32)
    weights = weights_of(ones, ones)
    for t, row in enumerate(weights):
        assert np.all(np.diff(row[t:]) < -1e-4)
        assert np.all(np.diff(row[: t + 1]) > 1e-4)
    flat = weights_of(ones, ones, max_length=17 * 1000)
    assert np.ptp(flat) < 1e-5  # far below its M, distance does not matter


def test_decoding_needs_one_length_from_first_to_last(rng):
    query, key, value = (jnp.asarray(x) for x in problem(rng))
    module, growing = CosFormer(40), CosFormer()
    whole = as_float64(module(query, key, value, mask=masks.Causal()))
    state = module.init_state((2,), 2, 3, 5)
    assert growing.init_state((2,), 2, 3, 5) is None
    differs = 0.0

    @jax.jit
    def step(state, t, *row):
        at = {"query_offset": t, "key_offset": t, "initial_state": state, "return_state": True}
        return module(*row, mask=masks.Causal(), **at)

    for t in range(17):
        here, past = slice(t, t + 1), slice(0, t + 1)
        out, state = step(
            state, jnp.asarray(t, jnp.int32), *(x[:, here] for x in (query, key, value))
        )
        assert_reordered(out[:, 0], whole[:, t], np.float32)
        if t in (4, 9):
            out = growing(query[:, here], key[:, past], value[:, past], query_offset=t)
            differs = max(differs, np.max(np.abs(as_float64(out)[:, 0] - whole[:, t])))
    assert state.shape == (2, 2, 6, 6)
    assert differs > 1e-3


def test_a_position_of_millions_is_as_exact_as_one_of_tens(rng):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    far = {"query_offset": 123_456_789, "key_offset": 123_456_789}
    near, moved = (
        cosformer_attention(*arrays, max_length=40, mask=masks.Causal(), **at) for at in ({}, far)
    )
    assert_reordered(moved, as_float64(near), np.float32)


def test_a_query_without_products_gives_zeros(rng):
    query, key, value = (jnp.asarray(x) for x in problem(rng))
    out = cosformer_attention(-jnp.abs(query), key, value)
    np.testing.assert_array_equal(as_float64(out), 0)


def test_wrong_input_is_refused_by_name(rng, as_users_run_it):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    for options in ({"max_length": 0}, {"max_length": 8}, {"max_length": 17, "query_offset": 9}):
        with pytest.raises(ValueError, match=r"max_length.*got"):
            cosformer_attention(*arrays, **options)
    with pytest.raises(ValueError, match="max_length"):
        CosFormer(-1)
