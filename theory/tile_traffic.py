r"""What the tiled algorithm moves between the large memory and the chip, entry by entry.

In tiles of r queries and c keys, rows of tiles outside, key width H, value width D, W = H + D:

    tiled   T W + c W L           L live tiles; dense L = T S / r c, so T W + (T / r) S W
    plain   T W + (T / r) S W + 4 T S      the table of weights written and read twice

A chip with room for M entries takes r = (M - c W) / (W + 2 + c) rows, which makes the traffic
O(T S W² / M), the order that Dao et al. (2022, Theorem 2) found for theirs and that no exact
algorithm improves for every M (their Proposition 3).  Their first algorithm has the columns
outside; for the same tiles that moves more, and is the counter-check.

The kernels below run in Pallas's interpreter.  Every read and every write of the large memory goes
through `_load` and `_store`, which count what passes: the check compares this count, made while
running, with the formula.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from attnlab.core import masks
from attnlab.core.entry import Paper
from attnlab.core.terms import Tile
from theory.theorem import Cell, Evidence, Key, Theorem

QUERIES, KEYS, KEY_WIDTH, VALUE_WIDTH = 128, 256, 16, 8
COLUMNS = ("algorithm", "mask", "tile", "live tiles", "moved", "count", "bound", "share")
CASES = (((8, 32), "none"), ((32, 32), "none"), ((32, 32), "causal"), ((64, 16), "window of 48"))
CHIPS = (1024, 4096)  # entries: the rows of a tile follow from it
MASKS: dict[str, masks.Mask] = {
    "none": masks.Full(),
    "causal": masks.Causal(),
    "window of 48": masks.Causal() & masks.SlidingWindow(47),
}
ROUNDING = 1e-5  # a kernel that counts must also be right


def count(
    live_tiles: int, tile: tuple[int, int], queries: int, key_width: int, value_width: int
) -> int:
    """Entries that the tiled algorithm moves: queries, outputs once, keys and values per tile."""
    return (queries + live_tiles * tile[1]) * (key_width + value_width)


def rows_that_fit(room: int, columns: int, key_width: int, value_width: int) -> int:
    """The most rows r of a tile for which the chip, with `room` entries, holds all it must.

    That is r queries with their sums, maxima and outputs, c keys and values, and r c scores.

    Raises:
      ValueError: not even one row fits.
    """
    width = key_width + value_width
    rows = (room - columns * width) // (width + 2 + columns)
    if rows < 1:
        need = columns * width + width + 2 + columns
        raise ValueError(f"room: a tile of {columns} keys needs {need} entries, got {room}.")
    return rows


def bound(room: int, columns: int, shape: tuple[int, int], widths: tuple[int, int]) -> float:
    """What is moved at most with `room` entries on the chip, rows a power of two."""
    (queries, keys), width = shape, sum(widths)
    per_room = (width + 2 + columns) / (room - columns * width)
    return width * (queries + keys) + 2 * queries * keys * width * per_room


def moved(
    algorithm: str, tile: tuple[int, int], mask: masks.Mask, key: Key | None = None
) -> tuple[int, int]:
    """Run "tiled", "columns outside" or "plain" in the interpreter: entries moved, live tiles.

    Raises:
      ArithmeticError: the kernel's answer is not attention's.
    """
    key = jax.random.key(0) if key is None else key
    shapes = ((QUERIES, KEY_WIDTH), (KEYS, KEY_WIDTH), (KEYS, VALUE_WIDTH))
    three = zip(jax.random.split(key, 3), shapes, strict=True)
    query, keys, value = (jax.random.normal(one, shape) for one, shape in three)
    some = ~mask.plan(QUERIES, KEYS, tile).empty
    lists = _lists(some.T if algorithm == "columns outside" else some)
    out, entries = _run(_KERNELS[algorithm], tile, mask, query, keys, value, *lists)
    right = _formula(mask, *(np.asarray(x, np.float64) for x in (query, keys, value)))
    off = float(np.abs(np.asarray(out) - right).max())
    if not off <= ROUNDING:
        raise ArithmeticError(f"moved: the {algorithm} kernel is off by {off:.2g}.")
    return int(entries), int(some.sum())


def _formula(mask: masks.Mask, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    allowed = np.asarray(mask.dense(QUERIES, KEYS))[0]
    weights = np.where(allowed, np.exp(query @ key.T / math.sqrt(KEY_WIDTH)), 0.0)
    return weights @ value / weights.sum(1, keepdims=True)


# --- the kernels; references are the large memory, values are on the chip


def _load(meter: Any, ref: Any, *where: Any) -> Array:
    block = ref[where]
    meter[0] += block.size
    return block


def _store(meter: Any, ref: Any, block: Array, *where: Any) -> None:
    ref[where] = block
    meter[0] += block.size


def _scores(
    query: Array, key: Array, i: Any, j: Any, tile: tuple[int, int], mask: masks.Mask
) -> Array:
    at = Tile(i * tile[0], j * tile[1], *tile, heads=1, rank=3).at()
    allowed = jnp.broadcast_to(mask.allowed(at), (1, *tile))[0]
    return jnp.where(allowed, query @ key.T / query.shape[1] ** 0.5, -jnp.inf)


def _finite(top: Array) -> Array:
    return jnp.where(jnp.isfinite(top), top, 0.0)


def _tiled(
    tile: tuple[int, int], mask: masks.Mask, q: Any, k: Any, v: Any, index: Any, live: Any,
    out: Any, meter: Any,
) -> None:  # fmt: skip
    """Rows of tiles outside: sums, maxima and outputs stay on the chip until a row is done."""
    (r, c), meter[0] = tile, 0

    def row(i: Any, _: Any) -> None:
        query = _load(meter, q, pl.ds(i * r, r))

        def visit(n: Any, state: Any) -> Any:
            acc, top, total = state
            j = index[i, n]
            key, value = (_load(meter, x, pl.ds(j * c, c)) for x in (k, v))
            scores = _scores(query, key, i, j, tile, mask)
            new = jnp.maximum(top, scores.max(1, keepdims=True))
            weights = jnp.exp(scores - _finite(new))
            old = jnp.exp(top - _finite(new))
            return old * acc + weights @ value, new, old * total + weights.sum(1, keepdims=True)

        start = (jnp.zeros((r, v.shape[1])), jnp.full((r, 1), -jnp.inf), jnp.zeros((r, 1)))
        acc, _, total = jax.lax.fori_loop(0, live[i], visit, start)
        _store(meter, out, acc / jnp.where(total > 0, total, 1.0), pl.ds(i * r, r))

    jax.lax.fori_loop(0, q.shape[0] // r, row, None)


def _columns_outside(
    tile: tuple[int, int], mask: masks.Mask, q: Any, k: Any, v: Any, index: Any, live: Any,
    out: Any, meter: Any,
) -> None:  # fmt: skip
    """Keys and values once; unfinished outputs, with their log-sum-exp, leave and come back."""
    (r, c), meter[0] = tile, 0
    width = v.shape[1]
    out[...] = jnp.zeros(out.shape).at[:, width].set(-jnp.inf)  # a fresh page costs nothing here

    def column(j: Any, _: Any) -> None:
        key, value = (_load(meter, x, pl.ds(j * c, c)) for x in (k, v))

        def visit(n: Any, _: Any) -> None:
            i = index[j, n]
            query, state = (_load(meter, x, pl.ds(i * r, r)) for x in (q, out))
            scores = _scores(query, key, i, j, tile, mask)
            before = state[:, width:]
            both = jnp.concatenate([before, scores], axis=1)
            top = _finite(both.max(1, keepdims=True))
            total = jnp.exp(both - top).sum(1, keepdims=True)
            lse = top + jnp.log(total)
            old, weights = (jnp.exp(x - _finite(lse)) for x in (before, scores))
            new = old * state[:, :width] + weights @ value
            _store(meter, out, jnp.concatenate([new, lse], axis=1), pl.ds(i * r, r))

        jax.lax.fori_loop(0, live[j], visit, None)

    jax.lax.fori_loop(0, k.shape[0] // c, column, None)


def _plain(
    tile: tuple[int, int], mask: masks.Mask, q: Any, k: Any, v: Any, index: Any, live: Any,
    out: Any, meter: Any, table: Any,
) -> None:  # fmt: skip
    """Three passes with the table of weights between them in the large memory."""
    (r, c), meter[0] = tile, 0
    across = k.shape[0] // c

    def row(i: Any, _: Any) -> None:
        rows = pl.ds(i * r, r)
        query = _load(meter, q, rows)

        def score(j: Any, _: Any) -> None:
            key = _load(meter, k, pl.ds(j * c, c))
            scores = _scores(query, key, i, j, tile, mask)
            _store(meter, table, scores, rows, pl.ds(j * c, c))

        jax.lax.fori_loop(0, across, score, None)
        _store(meter, table, jax.nn.softmax(_load(meter, table, rows), axis=1), rows)

        def mix(j: Any, acc: Array) -> Array:
            weights = _load(meter, table, rows, pl.ds(j * c, c))
            return acc + weights @ _load(meter, v, pl.ds(j * c, c))

        acc = jax.lax.fori_loop(0, across, mix, jnp.zeros((r, v.shape[1])))
        _store(meter, out, acc, rows)

    jax.lax.fori_loop(0, q.shape[0] // r, row, None)


_KERNELS: dict[str, Callable[..., None]] = {
    "tiled": _tiled,
    "columns outside": _columns_outside,
    "plain": _plain,
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    kernel: Callable[..., None],
    tile: tuple[int, int],
    mask: masks.Mask,
    query: Float[Array, "T H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S D"],
    index: Int[Array, "I M"],
    live: Int[Array, " I"],
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """A kernel's output and what its meter read; beside them, room for what it needs outside."""
    columns = value.shape[1] + (kernel is _columns_outside)
    shapes = [
        jax.ShapeDtypeStruct((query.shape[0], columns), query.dtype),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    ]
    if kernel is _plain:
        shapes.append(jax.ShapeDtypeStruct((query.shape[0], key.shape[0]), query.dtype))
    body = functools.partial(kernel, tile, mask)
    out, meter, *_ = pl.pallas_call(body, out_shape=shapes, interpret=True)(
        query, key, value, index, live
    )
    return out[:, : value.shape[1]], meter[0]


