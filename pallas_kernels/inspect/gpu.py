"""What the compiler makes of a Pallas kernel for a GPU that is not there.

`lower_gpu` needs nothing but JAX.  `compile_gpu` needs the CUDA plugin (`attnlab[cuda]`), which
brings XLA's GPU compiler, Mosaic GPU and the assembler; it needs no GPU and no driver.  Without a
GPU set `JAX_PLATFORMS=cpu` before JAX starts, or the plugin gives up when it finds no device.

Registers, stack, spills and static shared memory are what the assembler says, dynamic shared
memory is what the launch asks for.  Kernels that XLA makes of fused operations are listed too.
What cannot be had: time, occupancy as launched, bank conflicts, traffic.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from pallas_kernels.inspect.fresh import compile_afresh, memory_of, placed, the_one
from pallas_kernels.inspect.ptx import GpuKernel, read_kernels

EXTRA = "attnlab[cuda]"


@dataclasses.dataclass(frozen=True)
class GpuKind:
    """A GPU model: what tracing needs to know, and its name among the compiler's targets."""

    name: str
    device_kind: str  # how JAX names the device; tracing looks the architecture up by it
    cores: int
    arch: str  # as the assembler calls it
    shared_limit: int  # bytes of shared memory one block may ask for
    target: str


_KINDS = {
    kind.name: kind
    for kind in (
        GpuKind("A100", "NVIDIA A100-SXM4-80GB", 108, "sm_80", 166912, "NVIDIA A100-SXM4-80GB"),
        GpuKind("H100", "NVIDIA H100 80GB HBM3", 132, "sm_90a", 232448, "NVIDIA H100 80GB HBM3"),
        GpuKind("H200", "NVIDIA H200", 132, "sm_90a", 232448, "NVIDIA H200 141GB HBM3e"),
        GpuKind("B200", "NVIDIA B200", 148, "sm_100a", 232448, "NVIDIA B200"),
    )
}


@dataclasses.dataclass(frozen=True)
class GpuReport:
    """A program compiled for a GPU: its kernels, and XLA's memory analysis in bytes."""

    kind: GpuKind
    kernels: tuple[GpuKernel, ...]
    memory: dict[str, int]

    def kernel(self, name: str) -> GpuKernel:
        """The kernel so named, or the only one whose name contains `name`; else KeyError."""
        return the_one(self.kernels, name)

    def __str__(self) -> str:
        head = f"{self.kind.name} ({self.kind.arch}) {self.memory}"
        return "\n  ".join((head, *map(str, self.kernels)))


def gpu_kinds() -> dict[str, GpuKind]:
    """The GPUs that kernels can be lowered for and, with the plugin, compiled for, by name."""
    return dict(_KINDS)


def _kind(name: str) -> GpuKind:
    if name not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {name!r}.")
    return _KINDS[name]


@contextlib.contextmanager
def abstract_gpu(kind: str) -> Iterator[AbstractMesh]:
    """Inside it, tracing and lowering take the device to be this GPU; needs no plugin.

    Triton kernels ask for the device while being traced, and again while being lowered.
    """
    gpu = _kind(kind)
    device = AbstractDevice(device_kind=gpu.device_kind, num_cores=gpu.cores, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield mesh


def lower_gpu(fn: Callable[..., Any], *shapes: Any, kind: str = "H100") -> jax.stages.Lowered:
    """`fn` lowered for a GPU, from arrays or `jax.ShapeDtypeStruct`s (trees of them will do).

    Mosaic GPU kernels are lowered for Hopper whatever the kind: Mosaic asks a live device.
    """
    with abstract_gpu(kind):
        traced = jax.jit(lambda *arguments: fn(*arguments)).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",))


def plugin_path() -> Path | None:
    """The CUDA plugin's library, or None where it is not installed."""
    spec = importlib.util.find_spec("jax_plugins")
    roots = (spec.submodule_search_locations or ()) if spec else ()
    return next((so for r in roots for so in Path(r).glob("xla_cuda*/xla_cuda_plugin.so")), None)


def gpu_missing() -> str | None:
    """Why programs cannot be compiled for a GPU here, or None if they can."""
    if plugin_path() is None:
        return f"the CUDA plugin is not installed: pip install '{EXTRA}' (no GPU needed)"
    return None


@functools.cache
def gpu_device(kind: str) -> jax.Device:
    """A compile-only device of this kind, for shardings.

    Raises ImportError without the plugin, RuntimeError where the plugin would not start.
    """
    gpu, plugin = _kind(kind), plugin_path()
    if plugin is None:
        raise ImportError(f"compiling for {kind}: {gpu_missing()}; lower_gpu works without it.")
    with plugin.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
        # The targets lie in the library as C strings of protocol buffer text.
        name = blob.find(b'device_description_str: "%s"' % gpu.target.encode())
        if name < 0:
            raise RuntimeError(f"{plugin} carries no target {gpu.target!r}.")
        target = blob[blob.rfind(b"\0", 0, name) + 1 : blob.find(b"\0", name)].decode()
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=kind, topology="1x1x1", target_config=target
        )
    except NotImplementedError as error:
        raise RuntimeError(
            "the CUDA plugin is installed but did not start; on a machine without a GPU set "
            "JAX_PLATFORMS=cpu before JAX starts."
        ) from error
    return topology.devices[0]


def compile_gpu(fn: Callable[..., Any], *shapes: Any, kind: str = "H100") -> GpuReport:
    """Compile `fn` for one GPU of this kind and read off what its kernels cost.

    Raises ImportError without the plugin; XLA's `JaxRuntimeError` where the compiler refuses.
    """
    gpu, device = _kind(kind), gpu_device(kind)
    with abstract_gpu(kind):
        jitted = jax.jit(lambda *arguments: fn(*arguments))
        lowered = jitted.lower(*placed(shapes, SingleDeviceSharding(device)))
    with tempfile.TemporaryDirectory(prefix="attnlab-gpu-") as folder:
        here = Path(folder)
        # "ptx" is a pattern for emitters: it lets PTX through and keeps out the MLIR of every
        # Triton pass, which takes longer to write than the kernel takes to compile.
        options: dict[str, Any] = {
            "xla_dump_to": folder,
            "xla_gpu_dump_llvmir": True,
            "xla_dump_emitter_re": "ptx",
        }
        (here / "mosaic").mkdir()
        before = os.environ.get("MOSAIC_GPU_DUMP_TO")
        os.environ["MOSAIC_GPU_DUMP_TO"] = f"{folder}/mosaic"
        try:
            compiled = compile_afresh(lowered, options)
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
            if before is not None:
                os.environ["MOSAIC_GPU_DUMP_TO"] = before
        launches = "".join(p.read_text() for p in here.glob("*.thunk_sequence.txt"))
        kernels = [
            kernel
            for path in sorted(here.rglob("*.ptx"))
            for kernel in read_kernels(path, gpu.arch, launches)
        ]
    kernels.sort(key=lambda kernel: (kernel.name, kernel.code_bytes))
    return GpuReport(gpu, tuple(kernels), memory_of(compiled))
