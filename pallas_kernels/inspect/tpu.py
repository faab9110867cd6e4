"""What the compiler makes of a Pallas kernel for a TPU that is not there.

`lower_tpu` needs nothing but JAX.  `compile_tpu` needs libtpu (`attnlab[tpu]`), the compiler that
a TPU machine has; it needs no TPU.  Programs for one core only.

What cannot be had here: how long a kernel waits for memory, how often a loop runs, a profile.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.inspect import tpu_worker
from pallas_kernels.inspect.fresh import the_one
from pallas_kernels.inspect.llo import LABELS, TpuKernel, read_kernel

EXTRA = "attnlab[tpu]"


@dataclasses.dataclass(frozen=True)
class TpuKind:
    """A TPU generation: how JAX names the device, its cores, a topology that has one."""

    name: str
    device_kind: str
    cores: int
    topology: str


_KINDS = {
    kind.name: kind
    for kind in (
        TpuKind("v4", "TPU v4", 2, "v4:2x2x1"),
        TpuKind("v5e", "TPU v5 lite", 1, "v5e:2x2"),
        TpuKind("v5p", "TPU v5", 2, "v5p:2x2x1"),
        TpuKind("v6e", "TPU v6 lite", 1, "v6e:2x2"),
        TpuKind("tpu7x", "TPU7x", 1, "tpu7x:2x2x1"),
    )
}


@dataclasses.dataclass(frozen=True)
class TpuReport:
    """A program compiled for a TPU: its Pallas kernels, and XLA's memory analysis in bytes.

    `memory["generated_code"]` is the code of the whole program; a kernel's share is not told.
    """

    kind: TpuKind
    kernels: tuple[TpuKernel, ...]
    memory: dict[str, int]

    def kernel(self, name: str) -> TpuKernel:
        """The kernel so named, or the only one whose name contains `name`; else KeyError."""
        return the_one(self.kernels, name)

    def __str__(self) -> str:
        return "\n  ".join((f"{self.kind.name} {self.memory}", *map(str, self.kernels)))


def tpu_kinds() -> dict[str, TpuKind]:
    """The TPUs that kernels can be lowered and compiled for, by name."""
    return dict(_KINDS)


def _kind(name: str) -> TpuKind:
    if name not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {name!r}.")
    return _KINDS[name]


def tpu_missing() -> str | None:
    """Why programs cannot be compiled for a TPU here, or None if they can."""
    if importlib.util.find_spec("libtpu") is None:
        return f"libtpu is not installed: pip install '{EXTRA}' (no TPU needed)"
    return None


@contextlib.contextmanager
def abstract_tpu(kind: str) -> Iterator[AbstractMesh]:
    """Inside it, tracing and lowering take the device to be this TPU; needs no libtpu."""
    tpu = _kind(kind)
    device = AbstractDevice(device_kind=tpu.device_kind, num_cores=tpu.cores, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield mesh


def lower_tpu(fn: Callable[..., Any], *shapes: Any, kind: str = "v5e") -> jax.stages.Lowered:
    """`fn` lowered for a TPU, from arrays or `jax.ShapeDtypeStruct`s (trees of them will do)."""
    with abstract_tpu(kind):
        traced = jax.jit(lambda *arguments: fn(*arguments)).trace(*shapes)
        return traced.lower(lowering_platforms=("tpu",))


def compile_tpu(fn: Callable[..., Any], *shapes: Any, kind: str = "v5e") -> TpuReport:
    """Compile `fn` for one TPU of this kind and read off what its Pallas kernels cost.

    Raises ImportError without libtpu; XLA's `JaxRuntimeError` where the compiler refuses, as it
    does when VMEM overflows.
    """
    tpu = _kind(kind)
    if missing := tpu_missing():
        raise ImportError(f"compiling for {kind}: {missing}; lower_tpu works without it.")
    module: Any = lower_tpu(fn, *shapes, kind=kind).compiler_ir("stablehlo")
    with tempfile.TemporaryDirectory(prefix="attnlab-tpu-") as name:
        folder = Path(name)
        # With debug information, because that is where the names of the kernels are.
        program = module.operation.get_asm(binary=True, enable_debug_info=True)
        (folder / "program.mlirbc").write_bytes(program)
        (folder / "dumps").mkdir()
        _run_worker(folder, tpu.topology)
        text = (folder / "program.txt").read_text()
        kernels = re.findall(r'%([\w.-]+) = .*custom_call_target="tpu_custom_call"', text)
        return TpuReport(
            tpu,
            tuple(read_kernel(folder / "dumps", kernel) for kernel in kernels),
            json.loads((folder / "memory.json").read_text()),
        )


def _run_worker(folder: Path, topology: str) -> None:
    flags = (
        f"--xla_jf_dump_to={folder / 'dumps'}",
        "--xla_jf_dump_llo_text=true",
        f"--xla_jf_dump_llo_pass_label_regex={LABELS}",
    )
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",  # the worker compiles; it must not take a TPU that is in use
        "LIBTPU_INIT_ARGS": " ".join((os.environ.get("LIBTPU_INIT_ARGS", ""), *flags)).strip(),
        # No question to a cloud's metadata server, no lock against a second compiler.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    run = subprocess.run(
        [sys.executable, "-P", tpu_worker.__file__, str(folder), topology],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if run.returncode == 3:
        raise jax.errors.JaxRuntimeError((folder / "refused.txt").read_text())
    if run.returncode:
        raise RuntimeError(f"the TPU compiler stopped:\n{run.stderr[-4000:]}")
