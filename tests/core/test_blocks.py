"""Masks of whole blocks, and what masks made of data tell of each tile before it is looked at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlab
from attnlab import masks
from tests import oracles
from tests.core import draw
from tests.core.test_masks import dense, dense_oracle, offsets
from tests.kernels import cases
from tests.tolerances import as_float64, assert_close

PLAIN_JAX = ("reference", "blockwise")
BLOCKS = ((4, 6), (16, 16), (16, 32))


def seen_by_tile(seen, blocks):
    """Some and every of each tile, by looking: (..., I, J)."""
    rows, cols = blocks
    shape = (-(-seen.shape[-2] // rows), -(-seen.shape[-1] // cols))
    some, every = (np.zeros((*seen.shape[:-2], *shape), bool) for _ in range(2))
    for i, j in np.ndindex(shape):
        tile = seen[..., i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
        some[..., i, j], every[..., i, j] = tile.any((-1, -2)), tile.all((-1, -2))
    return some, every


def bounds(pair, size, blocks, offset):
    span = masks.Span.of((size.queries, size.keys), blocks, offset)
    return pair.term.data_bounds(span)


def widened(x, shape):
    """As the scores' batch and heads: (I, J) and (B, 1, I, J) alike."""
    x = np.asarray(x)
    return np.broadcast_to(x.reshape((1,) * (len(shape) - x.ndim) + x.shape), shape)


def assert_never_wrong(pair, size, blocks, offset, found):
    some, every = seen_by_tile(dense_oracle(pair, size, offset), blocks)
    maybe, surely = (widened(x, some.shape) for x in found)
    assert np.all(maybe | ~some), (pair.name, "an allowed pair in a tile called empty")
    assert np.all(every | ~surely), (pair.name, "a masked pair in a tile called full")


SINGLE = (*draw.MASKS, "blocks", "query padding", "near centers")


def named(name, size, seed):
    makers = {
        "blocks": cases.blocks_mask,
        "query padding": cases.query_padding,
        "near centers": cases.near_centers,
    }
    return makers[name](size, seed) if name in makers else draw.simple_mask(name, size, seed)


@pytest.mark.parametrize("name", SINGLE)
def test_what_a_mask_says_of_a_tile_is_never_wrong(name):
    for number, size in enumerate(draw.SIZES[1:]):
        blocks, offset = BLOCKS[number], ((0, 0), (5, 2), (7, 0))[number]
        for seed in range(4):
            pair = named(name, size, seed)
            assert_never_wrong(pair, size, blocks, offset, bounds(pair, size, blocks, offset))


@settings(max_examples=40)
@given(data=st.data())
def test_what_a_composed_mask_says_of_a_tile_is_never_wrong(data):
    size = data.draw(draw.sizes())
    pair = cases.drawn_mask(data, size, depth=3)
    if data.draw(st.booleans()):
        pair = draw.Pair(f"~({pair.name})", ~pair.term, oracles.negation(pair.oracle))
    blocks, offset = data.draw(st.sampled_from(BLOCKS)), data.draw(offsets)
    assert_never_wrong(pair, size, blocks, offset, bounds(pair, size, blocks, offset))


@settings(max_examples=8)
@given(data=st.data())
def test_what_is_said_while_the_program_runs_is_never_wrong(data):
    """Arrays and offsets traced: the lists of a kernel are made of this."""
    size = data.draw(draw.sizes())
    pair = cases.drawn_mask(data, size, depth=2)
    blocks, offset = data.draw(st.sampled_from(BLOCKS)), data.draw(offsets)

    @jax.jit
    def traced(term, offset):
        span = masks.Span.of((size.queries, size.keys), blocks, offset)
        return term.data_bounds(span)

    found = traced(pair.term, tuple(map(jnp.int32, offset)))
    assert_never_wrong(pair, size, blocks, offset, found)


