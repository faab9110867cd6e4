"""Theorems of the choices of attention: their closed forms had otherwise, faults they notice."""

import itertools
import math

import jax
import numpy as np
import pytest
from scipy import integrate, special, stats

import theory
from theory import (
    attention_rank,
    attention_rank_models,
    in_context_models,
    in_context_regression,
    latent_edges,
    latent_mixtures,
    normalization_geometry,
    normalization_limits,
    random_feature_attention,
    random_feature_models,
    shares,
    sigmoid_regularity,
    zonal,
)

IDS = (
    "sigmoid-regularity",
    "latent-edges",
    "normalization-limits",
    "in-context-regression",
    "attention-rank",
    "random-feature-attention",
)
THEOREMS = theory.theorems()


@pytest.fixture
def rng():
    return np.random.default_rng(25)


LONG = ("normalization-limits", "attention-rank")


@pytest.mark.parametrize(
    "name", [pytest.param(id, marks=[pytest.mark.slow] * (id in LONG)) for id in IDS]
)
def test_the_same_key_gives_the_same_numbers_and_another_others(name):
    first, again, other = (THEOREMS[name].check(jax.random.key(k)) for k in (7, 7, 8))
    assert first.rows == again.rows
    assert first.rows != other.rows


def test_shares_are_one_where_a_promise_is_just_kept():
    assert shares.at_most(3.0, 3.0) <= 1 < shares.at_most(3.0 + 1e-9, 3.0)
    assert shares.at_least(3.0, 3.0) <= 1 < shares.at_least(3.0 - 1e-9, 3.0)
    assert shares.at_least(0.0, 0.0) == 0
    assert shares.on_average(1.5, 1.0, 0.1) == pytest.approx(1.0)


# Sigmoid's Jacobian


@pytest.mark.parametrize("bias", [-1.5, 0.0, None])
def test_the_jacobian_is_that_of_finite_differences(rng, bias):
    tokens, A, W = rng.normal(size=(5, 3)), rng.normal(size=(3, 3)), rng.normal(size=(3, 3))

    def layer(x):
        scores = x @ A @ x.T
        if bias is None:
            p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        else:
            p = 1 / (1 + np.exp(-scores - bias))
        return (p @ x @ W).ravel()

    moved = 1e-6 * np.eye(15).reshape(15, 5, 3)
    expected = np.stack([(layer(tokens + d) - layer(tokens - d)) / 2e-6 for d in moved], 1)
    found = sigmoid_regularity.jacobian(tokens, A, W, bias)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_the_mean_sum_of_a_row_is_an_integral():
    z = np.linspace(-9, 9, 200_001)
    density = np.exp(-(z**2) / 2)
    for n, t in ((7, 0.5), (300, 1.0)):
        exact = n * (density / (1 + n * np.exp(-t * z))).sum() / density.sum()
        assert sigmoid_regularity.mean_row_sum(n, t) == pytest.approx(exact, rel=1e-6)
    assert sigmoid_regularity.mean_row_sum(10**6, 1.0) == pytest.approx(math.exp(0.5), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("norm_bound", 0.99), ("any_length_bound", 0.9), ("any_bias_bound", 0.65), ("weights", 1.01)],
)
def test_a_wrong_constant_of_the_jacobian_is_noticed(monkeypatch, name, factor):
    true = getattr(sigmoid_regularity, name)
    monkeypatch.setattr(sigmoid_regularity, name, lambda *x: factor * true(*x))
    assert not sigmoid_regularity.check().holds


def test_a_token_width_that_does_not_fit_is_refused(rng):
    with pytest.raises(ValueError, match=r"W: expected shape \(3, 3\), got \(3, 2\)"):
        sigmoid_regularity.jacobian(np.ones((4, 3)), np.eye(3), np.ones((3, 2)), 0.0)
    with pytest.raises(ValueError, match="length: expected a positive int, got 0"):
        sigmoid_regularity.mean_row_sum(0, 1.0)


# Edges that are not known


