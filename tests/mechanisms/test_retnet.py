"""RetNet: three forms are one; fixed rates; the norm per head makes scalings immaterial."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, masks
from attnlab.core.gates import rms_unit
from attnlab.core.recurrence import FORMS
from attnlab.linear.retnet import RetNet, retention, retention_decay
from tests.tolerances import as_float64, assert_close, assert_reordered


def numbers(rng, length, heads=2, width=4, dtype=np.float64):
    return [rng.standard_normal((length, heads, width)).astype(dtype) for _ in range(3)]


def gammas(heads):
    return 1.0 - 2.0 ** -(5.0 + np.arange(heads))


def damped(query, key, value):
    """The parallel form of the paper, without rotations: ((Q K^T) . D) V, D_nm = gamma^(n - m)."""
    length, heads, width = query.shape
    out = np.zeros(value.shape)
    for h, gamma in enumerate(gammas(heads)):
        lag = np.arange(length)[:, None] - np.arange(length)[None, :]
        decay = np.where(lag >= 0, gamma ** np.maximum(lag, 0), 0.0)
        out[:, h] = (query[:, h] @ key[:, h].T / math.sqrt(width) * decay) @ value[:, h]
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 21])
def test_three_forms_are_the_damped_scores(form, length, rng):
    with jax.enable_x64(True):
        arrays = numbers(rng, length)
        ours = retention(*map(jnp.asarray, arrays), theta=None, implementation=form, chunk_size=8)
        assert_close(ours, damped(*arrays), np.float64)


def test_the_first_head_halves_in_22_steps():
    """All queries and keys alike, the value one at the start: what is read is gamma^t."""
    length = 45
    same = jnp.full((length, 2, 4), 0.5)
    value = jnp.zeros((length, 2, 1)).at[0].set(1.0)
    out = as_float64(retention(same * 2.0, same, value, theta=None))[..., 0]
    assert_close(out / out[:1], gammas(2) ** np.arange(length)[:, None], np.float32)
    half = np.argmax(out[:, 0] < out[0, 0] / 2)
    assert half == 22 == math.ceil(math.log(2) / -math.log(1 - 1 / 32))


def test_far_heads_still_forget():
    """1 - 2^-30 is 1 in float32; its logarithm is not 0."""
    far = as_float64(retention_decay(30))[24:]
    assert_close(far * 2.0 ** np.arange(29, 35), -np.ones(6), np.float32)


def test_score_normalizations_do_not_matter(rng):
    """The three of the paper, then the norm per head with epsilon 0, against retention's."""
    query, key, value = numbers(rng, 17)
    ours = as_float64(rms_unit(jnp.asarray(damped(query, key, value), jnp.float32), epsilon=0.0))
    length, heads, width = query.shape
    for h, gamma in enumerate(gammas(heads)):
        lag = np.arange(length)[:, None] - np.arange(length)[None, :]
        decay = np.where(lag >= 0, gamma ** np.maximum(lag, 0), 0.0)
        decay = decay / np.sqrt(decay.sum(1, keepdims=True))
        scores = query[:, h] @ key[:, h].T / math.sqrt(width) * decay
        scores = scores / np.maximum(np.abs(scores.sum(1, keepdims=True)), 1.0)
        read = scores @ value[:, h]
        normed = read / np.sqrt((read**2).mean(-1, keepdims=True))
        assert_close(ours[:, h], normed, np.float32)


def test_positions_count_by_their_difference(rng):
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in numbers(rng, 9)]
        at_zero = retention(*arrays)
        moved = retention(*arrays, query_offset=1000, key_offset=1000)
        assert_close(moved, as_float64(at_zero), np.float64, scale=1000.0)
        assert np.max(np.abs(at_zero - retention(*arrays, theta=None))) > 1e-2


def test_the_layer_of_the_paper_has_eight_squares_of_the_width():
    features, heads = 32, 2
    mechanism = RetNet(features, heads, 2 * features // heads, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(
        features, heads, mechanism=mechanism, value_width=2 * features // heads, rngs=nnx.Rngs(1)
    )
    count = sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    assert count == 8 * features**2


def test_decoding_needs_a_state_alone(rng):
    """Positions go on from the cache's length; groups of queries share keys, not states."""
    mechanism = RetNet(16, 4, 6, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(
        16, 4, num_kv_heads=2, value_width=6, mechanism=mechanism, rngs=nnx.Rngs(1)
    )
    x = jnp.asarray(rng.standard_normal((2, 10, 16)), jnp.float32)
    whole, cache = layer(x), layer.create_cache((2,), 10)
    assert cache.memory.shape == (2, 4, 4, 6)
    for first, last in ((0, 6), (6, 7), (7, 10)):
        out, cache = layer(x[:, first:last], cache=cache)
        assert_reordered(out, whole[:, first:last], np.float32)


def test_nothing_read_is_nothing_normed():
    mechanism = RetNet(8, 2, 4, rngs=nnx.Rngs(0))
    layer = MultiHeadAttention(8, 2, mechanism=mechanism, rngs=nnx.Rngs(1))
    x = jnp.ones((3, 8))

    def total(x):
        return jnp.sum(layer(x, mask=masks.KeyPadding(0)))

    value, slope = jax.value_and_grad(total)(x)
    assert value == 0
    assert bool(jnp.all(jnp.isfinite(slope)))


@pytest.mark.parametrize(
    ("width", "options", "words"),
    [
        (3, {}, "query, key: rotations need an even head width.*3"),
        (4, {"theta": 0.0}, "theta.*0.0"),
        (4, {"log_decay": jnp.asarray([0.1, -1.0])}, "log_decay.*0.1"),
        (4, {"log_decay": jnp.zeros((3,))}, "log_decay.*2.*3"),
    ],
)
def test_bad_input_is_refused_by_name(width, options, words, as_users_run_it):
    array = jnp.ones((5, 2, width))
    with pytest.raises(ValueError, match=words):
        retention(array, array, array, **options)


def test_no_heads_have_no_decay():
    with pytest.raises(ValueError, match="num_heads"):
        retention_decay(0)
