"""Bozic et al.: a network of one hidden layer learns what a layer of attention does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, masks
from attnlab.dense.feedforward_attention import (
    FeedForwardAttention,
    FeedForwardLayer,
    feedforward_attention,
)
from attnlab.training import distill
from attnlab.training.distill import squared_error
from tests.contract.block_formulas import network
from tests.tolerances import as_float64, assert_close, assert_reordered

L, F, N = 8, 16, 4


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def count(module):
    return sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))


def parameters(module):
    return {
        ".".join(map(str, path)): as_float64(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }


def sequences(key, size=64):
    """Tokens that go on as they began: a walk, scaled to variance 1."""
    steps = jax.random.normal(key, (size, L, F))
    return jnp.cumsum(steps, axis=1) * jnp.arange(1.0, L + 1)[None, :, None] ** -0.5


def teacher():
    """Attention that is worth its name: weights far from even."""
    layer = MultiHeadAttention(F, N, rngs=nnx.Rngs(3))
    layer.query.kernel[...] *= 2.0
    return layer


def error(student, function, x):
    """Squared error on inputs never seen, in shares of the targets' variance."""
    target = function(x)
    return float(squared_error(student(x), target) / jnp.var(target))


def test_a_network_learns_what_attention_does_on_inputs_never_seen():
    """Half the variance is the most that may be left; untaught, and taught others' targets, all."""
    function, unseen = teacher(), sequences(jax.random.key(99), 256)
    student, lost = (FeedForwardLayer(F, L, hidden=64, rngs=nnx.Rngs(0)) for _ in range(2))
    before = error(student, function, unseen)
    losses = distill(student, function, sequences, 500, learning_rate=3e-3)
    after = error(student, function, unseen)
    assert losses.shape == (500,)
    assert before > 0.9
    assert after < 0.5
    assert after < before / 2
    distill(lost, lambda x: function(jnp.roll(x, 1, axis=0)), sequences, 200, learning_rate=3e-3)
    assert error(lost, function, unseen) > 0.9
    order = jnp.asarray([3, 7, 0, 5, 1, 6, 2, 4])  # attention knows no places, the network does
    for each, least, most in ((function, 0.0, 1e-10), (student, 0.02, np.inf)):
        apart = squared_error(each(unseen[:, order]), each(unseen)[:, order])
        assert least <= apart / jnp.var(function(unseen)) <= most


def test_a_network_for_each_head_is_the_formula(rng):
    own = FeedForwardAttention(N, 5, L, hidden=7, num_kv_heads=2, rngs=nnx.Rngs(1))
    query, key, value = drawn(rng, 6, N, 3), drawn(rng, 6, 2, 3), drawn(rng, 6, 2, 5)
    out = own(query, key, value, mask=masks.KeyPadding(jnp.asarray(4)))
    z = np.zeros((L, 2, 5))
    z[:4] = as_float64(value)[:4]
    for n in range(N):
        exact = network(np.asarray, parameters(own), n, z.reshape(-1)).reshape(L, 5)
        assert_close(out[:, n], exact[:6], "float32")


@pytest.mark.parametrize("per_head", [True, False])
def test_a_causal_network_reads_tokens_up_to_each(rng, per_head):
    own = FeedForwardAttention(N, 4, L, hidden=7, per_head=per_head, causal=True, rngs=nnx.Rngs(1))
    value = drawn(rng, L, N, 4)
    out = own(value, value, value, mask=masks.Causal())
    for i in range(L):
        z = np.where(np.arange(L)[:, None, None] <= i, as_float64(value), 0.0).reshape(-1)
        parts = [network(np.asarray, parameters(own), n, z) for n in range(N if per_head else 1)]
        assert_close(out[i].reshape(-1), np.concatenate(parts), "float32")
    slope = jax.jacobian(lambda v: jnp.sum(own(v, v, v), (1, 2)))(value)
    reach = np.any(np.asarray(slope) != 0, axis=(2, 3))
    np.testing.assert_array_equal(reach, np.tri(L, dtype=bool))
    worse = value.at[5:].set(jnp.nan)
    np.testing.assert_array_equal(own(worse, worse, worse)[:5], out[:5])