def test_marginals_of_coupled_edges_are_sums_over_all_graphs(rng):
    scores, coupling = rng.normal(size=(3, 4)), 0.7
    mass = np.zeros((3, 4))
    for edges in itertools.product(range(4), repeat=3):
        agree = sum(edges[i] == edges[i + 1] for i in range(2))
        weight = math.exp(sum(scores[i, j] for i, j in enumerate(edges)) + coupling * agree)
        for i, j in enumerate(edges):
            mass[i, j] += weight
    expected = mass / mass.sum(1, keepdims=True)
    np.testing.assert_allclose(latent_edges.marginals(scores, coupling), expected, rtol=1e-12)


def test_an_edge_that_cannot_be_has_no_weight(rng):
    query, keys = rng.normal(size=(2, 3, 4))
    told = latent_edges.weights(query, keys, np.array([[0.0, 1, 1], [1, 1, 0], [1, 1, 1]]))
    assert told[0, 0] == told[1, 2] == 0
    np.testing.assert_allclose(told.sum(1), 1, rtol=1e-6)


def test_a_step_of_retrieval_goes_to_the_maximum_of_its_bound(rng):
    # Expectation maximisation by hand: the mean of the keys under their posterior given z.
    keys, z, prior, beta = rng.normal(size=(5, 3)), rng.normal(size=3), np.full(5, 0.2), 3.0
    density = prior * np.exp(-beta / 2 * ((z - keys) ** 2).sum(1))
    bias = np.log(prior) - beta * (keys**2).sum(1) / 2
    found = latent_mixtures.retrieve(z, keys, beta, bias)
    np.testing.assert_allclose(found, density @ keys / density.sum(), rtol=1e-12)
    constant = -math.log(density.sum()) / beta - latent_mixtures.energy(z, keys, beta, bias)
    assert constant == pytest.approx(0, abs=1e-12)


def test_slots_are_shared_among_slots_and_a_slot_without_tokens_stays(rng):
    tokens, slots = rng.normal(size=(7, 2)), np.array([[0.0, 0.0], [1.0, 1.0], [1e3, 1e3]])
    shares = latent_mixtures.assign(tokens, slots, 0.5)
    density = np.exp(-((tokens[:, None] - slots) ** 2).sum(2) / (2 * 0.5))
    np.testing.assert_allclose(shares, density / density.sum(1, keepdims=True), rtol=1e-10)
    after = latent_mixtures.refine(tokens, slots, shares)
    np.testing.assert_array_equal(after[2], slots[2])
    np.testing.assert_allclose(after[0], np.average(tokens, 0, shares[:, 0]), rtol=1e-12)


def test_a_wrong_prior_of_the_edges_is_noticed(monkeypatch):
    true = latent_edges.weights
    monkeypatch.setattr(latent_edges, "weights", lambda q, k, p: true(q, k, p**1.01))
    assert not latent_edges.check().holds


def test_a_step_that_goes_too_far_is_noticed(monkeypatch):
    true = latent_edges.refine
    monkeypatch.setattr(latent_edges, "refine", lambda x, mu, r: mu + 1.8 * (true(x, mu, r) - mu))
    assert not latent_edges.check().holds


def test_an_energy_with_another_temperature_is_noticed(monkeypatch):
    true = latent_edges.energy
    monkeypatch.setattr(latent_edges, "energy", lambda z, k, beta, b: true(z, k, 0.8 * beta, b))
    assert not latent_edges.check().holds


def test_too_many_graphs_and_a_variance_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"at most 10\*\*6 graphs are listed, got 9\*\*9"):
        latent_edges.marginals(np.zeros((9, 9)))
    with pytest.raises(ValueError, match=r"variance: expected a positive number, got 0\.0"):
        latent_mixtures.assign(np.zeros((2, 1)), np.zeros((1, 1)), 0.0)


# Bounded scores


def test_the_share_of_a_sphere_is_that_of_known_dimensions():
    heights = np.array([-2.0, -1.0, -0.6, 0.0, 0.3, 1.0, 1.5])
    c = np.clip(heights, -1, 1)
    circle, ball = 0.5 + np.arcsin(c) / np.pi, (1 + c) / 2
    six = 0.5 + np.sign(c) * special.betainc(0.5, 2.5, c**2) / 2
    for width, exact in ((2, circle), (3, ball), (6, six)):
        found = normalization_geometry.sphere_share(heights, width)
        np.testing.assert_allclose(found, exact, atol=1e-8)


