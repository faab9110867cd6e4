r"""What softmax heads do for linear regression in context, and what a pair of them buys.

    ŷ = Σ_h μ_h Σ_l y_l softmax_l(ω_h x_l·x_q)

A pair (ω, -ω; μ, -μ) is a step of gradient descent with the mean of the x_l taken off, up to the
third order of ω; adding b to every y_l adds b Σ_h μ_h, so that an intercept is ignored iff the μ
sum to zero; and He et al.'s (2025) approximate risk is a sum of squares, (Σ_h μ_h)² one of them.
Descent makes it zero unless all heads end on one side, ω_h = 1/√d, where together they are one head
(of random starts of two heads some 43 % do, of four 3 %). With ξ = d/L its least value is 1 + s² -
1/(1 + ξ(1+s²)) for two heads or more and 1 + s² - 1/(1 + eξ(1+s²)) for one: one head pays e times
the dimension. The exact risk of the debiased step, R below, is within a constant factor of that of
Bayes' rule, 13 at s² = 0.1 and d = 5; the step that is not debiased is slightly better still.
Longer contexts than those trained on lower softmax's risk; linear attention whose weights are
summed, not averaged, diverges.

Setting, structure of the heads, approximate risk and constants are the paper's and its code's; the
bounds, the decomposition and the exact risks are ours. That what fails at length is the sum, not
linearity, is our reading.
"""

import math
from functools import partial

import numpy as np

from attnlab.core.entry import Paper
from theory import in_context_models as models
from theory.conditioning import generator
from theory.in_context_models import KAPPA, LENGTH, NOISE, WIDTH, trained
from theory.shares import at_least, at_most, on_average
from theory.theorem import Cell, Evidence, Key, Theorem

__all__ = ["THEOREM", "check", "counter_check", "trained"]

RATIO = WIDTH / LENGTH  # ξ
ETA = 1 / (1 + RATIO * (1 + NOISE))
SMALL = 0.02  # an ω at which a pair is the debiased step
CONTEXTS = 10_000
EXACT = 1e-12  # float64, relative: of sums of some hundred terms
ROUNDING = 2e-5  # float32, relative to μ and the y: a pair takes differences of its heads
COLUMNS = ("what", "heads", "L", "measured", "promised", "share")


def check(key: Key | None = None) -> Evidence:
    """Pairs against gradient steps, shifted answers, descent on the risk, and risks at lengths."""
    rng = generator(key)
    rows = [*_pairs(rng), *_shifts(rng), *_descent(rng)]
    rows += [row for length in (20, LENGTH, 160) for row in _risks(rng, length)]
    return _evidence(rows, "risks are mean squares over 10,000 contexts beside their exact values")


def counter_check(key: Key | None = None) -> Evidence:
    """One head, whose μ do not sum to zero; linear attention with weights that are summed."""
    rng = generator(key)
    data = models.draw(rng, 2000)
    one = np.array([0.1]), np.array([1.0])
    gap = models.heads(data, *one) - models.gradient_step(data, 0.1)
    moved = float(np.abs(_shifted(data, *one, 1.0)).max())
    far = models.draw(rng, CONTEXTS, 160)
    rows = [
        _worst_gap("one head for two", 1, 0.1, gap, pair_gap(data, 0.1, 1.0)),
        ("shift of every y", 1, LENGTH, moved, 0.0, at_most(moved, EXACT)),
        _risk("linear attention", 160, far, _summed(far), models.debiased_risk(ETA, 160)),
    ]
    return _evidence(rows, "promised what two opposite heads keep, and what averages keep")


def pair_gap(data: models.Contexts, omega: float, mu: float) -> np.ndarray:
    """(7/48) |μ| Y (|ω| ρ)³ for each context, Y and ρ the ranges of the y and of the scores."""
    return 7 / 48 * abs(mu) * np.ptp(data.y, 1) * (abs(omega) * np.ptp(data.scores, 1)) ** 3


