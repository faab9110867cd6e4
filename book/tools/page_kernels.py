"""The feature table of the kernels: ours beside others', each cell with where it was read.

What others do comes from their sources, named cell by cell; what ours do comes from tests, named
as well.  A table that is not complete is refused.
"""

import ast
import json
import pathlib
import re
from collections.abc import Iterator
from html import escape
from typing import Any

Table = dict[str, Any]
Row = dict[str, Any]

OURS = "attnlab"
MARKS = {"yes": "✓", "partly": "◐", "no": "✗", "n/a": "·"}
WORDS = {"yes": "yes", "partly": "partly", "no": "no", "n/a": "does not apply or not found"}
LONGEST_NOTE = 130
REPOSITORY = "https://github.com/attnlab/attnlab/blob/main/"


def load(root: pathlib.Path) -> Table:
    """The record: what was read, the columns, and the rows in groups."""
    return json.loads((root / "book" / "data" / "kernel_features.json").read_text("utf-8"))


def pages(root: pathlib.Path) -> dict[str, str]:
    """`kernels.md`.

    Raises:
      ValueError: a cell is pending, or lacks its test, source or reason.
    """
    table = load(root)
    wrong = [f"{place}: {what}" for place, what in problems(table, tests_in(root / "tests"))]
    if wrong:
        raise ValueError("kernel_features.json is not complete:\n  " + "\n  ".join(wrong))
    return {"kernels.md": page(table)}


def rows(table: Table) -> list[Row]:
    """All rows, of all groups."""
    return [row for group in table["groups"] for row in group["rows"]]


# --- what makes a table complete


