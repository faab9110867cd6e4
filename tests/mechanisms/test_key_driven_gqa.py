"""Key-driven grouped queries: who is in which group, and what may not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks
from attnlab.heads.key_driven_gqa import (
    DGQA,
    KDGQA,
    NormState,
    key_driven_attention,
    key_norms,
    norm_state,
    remember,
)
from tests import oracles
from tests.contract.head_sharing_formulas import FORMULAS_HEAD_SHARING, in_groups
from tests.tolerances import as_float64, assert_close, assert_reordered


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def inputs(rng, lengths=(1.0, 1.0), heads=4, size=9):
    """Keys whose heads have these lengths, times eight."""
    query, key, value = (rng.standard_normal((2, size, n, 8)) for n in (heads, *[len(lengths)] * 2))
    key *= 8 * np.asarray(lengths)[:, None] / np.linalg.norm(key, axis=(1, 3), keepdims=True)
    return tuple(jnp.asarray(x, jnp.float32) for x in (query, key, value))


# ---- KDGQA ---------------------------------------------------------------------------------------


def test_keys_of_equal_norm_are_grouped_queries(rng):
    query, key, value = inputs(rng, heads=6)
    key = jnp.stack([key[..., 0, :], -key[..., 0, ::-1]], axis=-2)
    plain = attention(query, key, value)
    found = key_driven_attention(query, key, value)
    assert_reordered(found, as_float64(plain), np.float32)


def test_as_many_key_heads_as_query_heads_are_multi_head_attention(rng):
    arrays = inputs(rng, lengths=(5.0, 1.0, 0.1, 2.0))
    found = key_driven_attention(*arrays)
    np.testing.assert_array_equal(found, attention(*arrays))


@pytest.mark.parametrize(
    ("lengths", "heads", "sizes"),
    [((3.0, 1.0), 4, (3, 1)), ((1.0, 9.0), 4, (1, 3)), ((2.0, 1.02, 1.0, 1.0), 12, (5, 3, 2, 2)),
     ((1.0, 1.0, 2.0), 5, (1, 1, 3))],
)  # fmt: skip
def test_a_longer_key_head_serves_more_queries(rng, lengths, heads, sizes):
    """Also where the heads are not a multiple of the key heads."""
    query, key, value = inputs(rng, heads=heads, lengths=lengths)
    exact = oracles.attention(
        *map(as_float64, (query, in_groups(key, sizes), in_groups(value, sizes)))
    )
    assert_close(key_driven_attention(query, key, value), exact, np.float32)


def test_sequences_of_a_batch_have_groups_of_their_own(rng):
    query, key, value = inputs(rng)
    key = key * jnp.asarray([[9.0, 1.0], [1.0, 9.0]])[:, None, :, None]
    together = key_driven_attention(query, key, value)
    exact = FORMULAS_HEAD_SHARING["key-driven-gqa"]({}, *map(as_float64, (query, key, value)))
    assert_close(together, exact, np.float32)
    mapped = jax.vmap(key_driven_attention)(query, key, value)
    assert_reordered(mapped, as_float64(together), np.float32)
    first = oracles.attention(
        *map(as_float64, (query, in_groups(key, (3, 1)), in_groups(value, (3, 1))))
    )
    assert_close(together[0], first[0], np.float32)
    assert np.max(np.abs(as_float64(together)[1] - first[1])) > 0.1


def test_padding_has_no_norm(rng):
    """NaN and long keys behind the end of a sequence; alone, they would turn the groups around."""
    query, key, value = inputs(rng, lengths=(5.0, 1.0))
    lengths = jnp.asarray([4, 7])
    behind = (np.arange(9) >= np.asarray(lengths)[:, None])[..., None, None]
    mask = masks.KeyPadding(lengths)
    clean = key_driven_attention(query, key, value, mask=mask)
    for poison in (np.array([[0.0], [1e4]]), np.nan):
        key = jnp.where(behind, jnp.asarray(np.broadcast_to(poison, key.shape), jnp.float32), key)
        found = key_driven_attention(query, key, value, mask=mask)
        np.testing.assert_array_equal(found, clean)


def test_a_key_decides_where_queries_look_but_has_no_gradient_for_that(rng):
    """The last key turns the groups of all rows around, which is why no causal mask is taken."""
    query, key, value = inputs(rng, lengths=(2.0, 1.0), heads=8)
    longer = key.at[:, -1, 1].multiply(100.0)
    seen = masks.KeyPadding(jnp.asarray([8, 8]))  # so that nobody reads the last key itself
    fixed = (0, 0, 0, 0, 0, 1, 1, 1)

    def run(key, **options):
        return key_driven_attention(query, key, value, **options)

    np.testing.assert_array_equal(run(key, mask=seen), run(longer, mask=seen))
    assert np.max(np.abs(np.asarray(run(key) - run(longer))[..., 3:5, :])) > 0.1
    assert_reordered(run(key), as_float64(run(key, assignment=fixed)), np.float32)
    by_norms, given = (
        jax.grad(lambda key, options=options: jnp.sum(jnp.sin(run(key, **options))))(key)
        for options in ({}, {"assignment": fixed})
    )
    assert_reordered(by_norms, as_float64(given), np.float32)


@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal(),
        masks.Segments(jnp.zeros((2, 9), jnp.int32)),
        masks.KeyPadding(jnp.asarray([5, 6])) & masks.Causal(),
        masks.ArrayMask(jnp.tri(9, dtype=bool)),
    ],
)
def test_a_mask_that_is_no_padding_needs_an_assignment(rng, mask):
    arrays = inputs(rng)
    with pytest.raises(ValueError, match=r"mask.*give an assignment"):
        key_driven_attention(*arrays, mask=mask)
    given = key_driven_attention(*arrays, mask=mask, assignment=(0, 0, 1, 1))
    assert_reordered(given, as_float64(attention(*arrays, mask=mask)), np.float32)


# ---- DGQA ----------------------------------------------------------------------------------------


def test_groups_are_in_proportion_to_how_far_norms_moved():
    state = norm_state(2)
    np.testing.assert_array_equal(DGQA(4, 2, shares=state.shares).sizes(), [2, 2])
    state = remember(state, jnp.asarray([3.0, 1.0]))
    np.testing.assert_allclose(state.shares, [3, 1])  # from nothing
    state = remember(state, jnp.asarray([2.5, 2.5]))
    np.testing.assert_allclose(state.shares, [0.5, 1.5])
    np.testing.assert_allclose(state.cache, [2.5, 2.5])
    assert int(state.step) == 2


def test_groups_are_in_proportion_to_an_average():
    state = norm_state(2)
    for norms in ([[3.0, 1.0], [5.0, 1.0]], [[2.0, 2.0]]):  # batches: their means count
        state = remember(state, jnp.asarray(norms), kind="average", beta=0.75)
    expected = 0.75 * np.array([2.0, 2.0]) + 0.25 * 0.75 * np.array([4.0, 1.0])
    np.testing.assert_allclose(state.shares, expected, rtol=1e-6)
    np.testing.assert_allclose(state.cache, expected, rtol=1e-6)


def test_norms_are_looked_at_once_in_a_window():
    state, seen = norm_state(2), []
    for step in range(1, 7):
        state = remember(state, jnp.asarray([float(step), 1.0]), window=3)
        seen.append(state.cache.tolist())
    assert seen == [[0, 0], [0, 0], [3, 1], [3, 1], [3, 1], [6, 1]]
    assert state.shares.tolist() == [3, 0]


def test_training_remembers_norms_and_inference_keeps_its_groups(rng):
    """The state is a value that a step returns; a layer's groups change when it is stored."""
    mechanism = DGQA(4, 2)
    layer = MultiHeadAttention(32, 4, mechanism=mechanism, rngs=nnx.Rngs(0))
    layer.key.kernel[...] = layer.key.kernel[...].at[:, :8].multiply(4.0)
    x = drawn(rng, 3, 9, 32)

    @jax.jit
    def step(state: NormState, x):
        return remember(state, key_norms(layer.key(x).reshape(3, 9, 2, 8)))

    before, state = layer(x, mask=masks.Causal()), step(norm_state(2), x)
    np.testing.assert_array_equal(mechanism.sizes(), [2, 2])
    mechanism.store(state)
    np.testing.assert_array_equal(mechanism.sizes(), [3, 1])
    after = layer(x, mask=masks.Causal())
    assert np.max(np.abs(np.asarray(after - before))) > 1e-2
    moved = layer(x.at[:, 5:].multiply(-3.0), mask=masks.Causal())
    np.testing.assert_array_equal(moved[:, :5], after[:, :5])
    assert not jax.tree.leaves(nnx.state(mechanism, nnx.Param))


