"""The API reference: a page per room of the library, from its docstrings."""

import importlib
import inspect
import pathlib

ROOMS = {
    "core": ("The core", "attnlab/core", "The four choices and the algebra; knows no paper."),
    "testing": ("Testing", "attnlab/testing", "Masks, modifiers and normalizers of your own."),
    "kernels": ("Kernels", "pallas_kernels", "Fused kernels, usable alone; the compile lab."),
    "models": ("Models", "attnlab/models", "Small whole models that mechanisms plug into."),
    "tasks": ("Tasks", "attnlab/tasks", "Data: real text, and the field's synthetic tasks."),
    "training": ("Training", "attnlab/training", "The loop, the optimiser, checkpoints."),
    "bench": ("Benchmarks", "attnlab/bench", "Measuring, side by side with peers."),
    "theory": ("Theory", "theory", "Theorems with a check and a counter-check."),
}  # fmt: skip


def pages(root: pathlib.Path) -> dict[str, str]:
    """`api/index.md` and one page per room that exists."""
    made = {}
    for name, (title, folder, words) in ROOMS.items():
        modules = public_modules(root, root / folder)
        if modules:
            made[f"api/{name}.md"] = room(title, words, modules)
    return {"api/index.md": index(sorted(made))} | made


def public_modules(root: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Dotted names of the modules in a folder, the private ones left out."""
    paths = sorted(folder.rglob("*.py")) if folder.exists() else []
    named = [path.relative_to(root).with_suffix("").parts for path in paths]
    kept = [p for p in named if not any(part.startswith("_") for part in p if part != "__init__")]
    return [".".join(part for part in parts if part != "__init__") for parts in kept]


def room(title: str, words: str, modules: list[str]) -> str:
    """The page of one room: a section per module, its docstring first."""
    sections = [section(name) for name in modules if has_content(name)]
    return f"# {title}\n\n{words}\n\n" + "\n".join(sections)


def has_content(name: str) -> bool:
    """Whether a module has a docstring or a public definition of its own."""
    module = importlib.import_module(name)
    return bool(module.__doc__) or bool(own_names(module))


def own_names(module) -> list[str]:
    """Public functions and classes defined in the module, in the order they are written."""
    found = [
        (inspect.getsourcelines(value)[1], name)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]
    return [name for _, name in sorted(found)]


def section(name: str) -> str:
    """One module."""
    return f"""## `{name}`

```{{eval-rst}}
.. automodule:: {name}
   :members:
   :ignore-module-all:
```
"""


def index(rooms: list[str]) -> str:
    """The front door: what `import attnlab` gives, in a table, each name linked to its page."""
    import attnlab

    lines = []
    for name in sorted(getattr(attnlab, "__all__", []), key=str.lower):
        value = getattr(attnlab, name)
        lines.append(f"* - {link(name, value)}\n  - {first_sentence(value)}")
    listing = "\n".join(lines)
    return f"""# API reference

What `import attnlab` gives. The families of mechanisms are in [the atlas](../atlas/index.md).

:::{{list-table}}
:class: facts
:widths: 30 70

{listing}
:::
"""


def link(name: str, value: object) -> str:
    """A cross-reference where autodoc documents the object, plain code where it does not."""
    module = getattr(value, "__module__", None)
    if inspect.isclass(value) or inspect.isfunction(value):
        role = "class" if inspect.isclass(value) else "func"
        return f"{{py:{role}}}`{name} <{module}.{value.__qualname__}>`"
    if inspect.ismodule(value) and value.__name__.startswith("attnlab.core."):
        return f"{{py:mod}}`{name} <{value.__name__}>`"
    return f"`{name}`"


def first_sentence(value: object) -> str:
    """The first line of a docstring, backticks kept."""
    words = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    return words.replace("*", "\\*").replace("$", "\\$") or "–"
