"""EcoFormer: codes count agreement, linear is quadratic, and a fit makes like tokens agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks
from attnlab.linear.ecoformer import (
    EcoFormer,
    KernelHash,
    ecoformer_attention,
    fit_hash,
    kernel_hash,
    random_hash,
    similar,
)
from tests.tolerances import as_float64, assert_close


def problem(rng, queries=14, keys=14):
    shapes = ((2, queries, 4, 3), (2, keys, 2, 3), (2, keys, 2, 5))
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


HASH = random_hash(jax.random.key(0), 4, 3, bits=7, num_anchors=5)


def codes_of(x, hashing=HASH, measured=False):
    """Loops over tokens, heads and anchors; whether each bit is set."""
    weights, anchors, mean, bandwidth = map(as_float64, hashing)
    x = as_float64(x) / np.linalg.norm(as_float64(x), axis=-1, keepdims=True)
    distance = np.zeros((*x.shape[:-1], anchors.shape[1]))
    for b, t, n in np.ndindex(*x.shape[:-1]):
        for m in range(anchors.shape[1]):
            distance[b, t, n, m] = np.sum((x[b, t, n] - anchors[n, m]) ** 2)
    sigma = bandwidth[None, None, :, None]
    sigma = distance.mean((1, 3), keepdims=True) if measured else sigma
    kernel = np.exp(-distance / (2 * sigma)) - mean
    return np.einsum("btnm,nkm->btnk", kernel, weights) > 0


@pytest.mark.parametrize("measured", [False, True])
def test_codes_are_signs(measured, rng):
    x = rng.standard_normal((2, 14, 4, 3)).astype(np.float32)
    found = as_float64(kernel_hash(jnp.asarray(x), HASH, measured=measured))
    np.testing.assert_array_equal(found, np.where(codes_of(x, measured=measured), 1, -1))
    scaled = kernel_hash(jnp.asarray(7 * x), HASH, measured=measured)
    np.testing.assert_array_equal(found, scaled)  # the length of a token does not matter


def quadratic(query, key, value, offset, allowed=True):
    """From Hamming distances, b - 2 of them each."""
    key, value = (np.repeat(x, 2, axis=2) for x in (key, value))
    one, two = codes_of(query), codes_of(key)
    hamming = np.sum(one[:, :, None] != two[:, None], -1)  # b t s n
    weights = np.where(np.expand_dims(allowed, -1), 7 - 2 * hamming + offset, 0)
    weights = weights / weights.sum(2, keepdims=True)
    return np.einsum("btsn,bsnd->btnd", weights, as_float64(value)), weights


@pytest.mark.parametrize("mask", [None, masks.Causal()])
def test_linear_is_quadratic_in_hamming_distances(mask, rng):
    arrays = problem(rng)
    allowed = np.ones((14, 14), bool) if mask is None else np.tri(14, dtype=bool)
    ours = ecoformer_attention(*map(jnp.asarray, arrays), hashing=HASH, mask=mask)
    expected, weights = quadratic(*arrays, 8, allowed)
    assert_close(ours, expected, np.float32)
    assert np.all(weights[:, allowed] > 0)
    ours = ecoformer_attention(*map(jnp.asarray, arrays), hashing=HASH, offset=20.0, mask=mask)
    assert_close(ours, quadratic(*arrays, 20, allowed)[0], np.float32)


def test_gradients_pass_straight_through_where_little_is_rounded(rng):
    x = jnp.asarray(rng.standard_normal((2, 14, 4, 3)), jnp.float32)
    read = jnp.asarray(rng.standard_normal((2, 14, 4, 7)), jnp.float32)

    def total(weights, straight):
        hashing = HASH._replace(weights=weights)
        return jnp.sum(kernel_hash(x, hashing, straight_through=straight) * read)

    assert not np.any(jax.grad(total)(HASH.weights, False))
    unit = as_float64(x) / np.linalg.norm(as_float64(x), axis=-1, keepdims=True)
    apart = unit[..., None, :] - as_float64(HASH.anchors)
    kernel = np.exp(-np.sum(apart**2, -1) / 4) - as_float64(HASH.mean)
    inside = np.abs(np.einsum("btnm,nkm->btnk", kernel, as_float64(HASH.weights))) < 1
    expected = np.einsum("btnk,btnm->nkm", np.where(inside, as_float64(read), 0), kernel)
    assert_close(jax.grad(total)(HASH.weights, True), expected, np.float32, "gradient")


def clusters(rng, count=6, size=8):
    """Two sequences of two heads, whose tokens gather around a few directions."""
    centres = rng.standard_normal((2, count, 12))
    x = np.repeat(centres, size, axis=1)[None] + 0.4 * rng.standard_normal((2, 2, count * size, 12))
    order = rng.permutation(count * size)
    return np.moveaxis(x, 1, 2)[:, order].astype(np.float32)


@functools.cache
def fits():
    x = clusters(np.random.default_rng(5))
    options = {"bits": 8, "num_anchors": 12, "top_k": 8}
    fit = jax.jit(lambda x, rate: fit_hash(x, jax.random.key(2), learning_rate=rate, **options))
    return x, fit(jnp.asarray(x), 0.0), fit(jnp.asarray(x), 0.05)


def test_labels_are_the_most_and_the_least_similar():
    x = clusters(np.random.default_rng(5))
    labels = as_float64(similar(jnp.asarray(x), 8))
    products = np.einsum("bsnh,btnh->bnst", as_float64(x), as_float64(x))
    for at in np.ndindex(*labels.shape[:-1]):
        order = np.argsort(products[at])
        assert set(np.flatnonzero(labels[at] == 1)) == set(order[-8:])
        assert set(np.flatnonzero(labels[at] == -1)) == set(order[:8])


def test_a_fit_leaves_less_of_the_labels_and_agrees_more_with_attention():
    x, start, fitted = fits()
    np.testing.assert_array_equal(start.anchors, fitted.anchors)
    unit = as_float64(x) / np.linalg.norm(as_float64(x), axis=-1, keepdims=True)
    labels = as_float64(similar(jnp.asarray(unit, jnp.float32), 8))
    attention = np.exp(np.einsum("bsnh,btnh->bnst", unit, unit) * np.sqrt(12))
    left, correlation = [], []
    for hashing in (start, fitted):
        codes = np.where(codes_of(x, hashing), 1.0, -1.0)
        agree = np.einsum("bsnk,btnk->bnst", codes, codes)
        left.append(np.sum((8 * labels - agree) ** 2, (0, 2, 3)))
        correlation.append(np.corrcoef(agree.ravel(), attention.ravel())[0, 1])
    assert correlation[1] > correlation[0] + 0.05
    assert np.all(left[1] < 0.9 * left[0])


def test_the_fit_keeps_what_each_call_needs():
    x, _, fitted = fits()
    unit = as_float64(x) / np.linalg.norm(as_float64(x), axis=-1, keepdims=True)
    for n in range(2):
        anchors = as_float64(fitted.anchors)[n]
        among = np.abs(unit[0, :, n][:, None] - anchors).max(-1).min(0)
        assert_close(among, np.zeros(12), np.float32)  # tokens of the first sequence
        distance = np.sum((unit[:, :, n, None] - anchors) ** 2, -1)
        assert_close(fitted.bandwidth[n], distance.mean(), np.float32)
        kernel = np.exp(-distance / (2 * distance.mean()))
        assert_close(fitted.mean[n], kernel.mean((0, 1)), np.float32)


def test_the_module_is_fitted_and_decodes(rng):
    module = EcoFormer(2, 12, bits=8, num_anchors=12, rngs=nnx.Rngs(0))
    x = jnp.asarray(clusters(rng))
    before = as_float64(module.weights[...])
    module.fit(x, jax.random.key(1), top_k=8, steps=3)
    assert np.all(as_float64(module.weights[...]) != before)
    assert isinstance(module.hashing, KernelHash)
    whole = as_float64(module(x, x, x, mask=masks.Causal()))
    state = module.init_state((2,), 2, 12, 12)
    assert state.shape == (2, 2, 9, 13)
    for first, last in ((0, 20), (20, 48)):
        piece = x[:, first:last]
        out, state = module(
            piece, piece, piece, mask=masks.Causal(), query_offset=first, key_offset=first,
            initial_state=state, return_state=True,
        )  # fmt: skip
        assert_close(out, whole[:, first:last], np.float32)


def test_wrong_input_is_refused_by_name(rng, as_users_run_it):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    for name, options in (
        (r"offset.*7.*6", {"offset": 6.0}),
        (r"measured.*causal", {"measured": True, "mask": masks.Causal()}),
        ("scale", {"scale": 1.0}),
    ):
        with pytest.raises(ValueError, match=name):
            ecoformer_attention(*arrays, hashing=HASH, **options)
    with pytest.raises(ValueError, match=r"hashing.*\(4, 3\).*\(2, 3\)"):
        ecoformer_attention(*arrays, hashing=random_hash(jax.random.key(0), 2, 3))
    for options in ({"num_anchors": 15}, {"num_anchors": 5, "top_k": 8}):
        with pytest.raises(ValueError, match=r"x:.*14"):
            fit_hash(arrays[0], jax.random.key(0), **options)
