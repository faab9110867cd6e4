"""Build the book: stage its sources, execute the chapters that changed, write the HTML.

    python book/build.py [--output build/html]

The staged tree (build/book) holds the hand-written pages beside this file, the notebooks and
helpers of chapters/, and pages generated from the library.  A file is rewritten only when its
content changed, so that Sphinx reads again, and the cache executes again, only what it must.
"""

import argparse
import os
import pathlib
import subprocess
import sys

BOOK = pathlib.Path(__file__).parent
ROOT = BOOK.parent
sys.path.insert(0, str(BOOK / "tools"))

import generated  # noqa: E402
import stage  # noqa: E402
import stale  # noqa: E402
import vendored  # noqa: E402


def gather() -> stage.Tree:
    """Every file of the staged tree, in memory."""
    tree = stage.read(BOOK, ["*.md", "*.yml", "*.bib", "_static/**/*"])
    tree |= stage.read(ROOT, stage.CHAPTERS)
    tree |= vendored.assets()
    tree |= generated.pages(ROOT)
    return tree


def run(command: str, *arguments: str) -> None:
    """Run a command of this environment; a failure ends the build with its status."""
    path = [str(BOOK / "tools"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    program = pathlib.Path(sys.executable).with_name(command)
    done = subprocess.run([program, *arguments], env=env, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    """Stage, forget what is stale, build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "build" / "html")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    build = ROOT / "build"
    source = build / "book"
    stage.sync(gather(), source, keep={"conf.py"})
    cache = build / "cache"
    stale.forget(ROOT, source, cache, ledger=build / "fingerprints.json")
    run("jupyter-book", "config", "sphinx", str(source))
    strict = ["-W", "--keep-going"]
    places = ["-d", str(build / "doctrees"), "-D", f"nb_execution_cache_path={cache}"]
    run("sphinx-build", "-b", "html", *strict, *places, str(source), str(args.output))


if __name__ == "__main__":
    main()
