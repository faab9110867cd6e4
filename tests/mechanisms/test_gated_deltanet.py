"""Gated DeltaNet: clears at once, replaces one pair alone, and reads the error after the decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention
from attnlab.core.recurrence import FORMS, linear_recurrence
from attnlab.linear.deltanet import delta_rule_attention
from attnlab.linear.gated_deltanet import GatedDeltaNet, gated_delta_rule_attention
from tests.tolerances import as_float64, assert_close, assert_reordered


def numbers(rng, length, heads=2, width=4):
    arrays = [
        jnp.asarray(rng.standard_normal((length, heads, width)), jnp.float32) for _ in range(3)
    ]
    return arrays, jnp.asarray(rng.uniform(0, 1, (length, heads)), jnp.float32)


def exact(query, key, value, beta, log_decay):
    """The paper's line, with its matrix: decay first, then the error of the decayed state."""
    query, key, value, beta = (as_float64(x) for x in (query, key, value, beta))
    alpha, width = np.exp(as_float64(log_decay)), query.shape[-1]
    out = np.zeros(value.shape)
    for n in range(query.shape[1]):
        state = np.zeros((width, value.shape[-1]))
        for t in range(query.shape[0]):
            k = key[t, n] / np.sqrt(np.sum(key[t, n] ** 2) + 1e-6)
            q = query[t, n] / np.sqrt(np.sum(query[t, n] ** 2) + 1e-6)
            state = alpha[t, n] * (np.eye(width) - beta[t, n] * np.outer(k, k)) @ state
            state = state + beta[t, n] * np.outer(k, value[t, n])
            out[t, n] = state.T @ q / np.sqrt(width)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_the_error_is_read_after_the_decay(form, rng):
    arrays, beta = numbers(rng, 21)
    g = jnp.asarray(-rng.uniform(0.1, 2.0, beta.shape), jnp.float32)
    out = gated_delta_rule_attention(
        *arrays, beta=beta, log_decay=g, implementation=form, chunk_size=8
    )
    theirs = exact(*arrays, beta, g)
    assert_close(out, theirs, np.float32)
    query, key, value = arrays  # the other order, an error read before the decay, is another rule
    unit = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    q = query / jnp.linalg.norm(query, axis=-1, keepdims=True) / 2
    early = linear_recurrence(
        q, unit, beta[..., None] * value, erase=beta[..., None] * unit, log_decay=g
    )
    assert np.max(np.abs(early - theirs)) > 1e-2


@pytest.mark.parametrize("length", [7, 50, 1000])
def test_a_gate_of_zero_is_the_delta_rule(length, rng):
    """A zero among the logarithms is exactly no decay, alone and mixed with strong ones."""
    arrays, beta = numbers(rng, length)
    gated = gated_delta_rule_attention(*arrays, beta=beta, log_decay=jnp.zeros(beta.shape))
    assert_reordered(gated, delta_rule_attention(*arrays, beta=beta), np.float32)
    mixed = jnp.where(jnp.asarray(rng.random(beta.shape) < 0.5), 0.0, -10.0 * beta)
    chunks, steps = (
        gated_delta_rule_attention(*arrays, beta=beta, log_decay=mixed, implementation=form)
        for form in ("chunked", "recurrent")
    )
    assert_close(chunks, as_float64(steps), np.float32)


@pytest.mark.parametrize("form", FORMS)
def test_a_cleared_state_tells_nothing(form, rng):
    """alpha = 0 at a boundary: what was before has no influence at all."""
    arrays, beta = numbers(rng, 12)
    g = jnp.zeros(beta.shape).at[5].set(-jnp.inf)
    options = {"beta": beta, "log_decay": g, "implementation": form, "chunk_size": 8}
    out = gated_delta_rule_attention(*arrays, **options)
    query, key, value = arrays
    other = gated_delta_rule_attention(query, key, value.at[:5].multiply(-7.0), **options)
    np.testing.assert_array_equal(out[5:], other[5:])
    assert np.max(np.abs(out[:5] - other[:5])) > 0.1
    kept = [
        delta_rule_attention(query, key, v, beta=beta) for v in (value, value.at[:5].multiply(-7.0))
    ]
    assert np.max(np.abs(kept[0] - kept[1])[5:]) > 0.1


