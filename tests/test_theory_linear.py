"""Theorems of linear memories: their closed forms had otherwise, and faults that they notice."""

import itertools
import math

import jax
import numpy as np
import pytest

import theory
from theory import (
    conditioning,
    dsf,
    dsf_forms,
    dsf_softmax,
    pavlovian,
    pavlovian_curves,
    pavlovian_delta,
    pavlovian_depth,
)

IDS = ("pavlovian", "pavlovian-delta", "pavlovian-depth", "dsf", "dsf-softmax")
THEOREMS = theory.theorems()


@pytest.fixture
def rng():
    return np.random.default_rng(20)


@pytest.fixture(scope="module")
def filled():
    return pavlovian_curves.curves()


@pytest.mark.parametrize("name", IDS)
def test_another_key_changes_the_numbers_and_not_the_verdict(name):
    first, other = (THEOREMS[name].check(jax.random.key(k)) for k in (7, 8))
    assert first.holds, str(first)
    assert other.holds, str(other)
    assert first.rows != other.rows


@pytest.mark.parametrize("name", ["pavlovian-delta", "dsf", "dsf-softmax"])
def test_the_same_key_gives_the_same_numbers(name):
    first, again = (THEOREMS[name].check(jax.random.key(7)) for _ in range(2))
    assert first.rows == again.rows


# Capacity


@pytest.mark.parametrize("width", [3, 16, 100])
def test_mean_overlap_is_the_integral_over_the_sphere(width):
    x = (np.arange(400_000) + 0.5) / 400_000
    density = (1 - x**2) ** ((width - 3) / 2)
    mean = (x * density).sum() / density.sum()
    assert pavlovian_curves.worst_crosstalk(2, width) == pytest.approx(mean, rel=1e-4)
    assert pavlovian_curves.crosstalk_power(2, width) == pytest.approx(
        (x**2 * density).sum() / density.sum(), rel=1e-4
    )


def test_recall_is_a_race_of_normal_variables(rng):
    pairs, width, outcomes = 96, 64, 8
    right = 1 + math.sqrt(11 / width) * rng.normal(size=200_000)
    wrong = math.sqrt(12 / width) * rng.normal(size=(200_000, outcomes - 1)).max(1)
    share = np.mean(right > wrong)
    assert pavlovian_curves.recall_rate(pairs, width) == pytest.approx(share, abs=0.004)


def test_the_load_at_95_percent_recall_is_a_straight_line_in_the_width(filled):
    widths = np.array(pavlovian_curves.WIDTHS)
    predicted = np.array([pavlovian_curves.capacity(d) for d in pavlovian_curves.WIDTHS])
    slopes = np.diff(predicted) / np.diff(widths)
    np.testing.assert_allclose(slopes, slopes[0], rtol=0.01)
    np.testing.assert_allclose(pavlovian_curves.capacities(filled), predicted, rtol=0.12)
    assert np.polyfit(widths, pavlovian_curves.capacities(filled), 1)[0] == pytest.approx(
        slopes[0], rel=0.1
    )


def test_capacity_is_linear_on_average_and_a_root_in_the_worst_case(filled):
    widths = np.log(pavlovian_curves.WIDTHS)
    loud = [(filled.pairs - 1) / filled.measured[i] ** p for i, p in ((0, 1), (1, 1))]
    average, worst = (np.polyfit(widths, np.log(x.mean(1)), 1)[0] for x in loud)
    assert average == pytest.approx(1.0, abs=0.03)
    assert worst == pytest.approx(0.5, abs=0.03)


def test_stored_pairs_are_read_like_a_numpy_matrix(rng):
    keys, values, tests = (rng.normal(size=shape) for shape in ((9, 5), (9, 3), (4, 5)))
    told = conditioning.recall(keys, values, tests)
    np.testing.assert_allclose(told, tests @ keys.T @ values, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "fault", [lambda out: 1.05 * out, lambda out: out + 0.1, lambda out: np.roll(out, 1, -1)]
)
def test_a_wrong_memory_is_noticed(monkeypatch, fault):
    true = conditioning.respond
    monkeypatch.setattr(pavlovian_curves, "respond", lambda *x: fault(true(*x)))
    assert not pavlovian.check().holds


