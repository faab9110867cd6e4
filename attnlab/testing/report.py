"""What a check found: one line for each thing looked at, a table to print, a picture."""

import base64
import dataclasses
import html
import importlib.util
import io
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from attnlab.core.masks import TilePlan

OK, NOTE, SKIPPED, FAILED = "ok", "note", "skipped", "failed"
_WIDTH, _NAME, _STATUS = 100, 14, 8


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    `name` says what ("gradient"), `subject` where ("blockwise, .slopes"), `status` is "ok", "note"
    (true, worth knowing, no defect), "skipped" (could not be looked at, and why) or "failed".
    """

    name: str
    status: str
    message: str
    subject: str = ""

    def __str__(self) -> str:
        status = self.status.upper() if self.status == FAILED else self.status
        head = f"{status:<{_STATUS}}{self.name:<{_NAME}}"
        text = f"{self.subject}: {self.message}" if self.subject else self.message
        return textwrap.fill(
            text,
            _WIDTH,
            initial_indent=head,
            subsequent_indent=" " * (_STATUS + _NAME),
            break_on_hyphens=False,
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """All findings of one check.

    Print it for a table; in a notebook it shows itself with its picture.  `plan` is the tile plan
    of the mask, where there is one.
    """

    title: str
    sizes: str
    findings: tuple[Finding, ...]
    plan: TilePlan | None = None
    draw: Callable[[], Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing failed.  Notes and what was skipped do not count."""
        return not self.failed

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings that failed."""
        return tuple(f for f in self.findings if f.status == FAILED)

    def find(self, name: str) -> tuple[Finding, ...]:
        """The findings of one name, such as "gradient"."""
        return tuple(f for f in self.findings if f.name == name)

    def raise_if_failed(self) -> "Report":
        """The report itself, so that a test is one line.

        Raises:
          AssertionError: something failed; the message is the report.
        """
        if not self.ok:
            raise AssertionError(str(self))
        return self

    def figure(self) -> Any:
        """A matplotlib figure of what was checked.

        Raises:
          ImportError: matplotlib is not installed.
          ValueError: what was checked could not be evaluated, so there is nothing to draw.
        """
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("figure: needs matplotlib; install it, or print the report instead.")
        if self.draw is None:
            raise ValueError("figure: nothing could be evaluated; print the report for the reason.")
        return self.draw()

    def summary(self) -> str:
        """One line: passed or failed, and how many findings of each kind."""
        counts = {s: sum(f.status == s for f in self.findings) for s in (FAILED, OK, NOTE, SKIPPED)}
        words = ", ".join(f"{n} {s}" for s, n in counts.items() if n)
        return f"{'passed' if self.ok else 'FAILED'} ({words})"

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.title}: {self.summary()}", self.sizes, "", *map(str, self.findings)]
        )

    def _repr_html_(self) -> str:
        colors = {OK: "#2e7d32", NOTE: "#1565c0", SKIPPED: "#757575", FAILED: "#c62828"}
        rows = "".join(
            f'<tr><td style="color:{colors[f.status]}">{f.status}</td>'
            + "".join(
                f'<td style="text-align:left">{html.escape(x)}</td>'
                for x in (f.name, f.subject, f.message)
            )
            + "</tr>"
            for f in self.findings
        )
        head = "".join(f"<th>{x}</th>" for x in ("", "what", "where", "found"))
        return (
            f"<p><b>{html.escape(self.title)}</b>: {html.escape(self.summary())}<br>"
            f"{html.escape(self.sizes)}</p>{self._image()}<table><tr>{head}</tr>{rows}</table>"
        )

    def _image(self) -> str:
        if self.draw is None or importlib.util.find_spec("matplotlib") is None:
            return ""
        file = io.BytesIO()
        self.draw().savefig(file, format="png", dpi=80)
        data = base64.b64encode(file.getvalue()).decode()
        return f'<img alt="{html.escape(self.title)}" src="data:image/png;base64,{data}">'


class Collector:
    """Runs checks one after another; what one of them raises is a finding, not an end."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(self, name: str, status: str, message: str, subject: str = "") -> None:
        self.findings.append(Finding(name, status, message, subject))

    def run(self, name: str, check: Callable[[], Iterable[Finding]], subject: str = "") -> bool:
        """Collect the findings of `check`; True if none of them failed."""
        before = len(self.findings)
        try:
            self.findings.extend(check())
        except NotImplementedError as refusal:
            self.add(name, SKIPPED, one_line(refusal), subject)
        except Exception as error:  # the user's code is being run: anything may come out of it
            self.add(name, FAILED, f"raised {type(error).__name__}: {one_line(error)}", subject)
        return all(f.status != FAILED for f in self.findings[before:])


def one_line(error: BaseException, limit: int = 400) -> str:
    """The words of an exception, without line breaks."""
    words = " ".join(str(error).split())
    return words if len(words) <= limit else words[: limit - 1] + "…"
