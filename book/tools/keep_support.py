"""Keep the record of the last contract run in the repository, with what it was made by."""

import datetime
import importlib.metadata
import json
import pathlib
import platform

import jax

ROOT = pathlib.Path(__file__).parents[2]


def main() -> None:
    """Copy build/support.json to book/data/support.json."""
    made = ROOT / "build" / "support.json"
    if not made.exists():
        raise SystemExit(f"{made} was not written: the contract tests write it when they run")
    record = json.loads(made.read_text("utf-8"))
    rows = record["rows"] if isinstance(record, dict) else record
    about = {
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
        "Python": platform.python_version(),
        "on": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
    }
    kept = ROOT / "book" / "data" / "support.json"
    kept.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
    head = json.dumps(about)[:-1]
    kept.write_text(f'{head}, "rows": [\n{lines}\n]}}\n', "utf-8")
    print(f"kept {len(rows)} results in {kept.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
