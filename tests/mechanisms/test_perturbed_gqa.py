"""PGQA: what is subtracted from the weights, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, attention, masks, normalizers, scores
from attnlab.core.dropout import key_words
from attnlab.core.terms import Tile
from attnlab.heads.perturbed_gqa import PGQA, normal_pairs, perturbed, perturbed_attention
from tests import oracles
from tests.tolerances import as_float64, assert_close, assert_reordered

KEY = jax.random.key(3)
BATCH, LENGTH, HEADS = 2, 9, 4


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def inputs(rng, width=8):
    return (
        drawn(rng, BATCH, LENGTH, HEADS, width),
        drawn(rng, BATCH, LENGTH, 2, width),
        drawn(rng, BATCH, LENGTH, 2, width),
    )


def noise(key=KEY, rows=LENGTH, cols=LENGTH, batch=(BATCH,)):
    at = Tile(0, 0, rows, cols, HEADS, len(batch) + 3).at()
    return as_float64(normal_pairs(key_words(key), at, batch, jnp.float32))


def by_rows(query, key, value, z, visible):
    """One row of weights after the other."""
    out = np.zeros_like(query)
    for b, n, i in np.ndindex(BATCH, HEADS, LENGTH):
        seen = [j for j in range(LENGTH) if visible[b, i, j]]
        if not seen:
            continue
        s = np.array([query[b, i, n] @ key[b, j, n // 2] for j in seen]) / np.sqrt(query.shape[-1])
        w = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        own = z[b, n, i][seen]
        unit = (own - own.mean()) / own.std() if len(seen) > 1 else own * 0
        for weight, unit_, j in zip(w, unit, seen, strict=True):
            given = 0.0 if i == j else 1 / len(seen) + w.std() * unit_
            out[b, i, n] += (weight - given) * value[b, j, n // 2]
    return out


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_weights_are_those_of_the_formula(rng, implementation):
    arrays = inputs(rng)
    visible = np.broadcast_to(np.tri(LENGTH, dtype=bool), (BATCH, LENGTH, LENGTH)).copy()
    visible[1, :, 6:] = False
    mask = masks.Causal() & masks.KeyPadding(jnp.asarray([LENGTH, 6]))
    found = perturbed_attention(
        *arrays, noise_key=KEY, mask=mask, implementation=implementation, block_sizes=(4, 4)
    )
    exact = by_rows(*map(as_float64, arrays), noise(), visible)
    assert_close(found, exact, np.float32)


def test_without_a_key_it_is_grouped_queries(rng):
    arrays = inputs(rng)
    plain = attention(*arrays, mask=masks.Causal(), return_lse=True)
    found = perturbed_attention(*arrays, mask=masks.Causal(), return_lse=True)
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_before_the_diagonal_is_spared_rows_sum_to_zero(rng):
    weights = jax.nn.softmax(drawn(rng, 5, 12), axis=-1)
    z, allowed = drawn(rng, 5, 12), jnp.ones((5, 12), bool)
    nowhere, first = jnp.zeros((5, 12), bool), (jnp.arange(12) == 0)[None]
    rows = as_float64(perturbed(weights, z, allowed, nowhere))
    np.testing.assert_allclose(rows.sum(-1), 0, atol=1e-6)
    np.testing.assert_allclose(
        np.std(as_float64(weights) - rows, axis=-1), np.std(as_float64(weights), axis=-1), rtol=1e-5
    )
    spared = as_float64(perturbed(weights, z, allowed, first))
    np.testing.assert_array_equal(spared[:, 0], weights[:, 0])
    np.testing.assert_array_equal(spared[:, 1:], rows[:, 1:])


def test_noise_is_normal_and_differs_by_key_head_and_sequence():
    z = noise(rows=200, cols=150)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert abs(np.mean(z**4) - 3) < 0.1
    assert abs(np.mean(z[0] * z[1])) < 0.02 and abs(np.mean(z[:, 0] * z[:, 1])) < 0.02
    assert abs(np.mean(z * noise(jax.random.key(4), 200, 150))) < 0.02
    np.testing.assert_array_equal(noise(rows=50, cols=60), z[..., :50, :60])


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_the_gradient_is_the_slope(rng, implementation):
    """Also of rows with one key, whose weights have no deviation, and of blind ones."""
    mask = masks.Causal() & masks.QueryPadding(jnp.asarray([LENGTH, 5]))
    with jax.enable_x64(True):
        arrays = [as_float64(x) for x in inputs(rng)]
        ways = [rng.standard_normal(x.shape) for x in arrays]
        read = jnp.asarray(rng.standard_normal(arrays[0].shape))

        @jax.jit
        def loss(*arrays):
            out = perturbed_attention(
                *arrays, noise_key=KEY, mask=mask, implementation=implementation
            )
            return jnp.sum(jnp.cos(out) * read)

        gradient = jax.grad(lambda x: loss(*x))([jnp.asarray(x) for x in arrays])
        slope = oracles.directional(
            lambda *x: float(loss(*map(jnp.asarray, x))), arrays, ways, step=1e-4
        )
        found = sum(np.sum(np.asarray(g) * d) for g, d in zip(gradient, ways, strict=True))
    assert abs(found - slope) < 1e-6 * max(1, abs(slope))


def test_what_is_masked_has_no_influence(rng):
    query, key, value = inputs(rng)
    mask = masks.KeyPadding(jnp.asarray([7, 0]))
    clean = as_float64(perturbed_attention(query, key, value, noise_key=KEY, mask=mask))
    bad = (x.at[:, 7:].set(jnp.nan) for x in (key, value))
    found = as_float64(perturbed_attention(query, *bad, noise_key=KEY, mask=mask))
    np.testing.assert_array_equal(found[0], clean[0])
    assert np.all(found[1] == 0)


def test_modifiers_come_before_the_noise(rng):
    query, key, value = inputs(rng)
    slopes = jnp.asarray([0.5, 0.25, 0.125, 0.0625])
    given = {"noise_key": KEY, "modifiers": scores.AlibiSlopes(slopes)}
    found = perturbed_attention(query, key, value, **given)
    distance = np.abs(np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None])
    bias = scores.Bias(-slopes[:, None, None] * jnp.asarray(distance, jnp.float32)[None])
    same = perturbed_attention(query, key, value, noise_key=KEY, modifiers=bias)
    assert_reordered(found, as_float64(same), np.float32)
    assert (
        np.max(np.abs(np.asarray(found - perturbed_attention(query, key, value, noise_key=KEY))))
        > 0.1
    )


def test_a_layer_has_other_noise_when_its_key_is_renewed(rng):
    mechanism = PGQA(noise_key=KEY)
    layer = MultiHeadAttention(32, 4, num_kv_heads=2, mechanism=mechanism, rngs=nnx.Rngs(0))
    plain = MultiHeadAttention(32, 4, num_kv_heads=2, mechanism=PGQA(), rngs=nnx.Rngs(0))
    x = drawn(rng, 2, 9, 32)
    first = layer(x)
    np.testing.assert_array_equal(first, layer(x))
    mechanism.renew(jax.random.key(4))
    second = layer(x)
    for one, other in ((first, second), (first, plain(x)), (second, plain(x))):
        assert np.max(np.abs(np.asarray(one - other))) > 1e-2
    assert not jax.tree.leaves(nnx.state(mechanism, nnx.Param))


def test_bad_input_is_refused_by_name(rng, as_users_run_it):
    arrays = inputs(rng)
    with pytest.raises(TypeError, match="noise_key"):
        perturbed_attention(*arrays, noise_key=3)
    with pytest.raises(TypeError, match="noise_key"):
        PGQA(noise_key="no")
    with pytest.raises(ValueError, match="noise_key"):
        PGQA().renew(KEY)
    for option in ({"normalizer": normalizers.Sigmoid()}, {"return_lse": True}):
        with pytest.raises(ValueError, match=next(iter(option))):
            perturbed_attention(*arrays, noise_key=KEY, **option)
    with pytest.raises(NotImplementedError, match="blockwise"):
        perturbed_attention(*arrays, noise_key=KEY, implementation="xla")
