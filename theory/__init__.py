"""The theorems about attention that attnlab checks with numbers, one file each.

`theorems()` gathers every `THEOREM` of the package by its id:

    for theorem in theory.theorems().values():
        assert theorem.check().holds and not theorem.counter_check().holds
"""

import importlib
import pkgutil

from theory.theorem import Evidence, Theorem

__all__ = ["Evidence", "Theorem", "theorems"]


def theorems() -> dict[str, Theorem]:
    """Every theorem in the package, by id, in the order of their file names."""
    found: dict[str, Theorem] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        theorem = getattr(module, "THEOREM", None)
        if isinstance(theorem, Theorem):
            if theorem.id in found:
                raise ValueError(f"theorems: the id {theorem.id!r} is used by two files.")
            found[theorem.id] = theorem
    return found
