"""The compile lab: what real compilers make of a kernel, on a machine without the accelerator.

    report = compile_gpu(fn, *shapes, kind="H100")     registers, spills, shared memory, wgmma
    report = compile_tpu(fn, *shapes, kind="v5e")      VMEM, spills, length of the schedule

`python -m pallas_kernels.inspect` says what can be compiled here.
"""

from pallas_kernels.inspect.gpu import (
    GpuKind,
    GpuReport,
    abstract_gpu,
    compile_gpu,
    gpu_kinds,
    gpu_missing,
    lower_gpu,
)
from pallas_kernels.inspect.llo import TpuKernel, TpuLoop
from pallas_kernels.inspect.ptx import GpuKernel
from pallas_kernels.inspect.tpu import (
    TpuKind,
    TpuReport,
    abstract_tpu,
    compile_tpu,
    lower_tpu,
    tpu_kinds,
    tpu_missing,
)

__all__ = [
    "GpuKernel",
    "GpuKind",
    "GpuReport",
    "TpuKernel",
    "TpuKind",
    "TpuLoop",
    "TpuReport",
    "abstract_gpu",
    "abstract_tpu",
    "compile_gpu",
    "compile_tpu",
    "gpu_kinds",
    "gpu_missing",
    "lower_gpu",
    "lower_tpu",
    "tpu_kinds",
    "tpu_missing",
]
