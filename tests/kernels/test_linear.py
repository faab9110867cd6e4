"""The kernels of the linear-state recurrence against a float64 loop: values, states, gradients."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core.kernels import interpret
from attnlab.core.recurrence_forms import Steps, chunked
from attnlab.core.recurrence_kernels import kernel_recurrence
from pallas_kernels.linear import linear_recurrence
from pallas_kernels.linear.plan import triton_plan
from tests.kernels import linear_cases as cases
from tests.kernels.linear_cases import BACKENDS, DECAYS, Problem
from tests.tolerances import as_float64, assert_reordered

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

PROBLEMS = st.builds(
    Problem,
    batch=st.sampled_from([(), (2,), (1, 2)]),
    length=st.sampled_from([1, 16, 23, 40]),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    width=st.sampled_from([4, 16, 20]),
    value_width=st.sampled_from([3, 16, 40]),
    decay=st.sampled_from(DECAYS),
    erase=st.booleans(),
    strength=st.sampled_from([0.1, 1.0, 300.0, 1e4]),
    cleared=st.sampled_from([(), (0,)]),
)


@given(PROBLEMS, st.sampled_from([np.float32, jnp.bfloat16, np.float16]), st.integers(0, 2**31))
@settings(max_examples=6)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_loop(backend, problem, dtype, seed):
    cases.check_values(backend, problem, seed, np.dtype(dtype))


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_slopes_of_the_loop(backend, decay, erase):
    problem = Problem((), 19, 1, 2, 6, 18, decay, erase, 0.5)
    cases.check_gradients(backend, problem)


@pytest.mark.parametrize(("decay", "width"), [("step", 70), ("channel", 33)])
def test_wide_keys_are_multiplied_part_by_part(decay, width):
    problem = Problem((), 18, 1, 1, width, 34, decay, True)
    assert width > triton_plan(decay, None).part
    cases.check_values("triton", problem)
    cases.check_gradients("triton", problem)


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_decays_neither_overflow_nor_lose_digits(backend, decay):
    """e^-10000 and cleared states amid mild decays: what comes after must not feel them."""
    problem = Problem((), 35, 1, 1, 6, 4, decay, True, 0.01, (3, 17, 18))
    numbers = problem.numbers(1)
    for at, value in ((5, -300.0), (20, -1e4), (21, -1e30)):
        numbers["log_decay"][at] = value

    class Given(Problem):
        def numbers(self, *_):
            return numbers

    given = Given(**vars(problem))
    cases.check_values(backend, given)
    cases.check_gradients(backend, given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_joins_the_key_heads(backend):
    numbers = Problem((3,), 18, decay="step", erase=True).numbers(2)
    given = {name: jnp.asarray(x) for name, x in numbers.items()}

    def loss(given):
        return jnp.sum(jnp.sin(cases.run(backend, given)[0]), axis=(-1, -2, -3))

    whole = cases.jit(backend, jax.grad(lambda given: jnp.sum(loss(given))))(given)
    mapped = cases.jit(backend, jax.vmap(jax.grad(loss)))(given)
    for name, x in whole.items():
        assert_reordered(mapped[name], as_float64(x), "float32", words=name)


def test_every_derivative_is_that_of_the_formula():
    """Forward mode, and reverse over reverse: behind the front door, and alike for each kernel."""
    backend, numbers = "triton", Problem((), 6, 1, 1, 4, 3).numbers(3)
    state = jnp.asarray(numbers.pop("state"))
    steps = Steps(*cases.steps_of(**{k: jnp.asarray(x) for k, x in numbers.items()}))
    rng = np.random.default_rng(0)
    along = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), (steps, state)
    )

    def ours(steps, state):
        return kernel_recurrence(steps, state, backend)

    def plain(steps, state):
        return chunked(steps, state, 16)

    def twice(function):
        def slope(steps, state):
            grad = jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x)[0])), (0, 1))(steps, state)
            return sum(jnp.sum(a * jnp.cos(b)) for a, b in zip(*map(jax.tree.leaves, (grad, along)),
                                                               strict=True))  # fmt: skip

        return jax.grad(slope, (0, 1))

    with interpret():
        pushed = cases.jit(backend, lambda *x: jax.jvp(ours, x, along)[1])(steps, state)
        second = cases.jit(backend, twice(ours))(steps, state)
    expected = jax.jvp(plain, (steps, state), along)[1], twice(plain)(steps, state)
    pairs = zip(*map(jax.tree.leaves, ((pushed, second), expected)), strict=True)
    for found, wanted in pairs:
        assert_reordered(found, as_float64(wanted), "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_backend_cannot_do_is_said(backend):
    x = jnp.zeros((1, 4, 300))
    steps = cases.Steps(x[:, None], x, jnp.zeros((1, 4, 8)))
    with pytest.raises(NotImplementedError, match="keys up to 256 wide, got 300"):
        linear_recurrence(steps, jnp.zeros((1, 300, 8)), backend)
    x = jnp.zeros((1, 4, 8))
    steps = cases.Steps(x[:, None], x, x)
    with pytest.raises(NotImplementedError, match="chunk_size that is a power of two"):
        linear_recurrence(steps, jnp.zeros((1, 8, 8)), backend, chunk_size=24)
    if cases.missing(backend):
        with pytest.raises(NotImplementedError, match=f'"{backend}" needs .*"chunked" can'):
            kernel_recurrence(Steps(*steps), jnp.zeros((1, 8, 8)), backend)


def test_the_kernels_import_neither_attnlab_nor_flax():
    program = """
import sys
from pallas_kernels import linear
from pallas_kernels.linear import plan, problem, tile, triton, tpu
found = {name.split(".")[0] for name in sys.modules}
assert not found & {"attnlab", "flax"}, found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
