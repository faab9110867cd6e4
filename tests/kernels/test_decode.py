"""Decoding by the kernels: splits, pages, prefixes, packed heads and int8, against the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from attnlab import masks, scores
from attnlab.core.cache import PagedKVCache
from attnlab.core.decode import decode_attention
from attnlab.core.quantize import Quantized, quantize
from pallas_kernels.decode import plan
from pallas_kernels.flash.problem import Leaf
from pallas_kernels.inspect import compile_gpu, compile_tpu, gpu_missing, tpu_missing
from tests import decoding, tolerances
from tests.kernels import cases

# Of lowering for CUDA.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

# Keys that fill no block, and lengths that leave parts of the keys unseen.
SIZE = decoding.Sizes(2, 150, 4, 2, 16, 32, 0, (0, 37, 150))
# Every feature costs one compilation for each of these.
FEW = [decoding.CASES[i] for i in (1, 4)]
PLAIN = decoding.CASES[0]


def run(backend, case, size, cache, arrays, **options):
    """Output and log-sum-exp of a case by a backend; None for a sum that there is not."""
    own = case.ours(size)
    if size.prefix:
        options["prefix"] = tuple(jnp.asarray(x, backend.dtype) for x in arrays[3:])
    splits = options.pop("num_splits", None)

    def call(query, cache, own, options):
        out = decode_attention(
            query, cache, **own, **options, return_lse=case.lse, implementation=backend.name,
            num_splits=splits,
        )  # fmt: skip
        return out if case.lse else (out, None)

    return backend.jit(call)(jnp.asarray(arrays[0], backend.dtype), cache, own, options)


def rounded(backend, size):
    """Inputs that the backend's dtype can represent."""
    return [np.asarray(jnp.asarray(x, backend.dtype), np.float32) for x in decoding.inputs(size)]


def check(backend, case, size, cache, arrays, **options):
    out, lse = run(backend, case, size, cache, arrays, **options)
    expected, expected_lse = decoding.expected(case, arrays, size)
    tolerances.assert_close(out, expected, backend.dtype, words=f"{case} out")
    if case.lse:
        tolerances.assert_close(lse, expected_lse, backend.dtype, words=f"{case} lse")


def dense(backend, arrays):
    return tuple(jnp.asarray(x, backend.dtype) for x in arrays[1:3])


def several(backend):
    """More than one part of the keys, where the backend divides them."""
    return 3 if "splits" in plan.ABILITIES[backend.name] else None


@pytest.mark.parametrize("case", decoding.CASES, ids=str)
def test_ragged_batch_is_the_oracle_of_each_sequence(backend, case):
    arrays = rounded(backend, SIZE)
    lengths = jnp.asarray(SIZE.lengths)
    check(
        backend, case, SIZE, dense(backend, arrays), arrays, lengths=lengths,
        num_splits=several(backend),
    )  # fmt: skip


@pytest.mark.parametrize("case", [decoding.CASES[i] for i in (1, 3, 4, 7)], ids=str)
def test_shared_prefix_is_exact(backend, case):
    size = dataclasses.replace(SIZE, prefix=48, keys=96, lengths=(0, 17, 96))
    arrays = rounded(backend, size)
    lengths = jnp.asarray(size.lengths)
    check(backend, case, size, dense(backend, arrays), arrays, lengths=lengths)


