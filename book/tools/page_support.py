"""The support table: what the contract tests found, entry by entry."""

import json
import pathlib
from collections import Counter
from html import escape
from typing import Any

Rows = list[dict[str, Any]]
MARKS = {"pass": "✓", "fail": "✗", "n/a": "·"}
MISSING = """# What is tested, and passes

No record of a test run was found. `make support` runs the contract over every mechanism,
writes the record, and the next `make html` shows it here.
"""


def find(root: pathlib.Path) -> pathlib.Path | None:
    """The newest run on this machine if there is one, else the record kept in the repository."""
    for path in (root / "build" / "support.json", root / "book" / "data" / "support.json"):
        if path.exists():
            return path
    return None


def load(root: pathlib.Path) -> Rows:
    """The rows of the record: entry, property, dtype, implementation, status, note."""
    path = find(root)
    record = json.loads(path.read_text("utf-8")) if path else []
    if isinstance(record, dict):
        about = {key: value for key, value in record.items() if key != "rows"}
        return [row | {"about": about} for row in record["rows"]]
    return record


def pages(rows: Rows) -> dict[str, str]:
    """`support.md`."""
    return {"support.md": table(rows) if rows else MISSING}


def ordered(rows: Rows, key: str) -> list[str]:
    """The values of a column in order of first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def verdict(rows: Rows) -> str:
    """The worst of the statuses: a failure anywhere shows."""
    seen = {row["status"] for row in rows}
    return next((status for status in ("fail", "pass") if status in seen), "n/a")


def cell(rows: Rows) -> str:
    """One cell of the table: the verdict, how many runs are behind it, and which on hovering."""
    counts = Counter(row["status"] for row in rows)
    total = counts["pass"] + counts["fail"]
    kind = verdict(rows)
    shown = MARKS[kind] + (f"<small>{counts['pass']}/{total}</small>" if total else "")
    notes = [
        f"{row['implementation']} {row['dtype']}: {row['status']}"
        + (f" ({row['note']})" if row.get("note") else "")
        for row in rows
    ]
    title = escape("\n".join(notes), quote=True)
    return f'<td class="{kind.replace("/", "")}" title="{title}">{shown}</td>'


def grid(rows: Rows, across: str, down: str, heading: str) -> str:
    """A table of verdicts: one row per value of `down`, one column per value of `across`."""
    columns = ordered(rows, across)
    head = "".join(f'<th scope="col"><span>{label(name, across)}</span></th>' for name in columns)
    lines = []
    for name in ordered(rows, down):
        own = [row for row in rows if row[down] == name]
        cells = "".join(cell([row for row in own if row[across] == c]) for c in columns)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f'<div class="atlas-scroll"><table class="support"><thead><tr><th>{heading}</th>{head}'
        f"</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def label(name: str, column: str) -> str:
    """A heading; an entry's leads to its page."""
    shown = escape(name)
    return f'<a href="atlas/{shown}.html">{shown}</a>' if column == "entry" else shown


def matrix(rows: Rows) -> str:
    """Property against implementation and dtype, for one entry."""
    flat = [row | {"where": f"{row['implementation']} · {row['dtype']}"} for row in rows]
    return grid(flat, across="where", down="property", heading="Property")


def table(rows: Rows) -> str:
    """The page: a sentence of totals, then property against entry, per implementation a tab."""
    counts = Counter(row["status"] for row in rows)
    about = rows[0].get("about", {})
    made = "; ".join(f"{key} {value}" for key, value in about.items())
    tabs = "\n".join(
        f"::::{{tab-item}} {name}\n{grid(own, 'entry', 'property', 'Property')}\n::::"
        for name, own in groups(rows)
    )
    return f"""# What is tested, and passes

Every mechanism in the atlas is put through the same contract; nothing here is typed in by
hand. A cell counts the runs behind it (dtypes and implementations) and lists them when
pointed at: **✓** all passed, **✗** at least one failed, **·** the property does not apply.

{counts["pass"]} runs passed, {counts["fail"]} failed, {counts["n/a"]} do not apply.
{f"Made by: {made}." if made else ""}

:::::{{tab-set}}
{tabs}
:::::
"""


def groups(rows: Rows) -> list[tuple[str, Rows]]:
    """All rows together, then one group per implementation."""
    names = ordered(rows, "implementation")
    each = [(name, [row for row in rows if row["implementation"] == name]) for name in names]
    return [("all", rows), *each] if len(each) > 1 else each