def test_a_wrong_mapping_is_noticed(monkeypatch):
    true = conditioning.respond
    monkeypatch.setattr(pavlovian, "respond", lambda q, k, v: true(k, q, v))
    assert pavlovian.mapping_error() > 1


def test_keys_are_what_they_are_called(rng):
    np.testing.assert_allclose(
        np.linalg.norm(conditioning.unit_keys(rng, 3, 7, 5), axis=-1), 1, rtol=1e-12
    )
    basis = conditioning.orthonormal_keys(rng, 4, 6)
    np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-12)
    alike = conditioning.correlated_keys(rng, 0.4, 400, 2, 16)
    assert (alike[:, 0] * alike[:, 1]).sum(-1).mean() == pytest.approx(0.16, abs=0.04)
    with pytest.raises(ValueError, match="pairs: at most 3 directions"):
        conditioning.orthonormal_keys(rng, 4, 3)


# The delta rule


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_delta_rule_is_a_loop(rng, rate):
    keys, values, tests = (rng.normal(size=shape) for shape in ((9, 5), (9, 3), (4, 5)))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    state = np.zeros((5, 3))
    for k, v in zip(keys, values, strict=True):
        state += rate * np.outer(k, v - state.T @ k)
    told = conditioning.recall(keys, values, tests, rate)
    np.testing.assert_allclose(told, tests @ state, rtol=5e-6, atol=5e-6)


def test_the_remaining_error_is_that_of_a_loop(rng):
    keys, values = conditioning.unit_keys(rng, 5, 8), rng.normal(size=(5, 2))
    state = np.zeros((8, 2))
    for _ in range(3):
        for k, v in zip(keys, values, strict=True):
            state += np.outer(k, v - state.T @ k)
    found = pavlovian_delta.remaining_error(keys, values, 3)
    np.testing.assert_allclose(found, values - keys @ state, atol=1e-12)


def test_acquisition_and_extinction_follow_their_curve():
    told, predicted = pavlovian_delta.acquisition(40, 16, 0.3)
    response, by_hand = 0.0, []
    for trial in range(40):
        response += 0.3 * ((trial < 16) - response)
        by_hand.append(response)
    np.testing.assert_allclose(predicted, by_hand, rtol=1e-12)
    np.testing.assert_allclose(told, by_hand, atol=1e-6)


def test_hebb_knows_no_blocking():
    light, tone = np.eye(2)
    shown = np.stack([light] * 8 + [light + tone] * 8)
    told = conditioning.recall(shown, np.ones((16, 1)), tone[None])
    assert told[0, 0] == pytest.approx(8.0)


def test_one_round_is_not_enough_for_keys_that_lean(rng):
    keys, values = conditioning.unit_keys(rng, 8, 16), rng.choice([-1.0, 1.0], size=(8, 2))
    assert np.abs(pavlovian_delta.remaining_error(keys, values, 1)).max() > 0.05
    assert np.abs(pavlovian_delta.remaining_error(keys, values, 400)).max() < 1e-6


def test_a_rule_that_does_not_correct_itself_is_noticed(monkeypatch):
    def uncorrected(tests, stimuli, outcomes, rate):
        return conditioning._hebb(tests, stimuli, rate * outcomes)

    monkeypatch.setattr(conditioning, "_rescorla_wagner", uncorrected)
    found = pavlovian_delta.check()
    assert not found.holds
    failed = {row[0] for row in found.rows if row[-1] > 1}
    assert {"acquisition", "extinction", "blocking", "overshadowing", "m = d"} <= failed
    assert "orthonormal" not in failed


# Depth, width and heads


