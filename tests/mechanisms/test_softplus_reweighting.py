"""Gao et al.: softplus and power together keep attention sharp at lengths where softmax fades."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, masks
from attnlab.normalization.softplus_reweighting import (
    SoftplusReweighting,
    softplus_reweighting_attention,
)
from tests.tolerances import as_float64, assert_close


def entropies(attend, lengths=(256, 4096), draws=40, width=64):
    """Mean entropy of the weights of one query over Gaussian keys, in nats."""
    found = []
    for n in lengths:
        rng = np.random.default_rng(0)
        query = jnp.asarray(rng.standard_normal((1, draws, width)), jnp.float32)
        key = jnp.asarray(rng.standard_normal((n, draws, width)), jnp.float32)
        # The output is linear in the values: its gradient there is the weights.
        weights = jax.grad(lambda v, q=query, k=key: jnp.sum(attend(q, k, v)))(
            jnp.zeros((n, draws, 1))
        )
        w = as_float64(weights)[..., 0]
        assert np.all(np.abs(w.sum(0) - 1) < 1e-3)
        found.append(float(np.mean(-np.sum(w * np.log(np.maximum(w, 1e-300)), 0))))
    return found


def with_power(power):
    return lambda *x: softplus_reweighting_attention(*x, power=power)


def test_entropy_grows_half_as_fast_with_both_halves_and_no_slower_with_one():
    growth = {}
    for name, attend in {
        "softmax": attention, "lssa": with_power(None), "3": with_power(3.0),
        "15": with_power(15.0),
    }.items():  # fmt: skip
        short, long = entropies(attend)
        growth[name] = long - short
    assert growth["15"] < 0.6 * growth["softmax"]
    assert long < 2.5  # of log 4096 = 8.3
    assert growth["3"] > 0.8 * growth["softmax"]
    assert growth["lssa"] > 0.8 * growth["softmax"]


def test_no_power_overflows():
    """N A reaches N = 2000 here, and 2000^15 is beyond float32."""
    key = jnp.zeros((2000, 1, 64)).at[:, 0, 0].set(-1.0).at[7, 0, 0].set(1.0)
    query = jnp.zeros((1, 1, 64)).at[0, 0, 0].set(1.0)
    value = jnp.arange(2000.0)[:, None, None]

    def loss(query, key):
        return jnp.sum(softplus_reweighting_attention(query, key, value))

    out, slopes = jax.value_and_grad(loss, argnums=(0, 1))(query, key)
    assert abs(float(out) - 7) < 1e-3
    assert all(np.all(np.isfinite(g)) for g in slopes)


def test_equal_scores_are_above_par_for_few_keys_only():
    """A zero query: up to three keys share alike; of more none is above par, and nothing is read"""
    x, value = jnp.zeros((9, 1, 8)), jnp.arange(9.0)[:, None, None] + 1
    key = jnp.ones((9, 1, 8))

    def run(x):
        return softplus_reweighting_attention(x, key, value, mask=masks.Causal())

    np.testing.assert_allclose(run(x)[:, 0, 0], [1, 1.5, 2, 0, 0, 0, 0, 0, 0], atol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(run(x)))(x)))


def test_a_key_seen_that_is_not_a_number_is_noticed(rng):
    query, key, value = (jnp.asarray(rng.standard_normal((12, 2, 8)), jnp.float32) for _ in "qkv")
    out = softplus_reweighting_attention(query, key.at[8].set(jnp.nan), value, mask=masks.Causal())
    assert np.all(np.isnan(out[8:])) and np.all(np.isfinite(out[:8]))


def test_lengths_of_queries_and_keys_do_not_matter(rng):
    query, key, value = (jnp.asarray(rng.standard_normal((12, 2, 8)), jnp.float32) for _ in "qkv")
    scaled = softplus_reweighting_attention(3 * query, 0.5 * key, value)
    assert_close(scaled, as_float64(softplus_reweighting_attention(query, key, value)), "float32")


def test_packed_documents_count_their_own_keys(rng):
    query, key, value = (jnp.asarray(rng.standard_normal((20, 2, 8)), jnp.float32) for _ in "qkv")
    ids = jnp.asarray([0] * 8 + [1] * 12)
    packed = softplus_reweighting_attention(
        query, key, value, mask=masks.Causal() & masks.Segments(ids)
    )
    for part in (slice(0, 8), slice(8, 20)):
        alone = SoftplusReweighting()(query[part], key[part], value[part], mask=masks.Causal())
        assert_close(packed[part], as_float64(alone), "float32")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"power": 0.0}, "power: expected a positive number or None, got 0.0"),
        ({"scale": 0.5}, "scale: .* got 0.5"),
        ({"return_lse": True}, "return_lse: softplus re-weighting has its own"),
    ],
)
def test_bad_calls_are_refused(options, words):
    x = jnp.ones((4, 1, 2))
    with pytest.raises(ValueError, match=words):
        softplus_reweighting_attention(x, x, x, **options)
    with pytest.raises(ValueError, match="power: expected a positive number"):
        SoftplusReweighting(power=-1.0)
