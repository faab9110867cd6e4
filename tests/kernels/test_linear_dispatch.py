"""The kernels behind `linear_recurrence`: the same call, the same answer."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core import recurrence, recurrence_kernels
from attnlab.core.kernels import interpret, missing
from attnlab.core.recurrence import linear_recurrence
from pallas_kernels.inspect import lower_gpu, lower_tpu
from tests.kernels import linear_cases as cases
from tests.kernels.linear_cases import BACKENDS, Problem
from tests.tolerances import as_float64, assert_close

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

PROBLEM = Problem((2,), 19, 2, 2, 8, 6, "step", True)


def call(numbers, **options):
    numbers = {name: jnp.asarray(x) for name, x in numbers.items()}
    state = numbers.pop("state")
    arrays = [numbers.pop(name) for name in ("query", "key", "value")]
    return linear_recurrence(*arrays, **numbers, initial_state=state, return_state=True, **options)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_by_name_equals_the_loop_with_resets(backend, dtype):
    numbers = PROBLEM.numbers(3, dtype)
    reset = np.zeros((2, 19), bool)
    reset[0, [0, 7]] = reset[1, [16, 17]] = True
    with cases.running(backend):
        out, state = call(numbers, reset=jnp.asarray(reset), implementation=backend)
    wide = {name: np.asarray(x, np.float64) for name, x in numbers.items()}
    expected = cases.recurrence(**wide, reset=reset)
    assert out.dtype == dtype
    assert_close(out, expected[0], dtype)
    assert_close(state, expected[1], "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_decay_to_a_head_and_no_state(backend):
    numbers = PROBLEM.numbers(4)
    arrays = [jnp.asarray(numbers[name]) for name in ("query", "key", "value")]
    decay = jnp.asarray([-0.1, -2.0])
    with cases.running(backend):
        found = linear_recurrence(*arrays, log_decay=decay, implementation=backend)
    plain = linear_recurrence(*arrays, log_decay=decay, implementation="chunked")
    assert_close(found, as_float64(plain), "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_its_device_a_kernel_is_refused(backend):
    if not missing(backend):
        pytest.skip("the device is here")
    with pytest.raises(NotImplementedError, match=f'"{backend}" needs .*"chunked" can'):
        call(PROBLEM.numbers(), implementation=backend)


def test_auto_takes_the_kernel_of_the_device_alone(monkeypatch):
    taken = []

    def kernel(steps, state, backend):
        taken.append(backend)
        return recurrence.recurrent(steps, state)

    monkeypatch.setattr(recurrence, "kernel_recurrence", kernel)
    if recurrence_kernels.device()[0] == "cpu":
        with interpret():
            call(PROBLEM.numbers())
        assert taken == []
    for lower, kind, backend in ((lower_gpu, "H100", "triton"), (lower_tpu, "v5e", "tpu")):
        lower(lambda numbers: call(numbers), PROBLEM.numbers(), kind=kind)
        assert taken.pop() == backend
        assert taken == []