def test_a_token_chosen_alone_is_separable(rng):
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    tokens = rng.normal(size=(4, 8))
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    found = normalization_geometry.separate(tokens, weights, 1)
    assert found.share == 1
    assert found.predicted == pytest.approx(1)


def test_the_distance_is_a_mean_over_all_tokens():
    a, chosen, p = np.array([0.4, 0.3, 0.2, 0.1]), 2, 0.3  # a token is 2 with probability p, or -1
    exact = 0.0
    for up in itertools.product((True, False), repeat=4):
        x = np.where(up, 2.0, -1.0)
        far = a[2] * x[2] + a[3] * x[3] - a[0] * x[0] - a[1] * x[1]
        exact += float(np.prod(np.where(up, p, 1 - p))) * far**2
    mean, variance = 3 * p - 1, 9 * p * (1 - p)
    found = normalization_limits.mean_square_distance(a, chosen, mean, variance)
    assert found == pytest.approx(exact)


@pytest.mark.parametrize("length", [10, 1000])
def test_half_the_weight_takes_scores_that_grow_with_the_logarithm(length):
    steep = math.log(length / 1 - 1) / 2
    assert normalization_limits.selectivity_bound(1 / length, steep) == pytest.approx(length / 2)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("selectivity_bound", 0.999),
        ("gradient_bound", 0.99),
        ("lead_bound", 0.99),
        ("mean_square_distance", 1.5),
    ],
)
def test_a_wrong_constant_of_the_limits_is_noticed(monkeypatch, name, factor):
    true = getattr(normalization_limits, name)
    monkeypatch.setattr(normalization_limits, name, lambda *x: factor * true(*x))
    assert not normalization_limits.check().holds


def test_a_sphere_of_another_width_is_noticed(monkeypatch):
    true = normalization_geometry.sphere_share
    monkeypatch.setattr(
        normalization_geometry, "sphere_share", lambda c, width: true(c, width // 2)
    )
    assert not normalization_limits.check().holds


def test_limits_refuse_no_temperature_no_sphere_and_no_choice(rng):
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        normalization_limits.weights(np.zeros(2), 0.0)
    with pytest.raises(ValueError, match="width: a sphere needs 2 dimensions or more, got 1"):
        normalization_geometry.sphere_share(np.zeros(1), 1)
    with pytest.raises(ValueError, match="chosen: expected 1 to 3 tokens, got 4"):
        normalization_geometry.separate(np.ones((4, 2)), np.ones(4), 4)


# Regression in context


@pytest.mark.parametrize("name", ["plain", "debiased"])
def test_the_risk_of_a_gradient_step_is_that_of_random_contexts_by_hand(rng, name):
    # Given a context, the risk is |slope error|² and the noise; only contexts are drawn.
    length, eta, d, noise, risks = 12, 0.7, 5, 0.1, []
    for _ in range(4000):
        x = rng.normal(size=(length, d))
        c = x - x.mean(0) if name == "debiased" else x
        gram = eta * x.T @ c / length
        missed = np.eye(d) - gram
        risks.append((missed**2).sum() / d + noise * ((eta * c / length) ** 2).sum() + noise)
    said = getattr(in_context_models, f"{name}_risk")(eta, length)
    error = np.std(risks) / math.sqrt(len(risks))
    assert np.mean(risks) == pytest.approx(said, abs=5 * error)


def test_the_least_risks_are_minima_found_otherwise():
    d, length, noise = 5, 40, 0.1
    share = (1 + noise) / length

    def risk(gram, aligned):  # the best size of the mu, given what they are multiples of
        return 1 + noise - aligned**2 / gram

    omega = np.linspace(0.01, 1.5, 20_001)
    one = risk(omega**2 + share * np.exp(d * omega**2), omega)
    assert in_context_regression.least_risk(1) == pytest.approx(one.min(), rel=1e-7)
    assert omega[one.argmin()] == pytest.approx(1 / math.sqrt(d), abs=1e-3)
    pair = risk(4 * omega**2 + 4 * share * np.sinh(d * omega**2), 2 * omega)
    assert in_context_regression.least_risk(2) == pytest.approx(pair.min(), rel=1e-4)
    for at in (100, 9000):
        found = in_context_regression.least_risk(2, float(omega[at]))
        assert found == pytest.approx(pair[at], rel=1e-10)


def test_descent_follows_the_gradient_of_the_approximate_risk(rng):
    omega, mu = rng.normal(size=(2, 3)) / 2
    risk, step = in_context_models.approximate_risk, 1e-6
    after = in_context_models.descend(omega, mu, steps=1, rate=1.0)
    for at in np.eye(3):
        slope = (risk(omega + step * at, mu) - risk(omega - step * at, mu)) / (2 * step)
        assert (omega - after[0]) @ at == pytest.approx(float(slope), rel=1e-6, abs=1e-8)
        slope = (risk(omega, mu + step * at) - risk(omega, mu - step * at)) / (2 * step)
        assert (mu - after[1]) @ at == pytest.approx(float(slope), rel=1e-6, abs=1e-8)


def test_a_gap_shrinks_with_the_square_of_omega_relative_to_the_step(rng):
    data, gaps = in_context_models.draw(rng, 300), []
    for omega in (0.1, 0.05, 0.025):
        pair = np.array([omega, -omega]), np.array([1.0, -1.0])
        step = in_context_models.gradient_step(data, 2 * omega)
        gap = in_context_models.heads(data, *pair) - step
        gaps.append(np.abs(gap).mean() / np.abs(step).mean())
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.15)
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(
    ("name", "factor"), [("debiased_risk", 0.8), ("plain_risk", 0.8), ("approximate_risk", 0.99)]
)
def test_a_wrong_risk_is_noticed(monkeypatch, name, factor):
    true = getattr(in_context_models, name)
    monkeypatch.setattr(in_context_models, name, lambda *x: factor * true(*x))
    assert not in_context_regression.check().holds


