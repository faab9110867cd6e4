"""Xiao et al.: signs keep the order of products; bits count them exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import attention, masks
from attnlab.normalization.binary_attention import (
    BinaryAttention,
    binary_attention,
    packed_signs,
    popcount_products,
    signs,
)
from tests.tolerances import as_float64, assert_close


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 100])
def test_bits_count_the_products_of_signs_exactly(width, rng):
    query = jnp.asarray(rng.standard_normal((2, 5, 4, width)), jnp.float32)
    key = jnp.asarray(rng.standard_normal((2, 7, 2, width)), jnp.float32).at[0, 0, 0, 0].set(0)
    counted = popcount_products(packed_signs(query), packed_signs(key), width)
    wide = np.repeat(np.where(np.asarray(key) >= 0, 1.0, -1.0), 2, axis=-2)
    exact = np.einsum("btnh,bsnh->bnts", np.where(np.asarray(query) >= 0, 1.0, -1.0), wide)
    np.testing.assert_array_equal(counted, exact)
    products = jnp.einsum("btnh,bsnh->bnts", signs(query), jnp.repeat(signs(key), 2, axis=-2))
    np.testing.assert_array_equal(counted.astype(jnp.float32), products)


def test_scores_are_counted_bits_times_magnitudes(rng):
    query, key, value = (jnp.asarray(rng.standard_normal((9, 2, 40)), jnp.float32) for _ in "qkv")
    counted = as_float64(popcount_products(packed_signs(query), packed_signs(key), 40))
    mu, nu = (np.mean(np.abs(as_float64(x)), -1).T for x in (query, key))
    s = counted / np.sqrt(40) * mu[:, :, None] * nu[:, None, :]
    w = np.exp(s - s.max(-1, keepdims=True))
    exact = np.einsum("nts,snd->tnd", w / w.sum(-1, keepdims=True), as_float64(value))
    assert_close(binary_attention(query, key, value), exact, "float32")


@pytest.mark.parametrize("correlation", [-0.7, 0.0, 0.5, 0.95])
def test_the_mean_product_of_signs_is_the_arcsine_of_the_correlation(correlation, rng):
    draws, width = 50, 4096
    q, noise = rng.standard_normal((2, draws, width))
    k = correlation * q + np.sqrt(1 - correlation**2) * noise
    found = np.mean(np.asarray(signs(jnp.asarray(q, jnp.float32)) * signs(jnp.asarray(k, "f4"))))
    expected = 2 / np.pi * np.arcsin(correlation)
    assert abs(found - expected) < 3 * np.sqrt((1 - expected**2) / (draws * width)) + 1e-7


def bits(x):
    return as_float64(signs(jnp.asarray(x, jnp.float32)))


def rank_correlation(width, rng, queries=50, keys=400):
    q, k = rng.standard_normal((queries, 1, width)), rng.standard_normal((queries, keys, width))
    ranks = [
        np.argsort(np.argsort(s + 1e-9 * rng.standard_normal(s.shape), -1), -1)
        for s in (np.sum(q * k, -1), np.sum(bits(q) * bits(k), -1))
    ]
    return np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)])


def test_signs_keep_the_order_of_keys_on_the_whole(rng):
    """For Gaussian vectors scores and those of signs correlate by 2/pi, their ranks by asin 1/pi"""
    assert abs(rank_correlation(64, rng) - 6 / np.pi * np.arcsin(1 / np.pi)) < 0.03


def found_first(width, rng, queries=200, keys=400, correlation=0.5):
    """How often the one key that goes with the query is first by signs."""
    q, k = rng.standard_normal((queries, 1, width)), rng.standard_normal((queries, keys, width))
    k[:, :1] = correlation * q + np.sqrt(1 - correlation**2) * k[:, :1]
    return np.mean(np.argmax(np.sum(bits(q) * bits(k), -1), -1) == 0)


def test_signs_find_the_key_that_goes_with_a_query_the_more_surely_the_wider(rng):
    found = [found_first(width, rng) for width in (8, 64, 256)]
    assert found[0] < 0.2 < found[1] < 0.9 < found[2]


def test_gradients_pass_straight_through_within_one():
    x = jnp.asarray([-1.5, -1.0, -0.3, 0.0, 0.4, 1.0, 1.01])
    np.testing.assert_array_equal(signs(x), [-1, -1, -1, 1, 1, 1, 1])
    np.testing.assert_array_equal(
        jax.grad(lambda x: jnp.sum(signs(x) * jnp.arange(1.0, 8.0)))(x), [0, 2, 3, 4, 5, 6, 0]
    )


def test_without_magnitudes_lengths_do_not_matter(rng):
    query, key, value = (jnp.asarray(rng.standard_normal((9, 2, 8)), jnp.float32) for _ in "qkv")
    plain = binary_attention(query, key, value, magnitude=None)
    scaled = binary_attention(7 * query, 0.1 * key, value, magnitude=None)
    np.testing.assert_array_equal(plain, scaled)
    assert_close(plain, as_float64(attention(jnp.sign(query), jnp.sign(key), value)), "float32")


def test_magnitudes_of_heads_are_means_over_real_tokens(rng):
    query, key, value = (jnp.asarray(rng.standard_normal((9, 2, 8)), jnp.float32) for _ in "qkv")
    mask = masks.KeyPadding(jnp.asarray(6)) & masks.QueryPadding(jnp.asarray(5))
    padded = binary_attention(query, key, value, magnitude="head", mask=mask)
    alone = binary_attention(query[:5], key[:6], value[:6], magnitude="head")
    assert_close(padded[:5], as_float64(alone), "float32")
    mu, nu = (np.mean(np.abs(as_float64(x)), (0, 2)) for x in (query[:5], key[:6]))
    by_hand = attention(
        jnp.sign(query[:5]) * jnp.asarray(mu * nu, jnp.float32)[None, :, None], jnp.sign(key[:6]),
        value[:6],
    )  # fmt: skip
    assert_close(alone, as_float64(by_hand), "float32")


def test_the_magnitude_of_a_head_refuses_to_read_the_future(rng):
    x = jnp.ones((4, 1, 2))
    for mask in (masks.Causal(), masks.Segments(jnp.zeros(4, int)), jnp.ones((4, 4), bool)):
        with pytest.raises(ValueError, match='magnitude: "head" is a mean over all tokens'):
            binary_attention(x, x, x, magnitude="head", mask=mask)


def test_bad_calls_are_refused():
    x = jnp.ones((4, 1, 2))
    for call in (
        lambda: binary_attention(x, x, x, magnitude="all"),
        lambda: BinaryAttention(1, magnitude="all", rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(ValueError, match=r"magnitude: expected one of .* got 'all'"):
            call()
    with pytest.raises(ValueError, match="width: 40 bits are 2 words, got 1 and 1"):
        popcount_products(packed_signs(x), packed_signs(x), 40)
