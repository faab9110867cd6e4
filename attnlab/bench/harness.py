"""Fair timing and honest tables.

Candidates are timed in turn, A B A B …, in one process after a warm-up, each call awaited: what
drifts on the machine drifts for all of them.  What counts is the ratio, of the medians and, to
show the spread, round by round.  Outputs are compared first, and where they differ no time is
taken.  A row says what was asked of it (`target`) and whether it came out so (`passed`).
"""

import dataclasses
import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Candidates = Mapping[str, Callable[[], Any]]


class MismatchError(Exception):
    """Candidates that should compute the same thing do not; says which and by how much."""


# -- time ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How much longer one candidate takes than another: of medians, and over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every round, by candidate."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """The median time of a candidate, in seconds."""
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, peer: str) -> Ratio:
        """The time of `name` as a multiple of that of `peer`; below 1 is faster."""
        pairs = np.asarray(self.seconds[name]) / np.asarray(self.seconds[peer])
        return Ratio(self.median(name) / self.median(peer), float(pairs.min()), float(pairs.max()))


def time_in_turn(
    candidates: Candidates,
    *,
    seconds: float = 10.0,
    rounds: tuple[int, int] = (5, 31),
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time the candidates in turn, as many rounds as fit `seconds`, within the bounds `rounds`.

    The order turns by one place each round, so that none always runs after the same other.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one, got none.")
    if not 1 <= rounds[0] <= rounds[1]:
        raise ValueError(f"rounds: expected 1 <= least <= most, got {rounds}.")

    def call(name: str) -> float:
        began = clock()
        jax.block_until_ready(candidates[name]())
        return clock() - began

    names = list(candidates)
    for _ in range(max(warmup, 1)):
        once = sum(call(name) for name in names)
    count = int(np.clip(seconds / max(once, 1e-9), *rounds))
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(count):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(call(name))
    return Timing({name: tuple(values) for name, values in taken.items()})


def check_same(outputs: Mapping[str, Any], expected: Any, tolerance: float) -> float:
    """The largest error of the outputs, relative to the largest entry of each expected array.

    Raises MismatchError where it exceeds `tolerance`, or where the structure is another.
    """
    worst = 0.0
    want, tree = jax.tree.flatten(expected)
    for name, output in outputs.items():
        got, other = jax.tree.flatten(output)
        if str(tree) != str(other) or [np.shape(x) for x in got] != [np.shape(x) for x in want]:
            raise MismatchError(f"{name}: its output has another structure than expected.")
        for a, b in zip(got, want, strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            error = float(np.max(np.abs(a - b), initial=0.0) / max(np.max(np.abs(b)), 1e-30))
            if not error <= tolerance:
                raise MismatchError(f"{name}: off by {error:.1e} where {tolerance:.0e} is allowed.")
            worst = max(worst, error)
    return worst


def compare(
    candidates: Candidates, *, tolerance: float, expected: Any = None, **options: Any
) -> Timing:
    """Time candidates that compute the same thing, after seeing that they do.

    `expected` is what they should give; the first candidate's output if left out.

    Raises MismatchError before anything is timed.
    """
    first = next(iter(candidates))
    if expected is None:
        expected = jax.block_until_ready(candidates[first]())
    for name, candidate in candidates.items():  # one output at a time, for the sake of memory
        check_same({name: candidate()}, expected, tolerance)
    return time_in_turn(candidates, **options)


# -- tables ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One line: what was measured, by column; the target, and whether it was met (None: no target).

    A cell is text for the eye or a number; `detail` holds the plain numbers for programs.
    """

    cells: Mapping[str, Any]
    target: str = ""
    passed: bool | None = None
    detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished benchmark: a table with the machine it was measured on."""

    name: str
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    machine: Mapping[str, Any] = dataclasses.field(default_factory=lambda: machine())

    @property
    def passed(self) -> bool | None:
        """Whether every target was met; None if there was none."""
        verdicts = [row.passed for row in self.rows if row.passed is not None]
        return all(verdicts) if verdicts else None

    @property
    def columns(self) -> list[str]:
        """The columns in the order in which rows bring them."""
        return list(dict.fromkeys(column for row in self.rows for column in row.cells))

    def show(self, console: Console | None = None) -> None:
        """Print the machine, the table and the notes."""
        console = console or _console()
        table = Table(title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE)
        for column in (*self.columns, "target", ""):
            first = next((row.cells[column] for row in self.rows if column in row.cells), "")
            numeric = _is_number(first)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in self.rows:
            cells = [_text(row.cells.get(column)) for column in self.columns]
            table.add_row(*cells, row.target, _MARKS[row.passed])
        console.print(describe(self.machine), style="dim", highlight=False)
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", highlight=False, markup=False)

    def to_json(self) -> dict[str, Any]:
        """Everything in it, as plain data."""
        plain = dataclasses.asdict(self)
        return {**plain, "passed": self.passed}

    def save(self, path: str | os.PathLike) -> Path:
        """Write JSON: to `path` if it ends in .json, else to NAME.json in that folder."""
        file = Path(path)
        if file.suffix != ".json":
            file = file / f"{self.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, default=_as_plain)
        unfinished = file.with_suffix(".part")
        unfinished.write_text(text + "\n", "utf-8")
        os.replace(unfinished, file)  # whoever is cut off here leaves the last record whole
        return file


def finish(result: Result, save: str | os.PathLike | None) -> Result:
    """Print the result and, if asked for, save it; what every `run` ends with."""
    result.show()
    if save is not None:
        result.save(save)
    return result


WIDE = 150
_MARKS = {True: "[green]✓[/]", False: "[red]✗[/]", None: ""}


def _console() -> Console:
    # In a file or a pipe there is no width to keep to.
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def _is_number(cell: Any) -> bool:
    return re.fullmatch(r"[\d.,]+×?( \(.*\))?", str(cell)) is not None


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:.3g}" if isinstance(cell, float) else escape(str(cell))


def _as_plain(x: Any) -> Any:
    return x.item() if hasattr(x, "item") else str(x)


# -- the machine -----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def describe(machine: Mapping[str, Any]) -> str:
    """One line about the machine."""
    return (
        f"{machine['cpu']} · {machine['cores']} cores · jax {machine['jax']} on "
        f"{machine['device']} · Python {machine['python']} · {machine['date']}"
    )


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):  # Linux: those that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes of main memory that a program may still take; None where that is unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
