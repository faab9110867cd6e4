"""Atlas entries: what each mechanism's file says about itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

PATTERNS = ("noncausal self", "causal self", "noncausal cross", "causal cross")

# What an entry may claim; the contract tests every claim.
PROPERTIES = {
    "position-free": "permuting keys with their values changes nothing (without a mask)",
    "translation-invariant": "shifting all positions by the same amount changes nothing",
    "decode": "step-by-step decoding equals the whole sequence at once",
    "gqa": "key heads shared by query heads equal repeated key heads",
    "lse": "returns the log-sum-exp",
    "rows-sum-to-one": "weights of a query that sees any key sum to one",
    "linear-memory": "O(T + S) memory, forward and backward",
    "state": "decodes from a state whose size does not depend on the length",
}

# What a mask may say; each takes what the ones after it take.
MASKS = {
    "pairs": "any mask",
    "documents": "causal, padding and packed documents",
    "keys": "padding of keys and queries",
}

# What a gradient is.
GRADIENTS = {
    "slope": "the derivative",
    "kinked": "the derivative, which jumps where a unit turns on or off",
    "straight-through": "that of a surrogate, through signs that have none",
}

# What an entry's example is.
KINDS = {
    "mechanism": "maps query, key and value; `MultiHeadAttention` projects around it",
    "layer": "maps the input itself; its projections are its own",
}

ATTENTION = ("reference", "blockwise", "xla", "cudnn", "triton")  # of softmax attention
RECURRENCE = ("parallel", "chunked", "recurrent")  # of the linear-state recurrence


@dataclasses.dataclass(frozen=True)
class Paper:
    """Where a mechanism comes from."""

    title: str
    authors: str
    year: int
    arxiv: str | None = None
    venue: str | None = None

    @property
    def url(self) -> str | None:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    @property
    def cite(self) -> str:
        where = f"arXiv:{self.arxiv}" if self.arxiv else self.venue
        return f"{self.authors} ({self.year}). {self.title}." + (f" {where}." if where else "")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One mechanism in the atlas.

    `formula` is LaTeX; `time` and `memory` are growth classes in T queries, S keys, width H;
    `build(num_heads, head_width, *, rngs)` makes a small working example of `module`;
    `implementations` are those that the contract runs; `masks` says which masks a mechanism takes,
    one of `MASKS`; `gradient` says what a gradient is, one of `GRADIENTS`.  A layer (`kind`, one of
    `KINDS`) is called as `layer(x, mask=...)`, x "*B T F" with F = num_heads head_width.
    """

    id: str
    title: str
    family: str
    paper: Paper
    summary: str
    formula: str
    patterns: tuple[str, ...]
    time: str
    memory: str
    exact: str
    properties: frozenset[str]
    function: Callable
    module: type
    build: Callable
    implementations: tuple[str, ...] = ATTENTION
    masks: str = "pairs"
    gradient: str = "slope"
    kind: str = "mechanism"

    def __post_init__(self) -> None:
        for name, known in (("masks", MASKS), ("gradient", GRADIENTS), ("kind", KINDS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: entry {self.id!r} says {getattr(self, name)!r}; "
                    f"expected one of {list(known)}."
                )
        for name, allowed in (("patterns", PATTERNS), ("properties", PROPERTIES)):
            unknown = [x for x in getattr(self, name) if x not in allowed]
            if unknown:
                raise ValueError(
                    f"{name}: entry {self.id!r} names {unknown}; expected some of {list(allowed)}."
                )

    @property
    def source(self) -> str:
        """The module this entry lives in."""
        return self.module.__module__

    def as_dict(self) -> dict[str, Any]:
        """Everything a program may want to know, as plain data."""
        paper = dataclasses.asdict(self.paper) | {"url": self.paper.url}
        return {
            "id": self.id,
            "title": self.title,
            "family": self.family,
            "paper": paper,
            "summary": self.summary,
            "formula": self.formula,
            "patterns": list(self.patterns),
            "time": self.time,
            "memory": self.memory,
            "exact": self.exact,
            "implementations": list(self.implementations),
            "masks": self.masks,
            "gradient": self.gradient,
            "kind": self.kind,
            "properties": sorted(self.properties),
            "function": f"{self.function.__module__}.{self.function.__qualname__}",
            "module": f"{self.module.__module__}.{self.module.__qualname__}",
        }
