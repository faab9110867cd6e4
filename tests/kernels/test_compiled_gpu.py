"""The flash kernels through the CUDA compiler, for GPUs that are not there.

`make cuda` runs this with the CUDA plugin installed and prints what the compiler made of each
kernel: registers, shared memory, spills.  A hot loop that spills fails.
"""

import jax
import jax.numpy as jnp
import pytest

from attnlab import attention, masks, normalizers, scores
from pallas_kernels.inspect import compile_gpu, gpu_missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(gpu_missing()), reason=str(gpu_missing())),
]

HEADS, LENGTH = 8, 1024
CASES = {
    "dense": {},
    "causal": {"mask": masks.Causal()},
    "window": {"mask": masks.SlidingWindow(255)},
    "alibi": {
        "mask": masks.Causal(),
        "modifiers": scores.AlibiSlopes(scores.alibi_slopes(HEADS)),
    },
    "table": {
        "mask": masks.Causal(),
        "modifiers": scores.RelativeBias(jnp.zeros((HEADS, 32))),
    },
    "soft cap": {"modifiers": scores.SoftCap(jnp.float32(30.0))},
    "sigmoid": {"mask": masks.Causal(), "normalizer": normalizers.Sigmoid()},
    "segments": {
        "mask": masks.Causal() & masks.Segments(jnp.zeros((1, LENGTH), jnp.int32)),
    },
}


def report_of(implementation, kind, width, dtype, options):
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, width), dtype)
    options = dict(options)
    modifiers = options.pop("modifiers", ())

    def loss(query, key, value, modifiers):
        out = attention(
            query, key, value, implementation=implementation, modifiers=modifiers, **options
        )
        return jnp.sum(out.astype(jnp.float32))

    report = compile_gpu(jax.grad(loss, (0, 1, 2, 3)), x, x, x, modifiers, kind=kind)
    kernels = [k for k in report.kernels if "flash" in k.name]
    assert len(kernels) >= 3  # forward, rows, columns
    for k in kernels:
        print(
            f"{implementation} {kind} {width} {jnp.dtype(dtype).name} {k.name}: "
            f"{k.registers} registers, {k.shared} B shared, "
            f"spills {k.spill_stores}/{k.spill_loads} B"
        )
    return kernels


@pytest.mark.parametrize("kind", ["A100", "H100", "H200", "B200"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_triton_spills_nothing_when_causal(kind, width):
    kernels = report_of("triton", kind, width, jnp.bfloat16, CASES["causal"])
    assert all(k.spill_stores == k.spill_loads == 0 for k in kernels)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_triton_spills_nothing_with_masks_and_modifiers(name, width):
    kernels = report_of("triton", "H100", width, jnp.bfloat16, CASES[name])
    assert all(k.spill_stores == k.spill_loads == 0 for k in kernels)


@pytest.mark.parametrize("width", [64, 128])
def test_triton_in_float32_uses_tensor_cores_and_spills_nothing(width):
    kernels = report_of("triton", "H100", width, jnp.float32, CASES["causal"])
    assert all(k.spill_stores == k.spill_loads == 0 for k in kernels)
    assert all(k.wgmma or k.mma_sync for k in kernels)


@pytest.mark.parametrize("kind", ["H100", "H200"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_the_hopper_bodies_multiply_by_wgmma_and_spill_nothing(name, width, kind):
    kernels = report_of("mosaic_gpu", kind, width, jnp.bfloat16, CASES[name])
    assert all(k.wgmma for k in kernels)
    assert all(k.spill_stores == k.spill_loads == 0 for k in kernels)
