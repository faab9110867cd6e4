"""Cases of decoding, said twice: for attnlab, and sequence by sequence for the float64 oracle."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnlab import masks, normalizers, scores
from attnlab.core.cache import PagedKVCache
from tests import oracles


@dataclasses.dataclass(frozen=True)
class Sizes:
    queries: int = 2
    keys: int = 96
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    value_width: int = 32
    prefix: int = 0
    lengths: tuple[int, ...] = (0, 37, 96)

    @property
    def total(self) -> int:
        return self.prefix + self.keys


SIZES = Sizes()


def inputs(size: Sizes = SIZES, seed: int = 0) -> list[np.ndarray]:
    """Query, key, value, and key and value of the prefix, as float32."""
    rng = np.random.default_rng(seed)
    batch, shared = len(size.lengths), (size.kv_heads,)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return [
        normal(batch, size.queries, size.heads, size.width),
        normal(batch, size.keys, *shared, size.width),
        normal(batch, size.keys, *shared, size.value_width),
        normal(size.prefix, *shared, size.width),
        normal(size.prefix, *shared, size.value_width),
    ]


@dataclasses.dataclass(frozen=True)
class Case:
    """`ours(size)`: options; `oracle(size, b, count)`: those of sequence b over `count` keys."""

    name: str
    ours: Callable[[Sizes], dict[str, Any]]
    oracle: Callable[[Sizes, int, int], dict[str, Any]]
    lse: bool = True

    def __str__(self):
        return self.name


def _data(size: Sizes) -> dict[str, np.ndarray]:
    """Arrays of the terms, the same each time."""
    rng = np.random.default_rng(11)
    batch, t, s, n = len(size.lengths), size.queries, size.total, size.heads
    return {
        "bias": rng.standard_normal((n, t, s)).astype(np.float32),
        "by batch": rng.standard_normal((batch, 1, 1, s)).astype(np.float32),
        "table": rng.standard_normal((n, 8)).astype(np.float32),
        "slopes": oracles.alibi_slopes(n).astype(np.float32),
        "temperature": np.exp(0.3 * rng.standard_normal((batch, n, t, 1))).astype(np.float32),
        "allowed": rng.random((batch, n, t, s)) < 0.6,
        "query ids": rng.integers(0, 2, (batch, t)).astype(np.int32),
        "key ids": np.sort(rng.integers(-1, 2, (batch, s))).astype(np.int32),
        "first": np.resize([0, 60, 50], batch).astype(np.int32),  # 60 is beyond an end
        "live": rng.random((batch, 1, 1, -(-s // 16))) < 0.5,
        "sink": rng.standard_normal(n).astype(np.float32),
    }


def _odd(at):
    return (at.query + 2 * at.key + at.head) % 3 != 1


def _odd_oracle(size):
    head = np.arange(size.heads)[:, None, None]
    return lambda i, j: (i + 2 * j + head) % 3 != 1


def _both(a, b):
    return oracles.both(a, b)


def _d(size, name):
    return jnp.asarray(_data(size)[name])


CASES = [
    Case("plain", lambda z: {}, lambda z, b, c: {}),
    Case(
        "causal with slopes",
        lambda z: {
            "mask": masks.Causal(),
            "modifiers": scores.AlibiSlopes(_d(z, "slopes")),
        },
        lambda z, b, c: {
            "mask": oracles.causal(),
            "modifiers": [oracles.alibi(_data(z)["slopes"])],
        },
    ),
    Case(
        "window with a table",
        lambda z: {
            "mask": masks.SlidingWindow(20, 0),
            "modifiers": scores.RelativeBias(_d(z, "table"), max_distance=20),
        },
        lambda z, b, c: {
            "mask": oracles.window(20, 0),
            "modifiers": [oracles.t5_bias(_data(z)["table"], bidirectional=False, max_distance=20)],
        },
    ),
    Case(
        "predicate and start with a bias",
        lambda z: {
            "mask": masks.Predicate(_odd) & ~masks.Prefix(_d(z, "first")),
            "modifiers": scores.Bias(_d(z, "bias")),
        },
        lambda z, b, c: {
            "mask": _both(_odd_oracle(z), lambda i, j: j + 0 * i >= _data(z)["first"][b]),
            "modifiers": [oracles.bias(_data(z)["bias"][..., :c])],
        },
    ),
    Case(
        "array with temperature and cap",
        lambda z: {
            "mask": _d(z, "allowed"),
            "modifiers": (
                scores.Temperature(_d(z, "temperature")),
                scores.SoftCap(jnp.float32(2.0)),
                scores.Bias(_d(z, "by batch")),
            ),
        },
        lambda z, b, c: {
            "mask": oracles.array(_data(z)["allowed"][b, ..., :c]),
            "modifiers": [
                oracles.temperature(_data(z)["temperature"][b]),
                oracles.soft_cap(2.0),
                oracles.bias(_data(z)["by batch"][b, ..., :c]),
            ],
        },
    ),
    Case(
        "segments with a sink",
        lambda z: {
            "mask": masks.Segments(_d(z, "query ids"), _d(z, "key ids")) | masks.Prefix(2),
            "normalizer": normalizers.Softmax(_d(z, "sink")),
        },
        lambda z, b, c: {
            "mask": oracles.either(
                oracles.segments(_data(z)["query ids"][b], _data(z)["key ids"][b, :c]),
                oracles.prefix(2),
            ),
            "normalizer": oracles.softmax(_data(z)["sink"]),
        },
    ),
    Case(
        "blocks with softplus",
        lambda z: {
            "mask": masks.Blocks(_d(z, "live"), (16, 16)),
            "normalizer": normalizers.SoftplusL1(),
        },
        lambda z, b, c: {
            "mask": oracles.array(np.repeat(_data(z)["live"][b], 16, -1)[..., :c]),
            "normalizer": oracles.softplus_l1(),
        },
    ),
    Case(
        "sigmoid",
        lambda z: {"mask": masks.Causal(), "normalizer": normalizers.Sigmoid()},
        lambda z, b, c: {"mask": oracles.causal(), "normalizer": oracles.sigmoid()},
        lse=False,
    ),
]


def expected(case: Case, arrays: list[np.ndarray], size: Sizes, **more: Any) -> Any:
    """Output and log-sum-exp by the oracle, one sequence after the other."""
    query, key, value, prefix_key, prefix_value = arrays
    outs, sums = [], []
    for b, length in enumerate(size.lengths):
        keys = np.concatenate([prefix_key, key[b, :length]])
        values = np.concatenate([prefix_value, value[b, :length]])
        if not len(keys):
            options = case.oracle(size, b, 0)
            sink = options.get("normalizer")
            outs.append(np.zeros((*query.shape[1:-1], value.shape[-1])))
            lse = np.full((size.heads, size.queries), -np.inf)
            if sink is not None and "sink" in case.name:
                lse = np.broadcast_to(_data(size)["sink"][:, None].astype(np.float64), lse.shape)
            sums.append(lse)
            continue
        found = oracles.attention(
            query[b], keys, values, query_offset=len(keys) - size.queries, return_lse=True,
            **case.oracle(size, b, len(keys)), **more,
        )  # fmt: skip
        outs.append(found[0])
        sums.append(found[1])
    return np.stack(outs), None if not case.lse else np.stack(sums)


def paged(
    key: np.ndarray, value: np.ndarray, lengths: Any, page: int, *, spare: int = 3, seed: int = 0,
    fill: float = np.nan, dtype: Any = jnp.float32,
) -> PagedKVCache:  # fmt: skip
    """Keys and values on pages in random order; `fill` where no token lies, also within pages."""
    rng = np.random.default_rng(seed)
    batch, capacity = key.shape[:2]
    pages = -(-capacity // page)
    total = batch * pages + spare
    table = rng.permutation(total)[: batch * pages].reshape(batch, pages).astype(np.int32)
    needed = -(-np.asarray(lengths)[:, None] // page)
    table = np.where(np.arange(pages) < needed, table, -1)
    cache = PagedKVCache.create(
        table, total, page, key.shape[2], key.shape[3], value.shape[3], dtype
    )
    if dtype == jnp.int8:
        nothing = jnp.full(cache.key_scale.shape, fill, jnp.float32)
        cache = cache.replace(key_scale=nothing, value_scale=nothing)
    else:
        cache = cache.replace(
            key=jnp.full(cache.key.shape, fill, dtype),
            value=jnp.full(cache.value.shape, fill, dtype),
        )
    return cache.append(jnp.asarray(key), jnp.asarray(value), jnp.asarray(lengths, jnp.int32))