def test_one_pair_is_rewritten_and_the_others_stay(rng):
    """Seven orthogonal pairs survive fifty writes of the eighth; a decay alone would lose them."""
    width, writes = 8, 50
    keys = np.linalg.qr(rng.standard_normal((width, width)))[0]
    order = [*range(width), *[0] * writes]
    key = jnp.asarray(keys[order], jnp.float32)[:, None]
    value = jnp.asarray(rng.standard_normal((len(order), 1, 3)), jnp.float32)
    ones = jnp.ones((len(order), 1))
    _, state = gated_delta_rule_attention(
        key, key, value, beta=ones, log_decay=0 * ones, unit_keys=False, return_state=True
    )
    read = keys @ as_float64(state)[0]
    assert_close(read[1:], as_float64(value)[1:width, 0], np.float32)
    assert_close(read[0], as_float64(value)[-1, 0], np.float32)


def test_gates_of_minus_eighty_have_finite_gradients(rng):
    """A rate of 16 and a softplus of 5, in chunks of 64: no overflow above the diagonal."""
    arrays, beta = numbers(rng, 128, heads=1)
    g = jnp.asarray(-rng.uniform(0, 80, beta.shape), jnp.float32)

    def slopes(form):
        def loss(query, key, value, beta, g):
            out = gated_delta_rule_attention(
                query, key, value, beta=beta, log_decay=g, implementation=form
            )
            return jnp.sum(jnp.cos(out))

        return jax.jit(jax.grad(loss, argnums=range(5)))(*arrays, beta, g)

    for ours, theirs in zip(slopes("chunked"), slopes("recurrent"), strict=True):
        assert_close(ours, as_float64(theirs), np.float32, "gradient")


def test_the_layer_of_the_authors_library_has_six_squares_of_the_width():
    """Keys of 0.75 the width, values twice that: 6 E^2 in the five large projections."""
    width, heads = 64, 6
    mechanism = GatedDeltaNet(width, heads, 16, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(
        width, heads, head_width=8, value_width=16, mechanism=mechanism, rngs=nnx.Rngs(1)
    )
    linear = (layer.query, layer.key, layer.value, layer.out)
    large = sum(x.kernel.size for x in linear) + mechanism.gate.weight.size
    assert large == 6 * width**2
    rest = sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param))) - large
    assert rest == 2 * width * heads + 2 * heads + 16 + 4 * (2 * 48 + 96)


def test_the_layer_decodes_from_its_state(rng):
    mechanism = GatedDeltaNet(16, 4, 6, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(
        16, 4, num_kv_heads=2, value_width=6, mechanism=mechanism, rngs=nnx.Rngs(1)
    )
    x = jnp.asarray(rng.standard_normal((2, 10, 16)), jnp.float32)
    whole, cache = layer(x), layer.create_cache((2,), 10)
    for first, last in ((0, 6), (6, 7), (7, 10)):
        out, cache = layer(x[:, first:last], cache=cache)
        assert_reordered(out, whole[:, first:last], np.float32)


@pytest.mark.parametrize("name", ["beta", "log_decay"])
def test_bad_input_is_refused_by_name(name, as_users_run_it):
    array, given = jnp.ones((5, 2, 4)), {"beta": jnp.ones((5, 2)), "log_decay": jnp.zeros((5, 2))}
    with pytest.raises(ValueError, match=rf"{name}.*\(5, 2\).*\(2, 5\)"):
        gated_delta_rule_attention(array, array, array, **given | {name: jnp.zeros((2, 5))})
    with pytest.raises(ValueError, match=r"log_decay.*176"):
        gated_delta_rule_attention(
            array, array, array, **given | {"log_decay": jnp.full((5, 2), 176.0)}
        )
