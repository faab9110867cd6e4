"""A call spread over devices gives the numbers of the same call on one: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import attention, explain, masks, normalizers, scores
from attnlab.core.attention import spread
from attnlab.core.inputs import IMPLEMENTATIONS
from attnlab.distributed import LAYOUTS, arrange, over, restore
from tests.core import draw
from tests.distributed.exact import assert_equal

pytestmark = pytest.mark.usefixtures("lightly_compiled")
AUTO = jax.sharding.AxisType.Auto
KINDS = {
    "softmax": lambda rng, heads: normalizers.Softmax(),
    "sink": lambda rng, heads: normalizers.Softmax(
        jnp.asarray(rng.standard_normal(heads), jnp.float32)
    ),
    "plus one": lambda rng, heads: normalizers.SoftmaxPlusOne(),
    "softplus": lambda rng, heads: normalizers.SoftplusL1(),
    "sigmoid": lambda rng, heads: normalizers.Sigmoid(),
    "squared relu": lambda rng, heads: normalizers.ReluSquared(),
    "sparsemax": lambda rng, heads: normalizers.Sparsemax(),
    "entmax": lambda rng, heads: normalizers.Entmax15(),
}


@functools.cache
def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AUTO,) * len(axes))


def results(arrays, mask, modifiers, normalizer, **options):
    """Output, and the gradients of a loss in every array that has one."""

    def loss(arrays, modifiers, normalizer):
        out = attention(*arrays, mask=mask, modifiers=modifiers, normalizer=normalizer, **options)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(out * weights), out

    grad = jax.grad(loss, (0, 1, 2), has_aux=True, allow_int=True)
    return jax.jit(grad)(arrays, modifiers, normalizer)


def assert_spread_equals_whole(mesh, arguments, size, pair, modifiers, normalizer, seed, **options):
    arrays = [jnp.asarray(x) for x in draw.inputs(size, seed)]
    terms = [m.term for m in modifiers]
    wanted = results(arrays, pair.term, terms, normalizer, implementation="reference", **options)
    with over(mesh, **arguments):
        found = results(arrays, pair.term, terms, normalizer, **options)
    names = pair.name, [m.name for m in modifiers], type(normalizer).__name__
    assert_equal(found, wanted, f"{arguments} {names}")


SIZE = draw.Sizes((2,), 32, 32, 4, 2, 4, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", draw.MASKS)
def test_every_mask_in_every_layout(name, layout):
    pair = draw.simple_mask(name, SIZE, 7)
    arguments = {"ring": "ring", "batch": "batch", "layout": layout}
    assert_spread_equals_whole(
        mesh_of(batch=2, ring=4), arguments, SIZE, pair, (), normalizers.Softmax(), 3
    )


@pytest.mark.parametrize("name", KINDS)
def test_every_normalizer(name, rng):
    pair = draw.simple_mask("causal", SIZE, 7)
    arguments = {"ring": "ring", "heads": "heads", "layout": "zigzag"}
    assert_spread_equals_whole(
        mesh_of(ring=4, heads=2), arguments, SIZE, pair, (), KINDS[name](rng, 4), 3
    )


@pytest.mark.parametrize("name", draw.MODIFIERS)
def test_every_modifier(name):
    pair = draw.simple_mask("causal", SIZE, 7)
    arguments = {"ring": "ring", "layout": "striped"}
    modifiers = (draw.modifier(name, SIZE, 5),)
    assert_spread_equals_whole(
        mesh_of(ring=4), arguments, SIZE, pair, modifiers, normalizers.Softmax(), 3
    )


DEVICES = {
    1: ({"ring": 1}, {"heads": 1}),
    2: ({"ring": 2}, {"heads": 2}),
    4: ({"ring": 4}, {"heads": 4}, {"ring": 2, "heads": 2}, {"batch": 2, "ring": 2}),
    8: ({"ring": 8}, {"ring": 4, "heads": 2}, {"ring": 2, "heads": 4}, {"batch": 2, "ring": 4}),
}
SIZES = (
    draw.Sizes((2,), 63, 63, 4, 2, 4, 4),  # that no mesh divides
    draw.Sizes((2,), 5, 40, 4, 1, 8, 3),  # cross attention, with fewer queries than devices
    draw.Sizes((2, 3), 32, 32, 4, 4, 4, 4),
)


@pytest.mark.parametrize("devices", DEVICES)
@settings(max_examples=4)
@given(data=st.data())
def test_whatever_is_drawn(devices, data):
    axes = data.draw(st.sampled_from(DEVICES[devices]))
    size = data.draw(st.sampled_from(SIZES))
    layout = data.draw(st.sampled_from(LAYOUTS)) if "ring" in axes else "contiguous"
    pair = draw.mask_pair(data, size)
    modifiers = draw.modifier_pairs(data, size)
    kind = data.draw(st.sampled_from(list(KINDS)))
    seed = data.draw(st.integers(0, 10**6))
    options = {"query_offset": 3, "key_offset": 1} if data.draw(st.booleans()) else {}
    if data.draw(st.booleans()) and KINDS[kind](np.random.default_rng(0), 1).kind != "row":
        options |= {"dropout_rate": 0.25, "dropout_key": jax.random.key(seed)}
    arguments = {name: name for name in axes} | {"layout": layout}
    normalizer = KINDS[kind](np.random.default_rng(seed), size.heads)
    assert_spread_equals_whole(
        mesh_of(**axes), arguments, size, pair, modifiers, normalizer, seed, **options
    )


def test_documents_cross_the_borders_of_parts(rng):
    ids = jnp.asarray(np.repeat([0, 1, 2, 3], [5, 14, 3, 10])[None], jnp.int32)
    mask = masks.Segments(jnp.broadcast_to(ids, (2, 32))) & masks.Causal()
    arrays = [jnp.asarray(x) for x in draw.inputs(SIZE, 1)]
    wanted = results(arrays, mask, (), normalizers.Softmax(), implementation="reference")
    for layout in LAYOUTS:
        with over(mesh_of(ring=4), ring="ring", layout=layout):
            assert_equal(results(arrays, mask, (), normalizers.Softmax()), wanted, layout)


def test_blocks_are_found_by_the_numbers_of_their_tokens(rng):
    live = jnp.asarray(rng.random((2, 4, 4, 4)) < 0.5)
    mask = masks.Blocks(live, (8, 8))
    arrays = [jnp.asarray(x) for x in draw.inputs(SIZE, 1)]
    wanted = results(arrays, mask, (), normalizers.Softmax(), implementation="reference")
    for layout in LAYOUTS:
        with over(mesh_of(ring=4), ring="ring", layout=layout):
            assert_equal(results(arrays, mask, (), normalizers.Softmax()), wanted, layout)


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
def test_arrays_in_the_order_of_a_layout_need_no_moves(kind, rng):
    arrays = [jnp.asarray(x) for x in draw.inputs(SIZE, 1)]
    by_key = jnp.asarray(rng.standard_normal((4, 32)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((4, 32, 32)), jnp.float32)
    normalizer = KINDS[kind](rng, 4)
    terms = scores.Bias(bias), scores.Bias(by_key[:, None])
    options = {"mask": masks.Causal(), "normalizer": normalizer}
    wanted = attention(*arrays, modifiers=terms, implementation="reference", **options)
    for layout in LAYOUTS:
        laid = functools.partial(arrange, layout=layout, devices=4)
        terms = scores.Bias(laid(laid(bias), axis=2)), scores.Bias(laid(by_key)[:, None])
        with over(mesh_of(ring=4), ring="ring", layout=layout, arranged=True) as across:
            out = jax.jit(lambda *x, terms=terms: attention(*x, modifiers=terms, **options))(
                *map(laid, arrays)
            )
        assert_equal(restore(out, layout, 4), wanted, layout)
        assert across.unit == {"contiguous": 4, "striped": 16, "zigzag": 8}[layout]


def test_log_sum_exp_and_its_gradient(rng):
    arrays = [jnp.asarray(x) for x in draw.inputs(SIZE, 1)]

    def loss(*arrays, **options):
        out, lse = attention(*arrays, mask=masks.SlidingWindow(3), return_lse=True, **options)
        return jnp.sum(jnp.sin(lse)) + jnp.sum(jnp.sin(out))

    wanted = jax.grad(functools.partial(loss, implementation="reference"), (0, 1, 2))(*arrays)
    with over(mesh_of(ring=4), ring="ring", layout="zigzag"):
        assert_equal(jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays), wanted)


def test_forward_mode_and_second_derivatives(rng):
    size = draw.Sizes((), 8, 8, 2, 1, 3, 3)
    arrays = [jnp.asarray(x) for x in draw.inputs(size, 1)]
    along = [jnp.asarray(x) for x in draw.inputs(size, 2)]

    def loss(*arrays):
        return jnp.sum(jnp.sin(attention(*arrays, mask=masks.Causal())))

    def products(*arrays):
        tangent = jax.jvp(loss, arrays, tuple(along))[1]
        curved = jax.jvp(jax.grad(loss, (0, 1, 2)), arrays, tuple(along))[1]
        again = jax.grad(lambda *x: jax.jvp(loss, x, tuple(along))[1], (0, 1, 2))(*arrays)
        return tangent, curved, again

    wanted = jax.jit(products)(*arrays)
    with over(mesh_of(ring=2), ring="ring"):
        found = jax.jit(lambda *x: products(*x))(*arrays)
    assert_equal(found, wanted)


def test_explain_says_how_a_call_is_spread():
    mesh = mesh_of(data=2, ring=2, heads=2)
    x = jax.ShapeDtypeStruct((2, 64, 4, 8), jnp.float32)
    with over(mesh, ring="ring", heads="heads", batch="data", layout="zigzag"):
        choice = explain(x, x, x, mask=masks.Causal())
        gathered = explain(x, x, x, normalizer=normalizers.Sparsemax())
        asked = explain(x, x, x, implementation="tpu")
    assert choice.implementation == "blockwise"
    for words in ("batch is cut over 2", "heads are exchanged over 2", "2 visits", "zigzag"):
        assert words in choice.reason
    assert set(choice.rejected) == set(IMPLEMENTATIONS) - {"blockwise"}
    assert "gathered" in gathered.reason
    assert gathered.implementation == "reference"  # alone with all keys
    assert (asked.implementation, "asked for" in asked.reason) == ("tpu", True)
    near = masks.SlidingWindow(4)
    with over(mesh_of(ring=8), ring="ring"):
        assert explain(x, x, x, mask=near).reason.startswith("2 visits in a ring of 8, contiguous")
    with over(mesh_of(heads=2), heads="heads"):
        assert explain(x, x, x, mask=near).implementation == "reference"


def test_a_context_ends(rng):
    with over(mesh_of(ring=2), ring="ring"):
        assert spread.get() is not None
    assert spread.get() is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ring": "sequence"}, "ring: the mesh has no axis 'sequence'"),
        ({"ring": "ring", "heads": "ring"}, "heads: mesh axis 'ring' was given twice"),
        ({}, "ring, heads, batch: expected the name of a mesh axis"),
        ({"ring": "ring", "layout": "spiral"}, "layout: expected one of contiguous, striped"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words), over(mesh_of(ring=4, batch=2), **arguments):
        pass


def test_what_the_mesh_does_not_divide_is_refused(as_users_run_it):
    three = [jnp.zeros((3, 8, 3, 4))] * 3
    with (
        over(mesh_of(heads=2), heads="heads"),
        pytest.raises(ValueError, match="query: the number of heads, 3, should be a multiple"),
    ):
        attention(*three)
    with (
        over(mesh_of(batch=2), batch="batch"),
        pytest.raises(ValueError, match="query: the first batch axis should be a multiple"),
    ):
        attention(*three)
    with (
        over(mesh_of(ring=4), ring="ring", layout="zigzag", arranged=True),
        pytest.raises(ValueError, match="query: arranged inputs should have a length"),
    ):
        attention(*[jnp.zeros((1, 12, 2, 4))] * 3)
    with (
        over(mesh_of(ring=4), ring="ring"),
        pytest.raises(NotImplementedError, match='"xla" does not go around a ring; implement'),
    ):
        attention(*three, implementation="xla")
    with pytest.raises(TypeError, match=r"mesh: expected a jax\.sharding\.Mesh, got int"), over(3):
        pass