def test_a_causal_layer_decodes_up_to_its_length(rng):
    own = FeedForwardAttention(N, F // N, L, hidden=7, causal=True, rngs=nnx.Rngs(1))
    layer = MultiHeadAttention(F, N, mechanism=own, rngs=nnx.Rngs(2))
    x = drawn(rng, 2, L, F)
    whole, cache = layer(x, mask=masks.Causal()), layer.create_cache((2,), L)
    for first, last in ((0, 4), (4, 5), (5, L)):
        out, cache = layer(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, as_float64(whole[:, first:last]), np.float32)
    longer = layer.create_cache((2,), L + 1)
    with pytest.raises(ValueError, match="value: 9 tokens are more than the 8"):
        layer(x[:, :1], mask=masks.Causal(), cache=longer)


@pytest.mark.parametrize("length", [4, 8, 16])
def test_weights_are_quadratic_in_the_length(length):
    layer, hidden = FeedForwardLayer(F, length, hidden=length * F // 8, rngs=nnx.Rngs(0)), None
    read, hidden = length * F, length * F // 8
    assert count(layer) == 2 * read + 2 * hidden + 2 * read * hidden + hidden + read
    heads = FeedForwardAttention(N, F // N, length, hidden=hidden, rngs=nnx.Rngs(0))
    written = length * F // N
    each = 2 * read + 2 * hidden + (read + written) * hidden + hidden + written
    assert count(heads) == N * each
    outside = MultiHeadAttention(F, N, mechanism=heads, rngs=nnx.Rngs(0))
    assert count(outside) - count(heads) == F * F  # the last projection alone


def test_padding_may_hold_anything_and_counts_for_nothing(rng):
    layer = FeedForwardLayer(F, L, hidden=9, rngs=nnx.Rngs(0))
    x = drawn(rng, 3, 6, F)
    real = jnp.asarray([6, 4, 0])
    mask = masks.KeyPadding(real) & masks.QueryPadding(real)
    out = layer(x.at[1, 4:].set(jnp.nan), mask=mask)
    assert_reordered(out[1, :4], as_float64(layer(x[1, :4])), np.float32)
    assert np.all(np.asarray(out)[1, 4:] == 0) and np.all(np.asarray(out)[2] == 0)
    tokens = np.arange(6) < np.asarray(real)[:, None]
    loss = squared_error(out, jnp.ones_like(out), jnp.asarray(tokens))
    exact = np.mean((as_float64(out)[tokens] - 1) ** 2)
    assert_close(loss, exact, "float32")


def test_bad_calls_are_refused_by_name(rng, as_users_run_it):
    own = FeedForwardAttention(N, 4, L, hidden=3, rngs=nnx.Rngs(0))
    x, net = drawn(rng, L, N, 4), own.network.net()
    refused = [
        ({"mask": masks.Causal()}, "mask: a causal one .* causal=True"),
        ({"mask": jnp.ones((L, L), bool)}, "mask: expected padding .* ArrayMask"),
        ({"mask": masks.Segments(jnp.zeros(L, jnp.int32))}, "mask: expected padding .* Segments"),
        ({"query_offset": 3}, "query_offset: a whole sequence begins at 0"),
        ({"scale": 2.0}, "scale: a network has no scores"),
        ({"return_lse": True}, "return_lse: a network"),
        ({"causal": True}, "net: expected 16 outputs for 4 heads of width 4, got 128"),
    ]
    for options, words in refused:
        with pytest.raises(ValueError, match=words):
            feedforward_attention(x, x, x, net=net, **options)
    with pytest.raises(NotImplementedError, match='"reference" runs it'):
        own(x, x, x, implementation="blockwise")
    with pytest.raises(ValueError, match="query: the network reads and writes the same tokens"):
        own(x[:3], x, x)
    with pytest.raises(ValueError, match="value: 9 tokens are more than the 8"):
        own(*[drawn(rng, 9, N, 4)] * 3)
    with pytest.raises(ValueError, match="value: the network reads 128 channels"):
        own(x, x, drawn(rng, L, N, 3))
    with pytest.raises(ValueError, match="hidden: expected positive"):
        FeedForwardLayer(F, L, hidden=0, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(F, N, mechanism=own, rngs=nnx.Rngs(2))
    with pytest.raises(NotImplementedError, match="causal=True can"):
        layer.create_cache((2,), L)
    with pytest.raises(ValueError, match="steps: expected positive"):
        distill(own, lambda x: x, sequences, 0)
