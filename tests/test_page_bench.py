"""The page of benchmarks: verdicts beside targets, long tables shut, measured before counted."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location(
    "page_bench", ROOT / "book" / "tools" / "page_bench.py"
)
page_bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page_bench)


def record(count, **more):
    """A benchmark of so many rows: one column alike in all, one empty in all, one that differs."""
    rows = [
        {"cells": {"heads": 4, "note": "", "n": n, **more}, "target": "< 1", "passed": n % 2 == 0}
        for n in range(count)
    ]
    return {"title": f"Table of {count}", "rows": rows}


def test_a_short_table_shows_every_column_and_the_verdict_beside_its_target():
    lines = page_bench.tables(record(2))
    assert lines[1] == "| heads | n | note | target |"
    assert lines[3:] == ["| 4 | 0 |  | < 1 ✓ |", "| 4 | 1 |  | < 1 ✗ |"]


def test_a_long_table_is_shut_and_what_is_alike_is_said_once():
    lines = page_bench.tables(record(page_bench.LONG + 1))
    assert lines[0] == "All rows: heads 4."
    assert lines[2] == f":::{{dropdown}} The table, {page_bench.LONG + 1} rows"
    assert lines[4] == "| n | target |"
    assert lines[6] == "| 0 | < 1 ✓ |"
    assert lines[-1] == ":::"
    assert len(lines) == page_bench.LONG + 1 + 7


def test_what_was_measured_stands_before_what_was_counted(tmp_path):
    folder = tmp_path / "book" / "data" / "bench"
    folder.mkdir(parents=True)
    for name in ("flash-v4", "time", "flash"):
        made = record(1) | {"title": name}
        (folder / f"{name}.json").write_text(json.dumps(made), "utf-8")
    page = page_bench.pages(tmp_path)["bench.md"]
    assert page.index("## flash\n") < page.index("## time") < page.index("## flash-v4")
    assert "`attnlab bench flash --compile-for v4`" in page


def test_no_record_says_how_to_make_one(tmp_path):
    assert "attnlab bench memory --save" in page_bench.pages(tmp_path)["bench.md"]
