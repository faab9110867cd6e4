"""Under `jax.set_mesh`, whose axes are explicit, calls run as they do elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import attnlab
from attnlab import masks
from attnlab.distributed import merge_attention, over
from tests.tolerances import as_float64, assert_reordered

pytestmark = pytest.mark.usefixtures("lightly_compiled")
MESH = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)


@pytest.mark.parametrize("placed", [P(), P("data"), P("data", "sequence")], ids=str)
@pytest.mark.parametrize("arguments", [{"ring": "sequence", "layout": "zigzag"},
                                       {"heads": "sequence"}], ids=str)  # fmt: skip
def test_attention_wherever_its_inputs_lie(rng, placed, arguments):
    arrays = [jnp.asarray(rng.standard_normal((2, 8, 2, 4)), jnp.float32) for _ in range(3)]

    def loss(*arrays):
        out = attnlab.attention(*arrays, mask=masks.Causal())
        return jnp.sum(jnp.sin(out)), out

    grad = jax.grad(loss, (0, 1, 2), has_aux=True)
    wanted, plain = grad(*arrays)
    with jax.set_mesh(MESH):
        here = [jax.device_put(x, NamedSharding(MESH, placed)) for x in arrays]
        with over(MESH, batch="data", **arguments):
            found, out = jax.jit(lambda *x: grad(*x))(*here)
        assert jax.typeof(out).sharding.spec == P("data", "sequence", None, None)
    assert_reordered(np.asarray(out), as_float64(plain), np.float32)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_reordered(np.asarray(ours), as_float64(theirs), np.float32)


def test_a_recurrence_and_a_merge(rng):
    arrays = [jnp.asarray(rng.standard_normal((2, 8, 2, 4)), jnp.float32) for _ in range(3)]
    decay = -jnp.ones(2)
    wanted = attnlab.linear_recurrence(*arrays, log_decay=decay)
    merged = attnlab.attention(arrays[0][:, :1], *arrays[1:])
    with jax.set_mesh(MESH):
        with over(MESH, ring="sequence", batch="data"):
            out = jax.jit(lambda *x: attnlab.linear_recurrence(*x, log_decay=decay))(*arrays)
        read = merge_attention(arrays[0][:, :1], *arrays[1:], mesh=MESH, axis="sequence")
    assert_reordered(np.asarray(out), as_float64(wanted), np.float32)
    assert_reordered(np.asarray(read), as_float64(merged), np.float32)