def _lists(some: np.ndarray) -> tuple[Int[Array, "I M"], Int[Array, " I"]]:
    """The live tiles of each row of a table, in front."""
    order = np.argsort(~some, axis=1, kind="stable").astype(np.int32)
    return jnp.asarray(order), jnp.asarray(some.sum(1).astype(np.int32))


# --- the experiments


def check(key: Key | None = None) -> Evidence:
    """Some tiles and masks, two chips and the plain form: entries that passed, counted."""
    rows = [_row("tiled", tile, name, key) for tile, name in CASES]
    rows += [_row("tiled", (_rows(room), 16), "none", key, room) for room in CHIPS]
    rows += [_row("plain", tile, name, key) for tile, name in CASES if name == "none"]
    return _evidence(rows, f"{QUERIES} queries, {KEYS} keys, widths {KEY_WIDTH} and {VALUE_WIDTH}")


def counter_check(key: Key | None = None) -> Evidence:
    """The loops swapped: for the same tiles, unfinished outputs travel once per column."""
    rows = [_row("columns outside", tile, name, key) for tile, name in CASES]
    return _evidence(
        rows, "columns of tiles outside, counted as if the rows were; wide tiles gain, others lose"
    )


def _rows(room: int) -> int:
    fit = rows_that_fit(room, 16, KEY_WIDTH, VALUE_WIDTH)
    return min(QUERIES, 2 ** (fit.bit_length() - 1))


