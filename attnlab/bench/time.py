"""Time on this machine: blockwise attention against the materialising forms.

The same inputs, in one process and in turn.  A materialising form is left out where it would not
fit in memory; there the table shows our time alone.
"""

from collections.abc import Callable
from typing import Any

import jax

from attnlab.bench.harness import MismatchError, Result, Row, available_memory, compare, finish
from attnlab.bench.subjects import FORMULA, LIBRARY, OURS, attentions, inputs, with_gradients

LENGTHS, QUICK = (512, 1024, 2048, 4096, 8192, 16384), (512, 1024)
HEADS = (1, 4)
TOLERANCE = 1e-4  # of the largest entry, float32
NEVER_SLOWER, FASTER_FROM = 1.05, 4096
PASSES: dict[str, Callable] = {"forward": lambda f: f, "with gradients": with_gradients}


def bound(length: int) -> float:
    """The largest ratio of our time to a peer's that is good enough."""
    return 1.0 if length >= FASTER_FROM else NEVER_SLOWER


def measure(passes: str, causal: bool, heads: int, length: int, seconds: float) -> Row:
    """One line of the table."""
    arguments = inputs(length, heads)
    arguments = arguments if passes == "with gradients" else arguments[:3]
    limit = available_memory()
    ready: dict[str, Any] = {}
    for name, function in attentions(causal=causal).items():
        compiled = jax.jit(PASSES[passes](function)).lower(*arguments).compile()
        analysis = compiled.memory_analysis()
        needed = 0 if analysis is None else analysis.temp_size_in_bytes
        if name == OURS or limit is None or needed < 0.5 * limit:
            ready[name] = lambda compiled=compiled: compiled(*arguments)
    cells = {
        "pass": passes,
        "mask": "causal" if causal else "none",
        "heads": heads,
        "n": f"{length:,}",
    }
    try:
        timing = compare(ready, tolerance=TOLERANCE, seconds=seconds, rounds=(3, 101))
    except MismatchError as mismatch:
        return Row({**cells, "ms": f"not timed: {mismatch}"}, target="same output", passed=False)
    ratios = {name: timing.ratio(OURS, name) for name in (LIBRARY, FORMULA) if name in ready}
    for name in (OURS, LIBRARY, FORMULA):
        cells[f"{name} ms"] = f"{1e3 * timing.median(name):.4g}" if name in ready else "too large"
    cells |= {f"ours ÷ {name}": str(ratio) for name, ratio in ratios.items()}
    worst = max((ratio.median for ratio in ratios.values()), default=None)
    good = None
    if worst is not None:
        good = worst < 1 if length >= FASTER_FROM else worst <= NEVER_SLOWER
    sign = "<" if length >= FASTER_FROM else "≤"
    return Row(
        cells,
        target="" if worst is None else f"{sign} {bound(length):.3g}",
        passed=good,
        detail={"seconds": timing.seconds},
    )


def run(save: Any = None, quick: bool = False) -> Result:
    """Table of times by pass, mask, heads and length, with ratios (and their range by round)."""
    lengths, heads = (QUICK, (1,)) if quick else (LENGTHS, HEADS)
    rows = [
        measure(passes, causal, count, length, seconds=0.5 if quick else 6.0)
        for passes in PASSES
        for causal in (False, True)
        for count in heads
        for length in lengths
    ]
    title = "Time, one sequence, heads of width 64, float32; ratios below 1: blockwise is faster"
    return finish(Result("time", title, tuple(rows)), save)
