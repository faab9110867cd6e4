"""RWKV-7: transitions beyond diagonal ones, with eigenvalues that stay within their bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, masks
from attnlab.core.recurrence import FORMS
from attnlab.linear.deltanet import delta_rule_attention
from attnlab.linear.gla import gated_linear_attention
from attnlab.linear.rwkv7 import RWKV7, rwkv7_attention
from tests.tolerances import as_float64, assert_close, assert_reordered


def numbers(rng, length, heads=2, width=4, dtype=np.float32):
    arrays = [jnp.asarray(rng.standard_normal((length, heads, width)), dtype) for _ in range(3)]
    shape = (length, heads, width)
    return arrays, {
        "log_decay": jnp.asarray(-0.6065306597 * rng.random(shape), dtype),
        "rate": jnp.asarray(rng.random(shape), dtype),
        "removal": jnp.asarray(rng.standard_normal((heads, width)), dtype),
        "replacement": jnp.asarray(rng.standard_normal((heads, width)), dtype),
    }


def exact(arrays, options):
    """The paper's line with its matrix, one step after the other."""
    query, key, value = (as_float64(x) for x in arrays)
    w, a, xi, alpha = (as_float64(options[n]) for n in options)
    out = np.zeros(value.shape)
    for n in range(query.shape[1]):
        state = np.zeros((query.shape[-1], value.shape[-1]))
        for t in range(query.shape[0]):
            u = key[t, n] * xi[n]
            u = u / np.linalg.norm(u)
            c = key[t, n] * (1 + (a[t, n] - 1) * alpha[n])
            move = np.diag(np.exp(w[t, n])) - np.outer(a[t, n] * u, u)
            state = move @ state + np.outer(c, value[t, n])
            out[t, n] = state.T @ query[t, n]
    return out


@pytest.mark.parametrize("form", FORMS)
def test_two_steps_a_token_are_the_papers_matrix(form, rng):
    arrays, options = numbers(rng, 21)
    out = rwkv7_attention(*arrays, **options, implementation=form, chunk_size=8)
    assert_close(out, exact(arrays, options), np.float32)


def test_eigenvalues_of_transitions_are_real_and_bounded(rng):
    """In (w_min - 1, 1), at most one below zero; yet a transition may lengthen a vector."""
    width, norms, lowest = 8, [], 0.0
    for _ in range(500):
        w = np.exp(-0.6065306597 * rng.random(width))
        a, u = rng.random(width), rng.standard_normal(width)
        u /= np.linalg.norm(u)
        move = np.diag(w) - np.outer(a * u, u)
        values = np.linalg.eigvals(move)
        assert np.max(np.abs(values.imag)) < 1e-12
        assert -0.4548 < values.real.min() <= values.real.max() < 1
        assert np.sum(values.real < 0) <= 1
        lowest, norms = min(lowest, values.real.min()), [*norms, np.linalg.norm(move, 2)]
    assert lowest < -0.05
    assert max(norms) > 1.02


@pytest.mark.parametrize(("rate", "tracked"), [(2.0, True), (1.0, False)])
def test_swaps_of_five_items_are_tracked(rate, tracked, rng):
    """With rates of 2 a token swaps two items, as the paper's proof needs; up to 1 it cannot."""
    items, swaps = 5, 200
    order, key = np.arange(items), np.zeros((swaps, 1, items))
    for t in range(swaps):
        a, b = rng.choice(items, 2, replace=False)
        key[t, 0, a], key[t, 0, b] = 1.0, -1.0
        order[[a, b]] = order[[b, a]]
    with jax.enable_x64(True):
        key, ones = jnp.asarray(key), jnp.ones((1, items), jnp.float64)
        _, state = rwkv7_attention(
            key, key, jnp.zeros(key.shape), log_decay=jnp.zeros(key.shape),
            rate=jnp.full(key.shape, rate), removal=ones, replacement=ones, return_state=True,
            initial_state=jnp.eye(items, dtype=jnp.float64)[None],
        )  # fmt: skip
    gap = np.max(np.abs(as_float64(state)[0] - np.eye(items)[order]))
    assert gap < 1e-12 if tracked else gap > 0.1


def test_without_removal_it_is_gated_linear_attention(rng):
    arrays, options = numbers(rng, 12)
    options |= {"rate": jnp.zeros_like(arrays[1]), "replacement": jnp.zeros((2, 4))}
    out = rwkv7_attention(*arrays, **options)
    gla = gated_linear_attention(*arrays, log_decay=options["log_decay"])
    assert_reordered(out, 2.0 * as_float64(gla), np.float32)  # which divides by sqrt(H)


def test_without_decay_it_is_the_delta_rule(rng):
    """One rate for all channels, keys of length 1 written as they are removed."""
    (query, key, value), options = numbers(rng, 12)
    key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    beta = options["rate"][..., 0]
    ones = jnp.ones((2, 4))
    out = rwkv7_attention(
        query, key, value, log_decay=jnp.zeros(key.shape), removal=ones, replacement=ones,
        rate=jnp.broadcast_to(beta[..., None], key.shape),
    )  # fmt: skip
    delta = delta_rule_attention(query, key, value, beta=beta, unit_keys=False)
    assert_reordered(out, 2.0 * as_float64(delta), np.float32)


