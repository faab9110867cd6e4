"""The compile lab says what compilers say: sizes known beforehand, refusals, spills provoked."""

import functools
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton

from pallas_kernels import inspect
from pallas_kernels.inspect import gpu, llo, tpu

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
needs_libtpu = pytest.mark.skipif(
    inspect.tpu_missing() is not None, reason=inspect.tpu_missing() or ""
)
needs_plugin = pytest.mark.skipif(
    inspect.gpu_missing() is not None, reason=inspect.gpu_missing() or ""
)
M, K, N = 512, 512, 256


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


# ---- subjects ------------------------------------------------------------------------------------


def triton_product(x, y, tile=64, warps=4, stages=2):
    """x y, a tile of the output to a block; the whole of K at once."""

    def body(x_ref, y_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32).astype(
            out_ref.dtype
        )

    rows, width, columns = x.shape[0], x.shape[1], y.shape[1]
    return pl.pallas_call(
        body,
        grid=(rows // tile, columns // tile),
        in_specs=[
            pl.BlockSpec((tile, width), lambda i, j: (i, 0)),
            pl.BlockSpec((width, tile), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((tile, tile), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        name="triton_product",
    )(x, y)


def mosaic_doubled(x):
    """2 x, by way of shared memory."""

    def body(x_ref, out_ref, buffer, barrier):
        plgpu.copy_gmem_to_smem(x_ref, buffer, barrier)
        plgpu.barrier_wait(barrier)
        buffer[...] = buffer[...] * 2
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out_ref)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        kernel_name="mosaic_doubled",
    )(x)


def tpu_product(x, y, step=128, scratch=1):
    """x y, 256 rows to a round of the grid, `step` of K to a round of the inner loop."""

    def body(x_ref, y_ref, out_ref, total):
        total[...] = jnp.zeros_like(total)

        def add(i, _):
            at = pl.ds(i * step, step)
            total[0] += jnp.dot(x_ref[:, at], y_ref[at], preferred_element_type=jnp.float32)

        jax.lax.fori_loop(0, K // step, add, None)
        out_ref[...] = total[0]

    return pl.pallas_call(
        body,
        grid=(M // 256,),
        in_specs=[
            pl.BlockSpec((256, K), lambda i: (i, 0)),
            pl.BlockSpec((K, N), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((256, N), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((M, N), jnp.float32),
        scratch_shapes=[pltpu.VMEM((scratch, 256, N), jnp.float32)],
        name="tpu_product",
    )(x, y)


def jax_attention(name):
    """An attention module that JAX ships; it warns that it is deprecated, and promotes dtypes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pytest.importorskip(f"jax.experimental.pallas.ops.{name}")


@pytest.fixture
def as_jax_ships_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# ---- lowering: no compiler -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["A100", "H100", "H200"])
def test_triton_lowers_for_gpus_that_are_not_there(kind):
    lowered = inspect.lower_gpu(triton_product, shape(M, 64), shape(64, N), kind=kind)
    text = lowered.as_text()
    assert "__gpu$xla.gpu.triton" in text
    assert "triton_product" in text


@pytest.mark.parametrize("kind", ["A100", "H200"])
def test_jax_attention_lowers_forward_and_backward(kind, as_jax_ships_it):
    attention = jax_attention("gpu.attention")

    def loss(q, k, v):
        return attention.mha(q, k, v, None, causal=True).astype(jnp.float32).sum()

    q = shape(1, 256, 2, 64)
    text = inspect.lower_gpu(jax.grad(loss), q, q, q, kind=kind).as_text()
    assert {"mha_forward", "mha_backward"} <= set(re.findall(r"mha_(?:for|back)ward", text))


def test_mosaic_gpu_lowers_without_the_plugin():
    text = inspect.lower_gpu(mosaic_doubled, shape(64, 128), kind="H100").as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("kind", list(inspect.tpu_kinds()))
def test_tpu_lowers_without_libtpu(kind):
    text = inspect.lower_tpu(tpu_product, shape(M, K), shape(K, N), kind=kind).as_text()
    assert "tpu_custom_call" in text


def test_the_device_is_abstract_only_inside():
    with inspect.abstract_gpu("A100") as mesh:
        assert jax.sharding.get_abstract_mesh() == mesh
        assert mesh.abstract_device.num_cores == inspect.gpu_kinds()["A100"].cores
    assert jax.sharding.get_abstract_mesh().abstract_device is None


@pytest.mark.parametrize(
    "call", [inspect.lower_gpu, inspect.compile_gpu, inspect.lower_tpu, inspect.compile_tpu]
)
def test_an_unknown_kind_is_refused_with_those_known(call):
    with pytest.raises(ValueError, match=r"expected one of .*, got 'Z80'"):
        call(jnp.sin, shape(8), kind="Z80")


def test_a_missing_plugin_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(gpu, "plugin_path", lambda: None)
    gpu.gpu_device.cache_clear()
    with pytest.raises(ImportError, match=r"attnlab\[cuda\]"):
        inspect.compile_gpu(jnp.sin, shape(8), kind="H100")


def test_a_missing_libtpu_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"attnlab\[tpu\]"):
        inspect.compile_tpu(jnp.sin, shape(8), kind="v5e")


def test_the_command_says_what_is_here():
    run = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.inspect"], capture_output=True, text=True, check=True
    )
    assert "H200" in run.stdout
    assert "tpu7x" in run.stdout
    assert run.stdout.count("compile: yes") == sum(
        missing is None for missing in (inspect.gpu_missing(), inspect.tpu_missing())
    )


# ---- TPU -----------------------------------------------------------------------------------------


@functools.cache
def product_on(kind, **options):
    fn = functools.partial(tpu_product, **options)
    report = inspect.compile_tpu(fn, shape(M, K), shape(K, N), kind=kind)
    return report, report.kernel("tpu_product")


@needs_libtpu
def test_vmem_is_windows_and_scratch():
    # v4 keeps no operand in VMEM, so every window is there.
    report, kernel = product_on("v4")
    accumulator = 256 * N * 4
    assert kernel.vmem == {
        "scratch operand": accumulator,
        "input window allocation for operator input 0": 2 * 256 * K * 2,  # double buffered
        "input window allocation for operator input 1": K * N * 2,  # the same in every round
        "output window allocation for operator output 0": 2 * 256 * N * 4,
    }
    assert kernel.vmem_bytes == sum(kernel.vmem.values())
    assert report.memory["argument"] == (M * K + K * N) * 2
    assert report.memory["output"] == M * N * 4
    assert report.memory["generated_code"] > 0
    _, larger = product_on("v4", step=256, scratch=3)
    assert larger.vmem["scratch operand"] == 3 * accumulator
    assert larger.vmem_bytes >= kernel.vmem_bytes + 2 * accumulator


@needs_libtpu
def test_loops_are_found_with_their_length():
    _, kernel = product_on("v4")
    grid, inner = kernel.loops
    assert (grid.depth, grid.innermost) == (1, False)
    assert (inner.depth, inner.innermost) == (2, True)
    assert grid.start < inner.start
    assert inner.bundles < grid.bundles <= kernel.bundles
    # A round multiplies (256, 128) by (128, 256): eight rows of 128 to an instruction.
    unit = "MATMUL" if "MATMUL" in kernel.capacity else "MXU"  # as older ones of libtpu call it
    assert inner.units[unit] >= 256 // 8 * (N // 128)
    assert inner.units[unit] <= inner.bundles * kernel.capacity[unit]
    _, wider = product_on("v4", step=256, scratch=3)
    assert wider.loops[1].units[unit] > inner.units[unit]
    assert wider.loops[1].bundles > inner.bundles


@needs_libtpu
def test_too_much_vmem_is_refused_with_the_compilers_words():
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem"):
        product_on("v5e", scratch=640)  # 160 MiB


def test_a_loop_is_a_branch_back_whatever_the_marks_say():
    text = """
     0   :  { %1 = a } /* Start region 1 */
   0x1 LB: > { %2 = b } /* Start region 7 :: Start region 8 */
   0x2   :  {}
   0x3 LB: >> { %3 = c } /* Start region 9 */
   0x4   : > { %4 = d }
   0x5   : >> { %5 = sbr.rel (!%p1) target = $region9 }
   0x6   : >> { %6 = e } /* End region 9 */
   0x7   : > { %7 = sbr.rel (%p2) target = $region30 }
   0x8   : > { %8 = sbr.rel (!%p3) target = $region8 } /* End region 1 */
   0x9   :  { %9 = f } /* Start region 30 */
"""
    rows = [[n] for n in range(10)]
    grid, inner = llo._loops(text, ["UNIT"], rows)
    assert (grid.depth, grid.start, grid.bundles, grid.innermost) == (1, 1, 8, False)
    assert (inner.depth, inner.start, inner.bundles, inner.innermost) == (2, 3, 4, True)
    assert inner.units == {"UNIT": 3 + 4 + 5 + 6}


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("kind", list(inspect.tpu_kinds()))
def test_every_generation_compiles_and_jax_attention_spills(kind, as_jax_ships_it):
    kernels = jax_attention("tpu.splash_attention.splash_attention_kernel")
    masks = jax_attention("tpu.splash_attention.splash_attention_mask")
    sizes = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    blocks = {f"block_{size}": 512 for size in sizes}
    blocks |= {"block_kv_compute": 512, "block_kv_dkv_compute": 512}

    def loss(q, k, v):
        mask = masks.MultiHeadMask([masks.CausalMask((1024, 1024))] * 2)
        attend = kernels.make_splash_mha(
            mask, head_shards=1, q_seq_shards=1, block_sizes=kernels.BlockSizes(**blocks)
        )
        return attend(q, k, v).astype(jnp.float32).sum()

    q = shape(2, 1024, 128)
    report = inspect.compile_tpu(jax.grad(loss, (0, 1, 2)), q, q, q, kind=kind)
    assert len(report.kernels) == 3
    for part in ("fwd", "dkv", "dq"):
        kernel = report.kernel(part)
        stores, loads = kernel.spills
        assert min(stores, loads) > 0  # 512 x 512 scores do not fit 64 registers of 1024
        assert kernel.vmem["spilled vreg/vmreg"] > 0
        assert kernel.loops
    with pytest.raises(KeyError, match="names 3 of"):
        report.kernel("splash")


# ---- GPU -----------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("kind", list(inspect.gpu_kinds()))
def test_triton_reports_registers_and_tensor_cores(kind):
    report = inspect.compile_gpu(triton_product, shape(M, 64), shape(64, N), kind=kind)
    kernel, gpu_kind = report.kernel("triton_product"), inspect.gpu_kinds()[kind]
    assert kernel.made_by == "xla"
    assert 16 <= kernel.registers <= 255
    assert (kernel.spill_stores, kernel.spill_loads, kernel.stack) == (0, 0, 0)
    assert 0 < kernel.shared <= gpu_kind.shared_limit
    assert kernel.code_bytes % 16 == 0  # an instruction is 16 bytes
    assert kernel.code_bytes > 0
    counts = {
        "sm_80": kernel.mma_sync,
        "sm_90a": kernel.wgmma,
        "sm_100a": kernel.tcgen05_mma,
    }
    assert counts.pop(gpu_kind.arch) > 0
    assert f".target {gpu_kind.arch}" in kernel.ptx
    assert report.memory["output"] == M * N * 2
    if kernel.sass is not None:
        assert re.search(r"\bEXIT\b", kernel.sass)


@pytest.mark.slow
@needs_plugin
def test_too_large_a_tile_for_a_warp_spills():
    fn = functools.partial(triton_product, tile=128, warps=1)
    kernel = inspect.compile_gpu(fn, shape(M, 64), shape(64, N), kind="A100").kernel("product")
    assert kernel.registers == 255
    assert min(kernel.spill_stores, kernel.spill_loads, kernel.stack) > 0


@pytest.mark.slow
@needs_plugin
def test_too_much_shared_memory_is_refused():
    fn = functools.partial(triton_product, tile=256)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)shared memory"):
        inspect.compile_gpu(fn, shape(M, 2048), shape(2048, N), kind="A100")


@pytest.mark.slow
@needs_plugin
def test_mosaic_reports_the_same_a_second_time():
    # Mosaic GPU keeps kernels in memory: found there, one would leave no dump.
    first, second = (
        inspect.compile_gpu(mosaic_doubled, shape(64, 128), kind="H100") for _ in range(2)
    )
    assert first == second
    kernel = first.kernel("mosaic_doubled")
    assert kernel.made_by == "mosaic"
    assert 64 * 128 * 2 <= kernel.shared_dynamic < 64 * 128 * 2 + 1024
    assert kernel.registers > 0


@pytest.mark.slow
@needs_plugin
def test_kernels_of_one_name_are_told_apart():
    def both(x, y):
        return triton_product(x, y), triton_product(x, y, tile=32)

    report = inspect.compile_gpu(both, shape(M, 64), shape(64, N), kind="A100")
    large, small = report.kernel("triton_product"), report.kernel("triton_product__1")
    assert {kernel.name for kernel in report.kernels} == {large.name, small.name}
    assert large.mma_sync != small.mma_sync


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("kind", ["H100", "H200"])
def test_jax_hopper_attention_uses_wgmma(kind, as_jax_ships_it):
    attention = jax_attention("gpu.attention_mgpu")
    blocks = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    config = attention.TuningConfig(
        max_concurrent_steps=2, **{f"block_{block}": 64 for block in blocks}
    )
    q = shape(1, 512, 2, 64, dtype=jnp.float16)

    def attend(q, k, v):
        return attention.attention(q, k, v, config)

    (kernel,) = (
        k for k in inspect.compile_gpu(attend, q, q, q, kind=kind).kernels if k.made_by == "mosaic"
    )
    assert kernel.wgmma > 0
    assert kernel.registers <= 65536 // 384  # three warpgroups share the registers of a core
