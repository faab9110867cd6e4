"""Every atlas entry keeps every promise it makes, in every dtype and implementation."""

import pytest

from attnlab import atlas
from tests.contract import support
from tests.contract.formulas import FORMULAS
from tests.contract.properties import PROPERTIES


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize(("entry", "implementation", "dtype"), support.subjects("mechanism"))
def test_promise(entry, implementation, dtype, name, record_property, request):
    if name == "bad input raises":
        request.getfixturevalue("as_users_run_it")
    errors = []
    row = support.examine(entry, name, dtype, implementation, errors)
    record_property("support", row)
    if errors:
        raise errors[0]


def test_every_entry_has_an_independent_formula():
    assert set(FORMULAS) == set(atlas.entries())


def test_every_claim_is_tested():
    from attnlab.core.entry import PROPERTIES as CLAIMS

    tested = {cell.cell_contents for prop in PROPERTIES.values() for cell in prop.__closure__}
    assert set(CLAIMS) <= tested


def test_the_table_merges_what_workers_and_earlier_runs_found(tmp_path):
    row = {"entry": "a", "property": "p", "dtype": "float32", "implementation": "x"}
    path = tmp_path / "deep" / "support.json"
    old = row | {"status": "fail", "note": "was"}
    support.write(path, {tuple(row.values()): old})
    second = row | {"property": "q", "status": "pass", "note": ""}
    new = row | {"status": "pass", "note": ""}
    support.write(path, {("a", "q", "float32", "x"): second, ("a", "p", "float32", "x"): new})
    import json

    assert json.loads(path.read_text()) == [new, second]