def test_a_layer_of_uneven_groups_decodes_what_it_reads_at_once(rng):
    mechanism = DGQA(4, 2, shares=jnp.asarray([1.0, 5.0]))
    layer = MultiHeadAttention(32, 4, mechanism=mechanism, rngs=nnx.Rngs(0))
    x = drawn(rng, 2, 9, 32)
    whole, cache = layer(x, mask=masks.Causal()), layer.create_cache((2,), 9)
    assert cache.key.shape[-2] == 2
    for first, last in ((0, 4), (4, 5), (5, 9)):
        out, cache = layer(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, as_float64(whole[:, first:last]), np.float32)


# ---- bad input -----------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name(rng, as_users_run_it):
    arrays = inputs(rng)
    with pytest.raises(ValueError, match=r"assignment.*4 query heads.*\(3,\)"):
        key_driven_attention(*arrays, assignment=(0, 0, 1))
    with pytest.raises(ValueError, match=r"assignment.*0 to 1"):
        key_driven_attention(*arrays, assignment=(0, 0, 1, 2))
    with pytest.raises(ValueError, match=r"num_heads.*2 key heads.*1"):
        key_driven_attention(arrays[0][..., :1, :], *arrays[1:])
    with pytest.raises(ValueError, match=r"query.*4 heads"):
        KDGQA(4)(arrays[0][..., :2, :], *arrays[1:])
    with pytest.raises(ValueError, match=r"key.*1 heads"):
        DGQA(4, 1)(*arrays)
    with pytest.raises(ValueError, match="num_heads"):
        KDGQA(0)
    with pytest.raises(ValueError, match=r"num_heads.*8 key heads"):
        DGQA(4, 8)
    with pytest.raises(ValueError, match="num_kv_heads"):
        DGQA(4, 0)
    with pytest.raises(ValueError, match=r"shares.*\(2,\).*\(3,\)"):
        DGQA(4, 2, shares=jnp.ones(3))
    for wrong in ({"kind": "best"}, {"beta": 0.0}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            remember(norm_state(2), jnp.ones(2), **wrong)
    with pytest.raises(ValueError, match=r"norms.*2.*\(3,\)"):
        remember(norm_state(2), jnp.ones(3))
