"""Rows of a benchmark as Markdown: a table, claims with their verdicts, a league of mechanisms."""

import html

LEADERS = 20  # rows of the league in sight
SHADES = {"holds here": "success", "does not hold here": "muted"}  # else in between


def claims(rows: list[dict]) -> list[str]:
    """Each claim with a badge of its verdict, then what the paper found and what was found here."""
    lines = ["::::{div} claims", ""]
    for cells in (row["cells"] for row in rows):
        verdict, claim, ours = cells["verdict"], cells["claim"], cells["ours"].split("; ")
        badge = f"{{bdg-{SHADES.get(verdict, 'warning')}}}`{verdict}`"
        here = f"- *here, {cells['seeds']} seeds:*"
        lines += [
            f"**{claim[:1].upper()}{claim[1:]}** {badge}",
            "",
            f"- *{page(cells['mechanism'], cells['mechanism'])}, the paper:* {cells['paper']}",
            *([f"{here} {ours[0]}"] if len(ours) == 1 else [here, *(f"  - {x}" for x in ours)]),
            "",
        ]
    return [*lines, "::::"]


def league(rows: list[dict]) -> list[str]:
    """The mechanisms in order, the first in sight; under them which were not trained, and why."""
    ran = [row["cells"] | {"mechanism": name(row)} for row in rows if "loss" in row["cells"]]
    counts = sorted((row["parameters"] for row in ran), key=lambda x: (len(x), x))
    lines = [f"All have {counts[0]} to {counts[-1]} parameters.", ""] if ran else []
    ran = [{k: x for k, x in row.items() if k not in ("family", "parameters")} for row in ran]
    marks = marked(ran)
    lines += [*grid(heads(ran[:LEADERS]), ran[:LEADERS]), ""]
    if rest := ran[LEADERS:]:
        lines += [f":::{{dropdown}} The other {len(rest)}", "", *grid(heads(rest), rest), ":::", ""]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "loss" not in row["cells"]:
            reasons.setdefault(row["cells"]["note"], []).append(name(row))
    out = [f"Not trained ({why}): {', '.join(names)}." for why, names in reasons.items()]
    return [*lines, *(f"- {line}" for line in [*marks, *out])]


def marked(rows: list[dict]) -> list[str]:
    """Put a number for its note beside a mechanism, in place of the note; what numbers mean."""
    notes = list(dict.fromkeys(row["note"] for row in rows if row.get("note")))
    for row in rows:
        if note := row.pop("note", None):
            row["mechanism"] += f" <sup>{notes.index(note) + 1}</sup>"
    return [f"<sup>{place}</sup> {note}" for place, note in enumerate(notes, 1)]


def name(row: dict) -> str:
    """The mechanism of a row of the league, with its family to be seen on hovering."""
    cells = row["cells"]
    return page(row["detail"]["key"], cells["mechanism"], cells["family"])


def page(id: str, shown: str, more: str = "") -> str:
    """A mechanism, leading to its page of the atlas."""
    title = f' title="{html.escape(more)}"' if more else ""
    return f'<a href="atlas/{id}.html"{title}>{html.escape(shown)}</a>'


def heads(rows: list[dict]) -> list[str]:
    """The columns of these rows, a note and the target last; no target where none has one."""
    found = dict.fromkeys(name for row in rows for name in row)
    last = [name for name in ("note", "target") if name in found]
    if not any(row.get("target") for row in rows):
        last = [name for name in last if name != "target"]
    return [name for name in found if name not in ("note", "target")] + last


def grid(columns: list[str], rows: list[dict]) -> list[str]:
    """These columns of the rows as lines of Markdown; words to the left, numbers to the right."""
    body = [bars([row.get(name, "") for name in columns]) for row in rows]
    return [bars(columns), bars([side(name, rows) for name in columns]), *body]


def side(name: str, rows: list[dict]) -> str:
    """How a column is aligned: to the left if most of its values begin with a letter."""
    cells = [str(row[name]) for row in rows if row.get(name)]
    words = [cell for cell in cells if cell[0].isalpha() or cell.startswith("<a ")]
    return ":--" if 2 * len(words) > len(cells) else "--:"


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
