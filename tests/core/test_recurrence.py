"""One state, three forms: each against a float64 loop, in values, states and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core.recurrence import FORMS, linear_recurrence, resets
from tests.oracles import directional
from tests.recurrences import recurrence, unrolled
from tests.tolerances import LINEAR_GROWTH, as_float64, assert_close, assert_reordered

DECAYS = ("none", "head", "step", "channel")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and kind of a recurrence; `numbers` draws one."""

    batch: tuple[int, ...] = (2,)
    length: int = 12
    heads: int = 4
    kv_heads: int = 2
    width: int = 8
    value_width: int = 6
    decay: str = "none"
    erase: bool = False

    def numbers(self, seed, *, strength=1.0, reset=False, state=True):
        """Arguments of both sides; strong decays range from almost none to e^-1000 a step."""
        rng = np.random.default_rng(seed)
        steps = (*self.batch, self.length)

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        key = normal(*steps, self.kv_heads, self.width)
        key /= np.linalg.norm(key, axis=-1, keepdims=True)
        arrays = [normal(*steps, self.heads, self.width), key]
        arrays.append(normal(*steps, self.kv_heads, self.value_width))
        options = {}
        shapes = {
            "head": (self.kv_heads,),
            "step": (*steps, self.kv_heads),
            "channel": key.shape,
        }
        if self.decay != "none":
            shape = shapes[self.decay]
            power = rng.uniform(-4, np.log10(strength + 1e-9) + 0.5, shape)
            options["log_decay"] = -(10.0**power).astype(np.float32)
        if self.erase:
            rate = rng.uniform(0, 1.9, (*steps, self.kv_heads, 1))
            options["erase"] = (rate * key).astype(np.float32)
        if reset:
            options["reset"] = rng.random(steps) < 0.2
        if state:
            shape = (*self.batch, self.kv_heads, self.width, self.value_width)
            options["initial_state"] = rng.standard_normal(shape).astype(np.float32)
        return arrays, options


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def compiled(arrays, options, implementation, chunk_size):
    return linear_recurrence(
        *arrays, **options, implementation=implementation, chunk_size=chunk_size, return_state=True
    )


def run(arrays, options, implementation, chunk_size=64):
    arrays = [jnp.asarray(x) for x in arrays]
    options = {name: jnp.asarray(x) for name, x in options.items()}
    return compiled(arrays, options, implementation, chunk_size)


def exact(arrays, options):
    options = dict(options)
    state = options.pop("initial_state", None)
    return recurrence(*arrays, **options, state=state)


PROBLEMS = st.builds(
    Problem,
    batch=st.sampled_from([(), (2,)]),
    length=st.sampled_from([1, 5, 12, 63]),
    kv_heads=st.sampled_from([1, 2, 4]),
    decay=st.sampled_from(DECAYS),
    erase=st.booleans(),
)


@settings(max_examples=15)
@given(PROBLEMS, st.sampled_from([0.1, 1.0, 300.0]), st.booleans(), st.integers(0, 2**31))
@pytest.mark.parametrize("implementation", FORMS)
def test_equals_the_loop(implementation, problem, strength, reset, seed):
    arrays, options = problem.numbers(seed, strength=strength, reset=reset)
    out, state = run(arrays, options, implementation, chunk_size=16)
    found = exact(arrays, options)
    for ours, theirs, words in zip((out, state), found, ("output", "state"), strict=True):
        assert_close(ours, theirs, "float32", words=words)


@pytest.mark.parametrize("decay", DECAYS[1:])
def test_the_loop_is_the_sum_over_pairs(decay, rng):
    problem = Problem((), 20, 1, 1, decay=decay)
    (query, key, value), options = problem.numbers(3, strength=3.0, state=False)
    g = np.float64(options["log_decay"])
    g = g[:, 0] if decay == "channel" else np.broadcast_to(g.reshape(-1, 1), (20, 1))
    summed = unrolled(*(np.float64(x[:, 0]) for x in (query, key, value)), g)
    looped, _ = recurrence(query, key, value, **options)
    np.testing.assert_allclose(looped[:, 0], summed, atol=1e-12)


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("implementation", FORMS)
def test_gradients_are_slopes_of_the_loop(implementation, decay, erase):
    problem = Problem((), 11, 2, 1, 4, 3, decay=decay, erase=erase)
    arrays, options = problem.numbers(5, strength=0.5)
    names = ["query", "key", "value", *options]
    at = [*arrays, *options.values()]
    rng = np.random.default_rng(0)
    read = rng.standard_normal((11, 2, 3)), rng.standard_normal((1, 4, 3))

    def loss(*flat):
        out = run(
            flat[:3], dict(zip(names[3:], flat[3:], strict=True)), implementation, chunk_size=4
        )
        return sum(
            jnp.sum(jnp.sin(x) * r.astype(np.float32)) for x, r in zip(out, read, strict=True)
        )

    def oracle(*flat):
        out = exact(flat[:3], dict(zip(names[3:], flat[3:], strict=True)))
        return sum(np.sum(np.sin(x) * r) for x, r in zip(out, read, strict=True))

    found = jax.jit(jax.grad(loss, argnums=tuple(range(len(at)))))(*map(jnp.asarray, at))
    wide = [np.asarray(x, np.float64) for x in at]
    for index, name in enumerate(names):
        direction = [np.zeros(x.shape) for x in wide]
        direction[index] = rng.standard_normal(wide[index].shape)
        slope = directional(oracle, wide, direction)
        along = np.sum(as_float64(found[index]) * direction[index])
        assert_close(along, slope, "float32", "gradient", scale=10.0, words=f"d {name}")


