"""What passes is published: entry x property x dtype x implementation, as JSON.

The test run writes build/support.json (tests/conftest.py collects, under pytest-xdist too); alone:

    python -m tests.contract.support build/support.json
"""

import json
import sys
import zlib
from pathlib import Path

DTYPES = ("float32", "bfloat16")
FIELDS = ("entry", "property", "dtype", "implementation")

_rows: dict[tuple[str, ...], dict[str, str]] = {}


def runs(entry) -> list[tuple[str, str]]:
    """Implementations and dtypes in which an entry is examined.

    The forms of a recurrence all compute in float32 and round their inputs and outputs alike, so
    bfloat16 is seen in one of them.
    """
    in_both = [name for name in entry.implementations if name not in ("parallel", "recurrent")]
    return [
        (name, dtype)
        for name in entry.implementations
        for dtype in (DTYPES if name in in_both else DTYPES[:1])
    ]


def subjects(kind: str) -> list:
    """Every entry of a kind in each implementation and dtype, as pytest takes them."""
    import pytest

    from attnlab import atlas

    return [
        pytest.param(entry, name, dtype, id=f"{id}-{name}-{dtype}")
        for id, entry in atlas.entries().items()
        if entry.kind == kind
        for name, dtype in runs(entry)
    ]


# What an implementation or a dtype does of its own; all else it shares with the main ones in
# float32, which are examined in full.
OWN = ("shape and dtype", "within budget", "gradient vs float64", "finite at extremes",
       "forms agree")  # fmt: skip
MAIN = ("blockwise", "chunked")


def left_to_slow(entry, implementation: str, dtype: str, name: str) -> bool:
    """Whether a property is examined by `make slow` and `make support` only.

    How bfloat16 is rounded by kernels, `jax.nn` and the reference their own tests pin down once for
    all mechanisms.
    """
    main = implementation in MAIN or entry.implementations == (implementation,)
    if main and dtype == "float32":
        return False
    return (not main and dtype != "float32") or name not in OWN


def promises(entry) -> dict:
    """What an entry of its kind promises, by name."""
    from tests.contract import layers, properties

    return layers.PROPERTIES if entry.kind == "layer" else properties.PROPERTIES


def examine(entry, name: str, dtype: str, implementation: str, errors=None) -> dict[str, str]:
    """Run one property: a row with the status "pass", "fail" or "n/a" and a note.

    What went wrong is appended to `errors`, for its traceback.
    """
    import jax

    key = jax.random.key(zlib.crc32(f"{entry.id} {name} {dtype}".encode()))
    row = dict(zip(FIELDS, (entry.id, name, dtype, implementation), strict=True))
    try:
        reason = promises(entry)[name](entry, dtype, implementation, key)
    except Exception as broken:  # a crash is a broken promise as well
        if errors is not None:
            errors.append(broken)
        kind = "" if isinstance(broken, AssertionError) else f"{type(broken).__name__}: "
        return row | {"status": "fail", "note": kind + str(broken).strip()}
    return row | ({"status": "n/a", "note": reason} if reason else {"status": "pass", "note": ""})


def collect(report) -> None:
    """Keep the rows that a test attached to its report (`record_property("support", row)`)."""
    if report.when == "call":
        for name, row in report.user_properties:
            if name == "support":
                _rows[tuple(row[f] for f in FIELDS)] = row


def write(path: Path, rows=None) -> None:
    """Write the rows, sorted; rows of an earlier, fuller run stay where this one has none."""
    rows = _rows if rows is None else rows
    if not rows:
        return
    path = Path(path)
    merged = {}
    if path.exists():
        merged = {tuple(row[f] for f in FIELDS): row for row in json.loads(path.read_text())}
        entries = {key[0] for key in rows}
        if len(entries) > 1:  # more than a look at one entry: forget entries that are gone
            merged = {k: row for k, row in merged.items() if k[0] in entries}
    merged |= rows
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([merged[key] for key in sorted(merged)], indent=1) + "\n")


def table():
    """Every row of the contract, one after the other."""
    from attnlab import atlas

    for entry in atlas.entries().values():
        for implementation, dtype in runs(entry):
            for name in promises(entry):
                yield examine(entry, name, dtype, implementation)


def main(path: str) -> int:
    rows = {}
    for row in table():
        rows[tuple(row[f] for f in FIELDS)] = row
        if row["status"] == "fail":
            print("FAIL", *(row[f] for f in FIELDS), "|", row["note"].splitlines()[0])
    Path(path).unlink(missing_ok=True)
    write(Path(path), rows)
    count = {s: sum(r["status"] == s for r in rows.values()) for s in ("pass", "fail", "n/a")}
    print(", ".join(f"{n} {status}" for status, n in count.items()), f"-> {path}")
    return int(count["fail"] > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
