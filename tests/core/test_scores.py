"""Score modifiers alone against their formulas: whole, by tile, with offsets; slopes, buckets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import scores
from attnlab.core.scores import apply_modifiers, relative_bucket
from attnlab.core.terms import Tile, axes_of, restrict
from tests import oracles
from tests.core import draw
from tests.tolerances import assert_close


def on_tile(modifier, score, row, col, rows, cols, offsets=(0, 0)):
    tile = Tile(row, col, rows, cols, score.shape[-3], score.ndim, *offsets)
    part = jnp.asarray(score)[..., row : row + rows, col : col + cols]
    return apply_modifiers(restrict((modifier,), axes_of((modifier,)), tile), part, tile.at())


@pytest.mark.parametrize("name", draw.MODIFIERS)
@pytest.mark.parametrize("size", draw.SIZES, ids=lambda s: f"{s.queries}x{s.keys}")
def test_a_modifier_equals_its_formula_on_every_tile(name, size, rng):
    pair = draw.modifier(name, size, 3)
    shape = (*size.batch, size.heads, size.queries, size.keys)
    score = rng.standard_normal(shape).astype(np.float32)
    head = np.arange(size.heads)[:, None, None]
    for offsets in [(0, 0), (4, 1)]:
        i = offsets[0] + np.arange(size.queries)[:, None]
        j = offsets[1] + np.arange(size.keys)[None, :]
        expected = pair.oracle(score.astype(np.float64), i, j, head)
        whole = on_tile(pair.term, score, 0, 0, size.queries, size.keys, offsets)
        assert_close(whole, expected, np.float32)
        row, col = size.queries // 3, size.keys // 2
        rows, cols = size.queries - row, size.keys - col
        part = on_tile(pair.term, score, row, col, rows, cols, offsets)
        assert_close(part, expected[..., row:, col:], np.float32)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 64), (12, 100)])
def test_buckets_are_those_of_the_released_t5(bidirectional, num_buckets, max_distance):
    relative = np.arange(-300, 301)
    expected = [
        oracles.t5_bucket(
            r, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
        )
        for r in relative
    ]
    got = relative_bucket(jnp.asarray(relative), num_buckets, max_distance, bidirectional)
    np.testing.assert_array_equal(got, expected)


def test_t5_buckets_by_hand():
    # 32 buckets both ways: 16 a side, 8 exact, then octaves of half steps up to 128.
    got = relative_bucket(jnp.asarray([0, -1, -7, -8, -128, -1000, 1, 7, 1000]), 32, 128, True)
    np.testing.assert_array_equal(got, [0, 1, 7, 8, 15, 15, 17, 23, 31])
    got = relative_bucket(jnp.asarray([5, 0, -1, -15, -16, -128, -1000]), 32, 128, False)
    np.testing.assert_array_equal(got, [0, 0, 1, 15, 16, 31, 31])


def test_modifiers_apply_in_order():
    score = jnp.full((1, 2, 2), 4.0)
    cap, half = scores.SoftCap(jnp.asarray(1.0)), scores.Temperature(jnp.asarray(8.0))
    tile = Tile(0, 0, 2, 2, 1, 3)
    first = apply_modifiers((cap, half), score, tile.at())
    second = apply_modifiers((half, cap), score, tile.at())
    assert_close(first, np.full((1, 2, 2), np.tanh(4.0) / 8.0), np.float32)
    assert_close(second, np.full((1, 2, 2), np.tanh(0.5)), np.float32)


@pytest.mark.parametrize(
    "scalar", [2.0, 2, np.float32(2.0), np.array(2.0, np.float32), jnp.asarray(2.0)]
)
@pytest.mark.parametrize("kind", [scores.Temperature, scores.SoftCap])
def test_scalars_of_every_make_are_taken(kind, scalar):
    from attnlab import attention

    x = jnp.ones((3, 1, 2))
    out = attention(x, x, x, modifiers=kind(scalar), implementation="reference")
    assert np.all(np.isfinite(out))


def test_a_modifier_in_bfloat16_acts_in_the_dtype_of_the_scores():
    slopes = scores.AlibiSlopes(jnp.asarray([0.5], jnp.bfloat16))
    got = on_tile(slopes, np.zeros((1, 300, 300), np.float32), 0, 0, 300, 300)
    assert got.dtype == jnp.float32
    assert float(got[0, 299, 0]) == -149.5  # bfloat16 would have said -150


def test_modifiers_are_pytrees_whose_leaves_are_their_parameters():
    table = scores.RelativeBias(jnp.ones((2, 8)))
    assert [x.shape for x in jax.tree.leaves(table)] == [(2, 8)]
    doubled = jax.tree.map(lambda x: 2 * x, table)
    assert isinstance(doubled, scores.RelativeBias)
    assert float(doubled.table[0, 0]) == 2.0
    assert doubled.max_distance == table.max_distance


@pytest.mark.parametrize(
    ("modifier", "words"),
    [
        (scores.RelativeBias(jnp.ones((1, 1))), "RelativeBias: .*got 1 buckets"),
        (scores.RelativeBias(jnp.ones((1, 32)), max_distance=16), "max_distance"),
    ],
)
def test_an_impossible_table_is_refused(modifier, words):
    score, tile = jnp.zeros((1, 2, 2)), Tile(0, 0, 2, 2, 1, 3)
    with pytest.raises(ValueError, match=words):
        apply_modifiers((modifier,), score, tile.at())
