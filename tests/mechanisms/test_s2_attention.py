"""S2-Attention: shares of the context that together are all of it, and that caches can rely on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, masks
from attnlab.core.kernels import interpret
from attnlab.distributed.across import over
from attnlab.distributed.s2_attention import DENSE, S2Attention, Shards, s2_attention, shares
from tests.contract.distributed_formulas import by_head, shard_rule
from tests.core import draw
from tests.tolerances import as_float64, assert_reordered

SIZE = draw.Sizes((2,), 48, 48, 8, 4, 4, 3)
INPUTS = [jnp.asarray(x) for x in draw.inputs(SIZE, 1)]
AUTO = jax.sharding.AxisType.Auto
CAUSAL = np.tri(48, dtype=bool)


def made(num_heads, stride, block=4, near=1, **options):
    return Shards(jnp.asarray(shares(num_heads, stride, **options)), stride, block, near)


def dense(mask, length=48):
    return np.asarray(mask.dense(length, length, num_heads=mask.share.shape[0]))


def test_the_pattern_by_hand():
    """Eight blocks of one token, two of them near, one share of three (key blocks 0, 3, 6)."""
    expected = """
        1 . . . . . . .
        1 1 . . . . . .
        1 1 1 . . . . .
        1 . 1 1 . . . .
        1 . . 1 1 . . .
        1 . . 1 1 1 . .
        1 . . 1 . 1 1 .
        1 . . 1 . . 1 1
    """
    rows = [[x == "1" for x in line.split()] for line in expected.strip().splitlines()]
    mask = made(2, 3, block=1, near=2, homogeneous=True)
    for head in dense(mask, 8):
        np.testing.assert_array_equal(head, rows)


@pytest.mark.parametrize(("block", "near", "stride"), [(1, 1, 2), (4, 2, 3), (5, 1, 4), (6, 3, 1)])
def test_the_mask_is_the_rule_head_by_head(block, near, stride):
    mask = made(8, stride, block, near, shard_heads=4, offset=1)
    rule = by_head([shard_rule(n // 2 + 1, stride, block, near) for n in range(8)])
    i, j = np.arange(48)[:, None], np.arange(48)[None, :]
    np.testing.assert_array_equal(dense(mask), rule(i, j))


@pytest.mark.parametrize(("heads", "stride"), [(8, 8), (8, 3), (4, 4), (5, 2), (3, 1)])
def test_the_heads_together_see_all_of_the_past(heads, stride):
    mask = made(heads, stride, block=2)
    np.testing.assert_array_equal(dense(mask).any(0), CAUSAL)
    plan = mask.plan(48, 48, (4, 4), num_heads=heads)
    np.testing.assert_array_equal(plan.empty, masks.Causal().plan(48, 48, (4, 4)).empty)


def test_each_head_sees_about_one_part_in_stride():
    length, stride = 1024, 8
    pairs = dense(made(8, stride, block=8), length).sum((1, 2)) / np.tri(length).sum()
    np.testing.assert_allclose(pairs, 1 / stride, atol=0.02)


def test_fewer_heads_than_shares_would_leave_blocks_to_nobody():
    """What is refused is refused for a reason: every second of eight shares has no head."""
    step = Shards(jnp.asarray([0, 2, 4, 6]), 8, 2, 1)  # the authors' step for four heads of eight
    behind = CAUSAL & (np.arange(48)[:, None] // 2 != np.arange(48) // 2)
    seen = dense(step).any(0)
    assert not np.array_equal(seen, CAUSAL)
    assert 0.4 < (seen & behind).sum() / behind.sum() < 0.6
    with pytest.raises(ValueError, match=r"stride: 4 heads cannot see all.*8 shares.*at most 4"):
        shares(4, 8)
    with pytest.raises(ValueError, match="stride: 2 heads"):  # of key heads there are but two
        s2_attention(INPUTS[0], *(x[:, :, :2] for x in INPUTS[1:]), stride=4)
    np.testing.assert_array_equal(shares(4, 8, dense_heads=1), [0, 1, 2, DENSE])
    some = Shards(jnp.asarray(shares(4, 8, dense_heads=1)), 8, 2, 1)
    np.testing.assert_array_equal(dense(some).any(0), CAUSAL)


@pytest.mark.parametrize("sizes", [(1, 2), (3, 5), (4, 4), (16, 16)])
@pytest.mark.parametrize("offsets", [(0, 0), (9, 4)])
def test_tiles_are_known_of_every_head(sizes, offsets):
    share = jnp.asarray([0, 2, DENSE, 1])
    for block, near, stride in ((4, 1, 3), (3, 2, 3), (5, 1, 1)):
        mask = Shards(share, stride, block, near)
        whole = dense(mask, 26)[:, offsets[0] :, offsets[1] :]
        span = masks.Span.of(whole.shape[1:], sizes, offsets)
        some, every = mask.data_bounds(span)
        union = [np.broadcast_to(x, some.shape[1:]) for x in mask.bounds(span)]
        for n, r, c in np.ndindex(some.shape):
            tile = whole[n, r * sizes[0] :, c * sizes[1] :][: sizes[0], : sizes[1]]
            assert some[n, r, c] == tile.any() and every[n, r, c] == tile.all()
            assert union[0][r, c] or not tile.any()
            assert tile.all() or not union[1][r, c]


def both_ways(attend, **options):
    def loss(arrays):
        out = attend(*arrays, **options)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(out * weights), out

    return jax.jit(jax.grad(loss, has_aux=True))(INPUTS)


def assert_same(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("implementation", ["blockwise", "triton"])
def test_skipping_blocks_is_masking_them(implementation):
    """Tiles that no pair of a head needs are not visited; 1e-5 of attention to a dense mask."""
    mask = masks.ArrayMask(jnp.asarray(dense(made(8, 4, 16, shard_heads=4))))
    wanted = both_ways(attention, mask=mask, implementation="reference")
    with interpret():
        found = both_ways(
            s2_attention, stride=4, block_size=16, implementation=implementation,
            block_sizes=(16, 16),
        )  # fmt: skip
    assert_same(found, wanted)


def test_blocks_of_other_heads_are_not_even_read():
    """NaN in a key that a head does not see would reach it through any tile that is visited."""
    mask = made(8, 4, 8, shard_heads=4)
    some, _ = mask.data_bounds(masks.Span.of((48, 48), (8, 8), (0, 0)))  # what a kernel visits
    visited = np.asarray(some).sum((1, 2))
    # Six blocks of queries: six near blocks, and of the 15 pairs of blocks behind them a share.
    np.testing.assert_array_equal(visited, np.repeat([6 + 5 + 1, 6 + 2, 6 + 3, 6 + 4], 2))


@pytest.mark.parametrize("offset", [8, 21, 32])
def test_what_is_behind_the_window_and_not_ones_share_can_be_dropped(offset):
    """Whatever replaces it, no later query of that head gives another number."""
    query, key, value = INPUTS
    attend = functools.partial(
        s2_attention, stride=4, block_size=4, local_blocks=2, query_offset=offset
    )
    mask = made(8, 4, 4, 2, shard_heads=4)
    needed = np.asarray(mask.needed(48, offset))
    assert np.array_equal(needed[::2], needed[1::2])  # heads of one cache
    keep = jnp.asarray(needed[::2].T[None, :, :, None])
    wanted = attend(query[:, offset:], key, value)
    dropped = (jnp.where(keep, x, jnp.nan) for x in (key, value))
    np.testing.assert_array_equal(attend(query[:, offset:], *dropped), wanted)
    # And all that is kept is read by some query from here on.
    reads = dense(mask)[:, offset:].any(1)
    np.testing.assert_array_equal(needed, reads)
    behind = np.arange(48) // 4 < offset // 4 - 1
    assert needed[:, behind].mean() <= 0.5


@pytest.mark.parametrize("axes", [{"heads": 4}, {"ring": 4}, {"ring": 2, "heads": 2}], ids=str)
def test_heads_keep_their_shares_wherever_they_are(axes):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AUTO,) * len(axes))
    options = {"stride": 3, "block_size": 4, "local_blocks": 2}
    wanted = both_ways(s2_attention, implementation="reference", **options)
    with over(mesh, **{name: name for name in axes}):
        found = both_ways(s2_attention, **options)
    assert_same(found, wanted)


def test_one_share_is_causal_attention_and_so_are_dense_heads():
    plain = as_float64(attention(*INPUTS, mask=masks.Causal()))
    assert_reordered(s2_attention(*INPUTS, stride=1, block_size=4), plain, np.float32)
    mixed = s2_attention(*INPUTS, stride=8, block_size=4, dense_heads=2)
    assert_reordered(mixed[:, :, 4:], plain[:, :, 4:], np.float32)
    assert np.max(np.abs(mixed[:, :, :4] - plain[:, :, :4])) > 1e-2


def test_a_module_is_its_function():
    layer = S2Attention(4, block_size=4, local_blocks=2, offset=1)
    ours = s2_attention(*INPUTS, stride=4, block_size=4, local_blocks=2, offset=1)
    np.testing.assert_array_equal(layer(*INPUTS), ours)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"stride": 0}, ValueError, "stride: expected 1 or more, got 0"),
        ({"stride": 2.0}, TypeError, r"stride: expected an int, got 2\.0"),
        ({"stride": 2, "block_size": 0}, ValueError, "block_size: expected 1 or more, got 0"),
        ({"stride": 2, "local_blocks": 0}, ValueError, "local_blocks: expected 1 or more"),
        ({"stride": 5}, ValueError, "stride: 4 heads cannot see all of a context dealt out in 5"),
        ({"stride": 2, "shard_heads": 3}, ValueError, "shard_heads: expected a divisor of the 8"),
        ({"stride": 2, "dense_heads": 5}, ValueError, "dense_heads: expected 0 to 4.*got 5"),
        ({"stride": 2, "dense_heads": 1, "homogeneous": True}, ValueError, "dense_heads: homog"),
        ({"stride": 2, "offset": 0.5}, TypeError, r"offset: expected an int, got 0\.5"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, error, words):
    with pytest.raises(error, match=words):
        S2Attention(**options)(*INPUTS)
