"""The kernels alone: no attnlab, no Flax, a program written by hand."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash import plan, triton
from pallas_kernels.flash.problem import Arrays, Leaf, Spec
from tests.tolerances import assert_close


class Relu2:
    """Weights relu(s - slope * distance)^2 over the keys up to the query."""

    shared = False

    def allowed(self, leaves, at):
        return at.key <= at.query

    def evaluate(self, leaves, products, at):
        distance = (at.query - at.key).astype(products.dtype)
        return jnp.square(jnp.maximum(products - leaves[0] * distance, 0))


def test_a_program_of_ones_own_runs_forward_and_backward(keys):
    length, heads, width = 64, 2, 16
    query, key, value, cotangent = (
        jax.random.normal(x, (1, heads, length, width)) for x in keys("q", "k", "v", "c")
    )
    slopes = jnp.asarray([0.1, 0.3]).reshape(1, heads, 1, 1)
    spec = Spec(Relu2(), (Leaf("n", trainable=True),), 0.25, (length, length), (16, 32))
    some = np.zeros((1, 1, 4, 2), bool)
    for i in range(4):
        some[0, 0, i, : i // 2 + 1] = True
    every = np.zeros_like(some)
    every[0, 0, 2:, 0] = True
    arrays = Arrays(query, key, value, [slopes], plan.make_lists(some, every))
    out, _ = triton.forward(spec, arrays, interpret=True)

    q, k, v, c = (np.asarray(x, np.float64)[0] for x in (query, key, value, cotangent))
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    inner = 0.25 * q @ k.swapaxes(1, 2) - np.asarray([0.1, 0.3])[:, None, None] * (i - j)
    weights = np.where(j <= i, np.maximum(inner, 0) ** 2, 0)
    assert_close(out[0, 0], weights @ v, jnp.float32)

    turned = plan.make_lists(some.swapaxes(2, 3), every.swapaxes(2, 3))
    zeros = jnp.zeros((1, heads, length))
    d_query, _, d_value, (d_slopes,) = triton.backward(
        spec, arrays._replace(columns=turned), jnp.asarray(some, jnp.int32), cotangent, zeros,
        zeros, (0,), interpret=True,
    )  # fmt: skip
    d_inner = np.where(j <= i, 2 * np.maximum(inner, 0), 0) * (c @ v.swapaxes(1, 2))
    assert_close(d_query[0], 0.25 * d_inner @ k, jnp.float32, "gradient")
    assert_close(d_value[0], weights.swapaxes(1, 2) @ c, jnp.float32, "gradient")
    assert_close(d_slopes.sum((0, 2, 3)), -(d_inner * (i - j)).sum((1, 2)), jnp.float32, "gradient")


def test_the_kernels_import_neither_attnlab_nor_flax():
    program = """
import sys
from pallas_kernels.flash import plan, problem, tile, triton, mosaic_gpu, tpu
from pallas_kernels.decode import plan
found = {name.split(".")[0] for name in sys.modules}
assert not found & {"attnlab", "flax"}, found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
