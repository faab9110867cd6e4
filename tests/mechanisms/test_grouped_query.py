"""From multi-head to grouped-query attention by pooling projections."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnlab import Mechanism, MultiHeadAttention, masks
from attnlab.dense.grouped_query import WAYS, pool_heads, to_grouped
from tests.tolerances import as_float64, assert_reordered


def drawn(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def layer(features=32, heads=8, **options):
    return MultiHeadAttention(features, heads, **options, rngs=nnx.Rngs(0))


def likened(module, groups, rng, difference=0.0):
    """Makes the key and value heads of each group nearly the same."""
    for linear in (module.key, module.value):
        for name in ("kernel", "bias"):
            param = getattr(linear, name)
            if param is None:
                continue
            heads = as_float64(param[...]) + 0.1
            heads = heads.reshape(*heads.shape[:-1], groups, module.num_heads // groups, -1)
            same = np.broadcast_to(heads[..., :1, :], heads.shape)
            moved = same + difference * rng.standard_normal(heads.shape)
            param[...] = jnp.asarray(moved.reshape(param[...].shape), jnp.float32)
    return module


def size(module):
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


# ---- weights -------------------------------------------------------------------------------------


def test_a_pooled_head_is_the_mean_of_its_group(rng):
    weight = drawn(rng, 5, 6 * 4)
    found = as_float64(pool_heads(weight, 6, 2))
    for k in range(2):
        heads = [as_float64(weight)[:, n * 4 : (n + 1) * 4] for n in range(3 * k, 3 * k + 3)]
        np.testing.assert_allclose(found[:, k * 4 : (k + 1) * 4], sum(heads) / 3, rtol=1e-5)
    first = as_float64(pool_heads(weight, 6, 2, how="first"))
    np.testing.assert_array_equal(first, as_float64(weight)[:, [*range(4), *range(12, 16)]])


def test_pooling_twice_is_pooling_once(rng):
    for weight in (drawn(rng, 5, 24), drawn(rng, 24)):
        twice = pool_heads(pool_heads(weight, 12, 6), 6, 2)
        assert_reordered(twice, as_float64(pool_heads(weight, 12, 2)), np.float32)


def test_pooling_to_as_many_is_nothing_and_to_one_is_the_mean_of_all(rng):
    weight = drawn(rng, 5, 24)
    np.testing.assert_array_equal(pool_heads(weight, 6, 6), weight)
    mean = as_float64(weight).reshape(5, 6, 4).mean(axis=1)
    np.testing.assert_allclose(as_float64(pool_heads(weight, 6, 1)), mean, rtol=1e-5, atol=1e-7)


# ---- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "first"])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(
    "options", [{}, {"use_bias": True, "qk_norm": True, "value_width": 3}, {"layer_scale": 0.5}]
)
def test_where_heads_of_a_group_are_equal_nothing_changes(rng, how, groups, options):
    module = likened(layer(**options), groups, rng)
    new, x = to_grouped(module, groups, how=how), drawn(rng, 2, 9, 32)
    assert new.num_kv_heads == groups
    assert_reordered(new(x), as_float64(module(x)), np.float32)
    context = drawn(rng, 2, 5, 32)
    assert_reordered(new(x, context), as_float64(module(x, context)), np.float32)


def test_short_convolutions_are_pooled_too(rng):
    module = layer(conv_width=3)
    likened(module, 2, rng)
    for convolution in module.convolutions[1:]:
        heads = np.asarray(convolution.weight[...]).reshape(3, 2, 4, 4)
        same = np.broadcast_to(heads[:, :, :1], heads.shape)
        convolution.weight[...] = jnp.asarray(same.reshape(3, 32))
    x = drawn(rng, 9, 32)
    assert_reordered(to_grouped(module, 2)(x), as_float64(module(x)), np.float32)


def test_heads_that_differ_are_pooled_as_projections_not_as_outputs(rng):
    module, x = layer(), drawn(rng, 9, 32)
    new = to_grouped(module, 2)
    assert np.max(np.abs(np.asarray(new(x) - module(x)))) > 1e-2
    np.testing.assert_array_equal(new.query.kernel[...], module.query.kernel[...])
    np.testing.assert_array_equal(new.out.kernel[...], module.out.kernel[...])
    expected = pool_heads(module.key.kernel[...], 8, 2)
    np.testing.assert_array_equal(new.key.kernel[...], expected)


def test_the_old_layer_is_left_alone(rng):
    module, x = layer(use_bias=True), drawn(rng, 9, 32)
    before = np.asarray(module(x))
    new = to_grouped(module, 4)
    for linear in (new.query, new.key, new.value, new.out):
        linear.kernel[...] *= 2
    np.testing.assert_array_equal(module(x), before)


def test_groups_of_groups(rng):
    x, module = drawn(rng, 9, 32), layer()
    twice, once = to_grouped(to_grouped(module, 4), 2), to_grouped(module, 2)
    assert_reordered(twice(x), as_float64(once(x)), np.float32)


@pytest.mark.parametrize("groups", [8, 4, 2, 1])
def test_a_cache_and_the_layer_are_as_much_smaller_as_was_said(groups):
    module = layer(value_width=3, use_bias=True)
    new = to_grouped(module, groups)
    cache = new.create_cache((), 10)
    assert cache.key.size + cache.value.size == 10 * groups * (4 + 3)
    assert size(module) - size(new) == (8 - groups) * (4 + 3) * (32 + 1)


def test_a_grouped_layer_decodes_what_it_reads_at_once(rng):
    new, x = to_grouped(layer(), 2), drawn(rng, 2, 9, 32)
    whole, cache = new(x, mask=masks.Causal()), new.create_cache((2,), 9)
    for first, last in ((0, 4), (4, 5), (5, 9)):
        out, cache = new(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, as_float64(whole[:, first:last]), np.float32)


def test_means_start_nearer_than_first_heads_and_these_nearer_than_new_ones(rng):
    """Heads that differ a little; training on then closes most of what is left."""
    module = likened(layer(), 2, rng, difference=0.08)
    x = drawn(rng, 16, 12, 32)
    target = module(x)
    gaps = {}
    for how in WAYS:
        drawing = {"rngs": nnx.Rngs(5)} if how == "random" else {}
        gaps[how] = float(
            jnp.mean(jnp.square(to_grouped(module, 2, how=how, **drawing)(x) - target))
        )
    assert 0 < gaps["mean"] < gaps["first"] < gaps["random"]

    graph, params = nnx.split(to_grouped(module, 2))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.mean(jnp.square(nnx.merge(graph, params)(x) - target))

        value, gradient = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # which optax needs
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(60):
        params, state, value = step(params, state)
    assert float(value) < gaps["mean"] / 2


# ---- bad input -----------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name(as_users_run_it):
    weight = jnp.ones((5, 24))
    for groups in (0, 4, 12):
        with pytest.raises(ValueError, match=r"num_kv_heads.*6"):
            pool_heads(weight, 6, groups)
    with pytest.raises(ValueError, match=r"weight.*\(5, 24\)"):
        pool_heads(weight, 10, 5)
    for how in ("random", "last"):
        with pytest.raises(ValueError, match="how"):
            pool_heads(weight, 6, 2, how=how)
    module = layer()
    with pytest.raises(ValueError, match=r"num_kv_heads.*8.*3"):
        to_grouped(module, 3)
    with pytest.raises(ValueError, match="how"):
        to_grouped(module, 2, how="last")
    for given in ({"how": "random"}, {"rngs": nnx.Rngs(0)}):
        with pytest.raises(ValueError, match="rngs"):
            to_grouped(module, 2, **given)

    class Sliced(Mechanism):
        projected = ("query",)

    class Fixed(Mechanism):
        key_heads = 8

    with pytest.raises(ValueError, match=r"layer.*Fixed.*8 key heads.*num_kv_heads=2"):
        to_grouped(layer(mechanism=Fixed()), 2)
    with pytest.raises(ValueError, match=r"layer.*Sliced"):
        to_grouped(layer(mechanism=Sliced()), 2)