def least_risk(num_heads: int, omega: float | None = None) -> float:
    """The least approximate risk of one head, of two or more, or of a pair at ±ω.

    Raises:
      ValueError: there is no head, or ω is not that of a pair.
    """
    if num_heads < 1 or (omega is not None and num_heads != 2):
        raise ValueError(f"num_heads: expected 1 or more, 2 at a given omega, got {num_heads}.")
    price = math.e if num_heads == 1 else 1.0
    if omega is not None:
        price = math.sinh(WIDTH * omega**2) / (WIDTH * omega**2)
    return 1 + NOISE - 1 / (1 + price * RATIO * (1 + NOISE))


def summed_risk(eta: float, length: int) -> float:
    """Of (η/L) Σ_l y_l x_l·x_q over L' pairs: s² + 1 - 2ηq + η²q² (L' + 1 + κ)/L', q = L'/L."""
    return models.plain_risk(eta * length / LENGTH, length)


def decomposed(omega: np.ndarray, mu: np.ndarray, terms: int = 60) -> float:
    """The approximate risk, term by term of the series of exp(d ω ω^T)."""
    a, share = float(mu @ omega), (1 + NOISE) / LENGTH
    risk = 1 + NOISE - 2 * a + a**2 * (1 + KAPPA / LENGTH) + share * float(mu.sum()) ** 2
    for k in range(2, terms):
        risk += share * WIDTH**k / math.factorial(k) * float(mu @ omega**k) ** 2
    return risk


def _pairs(rng: np.random.Generator) -> list[tuple[Cell, ...]]:
    """Opposite heads, to a debiased step and to attnlab's attention."""
    data = models.draw(rng, 2000)
    rows: list[tuple[Cell, ...]] = []
    for omega in (0.4, 0.2, 0.1, 0.05):
        pair = np.array([omega, -omega]), np.array([1.0, -1.0])
        gap = models.heads(data, *pair) - models.gradient_step(data, 2 * omega)
        rows.append(_worst_gap(f"pair, ω = {omega:g}", 2, omega, gap, pair_gap(data, omega, 1.0)))
    few, pair = models.draw(rng, 64), (np.array([0.13, -0.13]), np.array([3.45, -3.45]))
    error = float(np.abs(models.heads_of_attnlab(few, *pair) - models.heads(few, *pair)).max())
    allowed = ROUNDING * 3.45 * float(np.abs(few.y).max())
    return [*rows, ("attnlab's pair", 2, LENGTH, error, allowed, at_most(error, allowed))]


def _worst_gap(
    what: str, count: int, omega: float, gap: np.ndarray, bound: np.ndarray
) -> tuple[Cell, ...]:
    at = int(np.argmax(np.abs(gap) / bound))
    found, allowed = float(abs(gap[at])), float(bound[at])
    return (what, count, LENGTH, found, allowed, at_most(found, allowed))


def _shifts(rng: np.random.Generator) -> list[tuple[Cell, ...]]:
    """Add 3 to every y_l: the prediction moves by 3 Σ μ, whatever the ω."""
    data = models.draw(rng, 200)
    rows: list[tuple[Cell, ...]] = []
    for count in (1, 2, 4):
        omega, mu = rng.normal(size=(2, count))
        mu = mu - mu.mean() if count == 4 else mu
        moved, said = _shifted(data, omega, mu, 3.0), 3.0 * float(mu.sum())
        error = float(np.abs(moved - said).max())
        allowed = EXACT * float(np.abs(mu).sum()) * (3 + float(np.abs(data.y).max()))
        found = float(moved[np.abs(moved - said).argmax()])
        rows.append(("shift of every y", count, LENGTH, found, said, at_most(error, allowed)))
    return rows


def _shifted(data: models.Contexts, omega: np.ndarray, mu: np.ndarray, by: float) -> np.ndarray:
    higher = models.Contexts(data.x, data.y + by, data.query, data.answer)
    return models.heads(higher, omega, mu) - models.heads(data, omega, mu)


