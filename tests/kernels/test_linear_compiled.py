"""The linear-state kernels through the CUDA compiler, for GPUs that are not there.

`make cuda` runs this with the CUDA plugin installed and prints registers, shared memory and spills.
"""

import jax.numpy as jnp
import pytest

from pallas_kernels.inspect import compile_gpu, gpu_missing
from tests.kernels.test_linear_lowering import gradients, kernels, shapes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(gpu_missing()), reason=str(gpu_missing())),
]


def spilling(kind, decay, erase, dtype, width, group=1):
    """The kernels that spill registers, each with its bytes; prints what all of them take."""
    given = shapes(decay, erase, dtype, width, width, group)
    report = compile_gpu(gradients("triton"), *given, kind=kind)
    found = [k for k in report.kernels if k.name.startswith("linear_")]
    assert {k.name for k in found} == kernels("triton", erase)
    for k in found:
        print(
            f"{kind} {decay} {erase=} {jnp.dtype(dtype).name} {width} {k.name}: {k.registers} "
            f"registers, {k.shared} B shared, spills {k.spill_stores}/{k.spill_loads} B"
        )
    return {k.name: k.spill_stores + k.spill_loads for k in found if k.spill_stores}


# Known spills, in bytes stored and loaded a thread, by case and kernel.
KNOWN = {
    ("A100", "step", True, 128): {"linear_scan_back": 32},
    ("H100", "step", True, 256): {"linear_prepare_back": 72, "linear_put_back": 32},
    ("H100", "channel", True, 128): {"linear_prepare_back": 184, "linear_read_back": 736},
    ("H100", "channel", True, 256): {
        "linear_prepare": 448, "linear_read": 1328, "linear_scan": 120, "linear_scan_back": 40,
        "linear_put_back": 1640, "linear_prepare_back": 1444, "linear_read_back": 4420,
    },
}  # fmt: skip


def check(kind, decay, erase, width):
    """Nothing spills but what is known to, and that not by a quarter more."""
    known = KNOWN.get((kind, decay, erase, width), {})
    found = spilling(kind, decay, erase, "bfloat16", width)
    assert all(found[name] <= 1.25 * known.get(name, 0) for name in found), found


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize(
    ("decay", "width"),
    [("none", 64), ("none", 128), ("step", 64), ("step", 128), ("channel", 64)],
)
@pytest.mark.parametrize("kind", ["A100", "H100"])
def test_nothing_spills(kind, decay, erase, width):
    check(kind, decay, erase, width)


@pytest.mark.parametrize("kind", ["H200", "B200"])
def test_nothing_spills_on_other_kinds(kind):
    assert not spilling(kind, "step", True, "bfloat16", 128, group=2)


def test_nothing_spills_in_float32():
    assert not spilling("H100", "step", True, "float32", 128)


@pytest.mark.parametrize(("decay", "width"), [("channel", 128), ("step", 256), ("channel", 256)])
def test_the_widest_spill_what_is_known(decay, width):
    check("H100", decay, True, width)
