"""The page of benchmarks: verdicts beside targets, long tables shut, measured before counted."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "book" / "tools"))
page_bench = importlib.import_module("page_bench")
bench_tables = importlib.import_module("bench_tables")
sys.path.pop(0)


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


def test_words_stand_to_the_left_and_numbers_to_the_right():
    rows = [{"who": "ours", "x": 0.5, "best": "1.2"}, {"who": "", "x": 2, "best": "best"}]
    assert bench_tables.grid(["who", "x", "best"], rows)[1] == "| :-- | --: | --: |"
    assert bench_tables.heads([{"target": "", "a": 1}, {"note": "", "b": 2}]) == ["a", "b", "note"]


def test_a_claim_is_a_paragraph_with_its_verdict_as_a_badge():
    cells = {"mechanism": "cope", "claim": "counts", "paper": "1 %", "seeds": 2}
    rows = [
        {"cells": cells | {"ours": "2 %", "verdict": "holds here"}},
        {"cells": cells | {"ours": "short 2 %; long 3 %", "verdict": "1 of 2 seeds"}},
    ]
    lines = page_bench.form({"rows": rows})
    assert "**Counts** {bdg-success}`holds here`" in lines
    assert '- *<a href="atlas/cope.html">cope</a>, the paper:* 1 %' in lines
    assert "- *here, 2 seeds:* 2 %" in lines
    at = lines.index("**Counts** {bdg-warning}`1 of 2 seeds`")
    assert lines[at + 3 : at + 6] == ["- *here, 2 seeds:*", "  - short 2 %", "  - long 3 %"]


def test_the_league_shows_the_first_and_says_who_was_not_trained():
    last = bench_tables.LEADERS
    same = {"family": "linear", "parameters": "5"}
    rows = [
        {"cells": {"mechanism": f"M{n}", "loss": f"{n}"} | same, "detail": {"key": f"m{n}"}}
        for n in range(last + 1)
    ]
    rows[-1]["cells"] |= {"note": "no positions", "parameters": "12"}
    refused = {"mechanism": "Other", "family": "dense", "note": "not causal"}
    rows.append({"cells": refused, "detail": {"key": "other"}})
    lines = page_bench.form({"name": "quality", "rows": rows})
    assert lines[2] == "All have 5 to 12 parameters."
    shut = lines.index(":::{dropdown} The other 1")
    assert lines[shut - 2] == bench_tables.bars([bench_tables.name(rows[last - 1]), str(last - 1)])
    assert lines[shut + 4].startswith(
        '| <a href="atlas/m20.html" title="linear">M20</a> <sup>1</sup>'
    )
    assert lines[-3] == "- <sup>1</sup> no positions"
    assert lines[-2].startswith("- Not trained (not causal): <a ")
