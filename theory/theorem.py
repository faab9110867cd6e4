"""A theorem one can run: the statement, what it assumes, and two experiments.

`check` measures the quantity the theorem bounds and puts the bound beside it. `counter_check`
drops one assumption, named in the evidence, and measures again: a theorem whose counter-check
still holds assumes too much. Evidence compares numbers and nothing else, so it cannot be talked
into holding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Array, PRNGKeyArray

from attnlab.core.entry import Paper

Key = Array | PRNGKeyArray
Cell = str | int | float | bool


@dataclass(frozen=True)
class Evidence:
    """What was measured against what was promised; `rows` is the table behind it.

    `measured` is the worst value of `quantity` over all rows and `bound` the largest the theorem
    allows; a value that is not a number, or not finite, does not hold.
    """

    quantity: str
    measured: float
    bound: float
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        ragged = [row for row in self.rows if len(row) != len(self.columns)]
        if ragged:
            raise ValueError(
                f"rows: every row needs {len(self.columns)} cells {self.columns}, got {ragged[0]}."
            )

    @classmethod
    def of_ratios(
        cls, quantity: str, columns: tuple[str, ...], rows: Sequence[tuple[Cell, ...]], note: str
    ) -> "Evidence":
        """Where the last column is a ratio of what is measured to what the theorem allows."""
        return cls(quantity, worst(rows), 1.0, columns, tuple(rows), note)

    @property
    def holds(self) -> bool:
        """Whether what was measured is a finite number within the bound."""
        return math.isfinite(self.measured) and self.measured <= self.bound

    @property
    def verdict(self) -> str:
        """The comparison in one line."""
        sign = "≤" if self.holds else "≰"
        word = "holds" if self.holds else "does not hold"
        return f"{word}: {self.quantity}: {_cell(self.measured)} {sign} {_cell(self.bound)}"

    def column(self, name: str) -> tuple[Cell, ...]:
        """One column of the table, for plotting."""
        if name not in self.columns:
            raise ValueError(f"name: expected one of {self.columns}, got {name!r}.")
        return tuple(row[self.columns.index(name)] for row in self.rows)

    def __str__(self) -> str:
        table = [self.columns, *(tuple(map(_cell, row)) for row in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.columns))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in table]
        return "\n".join([*lines, self.verdict, *([self.note] if self.note else [])])

    def __rich__(self) -> Any:
        from rich.table import Table

        style = "green" if self.holds else "red"
        table = Table(title=f"[{style}]{self.verdict}[/]", caption=self.note or None)
        for name in self.columns:
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(*map(_cell, row))
        return table

    def _repr_markdown_(self) -> str:
        lines = [_bars(self.columns), _bars("--:" for _ in self.columns)]
        lines += [_bars(map(_cell, row)) for row in self.rows]
        mark = "✓" if self.holds else "✗"
        return "\n".join([*lines, "", f"{mark} **{self.verdict}** {self.note}"])

    def _repr_html_(self) -> str:
        cell = 'style="text-align:right;padding:.15em .9em"'
        head = "".join(f"<th {cell}>{escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td {cell}>{escape(_cell(c))}</td>" for c in row) + "</tr>"
            for row in self.rows
        )
        colour, mark = ("#009e73", "✓") if self.holds else ("#d55e00", "✗")
        return (
            f'<table class="dataframe evidence"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>"
            f'<p class="evidence"><strong style="color:{colour}">{mark}</strong> '
            f"{escape(self.verdict)}<br><em>{escape(self.note)}</em></p>"
        )


@dataclass(frozen=True)
class Theorem:
    """A statement, its assumptions and the two functions that test it, deterministic in `key`."""

    id: str
    title: str
    statement: str
    assumptions: tuple[str, ...]
    source: Paper
    check: Callable[..., Evidence] = field(repr=False)
    counter_check: Callable[..., Evidence] = field(repr=False)
    proof: str = field(default="", repr=False)

    def _repr_markdown_(self) -> str:
        given = "\n".join(f"- {assumption}" for assumption in self.assumptions)
        proof = f"\n\n*Proof.* {self.proof} $\\blacksquare$" if self.proof else ""
        return (
            f"**Theorem ({self.title}).** {self.statement}\n\n*Assuming*\n\n{given}{proof}\n\n"
            f"*Source:* {self.source.cite}"
        )


def worst(rows: Sequence[tuple[Cell, ...]], column: int = -1) -> float:
    """The largest number in a column of a table; a NaN anywhere makes it NaN, which never holds."""
    return float(np.max(np.array([row[column] for row in rows], np.float64)))


def _cell(value: Cell) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _bars(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