@pytest.mark.parametrize(("depth", "heads"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_noise_through_depth_is_a_product_of_gram_matrices(rng, depth, heads):
    pairs, width, trials = 6, 24, 4000
    x = np.broadcast_to(np.eye(pairs)[0], (trials, pairs))
    for _ in range(depth):
        keys = conditioning.unit_keys(rng, trials, heads, pairs, width)
        gram = np.einsum("thid,thjd->tij", keys, keys) / heads
        x = np.einsum("ti,tij->tj", x, gram)
    power = ((x - np.eye(pairs)[0]) ** 2).sum(1)
    said = pavlovian_depth.noise_power(depth, pairs, width, heads)
    assert power.mean() == pytest.approx(said, abs=5 * power.std() / math.sqrt(trials))


def test_the_depth_budget_spends_the_noise():
    for noise, width, heads in itertools.product((0.1, 1.0), (16, 64), (1, 4)):
        depth = pavlovian_depth.depth_budget(noise, 9, width, heads)
        assert pavlovian_depth.noise_power(depth, 9, width, heads) == pytest.approx(noise)
        doubled = pavlovian_depth.depth_budget(noise, 9, 2 * width, heads)
        assert doubled == pytest.approx(pavlovian_depth.depth_budget(noise, 9, width, 2 * heads))


def test_reliability_is_a_power_of_the_symmetric_channel():
    outcomes, rate = 5, 0.9
    channel = np.full((5, 5), (1 - rate) / 4) + np.eye(5) * (rate - (1 - rate) / 4)
    for depth in (1, 2, 7):
        exact = np.linalg.matrix_power(channel, depth)[0, 0]
        assert pavlovian_depth.reliability(depth, rate, outcomes) == pytest.approx(exact)


def test_depth_costs_width_only_its_logarithm():
    def width_for(depth):
        rates = ((d, pavlovian_curves.recall_rate(16, d, 4)) for d in range(16, 400, 2))
        return next(d for d, rate in rates if pavlovian_depth.reliability(depth, rate) > 0.99)

    widths = np.array([width_for(depth) for depth in (4, 16, 64)])
    steps = np.diff(widths)
    assert steps[1] == pytest.approx(steps[0], rel=0.3)
    assert widths[-1] < 2 * widths[0]


def test_a_head_that_is_not_heard_is_noticed(monkeypatch):
    true = conditioning.respond

    def deaf(tests, stimuli, outcomes):
        return np.repeat(true(tests, stimuli, outcomes)[..., :1, :], tests.shape[-2], -2)

    monkeypatch.setattr(pavlovian_depth, "respond", deaf)
    assert not pavlovian_depth.check().holds


# The dynamical systems framework


@pytest.fixture
def drawn(rng):
    return dsf._draw(rng)


def test_linear_attention_as_a_system_is_its_quotient_of_sums(drawn):
    query, key, value = (drawn[name] for name in ("query", "key", "u"))
    system = dsf_forms.linear_attention(query, key, value.shape[1])
    expected = [
        sum((q @ key[j]) * value[j] for j in range(i + 1)) / sum(q @ key[j] for j in range(i + 1))
        for i, q in enumerate(query)
    ]
    np.testing.assert_allclose(dsf_forms.scan(system, value), expected, rtol=1e-10)


def test_s6_as_a_system_is_mambas_loop(drawn):
    a, step, b, c, u, skip = (
        drawn[name] for name in ("rates", "step", "key", "query", "u", "skip")
    )
    channels, features = a.shape
    h, expected = np.zeros((channels, features)), np.zeros_like(u)
    for t in range(len(u)):
        for d in range(channels):
            for n in range(features):
                h[d, n] = math.exp(step[t, d] * a[d, n]) * h[d, n] + step[t, d] * b[t, n] * u[t, d]
            expected[t, d] = h[d] @ c[t] + skip[d] * u[t, d]
    found = dsf_forms.scan(dsf_forms.selective(a, step, b, c, skip), u)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("power", [None, 1.5])
def test_the_quasi_lstm_as_a_system_is_its_loop(drawn, power):
    def logistic(x):
        return 1 / (1 + math.exp(-x))

    f, i, o, u = (drawn[name] for name in "fiou")
    h, expected = np.zeros(u.shape[1]), np.zeros_like(u)
    for t, d in np.ndindex(*u.shape):
        keep = logistic(f[t, d]) if power is None else logistic(-f[t, d]) ** power
        h[d] = keep * h[d] + logistic(i[t, d]) * u[t, d]
        expected[t, d] = logistic(o[t, d]) * h[d]
    found = dsf_forms.scan(dsf_forms.quasi_lstm(f, i, o, power), u)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_the_rg_lru_as_a_system_is_its_loop(drawn):
    r, i, u, parameter = drawn["f"], drawn["i"], drawn["u"], drawn["skip"]
    h, expected = np.zeros(u.shape[1]), np.zeros_like(u)
    for t, d in np.ndindex(*u.shape):
        base = 1 / (1 + math.exp(parameter[d]))  # sigmoid(-parameter): its log is -softplus
        a = base ** (8 / (1 + math.exp(-r[t, d])))
        h[d] = a * h[d] + math.sqrt(1 - a * a) * u[t, d] / (1 + math.exp(-i[t, d]))
        expected[t, d] = h[d]
    found = dsf_forms.scan(dsf_forms.rg_lru(parameter, r, i), u)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_the_two_forms_meet_to_the_last_digit_in_float64(drawn):
    query, key, value = (drawn[name] for name in ("query", "key", "u"))
    eta = np.cumsum(key.sum(1))
    step, write = dsf.as_selective(key, eta)
    assert (step > 0).all()
    one = np.repeat(step[:, None], value.shape[1], 1)
    rates = -np.ones((value.shape[1], key.shape[1]))
    ssm = dsf_forms.selective(rates, one, write, query, np.zeros(value.shape[1]))
    attention = dsf_forms.linear_attention(query, key, value.shape[1], eta)
    np.testing.assert_allclose(
        dsf_forms.scan(ssm, value), dsf_forms.scan(attention, value), rtol=1e-11, atol=1e-13
    )


def test_the_best_normaliser_misses_more_the_further_the_rates_are_apart():
    rows = [row for row in dsf.counter_check().rows if str(row[0]).startswith("S6")]
    errors = [row[3] for row in rows]
    assert errors[0] < 1e-12 < 0.005 < errors[1] < errors[2]


@pytest.mark.parametrize("at", range(4))
def test_a_wrong_input_of_the_recurrence_is_noticed(monkeypatch, at):
    true = dsf._heads

    def faulty(query, key, value, log_decay):
        inputs = [query, key, value, np.zeros_like(key) if log_decay is None else log_decay]
        inputs[at] = 0.99 * inputs[at] - 0.001
        return true(*inputs)

    monkeypatch.setattr(dsf, "_heads", faulty)
    assert not dsf.check().holds


# Softmax by features


@pytest.mark.parametrize(("width", "order"), [(1, 5), (3, 0), (3, 4), (4, 3)])
def test_taylor_features_are_the_truncated_exponential(rng, width, order):
    q, k = rng.normal(size=(2, 6, width))
    features = [dsf_forms.taylor_features(x, order) for x in (q, k)]
    series = sum((q @ k.T) ** degree / math.factorial(degree) for degree in range(order + 1))
    np.testing.assert_allclose(features[0] @ features[1].T, series, rtol=1e-10, atol=1e-12)
    exponents = itertools.product(range(order + 1), repeat=width)
    assert features[0].shape[1] == sum(sum(alpha) <= order for alpha in exponents)
    assert features[0].shape[1] == dsf_softmax.state_size(order, width)


@pytest.mark.parametrize("order", range(10))
def test_the_relative_error_of_the_series_is_bounded(order):
    s = np.linspace(-2, 2, 401)
    series = sum(s**degree / math.factorial(degree) for degree in range(order + 1))
    found = np.abs(series / np.exp(s) - 1).max()
    assert found <= dsf_softmax.relative_error(order, 2.0)
    assert found > dsf_softmax.relative_error(order, 2.0) / 4


def test_errors_fall_with_every_order_and_the_state_grows():
    rows = dsf_softmax.curve()
    for column in (2, 3):
        errors = [row[column] for row in rows]
        assert errors == sorted(errors, reverse=True)
    assert [row[1] for row in rows] == [math.comb(4 + p, p) for p in dsf_softmax.ORDERS]
    assert all(b >= m for _, m, b in dsf_softmax.state_needed(rows))


def test_no_features_are_enough_for_all_lengths():
    for length in (2, 4, 7):
        tokens = np.linspace(-1.5, 1.5, length)
        assert np.linalg.matrix_rank(np.exp(np.outer(tokens, tokens)), 1e-12) == length


def test_a_wrong_coefficient_of_the_series_is_noticed(monkeypatch):
    true = dsf_forms.taylor_features

    def faulty(x, order):
        return true(x, order) * np.where(np.arange(dsf_softmax.state_size(order)) < 5, 1, 1.1)

    monkeypatch.setattr(dsf_softmax, "taylor_features", faulty)
    assert not dsf_softmax.check().holds