def _descent(rng: np.random.Generator) -> list[tuple[Cell, ...]]:
    """Gradient descent on the approximate risk, and the risk's decomposition where it starts."""
    there = np.arange(4) < np.array([1, 2, 2, 4, 4])[:, None]
    omega, mu = 0.3 * rng.normal(size=(2, *there.shape))
    rows: list[tuple[Cell, ...]] = []
    risk, series = float(models.approximate_risk(omega[-1], mu[-1])), decomposed(omega[-1], mu[-1])
    error = abs(risk / series - 1)
    rows.append(("sum of squares", 4, LENGTH, risk, series, at_most(error, EXACT)))
    omega, mu = models.descend(np.where(there, omega, np.nan), mu)
    # A head that is not there has μ = 0 and ω = 0, and takes no part.
    risks = models.approximate_risk(omega, mu)
    for count, o, m, risk in zip(there.sum(1).tolist(), omega, mu, risks.tolist(), strict=True):
        least = least_risk(count)
        rows.append(("risk, at least", count, LENGTH, risk, least, at_least(risk, least)))
        if count == 1:
            least_at = 1 / math.sqrt(WIDTH)
            rows.append(_close("ω of one head", 1, abs(float(o[0])), least_at, 1e-4))
        else:
            sums, allowed = float(m.sum()) ** 2, LENGTH / (1 + NOISE) * (risk - least)
            rows.append(("(Σ μ)²", count, LENGTH, sums, allowed, at_most(sums, allowed)))
    return rows


def _risks(rng: np.random.Generator, length: int) -> list[tuple[Cell, ...]]:
    """Predictors of η fixed at L, in contexts of another length."""
    data, plain = models.draw(rng, CONTEXTS, length), LENGTH / (LENGTH + 1 + KAPPA)
    opposite = np.array([SMALL, -SMALL]), np.array([1, -1]) * ETA / (2 * SMALL)
    exact, floor = models.debiased_risk(ETA, length), NOISE * WIDTH / (length + NOISE * WIDTH)
    best = float(np.mean((models.bayes(data) - data.answer) ** 2)) - NOISE
    rows = [
        _risk("debiased step", length, data, models.gradient_step(data, ETA), exact),
        _risk("pair", length, data, models.heads(data, *opposite), exact),
        _risk("linear, summed", length, data, _summed(data), summed_risk(plain, length)),
    ]
    if length != LENGTH:
        return rows
    step = models.gradient_step(data, plain, debiased=False)
    factor = (1 + NOISE) / NOISE * (1 + 1 / KAPPA)
    return [
        *rows,
        _risk("plain step", length, data, step, models.plain_risk(plain)),
        ("Bayes' excess", 0, length, best, floor, at_least(best, floor)),
        (
            "R's excess",
            0,
            length,
            exact - NOISE,
            factor * best,
            at_most(exact - NOISE, factor * best),
        ),
    ]


def _summed(data: models.Contexts) -> np.ndarray:
    """Linear attention with the weights of length L, whatever the length."""
    eta = LENGTH / (LENGTH + 1 + KAPPA) * data.y.shape[1] / LENGTH
    return models.gradient_step(data, eta, debiased=False)


def _risk(
    what: str, length: int, data: models.Contexts, told: np.ndarray, exact: float
) -> tuple[Cell, ...]:
    square = (told - data.answer) ** 2
    mean, error = float(square.mean()), float(square.std(ddof=1)) / math.sqrt(len(square))
    return (what, 2 if what == "pair" else 0, length, mean, exact, on_average(mean, exact, error))


def _close(what: str, count: int, found: float, said: float, within: float) -> tuple[Cell, ...]:
    return (what, count, LENGTH, found, said, at_most(abs(found - said), within))


_evidence = partial(Evidence.of_ratios, "what is measured, as a share of what is promised", COLUMNS)


