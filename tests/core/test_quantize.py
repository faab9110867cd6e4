"""Keys and values in int8: the step, the bound that follows from it, and how tight the bound is."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.quantize import Quantized, quantization_error_bound, quantize
from tests import oracles

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 2, 3, 37, 4, 2, 64, 16
# Sums of the measurement itself are rounded: of oracles in float64, of the bound in float32.
SLACK = 1 + 1e-5


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def hostile(rng, *shape):
    """Rows with one large entry, with one size for all, with nothing, near the ends of float32."""
    x = normal(rng, *shape)
    x[:, 0, ..., 0] = 1e4
    x[:, 1] = np.where(x[:, 1] > 0, 1.0, -1.0)
    x[:, 2] = 0
    x[:, 3] *= np.float32(1e-41)
    x[:, 4] *= np.float32(1e35)
    x[:, 5] = (rng.integers(0, 126, x[:, 5].shape) + 0.5) * np.float32(1 / 127)
    x[:, 5, ..., 0] = 1
    return x


@pytest.mark.parametrize("kind", ["token", "block"])
@pytest.mark.parametrize("draw", [normal, hostile])
def test_rounding_errs_by_half_a_step(draw, kind):
    x = draw(np.random.default_rng(0), BATCH, KEYS, KV_HEADS, WIDTH)
    small = quantize(jnp.asarray(x), kind, 16)
    assert small.values.dtype == jnp.int8
    assert small.scale.shape == (BATCH, KEYS if kind == "token" else 3, KV_HEADS)
    step = np.asarray(small.token_scale(), np.float64)[..., None]
    values = np.asarray(small.values, np.float64)
    wrong = np.abs(values * step - x.astype(np.float64))
    assert np.all(wrong <= step * (0.5 + 2e-5))
    assert np.max(np.abs(values)) == 127
    # The step is no larger than 127 of them to the largest entry.
    largest = np.max(np.abs(x), -1)
    if kind == "token":
        tiny = np.finfo(np.float32).tiny
        assert np.all(step[..., 0] <= np.maximum(largest / 127 * (1 + 1e-6), tiny))
        if draw is hostile:
            half = wrong[:, 5] / step[:, 5]
            assert half.max() > 0.499  # the bound is attained


def test_dtype_block_of_one_and_bad_positions():
    x = jnp.asarray(normal(np.random.default_rng(1), 5, 1, 8)).astype(jnp.bfloat16)
    small = quantize(x)
    assert small.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(quantize(x, "block", 1).values, small.values)
    bad = quantize(x.astype(jnp.float32).at[2, 0, 3].set(jnp.inf).at[4, 0, 0].set(jnp.nan))
    wrong = np.isnan(np.asarray(bad.dequantize())).all((-1, -2))
    np.testing.assert_array_equal(wrong, [False, False, True, False, True])


def measured(query, key, value, visible, scale=None):
    """Errors of scores and output of attention over int8, in float64: largest by pair, by entry."""
    small = quantize(jnp.asarray(key)), quantize(jnp.asarray(value))
    exact = [x.astype(np.float64) for x in (key, value)]
    # What int8 stands for, in float64, so that the error is that of int8 alone.
    rounded = [
        np.asarray(x.values, np.float64) * np.asarray(x.token_scale(), np.float64)[..., None]
        for x in small
    ]
    scale = 1 / np.sqrt(query.shape[-1]) if scale is None else scale
    results = []
    for k, v in (exact, rounded):
        group = query.shape[-2] // k.shape[-2]
        scores = scale * np.einsum("btnh,bsnh->bnts", query, np.repeat(k, group, -2))
        out = oracles.attention(query, k, v, mask=lambda i, j: visible, scale=scale)
        results.append((scores, out))
    bound = quantization_error_bound(
        jnp.asarray(query), *small, visible=jnp.asarray(visible), scale=scale
    )
    wrong = [np.abs(a - b) for a, b in zip(*results, strict=True)]
    return wrong, [np.asarray(x, np.float64) for x in bound]


def drawn(seed, draw=normal):
    rng = np.random.default_rng(seed)
    query = normal(rng, BATCH, QUERIES, HEADS, WIDTH)
    key = draw(rng, BATCH, KEYS, KV_HEADS, WIDTH)
    value = draw(rng, BATCH, KEYS, KV_HEADS, VALUE_WIDTH)
    visible = rng.random((BATCH, HEADS, QUERIES, KEYS)) < 0.7
    visible[0, 0, 0] = False
    return query, key, value, visible


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("draw", [normal, hostile])
def test_bound_holds(draw, seed):
    query, key, value, visible = drawn(seed, draw)
    if draw is hostile:
        key[:, 4] *= np.float32(1e-35)  # finite products
    (scores, out), (most, limit) = measured(query, key, value, visible)
    # Entries of 1e35 make float64 sums round by more than small bounds.
    rounding = 1e-12 * np.max(np.abs(value))
    assert np.all(np.where(visible, scores, 0) <= most * SLACK + 1e-9)
    assert np.all(out <= limit * SLACK + rounding)


def test_bound_of_random_scores_is_not_vacuous():
    """The largest error is between a sixth and a half of its bound, that of the output a thirtieth.

    Errors of 64 channels cancel, and the output averages over keys.
    """
    for seed in range(3):
        (scores, out), (most, limit) = measured(*drawn(seed))
        assert 1 / 6 < np.max(scores / most) < 1 / 2
        assert np.max(out[limit > 0] / limit[limit > 0]) > 1 / 30


@pytest.mark.parametrize("width", [4, 64])
def test_bound_is_attained(width):
    """Two keys half a step off along the query, in opposite directions."""
    query = np.ones((1, 1, 1, width), np.float32)
    # Entries half a step from two integers are rounded to the even one: -0.5 up, 1.5 up.
    key = np.full((1, 2, 1, width), 1.4999, np.float32)
    key[0, 1] = 0.5001
    key[..., 0] = 127.0
    scale = 4.0 / width
    # The scores are made equal, then apart by half of what the errors add, where the bound is least
    # generous: weights p and 1 - p with p = 1 / (1 + e^E).
    (scores, _), (most, _) = measured(query, key, np.ones((1, 2, 1, 1), np.float32),
                                      np.ones((1, 1, 1, 2), bool), scale)  # fmt: skip
    assert np.all(scores <= most * SLACK)
    assert np.min(scores / most) > 0.99 * (width - 1) / width


def test_output_bound_is_attained():
    """Weights move by tanh(E / 2) where errors of two keys are opposite and weights are even."""
    width, scale = 256, 1.0
    query = np.zeros((1, 1, 1, width), np.float32)
    key = np.zeros((1, 2, 1, width), np.float32)
    key[..., 0] = 127.0  # step 1
    # Half a step down and up, over channels that the query sees; then scores that are even.
    key[0, 0, 0, 1:201], key[0, 1, 0, 1:201] = 1.499, 0.501
    query[..., 1:201] = 0.01
    value = np.array([127.0, -127.0], np.float32).reshape(1, 2, 1, 1)
    error = 200 * 0.01 * 0.499  # E: 0.998
    low = 1 / (1 + np.exp(error))
    # The first key rises by E from weight 1 - p... it is rounded down, the second up.
    gap = np.log((1 - low) / low)  # score of the first over that of the second, before rounding
    key[0, 0, 0, 255], key[0, 1, 0, 255] = 100.0, -100.0  # exact in int8
    query[..., 255] = (gap - 200 * 0.01 * (1.499 - 0.501)) / 200
    (scores, out), (most, limit) = measured(query, key, value, np.ones((1, 1, 1, 2), bool), scale)
    assert np.all(scores <= most * SLACK)
    assert out.max() <= limit.max() * SLACK
    assert out.max() > 0.85 * limit.max()


def test_sharper_modifiers_widen_the_bound():
    query, key, value, visible = drawn(0)
    small = quantize(jnp.asarray(key)), quantize(jnp.asarray(value))
    query, visible = jnp.asarray(query), jnp.asarray(visible)
    one = quantization_error_bound(query, *small, visible=visible)
    two = quantization_error_bound(query, *small, visible=visible, lipschitz=2.0)
    np.testing.assert_allclose(two.scores, 2 * one.scores, rtol=1e-6)
    seen = np.asarray(visible.any(-1)).swapaxes(-1, -2)
    assert bool((two.output > one.output)[seen].all())
    np.testing.assert_array_equal(one.output[0, 0, 0], 0)  # sees nothing, gives zero either way


def test_wrong_calls_are_named():
    x = jnp.ones((3, 1, 4))
    with pytest.raises(ValueError, match='scale: expected "token" or "block", got \'row\''):
        quantize(x, "row")
    with pytest.raises(ValueError, match="block: expected a positive int, got 0"):
        quantize(x, "block", 0)
    with pytest.raises(TypeError, match="key: expected Quantized"):
        quantization_error_bound(x, x, quantize(x))
    wide = quantize(jnp.ones((3, 3, 4)))
    with pytest.raises(ValueError, match="2 heads are not a multiple of 3"):
        quantization_error_bound(jnp.ones((3, 2, 4)), wide, wide)
    assert isinstance(quantize(x), Quantized)
