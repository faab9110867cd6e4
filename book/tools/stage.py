"""A tree of files held in memory, and brought to disk by touching only what differs."""

import pathlib

Tree = dict[str, bytes]

# What chapters run with: their helpers, and the tables of measurements that they may show.
CHAPTERS = ["chapters/*.ipynb", "chapters/*.py", "chapters/*.json", "book/data/bench/*.json"]


def read(root: pathlib.Path, patterns: list[str]) -> Tree:
    """The files under `root` that match, keyed by their path relative to it."""
    found = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in found
        if path.is_file() and ".ipynb_checkpoints" not in path.parts
    }


def sync(tree: Tree, folder: pathlib.Path, keep: set[str]) -> None:
    """Make `folder` hold exactly `tree`, files named in `keep` and Python's caches apart."""
    for name, content in tree.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in tree and name not in keep and path.suffix != ".pyc":
            path.unlink()
