"""Xue et al.: each variant is what its principle leaves, with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks
from attnlab.dense.deconstructing_attention import (
    PRESETS,
    Deconstructed,
    deconstructed_attention,
)
from attnlab.linear.fast_factorizable import fastmax_attention
from tests.tolerances import as_float64, assert_close, assert_reordered


def arrays(rng, kv_heads=2, length=9):
    shapes = ((length, 4, 8), (length, kv_heads, 8), (length, kv_heads, 8))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def test_standard_is_attention(rng):
    x = arrays(rng)
    plain = attention(*x, mask=masks.Causal())
    np.testing.assert_array_equal(deconstructed_attention(*x, mask=masks.Causal()), plain)


def test_the_series_is_the_exponential_to_second_order(rng):
    query, key, value = arrays(rng)
    errors = []
    for size in (0.1, 0.05):
        small = query * size, key, value
        errors.append(np.max(np.abs(deconstructed_attention(*small, form="taylor")
                                    - attention(*small))))  # fmt: skip
    assert 1e-6 < errors[0] < 1e-2
    assert errors[0] / errors[1] > 5  # third order: eightfold


@pytest.mark.parametrize("causal", [False, True])
def test_the_series_has_a_feature_map_and_so_a_recurrence(causal, rng):
    x = arrays(rng)
    mask = masks.Causal() if causal else None
    ours = deconstructed_attention(*x, form="taylor", mask=mask)
    linear = fastmax_attention(
        *x, order=2, normalization=None, temperature=8**0.5, mask=mask, implementation="chunked"
    )
    assert_close(ours, as_float64(linear), "float32")


def gated(query, key, value, seen):
    q, k = as_float64(query), np.repeat(as_float64(key), 2, axis=1)
    c = np.sum(q / (1 + np.exp(-q)) * k, -1).T / np.sqrt(8)
    w = np.exp(c)[:, None, :] * seen
    total = np.sum(w, -1, keepdims=True)
    wide = np.repeat(as_float64(value), 2, axis=1)
    return np.einsum("nts,snd->tnd", w / np.where(total == 0, 1, total), wide), np.log(total)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_a_gate_weighs_keys_alike_for_all_queries(implementation, rng):
    x = arrays(rng)
    exact, lse = gated(*x, np.tri(9))
    out, found = deconstructed_attention(
        *x, form="gate", mask=masks.Causal(), return_lse=True, implementation=implementation
    )
    assert_close(out, exact, "float32")
    assert_close(found, lse[..., 0], "float32")
    everywhere = np.asarray(deconstructed_attention(*x, form="gate"))
    assert_reordered(everywhere, np.broadcast_to(everywhere[:1], everywhere.shape), "float32")


def test_gates_are_finite_at_a_thousand_and_slopes_reach_query_and_key(rng):
    query, key, value = arrays(rng)

    def loss(query, key):
        out = deconstructed_attention(query, key, value, form="gate", mask=masks.Causal())
        return jnp.sum(jnp.sin(out))

    slopes = jax.grad(loss, argnums=(0, 1))(query, key)
    assert all(np.any(np.asarray(g) != 0) for g in slopes)
    out, slopes = jax.value_and_grad(loss, argnums=(0, 1))(60 * query, 60 * key)
    assert np.isfinite(out) and all(np.all(np.isfinite(g)) for g in slopes)


def test_what_is_not_a_number_reaches_those_who_see_it(rng):
    query, key, value = arrays(rng)
    for bad in ((query.at[5].set(jnp.nan), key), (query, key.at[5].set(jnp.inf))):
        out = deconstructed_attention(*bad, value, form="gate", mask=masks.Causal())
        assert np.all(np.isfinite(out[:5])) and np.all(np.isnan(out[5:]))


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_without_mixing_a_token_reads_itself(implementation, rng):
    query, key, value = arrays(rng)
    ids = masks.Segments(jnp.asarray([0] * 4 + [-1] + [1] * 4))
    out = deconstructed_attention(
        query, key, value, mixing=False, mask=masks.Causal() & ids, implementation=implementation
    )
    q = as_float64(query)
    exact = q / (1 + np.exp(-q)) * np.repeat(as_float64(value), 2, axis=1)
    exact[4] = 0  # padding sees nothing, itself neither
    assert_close(out, exact, "float32")
    reach = jax.jacobian(
        lambda v: jnp.sum(deconstructed_attention(query, key, v, mixing=False), (1, 2))
    )(value)
    assert np.all(np.sum(np.abs(reach), (2, 3))[~np.eye(9, dtype=bool)] == 0)


def test_all_presets_have_the_same_parameters():
    def count(**options):
        layer = MultiHeadAttention(16, 4, mechanism=Deconstructed(**options), rngs=nnx.Rngs(0))
        return sum(p.size for p in jax.tree.leaves(nnx.state(layer, nnx.Param)))

    assert {count(**options) for options in PRESETS.values()} == {4 * 16 * 16}


@pytest.mark.parametrize("name", ["standard", "approximate", "mlp"])
def test_what_needs_no_query_of_the_past_decodes(name, rng):
    layer = MultiHeadAttention(
        16, 4, num_kv_heads=2, mechanism=Deconstructed(**PRESETS[name]), rngs=nnx.Rngs(1)
    )
    x = jnp.asarray(rng.standard_normal((2, 10, 16)), jnp.float32)
    whole, cache = layer(x, mask=masks.Causal()), layer.create_cache((2,), 10)
    for first, last in ((0, 6), (6, 7), (7, 10)):
        out, cache = layer(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, whole[:, first:last], np.float32)


def test_bad_calls_are_refused(rng):
    query, key, value = arrays(rng)
    refused = [
        ({"form": "cubic"}, "form: expected one of"),
        ({"mixing": False, "form": "gate"}, "form: without mixing"),
        ({"mixing": False, "return_lse": True}, "return_lse: without mixing"),
        ({"normalizer": object()}, "normalizer: the form of the weights"),
        ({"form": "gate", "query_offset": 3}, "query: with form"),
    ]
    for options, words in refused:
        with pytest.raises(ValueError, match=words):
            deconstructed_attention(query, key, value, **options)
    with pytest.raises(ValueError, match=r"query: with form .* got 2 queries and 9 keys"):
        deconstructed_attention(query[:2], key, value, form="gate")
    with pytest.raises(ValueError, match="value: expected the width of query, 8"):
        deconstructed_attention(query, key, value[..., :3], mixing=False)
    layer = MultiHeadAttention(16, 4, mechanism=Deconstructed(form="gate"), rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="reads whole sequences"):
        layer.create_cache((2,), 10)