def test_a_value_survives_at_least_at_the_strongest_decay(rng):
    mechanism = RWKV7(8, 2, 4, 4, rngs=nnx.Rngs(0))
    mechanism.decay[1].bias[...] = jnp.full((8,), 50.0)
    gate = mechanism.controls(jnp.asarray(rng.standard_normal((3, 8)), jnp.float32))["log_decay"]
    assert_close(jnp.exp(gate), np.full(gate.shape, np.exp(-np.exp(-0.5))), np.float32)


def test_the_first_token_passes_by_norm_and_bonus(rng):
    (query, key, value), options = numbers(rng, 1)
    gain, bias, rho = (jnp.asarray(rng.standard_normal((2, 4)), jnp.float32) for _ in range(3))
    out = rwkv7_attention(query, key, value, **options, bonus=rho, norm=(gain, bias))
    q, k, v = (as_float64(x)[0] for x in (query, key, value))
    c = k * (1 + (as_float64(options["rate"])[0] - 1) * as_float64(options["replacement"]))
    read = np.sum(q * c, -1, keepdims=True) * v
    read = read - read.mean(-1, keepdims=True)
    read = read / np.sqrt((read**2).mean(-1, keepdims=True) + 4e-5)
    given = read * as_float64(gain) + as_float64(bias)
    given += np.sum(q * as_float64(rho) * c, -1, keepdims=True) * v
    assert_close(out[0], given, np.float32)


def test_a_key_of_zero_has_a_finite_gradient(rng):
    arrays, options = numbers(rng, 5)

    def loss(key):
        return jnp.sum(jnp.cos(rwkv7_attention(arrays[0], key, arrays[2], **options)))

    assert bool(jnp.all(jnp.isfinite(jax.grad(loss)(arrays[1].at[2].set(0.0)))))


def test_a_row_that_sees_nothing_gets_no_bias(rng):
    arrays, options = numbers(rng, 6)
    ones = jnp.ones((2, 4))
    out = rwkv7_attention(
        *arrays, **options, norm=(ones, ones), bonus=ones,
        mask=masks.Segments(jnp.asarray([-1, 0, 0, -1, 1, 1])),
    )  # fmt: skip
    seen = np.any(np.asarray(out) != 0, axis=(1, 2))
    np.testing.assert_array_equal(seen, [False, True, True, False, True, True])


def test_the_layer_starts_where_the_authors_code_does():
    layers = [RWKV7(64, 2, 32, 32, layer=n, num_layers=3, rngs=nnx.Rngs(0)) for n in range(3)]
    place = np.arange(64) / 63
    u = (np.arange(64) % 32 - 15.5) / 15.5
    for n, layer in enumerate(layers):
        rise = place ** (1 + (n / 2) ** 0.3)
        assert_close(layer.decay[1].bias[...], -6 + 6 * rise + 0.5 + 2.5 * u * abs(u), np.float32)
        rate = -0.19 + 0.3 * u * abs(u) + 0.4 * (place - 0.5)
        assert_close(layer.rate[1].bias[...], rate, np.float32)
        assert_close(layer.gain[...], np.full((2, 32), ((n + 1) / 3) ** 0.7), np.float32)
        assert not np.any(layer.decay[0].weight[...])
    assert [layers[0].decay[0].weight.shape, layers[0].gate[0].weight.shape] == [(64, 32)] * 2
    wide = RWKV7(768, 12, 64, 64, rngs=nnx.Rngs(0))
    ranks = [m[0].weight.shape[1] for m in (wide.decay, wide.rate, wide.gate)]
    assert ranks == [64, 64, 128]


def test_decoding_goes_on_from_a_state(rng):
    mechanism = RWKV7(16, 4, 4, 6, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(
        16, 4, num_kv_heads=2, value_width=6, mechanism=mechanism, rngs=nnx.Rngs(1)
    )
    x = jnp.asarray(rng.standard_normal((2, 10, 16)), jnp.float32)
    whole, cache = layer(x), layer.create_cache((2,), 10)
    for first, last in ((0, 6), (6, 7), (7, 10)):
        out, cache = layer(x[:, first:last], cache=cache)
        assert_reordered(out, whole[:, first:last], np.float32)


@pytest.mark.parametrize("name", ["log_decay", "rate", "removal", "replacement"])
def test_bad_input_is_refused_by_name(name, rng, as_users_run_it):
    arrays, options = numbers(rng, 5)
    with pytest.raises(ValueError, match=rf"{name}.*\(3,\)"):
        rwkv7_attention(*arrays, **options | {name: jnp.zeros((3,))})
    with pytest.raises(ValueError, match=r"layer.*0 to 0.*1"):
        RWKV7(8, 2, 4, 4, layer=1, rngs=nnx.Rngs(0))