THEOREM = Theorem(
    id="in-context-regression",
    title="two opposite heads regress in context",
    statement=(
        r"Let $\hat y = \sum_h \mu_h \sum_l y_l\, \mathrm{softmax}_l(\omega_h x_l \cdot x_q)$ with "
        r"$x \sim N(0, I_d)$, $\beta \sim N(0, I/d)$, $y = \beta \cdot x + \varepsilon$, $s^2 = "
        r"\mathrm{var}\, \varepsilon$, $\xi = d/L$, $\kappa = d(1+s^2)$. (a) A pair $(\omega, "
        r"-\omega; \mu, -\mu)$ is within $\frac{7}{48} |\mu|\, Y (|\omega| \rho)^3$ of "
        r"$\frac{2 \omega \mu}{L} \sum_l y_l (x_l - \bar x) \cdot x_q$, where $Y$ and $\rho$ are "
        r"the ranges of the $y_l$ and the $x_l \cdot x_q$. (b) Adding $b$ to every $y_l$ adds $b "
        r"\sum_h \mu_h$. (c) The approximate risk $1 + s^2 - 2 \mu \cdot \omega + \mu^\top (\omega "
        r"\omega^\top + \frac{1+s^2}{L} e^{d \omega \omega^\top}) \mu$ is $1 + s^2 - 2a + a^2 (1 + "
        r"\kappa/L) + \frac{1+s^2}{L} [(\sum_h \mu_h)^2 + \sum_{k \ge 2} \frac{d^k}{k!} (\sum_h "
        r"\mu_h \omega_h^k)^2]$, $a = \mu \cdot \omega$; its infimum is $1 + s^2 - 1/(1 + \xi(1 + "
        r"s^2))$ for two heads or more, and for one $1 + s^2 - 1/(1 + e\, \xi (1 + s^2))$, at "
        r"$\omega = 1/\sqrt d$. (d) The debiased step of size $\eta$ has the risk $R(\eta; L) = s^2"
        r" + 1 - 2 \eta n/L + \eta^2 n (n + 1 + \kappa)/L^2$, $n = L - 1$, and at its best $\eta = "
        r"1/(1 + \xi(1+s^2))$ at most $\frac{1+s^2}{s^2} (1 + \frac1\kappa)$ times the excess of "
        r"Bayes' rule over $s^2$. (e) At length $L'$ the pair has, for small $\omega$, $R(\eta; "
        r"L')$; linear attention that sums with weights $\eta/L$ has, with $q = L'/L$, $s^2 + 1 - 2"
        r" \eta q + \eta^2 q^2 (L' + 1 + \kappa)/L'$."
    ),
    assumptions=(
        r"the heads come in opposite pairs, so that $\sum_h \mu_h = 0$",
        "data are Gaussian and isotropic, and the query does not attend to itself",
        "weights are averages, whatever the length",
    ),
    source=Paper(
        "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic "
        "Interpretability of Multi-Head Softmax Attention",
        "He et al.",
        2025,
        "2503.12734",
        "ICML 2025",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"(a) $f(\omega) = \sum_l y_l\, \mathrm{softmax}_l(\omega s)$ has $f' = \mathrm{cov}(y, s)$"
        r" and $f'''$ the joint cumulant of $(y, s, s, s)$, at most $\frac{7}{16} Y \rho^3$; "
        r"$f(\omega) - f(-\omega)$ is odd, and Taylor's remainder does it. (b) Weights sum to one. "
        r"(c) Expand the exponential and minimise over $a$, every other term being a square; pairs "
        r"with $\omega \to 0$ come as near as one likes. One head is left with $e^{d \omega^2} / "
        r"\omega^2$ to minimise. (d) With $S = X^\top C X / L$, $C$ the centring, $E\, "
        r"\mathrm{tr}\, S = d n / L$ and $E\, \mathrm{tr}\, S^2 = d n (n + d + 1)/L^2$. Bayes' "
        r"excess is $s^2 E\, \mathrm{tr} (X^\top X + s^2 d I)^{-1}$, at least $s^2 d/(L + s^2 d)$ "
        r"by Jensen. (e) is (d) with $L'$, and the same without $C$."
    ),
)