@settings(max_examples=15)
@given(data=st.data())
def test_the_tables_of_a_kernel_agree_with_the_dense_mask(data):
    """Where nothing is known but by looking, looking settles it; padding is never called full."""
    from attnlab.core import problems
    from attnlab.core.reference import Call

    size = data.draw(draw.sizes())
    pair = cases.drawn_mask(data, size, depth=1)
    blocks, offset = data.draw(st.sampled_from(BLOCKS)), data.draw(offsets)
    query = jnp.zeros((*size.batch, size.heads, size.queries, 4))
    key = jnp.zeros((*size.batch, size.kv_heads, size.keys, 4))
    call = Call(
        query, key, key, (), attnlab.normalizers.Softmax(), pair.term, *offset, None, 1.0, 0.0
    )
    found = problems.tile_tables(call, blocks)
    assert_never_wrong(pair, size, blocks, offset, found)
    some, _ = seen_by_tile(dense_oracle(pair, size, offset), blocks)
    maybe, surely = (widened(x, some.shape) for x in found)
    if pair.term.opaque:
        np.testing.assert_array_equal(maybe, some, err_msg=pair.name)
    for axis, length, block in ((-2, size.queries, blocks[0]), (-1, size.keys, blocks[1])):
        if length % block:
            assert not surely.take(-1, axis).any()


@pytest.mark.parametrize(
    ("mask", "some", "every"),
    [
        (lambda: masks.KeyPadding(jnp.asarray([5, 0])), [[1, 1, 0], [0, 0, 0]],
         [[1, 0, 0], [0, 0, 0]]),
        (lambda: masks.Segments(jnp.zeros((2, 4), jnp.int32),
                                jnp.asarray([[0] * 4 + [0, 0, 1, 1] + [1] * 4] * 2)),
         [[1, 1, 0]] * 2, [[1, 0, 0]] * 2),
        (lambda: masks.Segments(jnp.full((2, 4), -1), jnp.full((2, 12), -1)), [[0, 0, 0]] * 2,
         [[0, 0, 0]] * 2),
        (lambda: masks.CausalBy(jnp.asarray([[5, 7, 6, 5]] * 2),
                                jnp.asarray([[5, 1, 2, 0, 6, 9, 9, 9, 8, 8, 9, 8],
                                             [6, 5, 5, 5, 0, 0, 0, 0, 7, 9, 9, 9]])),
         [[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 1, 0]]),
        (lambda: masks.Prefix(jnp.asarray([12, 4])), [[1, 1, 1], [1, 0, 0]],
         [[1, 1, 1], [1, 0, 0]]),
        (lambda: masks.QueryPadding(jnp.asarray([4, 0])), [[1, 1, 1], [0, 0, 0]],
         [[1, 1, 1], [0, 0, 0]]),
        (lambda: masks.Blocks(jnp.asarray([[[[True, False, True]]]] * 2), (4, 4)),
         [[1, 0, 1]] * 2, [[1, 0, 1]] * 2),
        (lambda: masks.Causal() & masks.KeyPadding(jnp.asarray([12, 12])), [[1, 0, 0]] * 2,
         [[0, 0, 0]] * 2),
    ],
    ids=["padding", "segments", "all padding", "causal by", "prefix", "queries", "blocks",
         "causal padding"],
)  # fmt: skip
def test_tiles_are_known_as_by_hand(mask, some, every):
    """4 queries and 12 keys in tiles of 4: being right is not enough, saying nothing is right."""
    found = mask().data_bounds(masks.Span.of((4, 12), (4, 4), (0, 0)))
    for got, expected in zip(found, (some, every), strict=True):
        expected = np.asarray(expected, bool)[:, None, None, :]
        np.testing.assert_array_equal(widened(got, expected.shape), expected)


# ---- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", draw.SIZES, ids=lambda s: f"{s.queries}x{s.keys}")
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_block_mask_equals_its_repeated_entries(size, blocks):
    pair = cases.blocks_mask(size, 3, blocks)
    for offset in ((0, 0), (9, 4)):  # blocks are counted from the first query and key of the call
        expected = dense_oracle(pair, size, offset)
        np.testing.assert_array_equal(np.broadcast_to(dense(pair, size, offset), expected.shape),
                                      expected)  # fmt: skip


