"""Linear transformer: an RNN whose state does not grow, and weights of a rank that does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.linear.linear_transformer import (
    LinearTransformer,
    elu_plus_one,
    linear_transformer_attention,
)
from tests.tolerances import as_float64, assert_close, assert_reordered


def phi(x):
    return np.where(x > 0, x + 1.0, np.exp(np.minimum(x, 0.0)))


def problem(rng, length=16, width=4, dtype=np.float32):
    return [rng.standard_normal((1, length, 2, width)).astype(dtype) for _ in range(3)]


def test_a_causal_transformer_is_an_rnn(rng):
    """Section 3.4 of the paper, in its own two sums: s of outer products, z of keys."""
    query, key, value = problem(rng, dtype=np.float64)
    with jax.enable_x64(True):
        ours = linear_transformer_attention(
            *map(jnp.asarray, (query, key, value)), mask=masks.Causal(), implementation="parallel"
        )
        assert ours.dtype == jnp.float64
        ours = np.asarray(ours)
    for n in range(2):
        s, z = np.zeros((4, 4)), np.zeros(4)
        for t in range(16):
            k, q = phi(key[0, t, n]), phi(query[0, t, n])
            s, z = s + np.outer(k, value[0, t, n]), z + k
            assert np.max(np.abs(ours[0, t, n] - q @ s / (q @ z + 1e-6))) < 1e-12


def test_decoding_keeps_a_state_of_one_size(rng):
    query, key, value = (jnp.asarray(x) for x in problem(rng))
    module = LinearTransformer()
    whole = as_float64(module(query, key, value, mask=masks.Causal()))
    state = module.init_state((1,), 2, 4, 4)

    @jax.jit
    def step(state, t, *row):
        at = {"query_offset": t, "key_offset": t, "initial_state": state, "return_state": True}
        return module(*row, mask=masks.Causal(), **at)

    for t in range(16):
        row = (x[:, t : t + 1] for x in (query, key, value))
        out, state = step(state, jnp.asarray(t, jnp.int32), *row)
        assert_reordered(out[:, 0], whole[:, t], np.float32)
        assert state.shape == (1, 2, 4, 5)  # H by D, and the sum of keys


def test_weights_are_a_distribution_of_low_rank(rng):
    query, key, _ = problem(rng)
    eye = jnp.broadcast_to(jnp.eye(16)[None, :, None], (1, 16, 2, 16))
    out = linear_transformer_attention(jnp.asarray(query), jnp.asarray(key), eye, epsilon=0.0)
    weights = as_float64(out)[0, :, 0]
    assert np.all(weights >= 0)
    assert_close(weights.sum(-1), np.ones(16), np.float32)
    values = np.linalg.svd(weights, compute_uv=False)
    assert values[4] < 1e-6 * values[0]  # rank H; that of softmax is 16
    scores = np.exp(query[0, :, 0] @ key[0, :, 0].T)
    values = np.linalg.svd(scores / scores.sum(-1, keepdims=True), compute_uv=False)
    assert values[4] > 1e-3 * values[0]


def test_features_stay_positive_where_elu_plus_one_is_rounded_away():
    x = jnp.asarray([-80.0, -20.0, -1.0, 0.0, 2.0, 1e30], jnp.float32)
    assert_close(elu_plus_one(x[:5]), phi(as_float64(x[:5])), np.float32)
    assert float(elu_plus_one(x)[1]) > 0 == float(jax.nn.elu(x)[1] + 1)
    assert np.all(np.isfinite(jax.vmap(jax.grad(elu_plus_one))(x)))


def test_the_epsilon_of_the_authors_outweighs_features_that_are_all_small(rng):
    query, key, value = (jnp.asarray(x) for x in problem(rng))
    with_it, without = (
        as_float64(linear_transformer_attention(query - 12, key - 12, value, epsilon=e))
        for e in (1e-6, 0.0)
    )
    assert np.max(np.abs(with_it)) < 1e-2 < 0.1 < np.max(np.abs(without))


def test_keys_behind_a_mask_are_left_out_though_their_feature_is_one(rng):
    query, key, value = (jnp.asarray(x) for x in problem(rng))
    hidden = linear_transformer_attention(
        query, key, value, mask=masks.KeyPadding(jnp.asarray([9]))
    )
    alone = linear_transformer_attention(query, key[:, :9], value[:, :9])
    assert_reordered(hidden, as_float64(alone), np.float32)


def test_wrong_input_is_refused_by_name(rng, as_users_run_it):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    with pytest.raises(ValueError, match="feature_map"):
        linear_transformer_attention(*arrays, feature_map=jnp.sin)
    with pytest.raises(ValueError, match="scale"):
        linear_transformer_attention(*arrays, scale=0.5)
