"""Decoding in plain JAX against the float64 oracle, caches on pages, shared prefixes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnlab
from attnlab import masks, normalizers
from attnlab.core import decode_fold
from attnlab.core.cache import KVCache, PagedKVCache
from attnlab.core.decode import decode_attention
from attnlab.core.quantize import quantize
from tests import decoding, oracles, tolerances

SIZES = decoding.SIZES


def check(case, size, cache, *, arrays=None, words="", **options):
    arrays = decoding.inputs(size) if arrays is None else arrays
    if size.prefix:
        options["prefix"] = tuple(map(jnp.asarray, arrays[3:]))
    out = decode_attention(
        jnp.asarray(arrays[0]), cache, **case.ours(size), return_lse=case.lse, **options
    )
    out, lse = out if case.lse else (out, None)
    expected, expected_lse = decoding.expected(case, arrays, size)
    tolerances.assert_close(out, expected, np.float32, words=f"{case} {words} out")
    if case.lse:
        tolerances.assert_close(lse, expected_lse, np.float32, words=f"{case} {words} lse")


def dense(size, arrays=None):
    arrays = decoding.inputs(size) if arrays is None else arrays
    return jnp.asarray(arrays[1]), jnp.asarray(arrays[2])


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("case", decoding.CASES, ids=str)
def test_ragged_batch_is_the_oracle_of_each_sequence(case, splits, monkeypatch):
    monkeypatch.setattr(decode_fold, "_BLOCK", 32)
    lengths = jnp.asarray(SIZES.lengths)
    check(case, SIZES, dense(SIZES), lengths=lengths, implementation="blockwise", num_splits=splits)


@pytest.mark.parametrize("case", decoding.CASES, ids=str)
def test_shared_prefix_is_exact(case, monkeypatch):
    monkeypatch.setattr(decode_fold, "_BLOCK", 32)
    size = dataclasses.replace(SIZES, prefix=48, keys=40, lengths=(0, 17, 40))
    check(case, size, dense(size), lengths=jnp.asarray(size.lengths))


@pytest.mark.parametrize("page", [1, 5, 16])
@pytest.mark.parametrize("case", [decoding.CASES[i] for i in (0, 2, 4)], ids=str)
def test_pages_in_any_order(case, page, monkeypatch):
    monkeypatch.setattr(decode_fold, "_BLOCK", 32)
    size = dataclasses.replace(SIZES, keys=80, lengths=(0, 37, 80))
    arrays = decoding.inputs(size)
    cache = decoding.paged(arrays[1], arrays[2], size.lengths, page)
    assert cache.capacity == size.keys
    check(case, size, cache, arrays=arrays)


@pytest.mark.parametrize("lengths", [(0, 1, 3), (256, 513, 255)])
def test_many_heads_share_a_key_head(lengths):
    size = decoding.Sizes(1, 520, 20, 1, 8, 8, 0, lengths)
    check(decoding.CASES[0], size, dense(size), lengths=jnp.asarray(lengths))


def test_prefix_on_pages_that_sequences_share():
    """One prefix, three ways to keep it: with each sequence, on shared pages, apart."""
    size = dataclasses.replace(SIZES, prefix=32, keys=32, lengths=(0, 17, 32))
    query, key, value, prefix_key, prefix_value = decoding.inputs(size)
    case = decoding.CASES[1]
    apart = decode_attention(
        jnp.asarray(query), (jnp.asarray(key), jnp.asarray(value)),
        lengths=jnp.asarray(size.lengths),
        prefix=tuple(map(jnp.asarray, (prefix_key, prefix_value))), **case.ours(size),
    )  # fmt: skip
    table = np.array([[4, 0, -1, -1], [4, 0, 6, 2], [4, 0, 1, 5]], np.int32)
    alone = PagedKVCache.create(table[:1, :2], 7, 16, 2, 16, 32)
    filled = alone.append(jnp.asarray(prefix_key)[None], jnp.asarray(prefix_value)[None])
    shared = filled.replace(table=jnp.asarray(table), lengths=jnp.full((3,), 32, jnp.int32))
    with pytest.raises(ValueError, match=r"table: a sequence needs a page .*\(-1\)"):
        shared.append(jnp.asarray(key), jnp.asarray(value))
    cache = shared.append(jnp.asarray(key), jnp.asarray(value), jnp.asarray(size.lengths))
    np.testing.assert_array_equal(cache.lengths, [32, 49, 64])
    together = decode_attention(jnp.asarray(query), cache, **case.ours(size))
    tolerances.assert_reordered(together, apart, np.float32)
    expected, _ = decoding.expected(case, decoding.inputs(size), size)
    tolerances.assert_close(together, expected, np.float32)


def test_prefill_and_steps_on_pages_under_jit():
    query, key, value, *_ = decoding.inputs(decoding.Sizes(20, 20, lengths=(20, 20)))
    full = attnlab.attention(*map(jnp.asarray, (query, key, value)), mask=masks.Causal())
    table = PagedKVCache.consecutive((2,), 20, 8)
    cache = PagedKVCache.create(table, 6, 8, 2, 16, 32)

    @jax.jit
    def step(cache, query, key, value):
        cache = cache.append(key, value)
        return cache, decode_attention(query, cache, mask=masks.Causal())

    parts, start = [], 0
    for count in (13, *[1] * 7):
        span = slice(start, start + count)
        cache, out = step(cache, *(jnp.asarray(x[:, span]) for x in (query, key, value)))
        parts.append(out)
        start += count
    tolerances.assert_reordered(jnp.concatenate(parts, 1), full, np.float32)
    np.testing.assert_array_equal(cache.gather()[0][:, :20], key)


@pytest.mark.parametrize("kind", ["token", "block", "pages"])
def test_int8_is_what_it_stands_for(kind):
    """Attention over int8 is the oracle on the numbers that int8 stands for."""
    size = dataclasses.replace(SIZES, prefix=0 if kind == "pages" else 16)
    arrays = decoding.inputs(size)
    small = [
        quantize(jnp.asarray(x), "block" if kind == "block" else "token", 16) for x in arrays[1:]
    ]
    options = {"lengths": jnp.asarray(size.lengths), "mask": masks.Causal()}
    if kind == "pages":
        cache = decoding.paged(*arrays[1:3], size.lengths, 16, dtype=jnp.int8)
    else:
        cache, options["prefix"] = (small[0], small[1]), (small[2], small[3])
    out = decode_attention(jnp.asarray(arrays[0]), cache, **options)
    stands_for = [arrays[0], *(np.asarray(x.dequantize()) for x in small)]
    causal = decoding.Case("causal", lambda z: {}, lambda z, b, c: {"mask": oracles.causal()})
    expected, _ = decoding.expected(causal, stands_for, size)
    tolerances.assert_close(out, expected, np.float32)


def test_kv_cache_with_its_own_length():
    query, key, value, *_ = decoding.inputs(dataclasses.replace(SIZES, lengths=(50, 50, 50)))
    cache = KVCache.create((3,), 96, 2, 16, 32)
    cache = cache.append(jnp.asarray(key[:, :50]), jnp.asarray(value[:, :50]))
    size = dataclasses.replace(SIZES, lengths=(50, 50, 50))
    check(decoding.CASES[1], size, cache, arrays=[query, key, value, key[0, :0], value[0, :0]])


def test_batch_axes_vmap_and_none():
    size = dataclasses.replace(SIZES, keys=48, lengths=(7, 30, 48, 1))
    query, key, value, *_ = map(jnp.asarray, decoding.inputs(size))
    lengths = jnp.asarray(size.lengths)
    options = {"mask": masks.Causal(), "num_splits": 2}
    flat = decode_attention(query, (key, value), lengths=lengths, **options)

    def square(x):
        return x.reshape(2, 2, *x.shape[1:])

    folded = decode_attention(
        square(query), (square(key), square(value)), lengths=square(lengths), **options
    )
    tolerances.assert_reordered(folded, square(flat), np.float32)
    mapped = jax.vmap(lambda q, k, v, n: decode_attention(q, (k, v), lengths=n, **options))
    tolerances.assert_reordered(mapped(query, key, value, lengths), flat, np.float32)


@pytest.mark.parametrize("where", ["key", "value"])
def test_nan_reaches_only_queries_that_see_it(where):
    size = dataclasses.replace(SIZES, lengths=(40, 40, 40))
    query, key, value, *_ = decoding.inputs(size)
    spoiled = {"key": key.copy(), "value": value.copy()}
    spoiled[where][0, 39] = np.nan  # seen by the second query alone
    spoiled[where][1, 40:] = np.inf  # beyond the end
    pair = tuple(jnp.asarray(spoiled[name]) for name in ("key", "value"))
    options = {"mask": masks.Causal(), "lengths": jnp.asarray(size.lengths)}
    out = decode_attention(jnp.asarray(query), pair, **options)
    clean = decode_attention(jnp.asarray(query), dense(size), **options)
    assert bool(jnp.isnan(out[0, 1]).all())
    np.testing.assert_array_equal(np.delete(np.asarray(out[0]), 1, 0), np.asarray(clean[0, :1]))
    np.testing.assert_array_equal(out[1:], clean[1:])


def test_row_that_sees_nothing_is_zero():
    """The valid range starts after the last key: no split sees any."""
    query, key, value, *_ = map(jnp.asarray, decoding.inputs())
    out, lse = decode_attention(
        query, (key, value), lengths=50, mask=~masks.Prefix(70), num_splits=4, return_lse=True
    )
    np.testing.assert_array_equal(out, np.zeros_like(out))
    np.testing.assert_array_equal(lse, np.full_like(lse, -np.inf))


def test_memory_does_not_grow_with_the_cache():
    """Beyond the cache itself, a step needs the memory of one block."""

    def temporaries(keys):
        query = jax.ShapeDtypeStruct((2, 1, 4, 16), jnp.float32)
        key = jax.ShapeDtypeStruct((2, keys, 2, 16), jnp.float32)

        def step(q, k, v):
            return decode_attention(q, (k, v), mask=masks.SlidingWindow(1000))

        compiled = jax.jit(step).lower(query, key, key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(2048), temporaries(16384)
    assert large < 1.2 * small + 2**14, (small, large)


def test_bfloat16_within_budget():
    arrays = decoding.inputs()
    import ml_dtypes

    rounded = [x.astype(ml_dtypes.bfloat16) for x in arrays]
    exact, _ = decoding.expected(decoding.CASES[1], [x.astype(np.float32) for x in rounded], SIZES)
    out = decode_attention(
        jnp.asarray(rounded[0]), (jnp.asarray(rounded[1]), jnp.asarray(rounded[2])),
        lengths=jnp.asarray(SIZES.lengths), **decoding.CASES[1].ours(SIZES),
    )  # fmt: skip
    assert out.dtype == jnp.bfloat16
    tolerances.assert_close(out, exact, jnp.bfloat16)


def _arrays():
    return map(jnp.asarray, decoding.inputs()[:3])


ERRORS = [
    (ValueError, r"lengths: expected 0 to 96.*got 97", lambda q, k, v: {"lengths": 97}),
    (ValueError, r"lengths: expected 0 to 96.*got -1", lambda q, k, v: {"lengths": -1}),
    (TypeError, "lengths: expected integers", lambda q, k, v: {"lengths": 1.5}),
    (ValueError, "lengths: expected shape", lambda q, k, v: {"lengths": jnp.arange(2)}),
    (TypeError, "cache: expected a PagedKVCache", lambda q, k, v: {"cache": k}),
    (TypeError, "cache: expected arrays of dtype float32", lambda q, k, v: {
        "cache": (k.astype(jnp.bfloat16), v)}),
    (ValueError, "cache: key width 8", lambda q, k, v: {"cache": (k[..., :8], v)}),
    (ValueError, "cache: length and heads", lambda q, k, v: {"cache": (k[:, :8], v)}),
    (ValueError, "cache: expected a key of shape", lambda q, k, v: {"cache": (k[:2], v)}),
    (ValueError, "multiple of the number of key heads", lambda q, k, v: {"query": q[:, :, :3]}),
    (ValueError, "prefix: expected a key of shape", lambda q, k, v: {"prefix": (k, v)}),
    (ValueError, "prefix: heads and widths", lambda q, k, v: {
        "prefix": (k[0, :, :1], v[0, :, :1])}),
    (ValueError, "num_splits: expected a positive int", lambda q, k, v: {"num_splits": 0}),
    (ValueError, "implementation: expected", lambda q, k, v: {"implementation": "fast"}),
    (NotImplementedError, "needs an NVIDIA GPU.*blockwise", lambda q, k, v: {
        "implementation": "triton"}),
    (NotImplementedError, "Sparsemax", lambda q, k, v: {"normalizer": normalizers.Sparsemax()}),
    (ValueError, "return_lse: Sigmoid", lambda q, k, v: {
        "normalizer": normalizers.Sigmoid(), "return_lse": True}),
    (NotImplementedError, "prefix: 40 keys end within a block of 16", lambda q, k, v: {
        "prefix": (k[0, :40], v[0, :40]), "mask": masks.Blocks(jnp.ones((1, 9), bool), (16, 16))}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "change"), ERRORS, ids=[e[1] for e in ERRORS])
def test_wrong_calls_are_named(error, words, change):
    query, key, value = _arrays()
    options = {"query": query, "cache": (key, value), **change(query, key, value)}
    with pytest.raises(error, match=words):
        decode_attention(**options)


def test_derivatives_are_refused():
    query, key, value = _arrays()
    with pytest.raises(NotImplementedError, match=r"decode_attention has no derivative.*attention"):
        jax.grad(lambda q: decode_attention(q, (key, value)).sum())(query)
    small = quantize(key), quantize(value)
    with pytest.raises(NotImplementedError, match="int8"):
        jax.jvp(lambda q: decode_attention(q, small), (query,), (query,))


def test_wrong_pages_are_named():
    table = PagedKVCache.consecutive((2,), 16, 8)
    cache = PagedKVCache.create(table, 4, 8, 2, 16)
    x = jnp.ones((2, 9, 2, 16))
    with pytest.raises(ValueError, match=r"table: expected pages from 0 to 2, or -1.*got 3"):
        PagedKVCache.create(table, 3, 8, 2, 16)
    with pytest.raises(TypeError, match="table: expected integers"):
        PagedKVCache.create(table.astype(jnp.float32), 4, 8, 2, 16)
    with pytest.raises(
        ValueError, match=r"key: tokens up to position 17 do not fit .* capacity 16"
    ):
        cache.append(x, x).append(x, x)
    with pytest.raises(ValueError, match="page 0 belongs to several sequences"):
        cache.replace(table=jnp.zeros((2, 2), jnp.int32)).append(x, x)
    with pytest.raises(ValueError, match="key: expected shape"):
        cache.append(x[:1], x)
    query = jnp.ones((2, 1, 2, 16))
    wrong = cache.append(x, x).replace(table=table + 1)
    with pytest.raises(ValueError, match=r"table: expected pages from 0 to 3.*got 4"):
        decode_attention(query, wrong)
    missing = cache.append(x, x).replace(table=jnp.asarray([[0, -1], [2, 3]]))
    with pytest.raises(ValueError, match="a sequence has tokens on a page that is missing"):
        decode_attention(query, missing)
    # Under jit nothing is known, and nothing outside of the pool is read.
    out = jax.jit(decode_attention)(query, wrong)
    assert bool(jnp.isfinite(out).all())


def test_copied_page_can_be_written_to():
    """Two sequences share a page that is half full; each goes on with a copy of its own."""
    table = jnp.asarray([[0, -1], [0, -1]], jnp.int32)
    first = PagedKVCache.create(table[:1], 3, 4, 1, 4)
    x = jnp.arange(8.0).reshape(1, 2, 1, 4)
    filled = first.append(x, x)
    forked = filled.replace(table=table, lengths=jnp.asarray([2, 2], jnp.int32))
    y = jnp.stack([x[0] + 100, x[0] + 200])
    with pytest.raises(ValueError, match="copy_pages"):
        forked.append(y, y)
    own = forked.copy_pages(jnp.asarray([0]), jnp.asarray([2]))
    own = own.replace(table=jnp.asarray([[0, -1], [2, -1]], jnp.int32)).append(y, y)
    key, _ = own.gather()
    np.testing.assert_array_equal(key[:, :2], jnp.concatenate([x, x]))
    np.testing.assert_array_equal(key[:, 2:4], y)


def test_oracle_position_of_the_last_query():
    """The last query is at the position of the last key, and sees it; the one before does not."""
    query, key, value, *_ = decoding.inputs()
    causal = decoding.expected(decoding.CASES[1], decoding.inputs(), SIZES)[0]
    cut = oracles.attention(
        query[1, 1:], key[1, :37], value[1, :37],
        modifiers=[oracles.alibi(oracles.alibi_slopes(4))], query_offset=36,
    )  # fmt: skip
    np.testing.assert_allclose(causal[1, 1], cut[0])
