"""InLine attention: weights sum to one and tell queries apart that a division cannot."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, masks
from attnlab.linear.inline_attention import InLine, inline_attention, local_residual
from attnlab.linear.linear_transformer import linear_transformer_attention
from tests import oracles
from tests.contract.feature_formulas import inline
from tests.tolerances import as_float64, assert_close, assert_reordered

IDS = np.array([[0] * 4 + [-1] * 2 + [3] * 8, [5] * 9 + [6] * 5], np.int32)


def problem(rng, queries=14, keys=14):
    shapes = ((2, queries, 4, 3), (2, keys, 2, 3), (2, keys, 2, 5))
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def weights_of(query, key, function=inline_attention, **options):
    count = len(key)
    eye = jnp.broadcast_to(jnp.eye(count)[:, None], (count, 1, count))
    return as_float64(function(jnp.asarray(query), jnp.asarray(key), eye, **options))[:, 0]


def test_the_two_sums_are_the_square_matrix(rng):
    same = (IDS[:, None, :, None] == IDS[:, None, None, :]) & (IDS[:, None, None] >= 0)
    segments, past = masks.Segments(jnp.asarray(IDS)), np.tri(14, dtype=bool)
    for mask, allowed in (
        (None, np.ones((14, 14), bool)),
        (masks.Causal(), past),
        (segments, same),
        (segments & masks.Causal(), same & past),
    ):
        arrays = problem(rng)
        arrays[1] += 3  # a mean that has to be taken off
        ours = jax.jit(lambda *x, mask=mask: inline_attention(*x, mask=mask, chunk_size=4))
        exact = inline({}, *map(as_float64, arrays), mask=oracles.array(allowed))
        assert_close(ours(*map(jnp.asarray, arrays)), exact, np.float32)
    arrays = problem(rng, queries=5)
    exact = inline({}, *map(as_float64, arrays))
    assert_close(inline_attention(*map(jnp.asarray, arrays)), exact, np.float32)


def test_rows_sum_to_one_and_may_be_negative(rng):
    query, key = (5 * rng.standard_normal((14, 1, 3)).astype(np.float32) for _ in range(2))
    weights = weights_of(query, key)
    assert_close(weights.sum(-1), np.ones(14), np.float32)
    assert weights.min() < -0.1


def test_it_is_injective_where_a_division_is_not(rng):
    """The paper's first two propositions: relu features of q and 2 q."""
    query, key = (rng.standard_normal((9, 1, 3)).astype(np.float32) for _ in range(2))
    query = np.abs(query)
    relu = {"feature_map": jax.nn.relu}
    divided = [
        weights_of(q, key, linear_transformer_attention, epsilon=0.0, **relu)
        for q in (query, 2 * query)
    ]
    assert_reordered(divided[0], divided[1], np.float32)
    ours = [weights_of(q, key, **relu) for q in (query, 2 * query)]
    assert np.max(np.abs(ours[0] - ours[1]), axis=-1).min() > 1e-2


def test_keys_that_do_not_span_the_width_do_not_tell_queries_apart(rng):
    query, key = (rng.standard_normal((9, 1, 3)).astype(np.float32) for _ in range(2))
    key[..., 2] = 0.7  # a constant, so that centred keys have rank 2
    moved = query + np.array([0, 0, 5], np.float32)
    assert_reordered(weights_of(query, key), weights_of(moved, key), np.float32, scale=5.0)


def test_a_sequence_can_be_split_anywhere(rng):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    module, mask = InLine(), masks.Causal() & masks.KeyPadding(jnp.asarray([14, 6]))
    whole = module(*arrays, mask=mask)
    state, parts = module.init_state((2,), 2, 3, 5), []
    for first, last in ((0, 1), (1, 8), (8, 14)):
        out, state = module(
            *(x[:, first:last] for x in arrays), mask=mask, query_offset=first, key_offset=first,
            initial_state=state, return_state=True,
        )  # fmt: skip
        parts.append(out)
    assert_reordered(jnp.concatenate(parts, 1), as_float64(whole), np.float32)


def test_one_key_gives_its_value(rng):
    query, key, value = problem(rng, queries=3, keys=1)
    ours = as_float64(inline_attention(*map(jnp.asarray, (query, key, value))))
    expected = np.repeat(as_float64(value), 2, axis=-2)
    np.testing.assert_array_equal(ours, np.broadcast_to(expected, ours.shape))


def test_the_local_residual_filters_each_channel(rng):
    """Filters from the mean of the layer's input, by loops over rows, columns and taps."""
    module = InLine(grid=(3, 4), num_heads=2, value_width=5, rngs=nnx.Rngs(0))
    x = rng.standard_normal((2, 12, 10)).astype(np.float32)
    value = rng.standard_normal((2, 12, 2, 5)).astype(np.float32)
    filters = module.controls(jnp.asarray(x))["filters"]
    w1, b1, w2, b2 = (
        as_float64(p[...])
        for p in (module.inner, module.inner_bias, module.outer, module.outer_bias)
    )
    expected = np.zeros(value.shape)
    for b, n, c in np.ndindex(2, 2, 5):
        hidden = w1[n] @ as_float64(x)[b, :, 5 * n : 5 * n + 5].mean(0) + b1[n]
        hidden = np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
        taps = (w2[n] @ hidden + b2[n])[9 * c : 9 * c + 9].reshape(3, 3)
        assert_close(filters[b, n, c], taps, np.float32)
        image = np.pad(as_float64(value)[b, :, n, c].reshape(3, 4), 1)
        for i, j in np.ndindex(3, 4):
            expected[b, 4 * i + j, n, c] = np.sum(image[i : i + 3, j : j + 3] * taps)
    assert_close(local_residual(jnp.asarray(value), filters, (3, 4)), expected, np.float32)
    query, key = (jnp.asarray(rng.standard_normal((2, 12, 2, 5)), jnp.float32) for _ in "qk")
    out = module(query, key, jnp.asarray(value), filters=filters)
    plain = as_float64(inline_attention(query, key, jnp.asarray(value)))
    assert_close(out, plain + expected, np.float32)


def test_the_layer_makes_the_filters_and_trains_them(rng):
    mechanism = InLine(grid=(2, 3), num_heads=2, value_width=4, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(8, 2, mechanism=mechanism, rngs=nnx.Rngs(1))
    x = jnp.asarray(rng.standard_normal((2, 6, 8)), jnp.float32)
    gradient = nnx.grad(lambda layer: jnp.sum(jnp.square(layer(x))))(layer)
    for name in ("inner", "inner_bias", "outer", "outer_bias"):
        assert np.any(as_float64(getattr(gradient.mechanism, name)[...]) != 0), name


def test_wrong_input_is_refused_by_name(rng, as_users_run_it):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    filters = jnp.zeros((2, 4, 5, 3, 3))
    with pytest.raises(NotImplementedError, match=r"ArrayMask.*attnlab\.attention"):
        inline_attention(*arrays, mask=jnp.ones((14, 14), bool))
    for name, options in (
        (r"grid.*\(3, 4\)", {"filters": filters, "grid": (3, 4)}),
        (r"grid.*None", {"filters": filters}),
        (r"filters.*causal", {"filters": filters, "grid": (2, 7), "mask": masks.Causal()}),
        ("scale", {"scale": 1.0}),
    ):
        with pytest.raises(ValueError, match=name):
            inline_attention(*arrays, **options)
    with pytest.raises(ValueError, match="rngs"):
        InLine(grid=(2, 2))