@pytest.mark.parametrize("implementation", FORMS)
def test_extreme_decays_neither_overflow_nor_lose_digits(implementation):
    """A decay of e^-10000 amid mild ones: what comes after it must not feel its size."""
    problem = Problem((), 40, 1, 1, decay="channel", erase=True)
    arrays, options = problem.numbers(1, strength=0.01)
    for value in (-1e4, -1e30, -np.inf):
        options["log_decay"][[3, 17, 18]] = value
        out, state = run(arrays, options, implementation)
        expected = exact(arrays, options)
        assert_close(out, expected[0], "float32")
        assert_close(state, expected[1], "float32")

        def loss(g, options=options):
            return jnp.sum(run(arrays, options | {"log_decay": g}, implementation)[0])

        gradient = jax.grad(loss)(jnp.asarray(options["log_decay"]))
        assert np.all(np.isfinite(gradient)), f"gradient at a log decay of {value}"


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("erase", [False, True])
def test_a_sequence_can_be_split_anywhere(implementation, erase):
    problem = Problem(length=20, decay="step", erase=erase)
    arrays, options = problem.numbers(2)
    whole = run(arrays, options, implementation, chunk_size=8)
    state = options.pop("initial_state")
    for cut in (1, 7, 16, 20):
        parts = []
        past = state
        for span in (slice(0, cut), slice(cut, 20)):
            piece = {k: v[:, span] for k, v in options.items()} | {"initial_state": past}
            out, past = run([x[:, span] for x in arrays], piece, implementation, chunk_size=8)
            parts.append(out)
        assert_reordered(jnp.concatenate(parts, 1), as_float64(whole[0]), "float32")
        assert_reordered(past, as_float64(whole[1]), "float32")


@pytest.mark.parametrize("implementation", FORMS)
def test_packed_documents_do_not_meet(implementation):
    """Three documents in a row equal each alone."""
    problem = Problem((1,), 19, decay="channel", erase=True)
    arrays, options = problem.numbers(4, state=False)
    ids = jnp.asarray([[7] * 5 + [2] * 6 + [3] * 8])
    spans = (slice(0, 5), slice(5, 11), slice(11, 19))
    packed, _ = run(arrays, options | {"reset": resets(ids)}, implementation, chunk_size=4)
    for span in spans:
        alone, _ = run(
            [x[:, span] for x in arrays],
            {name: x[:, span] for name, x in options.items()},
            implementation,
        )
        assert_reordered(packed[:, span], as_float64(alone), "float32")


@pytest.mark.parametrize("implementation", FORMS)
def test_vmap_is_a_batch_axis(implementation):
    arrays, options = Problem((3,), decay="step", erase=True).numbers(6)
    names = list(options)

    def one(*flat):
        return run(flat[:3], dict(zip(names, flat[3:], strict=True)), implementation)

    mapped = jax.jit(jax.vmap(one))(*map(jnp.asarray, (*arrays, *options.values())))
    for ours, batched in zip(mapped, run(arrays, options, implementation), strict=True):
        assert_reordered(ours, as_float64(batched), "float32")


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_in_and_out_single_inside(implementation, dtype):
    arrays, options = Problem(decay="channel", erase=True).numbers(8)
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    out, state = run(arrays, options, implementation)
    assert out.dtype == dtype
    assert state.dtype == jnp.float32
    expected = exact([np.asarray(x, np.float32) for x in arrays], options)
    assert_close(out, expected[0], dtype)
    assert_close(state, expected[1], "float32")


def test_float64_stays_float64():
    arrays, options = Problem(decay="channel", erase=True, length=30).numbers(8)
    with jax.enable_x64(True):
        arrays = [np.asarray(x, np.float64) for x in arrays]
        options = {name: np.asarray(x, np.float64) for name, x in options.items()}
        out, state = run(arrays, options, "chunked", chunk_size=8)
        assert state.dtype == jnp.float64
        assert_close(out, exact(arrays, options)[0], "float64")


