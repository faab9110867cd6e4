"""What is particular to the linear-state kernels on TPUs: memory that is watched, the compiler."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.inspect import compile_tpu, tpu_missing
from pallas_kernels.linear.plan import tpu_memory
from tests.kernels import linear_cases as cases
from tests.kernels.linear_cases import Problem
from tests.kernels.test_linear_lowering import gradients, shapes
from tests.tolerances import LINEAR_GROWTH

compiled = pytest.mark.skipif(bool(tpu_missing()), reason=str(tpu_missing()))


@pytest.fixture
def watched():
    """Races between cores, reads and writes out of bounds raise; memory nobody wrote is NaN."""
    yield pltpu.InterpretParams(
        detect_races=True,
        out_of_bounds_reads="raise",
        uninitialized_memory="nan",
        num_cores_or_threads=2,
    )
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("decay", ["step", "channel"])
def test_watched_memory_forward_and_backward(watched, decay):
    """Two heads on two cores, three chunks, two queries to a key."""
    problem = Problem((2,), 35, 1, 2, 8, 5, decay, True)
    cases.check_values("tpu", problem, interpret=watched)
    cases.check_gradients("tpu", problem, interpret=watched)


def test_columns_of_the_state_can_be_divided():
    """Blocks of 128 columns: cotangents of queries and keys are sums over them."""
    problem = Problem((), 20, 1, 1, 8, 200, "step", True)
    cases.check_values("tpu", problem, value_block=128)
    cases.check_gradients("tpu", problem, value_block=128)


def compile_and_print(kind, decay, erase, dtype, width):
    given = shapes(decay, erase, dtype, width, width)
    report = compile_tpu(gradients("tpu"), *given, kind=kind)
    assert {k.name.split(".")[0] for k in report.kernels} == {"linear_forward", "linear_backward"}
    for kernel in report.kernels:
        print(f"{kind} {decay} {erase=} {dtype} {width}: {str(kernel).splitlines()[0]}")
        assert kernel.vmem_bytes <= tpu_memory(report.kind.device_kind)


@compiled
@pytest.mark.parametrize(
    ("kind", "decay", "erase", "dtype"),
    [
        ("v4", "step", True, "bfloat16"),
        ("v5e", "none", False, "bfloat16"),
        ("v5p", "channel", True, "bfloat16"),
        ("v6e", "step", False, "float16"),
    ],
)
def test_the_compiler_takes_it(kind, decay, erase, dtype):
    compile_and_print(kind, decay, erase, dtype, 128)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("decay", ["none", "step", "channel"])
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("kind", ["v4", "v5e", "v5p", "v6e"])
def test_the_compiler_takes_the_widest_on_every_kind(kind, width, decay):
    compile_and_print(kind, decay, True, "float32", width)


def temporaries(length):
    x = jax.ShapeDtypeStruct((1, 2, length, 64), jnp.bfloat16)
    decay = jax.ShapeDtypeStruct((1, 2, length, 1), jnp.float32)
    query = jax.ShapeDtypeStruct((1, 2, 1, length, 64), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.float32)
    steps = cases.Steps(query, x, x, decay, x)
    return compile_tpu(gradients("tpu"), steps, state, kind="v5p").memory["temp"]


@compiled
def test_memory_with_gradients_is_linear():
    short, long = temporaries(1024), temporaries(4096)
    assert long <= LINEAR_GROWTH * short
    assert long < 4096**2 * 2
