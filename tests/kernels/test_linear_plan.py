"""How a recurrence is cut, whatever runs it."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.inspect import abstract_gpu, abstract_tpu
from pallas_kernels.linear import Cut, Steps
from pallas_kernels.linear.plan import (
    chunk_limit,
    device_kind,
    padded,
    power_of_two,
    tpu_memory,
    tpu_plan,
    triton_plan,
)
from pallas_kernels.linear.problem import Plan, sizes


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 1000])
def test_chunks_are_powers_of_two_that_cover_a_sequence(length):
    for plan in (triton_plan("step", None), tpu_plan(64, length, None)):
        assert chunk_limit(plan.chunk) is None
        assert 0 <= padded(length, plan.chunk) - length < plan.chunk
    assert tpu_plan(64, length, None).chunk <= max(16, 2 * length)


def test_a_chunk_that_is_asked_for_is_taken():
    assert triton_plan("none", 32).chunk == tpu_plan(64, 500, 32).chunk == 32


@pytest.mark.parametrize("wrong", [0, 1, 8, 24, 48, -16])
def test_a_chunk_that_cannot_be_halved_is_refused(wrong):
    assert "power of two" in chunk_limit(wrong)


def test_triton_divides_products_between_warps():
    plan = triton_plan("step", None)
    assert plan.value_block > plan.chunk


def test_all_columns_of_the_state_wait_in_a_tpu():
    for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
        assert tpu_memory(kind) >= 16 << 20
    assert tpu_memory("NVIDIA H100 80GB HBM3") is None
    assert tpu_plan(200, 1000, None).value_block == 200


def test_sizes_and_kinds():
    steps = Steps(array(2, 1, 48, 8), array(2, 48, 8), array(2, 48, 64))
    assert sizes(steps, Plan(16, 32)) == (3, 2)
    assert [power_of_two(n) for n in (1, 16, 17, 200)] == [16, 16, 32, 256]
    with abstract_gpu("H100"):
        assert "H100" in device_kind()
    with abstract_tpu("v6e"):
        assert "v6" in device_kind()
    assert Cut("tpu", value_block=128).plan(steps, False).value_block == 128


@pytest.mark.parametrize(
    ("query", "key", "erase", "half"),
    [
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float16", None, "float16"),
        ("float32", "float32", None, None),
        ("bfloat16", "bfloat16", "float32", None),
    ],
)
def test_half_precision_is_for_arrays_of_one_dtype(query, key, erase, half):
    x = array(1, 16, 8, dtype=jnp.dtype(key))
    erase = None if erase is None else array(1, 16, 8, dtype=jnp.dtype(erase))
    steps = Steps(array(1, 1, 16, 8, dtype=jnp.dtype(query)), x, x, None, erase)
    assert steps.half == (None if half is None else jnp.dtype(half))
