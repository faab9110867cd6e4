"""Linear attention at length: chunked against recurrent and against softmax attention.

What linear attention promises is counted here: time per token that does not grow with the length, a
length from which it is faster than softmax attention, linear memory, and decoding whose step and
whose state do not grow with the context.  On a GPU or TPU the fused kernels are timed as well.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import attnlab
from attnlab.bench.harness import (
    MismatchError,
    Result,
    Row,
    Timing,
    check_same,
    compare,
    finish,
    time_in_turn,
)
from attnlab.bench.linear_peers import PEER, as_jax, missing_peer, peer
from attnlab.bench.memory import GROWTH, counted, growth
from attnlab.core.kernels import BACKENDS, missing
from attnlab.core.masks import Causal

LENGTHS, QUICK = (1024, 2048, 4096, 8192, 16384, 32768, 65536), (1024, 2048)
WIDTH, HEADS = 64, 2
FLAT = 1.3  # time per token, longest against FROM
FROM, CROSSOVER = 2048, 4096
STEADY = 1.25  # a decoding step, longest context against shortest
TOLERANCE, PEER_TOLERANCE = 1e-4, 1e-2  # of the largest entry, float32; the peer's is TF32
RULES = ("decay", "gated delta")
LIGHTNING = "lightning"  # a constant decay per head; timed where a kernel runs
LIGHTNING_AT, LIGHTNING_GAIN = 16384, 2.0  # the paper's claim, against a softmax flash kernel
PEER_SHARE = 0.9  # of flash-linear-attention's speed, at least
PASSES = ("forward", "with gradients")
SOFTMAX, CHUNKED, RECURRENT = "softmax blockwise", "chunked", "recurrent"


def inputs(length: int, rule: str, seed: int = 0) -> dict[str, Array]:
    """One sequence, float32: query, key, value, a decay per step and, for a delta rule, erasing."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shape = (1, length, HEADS, WIDTH)
    query, key, value = (jax.random.normal(k, shape) for k in keys[:3])
    key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    given = {"query": query, "key": key, "value": value}
    given["log_decay"] = -jax.nn.softplus(jax.random.normal(keys[3], shape[:-1]) - 2.0)
    if rule == LIGHTNING:
        given["log_decay"] = -(2.0 ** -jnp.arange(1.0, HEADS + 1))
    if rule == "gated delta":
        rate = jax.nn.sigmoid(jax.random.normal(keys[4], (*shape[:-1], 1)))
        given["value"], given["erase"] = rate * value, rate * key
        given["erase"] *= jnp.exp(given["log_decay"])[..., None]
    return given


def recurrence(implementation: str) -> Callable[[dict[str, Array]], Array]:
    """The linear recurrence of named inputs."""

    def run(given: dict[str, Array]) -> Array:
        return attnlab.linear_recurrence(
            given["query"], given["key"], given["value"], log_decay=given["log_decay"],
            erase=given.get("erase"), implementation=implementation,
        )  # fmt: skip

    return run


def softmax(given: dict[str, Array]) -> Array:
    """Causal softmax attention of the same queries, keys and values, in O(n) memory."""
    arrays = (given[name] for name in ("query", "key", "value"))
    fused = [name for name in BACKENDS if not missing(name)]
    return attnlab.attention(*arrays, mask=Causal(), implementation=(*fused, "blockwise")[0])


def passes(run: Callable, name: str) -> Callable:
    """The function, or its gradient by every input."""
    if name == "forward":
        return run
    return jax.grad(lambda given: jnp.sum(jnp.sin(run(given))))


def kernels() -> list[str]:
    """The fused kernels that run here."""
    return [name for name in ("triton", "tpu") if not missing(name)]


def forms() -> list[str]:
    """The implementations that run here."""
    return [CHUNKED, RECURRENT, *kernels()]


