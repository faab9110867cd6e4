"""Linformer: softmax attention to few keys; what it is without compression, and what it shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks
from attnlab.linear.linformer import Linformer, linformer_attention
from tests import oracles
from tests.compiled import temporaries
from tests.tolerances import LINEAR_GROWTH, as_float64, assert_close, assert_reordered


def problem(rng, queries=14, keys=14):
    shapes = ((2, queries, 4, 3), (2, keys, 2, 3), (2, keys, 2, 5))
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("queries", [14, 5])
def test_without_compression_it_is_softmax_attention(queries, rng):
    arrays = problem(rng, queries)
    ours = linformer_attention(*map(jnp.asarray, arrays), key_projection=jnp.eye(14))
    assert_close(ours, oracles.attention(*map(as_float64, arrays)), np.float32)


@pytest.mark.parametrize("per_head", [False, True])
def test_it_is_softmax_attention_to_compressed_keys(per_head, rng):
    """Nine keys through the first nine columns; four from the sixth on through columns 5 to 8."""
    query, key, value = problem(rng, 14, 9)
    shape = (2, 6, 20) if per_head else (6, 20)
    e, f = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    for first, count in ((0, 9), (5, 4)):
        mixed = []
        for matrix, x in ((e, key), (f, value)):
            columns = np.broadcast_to(matrix, (2, 6, 20))[..., first : first + count]
            mixed.append(np.einsum("krs,bskh->brkh", as_float64(columns), x[:, :count]))
        ours = linformer_attention(
            *map(jnp.asarray, (query, key[:, :count], value[:, :count])),
            key_projection=jnp.asarray(e), value_projection=jnp.asarray(f), key_offset=first,
        )  # fmt: skip
        assert_close(ours, oracles.attention(as_float64(query), *mixed), np.float32)


def test_padding_is_left_out_before_it_is_compressed(rng):
    query, key, value = (jnp.asarray(x) for x in problem(rng))
    module = Linformer(20, num_compressed=6, rngs=nnx.Rngs(0))
    mask = masks.KeyPadding(jnp.asarray([9, 9])) & masks.QueryPadding(jnp.asarray([14, 11]))
    padded = as_float64(module(query, key.at[:, 9:].set(jnp.nan), value, mask=mask))
    alone = module(query, key[:, :9], value[:, :9])
    assert_reordered(padded[0], as_float64(alone)[0], np.float32)
    np.testing.assert_array_equal(padded[1, 11:], 0)


def test_the_place_of_a_key_matters(rng):
    query, key, value = (jnp.asarray(x) for x in problem(rng))
    module = Linformer(14, num_compressed=6, rngs=nnx.Rngs(0))
    moved = module(query, key[:, ::-1], value[:, ::-1]) - module(query, key, value)
    assert np.max(np.abs(as_float64(moved))) > 1e-2


def test_parameters_are_shared_as_the_paper_says():
    """2 R L a layer shared by heads, R L a layer by keys and values, R L in all by layers."""

    def count(layers):
        state = nnx.state(nnx.List(layers), nnx.Param)
        return sum(x.size for x in jax.tree.leaves(state))

    def layer(**options):
        return Linformer(20, num_compressed=6, rngs=nnx.Rngs(0), **options)

    assert count([layer() for _ in range(3)]) == 3 * 2 * 6 * 20
    assert count([layer(sharing="key-value") for _ in range(3)]) == 3 * 6 * 20
    assert count([layer(sharing="none", num_heads=4)]) == 4 * 2 * 6 * 20
    first = layer(sharing="key-value")
    others = [layer(sharing="key-value", projection=first.key_projection) for _ in range(2)]
    assert count([first, *others]) == 6 * 20
    bound = np.sqrt(3 / 26)
    drawn = as_float64(first.key_projection[...])
    assert 0.9 * bound < np.max(np.abs(drawn)) <= bound


def test_weights_of_softmax_are_nearly_of_low_rank(rng):
    """Section 4: a quarter of the singular values carry most of the spectrum, unlike of noise."""

    def share(matrix):
        values = np.linalg.svd(matrix, compute_uv=False)
        return values[:32].sum() / values.sum()

    query, key = (rng.standard_normal((128, 16)) for _ in range(2))
    weights = np.exp(query @ key.T / 4)
    weights /= weights.sum(-1, keepdims=True)
    assert share(weights) > 0.65 > 0.5 > share(rng.standard_normal((128, 128)))


def test_memory_grows_with_the_length_alone():
    def memory(n):
        arrays = [jax.ShapeDtypeStruct((n, 2, 16), jnp.float32)] * 3
        matrix = jax.ShapeDtypeStruct((32, n), jnp.float32)
        run = lambda *x: linformer_attention(*x[:3], key_projection=x[3])  # noqa: E731
        return temporaries(run, *arrays, matrix)

    small, large = memory(1024), memory(4096)
    assert large <= LINEAR_GROWTH * small
    assert large < 4096 * 4096


def test_wrong_input_is_refused_by_name(rng, as_users_run_it):
    arrays = [jnp.asarray(x) for x in problem(rng)]
    for mask in (masks.Causal(), masks.Segments(jnp.zeros((2, 14), jnp.int32))):
        with pytest.raises(NotImplementedError, match=r"mask.*linear-transformer"):
            linformer_attention(*arrays, key_projection=jnp.eye(14), mask=mask)
    for name, options in (
        (r"key_projection.*14.*13", {"key_projection": jnp.ones((4, 13))}),
        (r"key_projection.*15.*14", {"key_projection": jnp.ones((4, 14)), "key_offset": 1}),
        (r"key_projection.*\(3, 4, 14\)", {"key_projection": jnp.ones((3, 4, 14))}),
        ("modifiers", {"key_projection": jnp.eye(14), "modifiers": (abs,)}),
    ):
        with pytest.raises(ValueError, match=name):
            linformer_attention(*arrays, **options)
    for name, options in (
        (r"sharing.*all", {"sharing": "all"}),
        ("num_compressed=0", {"num_compressed": 0}),
        ("projection", {"projection": nnx.Param(jnp.eye(3))}),
    ):
        with pytest.raises(ValueError, match=name):
            Linformer(8, rngs=nnx.Rngs(0), **options)
