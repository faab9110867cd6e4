"""What is particular to the TPU kernels: memory that is watched, the real compiler, packed lists.

That they compute the formula is in `test_flash.py`, with all other kernels.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import attnlab
from attnlab import masks, normalizers, scores
from attnlab.core import kernels
from attnlab.core.inputs import prepare
from attnlab.core.kernels import KernelFolds
from attnlab.core.reference import reference_attention
from attnlab.core.tiles import Signature
from pallas_kernels.flash import plan, tpu, tpu_code, tpu_layout
from pallas_kernels.flash.problem import Arrays, Flat, Leaf, Spec
from pallas_kernels.inspect import compile_tpu, tpu_missing
from tests.kernels import cases
from tests.tolerances import as_float64, assert_close

# Races between two cores, reads and writes out of bounds and blocks visited again raise; memory
# that nobody wrote is NaN.
WATCHED = pltpu.InterpretParams(
    detect_races=True,
    out_of_bounds_reads="raise",
    uninitialized_memory="nan",
    num_cores_or_threads=2,
)
BLOCKS = (32, 128)


@pytest.fixture
def watched(monkeypatch):
    """Kernels run in the interpreter that watches memory; call what uses them outside of `jit`."""

    def forward(_, spec, __, splits, arrays):
        return tpu.forward(spec, arrays, splits=splits, interpret=WATCHED)

    def backward(_, spec, __, wanted, inputs):
        return tpu.backward(spec, *inputs, wanted, interpret=WATCHED)

    monkeypatch.setattr(kernels, "launch_forward", forward)
    monkeypatch.setattr(kernels, "launch_backward", backward)
    yield
    pltpu.reset_tpu_interpret_mode_state()


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def a_call(lengths=(40, 200), heads=(2, 1), widths=(16, 24), batch=2, **options):
    """What the front door hands to a kernel."""
    (queries, keys), (n, k), (h, d) = lengths, heads, widths
    terms = {"mask": None, "modifiers": (), "normalizer": None, "dropout_rate": 0.0}
    terms |= {"dropout_key": None, "query_offset": 0} | options
    return prepare(
        normal(batch, queries, n, h), normal(batch, keys, k, h, seed=1),
        normal(batch, keys, k, d, seed=2), terms["mask"], terms["modifiers"], terms["normalizer"],
        None, terms["query_offset"], 0, terms["dropout_rate"], terms["dropout_key"], False, "tpu",
        None,
    )[0]  # fmt: skip


def by_query():
    """Heads that share a key head, an array per head, ragged lengths, a window, an offset."""
    return a_call(
        mask=masks.SlidingWindow(90, 0),
        modifiers=scores.AlibiSlopes(scores.alibi_slopes(2)),
        query_offset=150,
    )


def by_data():
    """Lists from data, one for each head, with rows that meet nothing, and a bias to each pair."""
    live = np.random.default_rng(3).random((2, 2, 2, 2)) < 0.6
    live[0, 0, 1] = False
    return a_call(
        mask=masks.Blocks(jnp.asarray(live), BLOCKS),
        modifiers=scores.Bias(normal(2, 40, 200, seed=4)),
    )


def by_table():
    """A table, one number to a query, one to a key, and to everything."""
    return a_call(
        modifiers=(
            scores.RelativeBias(normal(2, 12, seed=5), max_distance=40),
            scores.Temperature(jnp.exp(normal(2, 1, 40, 1, seed=6) / 4)),
            scores.Bias(normal(2, 1, 200, seed=7)),
            scores.SoftCap(jnp.float32(3)),
        ),
        mask=masks.Prefix(jnp.asarray([130, 0])) | masks.Causal(),
    )


def by_weight():
    """Weights that are not shared, and dropout."""
    return a_call(
        normalizer=normalizers.Sigmoid(),
        dropout_rate=0.3,
        dropout_key=jax.random.key(5),
        mask=masks.ArrayMask(jax.random.bernoulli(jax.random.key(6), 0.7, (2, 1, 40, 200))),
    )


def of_formula(call, cotangent):
    """Output, log-sum-exp and gradients of the formula, in float64."""
    with jax.enable_x64(True):

        def widen(x):
            x = np.asarray(x)
            return jnp.asarray(x.astype(np.float64) if x.dtype == np.float32 else x)

        key = call.dropout_key
        wide = jax.tree.map(widen, call._replace(dropout_key=None, scale=0.0, dropout_rate=0.0))
        wide = wide._replace(
            dropout_key=key, scale=call.scale, dropout_rate=call.dropout_rate,
            query_offset=call.query_offset, key_offset=call.key_offset,
        )  # fmt: skip
        signature, x, aux = Signature.of(wide, BLOCKS, BLOCKS)
        found, pull = jax.vjp(lambda x: reference_attention(signature.call(x, aux)), x)
        gradient = pull(tuple(map(widen, cotangent)))[0]
        return jax.tree.map(as_float64, (found, gradient))


@pytest.mark.parametrize("build", [by_query, by_data, by_table, by_weight])
def test_watched_memory_forward_and_backward(watched, build):
    call = build()
    signature, x, aux = Signature.of(call, BLOCKS, BLOCKS)
    folds = KernelFolds(signature, "tpu", True)
    out, lse = jax.jit(folds.forward, compiler_options=cases._CHEAP)(x, aux)
    rng = np.random.default_rng(9)
    seen = np.isfinite(lse)
    cotangent = (
        rng.standard_normal(out.shape).astype(np.float32),
        np.where(seen, rng.standard_normal(lse.shape), 0).astype(np.float32),
    )
    if call.normalizer.kind != "shared":
        cotangent = cotangent[0], np.zeros_like(cotangent[1])
    wanted = tuple(range(len(x)))
    pull = jax.jit(functools.partial(folds.backward, wanted), compiler_options=cases._CHEAP)
    gradient = pull(x, aux, out, lse, tuple(map(jnp.asarray, cotangent)))
    (exact, exact_lse), exact_gradient = of_formula(call, cotangent)
    assert_close(out, exact, np.float32, words="output")
    if call.normalizer.kind == "shared":
        np.testing.assert_array_equal(seen, np.isfinite(exact_lse))
        assert_close(np.asarray(lse)[seen], exact_lse[seen], np.float32, words="log-sum-exp")
    for number, (actual, expected) in enumerate(zip(gradient, exact_gradient, strict=True)):
        assert_close(actual, expected, np.float32, "gradient", words=f"gradient {number}")


class _Plain:
    """Softmax without mask or modifier."""

    shared = True

    def allowed(self, leaves, at):
        return at.key >= 0

    def evaluate(self, leaves, products, at):
        return products


def plain_problem(owner, other, flags, total=None, blocks=(8, 128), leaves=(), spec=()):
    """A call of 24 queries and 256 keys with a list written by hand."""
    described = tuple(leaf for leaf, _ in leaves)
    spec = Spec(_Plain(), described, 0.25, (24, 256), blocks, **dict(spec))
    rows = Flat(
        *(jnp.asarray(x, jnp.int32).reshape(1, 1, -1) for x in (owner, other, flags)),
        len(owner) if total is None else total,
    )
    shapes = ((1, 1, 24, 16), (1, 1, 256, 16), (1, 1, 256, 16))
    arrays = Arrays(
        *(normal(*s, seed=n) for n, s in enumerate(shapes)), [x for _, x in leaves], rows
    )
    return spec, arrays


def softmax(query, key, value):
    query, key, value = (as_float64(x)[0, 0] for x in (query, key, value))
    weights = np.exp(query @ key.T * 0.25)
    return weights / weights.sum(-1, keepdims=True) @ value


def test_a_list_by_hand_with_a_dead_row_and_steps_to_skip(watched):
    first, last, dead, skip = plan.FIRST, plan.LAST, plan.DEAD, plan.SKIP
    spec, arrays = plain_problem(
        [0, 0, 1, 2, 2], [0, 1, 0, 1, 1], [first, last, first | last | dead, first | last, skip]
    )
    out, lse = tpu.forward(spec, arrays, interpret=WATCHED)
    query, key, value = arrays[:3]
    assert_close(out[0, 0, 0, :8], softmax(query[:, :, :8], key, value), np.float32)
    np.testing.assert_array_equal(out[0, 0, 0, 8:16], 0)
    np.testing.assert_array_equal(lse[0, 0, 0, 8:16], -np.inf)
    half = softmax(query[:, :, 16:], key[:, :, 128:], value[:, :, 128:])
    assert_close(out[0, 0, 0, 16:], half, np.float32)


@pytest.mark.parametrize(
    ("fault", "lists", "words"),
    [
        ("a row visited again later", ([0, 1, 0], [0, 0, 1], [3, 3, 3]), "Revisited block"),
        ("keys beyond the last", ([0, 1, 2], [0, 2, 0], [3, 3, 3]), "Out-of-bounds block index"),
        ("a row beyond the last", ([0, 1, 3], [0, 0, 0], [3, 3, 3]), "Out-of-bounds block index"),
        ("more steps than listed", ([0, 1, 2], [0, 0, 0], [3, 3, 3], 4), "Out-of-bounds read"),
    ],
)
def test_planted_faults_in_a_list_are_caught(watched, fault, lists, words):
    spec, arrays = plain_problem(*lists)
    with pytest.raises(Exception, match=words):
        jax.block_until_ready(tpu.forward(spec, arrays, interpret=WATCHED))


def test_a_row_that_no_step_finishes_stays_nan(watched):
    spec, arrays = plain_problem([0, 1], [0, 0], [3, 3])
    out, _ = tpu.forward(spec, arrays, interpret=WATCHED)
    assert np.isnan(out[0, 0, 0, 16:]).all()
    assert np.isfinite(out[0, 0, 0, :16]).all()


@pytest.mark.parametrize("axis", ["parallel", "arbitrary"])
def test_a_planted_race_is_caught(watched, axis):
    """Two cores that write one block: why the axis of steps is not declared parallel."""

    def body(x_ref, out_ref):
        out_ref[...] = x_ref[...]

    def run():
        return pl.pallas_call(
            body,
            grid=(2,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=(axis,)),
            interpret=WATCHED,
        )(jnp.zeros((16, 128), jnp.float32))

    if axis == "arbitrary":
        jax.block_until_ready(run())
        return
    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(run())


def test_pages_scales_and_nan_on_pages_that_are_not_seen(watched):
    """Keys in int8 on pages in another order; what a page holds beyond its keys is NaN."""
    first, last, masked = plan.FIRST, plan.LAST, plan.MASKED
    rng = np.random.default_rng(0)
    pool = rng.integers(-127, 128, (2, 1, 1, 4 * 128, 16)).astype(np.int8)
    scale = np.full((2, 1, 1, 1, 256), 0.01, np.float32)
    scale[..., 200:] = np.nan
    spec, arrays = plain_problem(
        [0, 0, 1, 1, 2, 2], [0, 1] * 3, [first | masked, last | masked] * 3,
        leaves=[(Leaf("s", trainable=True), jnp.asarray(x)) for x in scale],
        spec={"scales": (0, 1), "isolated": True},
    )  # fmt: skip
    spec = Spec(**{**spec.__dict__, "lengths": (24, 200)})
    pages = jnp.asarray([[3, 1]], jnp.int32)
    arrays = arrays._replace(key=jnp.asarray(pool[0]), value=jnp.asarray(pool[1]), pages=pages)
    out, _ = tpu.forward(spec, arrays, interpret=WATCHED)
    read = [np.concatenate([x[:, :, 384:], x[:, :, 128:256]], 2)[:, :, :200] * 0.01 for x in pool]
    assert_close(out[0, 0, 0], softmax(arrays.query, *read), np.float32)

    floats = [x.astype(np.float32) for x in np.concatenate(read)[:, None]]
    rotten = [np.pad(x, [(0, 0), (0, 0), (0, 56), (0, 0)], constant_values=np.nan) for x in floats]
    spec = Spec(**{**spec.__dict__, "scales": None, "leaves": ()})
    arrays = arrays._replace(
        key=jnp.asarray(rotten[0]), value=jnp.asarray(rotten[1]), pages=None, leaves=[]
    )
    out, _ = tpu.forward(spec, arrays, interpret=WATCHED)
    assert_close(out[0, 0, 0], softmax(arrays.query, *floats), np.float32)


# ---- lists and tables ----------------------------------------------------------------------------


def test_words_of_a_list_say_what_the_list_says():
    rng = np.random.default_rng(0)
    shape = (2, 3, 5)
    flat = Flat(
        rng.integers(0, 1 << 14, shape), rng.integers(0, 1 << 14, shape),
        rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 11, plan.SKIP], shape), 5,
    )  # fmt: skip
    words = tpu_layout.Words.of(flat, (1 << 14, 1 << 14))
    for b, n, step in np.ndindex(*shape):
        word = words.at(words.words, b, n, step)
        flags = int(flat.flags[b, n, step])
        assert int(tpu_layout.owner_of(word)) == flat.owner[b, n, step]
        assert int(tpu_layout.other_of(word)) == flat.other[b, n, step]
        assert bool(tpu_layout.edge(word, plan.FIRST)) == bool(flags & plan.FIRST)
        assert bool(tpu_layout.edge(word, plan.LAST)) == bool(flags & plan.LAST)
        kinds = {
            plan.SKIP: tpu_layout.SKIPPED,
            plan.DEAD: tpu_layout.NOTHING,
            plan.MASKED: tpu_layout.PARTIAL,
        }
        kind = next((to for flag, to in kinds.items() if flags & flag), tpu_layout.FULL)
        assert int(word) & tpu_layout.KIND == kind


def test_lists_that_scalar_memory_cannot_hold_are_refused():
    def flat(*shape):
        return Flat(*(jax.ShapeDtypeStruct(shape, jnp.int32),) * 3, 1)

    with pytest.raises(NotImplementedError, match=r"1 MiB of scalar memory.*blockwise"):
        tpu_layout.Words.of(flat(8, 8, 4096), (64, 64))
    with pytest.raises(NotImplementedError, match=r"16384 blocks.*blockwise"):
        tpu_layout.Words.of(flat(1, 1, 8), (1 << 15, 64))
    with pytest.raises(NotImplementedError, match=r"which tiles are live.*blockwise"):
        jax.eval_shape(lambda: tpu_layout.Bits.of(jnp.zeros((8, 16, 2048, 64), bool)).words)


def test_bits_of_a_table_say_what_the_table_says():
    table = np.random.default_rng(1).random((2, 1, 3, 70)) < 0.5
    bits = tpu_layout.Bits.of(table)
    for b, i, j in np.ndindex(2, 3, 70):
        assert bool(bits.at(bits.words, b, 5, i, j)) == table[b, 0, i, j]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("size", [3, 128, 300])
def test_tables_are_looked_up_along_the_lanes(transposed, by_row, size):
    rng = np.random.default_rng(size)
    rows, cols = 16, 96
    values = np.zeros((rows if by_row else 1, -(-size // 128) * 128), np.float32)
    values[:, :size] = rng.standard_normal((values.shape[0], size))
    index = rng.integers(-1, size + 1, (rows, cols)).astype(np.int32)
    cotangent = rng.standard_normal((rows, cols)).astype(np.float32)
    inside = (index >= 0) & (index < size)
    place = np.where(inside, index, 0)
    expected = np.where(inside, np.take_along_axis(np.repeat(values, rows // len(values), 0),
                                                   place, 1), 0)  # fmt: skip
    pulled = np.zeros((rows, values.shape[1]))
    np.add.at(pulled, (np.arange(rows)[:, None], place), np.where(inside, cotangent, 0))
    pulled = pulled if by_row else pulled.sum(0, keepdims=True)
    turn = np.transpose if transposed else np.asarray

    found, pull = jax.vjp(
        lambda v: tpu_layout.look_up_lanes(size, transposed, v, jnp.asarray(turn(index))),
        jnp.asarray(values),
    )
    np.testing.assert_array_equal(found, turn(expected))
    assert_close(pull(jnp.asarray(turn(cotangent)))[0], pulled, np.float32, "gradient")


# ---- code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("acos", -0.95, 0.95), ("acosh", 1.05, 9), ("asin", -0.95, 0.95), ("asinh", -9, 9),
        ("atan", -9, 9), ("atanh", -0.95, 0.95), ("cbrt", -9, 9), ("cosh", -9, 9),
        ("expm1", -3, 3), ("sinh", -3, 3), ("erf", -3, 3),
    ],
)  # fmt: skip
def test_rewritten_functions_keep_their_digits(name, low, high):
    function = getattr(jax.lax, name)
    x = np.concatenate([np.linspace(low, high, 1001), np.geomspace(1e-6, 1, 100) * high])
    x = x[(x >= low) & (x <= high) & (x != 0)].astype(np.float32)

    def value_and_slope(x):
        value, pull = jax.vjp(function, x)
        return value, pull(jnp.ones_like(x))[0]

    found = tpu_code.lowered(value_and_slope)(jnp.asarray(x))
    with jax.enable_x64(True):
        expected = jax.tree.map(as_float64, value_and_slope(jnp.asarray(x.astype(np.float64))))
    for actual, exact in zip(found, expected, strict=True):
        error = np.abs(as_float64(actual) - exact) / np.maximum(np.abs(exact), 1e-30)
        assert error.max() <= 16 * np.finfo(np.float32).eps


def test_code_in_calls_and_with_rules_of_its_own_stays_the_same():
    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))

    def code(x, g):
        def inner(x):
            near = jnp.where(x > 0, x < 1, x > -1)
            return jnp.where(near, jax.checkpoint(jnp.tanh)(x), jax.nn.elu(clipped(x)))

        value, pull = jax.vjp(jax.jit(inner), x)
        return value, pull(g)[0]

    x, g = normal(64, seed=1) * 2, normal(64, seed=2) * 3
    for actual, expected in zip(tpu_code.lowered(code)(x, g), code(x, g), strict=True):
        assert_close(actual, as_float64(expected), np.float32)


def test_code_that_captures_an_array_is_refused():
    captured = jnp.arange(3.0)
    with pytest.raises(NotImplementedError, match=r"captures an array.*blockwise"):
        tpu_code.lowered(lambda x: x + captured)(jnp.zeros(3))


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 192, 256])
def test_tiles_are_whole_registers_and_fit(kind, itemsize, width):
    for backward in (False, True):
        for length in (1, 63, 129, 1000, 100_000):
            blocks = tpu.block_sizes(width, 96, itemsize, (length, length), backward, kind)
            assert tpu.block_limit(blocks) is None
            assert all(b % 128 == 0 or length <= b < 128 for b in blocks)
            assert all(b < 128 + length for b in blocks)
            needed = tpu.vector_bytes(blocks, width, 96, itemsize, backward)
            assert needed <= tpu.vector_memory(kind)
        assert min(blocks) >= 256


def test_odd_tiles_are_refused():
    x = normal(1, 32, 1, 16)
    with kernels.interpret(), pytest.raises(NotImplementedError, match="multiples of 16"):
        attnlab.attention(x, x, x, implementation="tpu", block_sizes=(24, 128))


def test_dividing_the_keys_is_refused():
    spec, arrays = plain_problem([0], [0], [3])
    with pytest.raises(NotImplementedError, match="triton"):
        tpu.forward(spec, arrays, splits=2)


# ---- the real compiler ---------------------------------------------------------------------------

KINDS = ("v4", "v5e", "v5p", "v6e")
needs_libtpu = pytest.mark.skipif(tpu_missing() is not None, reason=tpu_missing() or "")


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def rich(p):
    """Every way for an array to come in."""
    return {
        "modifiers": (
            scores.RelativeBias(p["table"], bidirectional=True),
            scores.AlibiSlopes(p["slopes"]),
            scores.Temperature(p["heat"]),
            scores.Bias(p["of keys"]),
            scores.Bias(p["bias"]),
            scores.SoftCap(p["cap"]),
        ),
        "mask": masks.Segments(p["ids"]) & masks.Causal() & p["array"],
        "query_offset": p["offset"],
    }


ARRAYS = {
    "table": shaped(4, 16),
    "slopes": shaped(4),
    "heat": shaped(1, 4, 200, 1),
    "of keys": shaped(1, 1, 200),
    "bias": shaped(4, 200, 200),
    "cap": shaped(),
    "ids": shaped(1, 200, dtype=jnp.int32),
    "array": shaped(1, 1, 200, 200, dtype=jnp.bool_),
    "offset": shaped(dtype=jnp.int32),
}


def compile_and_look(kind, capsys, options, params, dtype, widths, heads, length):
    """The kernels of a loss and its gradient; their vector memory is printed."""
    query = shaped(1, length, heads[0], widths[0], dtype=dtype)
    key, value = (shaped(1, length, heads[1], w, dtype=dtype) for w in widths)

    def loss(inputs, params):
        out = attnlab.attention(*inputs, implementation="tpu", **options(params))
        return jnp.sum(out.astype(jnp.float32))

    def slope(inputs, params):
        return jax.grad(loss, (0, 1), allow_int=True)(inputs, params)

    report = compile_tpu(slope, (query, key, value), params, kind=kind)
    found = {re.sub(r"\W.*", "", kernel.name): kernel for kernel in report.kernels}
    with capsys.disabled():
        for name, kernel in found.items():
            print(
                f"\n{kind} {name}: {kernel.vmem_bytes / 2**20:.1f} MiB of vector memory, "
                f"{kernel.bundles} bundles, {kernel.spills[0]} spills",
                end="",
            )
    assert {"flash_forward", "flash_rows", "flash_columns"} <= set(found)
    for name, kernel in found.items():
        assert 0 < kernel.vmem_bytes <= tpu.vector_memory(report.kind.device_kind), name
    return found


@needs_libtpu
@pytest.mark.parametrize("kind", KINDS)
def test_plain_calls_compile(kind, capsys):
    compile_and_look(
        kind, capsys, lambda _: {"mask": masks.Causal()}, {}, jnp.bfloat16, (128, 128),
        (4, 2), 2048,
    )  # fmt: skip


@needs_libtpu
@pytest.mark.parametrize("kind", KINDS)
def test_calls_with_every_kind_of_array_compile(kind, capsys):
    found = compile_and_look(kind, capsys, rich, ARRAYS, jnp.float32, (80, 64), (4, 2), 200)
    assert "flash_pairs" in found


@needs_libtpu
@pytest.mark.parametrize("kind", ["v4", "v6e"])
def test_code_that_has_to_be_rewritten_compiles(kind, capsys):
    def near(at, params):
        return jnp.where(at.head < 2, at.relative <= 0, jnp.abs(at.relative) < params)

    def modify(score, at, params):
        return jax.nn.elu(score) + jnp.arctan(params * score) + jax.lax.erf(score)

    def options(p):
        return {
            "mask": masks.Predicate(near, p["reach"]),
            "modifiers": scores.ScoreFunction(modify, p["gain"], "N"),
            "normalizer": normalizers.SoftplusL1(),
        }

    params = {"reach": shaped(dtype=jnp.int32), "gain": shaped(4)}
    compile_and_look(kind, capsys, options, params, jnp.bfloat16, (64, 64), (4, 4), 256)


@needs_libtpu
@pytest.mark.parametrize("kind", ["v4", "v5e"])
def test_dropout_and_weights_of_their_own_compile(kind, capsys):
    def options(p):
        return {
            "normalizer": normalizers.Sigmoid(),
            "dropout_rate": 0.1,
            "dropout_key": jax.random.wrap_key_data(p["key"]),
            "mask": masks.Blocks(p["live"], (128, 128)),
        }

    params = {"key": shaped(2, dtype=jnp.uint32), "live": shaped(4, 2, 2, dtype=jnp.bool_)}
    compile_and_look(kind, capsys, options, params, jnp.float16, (256, 256), (4, 4), 256)
