"""The benchmarks: the records that `attnlab bench NAME --save book/data/bench` left there."""

import json
import pathlib

MISSING = """Nothing was kept yet: `attnlab bench memory --save book/data/bench` keeps a table, and
the next `make html` shows it here.
"""


def pages(root: pathlib.Path) -> dict[str, str]:
    """`bench.md`."""
    records = sorted((root / "book" / "data" / "bench").glob("*.json"))
    parts = [section(json.loads(path.read_text("utf-8")), path) for path in records]
    return {"bench.md": HEAD + ("\n".join(parts) or MISSING)}


HEAD = """# What it costs

Measured by `attnlab bench`, printed above the table on which machine, and kept as it came out; a
table whose title says "compiled for" was counted by a compiler, and nothing in it was timed.
Run the same command to have the numbers of your own machine.

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
    """The rows of a record as Markdown, each with its target and whether it was met."""
    rows = record["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row["cells"]))
    out = ["", bars([*columns, "target", ""]), bars(["--:"] * (len(columns) + 2))]
    marks = {True: "✓", False: "✗", None: ""}
    for row in rows:
        cells = [row["cells"].get(name, "") for name in columns]
        out.append(bars([*cells, row["target"], marks[row["passed"]]]))
    return out


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
