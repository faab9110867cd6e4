"""Telling a person how training goes: a bar on a terminal, plain lines elsewhere."""

from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from attnlab.training.loop import Progress


class Reporter(AbstractContextManager):
    """A context manager; call it with each `Progress`.

    On a terminal: a bar with loss, tokens per second and time left.  Elsewhere (a file, a
    notebook's log) one line at each evaluation and every `lines_every` steps.
    """

    def __init__(self, console: Console | None = None, *, start: int = 0, lines_every: int = 100):
        self.console = Console() if console is None else console
        self.lines_every = lines_every
        self._start = start
        self._next_line = 0
        self._bar: Bar | None = None
        self._task: Any = None

    def __enter__(self) -> "Reporter":
        if self.console.is_terminal:
            self._bar = Bar(
                TextColumn("[bold]training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[speed]} tokens/s"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=None, loss="…", speed="…")
        return self

    def __call__(self, progress: Progress) -> None:
        """Shows one progress message."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                total=progress.steps,
                completed=progress.step,
                loss=f"{progress.loss:.4f}",
                speed=f"{progress.tokens_per_second:,.0f}",
            )
        elif progress.step >= self._next_line and progress.evaluation is None:
            self._next_line = progress.step + self.lines_every
            self.console.print(
                f"step {progress.step} of {progress.steps}  loss {progress.loss:.4f}"
                f"  {progress.tokens_per_second:,.0f} tokens/s",
                highlight=False,
            )
        if progress.evaluation is not None:
            self.console.print(
                f"step {progress.step} of {progress.steps}  loss {progress.loss:.4f}"
                f"  validation {progress.evaluation:.4f}",
                highlight=False,
            )

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()
