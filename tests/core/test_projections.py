"""What a mechanism may say of the projections of its layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import Mechanism, MultiHeadAttention, attention, masks
from tests.tolerances import as_float64, assert_reordered


class Sliced(Mechanism):
    """Keys and values are pieces of the input."""

    projected = ("query",)


class OneQuery(Mechanism):
    """Heads that share a query."""

    query_heads = 1

    def __call__(self, query, key, value, **options):
        return attention(jnp.repeat(query, 4, axis=-2), key, value, **options)


class Bare(Mechanism):
    projected = ()


def shapes(layer):
    return {".".join(map(str, path)): x.shape for path, x in nnx.to_flat_state(nnx.state(layer))}


def inputs(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_what_is_not_projected_has_no_parameters(rng):
    layer = MultiHeadAttention(16, 4, mechanism=Sliced(), rngs=nnx.Rngs(0))
    assert shapes(layer) == {"query.kernel": (16, 16), "out.kernel": (16, 16)}
    bare = MultiHeadAttention(16, 4, mechanism=Bare(), use_bias=True, rngs=nnx.Rngs(0))
    assert shapes(bare) == {"out.kernel": (16, 16), "out.bias": (16,)}
    one = MultiHeadAttention(
        16, 4, mechanism=OneQuery(), num_kv_heads=2, use_bias=True, rngs=nnx.Rngs(0)
    )
    assert shapes(one)["query.kernel"] == (16, 4)
    assert shapes(one)["query.bias"] == (4,)


@pytest.mark.parametrize("crossed", [False, True])
def test_heads_are_pieces_of_the_input(rng, crossed):
    layer = MultiHeadAttention(16, 4, mechanism=Sliced(), rngs=nnx.Rngs(0))
    x, context = inputs(rng, 2, 5, 16), inputs(rng, 2, 7, 16)
    source = context if crossed else x
    pieces = source.reshape(*source.shape[:-1], 4, 4)
    heads = attention((x @ layer.query.kernel[...]).reshape(2, 5, 4, 4), pieces, pieces)
    expected = heads.reshape(2, 5, 16) @ layer.out.kernel[...]
    out = layer(x, context if crossed else None)
    np.testing.assert_allclose(as_float64(out), as_float64(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mechanism", [Sliced, OneQuery])
@pytest.mark.parametrize("conv_width", [0, 3])
def test_a_layer_decodes_what_it_reads_at_once(rng, mechanism, conv_width):
    layer = MultiHeadAttention(
        16, 4, mechanism=mechanism(), qk_norm=True, conv_width=conv_width, rngs=nnx.Rngs(0)
    )
    x = inputs(rng, 2, 9, 16)
    whole, cache = layer(x, mask=masks.Causal()), layer.create_cache((2,), 9)
    for first, last in ((0, 4), (4, 5), (5, 9)):
        out, cache = layer(x[:, first:last], mask=masks.Causal(), cache=cache)
        assert_reordered(out, as_float64(whole[:, first:last]), np.float32)


def test_pieces_have_the_dtype_of_projections(rng):
    layer = MultiHeadAttention(16, 4, mechanism=Sliced(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer(inputs(rng, 5, 16)).dtype == jnp.bfloat16
    graph, state = nnx.split(layer)
    gradient = jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(inputs(rng, 5, 16))))(state)
    assert all(np.any(as_float64(g) != 0) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_kv_heads": 2}, "key.*features=16.*got 8"),
        ({"value_width": 8}, "value.*features=16.*got 32"),
        ({"head_width": 8}, "key.*features=16.*got 32"),
    ],
)
def test_pieces_that_are_not_as_wide_as_the_input_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        MultiHeadAttention(16, 4, mechanism=Sliced(), **options, rngs=nnx.Rngs(0))


def test_a_mechanism_may_ask_for_fewer_key_heads():
    class Two(Mechanism):
        key_heads = 2

    layer = MultiHeadAttention(16, 4, mechanism=Two(), rngs=nnx.Rngs(0))
    assert layer.num_kv_heads == 2
    assert shapes(layer)["key.kernel"] == (16, 8)
    told = MultiHeadAttention(16, 4, mechanism=Two(), num_kv_heads=4, rngs=nnx.Rngs(0))
    assert told.num_kv_heads == 4
    with pytest.raises(ValueError, match=r"num_kv_heads=2.*num_heads=3"):
        MultiHeadAttention(15, 3, mechanism=Two(), rngs=nnx.Rngs(0))


def test_projections_that_are_not_known_are_refused():
    class Unknown(Mechanism):
        projected = ("query", "memory")

    with pytest.raises(ValueError, match=r"projected.*memory"):
        MultiHeadAttention(16, 4, mechanism=Unknown(), rngs=nnx.Rngs(0))
