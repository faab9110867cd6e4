"""Compiles one lowered program for a TPU: `python tpu_worker.py FOLDER TOPOLOGY`.

A process of its own, because libtpu reads its dump flags once, when it is loaded.  FOLDER holds
program.mlirbc; memory.json and program.txt, or refused.txt, are left there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.interpreters import mlir
from jaxlib import xla_client
from jaxlib.mlir import ir


def main(folder: Path, topology: str) -> int:
    """Compile; 0, or 3 when the compiler refuses."""
    device: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    options = xla_client.CompileOptions()
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id]]))
    module = ir.Module.parse((folder / "program.mlirbc").read_bytes(), mlir.make_ir_context())
    try:
        executable = device.client.compile(
            module,
            executable_devices=xla_client.DeviceList((device,)),
            compile_options=options,
        )
    except jax.errors.JaxRuntimeError as error:
        (folder / "refused.txt").write_text(str(error))
        return 3
    stats = executable.get_compiled_memory_stats()
    names = ("argument", "output", "alias", "temp", "generated_code")
    memory = {name: getattr(stats, f"{name}_size_in_bytes") for name in names}
    (folder / "memory.json").write_text(json.dumps(memory))
    (folder / "program.txt").write_text(executable.hlo_modules()[0].to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
