"""The laws by which the flash kernels are believed, the same for every backend.

Each is run interpreted where the device is absent and compiled where it is present; see
`tests.kernels.cases.Backend`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlab
from attnlab import masks, normalizers, scores
from tests.core import draw
from tests.kernels import cases
from tests.kernels.cases import Backend, Call
from tests.tolerances import as_float64, assert_close, assert_reordered, largest

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    # The Hopper interpreter multiplies by NumPy, which tells of every NaN that arises.
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning"),
]

NAMED = list(cases.calls(cases.backends()[0]))


# ---- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_output_lse_and_every_gradient_equal_the_formula(backend, name):
    cases.check(cases.calls(backend)[name], backend, backend.dtype, backend.blocks)


def drawn_call(backend: Backend, data, most: int = 2) -> Call:
    size = data.draw(st.sampled_from(backend.sizes))
    mask = cases.drawn_mask(data, size, 1, backend.blocks)
    names = data.draw(st.lists(st.sampled_from(cases.MODIFIERS), max_size=most))
    return Call(
        size,
        mask,
        tuple(cases.modifier(name, size, n) for n, name in enumerate(names)),
        data.draw(st.sampled_from(cases.NORMALIZERS)),
        data.draw(st.sampled_from([(0, 0), (5, 0), (40, 7)])),
        data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1000)),
        magnitude=data.draw(st.sampled_from([1.0, 1.0, 20.0])),
    )


@settings(max_examples=12)
@given(data=st.data())
def test_drawn_calls_equal_the_formula(backend, data):
    call = drawn_call(backend, data)
    dtype = data.draw(st.sampled_from(backend.dtypes))
    blocks = data.draw(st.sampled_from(backend.block_sizes))
    cases.check_values(call, dtype, *cases.values(call, backend, dtype, blocks))


@settings(max_examples=6)
@given(data=st.data())
def test_gradients_of_drawn_calls_equal_those_of_the_formula(backend, data):
    call = dataclasses.replace(drawn_call(backend, data), magnitude=1.0)
    dtype = data.draw(st.sampled_from(backend.dtypes))
    blocks = data.draw(st.sampled_from(backend.block_sizes))
    cases.check(call, backend, dtype, blocks)


@pytest.mark.parametrize("length", [1, 63, 257])
def test_awkward_lengths_in_every_dtype(backend, length):
    for dtype in backend.dtypes:
        size = draw.Sizes((), length, length, 2, 1, 8, 8)
        call = Call(size, draw.simple_mask("causal", size, 0), seed=length)
        cases.check_values(call, dtype, *cases.values(call, backend, dtype, None))


@pytest.mark.parametrize("widths", [(256, 16), (80, 200), (1, 1)], ids=str)
def test_awkward_widths(backend, widths):
    size = draw.Sizes((), 20, 24, 2, 2, *widths)
    call = Call(size, cases.window(9, 4))
    cases.check_values(call, backend.dtype, *cases.values(call, backend, backend.dtype, None))


def test_scores_of_ten_thousand_stay_finite(backend):
    size = draw.Sizes((), 8, 12, 2, 1, 4, 3)
    call = Call(size, cases.window(4, 0), (cases.modifier("alibi", size),), magnitude=2e4)
    for dtype in backend.dtypes:
        if dtype == jnp.float16:
            continue  # whose largest number is 65504
        out, lse, gradient = cases.gradients(call, backend, dtype, None)
        cases.check_values(call, dtype, out, lse)
        assert all(np.all(np.isfinite(as_float64(g))) for g in jax.tree.leaves(gradient))


# ---- the log-sum-exp and its cotangent -----------------------------------------------------------


def test_the_cotangent_of_lse_alone_reaches_query_and_key(backend):
    """d lse_i / d q_i = scale * sum_j w_ij k_j: what attention to the keys themselves returns."""
    size = dataclasses.replace(backend.size, kv_heads=backend.size.heads, value_width=8)
    query, key, value = (jnp.asarray(x).astype(backend.dtype) for x in draw.inputs(size, 0))

    def total(query, key, value):
        options = {"implementation": backend.name, "block_sizes": backend.blocks}
        _, lse = attnlab.attention(
            query, key, value, mask=masks.Prefix(30), return_lse=True, **options
        )
        return jnp.sum(lse)

    gradient = backend.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value)
    read = attnlab.attention(
        *(x.astype(jnp.float32) for x in (query, key, key)),
        mask=masks.Prefix(30), implementation="reference",
    )  # fmt: skip
    exact = as_float64(read) / np.sqrt(8)
    assert_close(gradient[0], exact, backend.dtype, "gradient")
    np.testing.assert_array_equal(as_float64(gradient[2]), 0)


# ---- dropout -------------------------------------------------------------------------------------


def test_the_same_pairs_are_dropped_as_elsewhere_whatever_the_tiles(backend):
    size = backend.size
    arrays = [jnp.asarray(x).astype(backend.dtype) for x in draw.inputs(size, 0)]
    key = jax.random.key(3)

    def dropped(key, arrays, name, blocks):
        # Uniform weights and values of one: what remains counts the pairs that were kept.
        query, keys, value = (arrays[0] * 0, arrays[1], arrays[2] * 0 + 1)
        return attnlab.attention(
            query, keys, value, dropout_rate=0.5, dropout_key=key, mask=masks.Causal(),
            query_offset=size.keys, implementation=name, block_sizes=blocks,
        )  # fmt: skip

    expected = dropped(key, arrays, "reference", None)
    assert len(np.unique(as_float64(expected))) > 5
    np.testing.assert_array_equal(expected[..., 0], expected[..., -1])
    for blocks in backend.block_sizes:
        got = backend.jit(lambda k, x, b=blocks: dropped(k, x, backend.name, b))(key, arrays)
        assert_close(got, as_float64(expected), backend.dtype)
    other = backend.jit(lambda k, x: dropped(k, x, backend.name, None))(jax.random.key(4), arrays)
    assert np.mean(as_float64(other) != as_float64(expected)) > 0.5


# ---- transformations -----------------------------------------------------------------------------


def transformed(backend):
    """A function with parameters, mask data and an offset: a transformation meets them all."""

    def call(query, key, value, slopes, length, offset):
        return attnlab.attention(
            query, key, value,
            mask=masks.Causal() & masks.KeyPadding(length),
            modifiers=scores.AlibiSlopes(slopes),
            query_offset=offset,
            implementation=backend.name,
            block_sizes=backend.blocks,
        )  # fmt: skip

    return call


def stacked(backend, count):
    size = dataclasses.replace(backend.size, batch=(count,), heads=2, kv_heads=1)
    arrays = [jnp.asarray(x).astype(backend.dtype) for x in draw.inputs(size, 0)]
    slopes = jnp.asarray(np.linspace(0.1, 1, 2 * count), jnp.float32).reshape(count, 2)
    lengths = jnp.asarray(np.arange(count) * 12 + 3, jnp.int32)
    return *arrays, slopes, lengths, jnp.arange(count, dtype=jnp.int32) * 4 + 9


def loss_and_out(call):
    def loss(*args):
        out = call(*args)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)


def test_vmap_of_everything_equals_a_loop(backend):
    call, args = loss_and_out(transformed(backend)), stacked(backend, 3)
    gradient, out = backend.jit(jax.vmap(call))(*args)
    alone = backend.jit(call)
    for n in range(3):
        one_gradient, one = alone(*(x[n] for x in args))
        assert_reordered(out[n], as_float64(one), backend.dtype)
        for ours, expected in zip(gradient, one_gradient, strict=True):
            scale = max(1.0, largest(expected))
            assert_close(ours[n], as_float64(expected), backend.dtype, "gradient", scale=scale)


@pytest.mark.parametrize("mapped", ["query", "key, value, slopes and length"])
def test_vmap_of_some_arguments_sums_the_gradients_of_the_others(backend, mapped):
    call, args = transformed(backend), stacked(backend, 3)
    names = ("query", "key", "value", "slopes", "length", "offset")
    axes = [0 if name in mapped else None for name in names]
    args = [x if axis == 0 else x[2] for x, axis in zip(args, axes, strict=True)]

    def loss(*floats):
        out = jax.vmap(call, in_axes=tuple(axes))(*floats, *args[4:])
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    def one(number, *floats):
        parts = [x if axis is None else x[number] for x, axis in zip(floats, axes, strict=False)]
        rest = [
            x if axis is None else x[number] for x, axis in zip(args[4:], axes[4:], strict=True)
        ]
        return jnp.sum(jnp.sin(call(*parts, *rest).astype(jnp.float32)))

    got = backend.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args[:4])
    slope = backend.jit(jax.grad(one, argnums=(1, 2, 3, 4)))
    parts = [slope(jnp.int32(n), *args[:4]) for n in range(3)]
    for ours, *each in zip(got, *parts, strict=True):
        expected = sum(map(as_float64, each))
        scale = max(1.0, largest(expected))
        assert_close(ours, expected, backend.dtype, "gradient", scale=scale)


def test_jvp_and_hessian_vector_products_equal_those_of_the_reference(backend):
    size = dataclasses.replace(backend.size, batch=(), heads=2, kv_heads=1)
    call = Call(
        size,
        draw.simple_mask("causal", size, 0),
        (cases.modifier("alibi", size),),
        "sink",
        (12, 0),
    )
    inputs, params = call.arrays(backend.dtype)
    readings = tuple(map(jnp.asarray, call.readings()))
    along = jax.tree.map(lambda x: jnp.cos(x * 3), (inputs, params))

    def derivatives(name, wide):
        options = {"implementation": name}
        if name != "reference":
            options["block_sizes"] = backend.blocks
        whole = cases.loss_of(call, **options)

        def loss(inputs, params):
            return whole(inputs, params, call.data(), readings)[0]

        def compute(at, along):
            slope = jax.grad(loss, argnums=(0, 1))
            first = jax.jvp(loss, at, along)[1]
            second = jax.jvp(slope, at, along)[1]
            return first, second

        at = (inputs, params)
        if wide:
            at, direction = (jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (at, along))
            return jax.jit(compute)(at, direction)
        return backend.jit(compute)(at, along)

    exact, got = derivatives("reference", True), derivatives(backend.name, False)
    for ours, expected in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        scale = max(1.0, largest(expected))
        assert_close(ours, as_float64(expected), backend.dtype, "second", scale=scale)


# ---- what must have no influence -----------------------------------------------------------------


def blind_rows(backend):
    """A mask array in which some rows, and all rows of one batch entry, see nothing."""
    size = backend.size
    allowed = np.random.default_rng(0).random((2, 1, size.queries, size.keys)) < 0.7
    allowed[0, 0, 2:5] = False
    allowed[1] = False
    return allowed


@pytest.mark.parametrize("name", cases.NORMALIZERS)
def test_rows_that_see_no_key_are_zeros_in_value_and_gradient(backend, name):
    size, allowed = backend.size, blind_rows(backend)
    pair = dataclasses.replace(
        cases.array_mask(allowed.shape, 0), term=masks.ArrayMask(jnp.asarray(allowed))
    )
    call = Call(size, pair, (cases.modifier("alibi", size),), name)
    out, lse, gradient = cases.gradients(call, backend, backend.dtype, backend.blocks)
    blind = ~allowed[:, 0].any(-1)
    assert blind.sum() == 3 + size.queries
    np.testing.assert_array_equal(as_float64(out)[blind], 0)
    if name in ("softmax", "softplus l1"):
        assert np.all(np.isneginf(np.swapaxes(lse, -1, -2)[blind]))
    query, key, value = map(as_float64, gradient[0])
    np.testing.assert_array_equal(query[blind], 0)
    for x in (query, key, value):
        np.testing.assert_array_equal(x[1], 0)
        assert np.all(np.isfinite(x))
        assert largest(x[0]) > 0


def poisoned(x, where, rng):
    poison = rng.choice([np.nan, np.inf, -np.inf], size=x.shape).astype(np.float32)
    return np.where(where, poison, x)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("as_formula", [True, False], ids=["formula", "array"])
def test_what_is_masked_may_hold_anything(backend, kind, as_formula, rng):
    size = backend.size
    query, key, value = draw.inputs(size, 0)
    lengths = np.array([size.keys, size.keys // 2 + 2], np.int32)
    rows = np.array([size.queries - 2, size.queries], np.int32)
    seen = np.arange(size.keys) < np.minimum(lengths, size.keys - 3)[:, None]
    sees = np.arange(size.queries) < rows[:, None]
    bad, blind = ~seen[..., None, None], ~sees[..., None, None]
    mask = masks.KeyPadding(jnp.asarray(lengths)) & masks.Prefix(size.keys - 3)
    mask = mask & masks.QueryPadding(jnp.asarray(rows))
    if not as_formula:
        allowed = seen[:, None, None, :] & sees[:, None, :, None]
        mask = masks.ArrayMask(jnp.asarray(allowed))

    def loss(arrays, mask):
        out = attnlab.attention(
            *arrays, mask=mask, implementation=backend.name, block_sizes=backend.blocks,
            normalizer={"softmax": normalizers.Softmax(), "sigmoid": normalizers.Sigmoid()}[kind],
        )  # fmt: skip
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    slope = backend.jit(jax.grad(loss, has_aux=True))
    found = []
    places = (blind, bad, bad)
    for clean in (True, False):
        arrays = tuple(
            np.where(where, 0, x) if clean else poisoned(x, where, rng)
            for x, where in zip((query, key, value), places, strict=True)
        )
        arrays = tuple(jnp.asarray(x).astype(backend.dtype) for x in arrays)
        found.append(slope(arrays, mask))
    assert np.all(np.isfinite(as_float64(found[0][1])))
    jax.tree.map(np.testing.assert_array_equal, found[1], found[0])
    for x, where in zip(found[1][0], places, strict=True):
        np.testing.assert_array_equal(np.where(where, as_float64(x), 0), 0)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_nan_is_seen_by_those_who_see_it_and_by_no_one_else(backend, kind):
    """Under a causal mask, key p is seen from row p on; a poisoned query by its own row alone."""
    size = dataclasses.replace(backend.size, batch=())
    place = size.queries // 2

    def loss(arrays):
        out = attnlab.attention(
            *arrays, mask=masks.Causal(), implementation=backend.name, block_sizes=backend.blocks,
            normalizer=normalizers.Softmax() if kind == "softmax" else normalizers.Sigmoid(),
        )  # fmt: skip
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    run = backend.jit(jax.grad(loss, has_aux=True))
    clean = tuple(jnp.asarray(x).astype(backend.dtype) for x in draw.inputs(size, 0))
    expected_gradient, expected = run(clean)
    rows = np.arange(size.queries)
    for index, name in enumerate(("query", "key", "value")):
        arrays = list(clean)
        arrays[index] = arrays[index].at[place].set(jnp.nan)
        gradient, out = run(tuple(arrays))
        touched = rows == place if name == "query" else rows >= place
        bad = np.isnan(as_float64(out)).all((-1, -2))
        np.testing.assert_array_equal(bad, touched, err_msg=name)
        for ours, right in ((out, expected), (gradient[0], expected_gradient[0])):
            np.testing.assert_array_equal(
                as_float64(ours)[~touched], as_float64(right)[~touched], err_msg=name
            )


def test_masked_modifiers_may_hold_anything(backend):
    size = dataclasses.replace(backend.size, batch=())
    arrays = tuple(jnp.asarray(x).astype(backend.dtype) for x in draw.inputs(size, 0))
    future = np.arange(size.keys) > np.arange(size.queries)[:, None]
    bias = np.random.default_rng(0).standard_normal((size.heads, *future.shape))

    def loss(bias, arrays):
        out = attnlab.attention(
            *arrays, mask=masks.Causal(), modifiers=scores.Bias(bias),
            implementation=backend.name, block_sizes=backend.blocks,
        )  # fmt: skip
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    slope = backend.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    clean = slope(jnp.asarray(np.where(future, 0, bias), jnp.float32), arrays)
    for poison in (np.nan, np.inf, -np.inf):
        got = slope(jnp.asarray(np.where(future, poison, bias), jnp.float32), arrays)
        jax.tree.map(np.testing.assert_array_equal, got, clean)


def test_tiles_without_a_pair_are_not_touched(backend, planting):
    """NaN in what only empty tiles could read, handed to the kernel as it lies in memory."""
    from attnlab.core import kernels

    # Otherwise NaN is kept apart before any kernel runs, and this would prove nothing.
    planting.setattr(kernels, "isolate_bad", lambda key, value: (key, value))
    planting.setattr(kernels, "zero_bad", lambda x: x)
    rows, cols = backend.blocks
    size = draw.Sizes((), rows, 3 * cols, 2, 1, 8, 8)
    query, key, value = draw.inputs(size, 0)
    for x in (key, value):
        x[cols : 2 * cols] = np.nan
    arrays = tuple(jnp.asarray(x).astype(backend.dtype) for x in (query, key, value))

    def loss(arrays, mask):
        out = attnlab.attention(
            *arrays, mask=mask, implementation=backend.name, block_sizes=(rows, cols)
        )
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    slope = backend.jit(jax.grad(loss, has_aux=True))
    live = jnp.asarray([[[True, False, True]]])
    gradient, out = slope(arrays, masks.Blocks(live, (rows, cols)))
    assert np.all(np.isfinite(as_float64(out)))
    assert all(np.all(np.isfinite(as_float64(g))) for g in gradient)
    for g in gradient[1:]:
        np.testing.assert_array_equal(as_float64(g)[cols : 2 * cols], 0)
    # The probe can fail: with one pair of it allowed, the block is touched.
    seen = np.ones((rows, 3 * cols), bool)
    seen[1:, cols : 2 * cols] = False
    assert np.all(np.isnan(as_float64(slope(arrays, masks.ArrayMask(jnp.asarray(seen)))[1])))


def test_tiles_handed_to_a_kernel_are_those_of_the_plan_and_no_more(backend, planting):
    """A causal mask over four by four tiles: six empty, six full and not masked, four masked."""
    from attnlab.core import kernels
    from pallas_kernels.flash import plan

    found = []
    launch = kernels.launch_forward

    def record(name, spec, interpreted, splits, arrays):
        found.append(jax.tree.map(np.asarray, kernels_lists()))
        return launch(name, spec, interpreted, splits, arrays)

    make = "make_flat" if backend.name == "tpu" else "make_lists"
    made, making = [], getattr(plan, make)

    def kernels_lists():
        return made[-1]

    def keep(some, every):
        made.append(making(some, every))
        return made[-1]

    planting.setattr(kernels, "launch_forward", record)
    planting.setattr(plan, make, keep)
    block = max(backend.blocks)
    size = draw.Sizes((), 4 * block, 4 * block, 1, 1, 8, 8)
    arrays = tuple(jnp.asarray(x).astype(backend.dtype) for x in draw.inputs(size, 0))
    mask = masks.Causal()
    counts = mask.plan(size.queries, size.keys, (block, block)).counts()
    assert counts == {"empty": 6, "full": 6, "partial": 4}

    def trace(arrays):
        return attnlab.attention(
            *arrays, mask=mask, implementation=backend.name, block_sizes=(block, block)
        )

    with backend.running():
        jax.eval_shape(trace, arrays)
    (lists,) = found
    if backend.name == "tpu":
        assert int(lists.total) == 10
        assert np.sum((lists.flags & plan.MASKED) > 0) == 4
        assert not np.any(lists.flags & (plan.DEAD | plan.SKIP))
    else:
        np.testing.assert_array_equal(lists.count[0, 0], [1, 2, 3, 4])
        np.testing.assert_array_equal(lists.full[0, 0], [0, 1, 2, 3])


def test_two_runs_are_equal_bit_by_bit(backend):
    call = cases.calls(backend)["causal with bias"]
    first, second = (
        cases.gradients(call, backend, backend.dtype, backend.blocks) for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


# ---- block lists made of data --------------------------------------------------------------------


def test_block_lists_may_be_data_and_are_compiled_once(backend):
    size = backend.size
    rows, cols = backend.blocks
    blocks = -(-size.queries // rows), -(-size.keys // cols)
    arrays = tuple(jnp.asarray(x).astype(backend.dtype) for x in draw.inputs(size, 0))
    traces = []

    def loss(arrays, index, name):
        mask = masks.Blocks.from_lists(index, blocks[1], (rows, cols))
        out = attnlab.attention(
            *arrays, mask=mask, implementation=name,
            block_sizes=(rows, cols) if name != "reference" else None,
        )  # fmt: skip
        traces.append(name)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    slope = backend.jit(jax.grad(lambda *x: loss(*x, backend.name), has_aux=True))
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        shape = (*size.batch, size.heads, blocks[0], 2)
        index = jnp.asarray(rng.integers(-1, blocks[1], shape).astype(np.int32))
        gradient, out = slope(arrays, index)
        expected = jax.grad(lambda x, i: loss(x, i, "reference"), has_aux=True)(wide, index)
        assert_close(out, as_float64(expected[1]), backend.dtype)
        for ours, right in zip(gradient, expected[0], strict=True):
            scale = max(1.0, largest(right))
            assert_close(ours, as_float64(right), backend.dtype, "gradient", scale=scale)
    assert traces.count(backend.name) == 1


def test_a_list_for_each_head_and_entry_meets_its_own_blocks(backend):
    """Values of one in a single key block: the output says which rows may see it."""
    rows, cols = backend.blocks
    size = draw.Sizes((2,), 2 * rows, 2 * cols, 2, 1, 8, 4)
    query, key, value = draw.inputs(size, 0)
    value = np.zeros_like(value)
    value[:, cols:] = 1
    index = jnp.asarray(
        [[[[0], [1]], [[1], [0]]], [[[0], [-1]], [[-1], [1]]]], jnp.int32
    )  # b n i m
    arrays = tuple(jnp.asarray(x).astype(backend.dtype) for x in (query, key, value))

    def compute(x, index):
        mask = masks.Blocks.from_lists(index, 2, (rows, cols))
        return attnlab.attention(
            *x, mask=mask, implementation=backend.name, block_sizes=(rows, cols)
        )

    out = backend.jit(compute)(arrays, index)
    seen = as_float64(out)[:, ::rows, :, 0]  # b i n
    np.testing.assert_allclose(seen[0], [[0, 1], [1, 0]], atol=1e-3)
    np.testing.assert_allclose(seen[1], [[0, 0], [0, 1]], atol=1e-3)


# ---- refusals ------------------------------------------------------------------------------------


def attend(backend, dtype=None, width=8, length=20, **options):
    size = draw.Sizes((), length, length, 2, 1, width, width)
    arrays = [jnp.asarray(x).astype(dtype or backend.dtype) for x in draw.inputs(size, 0)]
    options = {"implementation": backend.name, **options}
    with backend.running():
        return attnlab.attention(*arrays, **options)


def refused(backend, **options):
    with pytest.raises(NotImplementedError, match=f'implementation="{backend.name}"') as found:
        attend(backend, **options)
    message = str(found.value)
    offered = [n for n in ("blockwise", "reference", "triton") if f'"{n}" can' in message]
    assert offered, message
    kept = {k: v for k, v in options.items() if k != "implementation"}
    attend(backend, implementation=offered[0], **kept)  # and it does


def test_float64_is_refused(backend):
    with jax.enable_x64(True):
        refused(backend, dtype=jnp.float64)


def test_wide_heads_are_refused(backend):
    refused(backend, width=257)


def test_whole_row_normalizers_are_refused(backend):
    refused(backend, normalizer=normalizers.Sparsemax())
    refused(backend, normalizer=normalizers.Entmax15())


def test_an_array_without_axes_is_refused(backend):
    bias = jnp.ones((20, 20))

    def add(score, at, bias):
        return score + bias.reshape((1,) * (score.ndim - 2) + bias.shape)

    refused(backend, modifiers=scores.ScoreFunction(add, bias))


def test_a_gather_in_user_code_is_refused(backend):
    table = jnp.ones((2, 40))

    def add(score, at, table):
        return score + table[at.head, jnp.abs(at.relative)]

    refused(backend, modifiers=scores.ScoreFunction(add, table, "N *"))


def test_a_dtype_that_the_backend_lacks_is_refused(backend):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        if dtype not in backend.dtypes:
            refused(backend, dtype=dtype)


def test_odd_tiles_are_refused(backend):
    refused(backend, block_sizes=(20, 24))


def test_blocks_finer_than_any_tile_are_refused(backend):
    live = jnp.ones((1, 3, 3), bool)
    refused(backend, mask=masks.Blocks(live, (8, 8)))


def test_the_wrong_machine_is_named_and_nothing_else_runs(backend):
    if not backend.interpreted:
        pytest.skip("the device is here")
    arrays = [jnp.asarray(x).astype(backend.dtype) for x in draw.inputs(backend.size, 0)]
    with pytest.raises(NotImplementedError, match=r'needs an? .*"(blockwise|reference)" can'):
        attnlab.attention(*arrays, implementation=backend.name)
    assert attnlab.core.attention.availability()[backend.name].startswith("needs a")


def test_block_numbers_out_of_range_are_refused():
    for bad in (-2, 3):
        index = jnp.asarray([[[0, bad]]])
        with pytest.raises(ValueError, match=rf"index: expected block numbers.*to 2, got {bad}"):
            masks.Blocks.from_lists(index, 3, (16, 16))
    with pytest.raises(TypeError, match=r"index: expected integers, got dtype float32"):
        masks.Blocks.from_lists(jnp.zeros((1, 1, 1)), 3, (16, 16))
