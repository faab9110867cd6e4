"""Thousands of programs that run once each."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _light(lightly_compiled):
    """Compiled with few optimisations."""
