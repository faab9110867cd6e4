"""Star Attention: one mask is what its hosts compute, and its query's merge is exact."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, masks, normalizers, scores, testing
from attnlab.core.attention import spread
from attnlab.core.rotary import rotate
from attnlab.distributed.across import over
from attnlab.distributed.merge import merge_attention
from attnlab.distributed.star_attention import (
    StarAttention,
    StarMask,
    live_pairs,
    star_attention,
    star_context,
)
from tests.contract.distributed_formulas import star_rule
from tests.core import draw
from tests.tolerances import as_float64, assert_reordered

SIZE = draw.Sizes((2,), 32, 32, 4, 2, 4, 3)
INPUTS = [jnp.asarray(x) for x in draw.inputs(SIZE, 1)]
AUTO = jax.sharding.AxisType.Auto


@functools.cache
def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AUTO,) * len(axes))


@pytest.mark.parametrize(
    ("block", "anchor", "context"),
    [(4, 4, 17), (5, 3, 17), (7, 1, None), (6, 0, 13), (40, 40, 9), (3, 2, 0), (1, 1, 11)],
)
def test_the_mask_is_the_rule_and_its_tiles_are_known(block, anchor, context):
    mask = StarMask(block, anchor, context)
    i, j = np.arange(23)[:, None], np.arange(23)[None, :]
    expected = star_rule(block, anchor, 23 if context is None else context)(i, j)
    np.testing.assert_array_equal(mask.dense(23, 23)[0], expected)
    assert mask.exact_bounds
    for sizes in ((1, 1), (4, 4), (3, 5), (16, 2)):
        for offsets in ((0, 0), (9, 0), (11, 4)):
            rows, cols = expected[offsets[0] :], expected[:, offsets[1] :]
            seen = expected[offsets[0] :, offsets[1] :]
            plan = mask.plan(
                len(rows), cols.shape[1], sizes, query_offset=offsets[0], key_offset=offsets[1]
            )
            for (r, c), empty in np.ndenumerate(plan.empty):
                tile = seen[r * sizes[0] :, c * sizes[1] :][: sizes[0], : sizes[1]]
                assert empty == (not tile.any()) and plan.full[r, c] == tile.all()


def test_contexts_of_a_batch_may_end_where_they_like():
    lengths = np.array([5, 12])
    mask = StarMask(4, 2, jnp.asarray(lengths))
    assert not mask.exact_bounds
    dense, span = mask.dense(16, 16), masks.Span.of((16, 16), (4, 3), (0, 0))
    for n, length in enumerate(lengths):
        alone = StarMask(4, 2, int(length))
        np.testing.assert_array_equal(dense[n], alone.dense(16, 16))
        for batched, own in zip(mask.data_bounds(span), alone.bounds(span), strict=True):
            np.testing.assert_array_equal(batched[n, 0], own)


@pytest.mark.parametrize("context", [11, jnp.asarray([3, 14])], ids=["known", "data"])
def test_the_laboratory_has_no_objection_to_the_mask(context):
    report = testing.check_mask(
        StarMask(4, 2, context), num_queries=16, num_keys=16, implementations=["blockwise"]
    )
    assert report.ok, str(report)


def test_one_block_is_full_attention():
    one = star_attention(*INPUTS, block_size=32, context_length=28)
    np.testing.assert_array_equal(one, attention(*INPUTS, mask=masks.Causal()))
    ours = StarMask(32, 32, 28).plan(32, 32, (8, 8))
    full = masks.Causal().plan(32, 32, (8, 8))
    np.testing.assert_array_equal(ours.empty, full.empty)
    np.testing.assert_array_equal(ours.full, full.full)


def test_tiles_between_anchor_and_block_are_never_visited():
    """Eight blocks of context and one of query: 8 on the diagonal, 7 anchors, 9 of the query."""
    counts = StarMask(8, 8, 64).plan(72, 72, (8, 8)).counts()
    assert counts["empty"] == 81 - 8 - 7 - 9
    assert counts["partial"] == 9


# -- phase 1 -----------------------------------------------------------------------------------


def layers(rng, width=16, count=2):
    return [
        [jnp.asarray(rng.standard_normal((width, width)) / 4, jnp.float32) for _ in range(5)]
        for _ in range(count)
    ]


def model(weights, x, place, attend):
    """A few layers with rotated queries and keys: the output, and each layer's keys and values."""
    kept = []
    for to_query, to_key, to_value, to_out, inner in weights:
        query, key, value = (
            (x @ w).reshape(*x.shape[:-1], 2, 8) for w in (to_query, to_key, to_value)
        )
        query, key = (rotate(z, position=place) for z in (query, key))
        kept.append((key, value))
        x = x + attend(query, key, value).reshape(x.shape) @ to_out
        x = x + jnp.tanh(x @ inner)
    return x, kept


