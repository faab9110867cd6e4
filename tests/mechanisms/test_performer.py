"""Performer: the estimate is unbiased, orthogonal rows estimate better, more rows better still."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks
from attnlab.linear.performer import Performer, orthogonal_features, performer_attention
from tests import oracles
from tests.tolerances import as_float64, assert_close

WIDTH, DRAWS = 8, 20000


@functools.cache
def many_draws(lengths="gaussian"):
    """Random rows, (draws, M, H) in float64."""
    seeds = jax.random.split(jax.random.key(3), DRAWS)
    draw = jax.vmap(lambda seed: orthogonal_features(seed, WIDTH, WIDTH, lengths=lengths))
    return as_float64(jax.jit(draw)(seeds))


def estimates(rows, x, y):
    """The positive estimate of exp(x . y) by each matrix of rows."""
    both = (np.exp(rows @ z - z @ z / 2) for z in (x, y))
    return np.mean(np.prod(list(both), axis=0), axis=-1)


def axis_vector(length, axis=0):
    return length * np.eye(WIDTH)[axis]


@pytest.mark.parametrize("y", [axis_vector(0.7), axis_vector(-0.5), axis_vector(0.7, axis=1)])
def test_the_estimate_is_unbiased(y):
    found, exact = estimates(many_draws(), axis_vector(0.7), y), np.exp(axis_vector(0.7) @ y)
    # LAPACK's QR without signs set right is 20 standard errors off where x = y.
    assert abs(found.mean() - exact) < 4 * found.std() / np.sqrt(DRAWS)


def test_rows_are_orthogonal_within_blocks_and_long_as_gaussian_ones():
    rows = as_float64(orthogonal_features(jax.random.key(0), 19, WIDTH))
    assert rows.shape == (19, WIDTH)
    for block in (rows[:8], rows[8:16], rows[16:]):
        products = block @ block.T
        assert_close(products - np.diag(np.diag(products)), np.zeros_like(products), np.float32)
    squares = np.sum(many_draws() ** 2, -1)
    assert abs(squares.mean() - WIDTH) < 0.05
    assert abs(squares.var() - 2 * WIDTH) < 0.5  # chi-squared
    fixed = as_float64(orthogonal_features(jax.random.key(0), 19, WIDTH, lengths="fixed"))
    assert_close(np.sum(fixed**2, -1), np.full(19, WIDTH), np.float32, scale=WIDTH)


def test_orthogonal_rows_estimate_better_than_independent_ones():
    x, y = axis_vector(0.7), axis_vector(0.7, axis=1)
    exact, both = np.exp(x @ y), np.sum((x + y) ** 2)
    independent = np.exp(both) * exact**2 * (1 - np.exp(-both)) / WIDTH
    gained = (exact - np.exp(-(x @ x + y @ y) / 2)) ** 2 * 2 * (WIDTH - 1) / (WIDTH * (WIDTH + 2))
    error = np.mean((estimates(many_draws(), x, y) - exact) ** 2)
    # Theorem 2 of the paper: better by at least `gained`; five per cent for the draws.
    assert error <= 1.05 * (independent - gained) < 0.95 * independent


def test_the_error_to_softmax_attention_falls_with_the_root_of_the_rows(rng):
    arrays = [rng.standard_normal((24, 1, WIDTH)).astype(np.float32) for _ in range(3)]
    arrays = [0.5 * arrays[0], 0.5 * arrays[1], arrays[2]]
    exact = oracles.attention(*map(as_float64, arrays), mask=oracles.causal())

    @functools.partial(jax.jit, static_argnums=1)
    def errors(seeds, count):
        def one(seed):
            rows = orthogonal_features(seed, count, WIDTH)
            out = performer_attention(
                *arrays, features=rows, mask=masks.Causal(), implementation="recurrent"
            )
            return jnp.mean(jnp.square(out - jnp.asarray(exact, jnp.float32)))

        return jnp.sqrt(jnp.mean(jax.vmap(one)(seeds)))

    arrays = [jnp.asarray(x) for x in arrays]
    seeds = jax.random.split(jax.random.key(1), 16)
    few, many = float(errors(seeds, 16)), float(errors(seeds, 256))
    # Sixteen times the rows: a quarter of the error, give or take.
    assert 0.15 < many / few < 0.4
    assert many < 0.06


def test_relu_is_the_other_kernel(rng):
    query, key, value = (rng.standard_normal((6, 2, 4)).astype(np.float32) for _ in range(3))
    ours = performer_attention(
        *map(jnp.asarray, (query, key, value)), kernel="relu", mask=masks.Causal()
    )
    weights = np.einsum(
        "tnh,snh->nts", *(np.maximum(as_float64(x), 0) + 1e-3 for x in (query, key))
    )
    weights = weights * np.tri(6)
    weights /= weights.sum(-1, keepdims=True)
    assert_close(ours, np.einsum("nts,snd->tnd", weights, as_float64(value)), np.float32)


def test_rows_stay_until_they_are_redrawn():
    made = Performer(WIDTH, num_features=12, rngs=nnx.Rngs(0))
    first = as_float64(made.features[...])
    assert not list(nnx.to_flat_state(nnx.state(made, nnx.Param)))
    made.redraw(nnx.Rngs(1))
    assert made.features[...].shape == (12, WIDTH)
    assert np.all(as_float64(made.features[...]) != first)


def test_wrong_input_is_refused_by_name(as_users_run_it):
    x, rows = jnp.ones((4, 2, WIDTH)), orthogonal_features(jax.random.key(0), 8, WIDTH)
    for name, options in (
        ("features", {}),
        ("features", {"features": rows[:, :5]}),
        ("kernel", {"features": rows, "kernel": "relu"}),
        (r"kernel.*cosine", {"features": rows, "kernel": "cosine"}),
        ("scale", {"features": rows, "scale": 2.0}),
    ):
        with pytest.raises(ValueError, match=name):
            performer_attention(x, x, x, **options)
    with pytest.raises(ValueError, match="num_features"):
        orthogonal_features(jax.random.key(0), 0, WIDTH)
    with pytest.raises(ValueError, match=r"lengths.*long"):
        orthogonal_features(jax.random.key(0), 4, WIDTH, lengths="long")
