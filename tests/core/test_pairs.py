"""What mechanisms share: numbers of queries and keys in scores, means of what is seen, series."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, masks, scores
from attnlab.core.attention import log_num_visible, mean_visible
from attnlab.core.mask_layout import without_causal
from attnlab.core.normalizers import TaylorSoftmax
from attnlab.core.terms import Tile, axes_of, restrict
from attnlab.core.tokens import blank, marked, per_token, to_keys
from tests.tolerances import as_float64, assert_close, assert_reordered

BATCH, QUERIES, KEYS, HEADS = 2, 5, 7, 4


def inputs(rng, queries=QUERIES, keys=KEYS):
    shapes = ((queries, HEADS, 8), (keys, 2, 8), (keys, 2, 3))
    return [jnp.asarray(rng.standard_normal((BATCH, *s)), jnp.float32) for s in shapes]


def softmax_of(s, value):
    w = np.exp(s - s.max(-1, keepdims=True))
    wide = np.repeat(as_float64(value), 2, axis=-2)
    return np.einsum("bnts,bsnd->btnd", w / w.sum(-1, keepdims=True), wide)


def products(query, key):
    wide = np.repeat(as_float64(key), 2, axis=-2)
    return np.einsum("btnh,bsnh->bnts", as_float64(query), wide) / np.sqrt(8)


def test_a_pair_is_scaled_by_its_query_and_its_key_in_every_tile(rng):
    rows = jnp.asarray(rng.standard_normal((BATCH, HEADS, QUERIES)), jnp.float32)
    cols = jnp.asarray(rng.standard_normal((BATCH, HEADS, KEYS)), jnp.float32)
    query, key, value = inputs(rng)
    s = products(query, key) * as_float64(rows)[..., None] * as_float64(cols)[..., None, :]
    for implementation in ("reference", "blockwise"):
        out = attention(
            query, key, value, modifiers=scores.PairScale(rows, cols),
            implementation=implementation, block_sizes=(2, 3),
        )  # fmt: skip
        assert_close(out, softmax_of(s, value), "float32")
    term = (scores.PairScale(rows, cols),)
    part = restrict(term, axes_of(term), Tile(1, 2, 3, 4, HEADS, 4))[0]
    assert part.rows.shape == (BATCH, HEADS, 3, 1) and part.cols.shape == (BATCH, HEADS, 1, 4)


@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_a_network_of_pairs_is_that_of_the_sums(activation, rng):
    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    rows, cols = draw(BATCH, HEADS, QUERIES, 3), draw(BATCH, HEADS, KEYS, 3)
    layers, last = [(draw(3, 2), draw(2))], draw(2)
    query, key, value = inputs(rng)
    numpy = {jax.nn.relu: lambda x: np.maximum(x, 0), jnp.tanh: np.tanh}[activation]
    h = numpy(as_float64(rows)[..., :, None, :] + as_float64(cols)[..., None, :, :])
    h = numpy(h @ as_float64(layers[0][0]) + as_float64(layers[0][1]))
    s = products(query, key) + h @ as_float64(last)
    for implementation in ("reference", "blockwise", "xla"):
        network = scores.PairNetwork.of(rows, cols, layers, last, activation)
        wide = jnp.concatenate([value, jnp.zeros((BATCH, KEYS, 2, 5))], -1)
        out = attention(query, key, wide, modifiers=network, implementation=implementation)
        assert_close(out[..., :3], softmax_of(s, value), "float32")


def test_the_series_of_the_exponential_is_positive_everywhere():
    s = jnp.asarray([-1e4, -70.0, -2.0, -1.0, -1e-4, 0.0, 1e-4, 3.0, 1e4])
    exact = 1 + as_float64(s) + as_float64(s) ** 2 / 2
    assert_close(TaylorSoftmax().log_weight(s), np.log(exact), "float32")
    slope = jax.vmap(jax.grad(TaylorSoftmax().log_weight))(s)
    assert_close(slope, (1 + as_float64(s)) / exact, "float32", "gradient")


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_means_and_counts_are_of_what_is_seen(implementation, rng):
    query, _, value = inputs(rng, 6, 6)
    ids = np.array([[0, 0, 1, 1, 1, -1], [0, 0, 0, 0, 1, 1]])
    mask = masks.Causal() & masks.Segments(jnp.asarray(ids))
    seen = np.tri(6, dtype=bool) & (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    count = seen.sum(-1)
    exact = (
        np.einsum("bts,bskd->btkd", seen, as_float64(value)) / np.maximum(count, 1)[..., None, None]
    )
    bad = value.at[0, 5].set(jnp.nan)  # which is not seen
    options = {"mask": mask, "implementation": implementation}
    mean = mean_visible(query, bad, **options)
    assert_close(mean, np.repeat(exact, 2, axis=-2), "float32")
    found = log_num_visible(query, value, **options)
    assert_close(found, np.log(np.maximum(count, 1))[:, None].repeat(HEADS, 1), "float32")
    slope = jax.grad(lambda v: jnp.sum(mean_visible(query, v, **options)))(value)
    shares = np.sum(seen / np.maximum(count, 1)[..., None], 1)
    assert_close(slope, 2 * shares[..., None, None] * np.ones((1, 1, 2, 3)), "float32")


def test_a_mask_is_told_from_its_causal_part():
    padding = masks.KeyPadding(jnp.asarray([3, 2]))
    rest = without_causal(masks.Causal() & padding)
    np.testing.assert_array_equal(rest.dense(4, 4), padding.dense(4, 4))
    assert without_causal(masks.Causal()).dense(3, 3).all()
    assert without_causal(padding) is None


def test_what_is_not_finite_stays_in_its_token(rng):
    x = jnp.asarray(rng.standard_normal((4, 2, 3)), jnp.float32)
    bad = x.at[1, 0, 2].set(jnp.nan).at[2, 1, 0].set(jnp.inf)

    def half(x):
        return per_token(lambda y: jnp.sqrt(jnp.sum(y * y, -1, keepdims=True) + 1), x)

    out, slope = half(bad), jax.grad(lambda x: jnp.sum(jnp.nan_to_num(half(x))))(bad)
    lost = np.zeros((4, 2), bool)
    lost[1, 0] = lost[2, 1] = True
    np.testing.assert_array_equal(np.isnan(out[..., 0]), lost)
    assert_reordered(np.asarray(out)[~lost], as_float64(half(x))[~lost], "float32")
    assert np.all(np.isfinite(slope)) and np.all(np.asarray(slope)[lost] == 0)
    np.testing.assert_array_equal(np.isnan(blank(bad)[..., 0]), lost)
    assert not np.any(np.isfinite(marked(x, bad[..., 0])[2]))
    np.testing.assert_array_equal(to_keys(x[..., 0], 4)[:, 3], [x[3, 0, 0]] * 2 + [x[3, 1, 0]] * 2)