@pytest.mark.parametrize("implementation", PLAIN_JAX)
@settings(max_examples=6)
@given(data=st.data())
def test_plain_jax_attends_by_blocks_as_the_formula(implementation, data):
    size = data.draw(draw.sizes())
    pair = cases.blocks_mask(
        size, data.draw(st.integers(0, 100)), data.draw(st.sampled_from(BLOCKS)),
        data.draw(st.booleans()),
    )  # fmt: skip
    if data.draw(st.booleans()):
        pair = cases.both(pair, draw.simple_mask("causal", size, 0))
    arrays = draw.inputs(size, 0)
    blocks = (16, 16) if implementation == "blockwise" else None

    @jax.jit
    def compute(arrays, mask):
        return attnlab.attention(
            *arrays, mask=mask, implementation=implementation, block_sizes=blocks
        )

    got = compute(tuple(map(jnp.asarray, arrays)), pair.term)
    exact = oracles.attention(*map(as_float64, arrays), mask=pair.oracle)
    assert_close(got, exact, np.float32)


def test_lists_say_the_same_as_a_table():
    index = np.array([[[0, 2, -1], [-1, -1, -1]], [[1, 1, 0], [2, 0, 1]]], np.int32)
    live = np.zeros((2, 2, 3), bool)
    for n, i in np.ndindex(2, 2):
        live[n, i, [j for j in index[n, i] if j >= 0]] = True
    mask = masks.Blocks.from_lists(jnp.asarray(index), 3, (4, 5))
    np.testing.assert_array_equal(mask.live, live)
    assert mask.block_sizes == (4, 5)
    traced = jax.jit(lambda x: masks.Blocks.from_lists(x, 3, (4, 5)).live)
    np.testing.assert_array_equal(traced(jnp.asarray(index)), live)
    out_of_range = np.where(index == 2, 3, index)
    np.testing.assert_array_equal(
        traced(jnp.asarray(out_of_range)), live & (np.arange(3) < 2), "meets nothing"
    )


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: masks.Blocks(jnp.ones((1, 2, 2))), TypeError, "live .*boolean.*float32"),
        (lambda: masks.Blocks(jnp.ones((1, 2, 2), bool), (0, 4)), ValueError, r"\(0, 4\)"),
        (
            lambda: masks.Blocks.from_lists(jnp.asarray([[[3]]]), 3),
            ValueError,
            "block numbers from -1 to 2, got 3",
        ),
        (
            lambda: masks.Blocks.from_lists(jnp.asarray([[[-2]]]), 3),
            ValueError,
            "block numbers from -1 to 2, got -2",
        ),
        (
            lambda: masks.Blocks.from_lists(jnp.zeros((1, 1, 1)), 3),
            TypeError,
            "index: expected integers, got dtype float32",
        ),
    ],
)
def test_bad_blocks_are_refused_by_name(make, error, words, as_users_run_it):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_a_table_that_does_not_cover_the_call_is_refused(implementation, as_users_run_it):
    arrays = [jnp.asarray(x) for x in draw.inputs(draw.Sizes((), 20, 30, 2, 2, 4, 4), 0)]
    live = jnp.ones((1, 2, 2), bool)
    assert attnlab.attention(*arrays, mask=masks.Blocks(live, (16, 16))).shape == (20, 2, 4)
    with pytest.raises(ValueError, match=r"mask: axis S .*should be 4, got 2"):
        attnlab.attention(*arrays, mask=masks.Blocks(live, (16, 8)), implementation=implementation)


def test_query_padding_hides_queries_and_nothing_else():
    size = draw.Sizes((3,), 7, 9, 2, 2, 4, 4)
    lengths = np.array([7, 3, 0], np.int32)
    arrays = draw.inputs(size, 0)
    for implementation in PLAIN_JAX:
        got = attnlab.attention(
            *map(jnp.asarray, arrays), mask=masks.QueryPadding(jnp.asarray(lengths)),
            implementation=implementation,
        )  # fmt: skip
        exact = oracles.attention(*map(as_float64, arrays))
        real = (np.arange(7) < lengths[:, None])[..., None, None]
        assert_close(got, np.where(real, exact, 0), np.float32)
