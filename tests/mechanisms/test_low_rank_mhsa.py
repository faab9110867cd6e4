"""Low-rank multi-head attention: the factors, exact counts, and what bounded scores cannot do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks
from attnlab.heads.low_rank_mhsa import LamaPooling, LowRankAttention, low_rank_attention
from tests import oracles
from tests.compiled import compiled
from tests.contract.heads_low_rank_formulas import lama
from tests.tolerances import as_float64, assert_close, assert_reordered, largest

F, M, S = 12, 5, 9
NAMES = ("context", "context_factor", "token_factor")


def pooling(**options):
    return LamaPooling(F, M, rngs=nnx.Rngs(0), **options)


def held(layer):
    return [as_float64(getattr(layer, name)[...]) for name in NAMES]


def tokens(rng, *batch, length=S):
    return jnp.asarray(2 * rng.standard_normal((*batch, length, F)), jnp.float32)


def test_so_many_parameters_and_no_more():
    leaves = jax.tree.leaves(nnx.state(pooling(), nnx.Param))
    assert sum(x.size for x in leaves) == 2 * F * M + F
    assert not jax.tree.leaves(nnx.state(LowRankAttention(), nnx.Param))


def test_a_head_is_a_bilinear_form_of_rank_one(rng):
    layer, x = pooling(), tokens(rng)
    context, first, second = held(layer)
    for m in range(M):
        form = np.outer(first[:, m], second[:, m])
        exact = context @ form @ as_float64(x).T
        np.testing.assert_allclose(as_float64(layer.logits(x))[m], exact, atol=1e-5)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_it_is_the_formula_with_its_slopes(rng, normalize, given):
    layer, x = pooling(normalize=normalize), tokens(rng, 2)
    context = jnp.asarray(rng.standard_normal((2, F)), jnp.float32) if given else None
    real = np.arange(S) < np.array([[S], [6]])
    read = rng.standard_normal((2, M, F))
    graph, state = nnx.split(layer)

    def ours(state, x):
        out = nnx.merge(graph, state)(x, context=context, mask=jnp.asarray(real))
        return jnp.sum(jnp.sin(out) * read.astype(np.float32)), out

    def exact(*arrays):
        own, *rest = arrays
        own = as_float64(context) if given else np.broadcast_to(own, (2, F))
        return lama(own, *rest, real, np.asarray, normalize=normalize)

    (_, out), slopes = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(state, x)
    arrays = [*held(layer), as_float64(x)]
    assert_close(out, exact(*arrays), np.float32)
    slopes = [*(as_float64(slopes[0][name][...]) for name in NAMES), as_float64(slopes[1])]
    for index, slope in enumerate(slopes):
        direction = [np.zeros(a.shape) for a in arrays]
        direction[index] = rng.standard_normal(slope.shape)
        wanted = oracles.directional(lambda *a: np.sum(np.sin(exact(*a)) * read), arrays, direction)
        scale = max(largest(slope), 1e-2) * np.linalg.norm(direction[index])
        found = np.sum(slope * direction[index])
        assert_close(found, wanted, np.float32, "gradient", scale=scale, words=(*NAMES, "x")[index])


def test_products_of_two_numbers_are_scores_enough(rng):
    """Queries and keys one wide, and the tokens copied for each head: the same vectors."""
    layer, x = pooling(), tokens(rng)
    context, first, second = (getattr(layer, name)[...] for name in NAMES)
    query, key = (context @ first)[None, :, None], (x @ second)[..., None]
    copied = jnp.broadcast_to(x[:, None, :], (S, M, F))
    out = low_rank_attention(query, key, copied)[0]
    assert_reordered(layer(x), as_float64(out), np.float32)


def test_weights_sum_to_one_and_a_head_without_a_factor_takes_the_mean(rng):
    layer, x = pooling(), tokens(rng)
    same = jnp.broadcast_to(x[:1], x.shape)
    assert_reordered(layer(same), np.broadcast_to(as_float64(x[0]), (M, F)), np.float32)
    layer.context_factor[...] = layer.context_factor[...].at[:, 2].set(0)
    out = as_float64(layer(x))
    assert_reordered(out[2], as_float64(x).mean(0), np.float32)
    assert np.all(np.max(np.abs(np.delete(out, 2, 0) - as_float64(x).mean(0)), -1) > 1e-3)


def test_no_weight_is_more_than_e_squared_times_another():
    """Tokens that are unit vectors, made long, show their weights; without tanh one takes all."""
    x = 1e4 * jnp.eye(F)

    def ratio(activation):
        weights = as_float64(pooling(activation=activation)(x)) / 1e4
        assert_close(weights.sum(-1), np.ones(M), np.float32)
        return np.max(weights.max(-1) / np.maximum(weights.min(-1), 1e-30))

    bounded = ratio(True)
    assert 0.9 * np.exp(2) < bounded <= np.exp(2) * (1 + 1e-5)
    assert ratio(False) > 1e6


def test_work_grows_with_the_length_alone(rng):
    layer = pooling(implementation="reference")

    def flops(length):
        return compiled(lambda x: layer(x), jnp.zeros((length, F))).cost_analysis()["flops"]

    assert 3.8 < flops(1024) / flops(256) < 4.2


def test_padding_may_hold_anything_and_nothing_to_read_is_zero(rng):
    layer, x = pooling(), tokens(rng, 3)
    lengths = jnp.asarray([S, 4, 0])
    out = layer(x.at[1, 4:].set(jnp.nan).at[2].set(jnp.inf), mask=masks.KeyPadding(lengths))
    assert_reordered(out[0], as_float64(layer(x[0])), np.float32)
    assert_reordered(out[1], as_float64(layer(x[1, :4])), np.float32)
    assert np.all(np.asarray(out[2]) == 0)


def test_what_does_not_fit_is_refused_by_name(rng, as_users_run_it):
    layer, x = pooling(), tokens(rng, 2)
    with pytest.raises(ValueError, match=r"num_heads.*num_heads=0"):
        LamaPooling(F, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x: .*12.*\(2, 9, 11\)"):
        layer(x[..., 1:])
    with pytest.raises(TypeError, match=r"x: .*int32"):
        layer(x.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"context: .*\(2, 12\).*\(12,\)"):
        layer(x, context=x[0, 0])
    with pytest.raises(ValueError, match=r"mask: .*\(2, 9\).*\(9, 9\)"):
        layer(x, mask=jnp.ones((S, S), bool))
    with pytest.raises(TypeError, match=r"mask: .*boolean"):
        layer(x, mask=jnp.ones((2, S)))
    for mask in (masks.Causal(), masks.QueryPadding(jnp.asarray([1, 1]))):
        with pytest.raises(ValueError, match=r"mask: pooling has one reader"):
            layer(x, mask=mask)
    with pytest.raises(ValueError, match=r"mask"):
        layer(x, mask=masks.Segments(jnp.zeros((2, S), jnp.int32)))
