"""The benchmarks: the records that `attnlab bench NAME --save book/data/bench` left there."""

import json
import pathlib

MISSING = """Nothing was kept yet: `attnlab bench memory --save book/data/bench` keeps a table, and
the next `make html` shows it here.
"""


def pages(root: pathlib.Path) -> dict[str, str]:
    """`bench.md`: what was measured first, then what was counted by compilers."""
    records = (root / "book" / "data" / "bench").glob("*.json")
    records = sorted(records, key=lambda path: ("-" in path.stem, path.stem))
    parts = [section(json.loads(path.read_text("utf-8")), path) for path in records]
    return {"bench.md": HEAD + ("\n".join(parts) or MISSING)}


LONG = 30  # rows

HEAD = """# What it costs

Measured by `attnlab bench`, printed above the table on which machine, and kept as it came out; a
table whose title says "compiled for" was counted by a compiler, and nothing in it was timed.
`quality` trains every mechanism under one budget, `claims` tries small what papers found; both go
on where they were cut off.  Run the same command to have the numbers of your own machine.

"""


def section(record: dict, path: pathlib.Path) -> str:
    """One record: its title, the machine, the table, and the command that makes it again."""
    name, _, kind = path.stem.partition("-")
    command = f"{name} --compile-for {kind}" if kind else name
    title = record.get("title", name.capitalize())
    machine = record.get("machine", {})
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    notes = record.get("notes") or record.get("note") or []
    notes = [notes] if isinstance(notes, str) else notes
    return "\n".join(
        [f"## {title}", "", f"*{where}*" if where else "", "", *tables(record), "",
         *(f"- {note}" for note in notes), "", f"`attnlab bench {command}`", ""]
    )  # fmt: skip


def tables(record: dict) -> list[str]:
    """The rows of a record as Markdown, each with its target and whether it was met.

    What is the same in all rows is said once; a long table is shut until it is asked for.
    """
    marks = {True: "✓", False: "✗", None: ""}
    rows = [
        {**row["cells"], "target": f"{row['target']} {marks[row['passed']]}".strip()}
        for row in record["rows"]
    ]
    found = dict.fromkeys(name for row in rows for name in row)
    last = [name for name in ("note", "target") if name in found]
    columns = [name for name in found if name not in last] + last
    if len(rows) <= LONG:
        return ["", *grid(columns, rows)]
    values = {name: {row.get(name, "") for row in rows} for name in columns}
    same = {name: found.pop() for name, found in values.items() if len(found) == 1}
    said = [f"{name} {number(value)}" for name, value in same.items() if value != ""]
    above = [f"All rows: {', '.join(said)}.", ""] if said else []
    table = grid([name for name in columns if name not in same], rows)
    return [*above, f":::{{dropdown}} The table, {len(rows)} rows", "", *table, ":::"]


def grid(columns: list[str], rows: list[dict]) -> list[str]:
    """These columns of the rows as lines of Markdown."""
    body = [bars([row.get(name, "") for name in columns]) for row in rows]
    return [bars(columns), bars(["--:"] * len(columns)), *body]


def bars(cells: list) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(map(number, cells)) + " |"


def number(value: object) -> str:
    """Numbers with at most four significant digits and thousands set apart."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value).replace("|", "\\|")
