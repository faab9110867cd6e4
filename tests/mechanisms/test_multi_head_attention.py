"""Multi-head attention: heads are independent, the module is projections around the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab import KVCache, MultiHeadAttention, atlas, masks
from tests import oracles
from tests.core import draw
from tests.tolerances import as_float64, assert_close, assert_reordered


def test_heads_do_not_see_each_other():
    query, key, value = map(jnp.asarray, draw.inputs(draw.Sizes((), 6, 6, 4, 4, 4, 4), 0))
    together = attnlab.attention(query, key, value)
    for n in range(4):
        alone = attnlab.attention(*(x[:, n : n + 1] for x in (query, key, value)))
        assert_reordered(together[:, n : n + 1], as_float64(alone), np.float32)


def test_the_mechanism_is_attention_itself():
    arrays = tuple(map(jnp.asarray, draw.inputs(draw.SIZES[1], 0)))
    module = atlas.get("multi-head-attention").build(4, 8, rngs=nnx.Rngs(0))
    exact = oracles.attention(*map(as_float64, arrays))
    assert_close(module(*arrays), exact, np.float32)


DECODING = sorted(
    entry.id
    for entry in atlas.entries().values()
    if entry.kind == "mechanism"
    and "causal self" in entry.patterns
    and {"decode", "state"} & entry.properties
)


@pytest.mark.parametrize("id", DECODING)
def test_a_cache_decodes_what_the_whole_sequence_gives(id, rng):
    """One token, then a chunk, then one by one; for every mechanism that claims to decode."""
    entry = atlas.get(id)
    mechanism = entry.build(4, 4, rngs=nnx.Rngs(0))
    heads = 2 if "key" in mechanism.projected else 4  # slices of the input are not shared
    layer = MultiHeadAttention(16, 4, num_kv_heads=heads, mechanism=mechanism, rngs=nnx.Rngs(1))
    x = jnp.asarray(rng.standard_normal((2, 8, 16)), jnp.float32)
    graph, state = nnx.split(layer)

    @jax.jit
    def run(state, x, cache=None):
        return nnx.merge(graph, state)(x, cache=cache, mask=masks.Causal())

    whole = as_float64(run(state, x))
    cache = layer.create_cache((2,), 11)
    done = 0
    for steps in (1, 6, 1):
        out, cache = run(state, x[:, done : done + steps], cache)
        assert_reordered(out, whole[:, done : done + steps], np.float32, words=f"from {done}")
        done += steps
    assert int(cache.length) == 8
    if isinstance(cache, KVCache):
        with pytest.raises(ValueError, match="capacity 11"):
            layer(jnp.zeros((2, 5, 16)), cache=cache)


def test_a_cache_of_another_kind_is_refused():
    plain = MultiHeadAttention(16, 4, rngs=nnx.Rngs(0))
    mechanism = atlas.get("gated-deltanet").build(4, 4, rngs=nnx.Rngs(0))
    recurrent = MultiHeadAttention(16, 4, mechanism=mechanism, rngs=nnx.Rngs(0))
    x = jnp.zeros((2, 1, 16))
    for layer, other in ((plain, recurrent), (recurrent, plain)):
        with pytest.raises(TypeError, match="cache: expected what create_cache makes"):
            layer(x, cache=other.create_cache((2,), 4))


def test_module_works_under_split_merge_jit_and_grad(rng):
    layer = MultiHeadAttention(8, 2, qk_norm=True, layer_scale=0.1, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = jnp.asarray(rng.standard_normal((3, 5, 8)), jnp.float32)

    @jax.jit
    def gradient(state):
        return jax.grad(lambda s: jnp.sum(jnp.sin(nnx.merge(graph, s)(x))))(state)

    leaves = jax.tree.leaves(gradient(state))
    assert leaves
    assert all(np.any(np.asarray(g) != 0) for g in leaves)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": 10, "num_heads": 3}, "num_heads|features"),
        ({"features": 8, "num_heads": 4, "num_kv_heads": 3}, "num_kv_heads"),
    ],
)
def test_heads_that_do_not_divide_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        MultiHeadAttention(**options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_qk_norm_makes_the_scale_of_the_projections_immaterial(dtype):
    attend = attnlab.MultiHeadAttention(
        16, 4, num_kv_heads=2, qk_norm=True, dtype=dtype, rngs=nnx.Rngs(0)
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 16)), dtype)
    before = attend(x)
    attend.query.kernel[...] *= 64.0
    attend.key.kernel[...] *= 64.0
    assert before.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(attend(x), np.float32), np.asarray(before, np.float32), rtol=1e-4, atol=1e-5
    )


def test_layer_scale_multiplies_the_output_channel_by_channel():
    plain = attnlab.MultiHeadAttention(16, 4, rngs=nnx.Rngs(0))
    scaled = attnlab.MultiHeadAttention(16, 4, layer_scale=1e-4, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((9, 16)), jnp.float32)
    np.testing.assert_allclose(np.asarray(scaled(x)), 1e-4 * np.asarray(plain(x)), rtol=1e-6)
