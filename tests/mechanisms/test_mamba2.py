"""Mamba-2: a state space model and damped attention are one function, of low rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import MultiHeadAttention, masks
from attnlab.core.recurrence import FORMS
from attnlab.linear.mamba2 import Mamba2, state_space_attention
from tests.tolerances import as_float64, assert_close, assert_reordered


def numbers(rng, length, heads=2, width=4, dtype=np.float32):
    query, key, value = (rng.standard_normal((length, heads, width)).astype(dtype) for _ in "CBx")
    step = rng.uniform(0.1, 1.0, (length, heads)).astype(dtype)
    rates = np.arange(1, heads + 1).astype(dtype)
    return (query, key, value), step, -rates * step


def quadratic(query, key, value, step, log_decay):
    """(C B^T . L) x with the semiseparable mask L_ij = a_(j+1) ... a_i."""
    out = np.zeros(value.shape)
    for n in range(query.shape[1]):
        for i in range(len(query)):
            for j in range(i + 1):
                damp = np.exp(np.sum(log_decay[j + 1 : i + 1, n]))
                out[i, n] += query[i, n] @ key[j, n] * damp * step[j, n] * value[j, n]
    return out


@pytest.mark.parametrize("form", FORMS)
def test_the_recurrence_is_damped_attention(form, rng):
    with jax.enable_x64(True):
        arrays, step, g = numbers(rng, 19, dtype=np.float64)
        out = state_space_attention(
            *map(jnp.asarray, arrays), step=jnp.asarray(step), log_decay=jnp.asarray(g),
            implementation=form, chunk_size=8,
        )  # fmt: skip
        assert_close(out, quadratic(*arrays, step, g), np.float64)


def test_blocks_below_the_diagonal_have_the_rank_of_the_state(rng):
    """Twelve steps, a state 3 wide: the matrix over x has rank 3 there, and its mask 1."""
    length, width = 12, 3
    with jax.enable_x64(True):
        (query, key, _), step, g = numbers(rng, length, heads=1, width=width, dtype=np.float64)
        eye = jnp.eye(length, dtype=jnp.float64)[:, None]
        options = {"step": jnp.asarray(step), "log_decay": jnp.asarray(g)}
        matrix = state_space_attention(jnp.asarray(query), jnp.asarray(key), eye, **options)[:, 0]
        one = jnp.ones((length, 1, 1), jnp.float64)
        mask = state_space_attention(one, one, eye, **options)[:, 0]
    for start in (4, 6, 8):
        assert np.linalg.matrix_rank(matrix[start:, :start], tol=1e-10) == width
        assert np.linalg.matrix_rank(mask[start:, :start], tol=1e-10) == 1
    assert np.linalg.matrix_rank(matrix, tol=1e-10) == length


def test_steps_of_zero_leave_the_state_and_skips_pass(rng):
    arrays, step, _ = numbers(rng, 6)
    query, key, value = map(jnp.asarray, arrays)
    zero, skip = jnp.zeros(step.shape), jnp.asarray([0.5, 2.0])
    state = jnp.asarray(rng.standard_normal((2, 4, 4)), jnp.float32)
    options = {"step": zero, "log_decay": zero, "return_state": True}
    out, last = state_space_attention(query, key, value, skip=skip, initial_state=state, **options)
    np.testing.assert_array_equal(last, state)
    read = np.einsum("nhd,tnh->tnd", as_float64(state), as_float64(query))
    assert_close(out, read + as_float64(skip)[:, None] * as_float64(value), np.float32)


def test_a_large_step_keeps_the_newest_token_alone(rng):
    (query, key, value), step, g = numbers(rng, 6)
    step = step.copy()
    step[4] = 100.0
    g = -np.arange(1, 3, dtype=np.float32) * step
    _, state = state_space_attention(
        *(jnp.asarray(x[:5]) for x in (query, key, value)), step=jnp.asarray(step[:5]),
        log_decay=jnp.asarray(g[:5]), return_state=True,
    )  # fmt: skip
    newest = 100.0 * key[4, :, :, None] * value[4, :, None, :]
    assert_close(state, newest, np.float32)


def test_strong_decays_over_long_sequences_lose_no_digits(rng):
    """-8 a step four thousand times, then -0.001: differences of one running sum would be rounded
    to -0.002 or above 0."""
    length = 4096
    g = jnp.full((length, 1), -8.0).at[-8:].set(-1e-3)
    key = jnp.ones((length, 1, 1))
    value = jnp.eye(8)[jnp.arange(length) % 8][:, None]
    options = {"step": jnp.ones((length, 1)), "log_decay": g}
    out = state_space_attention(key, key, value, **options)[-1, 0]
    tail = as_float64(g)[-40:, 0]
    exact = np.zeros(8)
    for s in range(40):
        exact[s % 8] += np.exp(np.sum(tail[s + 1 :]))
    assert_close(out, exact, np.float32)

    def loss(value, g):
        return jnp.sum(jnp.cos(state_space_attention(key, key, value, step=options["step"],
                                                     log_decay=g)))  # fmt: skip

    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.grad(loss, argnums=(0, 1))(value, g))


def test_a_masked_token_gets_no_skip(rng):
    arrays, step, g = numbers(rng, 6)
    ids = jnp.asarray([0, 0, -1, 1, 1, 1])
    arrays[2][2] = np.nan
    query, key, value, step, g = map(jnp.asarray, (*arrays, step, g))
    out = state_space_attention(
        query, key, value, step=step, log_decay=g, skip=jnp.ones((2,)),
        mask=masks.Segments(ids),
    )  # fmt: skip
    assert not np.any(out[2])
    alone = state_space_attention(
        query[3:], key[3:], value[3:], step=step[3:], log_decay=g[3:],
        skip=jnp.ones((2,)),
    )  # fmt: skip
    assert_reordered(out[3:], alone, np.float32)


def test_one_query_against_all_keys_gets_its_own_skip(rng):
    arrays, step, g = numbers(rng, 9)
    query, key, value = map(jnp.asarray, arrays)
    options = {"step": jnp.asarray(step), "log_decay": jnp.asarray(g), "skip": jnp.ones((2,))}
    whole = state_space_attention(query, key, value, **options)
    one = jax.jit(lambda q, t: state_space_attention(q, key, value, query_offset=t, **options))
    for t in (0, 4, 8):
        assert_reordered(one(query[t : t + 1], jnp.asarray(t))[0], whole[t], np.float32)


def test_the_layer_starts_and_decodes_as_the_paper_says(rng):
    mechanism = Mamba2(16, 4, 6, rngs=nnx.Rngs(0))
    controls = mechanism.controls(jnp.zeros((1, 16)))
    assert bool(jnp.all((controls["step"] >= 1e-3 * 0.999) & (controls["step"] <= 0.1 * 1.001)))
    rate = -controls["log_decay"] / controls["step"]
    assert bool(jnp.all((rate >= 0.999) & (rate <= 16.01)))
    layer = MultiHeadAttention(
        16, 4, num_kv_heads=2, value_width=6, mechanism=mechanism, rngs=nnx.Rngs(1)
    )
    x = jnp.asarray(rng.standard_normal((2, 10, 16)), jnp.float32)
    whole, cache = layer(x), layer.create_cache((2,), 10)
    for first, last in ((0, 6), (6, 7), (7, 10)):
        out, cache = layer(x[:, first:last], cache=cache)
        assert_reordered(out, whole[:, first:last], np.float32)


@pytest.mark.parametrize("name", ["step", "log_decay"])
def test_bad_input_is_refused_by_name(name, as_users_run_it):
    array = jnp.ones((5, 2, 4))
    given = {"step": jnp.ones((5, 2)), "log_decay": -jnp.ones((5, 2))}
    with pytest.raises(ValueError, match=rf"{name}.*\(5, 2\).*\(2, 5\)"):
        state_space_attention(array, array, array, **given | {name: jnp.zeros((2, 5))})
    with pytest.raises(ValueError, match=r"skip.*\(2,\).*\(4,\)"):
        state_space_attention(array, array, array, **given, skip=jnp.ones((4,)))
