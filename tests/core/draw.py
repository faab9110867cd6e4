"""What hypothesis draws: structure (masks, modifiers, shapes) as pairs of attnlab term and oracle.

Shapes come from a short list, so that compiled programs are shared; numbers come from a seed.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from attnlab import masks, scores
from tests import oracles


@dataclasses.dataclass(frozen=True)
class Sizes:
    batch: tuple[int, ...]
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    value_width: int


SIZES = (
    Sizes((), 1, 1, 1, 1, 4, 4),
    Sizes((2,), 5, 7, 4, 2, 8, 3),
    Sizes((2,), 63, 63, 2, 1, 4, 4),
    Sizes((2, 2), 12, 40, 2, 2, 4, 6),
)


def sizes():
    return st.sampled_from(SIZES)


def inputs(size: Sizes, seed: int, magnitude: float = 1.0):
    """Query, key and value as float32, so that every dtype and the oracle see the same numbers."""
    rng = np.random.default_rng(seed)

    def normal(*shape, by=1.0):
        return (by * rng.standard_normal(shape)).astype(np.float32)

    query = normal(*size.batch, size.queries, size.heads, size.width, by=magnitude)
    key = normal(*size.batch, size.keys, size.kv_heads, size.width)
    value = normal(*size.batch, size.keys, size.kv_heads, size.value_width)
    return query, key, value


@dataclasses.dataclass(frozen=True)
class Pair:
    """One thing said twice: `term` for attnlab, `oracle` for NumPy."""

    name: str
    term: Any
    oracle: Any


def _odd_positions(at):
    return ((at.query + 2 * at.key) % 3 != 1) | (at.head == 0)


def _odd_positions_oracle(i, j):
    def by_head(num_heads):
        head = np.arange(num_heads)[:, None, None]
        return ((i + 2 * j) % 3 != 1) | (head == 0)

    return by_head


def _near_center(at, center):
    return jnp.abs(at.key - center.astype(at.key.dtype)) < 4


def simple_mask(name: str, size: Sizes, seed: int) -> Pair:
    """A mask of the named kind, its data (if any) from the seed."""
    rng = np.random.default_rng(seed)
    batch, t, s = size.batch, size.queries, size.keys

    def integers(shape, low, high):
        return rng.integers(low, high, shape).astype(np.int32)

    if name == "full":
        return Pair(name, masks.Full(), oracles.full())
    if name == "causal":
        return Pair(name, masks.Causal(), oracles.causal())
    if name == "window":
        left, right = int(rng.integers(0, 6)), int(rng.integers(0, 4))
        return Pair(name, masks.SlidingWindow(left, right), oracles.window(left, right))
    if name == "half window":
        left = int(rng.integers(0, 6))
        return Pair(name, masks.SlidingWindow(left, None), oracles.window(left, None))
    if name == "prefix":
        length = int(rng.integers(0, s + 1))
        return Pair(name, masks.Prefix(length), oracles.prefix(length))
    if name == "prefix by batch":
        length = integers(batch, 0, s + 1)
        return Pair(name, masks.Prefix(jnp.asarray(length)), oracles.prefix(length))
    if name == "segments":
        rows, columns = np.sort(integers((*batch, t), -1, 3)), np.sort(integers((*batch, s), -1, 3))
        term = masks.Segments(jnp.asarray(rows), jnp.asarray(columns))
        return Pair(name, term, oracles.segments(rows, columns))
    if name == "causal by":
        rows, columns = integers((*batch, t), -2, 5), integers((*batch, s), -2, 7)
        term = masks.CausalBy(jnp.asarray(rows), jnp.asarray(columns))
        return Pair(name, term, oracles.causal_by(rows, columns))
    if name == "padding":
        lengths = integers(batch, 0, s + 1)
        return Pair(name, masks.KeyPadding(jnp.asarray(lengths)), oracles.key_padding(lengths))
    if name == "strided":
        stride, offset = int(rng.integers(1, 5)), int(rng.integers(0, 3))
        return Pair(name, masks.Strided(stride, offset), oracles.strided(stride, offset))
    if name == "array":
        allowed = rng.random((*batch, size.heads, t, s)) < 0.6
        return Pair(name, masks.ArrayMask(jnp.asarray(allowed)), oracles.array(allowed))
    if name == "array by head":
        allowed = rng.random((size.heads, t, 1)) < 0.7
        return Pair(name, masks.ArrayMask(jnp.asarray(allowed)), oracles.array(allowed))
    if name == "predicate":
        return Pair(
            name,
            masks.Predicate(_odd_positions),
            lambda i, j: _odd_positions_oracle(i, j)(size.heads),
        )
    if name == "predicate with params":
        center = int(rng.integers(0, s))
        return Pair(
            name,
            masks.Predicate(_near_center, jnp.asarray(center)),
            lambda i, j: np.abs(j + 0 * i - center) < 4,
        )
    raise ValueError(f"no mask named {name!r}")


MASKS = (
    "full",
    "causal",
    "window",
    "half window",
    "prefix",
    "prefix by batch",
    "segments",
    "causal by",
    "padding",
    "strided",
    "array",
    "array by head",
    "predicate",
    "predicate with params",
)


# Terms are built in the test's own body: inside a strategy, the run-time type checker's use of
# `random` would be hypothesis's business.


def mask_pair(data, size: Sizes, depth: int = 2) -> Pair:
    """A mask, or a combination of masks by and, or and not."""
    draw = data.draw
    operation = draw(st.sampled_from(["plain", "plain", "and", "or", "not"])) if depth else "plain"
    if operation == "plain":
        return simple_mask(draw(st.sampled_from(MASKS)), size, draw(st.integers(0, 10**6)))
    first = mask_pair(data, size, depth - 1)
    if operation == "not":
        return Pair(f"~({first.name})", ~first.term, oracles.negation(first.oracle))
    second = mask_pair(data, size, depth - 1)
    if operation == "and":
        return Pair(
            f"({first.name} & {second.name})",
            first.term & second.term,
            oracles.both(first.oracle, second.oracle),
        )
    return Pair(
        f"({first.name} | {second.name})",
        first.term | second.term,
        oracles.either(first.oracle, second.oracle),
    )


def _quadratic(score, at, params):
    distance = jnp.abs(at.relative).astype(score.dtype)
    return score - params["rate"] * jnp.square(distance) / 100.0 + params["shift"]


def modifier(name: str, size: Sizes, seed: int) -> Pair:
    """A score modifier of the named kind; the oracle takes the same float32 numbers."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    if name == "bias":
        values = normal(*size.batch, size.heads, size.queries, size.keys)
        return Pair(name, scores.Bias(jnp.asarray(values)), oracles.bias(values))
    if name == "bias by head":
        values = normal(size.heads, 1, size.keys)
        return Pair(name, scores.Bias(jnp.asarray(values)), oracles.bias(values))
    if name == "alibi":
        slopes = oracles.alibi_slopes(size.heads).astype(np.float32)
        return Pair(name, scores.AlibiSlopes(jnp.asarray(slopes)), oracles.alibi(slopes))
    if name in ("t5", "t5 both ways"):
        both_ways = name == "t5 both ways"
        table = normal(size.heads, 8)
        return Pair(
            name,
            scores.RelativeBias(jnp.asarray(table), bidirectional=both_ways, max_distance=20),
            oracles.t5_bias(table, bidirectional=both_ways, max_distance=20),
        )
    if name == "soft cap":
        cap = np.float32(1.5)
        return Pair(name, scores.SoftCap(jnp.asarray(cap)), oracles.soft_cap(cap))
    if name == "temperature":
        value = np.float32(0.7)
        return Pair(name, scores.Temperature(jnp.asarray(value)), oracles.temperature(value))
    if name == "temperature by head":
        value = np.exp(normal(size.heads, 1, 1))
        return Pair(name, scores.Temperature(jnp.asarray(value)), oracles.temperature(value))
    if name == "function":
        rate, shift = np.abs(normal(size.heads)), normal(size.heads)
        params = {"rate": jnp.asarray(rate), "shift": jnp.asarray(shift)}

        def oracle(score, i, j, head):
            distance = np.abs(j - i).astype(np.float64)
            return score - rate[head] * distance**2 / 100.0 + shift[head]

        return Pair(name, scores.ScoreFunction(_quadratic, params, "N"), oracle)
    raise ValueError(f"no modifier named {name!r}")


MODIFIERS = (
    "bias",
    "bias by head",
    "alibi",
    "t5",
    "t5 both ways",
    "soft cap",
    "temperature",
    "temperature by head",
    "function",
)


def modifier_pairs(data, size: Sizes, most: int = 2) -> tuple[Pair, ...]:
    names = data.draw(st.lists(st.sampled_from(MODIFIERS), max_size=most))
    return tuple(modifier(name, size, data.draw(st.integers(0, 10**6))) for name in names)


def check_refusal(refusal: NotImplementedError) -> None:
    """An implementation may refuse a call if it names one that can."""
    assert "reference" in str(refusal) or "blockwise" in str(refusal), refusal
