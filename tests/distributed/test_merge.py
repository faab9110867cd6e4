"""Keys cut over devices, results merged: the numbers of one device, and what is sent for them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import attention, explain, masks, normalizers, scores
from attnlab.core.attention import spread
from attnlab.core.modules import MultiHeadAttention
from attnlab.distributed.merge import merge_attention, merging
from tests.core import draw
from tests.distributed.exact import assert_equal

AUTO = jax.sharding.AxisType.Auto
SIZE = draw.Sizes((2,), 5, 32, 4, 2, 4, 3)
KINDS = {
    "softmax": lambda heads: normalizers.Softmax(),
    "sink": lambda heads: normalizers.Softmax(jnp.linspace(-1.0, 1.0, heads)),
    "plus one": lambda heads: normalizers.SoftmaxPlusOne(),
    "softplus": lambda heads: normalizers.SoftplusL1(),
    "sigmoid": lambda heads: normalizers.Sigmoid(),
    "squared relu": lambda heads: normalizers.ReluSquared(),
}


@functools.cache
def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AUTO,) * len(axes))


def results(attend, arrays, modifiers, normalizer, **options):
    """Output, and the gradients of a loss in every array that has one."""

    def loss(arrays, modifiers, normalizer):
        out = attend(*arrays, modifiers=modifiers, normalizer=normalizer, **options)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(out * weights), out

    grad = jax.grad(loss, (0, 1, 2), has_aux=True, allow_int=True)
    return jax.jit(grad)(arrays, modifiers, normalizer)


def assert_merged_equals_whole(cut, size, pair, modifiers, normalizer, seed, **options):
    arrays = [jnp.asarray(x) for x in draw.inputs(size, seed)]
    rest = [m.term for m in modifiers], normalizer
    options["mask"] = pair.term
    wanted = results(attention, arrays, *rest, implementation="reference", **options)
    found = results(functools.partial(merge_attention, **cut), arrays, *rest, **options)
    assert_equal(found, wanted, f"{pair.name} {[m.name for m in modifiers]} {normalizer}")


def test_explain_says_what_a_device_does_with_its_keys():
    query, key = (jax.ShapeDtypeStruct((2, n, 4, 8), jnp.float32) for n in (1, 2**24))
    with merging(mesh_of(keys=4), axis="keys"):
        choice = explain(query, key, key, query_offset=2**24 - 1)
    assert choice.reason.startswith("each of 4 has a part of the keys")
    assert f"{2 * 4 * 2**22:,} scores" in choice.reason  # a device's, not all


@pytest.mark.parametrize("name", draw.MASKS)
def test_every_mask(name):
    cut = {"mesh": mesh_of(batch=2, keys=4), "axis": "keys", "batch": "batch"}
    pair = draw.simple_mask(name, SIZE, 7)
    assert_merged_equals_whole(cut, SIZE, pair, (), normalizers.Softmax(), 3, query_offset=27)


@pytest.mark.parametrize("name", KINDS)
def test_every_normalizer_that_streams(name):
    cut = {"mesh": mesh_of(keys=4), "axis": "keys"}
    pair = draw.simple_mask("array", SIZE, 7)
    assert_merged_equals_whole(cut, SIZE, pair, (), KINDS[name](4), 3)


@settings(max_examples=6)
@given(data=st.data())
def test_whatever_is_drawn(data):
    size = data.draw(
        st.sampled_from(
            (SIZE, draw.Sizes((2,), 3, 21, 4, 2, 4, 3), draw.Sizes((), 1, 64, 2, 1, 4, 4))
        )
    )
    cut = {"mesh": mesh_of(keys=data.draw(st.sampled_from((2, 8)))), "axis": "keys"}
    pair, modifiers = draw.mask_pair(data, size), draw.modifier_pairs(data, size)
    options = {"query_offset": 19, "key_offset": 1} if data.draw(st.booleans()) else {}
    seed = data.draw(st.integers(0, 10**6))
    if data.draw(st.booleans()):
        options |= {"dropout_rate": 0.25, "dropout_key": jax.random.key(seed)}
    normalizer = KINDS[data.draw(st.sampled_from(list(KINDS)))](size.heads)
    assert_merged_equals_whole(cut, size, pair, modifiers, normalizer, seed, **options)


def test_the_merge_is_the_softmax_over_all_caches_at_once(rng):
    """Caches as devices have them, put one behind the other: 1e-5, the log-sum-exp too."""
    mesh, cut = mesh_of(keys=4), jax.sharding.PartitionSpec(None, "keys")
    query = rng.standard_normal((2, 3, 4, 8))
    caches = [rng.standard_normal((4, 2, 16, 2, 8)) * 3 for _ in range(2)]
    key, value = (np.concatenate(list(x), axis=1) for x in caches)
    score = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, 2, 2)) / math.sqrt(8)
    top = score.max(-1, keepdims=True)
    weight = np.exp(score - top)
    out = np.einsum(
        "bnts,bsnd->btnd", weight / weight.sum(-1, keepdims=True), np.repeat(value, 2, 2)
    )
    lse = (top + np.log(weight.sum(-1, keepdims=True)))[..., 0]
    here = jax.sharding.NamedSharding(mesh, cut)
    arrays = [jnp.asarray(query, jnp.float32)] + [
        jax.device_put(jnp.asarray(x, jnp.float32), here) for x in (key, value)
    ]
    ours = merge_attention(*arrays, mesh=mesh, axis="keys", return_lse=True)
    np.testing.assert_allclose(ours[0], out, atol=1e-5)
    np.testing.assert_allclose(ours[1], lse, atol=1e-5)


def sent(length, *, width=6, queries=3, heads=4):
    """Collectives of the compiled call, and how many numbers each has, for cut keys."""
    mesh = mesh_of(keys=4)

    def shape(tokens, last, *cut):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *cut))
        return jax.ShapeDtypeStruct((2, tokens, heads, last), jnp.float32, sharding=where)

    run = functools.partial(merge_attention, mesh=mesh, axis="keys", implementation="reference")
    arrays = shape(queries, 8), shape(length, 8, "keys"), shape(length, width, "keys")
    text = jax.jit(run).lower(*arrays).compile().as_text()
    words = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({words})(?:-start)?\(", text)
    count = lambda shapes: sum(  # noqa: E731
        math.prod(map(int, re.findall(r"\d+", dims)))
        for dims in re.findall(r"\w\[([\d,]*)\]", shapes)
    )
    return sorted((name, count(shapes)) for shapes, name in found)


def test_what_is_sent_is_d_plus_one_numbers_and_a_maximum_whatever_the_context():
    rows = 2 * 3 * 4
    short, long = sent(32), sent(512)
    assert short == long
    assert {name for name, _ in short} == {"all-reduce"}
    assert sum(n for _, n in short) == rows * (6 + 1) + rows
    assert sum(n for _, n in sent(32, width=13)) == rows * (13 + 1) + rows


def test_a_query_that_sees_no_key_anywhere_has_zeros_and_no_gradient(rng):
    arrays = [jnp.asarray(x) for x in draw.inputs(SIZE, 1)]
    mask = masks.KeyPadding(jnp.asarray([0, 9]))
    attend = functools.partial(merge_attention, mesh=mesh_of(keys=4), axis="keys")
    gradients, out = results(attend, arrays, (), normalizers.Softmax(), mask=mask)
    assert np.all(np.asarray(out)[0] == 0)
    for gradient in gradients[0]:
        assert np.all(np.isfinite(gradient)) and np.all(np.asarray(gradient)[0] == 0)
    assert np.any(np.asarray(gradients[0][1])[1, :9] != 0)
    assert np.all(np.asarray(gradients[0][1])[1, 9:] == 0)


def test_a_model_decodes_from_a_cache_that_is_cut(rng):
    layer = MultiHeadAttention(16, 4, num_kv_heads=2, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((2, 7, 16)), jnp.float32)

    def decode(x):
        cache, outs = layer.create_cache((2,), 16), []
        for first, last in ((0, 4), (4, 5), (5, 7)):
            out, cache = layer(x[:, first:last], cache=cache)
            outs.append(out)
        return jnp.concatenate(outs, 1)

    wanted = jax.jit(decode)(x)
    with merging(mesh_of(keys=4), axis="keys"):
        found = jax.jit(lambda x: decode(x))(x)
    assert_equal(found, wanted)
    assert spread.get() is None


@pytest.mark.usefixtures("as_users_run_it")
def test_what_does_not_fit_is_refused_by_name(rng):
    arrays = [jnp.asarray(x) for x in draw.inputs(SIZE, 1)]
    mesh = mesh_of(batch=2, keys=4)
    for options, error, words in (
        ({"mesh": "cpu", "axis": "keys"}, TypeError, "mesh: expected a jax.sharding.Mesh, got str"),
        ({"mesh": mesh, "axis": "ring"}, ValueError, "axis: the mesh has no axis 'ring'"),
        ({"mesh": mesh, "axis": "keys", "batch": "data"}, ValueError, "batch: the mesh has no"),
        ({"mesh": mesh, "axis": "keys", "batch": "keys"}, ValueError, "batch: .* was given twice"),
        ({"mesh": mesh_of(keys=2, three=3), "axis": "keys", "batch": "three"}, ValueError,
         "query: the first batch axis.*multiple of the 'three'"),
        ({"mesh": mesh, "axis": "keys", "normalizer": normalizers.Sparsemax()},
         NotImplementedError, "Sparsemax needs whole rows.*reference"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            merge_attention(*arrays, **options)
    assert spread.get() is None


def test_a_modifier_of_whole_rows_is_refused():
    class Ranked(scores.RowModifier):
        pass

    arrays = [jnp.asarray(x) for x in draw.inputs(SIZE, 1)]
    with pytest.raises(NotImplementedError, match="Ranked needs whole rows"):
        merge_attention(*arrays, mesh=mesh_of(keys=4), axis="keys", modifiers=Ranked())
