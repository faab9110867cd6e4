"""Compiles a ring for TPUs that are not there: `python ring_worker.py FOLDER TOPOLOGY LENGTH GRAD`.

A process of its own, because libtpu reads its dump flags once.  Leaves FOLDER/program.txt.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab import attention, masks
from attnlab.distributed import over
from pallas_kernels.ring import tpu


def main(folder: Path, topology: str, length: int, gradient: bool) -> None:
    tpu.limits = lambda kind: None  # on two cores as well
    devices = np.array(
        topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    ).reshape(-1)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.Mesh(devices, ("ring",), axis_types=auto)
    cut = NamedSharding(mesh, P(None, "ring"))
    query, key = (
        jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16, sharding=cut)
        for heads in (8, 2)
    )

    def loss(query, key, value):
        with over(mesh, ring="ring", layout="zigzag", arranged=True):
            out = attention(query, key, value, mask=masks.Causal(), implementation="tpu")
        return jnp.sum(out.astype(jnp.float32))

    function = jax.grad(loss, (0, 1, 2)) if gradient else loss
    compiled = jax.jit(function).lower(query, key, key).compile()
    (folder / "program.txt").write_text(compiled.as_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1")