@pytest.mark.parametrize(("name", "factor"), [("pair_gap", 0.01), ("least_risk", 1.01)])
def test_a_wrong_bound_of_regression_is_noticed(monkeypatch, name, factor):
    true = getattr(in_context_regression, name)
    monkeypatch.setattr(in_context_regression, name, lambda *x: factor * true(*x))
    assert not in_context_regression.check().holds


def test_regression_refuses_no_heads_and_short_contexts(rng):
    with pytest.raises(
        ValueError, match="num_heads: expected 1 or more, 2 at a given omega, got 3"
    ):
        in_context_regression.least_risk(3, 0.1)
    with pytest.raises(ValueError, match="length: expected 2 pairs or more, got 1"):
        in_context_models.draw(rng, 4, 1)
    with pytest.raises(ValueError, match="num_heads: expected 1 or more, got 0"):
        in_context_models.trained(num_heads=0)
    with pytest.raises(ValueError, match="steps: expected 4 or more, got 3"):
        in_context_models.trained(steps=3)


@pytest.mark.slow
def test_training_finds_two_opposite_heads_and_one_head_pays():
    pair, one = (in_context_regression.trained(num_heads=heads) for heads in (2, 1))
    assert pair.omega[0] == pytest.approx(-pair.omega[1], rel=0.15)
    assert pair.zero_sum < 0.05
    assert pair.off_diagonal < 0.15
    assert pair.x_part < 0.05
    assert pair.risk < min(0.26, 0.7 * one.risk)


# Rank