@pytest.mark.parametrize("anchor", [8, 3])
def test_one_mask_is_what_the_hosts_compute_through_all_layers(rng, anchor):
    """Each host encodes [anchor; block] with the positions of both, and keeps the block's cache."""
    weights, x = layers(rng), jnp.asarray(rng.standard_normal((1, 32, 16)), jnp.float32)
    causal = functools.partial(attention, mask=masks.Causal(), implementation="reference")
    caches = []
    for block in range(4):
        place = np.arange(8 * block, 8 * block + 8)
        if block:
            place = np.concatenate([np.arange(anchor), place])
        _, kept = model(weights, x[:, place], jnp.asarray(place), causal)
        caches.append([[z[:, anchor if block else 0 :] for z in pair] for pair in kept])
    star = functools.partial(star_attention, block_size=8, anchor_size=anchor)
    _, ours = model(weights, x, jnp.arange(32), star)
    for layer, pair in enumerate(ours):
        for n, z in enumerate(pair):
            hosts = np.concatenate([cache[layer][n] for cache in caches], axis=1)
            assert_reordered(z, as_float64(hosts), np.float32)
    _, dense = model(weights, x, jnp.arange(32), causal)
    assert np.max(np.abs(dense[1][0] - ours[1][0])) > 1e-2  # the hosts do not compute this


def both_ways(attend, modifiers=(), **options):
    def loss(arrays, modifiers):
        out = attend(*arrays, modifiers=modifiers, **options)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(out * weights), out

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True, allow_int=True))(INPUTS, modifiers)