def measure(rule: str, kind: str, length: int, seconds: float) -> Row:
    """One line of the table of times."""
    given = inputs(length, rule)
    ready: dict[str, Any] = {}
    for name in (*forms(), SOFTMAX):
        run = softmax if name == SOFTMAX else recurrence(name)
        compiled = jax.jit(passes(run, kind)).lower(given).compile()
        ready[name] = lambda compiled=compiled: compiled(given)
    cells: dict[str, Any] = {"rule": rule, "pass": kind, "n": f"{length:,}"}
    same = {name: ready[name] for name in forms()}
    try:
        compare(same, tolerance=TOLERANCE, seconds=0.0, rounds=(1, 1))
        if not missing_peer():
            ready[PEER] = peer(rule, kind, given)
            if kind == "forward":
                check_same({PEER: as_jax(ready[PEER]())}, ready[CHUNKED](), PEER_TOLERANCE)
    except MismatchError as mismatch:
        cells[f"{CHUNKED} ms"] = f"not timed: {mismatch}"
        return Row(cells, target="same output", passed=False)
    timing = time_in_turn(ready, seconds=seconds, rounds=(1, 31))
    for name in ready:
        cells[f"{name} ms"] = f"{1e3 * timing.median(name):.4g}"
    cells["chunked µs per token"] = f"{1e6 * timing.median(CHUNKED) / length:.3g}"
    cells["softmax ÷ chunked"] = str(timing.ratio(SOFTMAX, CHUNKED))
    detail = {"length": length, "seconds": timing.seconds}
    detail["medians"] = {name: timing.median(name) for name in ready}
    asked, met = _asked(rule, kind, length, timing)
    return Row(cells, asked, met, detail)


def _asked(rule: str, kind: str, length: int, timing: Timing) -> tuple[str, bool | None]:
    """What is asked of a fused kernel, and whether it is met; nothing where none runs."""
    wanted: list[tuple[str, bool]] = []
    for name in kernels():
        if PEER in timing.seconds:
            speed = timing.ratio(PEER, name).median
            wanted.append((f"{name} ≥ {PEER_SHARE} × {PEER}", speed >= PEER_SHARE))
        if rule == LIGHTNING and kind == "forward" and length == LIGHTNING_AT:
            gain = timing.ratio(SOFTMAX, name).median
            wanted.append((f"{name} ≥ {LIGHTNING_GAIN:g} × softmax", gain >= LIGHTNING_GAIN))
    if not wanted:
        return "", None
    return ", ".join(words for words, _ in wanted), all(met for _, met in wanted)


def growth_of_time(rule: str, kind: str, lengths: tuple[int, int], seconds: float) -> Row:
    """Time per token of the chunked form, a long sequence in turn with a short one."""
    runs = {}
    for length in lengths:
        given = inputs(length, rule)
        compiled = jax.jit(passes(recurrence(CHUNKED), kind)).lower(given).compile()
        runs[str(length)] = lambda run=compiled, given=given: run(given)
    return flatness(rule, kind, time_in_turn(runs, seconds=seconds, rounds=(5, 15), warmup=2))


def flatness(rule: str, kind: str, timing: Timing) -> Row:
    """The verdict on times by length: whether a token takes as long in a long sequence."""
    short, long = sorted(timing.seconds, key=int)
    ratio, fair = timing.ratio(long, short), int(short) / int(long)
    said = f"× {fair * ratio.median:.2f} ({fair * ratio.low:.2f}–{fair * ratio.high:.2f})"
    cells = {"rule": rule, "pass": kind, "n": f"{int(long):,} ÷ {int(short):,}"}
    cells["chunked µs per token"] = said
    detail = {"seconds": timing.seconds}
    return Row(cells, f"≤ {FLAT}", fair * ratio.median <= FLAT, detail)


def crossover(rows: list[Row], rule: str, kind: str) -> Row:
    """Where the chunked form overtakes softmax attention for good."""
    times = {row.detail["length"]: row.detail["medians"] for row in rows if "medians" in row.detail}
    slower = [n for n, t in times.items() if t[CHUNKED] >= t[SOFTMAX]]
    ahead = min((n for n in times if n > max(slower, default=0)), default=None)
    where = "nowhere" if ahead is None else f"{ahead:,}"
    cells = {"rule": rule, "pass": kind, "n": "faster than softmax from"}
    cells["softmax ÷ chunked"] = where
    return Row(cells, f"< {CROSSOVER:,}", ahead is not None and ahead < CROSSOVER)


