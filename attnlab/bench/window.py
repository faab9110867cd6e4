"""What a window saves: 256 keys to a query at length 16k, against the full causal form.

Both are blockwise attention; only the mask differs.  The tiles it leaves over are counted beside
the time, since skipping them is where the time goes.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

import attnlab
from attnlab.bench.harness import MismatchError, Result, Row, check_same, finish, time_in_turn
from attnlab.bench.subjects import inputs, with_gradients
from attnlab.bench.time import TOLERANCE
from attnlab.core.masks import Causal, Mask, SlidingWindow

LENGTH, QUICK, WINDOW = 16384, 2048, 256
TARGET = 0.1
TILE = 128  # for counting
HEADS = (1, 4)
PASSES: dict[str, Callable] = {"forward": lambda f: f, "with gradients": with_gradients}


def attend(mask: Mask, implementation: str = "blockwise", offset: int = 0) -> Callable:
    """Attention under a mask as a function of query, key and value."""

    def function(query: Array, key: Array, value: Array) -> Array:
        return attnlab.attention(
            query, key, value, mask=mask, implementation=implementation, query_offset=offset
        )

    return function


def check(mask: Mask, arguments: list[Array], wrap: Callable) -> None:
    """See that the first and last queries get what the plain formula gives them.

    Gradients are compared on a shorter sequence, for every entry.  Raises MismatchError.
    """
    query, key, value, cotangent = arguments
    length, rows = query.shape[1], min(64, query.shape[1])
    out = jax.jit(attend(mask))(query, key, value)
    for first in (0, length - rows):
        part = slice(first, first + rows)
        want = attend(mask, "reference", first)(query[:, part], key, value)
        check_same({"blockwise": out[:, part]}, want, TOLERANCE)
    short = [x[:, : min(1000, length)] for x in (query, key, value, cotangent)]
    short = short if wrap is with_gradients else short[:3]
    got, want = (jax.jit(wrap(attend(mask, name)))(*short) for name in ("blockwise", "reference"))
    check_same({"blockwise": got}, want, TOLERANCE)


def tiles(mask: Mask, length: int) -> str:
    """How many tiles hold something, of how many."""
    counts = mask.plan(length, length, (TILE, TILE)).counts()
    return f"{counts['full'] + counts['partial']:,} of {sum(counts.values()):,}"


def run(save: Any = None, quick: bool = False) -> Result:
    """Table of the time of the window and of the causal form, with ratios and tile counts."""
    length, heads = (QUICK, (1,)) if quick else (LENGTH, HEADS)
    window, causal = SlidingWindow(WINDOW - 1), Causal()
    rows = []
    for passes, wrap in PASSES.items():
        for count in heads:
            everything = inputs(length, count)
            arguments = everything if passes == "with gradients" else everything[:3]
            cells = {"pass": passes, "heads": count, "n": f"{length:,}"}
            target = f"≤ {TARGET}" if length == LENGTH else ""
            try:
                for mask in (window, causal):
                    check(mask, everything, wrap)
            except MismatchError as mismatch:
                cells["window ms"] = f"not timed: {mismatch}"
                rows.append(Row(cells, "same output", passed=False))
                continue
            compiled = {
                name: jax.jit(wrap(attend(mask))).lower(*arguments).compile()
                for name, mask in (("window", window), ("causal", causal))
            }
            timing = time_in_turn(
                {name: lambda f=f, x=arguments: f(*x) for name, f in compiled.items()},
                seconds=0.5 if quick else 10.0,
                rounds=(5, 31),
            )
            ratio = timing.ratio("window", "causal")
            cells |= {
                "window ms": f"{1e3 * timing.median('window'):.4g}",
                "causal ms": f"{1e3 * timing.median('causal'):.4g}",
                "window ÷ causal": str(ratio),
                f"window's tiles of {TILE}": tiles(window, length),
                f"causal tiles of {TILE}": tiles(causal, length),
            }
            passed = ratio.median <= TARGET if target else None
            rows.append(Row(cells, target, passed, {"seconds": timing.seconds}))
    title = f"A window of {WINDOW} keys against the full causal form, width 64, float32"
    return finish(Result("window", title, tuple(rows)), save)
