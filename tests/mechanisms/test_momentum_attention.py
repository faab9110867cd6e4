"""Momentum attention: a filter, its determinant, and induction in one layer, built by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks
from attnlab.core.past import Past
from attnlab.positional.momentum_attention import (
    MomentumAttention,
    momentum_attention,
    momentum_for_depth,
    sheared,
)
from attnlab.positional.rope import rope_attention
from tests.core import draw
from tests.tolerances import as_float64, assert_close, assert_reordered

SIZE = draw.Sizes((2,), 12, 12, 4, 2, 8, 3)
INPUTS = tuple(map(jnp.asarray, draw.inputs(SIZE, 0)))


def shear_of(length, momentum):
    """The shear along a sequence as a matrix."""
    eye = jnp.eye(length)[:, None, :]
    return as_float64(sheared(eye, momentum, Past(0)))[:, 0]


def test_without_momentum_it_is_rope():
    ours = momentum_attention(*INPUTS, momentum=0.0, mask=masks.Causal())
    assert_reordered(ours, as_float64(rope_attention(*INPUTS, mask=masks.Causal())), np.float32)
    bare = momentum_attention(*INPUTS, momentum=0.0, theta=None)
    assert_reordered(bare, as_float64(attention(*INPUTS)), np.float32)


@pytest.mark.parametrize("momentum", [0.25, 0.7, 2.0])
def test_along_a_sequence_it_is_the_papers_filter(momentum):
    response = shear_of(64, momentum)[:, 1]  # of a pulse that is not the first token
    found = np.fft.fft(np.roll(response, -1))
    frequency = 2 * np.pi * np.arange(64) / 64
    expected = 1 + momentum * (1 - np.exp(-1j * frequency))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    gain = 1 + 4 * momentum * (1 + momentum) * np.sin(frequency / 2) ** 2
    np.testing.assert_allclose(np.abs(found) ** 2, gain, atol=1e-4)
    assert abs(abs(found[32]) - (1 + 2 * momentum)) < 1e-5


@pytest.mark.parametrize("momentum", [0.5, 1.0])
def test_volume_is_kept_by_the_shear_of_pairs_but_not_along_a_sequence(momentum):
    """As a map of (position, momentum) it is symplectic; as a map of sequences it expands."""
    pair = np.array([[1.0, momentum], [0.0, 1.0]])
    form = np.array([[0.0, 1.0], [-1.0, 0.0]])
    np.testing.assert_allclose(pair.T @ form @ pair, form)
    determinant = np.linalg.det(shear_of(6, momentum))
    np.testing.assert_allclose(determinant, (1 + momentum) ** 5, rtol=1e-5)


def test_a_constant_token_passes_unless_rotated(rng):
    x = jnp.broadcast_to(jnp.asarray(rng.standard_normal((1, 1, 8)), jnp.float32), (9, 1, 8))
    np.testing.assert_array_equal(sheared(x, 0.7, Past(0)), x)
    query, _, _ = MomentumAttention(0.7).prepare(x, x, x, Past(0))
    gain = np.linalg.norm(as_float64(query).reshape(9, 4, 2), axis=-1)
    gain = gain / np.linalg.norm(as_float64(x).reshape(9, 4, 2), axis=-1)
    theta = 10_000.0 ** (-np.arange(4) / 4)
    expected = np.abs(1 + 0.7 * (1 - np.exp(-1j * theta)))
    np.testing.assert_allclose(gain[1:], np.broadcast_to(expected, (8, 4)), atol=1e-5)
    np.testing.assert_allclose(gain[0], 1, atol=1e-5)


def induction(rng, momentum):
    """Pairs of a key and its value, then one of the keys: weights of the last token, and where
    the value of that key is.  Equal keys repel; a value's key carries its own key's opposite."""
    names, values = rng.permutation(8)[:5], 8 + rng.permutation(8)[:5]
    asked = rng.integers(5)
    tokens = np.append(np.stack([names, values], axis=-1).reshape(-1), names[asked])
    one_hot = np.eye(16)[tokens]
    is_name = np.diag([1.0] * 8 + [0.0] * 8)
    arrays = (one_hot, -8.0 * one_hot @ is_name, np.eye(11))
    query, key, value = (jnp.asarray(x[:, None], jnp.float32) for x in arrays)
    out = momentum_attention(
        query, key, value, momentum=momentum, theta=None, scale=1.0, mask=masks.Causal()
    )
    return np.asarray(out)[-1, 0], 2 * asked + 1


def test_one_layer_looks_up_what_followed(rng):
    for _ in range(50):
        weights, place = induction(rng, 1.0)
        assert np.argmax(weights) == place
        assert weights[place] > 0.999


def test_one_layer_without_momentum_cannot(rng):
    """Its last row does not change when earlier tokens are permuted, so no value has an owner."""
    for _ in range(20):
        weights, place = induction(rng, 0.0)
        others = [n for n in range(1, 10, 2) if n != place]
        np.testing.assert_allclose(weights[others], weights[place], rtol=1e-5)
    query, key, value = INPUTS
    order = np.append(rng.permutation(11), 11)
    moved = momentum_attention(
        query[:, order], key[:, order], value[:, order], momentum=0.0, theta=None,
        mask=masks.Causal(),
    )  # fmt: skip
    plain = momentum_attention(*INPUTS, momentum=0.0, theta=None, mask=masks.Causal())
    assert_close(moved[:, -1], as_float64(plain)[:, -1], np.float32)


def test_the_best_momentum_by_depth_is_the_papers_law():
    found = [round(momentum_for_depth(n), 3) for n in (1, 2, 4, 6, 12, 24)]
    assert found == [4.17, 2.497, 1.495, 1.107, 0.663, 0.397]


@pytest.mark.parametrize("theta", [10_000.0, None])
def test_a_layer_decodes_what_it_reads_at_once(rng, theta):
    mechanism = MomentumAttention(0.8, trainable=True, theta=theta)
    layer = MultiHeadAttention(32, 4, num_kv_heads=2, mechanism=mechanism, rngs=nnx.Rngs(1))
    x = jnp.asarray(rng.standard_normal((2, 9, 32)), jnp.float32)
    whole, cache = layer(x, mask=masks.Causal()), layer.create_cache((2,), 9)
    sizes = [t.shape for t in jax.tree.leaves(cache.tails)]
    assert sizes == [(2, 1, 4, 8), (2, 1), (2, 1, 2, 8), (2, 1)]  # one query, one key, of each head
    for first, last in ((0, 4), (4, 5), (5, 9)):
        out, cache = layer(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, as_float64(whole)[:, first:last], np.float32)
    assert [t.shape for t in jax.tree.leaves(cache.tails)] == sizes


def test_decoding_without_what_came_before_would_be_wrong(rng):
    layer = MultiHeadAttention(32, 4, mechanism=MomentumAttention(0.8), rngs=nnx.Rngs(1))
    x = jnp.asarray(rng.standard_normal((9, 32)), jnp.float32)
    whole = layer(x, mask=masks.Causal())
    _, cache = layer(x[:5], mask=masks.Causal(), cache=layer.create_cache((), 9))
    forgot = cache.replace(tails=layer.create_cache((), 9).tails)
    out, _ = layer(x[5:], mask=masks.Causal(), cache=forgot)
    assert np.max(np.abs(out[0] - whole[5])) > 1e-2


def test_no_momentum_crosses_from_one_document_into_the_next():
    ids = jnp.asarray([[0] * 5 + [1] * 7] * 2)
    mask = masks.Causal() & masks.Segments(ids)
    packed = momentum_attention(*INPUTS, momentum=0.8, mask=mask)
    for a, b in ((0, 5), (5, 12)):
        parts = (x[:, a:b] for x in INPUTS)
        alone = momentum_attention(*parts, momentum=0.8, mask=masks.Causal())
        assert_close(packed[:, a:b], as_float64(alone), np.float32)


def test_a_negative_momentum_is_refused_by_name():
    with pytest.raises(ValueError, match=r"momentum.*-0.5"):
        MomentumAttention(-0.5)
    with pytest.raises(ValueError, match=r"momentum.*-1"):
        momentum_attention(*INPUTS, momentum=-1)
    with pytest.raises(ValueError, match=r"num_layers.*0"):
        momentum_for_depth(0)


def test_padding_of_a_context_says_nothing_of_the_tokens_that_read_it(rng):
    layer = MultiHeadAttention(32, 4, mechanism=MomentumAttention(0.8), rngs=nnx.Rngs(1))
    x, context = (jnp.asarray(rng.standard_normal((9, 32)), jnp.float32) for _ in range(2))
    padded = layer(x, context, mask=masks.KeyPadding(jnp.asarray(5)))
    assert_close(padded, as_float64(layer(x, context[:5])), np.float32)