def problems(table: Table, tests: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs (row and column, what is wrong with that cell); `tests` are those that exist."""
    names = [column["id"] for column in table["columns"]]
    ids = [row["id"] for row in rows(table)]
    for name in {name for name in ids if ids.count(name) > 1}:
        yield name, "two rows have this id"
    for row in rows(table):
        if list(row["cells"]) != names:
            yield row["id"], f"expected cells {names}, got {list(row['cells'])}"
            continue
        for name, cell in row["cells"].items():
            wrong = ours(row, cell, tests) if name == OURS else theirs(cell, table["read"])
            yield from ((f"{row['id']}, {name}", what) for what in (*common(cell), *wrong))


def common(cell: Row) -> Iterator[str]:
    """What any cell must have: a value that exists and a note of a readable length."""
    if cell["value"] not in MARKS:
        yield f"{cell['value']!r} is none of {', '.join(MARKS)}"
    if len(cell["note"]) > LONGEST_NOTE:
        yield f"a note of {len(cell['note'])} characters, more than {LONGEST_NOTE}"


def theirs(cell: Row, read: Table) -> Iterator[str]:
    """What another's cell must have: a source that was read, and words where there is no answer."""
    if not cell.get("sources"):
        yield "no source"
    for source in cell.get("sources", ()):
        known = read.get(source.get("in"))
        if known is None:
            yield f"nothing is said about the source {source.get('in')!r}"
        elif not source.get("at"):
            yield "a source without a place"
        elif "base" in known and not ("path" in source and "line" in source):
            yield "a source without a file and a line"
    if cell["value"] in ("partly", "n/a") and not cell["note"]:
        yield f"{cell['value']!r} without a note"


def ours(row: Row, cell: Row, tests: set[str]) -> Iterator[str]:
    """What our cell must have: a test where we say yes, a reason where only another can."""
    named = tests_of(cell)
    if cell["value"] in ("yes", "partly") and not named:
        yield "no test"
    for name in named:
        if name.partition("[")[0] not in tests:
            yield f"there is no test {name}"
    peers = [other["value"] for name, other in row["cells"].items() if name != OURS]
    behind = {"no": ("yes", "partly"), "n/a": ("yes", "partly"), "partly": ("yes",)}
    ahead = [value for value in peers if value in behind.get(cell["value"], ())]
    if ahead and not cell.get("reason"):
        yield "another has it, and no reason is given"


def tests_of(cell: Row) -> list[str]:
    """The tests a cell names: none, one or several."""
    test = cell.get("test") or []
    return [test] if isinstance(test, str) else test


def tests_in(folder: pathlib.Path) -> set[str]:
    """The tests that pytest would find under `folder`, by reading: "tests/a.py::Class::test"."""
    found = set()
    for path in folder.rglob("test_*.py"):
        name = path.relative_to(folder.parent).as_posix()
        found |= {f"{name}::{test}" for test in tests_of_body(ast.parse(path.read_text("utf-8")))}
    return found


def tests_of_body(body: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Names of the tests of a module or class, those of classes inside it included."""
    for node in body.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield node.name
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from (f"{node.name}::{name}" for name in tests_of_body(node))


# --- the page

HEAD = """# What the kernels can do, and what others' can

attnlab's kernels beside five others. A mark is a summary: point at it for the note, or open the
notes under a table for every cell's note and the line of source or documentation it was read in.

**✓** yes, **◐** partly, **✗** no, **·** does not apply, or was not found where we looked. A ✓ or ◐
of attnlab names the tests behind it; where another can do what attnlab cannot, the notes say why.

"""

STYLE = """<style>
table.kernels { border-collapse: collapse; table-layout: fixed; width: 100%; min-width: 46rem;
  font-size: 0.88rem; margin: 0.8rem 0 0.4rem; }
table.kernels th, table.kernels td { padding: 0.3rem 0.4rem; vertical-align: middle;
  border-bottom: 1px solid var(--pst-color-border); }
table.kernels thead th { text-align: center; vertical-align: bottom; font-weight: 600;
  font-size: 0.78rem; line-height: 1.2; border-bottom: 2px solid var(--pst-color-border); }
table.kernels thead th:first-child { width: 31%; text-align: left; }
table.kernels tbody th { position: sticky; left: 0; z-index: 1; text-align: left;
  font-weight: 400; background: var(--pst-color-background); }
table.kernels tbody th a { color: inherit; text-decoration: none; }
table.kernels tbody th a:hover { text-decoration: underline; }
table.kernels td { text-align: center; cursor: help; font-size: 1rem; }
table.kernels .ours { background: var(--pst-color-surface); }
.kernels-yes { color: var(--lab-pass); font-weight: 700; }
.kernels-partly { color: var(--lab-warm); }
.kernels-no { color: var(--lab-fail); }
.kernels-na { color: var(--pst-color-text-muted); }
details.kernels { margin: 0 0 1.6rem; font-size: 0.88rem; }
details.kernels > summary { cursor: pointer; color: var(--pst-color-link); }
details.kernels h4 { margin: 1.1rem 0 0.2rem; font-size: 0.95rem; }
details.kernels p { margin: 0 0 0.2rem; color: var(--pst-color-text-muted); }
details.kernels ul { margin: 0; padding-left: 1.1rem; }
details.kernels li > small { display: block; overflow-wrap: anywhere; }
details.kernels li > small code { font-weight: 400; }
</style>
"""


def page(table: Table) -> str:
    """The whole page: what is compared, a table per group, and its notes."""
    columns = "\n".join(f"- **{c['name']}**: {c['what']}" for c in table["columns"])
    read = "\n".join(f"- {known(entry)}" for entry in table["read"].values())
    parts = [HEAD + columns + "\n", STYLE]
    for group in table["groups"]:
        parts += [f"## {group['title']}\n", grid(group, table["columns"]), notes(group, table)]
    return "\n".join([*parts, f"## What was read\n\n{table['about']}\n\n{read}\n"])


def known(entry: Row) -> str:
    """One repository or page that was read, with its version."""
    link = entry.get("url") or f"https://github.com/{entry['repo']}"
    return f"[{entry['name']}]({link}), {entry['version']}"


def grid(group: Row, columns: list[Row]) -> str:
    """The table of a group: a row per feature, a mark per column."""
    head = "".join(
        f'<th scope="col"{own(column["id"])}>{escape(column["name"])}</th>' for column in columns
    )
    lines = [
        f'<tr><th scope="row"><a href="#kernels-{row["id"]}">{escape(row["feature"])}</a></th>'
        + "".join(mark(name, cell) for name, cell in row["cells"].items())
        + "</tr>"
        for row in group["rows"]
    ]
    return (
        '<div class="atlas-scroll"><table class="kernels">\n'
        f'<thead><tr><th scope="col">Feature</th>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>\n"
    )


def own(name: str) -> str:
    """The class attribute of our column."""
    return ' class="ours"' if name == OURS else ""


def mark(name: str, cell: Row) -> str:
    """One cell: a mark to see, a word to hear, the note on hovering."""
    title = escape(cell["note"] or WORDS[cell["value"]], quote=True)
    return f'<td title="{title}"{own(name)}>{sign(cell["value"])}</td>'


def sign(value: str) -> str:
    """A mark with its word for those who listen."""
    kind = value.replace("/", "")
    return (
        f'<span class="kernels-{kind}" aria-hidden="true">{MARKS[value]}</span>'
        f'<span class="visually-hidden">{WORDS[value]}</span>'
    )


def notes(group: Row, table: Table) -> str:
    """What stands behind the marks of a group, folded away."""
    names = {column["id"]: column["name"] for column in table["columns"]}
    parts = []
    for row in group["rows"]:
        parts.append(f'<h4 id="kernels-{row["id"]}">{escape(row["feature"])}</h4>')
        if row["about"]:
            parts.append(f"<p>{prose(row['about'])}</p>")
        items = (note(names[name], cell, table["read"]) for name, cell in row["cells"].items())
        parts.append("<ul>\n" + "\n".join(items) + "\n</ul>")
    return (
        f'<details class="kernels"><summary>Notes and sources: {escape(group["title"])}</summary>\n'
        + "\n".join(parts)
        + "\n</details>\n"
    )


def note(name: str, cell: Row, read: Table) -> str:
    """One cell in words: value, note, reason, then tests or sources."""
    said = [f"<strong>{escape(name)}</strong> {sign(cell['value'])}"]
    if cell["note"]:
        said.append(prose(cell["note"]) + ".")
    if cell.get("reason"):
        said.append(f"Why not: {prose(cell['reason'])}")
    places = [place(source, read) for source in cell.get("sources", ())]
    places += [
        f'<a href="{REPOSITORY}{test.partition("::")[0]}"><code>{escape(test)}</code></a>'
        for test in tests_of(cell)
    ]
    return f"<li>{' '.join(said)}<small>{'; '.join(places)}</small></li>"


def place(source: Row, read: Table) -> str:
    """A link to where a cell was read."""
    entry = read[source["in"]]
    if "url" in entry:
        return f'<a href="{entry["url"]}">{escape(entry["name"])}: {escape(source["at"])}</a>'
    # A release's line numbers are not those of the branch that is linked to.
    line = f"#L{source['line']}" if entry["lines"] else ""
    file = source["path"].rpartition("/")[2]
    where = f"{entry['name']}, <code>{escape(file)}</code>: <code>{escape(source['at'])}</code>"
    return f'<a href="{entry["base"]}{source["path"]}{line}">{where}</a>'


def prose(text: str) -> str:
    """Escaped text, with `code` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
