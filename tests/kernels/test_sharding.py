"""Kernels under `shard_map`: batch and heads split over devices, every gradient as unsharded."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from attnlab import attention, masks, scores
from attnlab.core.kernels import interpret

assert len(jax.devices()) == 4
mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
keys = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(keys[0], (2, 40, 4, 16))
key, value = (jax.random.normal(k, (2, 40, 2, 16)) for k in keys[1:])
slopes = jnp.arange(1.0, 5.0) / 8


def attend(implementation):
    def one(query, key, value, slopes):
        return attention(
            query, key, value, mask=masks.Causal(), modifiers=scores.AlibiSlopes(slopes),
            implementation=implementation,
        )
    return one


def loss(attend):
    return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2, 3)))


array = P("batch", None, "heads")
want = loss(attend("reference"))(query, key, value, slopes)
with interpret():
    split = jax.shard_map(
        attend("triton"), mesh=mesh, in_specs=(array, array, array, P("heads")), out_specs=array,
        check_vma=False,
    )
    got = loss(split)(query, key, value, slopes)
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    scale = float(jnp.abs(b).max())
    assert float(jnp.abs(a - b).max()) <= 1e-5 * scale, (a, b)
print("equal")
"""


def test_split_over_batch_and_heads_equals_unsplit():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal"]
