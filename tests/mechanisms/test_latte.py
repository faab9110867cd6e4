"""Latte: a mixture of distributions over the past, whose state serves the next token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, masks
from attnlab.linear.efficient_attention_linear import efficient_attention
from attnlab.linear.latte import Latte, latte_attention
from tests.tolerances import as_float64, assert_close, assert_reordered


def problem(rng, length=20, latents=3):
    shapes = ((length, 1, latents), (length, 1, latents), (length, 1, 5))
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def mixture(query, key, causal):
    """p(l | t) p(s | l, t), latent by latent."""
    p_l = np.exp(as_float64(query[:, 0]))
    p_l /= p_l.sum(-1, keepdims=True)
    weights = np.zeros((len(query), len(key)))
    for t in range(len(query)):
        seen = slice(0, t + 1) if causal else slice(None)
        for latent in range(key.shape[-1]):
            p_s = np.exp(as_float64(key[seen, 0, latent]))
            weights[t, seen] += p_l[t, latent] * p_s / p_s.sum()
    return weights


@pytest.mark.parametrize("mask", [None, masks.Causal()])
def test_weights_are_the_mixture(mask, rng):
    query, key, _ = problem(rng)
    eye = jnp.broadcast_to(jnp.eye(20)[:, None], (20, 1, 20))
    weights = as_float64(latte_attention(jnp.asarray(query), jnp.asarray(key), eye, mask=mask))
    expected = mixture(query, key, mask is not None)
    assert_close(weights[:, 0], expected, np.float32)
    assert np.all(weights >= 0)
    assert_close(weights.sum(-1), np.ones((20, 1)), np.float32)
    rank = np.linalg.matrix_rank(expected, tol=1e-9)
    assert rank == 3 if mask is None else rank == 20  # a triangle has all its eigenvalues


def test_one_denominator_for_all_latents_is_another_mechanism(rng):
    """What a column of ones, appended to the values, would divide by."""
    query, key, _ = problem(rng)
    joint = np.exp(as_float64(query[:, 0])) @ np.exp(as_float64(key[:, 0])).T * np.tri(20)
    joint /= joint.sum(-1, keepdims=True)
    assert np.max(np.abs(joint - mixture(query, key, True))) > 0.05


def test_without_a_mask_it_is_efficient_attention(rng):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    np.testing.assert_array_equal(latte_attention(*arrays), efficient_attention(*arrays))


@pytest.mark.parametrize("implementation", ["parallel", "chunked", "recurrent"])
def test_logits_of_a_thousand_are_finite_and_right(implementation, rng):
    query, key, value = problem(rng)
    key = 1000 * np.sort(key, axis=0)[::-1].copy()  # the first key wins for ever
    run = jax.jit(
        jax.value_and_grad(
            lambda *x: jnp.sum(
                latte_attention(
                    *x, mask=masks.Causal(), implementation=implementation, chunk_size=7
                )
            ),
            (0, 1, 2),
        )
    )
    total, gradient = run(*map(jnp.asarray, (query, key, value)))
    assert_close(total, 20 * as_float64(value)[0].sum(), np.float32, scale=20.0)
    assert all(np.all(np.isfinite(x)) for x in gradient)


def test_the_next_token_takes_a_state_of_one_size(rng):
    query, key, value = (jnp.asarray(x) for x in problem(rng))
    module = Latte()
    whole = as_float64(module(query, key, value, mask=masks.Causal()))
    state = module.init_state((), 1, 3, 5)

    @jax.jit
    def step(state, t, *row):
        at = {"query_offset": t, "key_offset": t, "initial_state": state, "return_state": True}
        return module(*row, mask=masks.Causal(), **at)

    for t in range(20):
        row = (x[t : t + 1] for x in (query, key, value))
        out, state = step(state, jnp.asarray(t, jnp.int32), *row)
        assert_reordered(out[0], whole[t], np.float32)
        assert [x.shape for x in state] == [(1, 3, 6), (1, 3)]


def test_a_layer_decodes_with_fewer_latents_than_channels(rng):
    layer = MultiHeadAttention(
        12, 4, mechanism=Latte(), num_kv_heads=2, head_width=3, value_width=5, rngs=nnx.Rngs(0)
    )
    x = jnp.asarray(rng.standard_normal((2, 9, 12)), jnp.float32)
    whole = as_float64(nnx.jit(lambda layer, x: layer(x, mask=masks.Causal()))(layer, x))
    cache = layer.create_cache((2,), 9)
    step = nnx.jit(lambda layer, x, cache: layer(x, mask=masks.Causal(), cache=cache))
    for first, last in ((0, 7), (7, 8), (8, 9)):
        out, cache = step(layer, x[:, first:last], cache)
        assert_reordered(out, whole[:, first:last], np.float32)


def test_wrong_input_is_refused_by_name(rng, as_users_run_it):
    query, key, value = (jnp.asarray(x) for x in problem(rng))
    with pytest.raises(ValueError, match="head width"):
        latte_attention(query, key[..., :2], value)
    with pytest.raises(ValueError, match="modifiers"):
        latte_attention(query, key, value, modifiers=lambda x: x)
