"""Theorems of counting and of momentum: their numbers had otherwise, their refusals."""

import math

import jax
import numpy as np
import pytest

import theory
from theory import counting_gates, momentum_induction

IDS = ("counting-gates", "momentum-induction")
THEOREMS = theory.theorems()


@pytest.fixture
def rng():
    return np.random.default_rng(8)


@pytest.mark.parametrize("name", IDS)
def test_the_same_key_gives_the_same_numbers(name):
    first, again = (THEOREMS[name].check(jax.random.key(7)) for _ in range(2))
    assert first.rows == again.rows


@pytest.mark.parametrize("name", IDS)
def test_every_row_of_a_counter_check_breaks_its_promise(name):
    assert min(THEOREMS[name].counter_check().column("share")) > 1


def counted_by_hand(marked, r, c, b):
    """The weights, gates summed one by one."""
    n = len(marked)
    logits = np.where(marked, c, -c)
    place = [sum(1 / (1 + math.exp(-x)) for x in logits[j:]) for j in range(n)]
    score = logits - b * np.abs(np.minimum(place, max(r + 1, 4)) - r)
    e = np.exp(score - score.max())
    return e / e.sum()


@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("c", [1.5, 9.0])
def test_the_head_that_counts_is_the_formula(rng, r, c):
    marked = rng.random(60) < 0.2
    ours = counting_gates.counting_weights(marked, r, c, 3.0)
    np.testing.assert_allclose(ours, counted_by_hand(marked, r, c, 3.0), atol=1e-5)


def test_the_promise_is_kept_by_the_formula_and_not_idle(rng):
    """Over many texts the least weight is above the bound, and near it where gates are sharp."""
    for c in (3.0, 6.0, 10.0):
        for _ in range(30):
            n, r = int(rng.integers(12, 80)), int(rng.integers(1, 4))
            places = np.sort(rng.choice(n, r + int(rng.integers(0, 6)), replace=False))
            marked = np.isin(np.arange(n), places)
            weight = counted_by_hand(marked, r, c, 4.0)[places[-r]]
            bound = counting_gates.weight_bound(n, len(places), c, 4.0)
            assert weight >= bound * (1 - 1e-12)
            if c == 10.0:
                assert weight - bound < 0.1


def test_relative_weights_ask_for_opposite_things(rng):
    """With any function of distance, the right key cannot have more than half in both texts."""
    for _ in range(200):
        f = 10 * rng.standard_normal(40)
        d = np.sort(rng.choice(40, 4, replace=False))
        weights = [np.exp(f[x]) / np.exp(f[x]).sum() for x in (d[:-1], d[1:])]
        assert min(w[1] for w in weights) <= 0.5


def test_recency_finds_the_last_mark_in_every_text():
    """So r = 1 is no part of the theorem."""
    f = -30.0 * np.arange(40)
    for d in ([0, 5, 9], [5, 9, 30]):
        assert np.exp(f[d[0]]) / np.exp(f[d]).sum() > 0.99


@pytest.mark.parametrize("pairs", [1, 5])
@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_weights_with_momentum_are_those_of_the_expanded_scores(rng, pairs, gamma):
    tokens, place = momentum_induction.recall_text(rng, pairs)
    T = len(tokens)
    alike = (tokens[:, None] == tokens[None]) & (tokens < pairs)[:, None]
    M = np.zeros((T + 1, T + 1))
    M[1:, 1:] = np.where(alike, -8.0, 0.0)  # row and column 0: there is no token before
    t, s = T, np.arange(1, T + 1)
    score = (1 + gamma) ** 2 * M[t, s] - gamma * (1 + gamma) * (M[t, s - 1] + M[t - 1, s])
    score += gamma**2 * M[t - 1, s - 1]
    score[0] = (1 + gamma) * M[t, 1] - gamma * M[t - 1, 1]  # the first has no momentum
    exact = np.exp(score - score.max())
    exact /= exact.sum()
    ours = momentum_induction.induction_weights(tokens, pairs, gamma)
    np.testing.assert_allclose(ours, exact, atol=1e-5)
    assert exact[place] >= momentum_induction.weight_bound(pairs, gamma)


def test_the_gain_is_the_filters_modulus():
    frequency = np.linspace(0, np.pi, 9)
    exact = np.abs(1 + 0.6 * (1 - np.exp(-1j * frequency)))
    np.testing.assert_allclose(momentum_induction.gain(frequency, 0.6), exact)


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match=r"marked: expected 1 to 8, got 9"):
        counting_gates.weight_bound(8, 9, 1.0)
    with pytest.raises(ValueError, match=r"r: expected a positive int, got 0"):
        counting_gates.counting_weights(np.ones(4, bool), 0, 1.0)
    with pytest.raises(ValueError, match=r"pairs: expected a positive int, got 0"):
        momentum_induction.weight_bound(0, 1.0)
