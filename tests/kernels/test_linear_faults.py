"""Faults planted into the mathematics of a chunk, one at a time: the laws catch each of them.

Both bodies run the same code, so the one that is quicker to interpret stands for both.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear import tile
from tests.kernels import linear_cases as cases
from tests.kernels.linear_cases import Problem

BACKEND = "tpu"


def wrapped(planting, name, change):
    planting.setattr(tile, name, change(getattr(tile, name)))


def the_present_step_is_not_read(planting):
    planting.setattr(tile, "THROUGH", tile.BEFORE)


def a_row_erases_what_it_writes(planting):
    planting.setattr(tile, "BEFORE", tile.THROUGH)


def decays_behind_a_key_include_its_own(planting):
    wrapped(
        planting,
        "_reached",
        lambda reached: lambda i, j, upto: j >= i if upto == tile.AFTER else reached(i, j, upto),
    )


def one_level_of_halving_left_out(planting):
    wrapped(planting, "_levels", lambda levels: lambda size: levels(size) - 1)


def nothing_is_erased(planting):
    planting.setattr(tile, "take", lambda device, state, fresh, taken: fresh)


def the_state_is_not_decayed(planting):
    def put(device, state, key, write, decay):
        return tuple(
            s + device.product(k, write, left=True) for s, k in zip(state, key, strict=True)
        )

    planting.setattr(tile, "put", put)


def minus_infinity_is_left(planting):
    planting.setattr(tile, "floored", lambda decay: decay)


def the_state_is_forgotten_between_chunks(planting):
    def change(read):
        return lambda device, state, *rest: read(device, tuple(map(jnp.zeros_like, state)), *rest)

    wrapped(planting, "read", change)


def a_cotangent_of_the_inverse_left_out(planting):
    def change(solve):
        def wrong(device, lower, *sides):
            return solve(device, jax.lax.stop_gradient(lower), *sides)

        return wrong

    wrapped(planting, "_solve", change)


def the_first_factor_has_no_cotangent(planting):
    def change(product):
        def wrong(self, a, b, *, left=False, right=False):
            found = product(self, a, b, left=left, right=right)
            return (
                found
                + product(self, a, jax.lax.stop_gradient(-b), left=left, right=right)
                + (jax.lax.stop_gradient(product(self, a, b, left=left, right=right)))
            )

        return wrong

    planting.setattr(tile.Device, "product", change(tile.Device.product))


VALUES = (
    the_present_step_is_not_read,
    a_row_erases_what_it_writes,
    decays_behind_a_key_include_its_own,
    one_level_of_halving_left_out,
    nothing_is_erased,
    the_state_is_not_decayed,
    minus_infinity_is_left,
    the_state_is_forgotten_between_chunks,
)
GRADIENTS = (a_cotangent_of_the_inverse_left_out, the_first_factor_has_no_cotangent)
PROBLEM = Problem((), 20, 1, 1, 5, 3, "channel", True, 1.0, (6,))


def law(check):
    jax.clear_caches()
    try:
        check(BACKEND, PROBLEM)
    finally:
        jax.clear_caches()


@pytest.mark.parametrize("plant", VALUES)
def test_a_fault_in_values_is_noticed(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"output|state"):
        law(cases.check_values)


@pytest.mark.parametrize("plant", GRADIENTS)
def test_a_fault_in_gradients_is_noticed(monkeypatch, plant):
    plant(monkeypatch)
    cases.check_values(BACKEND, PROBLEM)
    with pytest.raises(AssertionError, match="d "):
        law(cases.check_gradients)


def test_without_a_fault_the_law_holds():
    law(cases.check_values)
    law(cases.check_gradients)
    assert np.isneginf(PROBLEM.numbers()["log_decay"]).any()
