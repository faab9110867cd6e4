"""The partial-softmax monoid: associative, commutative, with a unit, and equal to softmax."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlab.core.partial import Partial, finish, merge
from tests import oracles
from tests.tolerances import assert_close, assert_reordered, assert_within_budget

ROWS, KEYS, WIDTH = 3, 12, 4


def example(seed: int, magnitude: float = 1.0, masked: float = 0.2):
    rng = np.random.default_rng(seed)
    scores = (magnitude * rng.standard_normal((ROWS, KEYS))).astype(np.float32)
    scores[rng.random((ROWS, KEYS)) < masked] = -np.inf
    value = rng.standard_normal((KEYS, WIDTH)).astype(np.float32)
    return scores, value


def blocks(scores, value, cuts):
    edges = [0, *cuts, KEYS]
    return [
        Partial.of(jnp.asarray(scores[:, a:b]), jnp.asarray(value[a:b]))
        for a, b in itertools.pairwise(edges)
        if b > a
    ]


def expected(scores, value):
    weights, lse = oracles.softmax()(
        scores[None].astype(np.float64), np.isfinite(scores)[None], np.array
    )
    return weights[0] @ value.astype(np.float64), lse[0]


def same(a: Partial, b: Partial):
    """Equal as functions of what is still to come: the outputs and the normalising sums agree."""
    for x, y in zip(finish(a), finish(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        assert_reordered(np.where(np.isneginf(x), 0, x), np.where(np.isneginf(y), 0, y), x.dtype)


cuts = st.lists(st.integers(1, KEYS - 1), max_size=4).map(sorted)
magnitudes = st.sampled_from([1e-3, 1.0, 30.0, 1e4])


@given(cuts=cuts, seed=st.integers(0, 10**6), magnitude=magnitudes)
def test_any_bracketing_of_any_blocks_is_softmax_attention(cuts, seed, magnitude):
    scores, value = example(seed, magnitude)
    parts = blocks(scores, value, cuts)
    from_left = functools.reduce(merge, parts)
    from_right = functools.reduce(lambda a, b: merge(b, a), parts[::-1])
    while len(parts) > 1:
        paired = [merge(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = paired + parts[len(paired) * 2 :]
    out, lse = expected(scores, value)
    for folded in (from_left, from_right, parts[0]):
        got, got_lse = finish(folded)
        assert_close(got, out, np.float32)
        np.testing.assert_array_equal(np.isneginf(got_lse), np.isneginf(lse))
        seen = np.isfinite(lse)
        assert_close(np.asarray(got_lse)[seen], lse[seen], np.float32)


@given(seed=st.integers(0, 10**6), magnitude=magnitudes)
def test_merge_is_associative_and_commutative(seed, magnitude):
    a, b, c = blocks(*example(seed, magnitude, masked=0.5), [4, 8])
    same(merge(merge(a, b), c), merge(a, merge(b, c)))
    for x, y in zip(merge(a, b), merge(b, a), strict=True):
        np.testing.assert_array_equal(x, y)


@given(seed=st.integers(0, 10**6))
def test_the_identity_changes_nothing(seed):
    scores, value = example(seed)
    part, unit = (
        Partial.of(jnp.asarray(scores), jnp.asarray(value)),
        Partial.identity((ROWS,), WIDTH),
    )
    for merged in (merge(part, unit), merge(unit, part)):
        for x, y in zip(merged, part, strict=True):
            np.testing.assert_array_equal(x, y)
    out, lse = finish(merge(unit, unit))
    np.testing.assert_array_equal(out, np.zeros((ROWS, WIDTH)))
    np.testing.assert_array_equal(lse, np.full(ROWS, -np.inf))


def test_scores_masked_in_of_are_not_there():
    scores, value = example(0, masked=0.0)
    allowed = np.random.default_rng(1).random((ROWS, KEYS)) < 0.5
    allowed[1] = False
    got = Partial.of(jnp.asarray(scores), jnp.asarray(value), jnp.asarray(allowed))
    out, _lse = expected(np.where(allowed, scores, -np.inf), value)
    assert_close(finish(got)[0], out, np.float32)
    assert np.isneginf(finish(got)[1][1])
    np.testing.assert_array_equal(finish(got)[0][1], np.zeros(WIDTH))


def test_the_fold_is_differentiable_through_empty_blocks():
    scores, value = example(3, masked=0.0)
    scores[0, :4] = scores[1] = -np.inf  # an empty first block, and a row that sees nothing

    def fold(scores, value):
        parts = [
            Partial.of(scores[:, a:b], value[a:b], jnp.isfinite(scores[:, a:b]))
            for a, b in ((0, 4), (4, 8), (8, 12))
        ]
        return jnp.sum(jnp.sin(finish(functools.reduce(merge, parts))[0]))

    gradient = jax.grad(fold, argnums=(0, 1))(jnp.asarray(scores), jnp.asarray(value))
    assert all(np.all(np.isfinite(g)) for g in gradient)
    np.testing.assert_array_equal(gradient[0][1], np.zeros(KEYS))
    np.testing.assert_array_equal(gradient[0][~np.isfinite(scores)], 0.0)

    def oracle(free, value):
        full = np.full(scores.shape, -np.inf)
        full[np.isfinite(scores)] = free
        return np.sum(np.sin(expected(full, value)[0]))

    rng = np.random.default_rng(0)
    free = scores[np.isfinite(scores)].astype(np.float64)
    direction = rng.standard_normal(free.shape), rng.standard_normal(value.shape)
    slope = oracles.directional(oracle, (free, value.astype(np.float64)), direction)
    got = np.sum(np.asarray(gradient[0])[np.isfinite(scores)] * direction[0]) + np.sum(
        np.asarray(gradient[1]) * direction[1]
    )
    assert_close(got, slope, np.float32, "gradient")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_values_keep_the_budget(dtype):
    scores, value = example(5)
    value = np.asarray(jnp.asarray(value).astype(dtype))
    parts = blocks(scores, value, [5, 9])
    exact, _ = expected(scores, value.astype(np.float64))
    rounded = oracles.rounder(dtype)
    weights, _ = oracles.softmax()(
        scores[None].astype(np.float64), np.isfinite(scores)[None], rounded
    )
    plain = rounded(weights[0] @ value.astype(np.float64))
    assert_within_budget(finish(functools.reduce(merge, parts))[0], exact, plain, dtype)
