"""Masks: each equals its formula, they obey the laws of sets, and the plan of tiles never errs."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlab import masks
from tests import oracles
from tests.core import draw


def dense(pair: draw.Pair, size: draw.Sizes, offsets=(0, 0)) -> np.ndarray:
    return np.asarray(
        pair.term.dense(
            size.queries,
            size.keys,
            query_offset=offsets[0],
            key_offset=offsets[1],
            num_heads=size.heads,
        )
    )


def dense_oracle(pair: draw.Pair, size: draw.Sizes, offsets=(0, 0)) -> np.ndarray:
    i = offsets[0] + np.arange(size.queries)[:, None]
    j = offsets[1] + np.arange(size.keys)[None, :]
    shape = (*size.batch, size.heads, size.queries, size.keys)
    return np.broadcast_to(pair.oracle(i, j), shape)


offsets = st.sampled_from([(0, 0), (3, 0), (0, 2), (7, 7)])


@pytest.mark.parametrize("name", draw.MASKS)
@pytest.mark.parametrize("size", draw.SIZES, ids=lambda s: f"{s.queries}x{s.keys}")
def test_each_mask_equals_its_formula(name, size):
    for seed in range(3):
        pair = draw.simple_mask(name, size, seed)
        for offset in [(0, 0), (5, 2)]:
            got = dense(pair, size, offset)
            np.testing.assert_array_equal(
                np.broadcast_to(got, dense_oracle(pair, size, offset).shape),
                dense_oracle(pair, size, offset),
            )


@given(st.data())
def test_combinations_equal_the_combined_formulas(data):
    size = data.draw(draw.sizes())
    pair, offset = draw.mask_pair(data, size, depth=3), data.draw(offsets)
    expected = dense_oracle(pair, size, offset)
    got = np.broadcast_to(dense(pair, size, offset), expected.shape)
    np.testing.assert_array_equal(got, expected, err_msg=pair.name)


@given(st.data())
def test_masks_obey_the_laws_of_sets(data):
    size = data.draw(draw.sizes())
    a, b, c = (draw.mask_pair(data, size, depth=1).term for _ in range(3))

    def same(first, second):
        x, y = (
            np.asarray(m.dense(size.queries, size.keys, num_heads=size.heads))
            for m in (first, second)
        )
        shape = np.broadcast_shapes(x.shape, y.shape)
        np.testing.assert_array_equal(np.broadcast_to(x, shape), np.broadcast_to(y, shape))

    same(~(a & b), ~a | ~b)
    same(~(a | b), ~a & ~b)
    same(a & (b | c), (a & b) | (a & c))
    same(~~a, a)
    same(a & ~a, ~masks.Full())
    same(a | ~a, masks.Full())
    same(a & masks.Full(), a)


@pytest.mark.parametrize("block_sizes", [(1, 1), (2, 3), (16, 16), (64, 7)])
@given(data=st.data())
def test_the_plan_agrees_with_the_dense_mask(block_sizes, data):
    size = data.draw(draw.sizes())
    if block_sizes == (1, 1) and size.queries > 12:
        return
    pair, offset = draw.mask_pair(data, size), data.draw(offsets)
    plan = pair.term.plan(
        size.queries,
        size.keys,
        block_sizes,
        query_offset=offset[0],
        key_offset=offset[1],
        num_heads=size.heads,
    )
    seen = dense_oracle(pair, size, offset).reshape(-1, size.queries, size.keys)
    rows, columns = block_sizes
    for (i, j), empty in np.ndenumerate(plan.empty):
        tile = seen[:, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        assert empty == (not tile.any()), (pair.name, i, j)
        assert plan.full[i, j] == tile.all(), (pair.name, i, j)
        assert plan.partial[i, j] == (tile.any() and not tile.all()), (pair.name, i, j)
    assert sum(plan.counts().values()) == plan.empty.size


@given(st.data())
def test_bounds_may_be_unsure_but_never_wrong(data):
    size = data.draw(draw.sizes())
    pair = draw.mask_pair(data, size, depth=3)
    block = (4, 6)
    span = masks.Span.of((size.queries, size.keys), block, (0, 0))
    some, every = pair.term.bounds(span)
    shape = (span.query_first.shape[0], span.key_first.shape[1])
    some, every = np.broadcast_to(some, shape), np.broadcast_to(every, shape)
    seen = dense_oracle(pair, size).reshape(-1, size.queries, size.keys)
    for i, j in np.ndindex(shape):
        tile = seen[:, i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        assert some[i, j] or not tile.any(), pair.name
        assert not every[i, j] or tile.all(), pair.name


def test_planning_a_million_by_a_million_materialises_nothing():
    n = 2**20
    window = masks.Causal() & masks.SlidingWindow(255)
    start = time.monotonic()
    for mask in (masks.Causal(), masks.SlidingWindow(255), masks.Full(), ~masks.Causal()):
        plan = mask.plan(n, n, (4096, 4096))
        assert sum(plan.counts().values()) == 256 * 256
    counts = window.plan(2**15, 2**15, (2048, 2048)).counts()
    assert counts == {"empty": 16 * 16 - 31, "full": 0, "partial": 31}
    assert time.monotonic() - start < 60  # the dense mask would be a terabyte


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (masks.Full(), {"empty": 0, "full": 256, "partial": 0}),
        (masks.Causal(), {"empty": 120, "full": 120, "partial": 16}),
        (masks.SlidingWindow(64), {"empty": 256 - 16 - 15, "full": 0, "partial": 31}),
        (masks.SlidingWindow(127), {"empty": 256 - 16 - 15 - 14, "full": 15, "partial": 30}),
        (masks.Prefix(64 * 3), {"empty": 256 - 48, "full": 48, "partial": 0}),
    ],
    ids=["full", "causal", "one block back", "two blocks back", "prefix"],
)
def test_tiles_are_counted_as_by_hand(mask, expected):
    assert mask.plan(1024, 1024, (64, 64)).counts() == expected


def test_masks_are_pytrees_and_pass_through_jit_and_vmap():
    lengths = jnp.arange(3, dtype=jnp.int32)

    @jax.jit
    def seen(mask):
        return mask.dense(4, 5)

    mask = masks.KeyPadding(lengths) & masks.Causal()
    expected = np.asarray(mask.dense(4, 5))
    np.testing.assert_array_equal(np.asarray(seen(mask)), expected)
    by_entry = jax.vmap(lambda n: (masks.KeyPadding(n) & masks.Causal()).dense(4, 5))(lengths)
    np.testing.assert_array_equal(np.asarray(by_entry), expected)


def test_the_oracle_masks_are_what_they_say():
    i, j = np.arange(4)[:, None], np.arange(4)[None, :]
    by_hand = [
        (oracles.causal(), ["1...", "11..", "111.", "1111"]),
        (oracles.window(1), ["1...", "11..", ".11.", "..11"]),
        (oracles.window(0, 1), ["11..", ".11.", "..11", "...1"]),
        (oracles.strided(2), ["1.1.", ".1.1", "1.1.", ".1.1"]),
        (oracles.prefix(2), ["11..", "11..", "11..", "11.."]),
        (oracles.segments(np.array([0, 0, 1, -1])), ["11..", "11..", "..1.", "...."]),
    ]
    for mask, rows in by_hand:
        expected = np.array([[c == "1" for c in row] for row in rows])
        np.testing.assert_array_equal(np.squeeze(np.broadcast_to(mask(i, j), (1, 4, 4))), expected)


def test_masks_combine_with_boolean_arrays():
    allowed = np.eye(4, dtype=bool)
    got = np.asarray((masks.Causal() & jnp.asarray(allowed)).dense(4, 4))
    np.testing.assert_array_equal(got[0], allowed)
    got = np.asarray((jnp.asarray(allowed) | masks.Causal()).dense(4, 4))
    np.testing.assert_array_equal(got[0], np.tril(np.ones((4, 4), bool)))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: masks.SlidingWindow(-1), ValueError, "SlidingWindow: left .*got -1"),
        (lambda: masks.SlidingWindow(3, right=-2), ValueError, "SlidingWindow: right .*got -2"),
        (lambda: masks.SlidingWindow(1.5), ValueError, "SlidingWindow: left .*got 1.5"),
        (lambda: masks.Prefix(-3), ValueError, "Prefix: length .*got -3"),
        (lambda: masks.Strided(0), ValueError, "Strided: stride .*got 0"),
        (
            lambda: masks.Causal() & 3,
            TypeError,
            "mask: expected a Mask or a boolean array, got int",
        ),
        (
            lambda: masks.Causal() & np.ones((2, 2), np.float32),
            TypeError,
            "mask: expected a Mask or a boolean array, got float32",
        ),
        (lambda: masks.Causal().plan(0, 4), ValueError, "plan: .*num_queries=0"),
        (lambda: masks.Causal().plan(4, 4, (0, 2)), ValueError, r"block_sizes=\(0, 2\)"),
        (
            lambda: jax.jit(lambda n: masks.KeyPadding(n).plan(4, 4).empty)(jnp.asarray([2])),
            ValueError,
            "traced.*outside of jit",
        ),
    ],
)
def test_bad_masks_are_refused_by_name(make, error, words, as_users_run_it):
    with pytest.raises(error, match=words):
        make()
