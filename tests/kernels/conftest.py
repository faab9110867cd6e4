"""`backend`: every kernel, compiled where its device is present and interpreted elsewhere."""

import pytest

from tests.kernels import cases


@pytest.fixture(scope="module", params=cases.backends(), ids=str)
def backend(request) -> cases.Backend:
    return request.param


@pytest.fixture
def planting(monkeypatch):
    """`monkeypatch` for the parts of kernels: what was traced with them is forgotten, both ways."""
    cases.forget()
    yield monkeypatch
    monkeypatch.undo()
    cases.forget()