@pytest.mark.parametrize("width", [3, 4, 9])
def test_zonal_polynomials_are_those_of_gegenbauer(width):
    t, order = np.linspace(-1, 1, 11), (width - 2) / 2
    found = zonal.polynomials(width, 12, t)
    for degree in range(13):
        scale = special.eval_gegenbauer(degree, order, 1.0)
        expected = special.eval_gegenbauer(degree, order, t) / scale
        np.testing.assert_allclose(found[degree], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("width", [3, 5, 16])
def test_the_sign_has_its_parts_at_odd_degrees(width):
    odd, sign, count = zonal.sign_parts(width, 401)
    assert (count * sign**2).sum() == pytest.approx(1, abs=0.02)
    power = (width - 3) / 2

    def part(degree):
        scale = special.eval_gegenbauer(degree, (width - 2) / 2, 1.0)
        return integrate.quad(
            lambda t: (
                2
                * zonal.density(width)
                * (1 - t * t) ** power
                * special.eval_gegenbauer(degree, (width - 2) / 2, t)
                / scale
            ),
            0,
            1,
        )[0]

    for at in range(4):
        assert sign[at] == pytest.approx(part(int(odd[at])), rel=1e-7)
    assert zonal.harmonics(3, 4) == 9
    assert zonal.harmonics(5, 2) == 14


def test_a_head_of_rank_one_is_right_as_often_as_drawn(rng):
    for cosine in (1.0, 0.4):
        query = np.array([1.0, 0, 0, 0])
        key = np.array([cosine, math.sqrt(1 - cosine**2), 0, 0])
        w, y = rng.normal(size=(2, 200_000, 4))
        right = np.sign((w @ key) * (y @ query)) == np.sign((w * y).sum(1))
        said = attention_rank_models.right_choice(np.array([cosine]), 4)[0]
        assert right.mean() == pytest.approx(said, abs=0.006)


@pytest.mark.parametrize(("width", "heads"), [(3, 1), (8, 15), (5, 255)])
def test_a_vote_is_a_binomial_tail(width, heads):
    def wrong(t):
        odds = stats.binom.cdf((heads - 1) // 2, heads, 0.5 + math.asin(t) / math.pi)
        return 4 * zonal.density(width) * (1 - t * t) ** ((width - 3) / 2) * odds

    exact = integrate.quad(wrong, 0, 1, points=[0.1, 0.3], limit=200)[0]
    assert attention_rank_models.vote_error(width, heads) == pytest.approx(exact, rel=1e-5)


def test_the_lower_bound_is_half_of_everything_for_no_heads_and_falls_with_each():
    bounds = [attention_rank.lower_bound(8, 2, heads) for heads in (0, 1, 4, 16, 10**9)]
    assert bounds[0] == pytest.approx(0.5, abs=0.01)
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == 0
    by_hand = sum(
        count * sign**2 * max(0.0, 1 - 4 * math.comb(int(odd) + 1, int(odd)) / count) / 2
        for odd, sign, count in zip(*zonal.sign_parts(8, attention_rank.DEGREE), strict=True)
    )
    assert bounds[2] == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("lower_bound", 2.0), ("full_rank_bound", 0.99), ("vote_bound", 0.2), ("vote_error", 2.0)],
)
def test_a_wrong_constant_of_rank_is_noticed(monkeypatch, name, factor):
    true = getattr(attention_rank, name)
    monkeypatch.setattr(attention_rank, "crossing", lambda width: 0)
    monkeypatch.setattr(attention_rank, name, lambda *x: factor * true(*x))
    assert not attention_rank.check().holds


def test_rank_refuses_even_votes_full_rank_and_the_circle():
    with pytest.raises(ValueError, match="heads: a vote needs an odd number of them, got 16"):
        attention_rank_models.vote_error(8, 16)
    with pytest.raises(ValueError, match="rank: expected 1 to 7, less than the width, got 8"):
        attention_rank.lower_bound(8, 8, 1)
    with pytest.raises(ValueError, match="width: expected 3 or more, got 2"):
        attention_rank.lower_bound(2, 1, 1)
    with pytest.raises(ValueError, match="rank: expected 1 to 8, got 9"):
        attention_rank_models.trained(rank=9)
    with pytest.raises(ValueError, match="num_heads: expected 1 or more, got 0"):
        attention_rank_models.trained(num_heads=0)


@pytest.mark.slow
def test_training_finds_that_rank_is_not_bought_with_heads():
    full = attention_rank.trained()
    many = attention_rank.trained(rank=2, num_heads=4)
    assert full.error < 0.03
    least = attention_rank.lower_bound(8, 2, 4)
    assert many.error > least - 5 * many.standard_error
    assert many.error > 5 * full.error


# Random heads


def test_the_arc_cosine_kernel_is_an_integral_over_the_plane():
    a, b = np.array([1.5, 0.0]), np.array([-0.4, 0.9])
    angle = (np.arange(100_000) + 0.5) / 100_000 * 2 * np.pi
    way = np.stack([np.cos(angle), np.sin(angle)])
    # Of a normal vector in the plane, the length squared has mean two and is independent.
    exact = 2 * np.mean(np.maximum(a @ way, 0) * np.maximum(b @ way, 0))
    sizes = np.array([np.linalg.norm(a) * np.linalg.norm(b)])
    found = random_feature_models.arc_cosine(sizes, np.array([a @ b]))
    assert found[0] == pytest.approx(exact, rel=1e-8)


