"""Which chapters must be executed again because what they import has changed.

The execution cache knows a chapter by its code cells.  It cannot see that the library under them
changed, so each chapter also has a fingerprint: the sources it can reach, the records it reads, and
the versions of the packages whose numbers and figures it shows.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import re

from jupyter_cache import get_cache

# Parts of the library that only some chapters use; the rest counts for every chapter.
ROOMS = ("models", "tasks", "training", "bench", "theory", "cli", "doctor")
RECORDS = "book/data/bench"  # tables of measurements, which chapters may show
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "matplotlib", "plotly")


def room_of(path: pathlib.PurePath) -> str | None:
    """The room a source file belongs to, None for the common ground."""
    part = path.parts[0] if path.parts[0] != "attnlab" else path.parts[1].removesuffix(".py")
    return part if part in ROOMS else None


def imported_rooms(code: str, sources: dict[pathlib.PurePath, str]) -> set[str]:
    """The rooms that `code` names on an import line, and those they name in turn."""
    found: set[str] = set()
    waiting = [code]
    while waiting:
        lines = re.findall(r"^\s*(?:from|import) .*|.*attnlab\..*", waiting.pop(), re.MULTILINE)
        named = {room for room in ROOMS for line in lines if re.search(rf"\b{room}\b", line)}
        for room in named - found:
            waiting += [text for path, text in sources.items() if room_of(path) == room]
        found |= named
    return found


def fingerprint(chapter: pathlib.Path, root: pathlib.Path) -> str:
    """A digest of everything but the chapter's own text that can change its outputs."""
    paths = [p for room in ("attnlab", "theory") for p in sorted((root / room).rglob("*.py"))]
    sources = {path.relative_to(root): path.read_text("utf-8") for path in paths}
    helpers = {p.relative_to(root): p.read_text("utf-8") for p in chapter.parent.glob("*.py")}
    cells = json.loads(chapter.read_text("utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    rooms = imported_rooms("\n".join([code, *helpers.values()]), sources)
    digest = hashlib.sha256()
    for path, text in [*sources.items(), *sorted(helpers.items())]:
        if path in helpers or room_of(path) in {None, *rooms}:
            digest.update(f"{path}\0{text}\0".encode())
    for record in sorted((root / RECORDS).glob("*.json")):
        if f"{RECORDS}/{record.name}" in code:
            digest.update(record.read_bytes())
    for package in PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}\0".encode())
    return digest.hexdigest()


def forget(
    root: pathlib.Path, source: pathlib.Path, cache: pathlib.Path, ledger: pathlib.Path
) -> None:
    """Drop the cached outputs of chapters whose fingerprint changed, and have them read again."""
    old = json.loads(ledger.read_text("utf-8")) if ledger.exists() else {}
    new = {p.name: fingerprint(p, root) for p in sorted((root / "chapters").glob("*.ipynb"))}
    changed = {name for name in new if old.get(name) not in (None, new[name])}
    if changed:
        print("the library under them changed, to be executed again:", ", ".join(sorted(changed)))
        outputs = get_cache(str(cache))
        for record in outputs.list_cache_records():
            if pathlib.PurePath(record.uri).name in changed:
                outputs.remove_cache(record.pk)
    for name in changed:
        (source / "chapters" / name).touch()
    ledger.write_text(json.dumps(new, indent=1), "utf-8")
