"""The feed-forward by chunks: the same numbers, less memory, and on a mesh nothing is gathered."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import attnlab.distributed
from attnlab.models import layers
from attnlab.models.language_model import CausalLM
from attnlab.training import MeshConfig
from attnlab.training.language import next_token_loss


def test_the_feed_forward_by_chunks_is_the_same_in_value_and_gradient(keys):
    x = jax.random.normal(keys("x"), (2, 20, 16))
    mesh = jax.make_mesh((2, 4), ("data", "sequence"))
    for gated, chunks in ((False, (5, 64)), (True, (3,))):
        modules = [
            layers.FeedForward(16, 32, gated=gated, chunk=chunk, rngs=nnx.Rngs(0))
            for chunk in (None, *chunks)
        ]

        def found(module):
            def total(module, x):
                return jnp.sum(jnp.sin(module(x)))

            return nnx.jit(nnx.value_and_grad(total, argnums=(0, 1)))(module, x)

        whole = jax.tree.leaves(found(modules[0]))
        with attnlab.distributed.over(mesh, ring="sequence", batch="data"):
            across = [found(module) for module in modules[1:]]
        for other in [*map(found, modules[1:]), *across]:
            for one, two in zip(whole, jax.tree.leaves(other), strict=True):
                np.testing.assert_allclose(two, one, rtol=2e-5, atol=2e-5)


def test_a_chunk_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="feed_forward_chunk: expected at least 1, got 0"):
        CausalLM(9, 1, 16, 2, feed_forward_chunk=0, rngs=nnx.Rngs(0))


def compiled(mesh, chunk, context=512, features=32, ratio=8.0):
    """The compiled gradient of a model's loss on a mesh; nothing runs."""
    model = CausalLM(
        17, 1, features, 4, mlp_ratio=ratio, feed_forward_chunk=chunk, rngs=nnx.Rngs(0)
    )
    placement = mesh.place()
    graph, params = nnx.split(model)

    def loss(params, tokens):
        return next_token_loss(nnx.merge(graph, params), tokens, place=placement.tokens)

    tokens = placement.put(np.zeros((mesh.data, context + 1), np.int32))
    with placement.attention(mesh.data):
        return jax.jit(jax.grad(loss)).lower(placement.put(params), tokens).compile()


@pytest.mark.parametrize(
    ("method", "chunk"),
    [
        ("ring", 16),
        pytest.param("ring", None, marks=pytest.mark.slow),
        pytest.param("heads", None, marks=pytest.mark.slow),
        pytest.param("heads", 16, marks=pytest.mark.slow),
    ],
)
def test_no_activation_is_gathered(method, chunk):
    """Keys and values travel, gradients are summed; whole sequences are nowhere put together."""
    text = compiled(MeshConfig(2, 4, method=method), chunk).as_text()
    assert ("collective-permute" if method == "ring" else "all-to-all") in text
    assert "all-gather" not in text
    for shape in re.findall(r"= f32\[([\d,]*)\]\S* collective-permute", text):
        assert np.prod([int(n) for n in shape.split(",")]) <= 512 // 4 * 32  # a device's share


@pytest.mark.parametrize("spread", [False, True])
def test_chunks_hold_the_hidden_layer_of_a_chunk(spread):
    """Of 4096 positions' 1024 numbers each, or of a device's share of them, a small part."""
    mesh = jax.make_mesh((1, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((1, 4096, 16), jnp.float32)
    if spread:
        lies = NamedSharding(mesh, PartitionSpec(None, "sequence"))
        x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)

    def held(chunk):
        graph, params = nnx.split(layers.FeedForward(16, 1024, chunk=chunk, rngs=nnx.Rngs(0)))

        def total(params, x):
            return jnp.sum(jnp.sin(nnx.merge(graph, params)(x)))

        across = attnlab.distributed.over(mesh, ring="sequence")
        with across if spread else contextlib.nullcontext():
            grad = jax.jit(jax.grad(total, argnums=(0, 1)))
            return grad.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    hidden = 4 * 1024 * 4096 // (4 if spread else 1)
    assert held(None) > hidden
    assert held(64) < hidden / 2
