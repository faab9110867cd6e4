"""Linear log-normal attention: as concentrated as softmax attention, in the range of its fit."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.linear.linear_log_normal import (
    LinearLogNormal,
    diagonal_attention,
    lln_attention,
    matched,
    spread,
)
from tests import oracles
from tests.tolerances import as_float64, assert_close, assert_reordered


def gaussian(rng, sigma, length=512, width=64):
    return (sigma * rng.standard_normal((length, 1, width))).astype(np.float32)


def log_weights(query, key, **options):
    count = len(key)
    eye = jnp.broadcast_to(jnp.eye(count)[:, None], (count, 1, count))
    weights = lln_attention(jnp.asarray(query), jnp.asarray(key), eye, **options)
    return np.log(as_float64(weights)[:, 0])


def log_softmax(query, key):
    score = query[:, 0] @ key[:, 0].T / np.sqrt(query.shape[-1])
    return score - np.logaddexp.reduce(score, axis=-1)[:, None]


@pytest.mark.parametrize("sigma", [1.0, 1.2, 1.5])
def test_concentration_is_that_of_softmax(sigma, rng):
    """Section 4 of the paper; outside of these spreads the fit is off by more than a quarter."""
    query, key = gaussian(rng, sigma), gaussian(rng, sigma)
    ours = log_weights(query, key)
    ratio = ours.var() / log_softmax(query, key).var()
    assert 0.75 < ratio < 1.3
    assert log_weights(query, key, alpha=1.0, beta=1.0).var() < 0.2 * ours.var()  # unmatched
    standard = (ours - ours.mean()) / ours.std()
    assert abs(np.mean(standard**3)) < 1.0  # about normal


def test_matched_by_hand():
    alpha, beta = matched(2.0, 0.5)
    common = np.sqrt((1.0 + 0.35487039) / (2 * 0.14855178))
    assert_close(jnp.stack([alpha, beta]), [common / 2.0, common / 0.5], np.float32)


def test_linear_is_explicit(rng):
    query, key = gaussian(rng, 1.0, 24, 4), gaussian(rng, 2.0, 24, 4)
    alpha, beta = (as_float64(x) for x in matched(query.std(), key.std()))
    features = np.exp(alpha * query[:, 0]), np.exp(beta * key[:, 0])
    weights = features[0] @ features[1].T
    weights /= weights.sum(-1, keepdims=True)
    assert_close(np.exp(log_weights(query, key)), weights, np.float32)


def test_spreads_leave_padding_out_and_examples_apart(rng):
    x = rng.standard_normal((2, 9, 3, 4)).astype(np.float32)
    real = np.arange(9) < np.array([9, 5])[:, None]
    found = as_float64(spread(jnp.asarray(x), jnp.asarray(real)))
    for b, n in np.ndindex(2, 3):
        assert_close(found[b, n], as_float64(x)[b, real[b], n].std(), np.float32)
    query, key, value = (rng.standard_normal((2, 9, 3, 4)).astype(np.float32) for _ in range(3))
    mask = masks.KeyPadding(jnp.asarray([9, 5])) & masks.QueryPadding(jnp.asarray([9, 5]))
    padded = lln_attention(*map(jnp.asarray, (query, key, value)), mask=mask)
    alone = lln_attention(*(jnp.asarray(x[1:, :5]) for x in (query, key, value)))
    assert_reordered(padded[1, :5], as_float64(alone)[0], np.float32)


def test_constant_inputs_have_no_spread_and_give_the_mean(rng):
    value = rng.standard_normal((6, 1, 3)).astype(np.float32)
    ones = jnp.ones((6, 1, 4))
    out = lln_attention(ones, ones, jnp.asarray(value))
    assert_close(out, np.broadcast_to(as_float64(value).mean(0), (6, 1, 3)), np.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hybrid", ["average", "scale", "ratio"])
def test_a_hybrid_mixes_in_softmax_inside_blocks(hybrid, causal, rng):
    arrays = [rng.standard_normal((11, 2, 4)).astype(np.float32) for _ in range(3)]
    module = LinearLogNormal(1.5, 0.5, hybrid=hybrid, num_heads=2, value_width=4)
    mask = masks.Causal() if causal else None
    linear = as_float64(lln_attention(*map(jnp.asarray, arrays), alpha=1.5, beta=0.5, mask=mask))
    order = np.arange(11) // 4
    allowed = (order[:, None] == order) & (np.tri(11, dtype=bool) if causal else True)
    near = oracles.attention(*map(as_float64, arrays), mask=oracles.array(allowed))
    share = np.full((2, 4), 0.5), np.full((2, 4), 0.5)
    if hybrid != "average":
        first = rng.random((2, 4)).astype(np.float32)
        module.linear_part[...] = jnp.asarray(first)
        share = as_float64(first), 1 - as_float64(first)
    if hybrid == "scale":
        second = rng.random((2, 4)).astype(np.float32)
        module.block_part[...] = jnp.asarray(second)
        share = share[0], as_float64(second)
    ours = module(*map(jnp.asarray, arrays), mask=mask)
    assert_close(ours, linear * share[0] + near * share[1], np.float32)


def test_wrong_input_is_refused_by_name(as_users_run_it):
    x = jnp.ones((6, 2, 4))
    for name, options in (
        (r"alpha.*causal.*future", {"mask": masks.Causal()}),
        (r"alpha.*causal.*future", {"causal": True}),
        (r"alpha.*beta=None", {"alpha": 1.0}),
        ("scale", {"scale": 1.0}),
    ):
        with pytest.raises(ValueError, match=name):
            lln_attention(x, x, x, **options)
    with pytest.raises(ValueError, match=r"hybrid.*sum"):
        LinearLogNormal(hybrid="sum")
    with pytest.raises(ValueError, match=r"block_size.*0"):
        diagonal_attention(x, x, x, block_size=0)
