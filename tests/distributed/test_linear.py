"""A recurrence cut over devices is the recurrence: values, states, gradients; and what is sent."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlab
from attnlab import atlas, masks
from attnlab.core.modules import MultiHeadAttention
from attnlab.core.past_softmax import latent_attention
from attnlab.core.past_sums import past_sums
from attnlab.core.recurrence import spread
from attnlab.distributed import linear, over
from attnlab.distributed.linear import exchanged_bytes, linear_recurrence
from tests.compiled import compiled
from tests.kernels.linear_cases import running
from tests.recurrences import recurrence
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("lightly_compiled")

AUTO = jax.sharding.AxisType.Auto
EXACT = 1e-5
DECAYS = ("none", "head", "step", "channel")
STATE = (2, 2, 4, 3)


@functools.cache
def mesh_of(**axes):
    devices = jax.devices()[: math.prod(axes.values())]
    types = (AUTO,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


def numbers(seed, length, decay="none", erase=False, reset=False, state=True, dtype=jnp.float32):
    """Arguments by name, in NumPy: two entries, two key heads with two queries each."""
    rng = np.random.default_rng(seed)
    steps = (2, length)
    key = rng.standard_normal((*steps, 2, 4))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    found = {
        "query": rng.standard_normal((*steps, 4, 4)),
        "key": key,
        "value": rng.standard_normal((*steps, 2, 3)),
    }
    if decay != "none":
        shape = {"head": (2,), "step": key.shape[:-1], "channel": key.shape}[decay]
        found["log_decay"] = -(10.0 ** rng.uniform(-3, 0.5, shape))
        if decay != "head":
            found["log_decay"][rng.random(shape) < 0.05] = -np.inf
    if erase:
        found["erase"] = rng.uniform(0, 1.9, key.shape[:-1])[..., None] * key
    if state:
        found["initial_state"] = rng.standard_normal(STATE)
    found = {name: jnp.asarray(x, dtype) for name, x in found.items()}
    if reset:
        found["reset"] = jnp.asarray(rng.random(steps) < 0.1)
    return found


def call(arrays, **options):
    run = linear_recurrence if "mesh" in options else attnlab.linear_recurrence
    return run(**arrays, **options)


def results(arrays, **options):
    """Output and last state, and the gradient in every array that has one."""
    fixed = {name: x for name, x in arrays.items() if name == "reset"}

    def loss(moving):
        out, state = call(moving | fixed, return_state=True, **options)
        waves = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in (out, state)]
        return jnp.sum(out * waves[0]) + jnp.sum(state * waves[1]), (out, state)

    moving = {name: x for name, x in arrays.items() if name not in fixed}
    return jax.jit(jax.grad(loss, has_aux=True))(moving)


def assert_equal(found, wanted, words=""):
    found, tree = jax.tree.flatten(found)
    wanted, same = jax.tree.flatten(wanted)
    assert tree == same
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = max(1.0, float(jnp.abs(b).max(initial=0)))
        off = float(jnp.abs(a - b).max(initial=0))
        assert off <= EXACT * scale, f"{words}: {a.shape} off by {off}, scale {scale}"


def collectives(function, *arguments):
    """Kind and shape of each collective operation of the compiled program, sorted."""
    text = compiled(function, *arguments).as_text()
    kinds = "collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter"
    found = re.findall(rf"= \w+\[([\d,]*)\]\S* ({kinds})(?:-start)?\(", text)
    return sorted((kind, tuple(map(int, shape.split(",")))) for shape, kind in found)


def laid_out(mesh, arrays, *axes):
    """The arrays as they lie on a mesh: their first axes cut, where there are so many."""

    def put(x):
        spec = jax.sharding.PartitionSpec(*axes[: x.ndim])
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(put, arrays)


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_every_kind_equals_the_loop_and_one_device_in_gradients(decay, erase):
    arrays = numbers(3, 22, decay, erase, reset=True)
    on_four = {"mesh": mesh_of(sequence=4), "axis": "sequence"}
    found = results(arrays, implementation="recurrent", **on_four)
    assert_equal(found, results(arrays, implementation="recurrent"))
    wide = {name: np.asarray(x) for name, x in arrays.items()}
    wide["state"] = wide.pop("initial_state")
    for array, exact in zip(found[1], recurrence(**wide), strict=True):
        assert_close(array, exact, "float32")


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize(("decay", "erase"), [("channel", False), ("step", True)])
def test_any_number_of_devices(devices, decay, erase):
    arrays = numbers(4, 32, decay, erase)
    mesh = mesh_of(sequence=devices)
    found = results(arrays, implementation="recurrent", mesh=mesh, axis="sequence")
    assert_equal(found, results(arrays, implementation="recurrent"))


@pytest.mark.parametrize("implementation", ["parallel", "chunked", "auto"])
def test_every_form(implementation):
    arrays = numbers(5, 24, "channel", erase=True, reset=True)
    options = {"implementation": implementation, "chunk_size": 4}
    found = results(arrays, mesh=mesh_of(sequence=3), axis="sequence", **options)
    assert_equal(found, results(arrays, implementation="recurrent"))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("erase", [False, True])
def test_a_kernel_on_each_device(erase):
    arrays = numbers(6, 30, "step", erase)
    with running("triton"):
        on_two = {"mesh": mesh_of(sequence=2), "axis": "sequence", "implementation": "triton"}
        found = results(arrays, **on_two)
    assert_equal(found, results(arrays, implementation="recurrent"))


def test_a_kernel_without_its_device_is_refused_also_after_it_was_interpreted():
    arrays = numbers(6, 30, "step")
    options = {"mesh": mesh_of(sequence=2), "axis": "sequence", "implementation": "tpu"}
    with pytest.raises(NotImplementedError, match=r'"tpu" needs .*"chunked" can'):
        call(arrays, **options)


@settings(max_examples=6)
@given(
    devices=st.sampled_from([2, 3, 5, 8]),
    length=st.sampled_from([1, 7, 16, 29]),
    decay=st.sampled_from(DECAYS),
    erase=st.booleans(),
    reset=st.booleans(),
    state=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_drawn_structure(devices, length, decay, erase, reset, state, seed):
    arrays = numbers(seed, length, decay, erase, reset, state)
    options = {"implementation": "recurrent", "return_state": True}
    found = call(arrays, mesh=mesh_of(sequence=devices), axis="sequence", **options)
    assert_equal(found, call(arrays, **options))


def test_a_batch_axis_and_heads_of_their_own():
    arrays = numbers(8, 14, "channel", erase=True)
    mesh = mesh_of(data=2, heads=2, sequence=2)
    axes = {"axis": "sequence", "batch": "data", "heads": "heads"}
    found = results(arrays, mesh=mesh, implementation="recurrent", **axes)
    assert_equal(found, results(arrays, implementation="recurrent"))


def test_padding_does_not_decay_the_returned_state():
    arrays = numbers(9, 9, "head")
    state = call(arrays, mesh=mesh_of(sequence=8), axis="sequence", return_state=True)[1]
    assert_equal(state, call(arrays, return_state=True)[1])


def test_no_steps_and_low_precision():
    options = {"mesh": mesh_of(sequence=4), "axis": "sequence", "return_state": True}
    arrays = numbers(9, 0)
    out, state = call(arrays, **options)
    assert out.shape == (2, 0, 4, 3)
    assert_equal(state, arrays["initial_state"])
    arrays = numbers(9, 12, "step", erase=True, state=False, dtype=jnp.bfloat16)
    found, wanted = call(arrays, **options), call(arrays, return_state=True)
    assert found[0].dtype == jnp.bfloat16
    assert_close(found[0], wanted[0].astype(jnp.float32), jnp.bfloat16)
    assert_equal(found[1], wanted[1])


def test_forward_mode_and_second_order():
    arrays = numbers(10, 12, "channel", erase=True, state=False)
    arrays["log_decay"] = jnp.maximum(arrays["log_decay"], -5.0)
    moves = {name: jnp.cos(x) for name, x in arrays.items()}

    def along(arrays, **options):
        def slope(arrays):
            run = functools.partial(call, implementation="recurrent", **options)
            out, moved = jax.jvp(run, (arrays,), (moves,))
            return jnp.sum(out * moved), moved

        return jax.jit(jax.grad(slope, has_aux=True))(arrays)

    found = along(arrays, mesh=mesh_of(sequence=4), axis="sequence")
    assert_equal(found, along(arrays))


def test_what_is_traced_with_one_plan_is_compiled_once():
    arrays = numbers(11, 16, "step")
    options = {"mesh": mesh_of(sequence=2), "axis": "sequence", "chunk_size": 5}
    call(arrays, **options)
    known = linear._run._cache_size()
    call(arrays, **options)
    assert linear._run._cache_size() == known


# -- what is sent --------------------------------------------------------------------------------

KEPT = {"none": (), "head": (1, 1), "channel": (4, 1), "erase": (4, 4)}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("length", [16, 64])
def test_states_go_round_in_log_rounds_whatever_the_length(kind, length):
    mesh = mesh_of(data=2, sequence=4)
    arrays = numbers(
        1, length, "channel" if kind == "erase" else kind, kind == "erase", state=False
    )
    placed = {n: x if x.ndim == 1 else laid_out(mesh, x, "data", "sequence")
              for n, x in arrays.items()}  # fmt: skip
    run = functools.partial(call, mesh=mesh, axis="sequence", batch="data")
    found = collectives(run, placed)
    shapes = [(1, 2, 4, 3)] * 2 + [(1, 2, *KEPT[kind])] * bool(KEPT[kind])
    assert found == sorted(("collective-permute", shape) for shape in shapes)
    sent = sum(4 * math.prod(shape) for _, shape in found)
    transition = math.prod(KEPT[kind]) if KEPT[kind] else 0
    assert sent == exchanged_bytes(4, 1, 2, 4, 3, transition=transition)


def test_a_backward_pass_sends_as_much_again_and_a_last_state_one_sum():
    mesh = mesh_of(data=2, sequence=4)
    arrays = numbers(1, 16, "channel", state=False)
    arrays = laid_out(mesh, arrays, "data", "sequence")
    options = {"mesh": mesh, "axis": "sequence", "batch": "data"}
    forward = [("collective-permute", (1, 2, 4, n)) for n in (1, 3, 3)]
    grad = jax.grad(lambda arrays: jnp.sum(jnp.square(call(arrays, **options))))
    assert collectives(grad, arrays) == sorted(2 * forward)
    found = collectives(functools.partial(call, return_state=True, **options), arrays)
    assert found == [("all-reduce", (1, 2, 4, 3)), *forward]


def test_bytes_follow_the_rounds():
    assert [exchanged_bytes(p, 1, 1, 2, 3) // 24 for p in (1, 2, 3, 4, 5, 8)] == [0, 1, 2, 2, 3, 3]
    assert exchanged_bytes(8, 3, 2, 4, 5, transition=16, itemsize=2) == 6 * 2 * (3 * 20 + 2 * 16)


# -- within `over` -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_over_cuts_the_sequence_over_ring_and_heads_together(layout):
    arrays = numbers(12, 24, "step", erase=True, reset=True)
    wanted = results(arrays, implementation="recurrent")
    assert spread.get() is None
    with over(mesh_of(data=2, ring=2, heads=2), ring="ring", heads="heads", batch="data",
              layout=layout):  # fmt: skip
        found = results(arrays, implementation="recurrent")
    assert spread.get() is None
    assert_equal(found, wanted)


def test_arranged_in_another_order_is_refused():
    arrays = numbers(12, 24)
    with (
        over(mesh_of(ring=4), ring="ring", layout="zigzag", arranged=True),
        pytest.raises(NotImplementedError, match=r"natural order.*arranged=False.*restore"),
    ):
        call(arrays)
    with over(mesh_of(ring=4), ring="ring", arranged=True):
        assert_equal(call(arrays), call(arrays))


MECHANISMS = ("retnet", "gla", "gated-deltanet", "mamba2", "rwkv7", "latte", "inline-attention")


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanisms_and_what_their_layers_do_besides(name):
    mechanism = atlas.get(name).build(2, 4, rngs=nnx.Rngs(1))
    layer = MultiHeadAttention(
        8, 2, mechanism=mechanism, implementation="recurrent", rngs=nnx.Rngs(0)
    )
    graph, params = nnx.split(layer)
    mesh, rng = mesh_of(data=2, sequence=4), np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((2, 16, 8)), jnp.float32)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, 16))), jnp.int32)

    def loss(params, x, ids):
        out = nnx.merge(graph, params)(x, mask=masks.Causal() & masks.Segments(ids))
        return jnp.sum(jnp.sin(out)), out

    wanted = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x, ids)
    x, ids = laid_out(mesh, (x, ids), "data", "sequence")
    with over(mesh, ring="sequence", batch="data"):
        found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x, ids)
    assert_equal(found, wanted, name)


def test_running_maxima_and_sums_are_left_to_the_compiler():
    mesh = mesh_of(data=2, sequence=4)
    arrays = numbers(13, 16, state=False)
    placed = laid_out(mesh, arrays, "data", "sequence")
    start = jnp.zeros((2, 16), bool).at[0, 9].set(True)
    with over(mesh, ring="sequence", batch="data"):
        attend = functools.partial(call_with, latent_attention)  # recurrent: quick to compile
        kinds = {kind for kind, _ in collectives(attend, placed)}
        found = jax.jit(attend)(placed)
        sums = jax.jit(functools.partial(past_sums, causal=True))(
            placed["query"], laid_out(mesh, start, "data", "sequence")
        )
    assert kinds == {"collective-permute"}
    assert_equal(found, attend(arrays))
    assert_equal(sums, past_sums(arrays["query"], start, causal=True))


def call_with(attend, arrays):
    return attend(**arrays, causal=True, implementation="recurrent")


# -- refusals ------------------------------------------------------------------------------------

BAD = {
    "axis: the mesh has no axis 'rows'": {"axis": "rows"},
    "batch: the mesh has no axis 'rows'": {"batch": "rows"},
    "heads: mesh axis 'sequence' was given twice": {"heads": "sequence"},
    "batch: mesh axis 'sequence' was given twice": {"batch": ("data", "sequence")},
    "query: the first batch axis should be a multiple of the 'data'": {"batch": "data"},
    "key: the number of heads, 2, should be a multiple of the 'data'": {"heads": "data"},
    "chunk_size: expected a positive int": {"chunk_size": 0},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused_by_name(words):
    options = {"mesh": mesh_of(data=3, sequence=2), "axis": "sequence"} | BAD[words]
    with pytest.raises(ValueError, match=words):
        call(numbers(14, 8), **options)
    assert spread.get() is None


def test_what_is_no_mesh_is_refused(as_users_run_it):
    with pytest.raises(TypeError, match=r"mesh: expected a jax\.sharding\.Mesh, got tuple"):
        call(numbers(14, 8), mesh=("sequence",), axis="sequence")
