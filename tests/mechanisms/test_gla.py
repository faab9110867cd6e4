"""Gated linear attention: channels forget on their own, however strongly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention
from attnlab.core.linear_attention import linear_attention
from attnlab.core.recurrence import FORMS
from attnlab.linear.gla import GLA, gated_linear_attention
from attnlab.linear.retnet import retention, retention_decay
from tests.recurrences import recurrence
from tests.tolerances import as_float64, assert_close, assert_reordered, largest


def numbers(rng, length, heads=2, width=4):
    return [jnp.asarray(rng.standard_normal((length, heads, width)), jnp.float32) for _ in range(3)]


def test_a_channel_that_is_cleared_forgets_alone(rng):
    """Of that channel only what came at the step or later is read; a gate per head cannot."""
    length, step, channel = 9, 5, 2
    query, key, value = numbers(rng, length)
    gate = jnp.zeros(key.shape).at[step, :, channel].set(-jnp.inf)
    out = gated_linear_attention(query, key, value, log_decay=gate)
    state, exact = np.zeros((2, 4, 4)), []
    for t in range(length):
        if t == step:
            state[:, channel] = 0
        state += as_float64(key)[t, :, :, None] * as_float64(value)[t, :, None, :]
        exact.append(np.einsum("nh,nhd->nd", as_float64(query)[t] / 2, state))
    assert_close(out, np.stack(exact), np.float32)


def test_constant_gates_give_linear_attention_and_retention(rng):
    arrays = numbers(rng, 20)
    query, key, value = arrays
    plain = gated_linear_attention(*arrays, log_decay=jnp.zeros(key.shape))
    exact = linear_attention(query / 2, key, value, causal=True)
    assert_reordered(plain, exact, np.float32)
    gate = jnp.broadcast_to(retention_decay(2)[None, :, None], key.shape)
    retained = gated_linear_attention(*arrays, log_decay=gate)
    assert_reordered(retained, retention(*arrays, theta=None), np.float32)


def strong_decays(shape, rng):
    one, mixed = np.zeros(shape), np.full(shape, -1e-3)
    one[..., 1], mixed[..., :2] = -25.8, -30.0
    return {"-5 each": np.full(shape, -5.0), "-25.8 in one": one, "mixed": mixed,
            "-50 to -5": rng.uniform(-50, -5, shape)}  # fmt: skip


def test_strong_decays_are_finite_and_right(rng):
    """What other chunked forms turn into NaN, in values or gradients."""
    query, key, value = numbers(rng, 128)

    def slopes(form):
        def loss(*x):
            out = gated_linear_attention(*x[:3], log_decay=x[3], implementation=form)
            return jnp.sum(jnp.cos(out)), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))

    forms = {form: slopes(form) for form in FORMS}
    for name, gate in strong_decays(key.shape, rng).items():
        exact, _ = recurrence(query / 2, key, value, log_decay=gate)
        found = {f: run(query, key, value, jnp.asarray(gate, jnp.float32)) for f, run in
                 forms.items()}  # fmt: skip
        for form, ((_, out), slope) in found.items():
            assert_close(out, exact, np.float32, words=f"{name}, {form}")
            for ours, theirs in zip(slope, found["recurrent"][1], strict=True):
                both = 2 * max(1.0, largest(theirs))  # either may err
                assert_close(
                    ours, theirs, np.float32, "gradient", scale=both, words=f"{name}, {form}"
                )


def test_a_long_sequence_stays_finite(rng):
    query, key, value = numbers(rng, 4096, heads=1)
    gate = jnp.asarray(-rng.uniform(0.5, 3.0, key.shape), jnp.float32)
    out = gated_linear_attention(query, key, value, log_decay=gate)
    tail, _ = recurrence(*(x[-200:] for x in (query / 2, key, value)), log_decay=gate[-200:])
    assert_close(out[-100:], tail[-100:], np.float32)


def test_a_gate_without_input_halves_in_16_steps():
    layer = GLA(8, 2, 4, 4, rngs=nnx.Rngs(0))
    gate = layer.controls(jnp.zeros((3, 8)))["log_decay"]
    assert gate.shape == (3, 2, 4)
    assert_close(jnp.exp(16 * gate), np.full((3, 2, 4), 0.5), np.float32)


def test_the_layer_of_the_paper_has_so_many_parameters():
    """Keys half as wide as the model, values as wide, four heads: H = E / 8, D = E / 4."""
    width = 64
    mechanism = GLA(width, 4, width // 8, width // 4, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(
        width, 4, head_width=width // 8, value_width=width // 4, mechanism=mechanism,
        rngs=nnx.Rngs(1),
    )  # fmt: skip
    count = sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    assert count == 4 * width**2 + 16 * width + 8 * width + width // 2 + width // 4


def test_decoding_goes_on_from_a_state(rng):
    mechanism = GLA(16, 4, 4, 6, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(
        16, 4, num_kv_heads=2, value_width=6, mechanism=mechanism, rngs=nnx.Rngs(1)
    )
    x = jnp.asarray(rng.standard_normal((2, 10, 16)), jnp.float32)
    whole, cache = layer(x), layer.create_cache((2,), 10)
    for first, last in ((0, 6), (6, 7), (7, 10)):
        out, cache = layer(x[:, first:last], cache=cache)
        assert_reordered(out, whole[:, first:last], np.float32)


@pytest.mark.parametrize(
    ("gate", "error", "words"),
    [
        (jnp.full((5, 2, 4), 176.0), ValueError, r"log_decay.*176"),
        (jnp.zeros((2, 5, 4)), ValueError, r"log_decay.*\(5, 2, 4\).*\(2, 5, 4\)"),
        (jnp.zeros((5, 2, 4), jnp.int32), TypeError, r"log_decay.*int32"),
    ],
)
def test_bad_gates_are_refused_by_name(gate, error, words, as_users_run_it):
    array = jnp.ones((5, 2, 4))
    with pytest.raises(error, match=words):
        gated_linear_attention(array, array, array, log_decay=gate)
