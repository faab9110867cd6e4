"""The benchmarks: the records that `attnlab bench NAME --save` left in book/data."""

import json
import pathlib

MISSING = """No measurement has been kept yet: `attnlab bench memory --save` keeps one, and
the next `make html` shows it here.
"""


def pages(root: pathlib.Path) -> dict[str, str]:
    """`bench.md`."""
    records = sorted((root / "book" / "data").glob("bench-*.json"))
    parts = [section(json.loads(path.read_text("utf-8")), path) for path in records]
    return {"bench.md": HEAD + ("\n".join(parts) or MISSING)}


HEAD = """# What it costs

Measured by `attnlab bench`, printed above the table on which machine, and kept as it came out.
Run the same command to have the numbers of your own machine.

"""


def section(record: dict, path: pathlib.Path) -> str:
    """One record: its title, the machine, the table, and the command that makes it again."""
    name = path.stem.removeprefix("bench-")
    title = record.get("title", name.capitalize())
    machine = record.get("machine", {})
    where = machine if isinstance(machine, str) else ", ".join(map(str, machine.values()))
    notes = record.get("notes") or record.get("note") or []
    notes = [notes] if isinstance(notes, str) else notes
    return "\n".join(
        [f"## {title}", "", f"*{where}*" if where else "", "", *tables(record), "",
         *(f"- {note}" for note in notes), "", f"`attnlab bench {name}`", ""]
    )  # fmt: skip


def tables(record: dict) -> list[str]:
    """The tables of a record as Markdown; a row is a list or a mapping."""
    out = []
    for table in record.get("tables") or [record]:
        rows = table.get("rows", [])
        columns = table.get("columns") or (list(rows[0]) if rows else [])
        if table is not record and table.get("title"):
            out += ["", f"**{table['title']}**"]
        out += ["", bars(columns), bars(["--:"] * len(columns))]
        for row in rows:
            out.append(bars([row.get(c, "") for c in columns] if isinstance(row, dict) else row))
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
