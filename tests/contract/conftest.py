"""Thousands of programs that run once each."""

import pytest

from tests.contract import support


@pytest.fixture(autouse=True, scope="module")
def _light(lightly_compiled):
    """Compiled with few optimisations."""


def pytest_collection_modifyitems(items):
    wanted = ("entry", "implementation", "dtype", "name")
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        if item.nodeid.startswith("tests/contract/") and given.keys() >= set(wanted):
            later = support.left_to_slow(*(given[name] for name in wanted))
            for mark in [pytest.mark.slow] * later:
                item.add_marker(mark)
