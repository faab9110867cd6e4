"""The atlas: every mechanism attnlab holds, gathered from the files themselves."""

import difflib
import functools
import importlib
import pkgutil

from attnlab.core.entry import PATTERNS, PROPERTIES, Entry, Paper

FAMILIES = ("dense", "normalization", "positional", "heads", "linear", "distributed")

__all__ = ["FAMILIES", "PATTERNS", "PROPERTIES", "Entry", "Paper", "entries", "get"]


@functools.cache
def _gather() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for family in FAMILIES:
        package = importlib.import_module(f"attnlab.{family}")
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"attnlab.{family}.{info.name}")
            for name, entry in vars(module).items():
                if not name.startswith("ENTRY") or not isinstance(entry, Entry):
                    continue
                if entry.id in found:
                    raise ValueError(f"two mechanisms call themselves {entry.id!r}.")
                found[entry.id] = entry
    return found


def entries() -> dict[str, Entry]:
    """All entries by id, in the order of families and names."""
    return dict(_gather())


def get(id: str) -> Entry:
    """The entry with this id.

    Raises:
      ValueError: there is none; the message names those that look alike.
    """
    found = _gather()
    if id not in found:
        near = difflib.get_close_matches(id, found, n=3, cutoff=0.4)
        hint = (
            f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(found)}."
        )
        raise ValueError(f"id: no mechanism is called {id!r}{hint}")
    return found[id]
