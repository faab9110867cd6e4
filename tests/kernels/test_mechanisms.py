"""Mechanisms made of score modifiers and normalizers run fused, and are trained there.

The same module, by kernel and with all scores at hand: outputs, and the gradient of every parameter
and input.  That the reference is right is the contract's business.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import atlas, masks
from tests.kernels import cases
from tests.tolerances import as_float64, assert_close

HEADS, KV_HEADS, WIDTH = 4, 2, 8
BACKENDS = [b for b in cases.backends() if jnp.float32 in b.dtypes]
IDS = (
    "alibi",
    "bam",
    "bam-ssmax",
    "binary-attention",
    "deconstructing-attention",
    "energy-gated",
    "neural-attention",
    "selective-self-attention",
    "sigmoid-attention",
    "softplus-reweighting",
    "t5-bias",
)


def module_of(id):
    """The entry's example, its parameters moved off their start, which may be zero."""
    graph, state = nnx.split(atlas.get(id).build(HEADS, WIDTH, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(5)
    moved = jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), state
    )
    return graph, moved


def loss_of(graph, arrays, implementation, block_sizes=None):
    """Loss of (state, query, key, value), and the output."""
    x = arrays[0]
    length = x.shape[0]
    ids = jnp.asarray([0] * (length // 3) + [1] * (length - length // 3))
    read = jnp.asarray(np.random.default_rng(9).standard_normal((length, HEADS, WIDTH)), "float32")

    def loss(state, query, key, value):
        module = nnx.merge(graph, state)
        key, value = module.keep(key, value, x)
        options = {} if block_sizes is None else {"block_sizes": block_sizes}
        out = module(
            query, key, value, mask=masks.Causal() & masks.Segments(ids),
            implementation=implementation, **module.controls(x), **options,
        )  # fmt: skip
        return jnp.sum(jnp.sin(module.finish(out, x)) * read), out

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("id", IDS)
def test_the_kernels_serve_and_train_the_mechanism(id, backend, rng):
    length = backend.blocks[0] + 7  # more than a tile, and not whole
    shapes = [(HEADS * WIDTH,), (HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, WIDTH)]
    arrays = [jnp.asarray(rng.standard_normal((length, *s)), jnp.float32) for s in shapes]
    graph, state = module_of(id)
    fused = backend.jit(loss_of(graph, arrays, backend.name, backend.blocks))
    plain = jax.jit(loss_of(graph, arrays, "reference"))
    (_, out), slopes = fused(state, *arrays[1:])
    (_, exact), wanted = plain(state, *arrays[1:])
    assert_close(out, as_float64(exact), "float32")
    ours, theirs = jax.tree.leaves(slopes), jax.tree.leaves(wanted)
    assert len(ours) == len(theirs) == 3 + len(jax.tree.leaves(state))
    for one, other in zip(ours, theirs, strict=True):
        scale = max(1.0, float(np.max(np.abs(other))))
        assert_close(one, as_float64(other), "float32", "gradient", scale=scale)
    for parameter in theirs[: len(theirs) - 3]:
        assert np.any(np.asarray(parameter) != 0), "a parameter that nothing reads"
