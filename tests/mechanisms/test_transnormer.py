"""TransNormer: two rules of decay, angles by difference, one norm for all heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention
from attnlab.core.gates import rms_unit
from attnlab.core.recurrence import FORMS
from attnlab.linear.transnormer import TransNormer, lightning_attention, lightning_decay
from tests import oracles
from tests.tolerances import as_float64, assert_close, assert_reordered


def silu(x):
    return x / (1 + np.exp(-x))


def quadratic(query, key, value, log_decay, theta=None):
    query, key = silu(as_float64(query)), silu(as_float64(key))
    out = np.zeros(value.shape)
    for n, g in enumerate(log_decay):
        for t in range(len(query)):
            for s in range(t + 1):
                turn = 1.0 if theta is None else np.cos(as_float64(theta)[n] * (t - s))
                score = np.sum(query[t, n] * key[s, n] * turn) * np.exp(g * (t - s))
                out[t, n] += score * as_float64(value)[s, n]
    return out


def numbers(rng, length, heads=2, width=4):
    return [jnp.asarray(rng.standard_normal((length, heads, width)), jnp.float32) for _ in range(3)]


@pytest.mark.parametrize("form", FORMS)
def test_lightning_attention_is_the_damped_score_matrix(form, rng):
    arrays = numbers(rng, 21)
    theta = jnp.asarray(rng.uniform(0, 2, (2, 4)), jnp.float32)
    slopes = [-(2.0**-4) * 1.00001, -(2.0**-8) * 1.00001]
    for angles in (None, theta):
        out = lightning_attention(*arrays, theta=angles, implementation=form, chunk_size=8)
        assert_close(out, quadratic(*arrays, slopes, angles), np.float32)


def test_the_two_rules_of_decay():
    for layer in range(4):
        release = lightning_decay(6, layer=layer, num_layers=4)
        assert_close(release, -oracles.alibi_slopes(6) * (1 - layer / 3 + 1e-5), np.float32)
        paper = lightning_decay(8, layer=layer, num_layers=4, rule="paper")
        assert_close(paper, -np.arange(8) * (1 - layer / 4), np.float32)
    assert np.max(np.abs(lightning_decay(8) - lightning_decay(8, rule="paper"))) > 1


def test_powers_of_the_decay_overflow_and_states_do_not(rng):
    """(q lambda^t)(k lambda^-t), the same on paper, is infinite after some hundred steps."""
    length = 4096
    query, key, value = numbers(rng, length, heads=1)
    g = jnp.asarray([-0.5])
    power = jnp.exp(-g * jnp.arange(length, dtype=jnp.float32))[:, None, None]
    assert not bool(jnp.all(jnp.isfinite(key * power)))
    out = lightning_attention(query, key, value, log_decay=g)
    tail = lightning_attention(*(x[-200:] for x in (query, key, value)), log_decay=g)
    assert_reordered(out[-50:], tail[-50:], np.float32)


def test_angles_count_by_difference(rng):
    arrays, theta = numbers(rng, 9), jnp.asarray(rng.uniform(0, 2, (2, 4)), jnp.float32)
    at_zero = lightning_attention(*arrays, theta=theta)
    moved = lightning_attention(*arrays, theta=theta, query_offset=50, key_offset=50)
    assert_close(moved, as_float64(at_zero), np.float32, scale=50.0)
    assert np.max(np.abs(at_zero - lightning_attention(*arrays))) > 1e-2


def test_the_norm_is_over_all_heads_and_forgets_scale(rng):
    mechanism = TransNormer(8, 2, 4, 4, rngs=nnx.Rngs(0))
    out, x = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 2, 4), (5, 8)))
    gate = as_float64(x) @ as_float64(mechanism.gate.weight[...])
    flat = as_float64(out).reshape(5, 8)
    exact = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6) * gate
    assert_close(mechanism.finish(out, x), exact.reshape(5, 2, 4), np.float32)
    assert_close(mechanism.finish(100 * out, x), exact.reshape(5, 2, 4), np.float32, scale=10.0)
    per_head = rms_unit(out, epsilon=1e-6).reshape(5, 8) * gate
    assert np.max(np.abs(per_head - exact)) > 1e-3


def test_the_first_layer_alone_has_angles():
    first, last = (
        TransNormer(8, 2, 4, 4, layer=n, num_layers=2, rngs=nnx.Rngs(0)) for n in range(2)
    )
    assert_close(first.theta[...].reshape(8), 10_000.0 ** (-2 * np.arange(8) / 8), np.float32)
    assert last.theta is None
    assert first.init_state((), 2, 4, 4).shape == (2, 8, 4)
    assert last.init_state((), 2, 4, 4).shape == (2, 4, 4)


@pytest.mark.parametrize("layer", [0, 1])
def test_decoding_needs_a_state_alone(layer, rng):
    mechanism = TransNormer(16, 4, 4, 6, layer=layer, num_layers=2, rngs=nnx.Rngs(0))
    mha = MultiHeadAttention(
        16, 4, num_kv_heads=2, value_width=6, mechanism=mechanism, rngs=nnx.Rngs(1)
    )
    x = jnp.asarray(rng.standard_normal((2, 10, 16)), jnp.float32)
    whole, cache = mha(x), mha.create_cache((2,), 10)
    for first, last in ((0, 6), (6, 7), (7, 10)):
        out, cache = mha(x[:, first:last], cache=cache)
        assert_reordered(out, whole[:, first:last], np.float32)


def test_bad_input_is_refused_by_name(as_users_run_it):
    array = jnp.ones((5, 2, 4))
    with pytest.raises(ValueError, match=r"theta.*\(2, 4\).*\(4,\)"):
        lightning_attention(array, array, array, theta=jnp.ones((4,)))
    with pytest.raises(ValueError, match=r"layer.*0 to 1.*2"):
        TransNormer(8, 2, 4, 4, layer=2, num_layers=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"rule.*release, paper.*'magic'"):
        lightning_decay(4, rule="magic")
    slope = jax.grad(lambda x: jnp.sum(lightning_attention(x, x, x)))(jnp.zeros((3, 2, 4)))
    assert bool(jnp.all(jnp.isfinite(slope)))
