"""Zhang et al.: temperatures that grow with log n end dilution; gains of values suppress noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks
from attnlab.normalization.selective_self_attention import (
    SelectiveSelfAttention,
    selective_self_attention,
)
from tests.tolerances import as_float64, assert_close, assert_reordered


def arrays(rng, length=12, heads=2, width=8):
    return [jnp.asarray(rng.standard_normal((length, heads, width)), jnp.float32) for _ in "qkv"]


def test_without_its_temperatures_it_is_softmax_attention(rng):
    x = arrays(rng)
    plain = attention(*x, mask=masks.Causal())
    zeros = {"query_weight": jnp.zeros((2, 8)), "value_weight": jnp.zeros(8)}
    ours = selective_self_attention(*x, alpha=-jnp.inf, **zeros, mask=masks.Causal())
    assert_reordered(ours, as_float64(plain), "float32")
    grown = selective_self_attention(*x, alpha=0.0, **zeros, mask=masks.Causal())
    assert np.max(np.abs(grown - plain)) > 1e-2


def weight_of_the_best(margin, n, alpha):
    """One key scores `margin`, n - 1 others 0: the weight of the one."""
    key = jnp.zeros((n, 1, 1)).at[0].set(margin)
    value = jnp.zeros((n, 1, 1)).at[0].set(1.0)
    return float(selective_self_attention(jnp.ones((1, 1, 1)), key, value, alpha=alpha)[0, 0, 0])


@pytest.mark.parametrize(("margin", "stays"), [(4.0, True), (1.0, False)])
def test_the_best_key_stays_visible_where_sigmoid_alpha_times_its_margin_is_one(margin, stays):
    """With sigmoid(alpha) = 1/2: e^m n^(m/2) against n."""
    found = [weight_of_the_best(margin, n, 0.0) for n in (16, 256, 4096, 65536)]
    assert (np.diff(found) > 0).all() == stays
    assert found[-1] > 0.99 if stays else found[-1] < 0.03
    assert weight_of_the_best(margin, 65536, -np.inf) < 1e-3  # without it all is diluted


def test_gains_of_values_suppress_noise(rng):
    """Channel 0 says which tokens are noise; a mean of gated values points nearer to the signal."""
    signal, noisy = rng.standard_normal(7), np.arange(64) % 4 != 0
    value = np.where(noisy[:, None], 3 * rng.standard_normal((64, 7)), signal)
    value = jnp.asarray(np.concatenate([3.0 * noisy[:, None], value], 1), jnp.float32)[:, None]
    zero = jnp.zeros((64, 1, 8))
    weight = jnp.zeros(8).at[0].set(-2.0)

    def off(**options):
        mean = as_float64(selective_self_attention(zero, zero, value, **options))[0, 0, 1:]
        best = mean * (mean @ signal) / (mean @ mean)  # up to scale
        return np.mean((best - signal) ** 2)

    assert off(value_weight=weight) < 1e-3
    assert off() > 0.05


def test_the_start_is_nearly_softmax_and_everything_is_trained(rng):
    x = arrays(rng)
    module = SelectiveSelfAttention(2, 8)
    assert np.max(np.abs(module(*x) - attention(*x))) < 0.15
    graph, state = nnx.split(module)

    def loss(state):
        module = nnx.merge(graph, state)
        key, value = module.keep(*x[1:], jnp.zeros((12, 16)))
        return jnp.sum(jnp.sin(module(x[0], key, value, mask=masks.Causal())))

    slopes = jax.tree.leaves(jax.grad(loss)(state))
    assert [g.shape for g in slopes] == [(), (2, 8), (8,)]
    assert all(np.any(np.asarray(g) != 0) for g in slopes)


def test_positions_alone_have_one_number_to_a_layer(rng):
    module = SelectiveSelfAttention(2, 8, token=False)
    assert sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param))) == 1
    x = arrays(rng)
    assert_close(module(*x), as_float64(selective_self_attention(*x)), "float32")


def test_packed_documents_count_their_own_keys(rng):
    x = arrays(rng, length=20)
    mask = masks.Causal() & masks.Segments(jnp.asarray([0] * 8 + [1] * 12))
    packed = selective_self_attention(*x, alpha=1.0, mask=mask)
    for part in (slice(0, 8), slice(8, 20)):
        alone = selective_self_attention(*(y[part] for y in x), alpha=1.0, mask=masks.Causal())
        assert_close(packed[part], as_float64(alone), "float32")


def test_a_layer_decodes_from_selected_values(rng):
    mechanism = SelectiveSelfAttention(4, 4)
    mechanism.value_weight[...] = jnp.asarray(rng.standard_normal(4), jnp.float32)
    layer = MultiHeadAttention(16, 4, num_kv_heads=2, mechanism=mechanism, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((2, 10, 16)), jnp.float32)
    whole, cache = layer(x, mask=masks.Causal()), layer.create_cache((2,), 10)
    for first, last in ((0, 6), (6, 7), (7, 10)):
        out, cache = layer(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, whole[:, first:last], np.float32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"query_weight": jnp.ones(2)}, r"query_weight: expected shape \(1, 2\).*got \(2,\)"),
        ({"value_weight": jnp.ones(3)}, r"value_weight: expected shape \(2,\) or \(1, 2\)"),
    ],
)
def test_weights_of_another_shape_are_refused(options, words):
    x = jnp.ones((4, 1, 2))
    with pytest.raises(ValueError, match=words):
        selective_self_attention(x, x, x, **options)
