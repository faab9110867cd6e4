"""Zeris: a gate by energy; what the published statistics read of the future, ours do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks
from attnlab.dense.energy_gated import EnergyGatedAttention, energy_gated_attention
from tests.tolerances import as_float64, assert_close, assert_reordered

LENGTH, HEADS = 12, 2


def arrays(rng, length=LENGTH):
    x = [jnp.asarray(rng.standard_normal((length, HEADS, 8)), jnp.float32) for _ in "qkv"]
    return x, jnp.asarray(rng.standard_normal((length, HEADS)), jnp.float32)


def test_a_gate_without_slope_is_softmax_attention(rng):
    """Not half of it: the weights are divided by their sum again."""
    x, energy = arrays(rng)
    flat = {"steepness": jnp.zeros(HEADS), "mask": masks.Causal()}
    ours = energy_gated_attention(*x, energy=energy, **flat)
    assert_reordered(ours, as_float64(attention(*x, mask=masks.Causal())), "float32")


def test_unmasked_both_statistics_are_the_published_formula(rng):
    (query, key, value), energy = arrays(rng)
    e = as_float64(energy)
    gate = 1 / (1 + np.exp(-2 * (e - e.mean(0)) / e.std(0)))
    s = np.einsum("tnh,snh->nts", as_float64(query), as_float64(key)) / np.sqrt(8)
    w = np.exp(s) * gate.T[:, None, :]
    exact = np.einsum("nts,snd->tnd", w / w.sum(-1, keepdims=True), as_float64(value))
    for statistics in ("seen", "window"):
        ours = energy_gated_attention(query, key, value, energy=energy, statistics=statistics)
        assert_close(ours, exact, "float32")


def test_the_last_row_is_that_of_the_published_formula(rng):
    """So is what it computes while it generates."""
    x, energy = arrays(rng)
    causal = energy_gated_attention(*x, energy=energy, mask=masks.Causal())
    whole = energy_gated_attention(*x, energy=energy, statistics="window")
    assert_close(causal[-1], as_float64(whole[-1]), "float32")
    assert np.max(np.abs(causal[:-1] - whole[:-1])) > 1e-2


@pytest.mark.parametrize("statistics", ["seen", "window"])
def test_the_published_statistics_read_the_future(statistics, rng):
    x, energy = arrays(rng)

    def row(energy):
        out = energy_gated_attention(
            *x, energy=energy, mask=masks.Causal(), statistics=statistics, allow_leak=True
        )
        return jnp.sum(jnp.sin(out[5]))

    slope = np.abs(jax.grad(row)(energy))
    assert np.any(slope[:6] > 1e-4)
    assert np.any(slope[6:] > 1e-4) == (statistics == "window")
    if statistics == "seen":
        np.testing.assert_array_equal(slope[6:], 0)


def test_the_size_and_mean_of_energies_are_irrelevant(rng):
    x, energy = arrays(rng)
    plain = energy_gated_attention(*x, energy=energy, mask=masks.Causal())
    moved = energy_gated_attention(*x, energy=10 * energy + 3, mask=masks.Causal())
    assert np.max(np.abs(plain - moved)) < 1e-5


def test_equal_energies_gate_nothing_and_have_finite_slopes(rng):
    x, _ = arrays(rng)
    energy = jnp.full((LENGTH, HEADS), 0.37)

    def run(energy):
        return energy_gated_attention(*x, energy=energy, mask=masks.Causal())

    plain = attention(*x, mask=masks.Causal())
    assert_reordered(run(energy), as_float64(plain), "float32")
    assert np.all(np.isfinite(jax.grad(lambda e: jnp.sum(jnp.sin(run(e))))(energy)))


def test_an_energy_that_is_not_a_number_reaches_only_those_who_see_it(rng):
    x, energy = arrays(rng)
    out = energy_gated_attention(*x, energy=energy.at[8].set(jnp.nan), mask=masks.Causal())
    assert np.all(np.isnan(out[8:])) and np.all(np.isfinite(out[:8]))


def test_packed_documents_have_their_own_means(rng):
    x, energy = arrays(rng)
    ids = masks.Segments(jnp.asarray([0] * 5 + [1] * 7))
    for statistics, mask in (("seen", masks.Causal() & ids), ("window", ids)):
        out = energy_gated_attention(*x, energy=energy, mask=mask, statistics=statistics)
        causal = masks.Causal() if statistics == "seen" else None
        for part in (slice(0, 5), slice(5, 12)):
            own = (y[part] for y in x)
            alone = energy_gated_attention(*own, energy=energy[part], mask=causal)
            assert_close(out[part], as_float64(alone), "float32")


def test_a_layer_decodes_with_energies_among_its_keys(rng):
    mechanism = EnergyGatedAttention(16, 4, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(16, 4, num_kv_heads=2, mechanism=mechanism, rngs=nnx.Rngs(1))
    x = jnp.asarray(rng.standard_normal((2, 10, 16)), jnp.float32)
    whole, cache = layer(x, mask=masks.Causal()), layer.create_cache((2,), 10)
    for first, last in ((0, 6), (6, 7), (7, 10)):
        out, cache = layer(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, whole[:, first:last], np.float32)


def test_the_parameters_are_those_that_do_not_cancel():
    module = EnergyGatedAttention(256, 8, rngs=nnx.Rngs(0))
    count = sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))
    # The paper's 12,480 in six layers: a bias and the weight of one scale beside these 258.
    assert 6 * (count + 2 * 8) == 12_480


def test_bad_calls_are_refused(rng, as_users_run_it):
    x, energy = arrays(rng)
    with pytest.raises(ValueError, match=r'statistics: "window".*causal.*allow_leak=True'):
        energy_gated_attention(*x, energy=energy, statistics="window", mask=masks.Causal())
    with pytest.raises(ValueError, match=r"statistics: expected one of .*got 'all'"):
        EnergyGatedAttention(16, 2, statistics="all", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"energy: expected shape \(12, 2\), got \(11, 2\)"):
        energy_gated_attention(*x, energy=energy[:-1])
