"""Sums over the past, over documents, and at queries: loops in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.past_sums import at_queries, past_sums
from tests.tolerances import as_float64, assert_close

START = np.array([[0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 1]], bool)


def members(start, t, causal):
    """Positions whose sum position t holds."""
    ids = np.cumsum(start)
    return [s for s in range(len(start)) if ids[s] == ids[t] and (s <= t or not causal)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_sums_are_over_the_past_or_the_whole_document(documents, causal, rng):
    x = rng.standard_normal((3, 7, 2, 4)).astype(np.float32)
    start = START if documents else np.zeros_like(START)
    ours = past_sums(jnp.asarray(x), jnp.asarray(START) if documents else None, causal=causal)
    assert ours.shape[1] == (7 if causal or documents else 1)
    ours = np.broadcast_to(as_float64(ours), x.shape)
    for b, t in np.ndindex(3, 7):
        expected = as_float64(x)[b, members(start[b], t, causal)].sum(0)
        assert_close(ours[b, t], expected, np.float32)


@pytest.mark.parametrize("documents", [True, False])
def test_what_came_before_counts_until_a_document_starts(documents, rng):
    x = rng.standard_normal((3, 7, 2, 4)).astype(np.float32)
    before = rng.standard_normal((3, 2, 4)).astype(np.float32)
    start = jnp.asarray(START) if documents else None
    plain = as_float64(past_sums(jnp.asarray(x), start, causal=True))
    ours = past_sums(jnp.asarray(x), start, causal=True, before=jnp.asarray(before))
    for b, t in np.ndindex(3, 7):
        reached = not documents or not START[b, : t + 1].any()
        assert_close(ours[b, t], plain[b, t] + reached * as_float64(before)[b], np.float32)


def test_queries_find_the_sum_where_they_stand():
    sums = jnp.arange(5.0)[:, None, None]
    for offsets, expected in (
        ((0, 0), [0, 1, 2]),
        ((3, 1), [2, 3, 4]),
        ((3, 0), [3, 4, 4]),
        ((0, 1), [0, 0, 1]),  # the first stands before the first key
    ):
        found = at_queries(sums, (3, 5), offsets)[:, 0, 0]
        np.testing.assert_array_equal(found, expected)
        traced = tuple(jnp.asarray(x, jnp.int32) for x in offsets)
        np.testing.assert_array_equal(at_queries(sums, (3, 5), traced)[:, 0, 0], expected)
