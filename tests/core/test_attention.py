"""The front door against the formula: every implementation, over drawn structure and all dtypes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import attention, masks, normalizers, scores
from tests import oracles
from tests.core import draw
from tests.core.test_normalizers import NORMALIZERS
from tests.tolerances import (
    as_float64,
    assert_close,
    assert_reordered,
    assert_within_budget,
    largest,
)

PLAIN_JAX = ("reference", "blockwise")


@contextlib.contextmanager
def allowed_to_refuse(implementation):
    """jax.nn may refuse, naming what can; its derivatives need the standard promotion of dtypes."""
    if implementation in PLAIN_JAX:
        yield
        return
    try:
        with jax.numpy_dtype_promotion("standard"):
            yield
    except NotImplementedError as refusal:
        draw.check_refusal(refusal)


def value_width(implementation):
    """jax.nn takes no values narrower than the keys."""
    return 4 if implementation == "xla" else 3


BLOCKS = (16, 16)


def check(size, ours, theirs, implementation, dtype, seed, magnitude=1.0, **common):
    """One call against the formula: within the derived budget, empty rows exactly zero."""
    arrays = [jnp.asarray(x).astype(dtype) for x in draw.inputs(size, seed, magnitude)]
    if implementation == "blockwise":
        ours = {"block_sizes": BLOCKS, **ours}

    @jax.jit
    def call(arrays):
        return attention(*arrays, implementation=implementation, **ours, **common)

    got = call(arrays)
    wide = [as_float64(x) for x in arrays]
    exact, lse = oracles.attention(*wide, **theirs, **common, return_lse=True)
    plain = oracles.attention(*wide, **theirs, **common, dtype=dtype)
    assert got.dtype == dtype
    assert got.shape == (*size.batch, size.queries, size.heads, size.value_width)
    assert_within_budget(got, exact, plain, dtype)
    if "mask" in theirs:
        i = common.get("query_offset", 0) + np.arange(size.queries)[:, None]
        j = common.get("key_offset", 0) + np.arange(size.keys)[None, :]
        shape = (*size.batch, size.heads, size.queries, size.keys)
        blind = ~np.broadcast_to(theirs["mask"](i, j), shape).any(-1)
        np.testing.assert_array_equal(np.swapaxes(as_float64(got), -2, -3)[blind], 0.0)
    return lse


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", PLAIN_JAX)
@settings(max_examples=8)
@given(data=st.data())
def test_drawn_structure_equals_the_formula(implementation, dtype, data):
    size = data.draw(draw.sizes())
    mask = draw.mask_pair(data, size, depth=1)
    modifiers = draw.modifier_pairs(data, size)
    names = [n for n in NORMALIZERS if n not in ("sparsemax", "entmax 1.5")]
    if implementation == "reference":
        names = list(NORMALIZERS)
    name = data.draw(st.sampled_from([n for n in names if "sink" not in n or size.heads == 2]))
    query_offset = data.draw(st.sampled_from([0, 5]))
    normalizer, oracle = NORMALIZERS[name]
    check(
        size,
        {
            "mask": mask.term,
            "modifiers": tuple(m.term for m in modifiers),
            "normalizer": normalizer,
        },
        {"mask": mask.oracle, "modifiers": [m.oracle for m in modifiers], "normalizer": oracle},
        implementation,
        dtype,
        data.draw(st.integers(0, 10**6)),
        data.draw(st.sampled_from([1.0, 1.0, 20.0])),
        query_offset=query_offset,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@settings(max_examples=5)
@given(data=st.data())
def test_xla_equals_the_formula_or_says_that_it_cannot(dtype, data):
    size = data.draw(draw.sizes())
    mask = draw.mask_pair(data, size, depth=1)
    modifiers = draw.modifier_pairs(data, size, most=1)
    try:
        check(
            size,
            {"mask": mask.term, "modifiers": tuple(m.term for m in modifiers)},
            {"mask": mask.oracle, "modifiers": [m.oracle for m in modifiers]},
            "xla",
            dtype,
            data.draw(st.integers(0, 10**6)),
        )
    except NotImplementedError as refusal:
        draw.check_refusal(refusal)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "xla"])
@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"]
)
@pytest.mark.parametrize("length", [1, 63, 1000])
def test_awkward_lengths(implementation, dtype, length):
    size = draw.Sizes((), length, length, 2, 1, 8, 8)
    ours, theirs = {"mask": masks.Causal()}, {"mask": oracles.causal()}
    with allowed_to_refuse(implementation):
        check(size, ours, theirs, implementation, dtype, length)


@pytest.mark.parametrize("implementation", PLAIN_JAX)
@pytest.mark.parametrize("block_sizes", [(1, 1), (7, 64), (64, 7), (512, 512), None])
def test_any_block_sizes(implementation, block_sizes):
    if implementation == "reference":
        pytest.skip("the reference has no blocks")
    size = draw.Sizes((2,), 63, 41, 2, 1, 4, 4)
    if block_sizes == (1, 1):
        size = draw.Sizes((2,), 9, 5, 2, 1, 4, 4)
    ours = {"mask": masks.SlidingWindow(9, 3), "block_sizes": block_sizes}
    check(size, ours, {"mask": oracles.window(9, 3)}, "blockwise", jnp.float32, 0)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "xla"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 2), (0,)], ids=str)
def test_any_number_of_batch_axes(implementation, batch):
    if implementation == "xla" and len(batch) > 1:
        pytest.skip("jax.nn takes one batch axis")
    size = draw.Sizes(batch, 7, 5, 4, 2, 4, value_width(implementation))
    arrays = draw.inputs(size, 0)
    got = attention(*map(jnp.asarray, arrays), implementation=implementation)
    assert got.shape == (*batch, 7, 4, value_width(implementation))
    assert_close(got, oracles.attention(*map(as_float64, arrays)), np.float32)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "xla"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_grouped_heads_are_repeated_heads(implementation, kv_heads):
    size = draw.Sizes((2,), 9, 9, 8, kv_heads, 4, value_width(implementation))
    query, key, value = map(jnp.asarray, draw.inputs(size, 1))
    grouped = attention(query, key, value, implementation=implementation)
    repeat = 8 // kv_heads
    repeated = attention(
        query,
        jnp.repeat(key, repeat, axis=-2),
        jnp.repeat(value, repeat, axis=-2),
        implementation=implementation,
    )
    assert_reordered(grouped, repeated, np.float32)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "xla"])
def test_scale(implementation):
    size = draw.Sizes((2,), 5, 7, 4, 2, 4, value_width(implementation))
    arrays = draw.inputs(size, 0)
    for scale in (0.0, 0.1, 2.0):
        got = attention(*map(jnp.asarray, arrays), scale=scale, implementation=implementation)
        exact = oracles.attention(*map(as_float64, arrays), scale=scale)
        assert_close(got, exact, np.float32)


# ---- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_offsets_may_be_traced(implementation):
    size = draw.Sizes((2,), 5, 40, 2, 1, 4, 4)
    arrays = draw.inputs(size, 0)
    slopes = np.array([0.5, 0.25], np.float32)

    @jax.jit
    def call(query_offset, key_offset):
        return attention(
            *map(jnp.asarray, arrays),
            mask=masks.Causal() & masks.SlidingWindow(11),
            modifiers=scores.AlibiSlopes(jnp.asarray(slopes)),
            query_offset=query_offset,
            key_offset=key_offset,
            implementation=implementation,
            block_sizes=BLOCKS if implementation == "blockwise" else None,
        )

    for offsets in [(0, 0), (17, 0), (35, 0), (100, 80), (3, 20)]:
        exact = oracles.attention(
            *map(as_float64, arrays),
            mask=oracles.both(oracles.causal(), oracles.window(11)),
            modifiers=[oracles.alibi(slopes)],
            query_offset=offsets[0],
            key_offset=offsets[1],
        )
        assert_close(call(*map(jnp.asarray, offsets)), exact, np.float32)
    gradient = jax.grad(lambda q: jnp.sum(attention(
        q, *map(jnp.asarray, arrays[1:]), mask=masks.Causal(), query_offset=jnp.asarray(9),
        implementation=implementation)))(jnp.asarray(arrays[0]))  # fmt: skip
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_only_the_difference_of_the_offsets_matters(implementation):
    arrays = list(map(jnp.asarray, draw.inputs(draw.SIZES[3], 0)))
    options = {
        "mask": masks.SlidingWindow(9, 2),
        "modifiers": scores.AlibiSlopes(jnp.asarray([0.5, 0.1])),
        "implementation": implementation,
    }
    at_zero = attention(*arrays, **options, query_offset=20)
    far_away = attention(*arrays, **options, query_offset=100_020, key_offset=100_000)
    assert_reordered(far_away, at_zero, np.float32)


# ---- the log-sum-exp -----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", PLAIN_JAX)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["softmax", "softmax with sink", "softmax plus one", "softplus l1"]
)
def test_the_log_of_the_normalising_sum(implementation, dtype, name):
    size = draw.Sizes((2,), 20, 33, 2, 1, 4, 4)
    arrays = [jnp.asarray(x).astype(dtype) for x in draw.inputs(size, 3)]
    normalizer, oracle = NORMALIZERS[name]
    _out, lse = attention(
        *arrays,
        mask=masks.Causal() & masks.Prefix(30),
        normalizer=normalizer,
        key_offset=4,
        return_lse=True,
        implementation=implementation,
    )
    _exact, expected = oracles.attention(
        *map(as_float64, arrays),
        mask=oracles.both(oracles.causal(), oracles.prefix(30)),
        normalizer=oracle,
        key_offset=4,
        return_lse=True,
    )
    assert lse.shape == (2, 2, 20)
    assert lse.dtype == jnp.float32
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected))
    seen = np.isfinite(expected)
    assert_close(np.asarray(lse)[seen], expected[seen], np.float32)


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_keys_in_two_halves_merge_by_their_lse(implementation):
    query, key, value = map(jnp.asarray, draw.inputs(draw.SIZES[3], 2))
    options = {
        "mask": masks.SlidingWindow(25, 5),
        "return_lse": True,
        "implementation": implementation,
    }
    whole, lse = attention(query, key, value, **options)
    parts = [
        attention(query, key[..., a:b, :, :], value[..., a:b, :, :], key_offset=a, **options)
        for a, b in ((0, 17), (17, 40))
    ]
    merged_lse = np.logaddexp(parts[0][1], parts[1][1])
    merged = sum(
        np.asarray(out) * np.moveaxis(np.exp(part - merged_lse), -1, -2)[..., None]
        for out, part in parts
    )
    assert_close(merged, as_float64(whole), np.float32)
    assert_close(merged_lse, as_float64(lse), np.float32)


# ---- what must have no influence -----------------------------------------------------------------


def poisoned(x, where, rng):
    """NaN and infinities in the given places."""
    poison = rng.choice([np.nan, np.inf, -np.inf], size=x.shape).astype(np.float32)
    return jnp.asarray(np.where(where, poison, x))


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "xla"])
@pytest.mark.parametrize("as_formula", [True, False], ids=["formula", "array"])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "sparsemax"])
def test_masked_keys_and_values_may_hold_anything(implementation, as_formula, normalizer, rng):
    size = draw.Sizes((2,), 9, 20, 4, 2, 4, value_width(implementation))
    query, key, value = draw.inputs(size, 0)
    lengths = np.array([20, 13])
    mask = masks.KeyPadding(jnp.asarray(lengths)) & masks.Prefix(18)
    bad = (np.arange(20) >= np.minimum(lengths, 18)[:, None])[..., None, None]
    if not as_formula:
        mask = jnp.asarray(~bad[:, None, None, :, 0, 0] & np.ones((2, 1, 9, 20), bool))
    if implementation != "reference" and normalizer == "sparsemax":
        pytest.skip("needs whole rows")
    if implementation == "xla" and normalizer == "sigmoid":
        pytest.skip("xla knows softmax only")

    def run(key, value):
        def loss(query, key, value):
            out = attention(
                query,
                key,
                value,
                mask=mask,
                normalizer=NORMALIZERS[normalizer][0],
                implementation=implementation,
            )
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
            jnp.asarray(query), key, value
        )

    try:
        (_, clean), clean_gradient = run(
            jnp.asarray(np.where(bad, 0, key)), jnp.asarray(np.where(bad, 0, value))
        )
        (_, out), gradient = run(poisoned(key, bad, rng), poisoned(value, bad, rng))
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    np.testing.assert_array_equal(out, clean)
    for ours, expected in zip(gradient, clean_gradient, strict=True):
        np.testing.assert_array_equal(ours, expected)
    for ours in gradient[1:]:
        np.testing.assert_array_equal(np.where(bad, ours, 0), 0)


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_a_visible_nan_is_seen_by_those_who_see_it_and_by_no_one_else(implementation):
    size = draw.Sizes((), 12, 12, 1, 1, 4, 3)
    query, key, value = draw.inputs(size, 0)
    for poison in ("key", "value"):
        arrays = {"query": query, "key": key.copy(), "value": value.copy()}
        arrays[poison][5] = np.nan
        out = np.asarray(
            attention(
                **{k: jnp.asarray(v) for k, v in arrays.items()},
                mask=masks.Causal(),
                implementation=implementation,
            )
        )
        assert np.all(np.isfinite(out[:5]))
        assert np.all(np.isnan(out[5:]))


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_masked_modifiers_may_hold_anything(implementation):
    size = draw.Sizes((), 6, 6, 2, 1, 4, 3)
    arrays = list(map(jnp.asarray, draw.inputs(size, 0)))
    future = np.triu(np.ones((6, 6), bool), 1)

    def loss(bias, arrays):
        out = attention(
            *arrays, mask=masks.Causal(), modifiers=scores.Bias(bias), implementation=implementation
        )
        return jnp.sum(jnp.sin(out))

    rng = np.random.default_rng(0)
    bias = np.where(future, 0, rng.standard_normal((2, 6, 6))).astype(np.float32)
    clean = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(bias), arrays)
    for poison in (np.nan, np.inf, -np.inf):
        got = jax.value_and_grad(loss, argnums=(0, 1))(
            jnp.asarray(np.where(future, poison, bias).astype(np.float32)), arrays
        )
        jax.tree.map(np.testing.assert_array_equal, got, clean)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "xla"])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_row_that_sees_nothing_is_zero_in_value_and_gradient(implementation, name):
    size = draw.Sizes((2,), 6, 6, 2, 1, 4, value_width(implementation))
    arrays = tuple(map(jnp.asarray, draw.inputs(size, 0)))
    blind = np.zeros((2, 1, 6, 1), bool)
    blind[0, 0, 2] = blind[1, 0, :] = True

    def loss(arrays):
        out = attention(
            *arrays,
            mask=jnp.asarray(~blind & np.ones((2, 1, 6, 6), bool)),
            normalizer=NORMALIZERS[name][0],
            implementation=implementation,
        )
        return jnp.sum(jnp.cos(out + 1)), out

    try:
        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    except NotImplementedError as refusal:
        draw.check_refusal(refusal)
        return
    np.testing.assert_array_equal(out[0, 2], 0)
    np.testing.assert_array_equal(out[1], 0)
    assert all(np.all(np.isfinite(g)) for g in gradient)
    np.testing.assert_array_equal(gradient[0][0, 2], 0)
    for g in gradient:
        np.testing.assert_array_equal(g[1], 0)
    assert largest(gradient[2][0]) > 0


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "xla"])
@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"]
)
def test_scores_of_ten_thousand_stay_finite(implementation, dtype):
    size = draw.Sizes((), 8, 12, 2, 1, 4, value_width(implementation))
    query, key, value = (jnp.asarray(x).astype(dtype) for x in draw.inputs(size, 0))
    query, key = 200 * query, 100 * key

    def loss(query, key, value):
        out = attention(
            query, key, value, mask=masks.SlidingWindow(4), implementation=implementation
        )
        return jnp.sum(out.astype(jnp.float32)), out

    with allowed_to_refuse(implementation):
        slope = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        gradient, out = slope(query, key, value)
        assert np.all(np.isfinite(as_float64(out)))
        assert all(np.all(np.isfinite(as_float64(g))) for g in gradient)
        wide = [as_float64(x) for x in (query, key, value)]
        exact = oracles.attention(*wide, mask=oracles.window(4))
        plain = oracles.attention(*wide, mask=oracles.window(4), dtype=dtype)
        if np.all(np.isfinite(plain)):  # in float16 the plain formula overflows
            assert_within_budget(out, exact, plain, dtype)


# ---- transformations -----------------------------------------------------------------------------


def transformed(implementation):
    """A function with parameters, mask data and an offset: a transformation meets them all."""

    def call(query, key, value, slopes, length, offset):
        return attention(
            query,
            key,
            value,
            mask=masks.Causal() & masks.KeyPadding(length),
            modifiers=scores.AlibiSlopes(slopes),
            query_offset=offset,
            implementation=implementation,
            block_sizes=(8, 8) if implementation == "blockwise" else None,
        )

    return call


def stacked(count):
    size = draw.Sizes((count,), 11, 17, 2, 1, 4, 3)
    query, key, value = map(jnp.asarray, draw.inputs(size, 0))
    slopes = jnp.asarray(np.linspace(0.1, 1, 2 * count), jnp.float32).reshape(count, 2)
    lengths = jnp.asarray(np.arange(count) * 5 + 3, jnp.int32)
    return query, key, value, slopes, lengths, jnp.arange(count, dtype=jnp.int32) * 4


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_vmap_of_everything_equals_a_loop(implementation):
    call, args = transformed(implementation), stacked(3)
    mapped, alone = jax.jit(jax.vmap(call))(*args), jax.jit(call)
    for n in range(3):
        assert_reordered(mapped[n], alone(*(x[n] for x in args)), np.float32)

    def loss(*args):
        return jnp.sum(jnp.sin(call(*args)))

    slope = jax.grad(loss, argnums=(0, 1, 2, 3))
    gradient, one = jax.jit(jax.vmap(slope))(*args), jax.jit(slope)
    for n in range(3):
        for ours, expected in zip(gradient, one(*(x[n] for x in args)), strict=True):
            assert_close(ours[n], expected, np.float32, "gradient")


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_vmap_of_some_arguments_sums_the_gradients_of_the_others(implementation):
    call, (query, key, value, slopes, _, _) = transformed(implementation), stacked(3)
    length, offset = jnp.asarray(12), jnp.asarray(5)

    def loss(key, value, slopes):
        out = jax.vmap(lambda q: call(q, key, value, slopes, length, offset))(query)
        return jnp.sum(jnp.sin(out))

    def loop(key, value, slopes):
        out = [call(query[n], key, value, slopes, length, offset) for n in range(3)]
        return jnp.sum(jnp.sin(jnp.stack(out)))

    args = key[0], value[0], slopes[0]
    gradients = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*args) for f in (loss, loop))
    for ours, expected in zip(*gradients, strict=True):
        assert_close(ours, expected, np.float32, "gradient", scale=max(1.0, largest(expected)))


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_vmap_of_hessian_vector_products(implementation):
    call, args = transformed(implementation), stacked(2)

    def product(query, *rest):
        slope = jax.grad(lambda q: jnp.sum(jnp.sin(call(q, *rest))))
        return jax.jvp(slope, (query,), (jnp.ones_like(query),))[1]

    mapped, alone = jax.jit(jax.vmap(product))(*args), jax.jit(product)
    for n in range(2):
        assert_close(mapped[n], alone(*(x[n] for x in args)), np.float32, "second")


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_scan_and_checkpoint_change_nothing(implementation):
    call, args = transformed(implementation), stacked(3)

    def layers(wrap):
        def loss(value, slopes):
            def layer(x, per_layer):
                query, key, slope = per_layer
                out = wrap(call)(query, key, x, slope, jnp.asarray(15), jnp.asarray(6))
                return jnp.pad(out[:, :1], ((0, 6), (0, 0), (0, 0))), jnp.sum(out)

            last, sums = jax.lax.scan(layer, value, (args[0], args[1], slopes))
            return jnp.sum(jnp.sin(last)) + jnp.sum(sums)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(args[2][0], args[3])

    def unrolled(value, slopes):
        x, total = value, 0.0
        for n in range(3):
            out = call(args[0][n], args[1][n], x, slopes[n], jnp.asarray(15), jnp.asarray(6))
            x, total = jnp.pad(out[:, :1], ((0, 6), (0, 0), (0, 0))), total + jnp.sum(out)
        return jnp.sum(jnp.sin(x)) + total

    expected = jax.jit(jax.value_and_grad(unrolled, argnums=(0, 1)))(args[2][0], args[3])
    for wrap in (lambda f: f, jax.checkpoint):
        got = layers(wrap)
        jax.tree.map(lambda a, b: assert_close(a, b, np.float32, "gradient"), got, expected)


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_jacobian_of_a_causal_row_is_exactly_zero_in_the_future(implementation):
    size = draw.Sizes((), 7, 7, 2, 1, 3, 2)
    query, key, value = map(jnp.asarray, draw.inputs(size, 0))

    def call(key, value):
        return attention(
            query, key, value, mask=masks.Causal(), implementation=implementation,
            block_sizes=(4, 4) if implementation == "blockwise" else None,
        )  # fmt: skip

    for mode in (jax.jacrev, jax.jacfwd):
        for jacobian in jax.jit(mode(call, argnums=(0, 1)))(key, value):
            by_position = np.max(np.abs(jacobian), axis=(1, 2, 4, 5))
            np.testing.assert_array_equal(by_position[np.triu_indices(7, 1)], 0)
            assert np.all(np.diag(by_position)[1:] > 0)


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_dropout_keeps_the_stated_share_and_scales_it(implementation, keys):
    keys_count, rate = 64, 0.3
    query, key = jnp.zeros((2, 40, 4, 2)), jnp.zeros((2, keys_count, 4, 2))
    value = jnp.broadcast_to(jnp.eye(keys_count)[:, None, :], (2, keys_count, 4, keys_count))
    out = attention(
        query,
        key,
        value,
        dropout_rate=rate,
        dropout_key=keys("dropout"),
        implementation=implementation,
    )
    weights = np.asarray(out) * keys_count
    kept = weights > 0
    assert_close(weights[kept], np.full(kept.sum(), 1 / (1 - rate)), np.float32)
    count, share = kept.size, np.mean(kept)
    assert abs(share - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / count)
    for axis in range(4):  # no batch entry, query, head or key is favoured
        others = count / kept.shape[axis]
        by_axis = kept.mean(axis=tuple(a for a in range(4) if a != axis))
        assert np.max(np.abs(by_axis - (1 - rate))) < 5 * np.sqrt(rate * (1 - rate) / others)
    heads = kept.reshape(2, 40, 4, -1).astype(float)
    for a, b in ((0, 1), (1, 2), (2, 3)):  # and heads drop independently
        agreement = np.mean(heads[:, :, a] == heads[:, :, b])
        assert abs(agreement - (rate**2 + (1 - rate) ** 2)) < 0.05


@functools.partial(jax.jit, static_argnums=0, static_argnames=("rate", "block_sizes"))
def dropped(implementation, key, rate=0.4, block_sizes=None):
    size = draw.Sizes((2,), 21, 30, 4, 2, 4, 3)
    return attention(
        *map(jnp.asarray, draw.inputs(size, 0)),
        mask=masks.SlidingWindow(25, 3),
        dropout_rate=rate,
        dropout_key=key,
        implementation=implementation,
        block_sizes=block_sizes,
    )


def test_every_implementation_and_block_size_drops_the_same_pairs(keys):
    key = keys("dropout")
    reference = dropped("reference", key)
    for block_sizes in [(8, 8), (16, 5), None]:
        assert_close(
            dropped("blockwise", key, block_sizes=block_sizes), as_float64(reference), np.float32
        )


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_dropout_is_a_function_of_its_key(implementation, keys):
    first, second = keys("first", "second")
    np.testing.assert_array_equal(dropped(implementation, first), dropped(implementation, first))
    assert (
        np.mean(np.asarray(dropped(implementation, first) != dropped(implementation, second))) > 0.9
    )
    plain = dropped(implementation, None, rate=0.0)
    assert np.mean(np.asarray(plain != dropped(implementation, first))) > 0.9


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_dropout_equals_the_formula_with_the_same_pairs_kept(implementation, keys):
    from attnlab.core.dropout import keep_mask, key_words
    from attnlab.core.terms import Tile

    key, rate = keys("dropout"), 0.4
    kept = np.asarray(keep_mask(key_words(key), rate, Tile(0, 0, 21, 30, 4, 4).at(), (2,)))
    size = draw.Sizes((2,), 21, 30, 4, 2, 4, 3)
    exact = oracles.attention(
        *map(as_float64, draw.inputs(size, 0)),
        mask=oracles.window(25, 3),
        keep=kept,
        dropout_rate=rate,
    )
    assert_close(dropped(implementation, key), exact, np.float32)


@pytest.mark.parametrize("implementation", PLAIN_JAX)
def test_the_mean_over_dropout_keys_is_no_dropout(implementation):
    every = jax.random.split(jax.random.key(0), 400)
    many = jax.jit(jax.vmap(lambda key: dropped(implementation, key)))(every)
    plain = dropped(implementation, None, rate=0.0)
    spread = np.std(many, axis=0) / np.sqrt(len(every))
    assert np.max(np.abs(np.mean(many, axis=0) - np.asarray(plain)) / spread) < 5.5


def test_gradients_with_dropout_agree(keys):
    key = keys("dropout")
    size = draw.Sizes((2,), 9, 14, 4, 2, 4, 3)
    arrays = tuple(map(jnp.asarray, draw.inputs(size, 0)))

    def gradient(implementation):
        def loss(arrays):
            out = attention(
                *arrays,
                mask=masks.Causal(),
                query_offset=5,
                dropout_rate=0.3,
                dropout_key=key,
                implementation=implementation,
                block_sizes=(4, 8) if implementation == "blockwise" else None,
            )
            return jnp.sum(jnp.sin(out))

        slope = jax.grad(loss)
        return jax.jit(lambda x: (slope(x), jax.jvp(slope, (x,), (x,))[1]))(arrays)

    for ours, expected in zip(
        jax.tree.leaves(gradient("blockwise")), jax.tree.leaves(gradient("reference")), strict=True
    ):
        assert_close(ours, expected, np.float32, "second")


# ---- normalisers that cannot stream --------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparsemax", "entmax 1.5"])
def test_whole_row_normalizers_work_blockwise_or_are_refused(name):
    normalizer, oracle = NORMALIZERS[name]
    size = draw.Sizes((2,), 40, 33, 2, 1, 4, 3)
    try:
        check(size, {"normalizer": normalizer}, {"normalizer": oracle}, "blockwise", jnp.float32, 0)
    except NotImplementedError as refusal:
        draw.check_refusal(refusal)


def test_auto_runs_everything():
    size = draw.Sizes((2,), 9, 9, 2, 1, 4, 3)
    for name, (normalizer, oracle) in NORMALIZERS.items():
        arrays = draw.inputs(size, 0)
        got = attention(*map(jnp.asarray, arrays), mask=masks.Causal(), normalizer=normalizer)
        exact = oracles.attention(
            *map(as_float64, arrays), mask=oracles.causal(), normalizer=oracle
        )
        assert_close(got, exact, np.float32, words=name)


def test_sink_heads_must_match():
    size = draw.SIZES[1]
    with pytest.raises(ValueError, match=r"(?s)(normalizer|sink).*4.*3"):
        attention(
            *map(jnp.asarray, draw.inputs(size, 0)), normalizer=normalizers.Softmax(jnp.zeros(3))
        )
