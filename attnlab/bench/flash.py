"""Fused attention on this machine: every implementation and every peer, side by side.

    attnlab bench flash                      attnlab bench flash --case alibi --lengths 4096,8192

Time is device time as a user sees it: each is called several times in a row and awaited once,
all of them in turn.  "backward" is the time of the gradients in query, key and value alone, from
what the forward pass kept.  TFLOP/s counts the pairs that the mask allows (`flash_cases`), and so
can only be lowered by work on others; "of matmul" is its share of the rate of one large product of
matrices of the same dtype, timed in the same rounds.  MB are the compiler's temporaries, and for
backward also what was kept.  "÷ best" is the time as a multiple of the fastest peer's, "÷ plain" as
a multiple of the same implementation's without the modifier, the normalizer or the sparsity.

Whatever disagrees with blockwise attention in float32 is not timed: the table gives its error.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.bench.flash_candidates import Candidate, arguments, candidate, reference
from attnlab.bench.flash_cases import CASES, Case, Shape, chosen
from attnlab.bench.flash_peers import KERNELS, OURS, Maker, platform, subjects
from attnlab.bench.harness import Result, Row, Timing, finish, time_in_turn

LENGTHS, WIDTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536), (64, 128, 256)
BY_LENGTH = ("dense", "causal")  # the others are measured at one length and width
ON_CPU = ("dense", "causal", "window", "packed", "alibi", "sigmoid", "sparse 25%")
MATMUL, PLAIN = "matmul", ", plain"
PASSES = ("forward", "backward")
# Against cuDNN, causal, width 128, 8k to 32k: at least 0.95 of its speed forward, 0.9 backward.
BARS = {"forward": 1 / 0.95, "backward": 1 / 0.9}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a platform is asked: small on a CPU, where no fused kernel runs."""

    dtype: Any
    lengths: tuple[int, ...]
    widths: tuple[int, ...]
    at: tuple[int, int]  # length and width of the cases not measured by length
    tokens: int  # batch times length, about
    features: int  # heads times width
    matmul: int  # side of the matrices whose product is the yardstick
    seconds: float  # of measuring, for each group of candidates
    call_for: float  # seconds of calls in a row before one waits
    names: tuple[str, ...]  # the cases, unless one is asked for
    plain: bool  # whether to time these beside what they add to

    def shape(self, length: int, width: int, name: str = "") -> Shape:
        if name in ("array", "random"):  # as in JAX's pull request 35114
            return Shape(1, length, max(self.features // width, 1), width)
        batch = max(self.tokens // length, 1)
        return Shape(batch, length, max(self.features // width, 1), width)


def settings(quick: bool = False) -> Settings:
    """The settings of this machine."""
    if platform() == "cpu":
        small = Settings(
            jnp.float32, (512,), (64,), (256, 64), 0, 128, 512, 0.2, 0.0, ON_CPU, False
        )  # fmt: skip
        less = dataclasses.replace(small, lengths=(128,), at=(128, 64), seconds=0.02)
    else:
        small = Settings(
            jnp.bfloat16, LENGTHS, WIDTHS, (4096, 128), 16384, 2048, 8192, 0.5, 5e-3,
            tuple(CASES), True,
        )  # fmt: skip
        less = dataclasses.replace(small, lengths=(4096,), widths=(128,))
    return dataclasses.replace(less, names=("causal", "alibi")) if quick else small


# -- one group -------------------------------------------------------------------------------------


def measure(case: Case, passes: str, makers: dict[str, Maker], given: Settings) -> Iterator[Row]:
    """The rows of one case and pass: all candidates, compared, then timed in turn."""
    inputs = arguments(case.shape, given.dtype)
    want = reference(case, passes, inputs)
    ready = {n: candidate(m, case, passes, inputs, want, given.dtype) for n, m in makers.items()}
    if case.plain is not None and given.plain:
        want = reference(case.plain, passes, inputs)
        ours = [n for n in makers if n.startswith(OURS) and ready[n].call is not None]
        for name in ours:
            ready[name + PLAIN] = candidate(
                makers[name], case.plain, passes, inputs, want, given.dtype
            )
    square = jax.random.normal(jax.random.key(1), (given.matmul,) * 2).astype(given.dtype)
    matmul = jax.jit(jnp.matmul)
    ready[MATMUL] = Candidate(lambda: matmul(square, square))
    timing = _time(ready, given)
    rate = 2 * given.matmul**3 / timing.median(MATMUL)
    yield from _rows(case, passes, {n: ready[n] for n in makers}, timing, rate)


def _time(ready: dict[str, Candidate], given: Settings) -> Timing:
    """Seconds of one call, by candidate, each measured over as many calls as fill `call_for`."""
    calls = {name: each.call for name, each in ready.items() if each.call is not None}
    counts = dict.fromkeys(calls, 1)
    if given.call_for:
        once = time_in_turn(calls, rounds=(2, 2))
        counts = {n: max(1, min(50, round(given.call_for / once.median(n)))) for n in calls}

    def repeat(name: str) -> Callable[[], Any]:
        def run() -> Any:
            for _ in range(counts[name] - 1):
                calls[name]()
            return calls[name]()

        return run

    timing = time_in_turn(
        {name: repeat(name) for name in calls}, seconds=given.seconds, rounds=(3, 51)
    )
    return Timing({n: tuple(s / counts[n] for s in v) for n, v in timing.seconds.items()})


def _rows(
    case: Case, passes: str, ready: dict[str, Candidate], timing: Timing, rate: float
) -> Iterator[Row]:
    timed = [name for name, each in ready.items() if each.call is not None]
    peers = [name for name in timed if not name.startswith(OURS)]
    best = min(peers, key=timing.median, default=None)
    kernels = [name for name in timed if name.removeprefix(OURS) in KERNELS]
    leading = min(kernels, key=timing.median, default=None)
    shape = case.shape
    for name, each in ready.items():
        cells: dict[str, Any] = {
            "case": case.name,
            "pass": passes,
            "B·T·N·H": "·".join(map(str, (shape.batch, shape.length, shape.heads, shape.width))),
            "who": name,
        }
        if each.call is None:
            broken = each.wrong and name.startswith(OURS)
            yield Row({**cells, "note": each.error}, passed=False if broken else None)
            continue
        speed = case.flops(passes) / timing.median(name)
        cells |= {
            "ms": f"{1e3 * timing.median(name):.4g}",
            "TFLOP/s": f"{speed / 1e12:.3g}",
            "of matmul": f"{100 * speed / rate:.0f} %",
            "MB": f"{each.temporaries / 1e6:,.1f}",
            "÷ best": "best" if name == best else _times(timing, name, best),
        }
        plain = name + PLAIN
        over = timing.ratio(name, plain).median if plain in timing.seconds else None
        if case.plain is not None:
            cells["÷ plain"] = "" if over is None else f"{over:.2f}"
        target, passed = "", None
        if name == leading:
            target, passed = _verdict(case, passes, name, timing, over)
        detail = {"seconds": timing.seconds[name], "temporaries": each.temporaries}
        detail |= {"matmul": rate, "flops": case.flops(passes)}
        yield Row(cells, target, passed, detail)


def _times(timing: Timing, name: str, other: str | None) -> str:
    return "" if other is None else f"{timing.ratio(name, other).median:.2f}"


def _verdict(
    case: Case, passes: str, name: str, timing: Timing, over: float | None
) -> tuple[str, bool | None]:
    """What is asked of our fastest kernel in this row, and whether it came out so."""
    cudnn, shape = "jax.nn cudnn", case.shape
    if case.allowance is not None and over is not None:
        return f"÷ plain ≤ {case.allowance:.2f}", over <= case.allowance
    asked = case.name == "causal" and shape.width == 128 and 8192 <= shape.length <= 32768
    if asked and cudnn in timing.seconds:
        bar = BARS[passes]
        return f"÷ cudnn ≤ {bar:.2f}", timing.ratio(name, cudnn).median <= bar
    return "", None


# -- the table -------------------------------------------------------------------------------------


def groups(
    given: Settings, names: Sequence[str], lengths: Sequence[int], widths: Sequence[int]
) -> Iterator[Case]:
    """The cases to measure: some at all lengths and widths, others at one unless asked."""
    for name in names:
        spread = name in BY_LENGTH
        for width in widths or (given.widths if spread else given.at[1:]):
            for length in lengths or (given.lengths if spread else given.at[:1]):
                yield CASES[name](given.shape(length, width, name))


def run(
    save: Any = None,
    quick: bool = False,
    *,
    case: str | None = None,
    lengths: Sequence[int] = (),
    widths: Sequence[int] = (),
    compile_for: str | None = None,
) -> Result:
    """Table of all implementations and peers, by case, pass, length and width.

    Args:
      case: one of `flash_cases.CASES`, or the first word of several; all of them by default.
      lengths, widths: instead of the platform's.
      compile_for: a TPU ("v4", "v5e", "v5p", "v6e"): what its compiler says, on any machine;
        nothing is timed (`flash_compiled`).

    Raises:
      ValueError: an unknown case or device, or a length or width that is not positive.
    """
    if any(size < 1 for size in (*lengths, *widths)):
        raise ValueError(f"lengths, widths: expected positive ints, got {lengths}, {widths}.")
    if compile_for is not None:
        from attnlab.bench import flash_compiled

        return flash_compiled.run(
            compile_for, save, quick, case=case, lengths=lengths, widths=widths
        )
    given = settings(quick)
    if case is None:
        names = given.names
    else:
        names, given = tuple(chosen(case)), dataclasses.replace(given, plain=True)
    makers, absent = subjects()
    rows = [
        row
        for each in groups(given, names, lengths, widths)
        for passes in PASSES
        for row in measure(each, passes, makers, given)
    ]
    dtype = jnp.dtype(given.dtype).name
    title = f"Fused attention, {dtype}; ÷ best: time as a multiple of the fastest peer's"
    return finish(
        Result("flash", title, tuple(rows), tuple(f"not here: {x}" for x in absent)), save
    )
