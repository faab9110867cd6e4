"""The atlas: one table of all mechanisms, to search and to sort, and a page for each."""

from html import escape

import page_support

PATTERNS = ("noncausal self", "causal self", "noncausal cross", "causal cross")
EMPTY = """# The atlas

No mechanism is in the atlas yet.
"""


def pages(rows: page_support.Rows) -> dict[str, str]:
    """`atlas/index.md` and one page per entry."""
    from attnlab import atlas

    entries = list(atlas.entries().values())
    if not entries:
        return {"atlas/index.md": EMPTY}
    shown: set[str] = set()
    made = {f"atlas/{entry.id}.md": mechanism(entry, rows, shown) for entry in entries}
    return {"atlas/index.md": index(entries)} | made


def index(entries: list) -> str:
    """The table with its search box and chips; without JavaScript it is still a table."""
    families = sorted({entry.family for entry in entries})
    chips = "".join(
        f'<button type="button" class="atlas-chip" data-family="{escape(name)}" '
        f'aria-pressed="false">{escape(name)}</button>'
        for name in families
    )
    options = "".join(f'<option value="{name}">{name}</option>' for name in PATTERNS)
    body = "\n".join(table_row(entry) for entry in entries)
    return f"""# The atlas of attention

Every mechanism in attnlab, gathered from the files that implement it. The same table is
printed by `attnlab atlas`, and given to programs by `attnlab atlas --json`.

<div class="atlas" data-atlas>
<div class="atlas-tools" hidden>
<input type="search" placeholder="Search names, papers, formulas …" aria-label="Search the atlas">
<select aria-label="Pattern"><option value="">any pattern</option>{options}</select>
<span class="atlas-chips">{chips}</span>
<output></output>
</div>
<div class="atlas-scroll">
<table class="atlas-table">
<thead><tr>
<th data-sort="text">Mechanism</th><th data-sort="text">Family</th><th data-sort="number">Year</th>
<th data-sort="text">Time</th><th data-sort="text">Memory</th><th>Patterns</th>
</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
</div>
"""


def table_row(entry) -> str:
    """One row; what the search looks through is in its data attributes."""
    paper = entry.paper
    words = " ".join([entry.id, entry.title, entry.summary, paper.title, str(paper.authors),
                      entry.formula, *sorted(entry.properties)])  # fmt: skip
    return (
        f'<tr data-words="{escape(words.lower())}" data-family="{escape(entry.family)}" '
        f'data-patterns="{escape("|".join(entry.patterns))}">'
        f'<td><a href="{entry.id}.html"><strong>{escape(entry.title)}</strong></a>'
        f"<small>{escape(entry.summary)}</small></td>"
        f"<td>{escape(entry.family)}</td><td>{paper.year}</td>"
        f"<td><code>{escape(entry.time)}</code></td><td><code>{escape(entry.memory)}</code></td>"
        f'<td class="patterns">{patterns(entry)}</td></tr>'
    )


def patterns(entry) -> str:
    """Self- and cross-attention on a line each: without a mask, causal, or both."""
    lines = []
    for kind in ("self", "cross"):
        named = {"noncausal": "full", "causal": "causal"}
        ways = [word for name, word in named.items() if f"{name} {kind}" in entry.patterns]
        lines += [f"<span>{kind}: {', '.join(ways)}</span>"] if ways else []
    return "".join(lines)


def mechanism(entry, rows: page_support.Rows, shown: set[str]) -> str:
    """The page of one mechanism; `shown` names what earlier pages have documented."""
    own = [row for row in rows if row["entry"] == entry.id]
    found = f"\n## What the contract found\n\n{page_support.matrix(own)}\n" if own else ""
    return f"""# {entry.title}

<p class="lede">{escape(entry.summary)}</p>

$$
{entry.formula}
$$

{facts(entry)}

## In code

```python
{example(entry)}
```

```{{eval-rst}}
{documented("autofunction", entry.function, shown)}

{documented("autoclass", entry.module, shown)}
   :members: {"__call__, embed" if entry.kind == "mechanism" else "__call__"}
```
{found}"""


def documented(directive: str, thing, shown: set[str]) -> str:
    """A directive; what two entries share is indexed where it is met first."""
    name = f"{thing.__module__}.{thing.__qualname__}"
    again = name in shown
    shown.add(name)
    return f".. {directive}:: {name}" + ("\n   :no-index:" if again else "")


def facts(entry) -> str:
    """What one wants to know before using it, as a definition table."""
    from attnlab.atlas import PROPERTIES

    paper = entry.paper
    claims = "; ".join(f"**{name}**, {PROPERTIES[name]}" for name in sorted(entry.properties))
    cells = {
        "Paper": f"{paper.authors} ({paper.year}). "
        + (f"[*{paper.title}*]({paper.url})" if paper.url else f"*{paper.title}*")
        + (f". {paper.venue}" if paper.venue else ""),
        "Family": entry.family,
        "Patterns": ", ".join(entry.patterns),
        "Time": f"`{entry.time}`",
        "Memory": f"`{entry.memory}`",
        "Exactness": entry.exact,
        "Claims tested": claims or "none beyond the contract",
        "Source": f"`{entry.source}`",
    }
    lines = "\n".join(f"* - {name}\n  - {value}" for name, value in cells.items())
    return f":::{{list-table}}\n:class: facts\n:widths: 18 82\n\n{lines}\n:::"


def example(entry) -> str:
    """The few lines that use it, the same for every entry."""
    mask = ", mask=attnlab.masks.Causal()" if "causal self" in entry.patterns else ""
    built = f'attnlab.atlas.get("{entry.id}").build(num_heads=8, head_width=64, rngs=nnx.Rngs(0))'
    made = f"layer = {built}"
    if entry.kind == "mechanism":
        made = f"""mechanism = {built}
layer = attnlab.MultiHeadAttention(512, 8, mechanism=mechanism, rngs=nnx.Rngs(0))"""
    return f"""import attnlab
from flax import nnx

{made}
y = layer(x{mask})  # x: (batch, length, 512)"""
