"""Which tiles a kernel visits, against an enumeration of them one by one in plain Python."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import masks
from attnlab.core.terms import sized_axes
from pallas_kernels.flash import plan, triton
from pallas_kernels.flash.problem import Leaf, reduce_leaf

SHAPES = ((1, 1, 1, 1), (1, 1, 3, 4), (2, 1, 4, 3), (1, 3, 2, 5), (2, 2, 3, 3))


def drawn_tables(data):
    """`some` and `every` (b, n, I, J), with rows that hold nothing and rows that hold all."""
    shape = data.draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    some = rng.random(shape) < data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    every = rng.random(shape) < 0.5  # also where `some` is false: the tables may be unsure
    return some, every


def namespaces(*tables):
    """The same tables as a plan known before running, and as one that depends on data."""
    return tables, tuple(map(jnp.asarray, tables))


@settings(max_examples=60)
@given(data=st.data())
def test_lists_hold_each_live_block_once_full_ones_first(data):
    some, every = drawn_tables(data)
    for tables in namespaces(some, every):
        lists = plan.make_lists(*tables)
        index, full, count = map(np.asarray, lists)
        assert {x.dtype for x in (index, full, count)} == {np.dtype(np.int32)}
        for b, n, i in np.ndindex(some.shape[:3]):
            live = [j for j in range(some.shape[3]) if some[b, n, i, j]]
            whole = [j for j in live if every[b, n, i, j]]
            found = index[b, n, i, : count[b, n, i]].tolist()
            assert found == whole + [j for j in live if j not in whole]
            assert full[b, n, i] == len(whole)
        assert index.min() >= 0 and index.max() < some.shape[3]  # also what lies beyond a list


def enumerated(some, every):
    """The steps of one (b, n): (owner, other, first, last, masked, dead)."""
    steps = []
    for i in range(some.shape[0]):
        live = [j for j in range(some.shape[1]) if some[i, j]]
        for j in live or [0]:
            dead = not live
            masked = not dead and not every[i, j]
            steps.append((i, j, j == (live or [0])[0], j == (live or [0])[-1], masked, dead))
    return steps


@settings(max_examples=60)
@given(data=st.data())
def test_the_flat_sequence_is_the_enumeration(data):
    some, every = drawn_tables(data)
    expected = {(b, n): enumerated(some[b, n], every[b, n]) for b, n in np.ndindex(some.shape[:2])}
    longest = max(map(len, expected.values()))
    for tables in namespaces(some, every):
        flat = plan.make_flat(*tables)
        assert int(flat.total) == longest
        owner, other, flags = map(np.asarray, flat[:3])
        assert {x.dtype for x in (owner, other, flags)} == {np.dtype(np.int32)}
        for (b, n), steps in expected.items():
            for place in range(owner.shape[-1]):
                at = int(owner[b, n, place]), int(other[b, n, place])
                flag = int(flags[b, n, place])
                if place >= len(steps):
                    # Nothing new is fetched, nothing computed, no output revisited.
                    assert at == steps[-1][:2]
                    assert flag == plan.SKIP
                    continue
                i, j, first, last, masked, dead = steps[place]
                assert at == (i, j)
                assert flag == (
                    first * plan.FIRST + last * plan.LAST + masked * plan.MASKED + dead * plan.DEAD
                )


@settings(max_examples=30)
@given(data=st.data())
def test_every_owner_is_visited_in_consecutive_steps(data):
    """What a kernel that accumulates into an output block relies on."""
    some, every = drawn_tables(data)
    flat = plan.make_flat(some, every)
    for b, n in np.ndindex(some.shape[:2]):
        owner, flags = flat.owner[b, n], flat.flags[b, n]
        assert np.all(np.diff(owner) >= 0)
        assert set(owner.tolist()) == set(range(some.shape[2]))
        real = flags != plan.SKIP
        for kind in (plan.FIRST, plan.LAST):
            marked = owner[real][(flags[real] & kind) > 0]
            assert marked.tolist() == list(range(some.shape[2]))


def test_lists_by_column_are_those_of_the_transposed_table():
    some = np.array([[[[1, 0, 1], [0, 0, 1]]]], bool)
    every = np.array([[[[1, 0, 0], [0, 0, 1]]]], bool)
    lists = plan.make_lists(np.swapaxes(some, -1, -2), np.swapaxes(every, -1, -2))
    np.testing.assert_array_equal(lists.count[0, 0], [1, 0, 2])
    np.testing.assert_array_equal(lists.full[0, 0], [1, 0, 1])
    np.testing.assert_array_equal(lists.index[0, 0, 2, :2], [1, 0])


@pytest.mark.parametrize("make", [plan.make_lists, plan.make_flat])
def test_tables_of_the_wrong_shape_are_refused(make):
    table = np.ones((1, 1, 2, 2), bool)
    with pytest.raises(ValueError, match=r"\(b, n, I, J\), got \(2, 2\)"):
        make(table[0, 0], table[0, 0])
    with pytest.raises(ValueError, match=r"got \(1, 1, 2, 2\) and \(1, 1, 2, 1\)"):
        make(table, table[..., :1])


# ---- sizes ---------------------------------------------------------------------------------------


@given(length=st.integers(1, 10**6), block=st.integers(1, 512))
def test_padding_is_the_next_whole_number_of_blocks(length, block):
    found = plan.padded(length, block)
    assert found % block == 0
    assert 0 <= found - length < block


@given(n=st.integers(0, 10**6), least=st.sampled_from([1, 16, 64]))
def test_the_next_power_of_two(n, least):
    found = plan.power_of_two(n, least)
    assert found & (found - 1) == 0
    assert found >= max(n, least)
    assert found == least or found // 2 < n


# Shared memory of one program on an A100, and registers (of 32 bits) of one multiprocessor.
_SHARED_MEMORY, _REGISTERS = 163 * 1024, 65536


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("width", [1, 16, 64, 80, 128, 192, 256])
def test_default_tiles_are_legal_and_fit_a_gpu(width, backward, itemsize):
    for value_width in (16, width):
        rows, cols = plan.triton_block_sizes(width, value_width, itemsize, backward)
        for size in (rows, cols):
            assert size >= 16  # the least that tensor cores multiply
            assert size & (size - 1) == 0
        keys, values = (plan.power_of_two(w) for w in (width, value_width))
        # A block of queries, and two of keys and values in flight.
        shared = (rows * keys + 2 * cols * (keys + values)) * itemsize
        assert shared <= _SHARED_MEMORY
        accumulators = cols * (keys + values) if backward else rows * values
        assert accumulators + 2 * rows * cols <= _REGISTERS


@given(rows=st.sampled_from([1, 16, 64, 1000]), cols=st.sampled_from([1, 16, 64, 1000]))
def test_default_tiles_are_not_larger_than_what_they_tile(rows, cols):
    sizes = triton.block_sizes(64, 64, 2, (rows, cols), False, "NVIDIA H100 80GB HBM3")
    for size, length in zip(sizes, (rows, cols), strict=True):
        assert 16 <= size < 2 * max(length, 16)


@given(
    blocks=st.tuples(*[st.sampled_from([16, 32, 64, 128])] * 2),
    own=st.tuples(*[st.sampled_from([0, 8, 16, 48, 128, 512])] * 2),
)
def test_divided_tiles_lie_within_the_blocks_of_a_mask(blocks, own):
    found = plan.divide_blocks(blocks, own)
    for size, block, mask in zip(found, blocks, own, strict=True):
        assert block % size == 0
        assert size == block if not mask else mask % size == 0
        assert all(block % n or mask % n for n in range(size + 1, block + 1)) or not mask


# ---- leaves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "owner"),
    [
        (Leaf(""), "row"),
        (Leaf("bnt"), "row"),
        (Leaf("n", table=True), "row"),
        (Leaf("nt", table=True), "row"),
        (Leaf("bs"), "column"),
        (Leaf("nts"), "pair"),
    ],
    ids=str,
)
def test_who_sums_the_gradient_of_an_array(leaf, owner):
    assert leaf.owner == owner


def test_gradients_are_summed_over_the_axes_that_an_array_lacks():
    gradient = jnp.asarray(np.arange(24.0, dtype=np.float32).reshape(2, 3, 4, 1))
    for shape in [(1, 3, 4, 1), (2, 1, 4, 1), (1, 1, 1, 1), (2, 3, 4, 1)]:
        axes = tuple(i for i, n in enumerate(shape) if n == 1)
        got = reduce_leaf(gradient, shape, jnp.bfloat16)
        assert got.dtype == jnp.bfloat16
        expected = np.asarray(gradient).sum(axes, keepdims=True)
        np.testing.assert_allclose(np.asarray(got).astype(np.float32), expected, rtol=2**-8)


def test_axes_that_hold_for_blocks_are_read_from_their_tag():
    assert sized_axes("B N T/64 S/128", 4) == [("N", 1, 1), ("T", 2, 64), ("S", 3, 128)]
    assert sized_axes("N *", 2) == [("N", 0, 1)]
    assert sized_axes("B T/16 S", 3) == [("T", 1, 16), ("S", 2, 1)]
    assert masks.Blocks(jnp.ones((1, 2, 2), bool), (64, 128)).axes() == ("B N T/64 S/128",)
