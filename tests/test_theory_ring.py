"""The theorem of the ring, counted by hand; a wrong formula does not pass."""

import jax
import pytest

from attnlab.distributed.layouts import LAYOUTS
from theory import ring_balance

HELD = {
    "contiguous": lambda d: [3 * d, 3 * d + 1, 3 * d + 2],
    "striped": lambda d: [d, d + 3, d + 6],
}


@pytest.mark.parametrize("layout", HELD)
def test_nine_tokens_on_three_devices_by_hand(layout):
    time = 0
    for hop in range(3):
        pairs = [
            sum(key <= query for query in HELD[layout](d) for key in HELD[layout]((d - hop) % 3))
            for d in range(3)
        ]
        time += max(pairs)
    assert time / (9 * 10 / 2 / 3) == pytest.approx(ring_balance.waiting(layout, 3, 9))


def test_a_wrong_formula_is_noticed(monkeypatch):
    monkeypatch.setattr(ring_balance, "waiting", lambda layout, devices, length: 1.001)
    assert not ring_balance.check().holds


def test_documents_are_drawn_from_the_key():
    found = [ring_balance.counter_check(jax.random.key(seed)) for seed in (1, 2)]
    assert found[0].rows != found[1].rows
    assert not any(evidence.holds for evidence in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_device_waits_for_nobody(layout):
    assert ring_balance.waiting(layout, 1, 8) == 1.0


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="expected one of contiguous"):
        ring_balance.waiting("random", 2, 8)
