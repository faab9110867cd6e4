"""Compressed convolutional attention: exact counts, causality, decoding, and what it reduces to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks
from attnlab.heads.compressed_convolutional import (
    CompressedConvolutional,
    CompressedSizes,
    compressed_convolutional_attention,
)
from tests.core import draw
from tests.tolerances import as_float64, assert_close, assert_reordered

SIZE = draw.Sizes((2,), 10, 10, 4, 2, 8, 8)
INPUTS = tuple(map(jnp.asarray, draw.inputs(SIZE, 0)))
ZAYA = CompressedSizes(2048, 8, 2, 128)


def mechanism(seed=0, **options):
    made = CompressedConvolutional(4, 2, 8, rngs=nnx.Rngs(seed), **options)
    rng = np.random.default_rng(seed)
    for bias in (made.channel_bias, made.head_bias):
        bias[...] = jnp.asarray(rng.standard_normal(bias.shape), jnp.float32)
    return made


def identity(**options):
    made = CompressedConvolutional(4, 2, 8, rngs=nnx.Rngs(0), **options)
    made.channel_weight[...] = jnp.zeros_like(made.channel_weight[...]).at[0].set(1)
    eye = jnp.broadcast_to(jnp.eye(8), (6, 8, 8))
    made.head_weight[...] = jnp.zeros_like(made.head_weight[...]).at[0].set(eye)
    return made


def whole(made, arrays=INPUTS, **options):
    return compressed_convolutional_attention(*arrays, parameters=made.parameters(), **options)


def test_the_released_model_has_so_many_parameters_and_so_small_a_cache():
    assert ZAYA.projections == 5_242_880
    assert ZAYA.mixing == 332_800 + 2
    assert (ZAYA.cache_per_token, 2 * 2048 // ZAYA.cache_per_token) == (512, 8)
    assert ZAYA.state == 2_688
    assert 2 * 100 * 100 * 2048 // ZAYA.pairs(100, 100) == 2  # not 8: queries are half as wide


def test_a_layer_holds_and_caches_what_is_counted():
    sizes = CompressedSizes(64, 4, 2, 8)
    layer = MultiHeadAttention(
        64, 4, num_kv_heads=2, head_width=8, mechanism=mechanism(), rngs=nnx.Rngs(1)
    )
    own = sum(x.size for x in jax.tree.leaves(nnx.state(layer.mechanism, nnx.Param)))
    every = sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    assert (own, every - own) == (sizes.mixing, sizes.projections)
    cache = layer.create_cache((), 10)
    assert cache.memory.key.size + cache.memory.value.size == 10 * sizes.cache_per_token
    assert sum(tail.values.size for tail in cache.tails) == sizes.state


@pytest.mark.parametrize("widths", [(2, 2), (3, 2), (1, 4)])
def test_a_layer_decodes_what_it_reads_at_once(rng, widths):
    layer = MultiHeadAttention(
        32, 4, num_kv_heads=2, head_width=8, mechanism=mechanism(widths=widths), rngs=nnx.Rngs(1)
    )
    x = jnp.asarray(rng.standard_normal((2, 9, 32)), jnp.float32)
    read, cache = layer(x, mask=masks.Causal()), layer.create_cache((2,), 9)
    for first, last in ((0, 4), (4, 5), (5, 6), (6, 9)):
        out, cache = layer(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, as_float64(read)[:, first:last], np.float32)


def test_nothing_depends_on_what_comes_later():
    def run(query, key, value):
        return whole(mechanism(), (query, key, value), mask=masks.Causal())

    _, pull = jax.vjp(run, *INPUTS)
    for row in (1, 4):
        pulled = pull(jnp.zeros_like(INPUTS[0]).at[:, row].set(1))
        for gradient in pulled:
            assert np.all(np.asarray(gradient)[:, row + 1 :] == 0)
            assert np.any(np.asarray(gradient)[:, row] != 0)


def test_with_identities_and_nothing_added_it_is_attention_of_unit_vectors():
    made = identity(add_mean=False, shift_values=False, rotary_width=0)
    query, key, value = INPUTS
    unit = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    plain = attention(*unit, value, scale=8**0.5)
    assert_close(whole(made), as_float64(plain), np.float32)


def test_with_means_or_shifts_it_is_not():
    plain = whole(identity(add_mean=False, shift_values=False))
    for options in ({"shift_values": False}, {"add_mean": False}):
        assert np.max(np.abs(whole(identity(**options)) - plain)) > 1e-2


def test_before_the_first_token_the_first_convolution_is_its_bias():
    """The second sees that bias, not zero; and so it is at the start of each packed document."""
    made = mechanism()
    ids = jnp.asarray([[0] * 4 + [1] * 6] * 2)
    packed = whole(made, mask=masks.Causal() & masks.Segments(ids))
    alone = whole(made, tuple(x[:, 4:] for x in INPUTS), mask=masks.Causal())
    assert_close(packed[:, 4:], as_float64(alone), np.float32)
    zeros = tuple(jnp.concatenate([jnp.zeros_like(x[:, :2]), x], axis=1) for x in INPUTS)
    hidden = masks.Causal() & masks.Predicate(lambda at: at.key > 1)
    after = whole(made, zeros, mask=hidden)[:, 2:]
    moved = whole(made, mask=masks.Causal())
    assert_close(after, as_float64(moved), np.float32)


def test_half_of_the_values_come_from_the_token_before():
    made, value = identity(rotary_width=0), INPUTS[2]
    own = masks.Predicate(lambda at: at.key == at.query)
    out = as_float64(whole(made, mask=own))
    moved = np.concatenate([np.zeros_like(value[:, :1]), value[:, :-1]], axis=1)
    np.testing.assert_allclose(out[..., :2, :], np.repeat(value[..., :1, :], 2, -2), atol=1e-6)
    np.testing.assert_allclose(out[..., 2:, :], np.repeat(moved[..., 1:, :], 2, -2), atol=1e-6)


def test_one_key_head_has_half_of_its_channels_shifted():
    made = CompressedConvolutional(4, 1, 8, rngs=nnx.Rngs(0))
    query, key, value = INPUTS[0], INPUTS[1][..., :1, :], INPUTS[2][..., :1, :]
    own = masks.Predicate(lambda at: at.key == at.query)
    out = as_float64(whole(made, (query, key, value), mask=own))[:, :, 0]
    np.testing.assert_allclose(out[..., :4], value[:, :, 0, :4], atol=1e-6)
    np.testing.assert_allclose(out[:, 1:, 4:], value[:, :-1, 0, 4:], atol=1e-6)


def test_queries_of_zero_have_finite_gradients():
    zero = tuple(jnp.zeros_like(x) for x in INPUTS)
    made = CompressedConvolutional(4, 2, 8, rngs=nnx.Rngs(0))
    slopes = jax.grad(lambda *x: jnp.sum(jnp.sin(whole(made, x))), argnums=(0, 1, 2))(*zero)
    assert all(np.all(np.isfinite(x)) for x in slopes)


def test_what_cannot_be_is_refused_by_name(as_users_run_it):
    query, key, value = INPUTS
    made = mechanism()
    with pytest.raises(NotImplementedError, match=r"10 and 9.*attnlab\.attention"):
        whole(made, (query, key[:, :9], value[:, :9]))
    with pytest.raises(ValueError, match=r"channel_weight.*5, 8.*\(2, 6, 8\)"):
        whole(made, (query, key[..., :1, :], value[..., :1, :]))
    odd = CompressedConvolutional(4, 1, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"value.*odd"):
        whole(odd, (query, key[..., :1, :], value[..., :1, :7]))
    with pytest.raises(ValueError, match=r"num_kv_heads.*3"):
        CompressedConvolutional(4, 3, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"widths.*\(0, 2\)"):
        CompressedConvolutional(4, 2, 8, widths=(0, 2), rngs=nnx.Rngs(0))