def assert_same(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(b.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


ARRANGED = {
    "one block each": ({"keys": 4}, {"block_size": 8}, {}),
    "several blocks each": ({"keys": 4}, {"block_size": 2, "anchor_size": 1}, {}),
    "no anchor": ({"keys": 2}, {"block_size": 4, "anchor_size": 0}, {}),
    "batch": ({"batch": 2, "keys": 4}, {"block_size": 4, "anchor_size": 3}, {}),
    "sigmoid": ({"keys": 4}, {"block_size": 4}, {"normalizer": normalizers.Sigmoid()}),
    "sink": ({"keys": 4}, {"block_size": 4},
             {"normalizer": normalizers.Softmax(jnp.linspace(-1.0, 1.0, 4))}),
    "documents": ({"keys": 4}, {"block_size": 8},
                  {"mask": masks.Segments(jnp.repeat(jnp.arange(4), 8)[None] // 3)}),
    "array": ({"keys": 4}, {"block_size": 8}, {"mask": masks.ArrayMask(
        jnp.asarray(np.random.default_rng(0).random((2, 1, 32, 32)) < 0.7))}),
    "blocks": ({"keys": 4}, {"block_size": 8}, {"mask": masks.Blocks(
        jnp.asarray(np.random.default_rng(1).random((4, 8, 8)) < 0.7), (4, 4))}),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRANGED)
def test_phase_1_on_devices_is_the_one_mask(name):
    axes, sizes, options = ARRANGED[name]
    cut = {"mesh": mesh_of(**axes), "axis": "keys", "batch": "batch" if "batch" in axes else None}
    modifiers = (scores.AlibiSlopes(jnp.asarray([0.5, 0.25, 0.1, 0.0])),)
    wanted = both_ways(
        functools.partial(star_attention, implementation="reference"), modifiers, **sizes, **options
    )
    found = both_ways(functools.partial(star_context, **cut), modifiers, **sizes, **options)
    assert_same(found, wanted)
    assert spread.get() is None


def test_phase_1_goes_around_a_ring_as_it_is():
    wanted = both_ways(star_attention, block_size=8, anchor_size=5, context_length=29)
    with over(mesh_of(keys=4), ring="keys"):
        found = both_ways(star_attention, block_size=8, anchor_size=5, context_length=29)
    assert_same(found, wanted)


COLLECTIVES = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives(run, *shapes):
    """Names and numbers of what the compiled program sends; `shapes` with whether they are cut."""
    mesh = mesh_of(keys=4)
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(None, "keys" if cut else None)))
        for shape, cut in shapes
    ]  # fmt: skip
    text = jax.jit(run).lower(*arrays).compile().as_text()
    found = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", text)
    sizes = [re.findall(r"\w\[([\d,]*)\]", kind) for kind, _ in found]
    total = sum(math.prod(map(int, s.split(","))) for each in sizes for s in each)
    return {name for _, name in found}, total


def test_phase_1_sends_the_anchor_and_nothing_else():
    for length in (32, 128):
        run = functools.partial(
            star_context, mesh=mesh_of(keys=4), axis="keys", block_size=8, anchor_size=3,
            implementation="reference",
        )  # fmt: skip
        names, total = collectives(
            run, *(((1, length, heads, width), True) for heads, width in ((4, 8), (2, 8), (2, 6)))
        )
        assert names == {"all-reduce"}
        assert total == 3 * 2 * (8 + 6)  # anchor tokens, key heads, widths


# -- phase 2 -----------------------------------------------------------------------------------


def test_the_query_reads_the_caches_of_all_hosts_as_one(rng):
    """The paper's claim: exact, and D + 1 numbers (and one for a maximum) however long the context.

    Context of 48 and room for 16 more, a query of five tokens.
    """
    cache = [rng.standard_normal((2, 64, 2, 8)) for _ in range(2)]
    query = rng.standard_normal((2, 5, 4, 8))
    key, value = (np.repeat(x[:, :53], 2, axis=2) for x in cache)
    score = np.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(8)
    score = np.where(np.arange(53) <= 48 + np.arange(5)[:, None], score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    expected = np.einsum("bnts,bsnd->btnd", weight / weight.sum(-1, keepdims=True), value)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, *cache)]
    cut = {"mesh": mesh_of(keys=4), "axis": "keys", "query_offset": 48}
    found = merge_attention(*arrays, mask=StarMask(12, 12, 48), **cut)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    run = functools.partial(merge_attention, mask=masks.Causal(), implementation="reference", **cut)
    for length in (64, 256):
        names, total = collectives(
            run, (query.shape, False), *(((2, length, 2, 8), True) for _ in range(2))
        )
        assert names == {"all-reduce"} and total == query[..., 0].size * (8 + 2)


def test_both_phases_are_one_call_to_a_whole_sequence(rng):
    """Encode a context on devices, then read it with a query: the one mask says the same."""
    whole = star_attention(*INPUTS, block_size=6, context_length=24)
    query, key, value = INPUTS
    cut = {"mesh": mesh_of(keys=4), "axis": "keys"}
    first = star_context(*(x[:, :24] for x in INPUTS), block_size=6, **cut)
    last = merge_attention(
        query[:, 24:], key, value, mask=masks.Causal(), query_offset=24, **cut
    )  # fmt: skip
    assert_same(jnp.concatenate([first, last], 1), whole)


@pytest.mark.parametrize(
    ("context", "query", "block", "anchor"),
    [(64, 8, 16, 16), (64, 8, 16, 3), (37, 0, 8, 8), (7, 5, 9, 4), (40, 3, 10, 0), (0, 6, 4, 4)],
)
def test_counted_pairs_are_those_of_the_masks(context, query, block, anchor):
    found = live_pairs(context, query, block_size=block, anchor_size=anchor)
    total = context + query
    dense = np.asarray(StarMask(block, anchor, context).dense(total, total))[0]
    assert found["context"] == dense[:context].sum()
    assert found["query"] == dense[context:].sum()
    assert found["causal"] == np.tri(total, dtype=int).sum()
    hosts = 0
    for start in range(0, context, block):
        tokens = min(block, context - start) + (anchor if start else 0)
        hosts += np.tri(tokens, dtype=int).sum()
    assert found["context"] + found["again"] == hosts


def test_what_the_paper_saves():
    """A million tokens in blocks of a quarter: 62 % of the pairs; in blocks of 32K, 9 %."""
    million = 2**20
    quarter = live_pairs(million, 128, block_size=million // 4)
    small = live_pairs(million, 128, block_size=2**15)
    shares = [(x["context"] + x["query"]) / x["causal"] for x in (quarter, small)]
    # n = 4 and 32 blocks of pairs 1/2 n^2: (n / 2 + n - 1) / (n^2 / 2).
    np.testing.assert_allclose(shares, [(2 + 3) / 8, (16 + 31) / 512], atol=1e-3)


def test_a_module_may_be_told_where_the_query_begins():
    layer = StarAttention(8, anchor_size=4)
    phase_1 = layer(*INPUTS)
    both = layer(*INPUTS, context_length=20)
    np.testing.assert_array_equal(both, star_attention(
        *INPUTS, block_size=8, anchor_size=4, context_length=20))  # fmt: skip
    np.testing.assert_array_equal(phase_1[:, :20], both[:, :20])
    assert np.max(np.abs(phase_1[:, 20:] - both[:, 20:])) > 1e-2


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ({"block_size": 0}, ValueError, "block_size: expected 1 or more, got 0"),
        ({"block_size": 2.0}, TypeError, r"block_size: expected an int, got 2\.0"),
        ({"block_size": 4, "anchor_size": 5}, ValueError, "anchor_size.*first block, 4.*got 5"),
        ({"block_size": 4, "anchor_size": -1}, ValueError, "anchor_size: expected 0 or more"),
        ({"block_size": 4, "context_length": -2}, ValueError, "context_length.*got -2"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(sizes, error, words):
    for refuse in (StarMask, StarAttention, functools.partial(star_attention, *INPUTS)):
        with pytest.raises(error, match=words):
            refuse(**sizes)


@pytest.mark.usefixtures("as_users_run_it")
def test_contexts_that_devices_cannot_share_are_refused_by_name():
    cut = {"mesh": mesh_of(keys=4), "axis": "keys"}
    query, key, value = INPUTS
    for arrays, options, words in (
        (INPUTS, {"block_size": 5}, "query: a context over 4 devices.*multiple of 20, got 32"),
        ((query, key[:, :16], value[:, :16]), {"block_size": 4}, "key: expected the 32 tokens"),
        (INPUTS, {"block_size": 8, "query_offset": 8}, "query_offset: blocks count.*got 8"),
        (INPUTS, {"block_size": 8, "axis": "ring"}, "axis: the mesh has no axis 'ring'"),
    ):
        with pytest.raises(ValueError, match=words):
            star_context(*arrays, **(cut | options))
    with pytest.raises(NotImplementedError, match="Sparsemax"):
        star_context(*INPUTS, block_size=8, normalizer=normalizers.Sparsemax(), **cut)
    assert spread.get() is None
