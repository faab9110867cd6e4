"""The benchmarks: the records that `attnlab bench NAME --save book/data/bench` left there.

A record is a table, shut where it is long.  Two are made for reading: claims of papers, each a
paragraph with its verdict, and the league of mechanisms, the first of them in sight.
"""

import json
import pathlib

from bench_tables import claims, grid, heads, league, number

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
        [f"## {title}", "", f"*{where}*" if where else "", "", *form(record), "",
         *(f"- {note}" for note in notes), "", f"`attnlab bench {command}`", ""]
    )  # fmt: skip


def form(record: dict) -> list[str]:
    """The rows of a record in the form that suits them."""
    rows = record["rows"]
    if rows and all({"claim", "verdict"} <= row["cells"].keys() for row in rows):
        return claims(rows)
    lines = league(rows) if record.get("name") == "quality" else tables(record)
    return ["::::::{div} numbers", "", *lines, "::::::"]


def tables(record: dict) -> list[str]:
    """The rows of a record as Markdown, each with its target and whether it was met.

    What is the same in all rows is said once; a long table is shut until it is asked for.
    """
    marks = {True: "✓", False: "✗", None: ""}
    rows = [
        {**row["cells"], "target": f"{row['target']} {marks[row['passed']]}".strip()}
        for row in record["rows"]
    ]
    columns = heads(rows)
    if len(rows) <= LONG:
        return ["", *grid(columns, rows)]
    values = {name: {row.get(name, "") for row in rows} for name in columns}
    same = {name: given.pop() for name, given in values.items() if len(given) == 1}
    said = [f"{name} {number(value)}" for name, value in same.items() if value != ""]
    above = [f"All rows: {', '.join(said)}.", ""] if said else []
    table = grid([name for name in columns if name not in same], rows)
    return [*above, f":::{{dropdown}} The table, {len(rows)} rows", "", *table, ":::"]
