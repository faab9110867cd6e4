"""Efficient attention: context first or weights first, the same; a few context vectors for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks
from attnlab.linear.efficient_attention_linear import EfficientAttention, efficient_attention
from tests.compiled import temporaries
from tests.tolerances import LINEAR_GROWTH, as_float64, assert_close, assert_reordered


def problem(rng, queries=14, keys=14):
    shapes = ((2, queries, 4, 3), (2, keys, 2, 3), (2, keys, 2, 5))
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("queries", [14, 6])
def test_scaling_is_dot_product_attention_over_n(queries, rng):
    arrays = problem(rng, queries)
    ours = efficient_attention(*map(jnp.asarray, arrays), normalization="scaling")
    query, key, value = map(as_float64, arrays)
    key, value = (np.repeat(x, 2, axis=-2) for x in (key, value))
    weights = np.einsum("btnh,bsnh->bnts", query, key) / 14
    assert_close(ours, np.einsum("bnts,bsnd->btnd", weights, value), np.float32)


def test_scaling_by_the_keys_so_far_and_in_pieces(rng):
    arrays = problem(rng)
    module = EfficientAttention("scaling")
    whole = module(*map(jnp.asarray, arrays), mask=masks.Causal())
    query, key, value = map(as_float64, arrays)
    key, value = (np.repeat(x, 2, axis=-2) for x in (key, value))
    weights = np.einsum("btnh,bsnh->bnts", query, key) * np.tri(14)
    weights /= np.arange(1, 15)[:, None]
    assert_close(whole, np.einsum("bnts,bsnd->btnd", weights, value), np.float32)
    state, parts = module.init_state((2,), 2, 3, 5), []
    for first, last in ((0, 5), (5, 14)):
        out, state = module(
            *(jnp.asarray(x[:, first:last]) for x in arrays), mask=masks.Causal(),
            query_offset=first, key_offset=first, initial_state=state, return_state=True,
        )  # fmt: skip
        parts.append(out)
    assert_reordered(jnp.concatenate(parts, 1), as_float64(whole), np.float32)


def weights_of(query, key, **options):
    count = len(key)
    eye = jnp.broadcast_to(jnp.eye(count)[:, None], (count, 1, count))
    out = efficient_attention(jnp.asarray(query), jnp.asarray(key), eye, **options)
    return as_float64(out)[:, 0]


def test_both_associations_and_a_distribution_of_low_rank(rng):
    query, key = (rng.standard_normal((14, 1, 3)).astype(np.float32) for _ in range(2))
    rho_q, rho_k = np.exp(as_float64(query[:, 0])), np.exp(as_float64(key[:, 0]))
    rho_q, rho_k = rho_q / rho_q.sum(-1, keepdims=True), rho_k / rho_k.sum(0)
    weights = weights_of(query, key)
    assert_close(weights, rho_q @ rho_k.T, np.float32)
    assert np.all(weights >= 0)
    assert_close(weights.sum(-1), np.ones(14), np.float32)
    values = np.linalg.svd(weights, compute_uv=False)
    assert values[3] < 1e-6 * values[0] < values[2]


def test_memory_grows_with_the_length_alone():
    def arrays(n):
        return [jax.ShapeDtypeStruct((n, 2, 16), jnp.float32)] * 3

    small, large = (temporaries(efficient_attention, *arrays(n)) for n in (1024, 4096))
    assert large <= LINEAR_GROWTH * small
    assert large < 4096 * 4096


def test_wrong_input_is_refused_by_name(rng, as_users_run_it):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    with pytest.raises(ValueError, match=r"normalization.*sum"):
        efficient_attention(*arrays, normalization="sum")
    with pytest.raises(ValueError, match=r"normalization.*sum"):
        EfficientAttention("sum")
    for normalization in ("softmax", "scaling"):
        with pytest.raises(ValueError, match="scale"):
            efficient_attention(*arrays, normalization=normalization, scale=1.0)