@pytest.mark.parametrize("page", [64, 16, 8, 5])
def test_pages_in_any_order_with_nan_on_what_is_unused(backend, page):
    capacity = -(-150 // page) * page
    size = dataclasses.replace(SIZE, keys=capacity, lengths=(0, 37, 150))
    arrays = rounded(backend, size)
    cache = decoding.paged(*arrays[1:3], size.lengths, page, dtype=backend.dtype)
    if backend.name != "triton" and page % {"tpu": 16, "mosaic_gpu": 64}[backend.name]:
        with pytest.raises(NotImplementedError, match=rf"pages of a multiple.*not {page};.*wise"):
            run(backend, FEW[0], size, cache, arrays)
        return
    check(backend, FEW[1], size, cache, arrays, num_splits=several(backend))


@pytest.mark.parametrize("lengths", [(0, 1, 3), (256, 513, 255)])
def test_many_heads_share_a_key_head(backend, lengths):
    size = decoding.Sizes(1, 514, 20, 1, 16, 16, 0, lengths)
    arrays = rounded(backend, size)
    # More parts than live blocks: some see no key.
    splits = 16 if several(backend) else None
    lengths = jnp.asarray(lengths)
    check(backend, FEW[0], size, dense(backend, arrays), arrays, lengths=lengths,
          num_splits=splits)  # fmt: skip


def test_nan_reaches_only_queries_that_see_it(backend):
    size = dataclasses.replace(SIZE, lengths=(40, 40, 40))
    arrays = rounded(backend, size)
    spoiled = [x.copy() for x in arrays]
    spoiled[2][0, 39] = np.nan  # seen by the second query alone
    spoiled[1][1, 40:], spoiled[2][1, 40:] = np.inf, np.nan  # beyond the end
    spoiled[2][2, 38, :, 3] = np.inf
    results = [
        run(backend, FEW[0], size, dense(backend, x), x, lengths=jnp.full(3, 40))[0]
        for x in (arrays, spoiled)
    ]
    clean, found = (np.asarray(x, np.float32) for x in results)
    assert np.isnan(found[0, 1]).all()
    np.testing.assert_array_equal(found[0, 0], clean[0, 0])
    np.testing.assert_array_equal(found[1], clean[1])
    assert not np.isfinite(found[2]).all()


@pytest.mark.parametrize("kind", ["token", "block", "pages"])
def test_int8_is_what_it_stands_for(backend, kind):
    """The kernel on int8 is the oracle on the numbers that int8 stands for."""
    size = dataclasses.replace(SIZE, prefix=0 if kind == "pages" else 16, keys=96,
                               lengths=(0, 37, 96))  # fmt: skip
    arrays = rounded(backend, size)

    def small(x):
        return quantize(jnp.asarray(x), "block" if kind == "block" else "token", 16)

    tiny = [small(x) for x in arrays[1:]]
    stands_for = [arrays[0], *(np.asarray(x.dequantize()) for x in tiny)]
    options = {"lengths": jnp.asarray(size.lengths)}
    if size.prefix:
        options["prefix"] = (tiny[2], tiny[3])
    cache = (tiny[0], tiny[1])
    if kind == "pages":
        cache = decoding.paged(*arrays[1:3], size.lengths, 16, dtype=jnp.int8)
        options = {}
    if "scales" not in plan.ABILITIES[backend.name]:
        with pytest.raises(NotImplementedError, match="does not read int8"):
            run(backend, PLAIN, dataclasses.replace(size, prefix=0), cache, arrays, **options)
        return
    bare = dataclasses.replace(size, prefix=0)  # `run` would hand over the prefix as it is
    out, _ = run(backend, PLAIN, bare, cache, arrays, **options)
    expected, _ = decoding.expected(PLAIN, stands_for, size)
    tolerances.assert_close(out, expected, backend.dtype)


def test_no_int8_is_turned_into_floats_outside(backend):
    """What a kernel is given of an int8 cache is int8."""
    if "scales" not in plan.ABILITIES[backend.name]:
        pytest.skip("refused by the backend")
    arrays = decoding.inputs(SIZE)
    tiny = tuple(quantize(jnp.asarray(x)) for x in arrays[1:3])
    with backend.running():
        jaxpr = jax.make_jaxpr(
            lambda q, cache: decode_attention(q, cache, implementation=backend.name)
        )(jnp.asarray(arrays[0]), tiny)
    shapes = [tuple(str(v.aval) for v in equation.invars) for equation in _calls(jaxpr.jaxpr)]
    assert shapes
    assert all(sum("int8[3," in aval for aval in avals) == 2 for avals in shapes), shapes


def _calls(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _calls(inner)


def test_prefix_is_read_once(backend):
    """The kernel for the prefix has the queries of all sequences as rows of one problem."""
    size = dataclasses.replace(SIZE, prefix=64, keys=64, lengths=(64, 64, 64))
    arrays = [jnp.asarray(x, backend.dtype) for x in decoding.inputs(size)]
    with backend.running():
        jaxpr = jax.make_jaxpr(
            lambda q, k, v, pk, pv: decode_attention(
                q, (k, v), prefix=(pk, pv), implementation=backend.name
            )
        )(*arrays)
    if backend.name == "mosaic_gpu":
        pytest.skip("its call is another primitive")
    first, second = (
        max((v.aval.shape for v in call.invars if v.aval.ndim == 4), key=lambda s: s[-1])
        for call in _calls(jaxpr.jaxpr)
    )
    assert first[0] == 1
    assert second[0] == 3


@pytest.mark.parametrize("paged", [False, True])
def test_vmap_is_a_batch_of_calls(backend, paged):
    size = dataclasses.replace(SIZE, keys=64, lengths=(7, 64))
    arrays = rounded(backend, size)
    lengths = jnp.asarray(size.lengths)
    query = jnp.asarray(arrays[0], backend.dtype)
    if paged:
        caches = [
            decoding.paged(arrays[1][b : b + 1], arrays[2][b : b + 1], size.lengths[b : b + 1], 64,
                           dtype=backend.dtype)
            for b in range(2)
        ]  # fmt: skip
        cache = jax.tree.map(lambda *x: jnp.stack(x), *caches)
        query = query[:, None]
    else:
        cache = dense(backend, arrays)

    def one(query, cache, length):
        length = length[None] if paged else length
        return decode_attention(
            query, cache, lengths=length, implementation=backend.name, mask=masks.Causal(),
            num_splits=several(backend),
        )  # fmt: skip

    out = backend.jit(jax.vmap(one))(query, cache, lengths)
    out = out[:, 0] if paged else out
    causal = decoding.Case("causal", PLAIN.ours, lambda z, b, c: {
        "mask": lambda i, j: j <= i})  # fmt: skip
    expected, _ = decoding.expected(causal, arrays, size)
    tolerances.assert_close(out, expected, backend.dtype)


def test_a_wild_table_reads_nothing_outside_of_the_pool(backend):
    """Under `jit` nobody knows the table: what is not a page is taken for the nearest one."""
    size = dataclasses.replace(SIZE, keys=128, lengths=(128, 128))
    arrays = rounded(backend, size)
    cache = decoding.paged(*arrays[1:3], size.lengths, 64, fill=0.0, dtype=backend.dtype)
    tables = [jnp.asarray(x, jnp.int32) for x in ([[0, 10**6], [-7, 2]], [[0, 6], [0, 2]])]
    assert cache.num_pages == 7
    wild, clipped = (
        run(backend, FEW[0], size, dataclasses.replace(cache, table=x), arrays)[0] for x in tables
    )
    assert np.isfinite(np.asarray(clipped[1], np.float32)).all()
    np.testing.assert_array_equal(wild, clipped)


# -- lowering --------------------------------------------------------------------------------------

KINDS = {"A100": "NVIDIA A100-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}
PAIRS = [
    (b.name, kind)
    for b in cases.backends()
    for kind in KINDS
    if b.name == "triton" or (b.name == "mosaic_gpu" and kind != "A100")
]


def sds(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def pool(dtype, page, pages=40, batch=4, heads=4, width=128):
    scale = sds(heads, pages, page, dtype=jnp.float32) if dtype == jnp.int8 else None
    return PagedKVCache(
        sds(heads, pages, page, width, dtype=dtype), sds(heads, pages, page, width, dtype=dtype),
        sds(batch, 8, dtype=jnp.int32), sds(batch, dtype=jnp.int32), scale, scale,
    )  # fmt: skip


def caches():
    keys = sds(4, 4096, 4, 128)
    small = Quantized(sds(4, 4096, 4, 128, dtype=jnp.int8), sds(4, 4096, 4, dtype=jnp.float32))
    return {
        "dense": (keys, keys),
        "int8": (small, small),
        "pages": pool(jnp.bfloat16, 64),
        "small pages": pool(jnp.bfloat16, 16),
        "int8 pages": pool(jnp.int8, 128),
    }


def _arguments(name):
    query, slopes = sds(4, 1, 32, 128), sds(32, dtype=jnp.float32)
    return query, caches()[name], sds(4, dtype=jnp.int32), slopes


def _step(backend):
    def step(query, cache, lengths, slopes):
        return decode_attention(
            query, cache, lengths=lengths, mask=masks.SlidingWindow(2000),
            modifiers=scores.AlibiSlopes(slopes), implementation=backend,
        )  # fmt: skip

    return step


@pytest.mark.parametrize("name", caches())
@pytest.mark.parametrize(("backend", "kind"), PAIRS, ids=str)
def test_decoding_is_lowered(backend, kind, name):
    if backend == "mosaic_gpu" and name in ("int8", "int8 pages", "small pages"):
        pytest.skip("refused by the backend")
    device = AbstractDevice(device_kind=KINDS[kind], num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)

    with use_abstract_mesh(mesh):
        traced = jax.jit(_step(backend)).trace(*_arguments(name))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "flash_forward" in text


def test_auto_takes_the_kernel_of_the_device():
    device = AbstractDevice(device_kind=KINDS["H100"], num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    keys = sds(4, 4096, 4, 128)
    with use_abstract_mesh(mesh):
        traced = jax.jit(lambda q, k: decode_attention(q, (k, k))).trace(sds(4, 1, 32, 128), keys)
    (call,) = _calls(traced.jaxpr.jaxpr)
    # In place: the cache as it came is what the kernel reads.
    assert sum(v.aval.shape == keys.shape for v in call.invars) == 2
    assert "4096,128" not in str(traced.jaxpr).replace("4,4096,4,128", "")


# -- compiled for devices that are not there -------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("v5p", "v6e")))
     for kind in ("v4", "v5e", "v5p", "v6e")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["pages", "int8 pages"])
@pytest.mark.skipif(bool(tpu_missing()), reason=str(tpu_missing()))
def test_compiled_for_a_tpu_the_pool_is_not_copied(kind, name):
    report = compile_tpu(_step("tpu"), *_arguments(name), kind=kind)
    assert [k for k in report.kernels if "flash_forward" in k.name]
    assert report.memory["temp"] < report.memory["argument"] / 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["A100", "H100", "H200"])
@pytest.mark.parametrize("name", caches())
@pytest.mark.skipif(bool(gpu_missing()), reason=str(gpu_missing()))
def test_compiled_for_a_gpu_nothing_is_copied_or_spilled(kind, name):
    report = compile_gpu(_step("triton"), *_arguments(name), kind=kind)
    (kernel,) = (k for k in report.kernels if k.name == "flash_forward")
    assert kernel.spill_stores == 0
    assert report.memory["temp"] < report.memory["argument"] / 4


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "programs", "keys", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 1, 2**17, 128),
        ("NVIDIA H100 80GB HBM3", 8, 2**17, 32),
        ("NVIDIA H100 80GB HBM3", 300, 2**17, 1),
        ("NVIDIA H100 80GB HBM3", 8, 1024, 4),
        ("NVIDIA H100 80GB HBM3", 8, 100, 1),
        ("NVIDIA A10", 8, 2**17, 16),
        ("a GPU nobody knows", 8, 2**17, 16),
    ],
)
def test_number_of_splits(kind, programs, keys, expected):
    assert plan.num_splits(kind, programs, keys) == expected


