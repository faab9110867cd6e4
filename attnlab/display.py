"""How the command shows the atlas on a terminal."""

import inspect
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markdown import Markdown
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from attnlab.core.entry import Entry


def atlas_table(entries: list[Entry]) -> Table:
    """Entries under a line for each family, narrow enough for 80 columns."""
    count = f"{len(entries)} mechanism{'' if len(entries) == 1 else 's'}"
    caption = f"{count}; attnlab show ID tells more about one"
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left"
    )
    for column in ("id", "self", "cross"):
        table.add_column(column, no_wrap=True)
    for column in ("time", "memory", "paper"):
        table.add_column(column)
    family = None
    for entry in sorted(entries, key=lambda entry: (entry.family, entry.id)):
        if entry.family != family:
            family = entry.family
            table.add_row(Text(family, "dim italic"))
        table.add_row(
            Text(f"  {entry.id}", "bold cyan"),
            _kinds(entry.patterns, "self"),
            _kinds(entry.patterns, "cross"),
            entry.time,
            entry.memory,
            Text(f"{_first_author(entry.paper.authors)} {entry.paper.year}"),
        )
    return table


def _first_author(authors: str) -> str:
    """Short, as one cites: Su et al.; Rabe & Staats."""
    return f"{authors.split(',')[0]} et al." if "," in authors else authors


def _kinds(patterns: tuple[str, ...], where: str) -> str:
    """Which of causal and noncausal attention there is: "both", one of them, or a dash."""
    kinds = [pattern.split()[0] for pattern in patterns if pattern.endswith(where)]
    return "both" if len(kinds) == 2 else (kinds[0] if kinds else "–")


def entry_panels(entry: Entry) -> list[RenderableType]:
    """One entry: formula, paper, facts, a program that uses it."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, value in {
        "family": entry.family,
        "patterns": ", ".join(entry.patterns),
        "time": entry.time,
        "memory": entry.memory,
        "exact": entry.exact,
        "properties": ", ".join(sorted(entry.properties)) or "none claimed",
        "function": _where(entry.function) + _signature(entry.function),
        "module": _where(entry.module),
        "source": entry.source,
    }.items():
        facts.add_row(name, Text(value))
    paper = entry.paper
    cited = Text.assemble(
        (f"{paper.title}\n", "italic"),
        f"{paper.authors} ({paper.year})",
        f"\n{paper.venue}" if paper.venue else "",
        (f"\n{paper.url}" if paper.url else "", "cyan"),
    )
    return [
        Panel(
            Group(Markdown(entry.summary), Text(f"\n{entry.formula.strip()}", style="green")),
            title=f"[bold]{entry.title}[/] [dim]({entry.id})[/]",
            title_align="left",
        ),
        Panel(cited, title="paper", title_align="left"),
        Panel(facts, title="facts", title_align="left"),
        Panel(
            Syntax(usage(entry), "python", background_color="default", word_wrap=True),
            title="use",
            title_align="left",
        ),
    ]


def usage(entry: Entry) -> str:
    """A program that uses the entry in a model, as text that runs."""
    causal = "causal self" in entry.patterns
    mask = ", mask=attnlab.masks.Causal()" if causal else ""
    built = f'attnlab.atlas.get("{entry.id}").build(4, 32, rngs=nnx.Rngs(0))'
    made = [f"layer = {built}"]
    if entry.kind == "mechanism":
        made = [
            f"mechanism = {built}",
            "layer = attnlab.MultiHeadAttention(",
            "    128, 4, mechanism=mechanism, rngs=nnx.Rngs(1)",
            ")",
        ]
    pooled = entry.kind == "layer" and not any(p.endswith("self") for p in entry.patterns)
    lines = [
        "import jax",
        "from flax import nnx",
        "import attnlab",
        "",
        *made,
        "x = jax.random.normal(jax.random.key(0), (2, 16, 128))",
        f"y = layer(x{mask})  # (2, {4 if pooled else 16}, 128)",
    ]
    if causal and entry.kind == "mechanism":
        lines += ["", f"# on real text:  attnlab train --attention {entry.id} --data stdlib"]
    return "\n".join(lines)


def _signature(function: Callable[..., Any]) -> str:
    names = inspect.signature(function).parameters
    return f"({', '.join(names)})"


def _where(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
