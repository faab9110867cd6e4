"""`backend`: every kernel, compiled where its device is present and interpreted elsewhere."""

import pytest

from tests.kernels import cases

# The Hopper interpreter is slow, so `make test` asks it for a part of the laws; `make slow`, and
# any run on a Hopper GPU, asks for all.
HOPPER_FEW = ("plain", "causal with bias", "segments with a table", "dropout", "sigmoid",
              "relu squared")  # fmt: skip
HOPPER_SLOW = (
    "test_drawn_calls_equal_the_formula",  # the gradients of drawn calls are asked
    "test_what_is_masked_may_hold_anything",
    "test_masked_modifiers_may_hold_anything",
    "test_the_cotangent_of_lse_alone_reaches_query_and_key",
    "test_rows_that_see_no_key_are_zeros_in_value_and_gradient",
)


def pytest_collection_modifyitems(items):
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        backend = given.get("backend")
        hopper = isinstance(backend, cases.Backend) and backend.name == "mosaic_gpu"
        if not hopper or not backend.interpreted or item.path.name != "test_flash.py":
            continue
        formula = item.originalname == "test_output_lse_and_every_gradient_equal_the_formula"
        if item.originalname in HOPPER_SLOW or (formula and given["name"] not in HOPPER_FEW):
            item.add_marker(pytest.mark.slow)


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