def test_kernels_are_means_over_random_heads(rng):
    x, heads, bias = rng.normal(size=(3, 4, 2)), 40_000, 1.5
    tokens = np.concatenate([x, np.ones((3, 4, 1))], 2)
    weights = rng.normal(size=(heads, 3, 3))
    for kernel, act, shift in (
        (random_feature_models.relu_kernel(x, x), lambda z: np.maximum(z, 0), 0.0),
        (None, lambda z: z, bias),
    ):
        if kernel is None:
            features = random_feature_models.linear_features(x, bias)
            kernel = features @ features.T
        drawn = weights + shift * np.diag([1.0, 1.0, 0.0])
        scores = np.einsum("na,mab,nib->nmi", tokens[:, 0], drawn, tokens[:, 1:])
        out = np.einsum("nmi,nib->nmb", act(scores), tokens[:, 1:]) / 3
        told = np.einsum("nmb,kmb->mnk", out, out)
        error = told.std(0) / math.sqrt(heads)
        assert (np.abs(told.mean(0) - kernel) < 5 * error).all()


def test_permuted_keys_change_nothing(rng):
    x, heads = rng.normal(size=(5, 7, 6)), rng.normal(size=(3, 7, 7))
    turned = x[:, [0, 3, 1, 6, 2, 5, 4]]
    for feature in (
        lambda y: random_feature_models.linear_features(y, 2.0),
        lambda y: random_feature_models.relu_kernel(y, x),
        lambda y: random_feature_models.head_features(y, heads),
    ):
        np.testing.assert_allclose(feature(turned), feature(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [2, 8])
def test_the_floor_of_centred_heads_is_what_the_largest_eigenvalues_leave(keys):
    d = random_feature_attention.WIDTH
    u = np.eye(d)[0]
    moment = np.kron(np.eye(d), np.eye(d) + (keys + 1) * np.outer(u, u)) / (keys * d)
    values = np.sort(np.linalg.eigvalsh(moment))[::-1]
    for samples in (0, 3, 8, 36):
        expected = values[samples:].sum() / values.sum()
        found = random_feature_attention.centred_floor(keys, samples)
        assert found == pytest.approx(expected, abs=1e-12)
    assert values.sum() == pytest.approx((d + keys + 1) / keys)  # the target's variance


def test_the_power_function_vanishes_where_the_samples_are(rng):
    features = rng.normal(size=(9, 12))
    kernel, diagonal = features @ features.T, (features**2).sum(1)
    cross = kernel[:, :6]
    found = random_feature_models.power(kernel[:6, :6], cross, diagonal)
    assert found[:6].max() < 1e-4
    span = np.linalg.qr(features[:6].T)[0]
    left = features[6:] - features[6:] @ span @ span.T
    np.testing.assert_allclose(found[6:], np.linalg.norm(left, axis=1), rtol=1e-6)


def test_a_fit_that_knows_more_than_it_may_is_noticed(monkeypatch):
    true = random_feature_models.ridge
    monkeypatch.setattr(random_feature_models, "ridge", lambda *x: 0.2 * true(*x))
    assert not random_feature_attention.check().holds


@pytest.mark.parametrize(("name", "factor"), [("head_features", 1.01), ("power", 0.05)])
def test_a_wrong_feature_or_power_is_noticed(monkeypatch, name, factor):
    true = getattr(random_feature_models, name)
    monkeypatch.setattr(random_feature_models, name, lambda *x: factor * true(*x))
    assert not random_feature_attention.check().holds


@pytest.mark.parametrize(("name", "to"), [("network_floor", 6.0), ("centred_floor", 6.0)])
def test_a_floor_too_high_is_noticed(monkeypatch, name, to):
    monkeypatch.setattr(random_feature_attention, name, lambda *x: to)
    assert not random_feature_attention.check().holds


def test_random_heads_refuse_no_samples_and_other_widths(rng):
    with pytest.raises(ValueError, match="samples, keys: expected positive ints, got 0, 2"):
        random_feature_attention.network_floor(2, 0)
    with pytest.raises(ValueError, match="heads: expected width 4, got"):
        random_feature_models.head_features(rng.normal(size=(2, 3, 3)), np.ones((1, 3, 3)))