@pytest.mark.parametrize("length", [1, 3, 4, 100])
def test_auto_chooses_a_form_that_is_right(length):
    arrays, options = Problem(length=length, decay="step").numbers(8)
    out, _ = run(arrays, options, "auto")
    assert_close(out, exact(arrays, options)[0], "float32")


def test_no_steps_leave_the_state_alone():
    arrays, options = Problem(length=0, decay="step").numbers(8)
    for implementation in (*FORMS, "auto"):
        out, state = run(arrays, options, implementation)
        assert out.shape == (2, 0, 4, 6)
        np.testing.assert_array_equal(state, options["initial_state"])


def temporaries(length, chunk_size, gradient, decay, erase):
    problem = Problem((), length, 1, 1, 16, 16, decay=decay, erase=erase)
    arrays, options = problem.numbers(0, state=False)
    names = list(options)

    def call(*flat):
        options = dict(zip(names, flat[3:], strict=True))
        return jnp.sum(jnp.sin(linear_recurrence(*flat[:3], **options, chunk_size=chunk_size)))

    flat = [jnp.asarray(x) for x in (*arrays, *options.values())]
    function = jax.grad(call, argnums=tuple(range(len(flat)))) if gradient else call
    return jax.jit(function).lower(*flat).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("decay", "erase"), [("step", False), ("channel", True)])
@pytest.mark.parametrize("gradient", [False, True])
def test_memory_grows_with_the_length_alone(decay, erase, gradient):
    small, large = (temporaries(n, 64, gradient, decay, erase) for n in (1024, 4096))
    assert large <= LINEAR_GROWTH * small
    assert large < 4096 * 4096 * 4 / 8


def test_a_wrong_call_is_refused_by_name(as_users_run_it):
    (query, key, value), options = Problem(decay="step", erase=True).numbers(0)
    arrays = [jnp.asarray(x) for x in (query, key, value)]
    state = jnp.zeros((2, 2, 8, 6))
    wrong = [
        (ValueError, "key", [arrays[0], arrays[1][:, :5], arrays[2][:, :5]], {}),
        (ValueError, "query", [arrays[0][:, :, :3], *arrays[1:]], {}),
        (TypeError, "value", [*arrays[:2], arrays[2].astype(jnp.float16)], {}),
        (ValueError, "log_decay", arrays, {"log_decay": jnp.full((2, 12, 2), 0.1)}),
        (ValueError, "log_decay", arrays, {"log_decay": jnp.full((2,), jnp.nan)}),
        (ValueError, "log_decay", arrays, {"log_decay": jnp.zeros((3,))}),
        (TypeError, "log_decay", arrays, {"log_decay": -1.0}),
        (ValueError, "erase", arrays, {"erase": jnp.zeros((2, 12, 2, 6))}),
        (TypeError, "reset", arrays, {"reset": jnp.zeros((2, 12), jnp.int32)}),
        (ValueError, "reset", arrays, {"reset": jnp.zeros((12,), bool)}),
        (ValueError, "initial_state", arrays, {"initial_state": state[:1]}),
        (ValueError, "initial_state", arrays, {"initial_state": jnp.swapaxes(state, -1, -2)}),
        (TypeError, "initial_state", arrays, {"initial_state": state.astype(jnp.bfloat16)}),
        (ValueError, "chunk_size", arrays, {"chunk_size": 0}),
        (ValueError, "chunk_size", arrays, {"chunk_size": 2.5}),
        (ValueError, "implementation", arrays, {"implementation": "blockwise"}),
    ]
    for error, name, inputs, options in wrong:
        with pytest.raises(error, match=f"^{name}"):
            linear_recurrence(*inputs, **options)


def test_constant_decays_within_jit_are_checked_as_outside(keys, as_users_run_it):
    x = jax.random.normal(keys("x"), (5, 2, 4))
    decay, growth = jnp.asarray([-0.5, -1.0]), jnp.asarray([0.5, 1.0])
    run = jax.jit(lambda x: linear_recurrence(x, x, x, log_decay=decay))
    assert_reordered(run(x), linear_recurrence(x, x, x, log_decay=decay), np.float32)
    with pytest.raises(ValueError, match=r"log_decay.*none above 0.*1\.0"):
        jax.jit(lambda x: linear_recurrence(x, x, x, log_decay=growth))(x)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_call_outside_of_jit_compiles_nothing(form, caplog):
    arrays, options = jax.tree.map(jnp.asarray, Problem(decay="step", erase=True).numbers(0))
    jax.clear_caches()
    for compiles in (True, False):
        caplog.clear()
        with jax.log_compiles():
            jax.block_until_ready(linear_recurrence(*arrays, **options, implementation=form))
        assert ("Compiling" in caplog.text) is compiles