def test_splits_never_starve_a_program_nor_a_device():
    for kind in KINDS.values():
        for programs in (1, 3, 64, 1000):
            for keys in (1, 255, 256, 5000, 10**6):
                splits = plan.num_splits(kind, programs, keys)
                assert splits == 1 or keys / splits >= 256
                fills = programs * splits >= plan.cores(kind)
                assert fills or splits == 128 or keys // (2 * splits) < 256
    with pytest.raises(ValueError, match="num_splits: expected positive"):
        plan.num_splits("H100", 0, 5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("triton", 64, 4096, 0), (64, 0)),
        (("triton", 64, 4096 + 32, 0), (32, 0)),
        (("triton", 64, 4099, 0), (64, 0)),
        (("triton", 64, 4096, 64), (64, 0)),
        (("triton", 64, 4096, 256), (64, 0)),
        (("triton", 64, 4096, 16), (64, 16)),
        (("triton", 64, 4096, 5), (64, 5)),
        (("tpu", 1024, 4096, 48), (16, 0)),
        (("tpu", 1024, 4096, 512), (256, 0)),
        (("mosaic_gpu", 128, 4096, 64), (64, 0)),
    ],
)
def test_column_blocks(arguments, expected):
    assert plan.column_block(*arguments) == expected


def test_block_table_stays_within_the_pool():
    pages = jnp.asarray([[3, -1, 99], [0, 1, 2]])
    np.testing.assert_array_equal(plan.block_table(pages, 4, 16, 16), [[3, 0, 3], [0, 1, 2]])
    np.testing.assert_array_equal(
        plan.block_table(pages, 4, 16, 8), [[6, 7, 0, 1, 6, 7], [0, 1, 2, 3, 4, 5]]
    )


@pytest.mark.parametrize("batch", [0, 3])
def test_packed_leaf_is_where_its_rows_are(batch):
    heads, shared, length = sizes = (6, 2, 4)
    x = jnp.arange(3 * 6 * 4 * 5.0).reshape(3, 6, 4, 5)
    packed, leaf = plan.pack(Leaf("bnts"), x, sizes, batch)
    assert leaf.axes == ("nts" if batch else "bnts")
    for b, n, t in np.ndindex(3, 6, 4):
        member = n % 3
        row = (member * 3 + b) * length + t if batch else member * length + t
        found = packed[0 if batch else b, n // 3, row]
        np.testing.assert_array_equal(found, x[b, n, t])
    assert packed.shape[2] == heads // shared * length * (batch or 1)
    scalar = jnp.ones((1, 1, 1, 5))
    assert plan.pack(Leaf("s"), scalar, sizes, batch)[0] is scalar