def memory(rule: str, kind: str, lengths: tuple[int, ...]) -> Row:
    """How temporaries of the chunked form grow, counted by the compiler."""
    sizes = []
    for length in lengths:
        shapes = jax.eval_shape(lambda length=length: inputs(length, rule))
        compiled = jax.jit(passes(recurrence(CHUNKED), kind)).lower(shapes).compile()
        sizes.append(counted(compiled))
    exponent = growth(lengths, sizes)
    said = f"{sizes[0] / 1e6:,.1f} to {sizes[-1] / 1e6:,.1f} MB, n^{exponent:.2f}"
    cells = {"rule": rule, "pass": kind, "n": "memory", f"{CHUNKED} ms": said}
    return Row(cells, "O(n)", exponent <= GROWTH, {"bytes": dict(zip(lengths, sizes, strict=True))})


def decoding(contexts: tuple[int, ...], steps: int = 64) -> Row:
    """A step of decoding behind contexts of many lengths: its time, and the size of its state."""

    @jax.jit
    def run(given: dict[str, Array], state: Array | None) -> tuple[Array, Array]:
        return attnlab.linear_recurrence(
            given["query"], given["key"], given["value"], log_decay=given["log_decay"],
            erase=given["erase"], initial_state=state, return_state=True,
        )  # fmt: skip

    one = {name: x[:, :1] for name, x in inputs(steps, "gated delta").items()}
    states = {n: run(inputs(n, "gated delta"), None)[1] for n in contexts}

    def walk(state: Array) -> Array:
        for _ in range(steps):
            out, state = run(one, state)
        return out

    timing = time_in_turn(
        {str(n): lambda s=state: walk(s) for n, state in states.items()},
        seconds=2.0, rounds=(5, 31),
    )  # fmt: skip
    first, last = (timing.median(str(n)) / steps for n in (contexts[0], contexts[-1]))
    sizes = {int(state.nbytes) for state in states.values()}
    said = f"{1e6 * first:.0f} µs after {contexts[0]:,}, {1e6 * last:.0f} µs after {contexts[-1]:,}"
    said += f"; state {'/'.join(f'{s:,}' for s in sorted(sizes))} bytes"
    cells = {"rule": "gated delta", "pass": "decoding", "n": "a step", f"{RECURRENT} ms": said}
    good = len(sizes) == 1 and last <= STEADY * first
    return Row(cells, f"constant (≤ {STEADY}×)", good)


def run(save: Any = None, quick: bool = False) -> Result:
    """Table of times by rule, pass and length; verdicts on growth, crossover, memory, decoding."""
    lengths, seconds = (QUICK, 0.5) if quick else (LENGTHS, 6.0)
    rows: list[Row] = []
    for rule in (*RULES, LIGHTNING) if kernels() else RULES:
        for kind in PASSES:
            measured = [measure(rule, kind, n, seconds) for n in lengths]
            rows += [*measured, crossover(measured, rule, kind)]
            rows.append(
                growth_of_time(rule, kind, QUICK if quick else (FROM, LENGTHS[-1]), seconds)
            )
            rows.append(memory(rule, kind, lengths if quick else (2048, 8192, 32768)))
    rows.append(decoding(QUICK if quick else (1024, 8192, 65536)))
    title = f"Linear attention, one sequence, {HEADS} heads of width {WIDTH}, float32"
    absent = missing_peer()
    notes = (*NOTES, *([f"flash-linear-attention: not beside ours, {absent}."] if absent else ()))
    return finish(Result("linear", title, tuple(rows), notes), save)


NOTES = (
    "decay: a decay per head and step (Mamba-2); gated delta: with erasing (Gated DeltaNet). "
    "Softmax attention is causal and in O(n) memory.",
)
