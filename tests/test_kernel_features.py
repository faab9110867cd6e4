"""The table of kernel features: nothing in it is unproved, unsourced or unfinished."""

import copy
import html.parser
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location(
    "page_kernels", ROOT / "book" / "tools" / "page_kernels.py"
)
assert _spec is not None and _spec.loader is not None
page_kernels = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page_kernels)

TESTS = {"tests/test_a.py::test_it", "tests/test_a.py::TestThem::test_both"}


def small_table():
    """One row, complete: the least that can be published."""
    source = {"in": "peer", "path": "a/b.py", "line": 3, "at": "f"}
    return {
        "about": "Read today.",
        "read": {
            "peer": {
                "name": "Peer", "repo": "o/r", "version": "1", "base": "https://x/", "lines": True
            },
            "page": {"name": "Page", "url": "https://y/", "version": "2"},
        },
        "columns": [
            {"id": "attnlab", "name": "attnlab", "what": "ours"},
            {"id": "peer", "name": "Peer", "what": "theirs"},
        ],
        "groups": [
            {
                "title": "Masks",
                "rows": [
                    {
                        "id": "any",
                        "feature": "Any <mask>",
                        "about": "With `f(x)`.",
                        "cells": {
                            "attnlab": {
                                "value": "yes", "note": "", "test": "tests/test_a.py::test_it"
                            },
                            "peer": {
                                "value": "partly", "note": "a & b",
                                "sources": [source, {"in": "page", "at": "here"}],
                            },
                        },
                    }
                ],
            }
        ],
    }  # fmt: skip


def wrong(table, tests=TESTS):
    return [what for _, what in page_kernels.problems(table, tests)]


def changed(column, **fields):
    table = copy.deepcopy(small_table())
    table["groups"][0]["rows"][0]["cells"][column] |= fields
    return table


# -- the table that is published -------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    return page_kernels.load(ROOT)


def cells(table, column):
    return [(row["id"], row["cells"][column]) for row in page_kernels.rows(table)]


def test_no_cell_is_pending(published):
    assert [name for name, cell in cells(published, "attnlab") if cell["value"] == "pending"] == []


def test_every_peer_cell_names_a_source_that_was_read(published):
    peers = [column["id"] for column in published["columns"] if column["id"] != "attnlab"]
    assert len(peers) == 5
    found = [
        (name, peer, what)
        for peer in peers
        for name, cell in cells(published, peer)
        for what in page_kernels.theirs(cell, published["read"])
    ]
    assert found == []


def test_every_test_that_is_named_exists_and_every_lack_has_its_reason(published):
    exist = page_kernels.tests_in(ROOT / "tests")
    found = [
        (row["id"], what)
        for row in page_kernels.rows(published)
        for what in page_kernels.ours(row, row["cells"]["attnlab"], exist)
    ]
    assert found == []


def test_the_published_table_makes_a_page(published):
    assert list(page_kernels.problems(published, page_kernels.tests_in(ROOT / "tests"))) == []
    assert list(page_kernels.pages(ROOT)) == ["kernels.md"]


# -- the checks can fail ---------------------------------------------------------------------------


def test_a_complete_table_has_no_problems():
    assert wrong(small_table()) == []


@pytest.mark.parametrize(
    ("column", "fields", "words"),
    [
        ("attnlab", {"value": "pending", "test": None}, "'pending' is none of"),
        ("attnlab", {"test": None}, "no test"),
        ("attnlab", {"test": "tests/test_a.py::test_other"}, "there is no test"),
        ("attnlab", {"test": ["tests/test_a.py::test_it", "x"]}, "there is no test x"),
        ("attnlab", {"value": "no", "test": None}, "no reason"),
        ("attnlab", {"note": "a" * 131}, "131 characters"),
        ("peer", {"sources": []}, "no source"),
        ("peer", {"sources": [{"in": "elsewhere", "at": "f"}]}, "nothing is said about"),
        ("peer", {"sources": [{"in": "peer", "at": "f"}]}, "without a file and a line"),
        ("peer", {"sources": [{"in": "page", "at": ""}]}, "without a place"),
        ("peer", {"note": ""}, "without a note"),
        ("peer", {"value": "perhaps"}, "'perhaps' is none of"),
    ],
)
def test_an_incomplete_cell_is_a_problem(column, fields, words):
    found = wrong(changed(column, **fields))
    assert len(found) == 1 and words in found[0]


def test_a_missing_cell_and_a_repeated_row_are_problems():
    table = small_table()
    rows = table["groups"][0]["rows"]
    rows.append(copy.deepcopy(rows[0]))
    assert wrong(table) == ["two rows have this id"]
    del rows[1]
    del rows[0]["cells"]["peer"]
    assert len(wrong(table)) == 1


def test_a_lack_that_nobody_fills_needs_no_reason_and_a_parameter_is_no_name():
    table = changed("peer", value="no")
    table["groups"][0]["rows"][0]["cells"]["attnlab"] |= {"value": "no", "test": None}
    assert wrong(table) == []
    assert wrong(changed("attnlab", test="tests/test_a.py::test_it[float32]")) == []


def test_the_page_of_an_incomplete_table_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(page_kernels, "load", lambda root: changed("attnlab", value="pending"))
    with pytest.raises(ValueError, match=r"not complete:\n  any, attnlab: 'pending'"):
        page_kernels.pages(tmp_path)


def test_tests_are_found_by_reading(tmp_path):
    folder = tmp_path / "tests" / "deep"
    folder.mkdir(parents=True)
    (folder / "test_a.py").write_text(
        "def test_it(): ...\ndef helper(): ...\n"
        "class TestThem:\n    def test_both(self): ...\n    def other(self): ...\n"
    )
    (folder / "helpers.py").write_text("def test_not_collected(): ...\n")
    assert page_kernels.tests_in(tmp_path / "tests") == {
        "tests/deep/test_a.py::test_it",
        "tests/deep/test_a.py::TestThem::test_both",
    }


# -- the page --------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """Checks that every tag is closed where it should be, and keeps links and text."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        named = dict(attrs)
        self.links += [named["href"]] if "href" in named else []
        self.ids += [named["id"]] if "id" in named else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_html_is_well_formed_and_links_each_row_to_its_notes():
    group = small_table()["groups"][0]
    text = page_kernels.grid(group, small_table()["columns"])
    text += page_kernels.notes(group, small_table())
    assert "\n\n" not in text.strip()  # a blank line would end the block and let Markdown in
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert "#kernels-any" in tags.links and tags.ids == ["kernels-any"]
    assert {"https://x/a/b.py#L3", "https://y/"} <= set(tags.links)
    assert "Any <mask>" in tags.text and "a & b" in tags.text


def test_a_mark_is_also_a_word():
    for value, mark in page_kernels.MARKS.items():
        tags = Tags()
        tags.feed(page_kernels.sign(value))
        assert tags.text == mark + page_kernels.WORDS[value]


def test_a_release_is_linked_without_a_line():
    read = small_table()["read"]
    read["peer"]["lines"] = False
    source = {"in": "peer", "path": "a/b.py", "line": 3, "at": "f"}
    assert 'href="https://x/a/b.py"' in page_kernels.place(source, read)
