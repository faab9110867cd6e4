"""DeltaNet: a write replaces what was there, and the chunked form is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, masks
from attnlab.core.linear_attention import linear_attention
from attnlab.core.recurrence import FORMS
from attnlab.linear.deltanet import DeltaNet, delta_rule_attention
from tests.tolerances import as_float64, assert_close, assert_reordered


def orthonormal(rng, width):
    return np.linalg.qr(rng.standard_normal((width, width)))[0]


def test_a_second_value_replaces_the_first(rng):
    """Orthonormal keys written twice: the delta rule reads the second values, a sum reads both."""
    width = 8
    with jax.enable_x64(True):
        keys = jnp.asarray(np.tile(orthonormal(rng, width), (2, 1)))[:, None]
        value = jnp.asarray(rng.standard_normal((2 * width, 1, 3)))
        options = {"beta": jnp.ones((2 * width, 1)), "unit_keys": False, "return_state": True}
        _, state = delta_rule_attention(keys, keys, value, **options)
        _, summed = linear_attention(keys, keys, value, causal=True, return_state=True)
        read, added = (keys[:width, 0] @ s[0] for s in (state, summed))
        assert_close(read, as_float64(value)[width:, 0], np.float64)
        assert_close(added, as_float64(value[width:] + value[:width])[:, 0], np.float64)


def test_the_newest_pair_is_recalled_from_a_crowd(rng):
    """Twice as many unit keys as dimensions: the newest reads exactly its value; a sum does not."""
    length, width = 16, 8
    key, value = (rng.standard_normal((length, 1, width)).astype(np.float32) for _ in range(2))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    key, value = jnp.asarray(key), jnp.asarray(value)
    out = delta_rule_attention(key * width**0.5, key, value, beta=jnp.ones((length, 1)),
                               unit_keys=False)  # fmt: skip
    assert_close(out, as_float64(value), np.float32)
    summed = linear_attention(key, key, value, causal=True)
    assert np.max(np.abs(summed - value)[-1]) > 0.5


@pytest.mark.parametrize("length", [1, 63, 130])
def test_chunks_are_exact(length, rng):
    arrays = [jnp.asarray(rng.standard_normal((length, 2, 8)), jnp.float32) for _ in range(3)]
    beta = jnp.asarray(rng.uniform(0, 1, (length, 2)), jnp.float32)
    step_by_step = delta_rule_attention(*arrays, beta=beta, implementation="recurrent")
    sizes = (1, 16, 63, 64) if length == 130 else (16,)
    for size in sizes:
        out = delta_rule_attention(*arrays, beta=beta, implementation="chunked", chunk_size=size)
        assert_close(out, as_float64(step_by_step), np.float32, words=f"chunks of {size}")


def test_reflections_track_a_permutation_and_halves_cannot(rng):
    """Swaps of five items as writes with beta 2; with beta up to 1 determinants stay positive."""
    items, swaps = 5, 200
    pairs = [rng.choice(items, 2, replace=False) for _ in range(swaps)]
    key = np.zeros((swaps, items))
    for t, (a, b) in enumerate(pairs):
        key[t, a], key[t, b] = 0.5**0.5, -(0.5**0.5)
    order = np.arange(items)
    for a, b in pairs:
        order[[a, b]] = order[[b, a]]
    with jax.enable_x64(True):
        key, value = jnp.asarray(key)[:, None], jnp.zeros((swaps, 1, items), jnp.float64)
        start = jnp.eye(items, dtype=jnp.float64)[None]
        for beta, tracked in ((2.0, True), (1.0, False)):
            _, state = delta_rule_attention(
                key, key, value, beta=jnp.full((swaps, 1), beta, jnp.float64), unit_keys=False,
                initial_state=start, return_state=True, mask=masks.Causal(),
            )  # fmt: skip
            gap = np.max(np.abs(as_float64(state)[0] - np.eye(items)[order]))
            assert (gap < 1e-12) == tracked
            assert tracked or gap > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_keys_of_zero_change_nothing(form, rng):
    """As a padded token's are after SiLU: no value, no NaN, in gradients either."""
    arrays = [jnp.asarray(rng.standard_normal((9, 1, 4)), jnp.float32) for _ in range(3)]
    beta = jnp.full((9, 1), 0.9)

    def loss(query, key, value):
        key = key.at[3].set(0.0)
        out, state = delta_rule_attention(
            query, key, value, beta=beta, implementation=form, return_state=True
        )
        return jnp.sum(jnp.cos(out)), state

    (_, state), slopes = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    rest = np.arange(9) != 3
    _, without = delta_rule_attention(
        *(x[rest] for x in arrays), beta=beta[rest], return_state=True
    )
    assert_reordered(state, without, np.float32)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in slopes)


def test_long_keys_explode_whoever_computes_it(rng):
    """Without unit length the recurrence itself grows, beta |k|^2 far above 2."""
    arrays = [jnp.asarray(rng.standard_normal((64, 1, 64)), jnp.float32) for _ in range(3)]
    beta = jnp.full((64, 1), 0.5)
    wild = delta_rule_attention(*arrays, beta=beta, unit_keys=False, implementation="recurrent")
    tame = delta_rule_attention(*arrays, beta=beta, implementation="chunked")
    assert np.max(np.abs(wild)) > 1e10
    assert np.max(np.abs(tame)) < 10


def test_the_layer_convolves_and_decodes(rng):
    mechanism = DeltaNet(16, 4, 6, negative_eigenvalues=True, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(
        16, 4, num_kv_heads=2, value_width=6, mechanism=mechanism, rngs=nnx.Rngs(1)
    )
    assert [c.weight.shape for c in layer.convolutions] == [(4, 16), (4, 8), (4, 12)]
    x = jnp.asarray(rng.standard_normal((2, 10, 16)), jnp.float32)
    assert np.max(mechanism.controls(10 * x)["beta"]) > 1.5
    whole, cache = layer(x), layer.create_cache((2,), 10)
    for first, last in ((0, 6), (6, 7), (7, 10)):
        out, cache = layer(x[:, first:last], cache=cache)
        assert_reordered(out, whole[:, first:last], np.float32)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"beta": jnp.zeros((5,))}, ValueError, r"beta.*\(5, 2\).*\(5,\)"),
        ({"beta": jnp.zeros((5, 2), jnp.int32)}, TypeError, r"beta.*int32"),
        (
            {"beta": jnp.zeros((5, 2)), "mask": masks.SlidingWindow(2, 0)},
            NotImplementedError,
            r"SlidingWindow.*attnlab\.attention",
        ),
    ],
)
def test_bad_input_is_refused_by_name(options, error, words, as_users_run_it):
    array = jnp.ones((5, 2, 4))
    with pytest.raises(error, match=words):
        delta_rule_attention(array, array, array, **options)
