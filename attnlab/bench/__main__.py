"""`python -m attnlab.bench NAME [--quick] [--save FOLDER]`."""

import argparse
import importlib
import sys
from pathlib import Path

from attnlab.bench import BENCHMARKS


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark or all; 0 if every target was met."""
    parser = argparse.ArgumentParser(prog="python -m attnlab.bench", description=__doc__)
    parser.add_argument("name", choices=(*BENCHMARKS, "all"))
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the tables as JSON")
    options = parser.parse_args(arguments)
    names = BENCHMARKS if options.name == "all" else (options.name,)
    results = [
        importlib.import_module(f"attnlab.bench.{name}").run(save=options.save, quick=options.quick)
        for name in names
    ]
    return 0 if all(result.passed is not False for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