def _row(
    algorithm: str, tile: tuple[int, int], name: str, key: Key | None, room: int | None = None
) -> tuple[Cell, ...]:
    entries, live = moved(algorithm, tile, MASKS[name], key)
    counted = count(live, tile, QUERIES, KEY_WIDTH, VALUE_WIDTH)
    if algorithm == "plain":
        counted += 4 * QUERIES * KEYS
    shares, most = [entries / counted, counted / entries], ""
    if room is not None:
        limit = bound(room, tile[1], (QUERIES, KEYS), (KEY_WIDTH, VALUE_WIDTH))
        shares.append(entries / limit)
        most = str(math.floor(limit))
    size = f"{tile[0]}×{tile[1]}"
    title = algorithm if room is None else f"{algorithm}, M = {room}"
    return (title, name, size, live, entries, counted, most, max(shares))


_evidence = partial(
    Evidence.of_ratios,
    "worst ratio of what moved to the count (either way up), or to the bound",
    COLUMNS,
)


THEOREM = Theorem(
    id="tile-traffic",
    title="what a tiled kernel moves",
    statement=(
        r"Let $T$ queries meet $S$ keys, $H$ and $D$ be the widths of keys and values, $W = H + "
        r"D$, and let $L$ tiles of $r$ queries and $c$ keys be live. The tiled algorithm moves "
        r"exactly $T W + c\,W L$ entries between the large memory and the chip; without a mask "
        r"that is $T W + (T/r)\,S W$. The plain form, in the same rows, moves $4\,T S$ more. With "
        r"$M$ entries on the chip and $r$ the largest power of two that fits, the traffic is at "
        r"most $W(T + S) + 2\,T S W \frac{W + 2 + c}{M - c W}$."
    ),
    assumptions=(
        "rows of tiles are the outer loop, so that outputs stay on the chip until they are done",
        r"$r$ and $c$ divide $T$ and $S$; for the bound $T$ is a power of two and a row fits",
        "nothing between the large memory and the chip keeps what has passed",
        "the list of live tiles, one number for each, is not counted",
    ),
    source=Paper(
        "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
        "Dao et al.",
        2022,
        "2205.14135",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"A query is read once and an output written once: $T W$. A live tile reads its $c$ keys "
        r"and values, $c W$. The plain form reads the same and writes and reads scores, then "
        r"weights: $4\,T S$. On the chip are $r$ queries with outputs, maxima and sums, $c$ keys "
        r"and values, and $r c$ scores, so $r (W + 2 + c) + c W \le M$, and the largest power of "
        r"two is more than half of the largest $r$, or is $T$ and then the keys pass once."
    ),
)
