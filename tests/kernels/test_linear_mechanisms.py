"""Mechanisms of the linear family on the fused kernels: what the chunked form gives, and slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import atlas, masks
from attnlab.core.kernels import interpret
from tests.tolerances import as_float64, assert_close

LENGTH, HEADS, WIDTH = 21, 2, 16
IDS = ("linear-transformer", "retnet", "gla", "mamba2", "gated-deltanet", "rwkv7", "latte")
MASK = masks.Causal() & masks.Segments(jnp.asarray([[0] * 9 + [1] * 12]))


def call(id, implementation):
    module = atlas.get(id).build(HEADS, WIDTH, rngs=nnx.Rngs(0))

    def run(x, query, key, value):
        controls = module.controls(x)
        return module(query, key, value, **controls, mask=MASK, implementation=implementation)

    return run


@pytest.mark.parametrize("backend", ["triton", "tpu"])
@pytest.mark.parametrize("id", IDS)
def test_the_kernels_serve_the_mechanism(id, backend, rng):
    arrays = [rng.standard_normal((1, LENGTH, HEADS * WIDTH))]
    arrays += [rng.standard_normal((1, LENGTH, HEADS, WIDTH)) for _ in range(3)]
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
    read = jnp.asarray(rng.standard_normal((1, LENGTH, HEADS, WIDTH)), jnp.float32)

    def loss(run):
        return lambda *x: jnp.sum(jnp.sin(run(*x)) * read)

    def both(implementation):
        run = call(id, implementation)
        return run(*arrays), jax.grad(loss(run), argnums=(0, 1, 2, 3))(*arrays)

    with interpret():
        out, slopes = both(backend)
    plain, wanted = both("chunked")
    assert_close(out, as_float64(plain), "float32")
    for ours, theirs in zip(slopes, wanted, strict=True):
        scale = max(1.0, float(np.max(np.abs(theirs))))
        assert_close(ours, as_float64(theirs), "float32", "gradient", scale=scale)
