r"""What any softmax over L keys cannot do while its scores stay bounded.

Let |l_i| ≤ D, a = softmax(l / T), A_N the weight of the N largest, J = (diag a - a a^T)/T.

    weights       e^(-2D/T) / L  ≤  a_i  ≤  1 / (1 + (L-1) e^(-2D/T))
    selectivity   A_N / (N/L)    ≤  1 / (N/L + (1 - N/L) e^(-2D/T)), which falls to 1 as N grows
    uniformity    KL(a | uniform) ≤ D²/2T², and no set of keys has D/2T more than its share
    distance      E |Σ_{i>N} a_i x_i - Σ_{i≤N} a_i x_i|² = (1 - 2 A_N)² |m|² + v Σ a_i²
    gradient      |J_ij| ≤ 1/4T,  |J| ≤ (2/T) max a_i (1 - a_i) ≤ 1/2T, equal at a tie of two

Half the weight on N of L keys takes D/T ≥ ½ log(L/N - 1): scores have to grow like log L. The
chosen tokens' distance to the rest, of tokens with mean m and variance v, does not depend on N at
all if m = 0, and with a mean it vanishes where A_N is one half and rises again after.

Mudarisov et al. (2025) give the first bounds, with e^(2D/T)/L above, the distance and the
separability of the chosen as questions, and min(1/4T, √2) for the gradient: that holds for its
entries, while its norm at a tie is 1/2T, and √2 bounds differences of weights, not derivatives.
They report 70-85 % of chosen tokens separable; their criterion we have not seen. Under ours
(theory/normalization_geometry.py) the share falls through that range and does not stay there. The
statement is ours.
"""

import math
from collections import defaultdict
from functools import partial

import jax.numpy as jnp
import numpy as np

import attnlab
from attnlab.core.entry import Paper
from theory.conditioning import generator
from theory.normalization_geometry import draw_separations
from theory.shares import at_least, at_most, on_average
from theory.theorem import Cell, Evidence, Key, Theorem

REACH = 1.0  # D
TEMPERATURES = (2.0, 0.5, 0.1, 0.02)
WIDTH, MEAN = 16, 0.6  # of tokens; their variance is 1 - MEAN²
DRAWS = 400
ROUNDING = 10 * float(np.finfo(np.float32).eps)
COLUMNS = ("what", "L", "N", "T", "measured", "promised", "share")


def check(key: Key | None = None) -> Evidence:
    """Bounded scores, two-valued ones among them; distances; who is separable; gradients."""
    rng = generator(key)
    rows = [row for length in (8, 256) for T in (2.0, 0.5) for row in _bounded(rng, length, T)]
    rows += [row for length in (64, 1024) for row in _distances(rng, length)]
    rows += [_separable(rng, 64, n, spread) for spread in (0.0, 2.0) for n in (4, 16, 64, 256)]
    rows += [_separable(rng, 768, n, 0.0, 10) for n in (16, 64, 256)]
    rows += [row for T in TEMPERATURES for row in _gradients(rng, T)]
    return _evidence(rows, "separable: at widths 64 and 768, of 512 tokens")


def counter_check(key: Key | None = None) -> Evidence:
    """The gradient's norm promised what its entries keep; tokens that depend on their weights."""
    rng = generator(key)
    rows: list[tuple[Cell, ...]] = []
    for T in TEMPERATURES:
        norm, bound = _norm(np.array([0.5, 0.5]), T), min(1 / (4 * T), math.sqrt(2))
        rows.append(("norm at a tie", 2, 1, T, norm, bound, at_most(norm, bound)))
    rows += [row for row in _distances(rng, 64, alike=True) if row[0] == "distance"]
    return _evidence(rows, "distance: the chosen tokens are one and the same")


def weights(scores: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(l / T).

    Raises:
      ValueError: the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}.")
    p = np.exp((scores - scores.max()) / temperature)
    return p / p.sum()


def selectivity_bound(share: float, steep: float) -> float:
    """The most that a share N/L of the keys gets, over that share; `steep` is D/T."""
    return 1 / (share + (1 - share) * math.exp(-2 * steep))


def mean_square_distance(a: np.ndarray, chosen: int, mean: float, variance: float) -> float:
    """E |Σ_{i>N} a_i x_i - Σ_{i≤N} a_i x_i|² for the N first weights and tokens of length² `mean`².

    `variance` is E |x - m|².
    """
    return float((1 - 2 * a[:chosen].sum()) ** 2 * mean**2 + variance * (a**2).sum())


def gradient_bound(a: np.ndarray, temperature: float) -> float:
    """(2/T) max a_i (1 - a_i), on the norm of the softmax's Jacobian."""
    return 2 * float((a * _others(a)).max()) / temperature


def lead_bound(lead: float, length: int, temperature: float) -> float:
    """(2/T) min(1/4, (L-1) e^(-g/T)), where the best score leads by g."""
    return 2 / temperature * min(0.25, (length - 1) * math.exp(-lead / temperature))


def _bounded(rng: np.random.Generator, length: int, T: float) -> list[tuple[Cell, ...]]:
    """The worst of sixty draws within ±D, and the two-valued scores that reach the bounds."""
    chosen, steep = length // 4, REACH / T
    two_valued = [np.where(np.arange(length) < n, REACH, -REACH) for n in (1, chosen, length - 1)]
    drawn = [rng.uniform(-REACH, REACH, length) for _ in range(60)]
    a = np.stack([np.sort(weights(x, T))[::-1] for x in (*two_valued, *drawn)])
    top, low = 1 / (1 + (length - 1) * math.exp(-2 * steep)), math.exp(-2 * steep) / length
    share = chosen / length
    found = (
        ("largest weight", 1, a.max(), top),
        (
            "selectivity",
            chosen,
            a[:, :chosen].sum(1).max() / share,
            selectivity_bound(share, steep),
        ),
        ("KL to uniform", length, (a * np.log(a * length)).sum(1).max(), steep**2 / 2),
        ("above its share", length, np.abs(a - 1 / length).sum(1).max() / 2, steep / 2),
    )
    rows = [(what, length, n, T, float(m), b, at_most(m, b)) for what, n, m, b in found]
    rows.append(("smallest weight", length, 1, T, float(a.min()), low, at_least(a.min(), low)))
    error = float(np.abs(_of_attnlab(drawn[0], T) - weights(drawn[0], T)).max())
    return [*rows, ("attnlab's weights", length, 1, T, error, ROUNDING, at_most(error, ROUNDING))]


def _of_attnlab(scores: np.ndarray, T: float) -> np.ndarray:
    """Weights that attnlab's attention gives keys of one number, read off an identity."""
    query, keys, values = np.ones((1, 1, 1)), scores[:, None, None], np.eye(len(scores))[:, None]
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, keys, values))
    return np.asarray(attnlab.attention(*arrays, scale=1 / T), np.float64)[0, 0]


def _distances(
    rng: np.random.Generator, length: int, alike: bool = False
) -> list[tuple[Cell, ...]]:
    """Squared distances of chosen and other tokens, drawn and predicted, and the latter's cap."""
    T, variance, rows = 0.5, 1 - MEAN**2, []
    a = weights(np.sort(rng.uniform(-REACH, REACH, length))[::-1], T)
    tokens = rng.normal(size=(DRAWS, length, WIDTH)) * math.sqrt(variance / WIDTH)
    tokens[..., 0] += MEAN
    for chosen in (max(1, length // 50), length // 10, length // 2, 9 * length // 10):
        signed = np.where(np.arange(length) < chosen, -a, a)
        x = tokens.copy() if alike else tokens
        if alike:
            x[:, :chosen] = x[:, :1]
        square = (np.einsum("l,bld->bd", signed, x) ** 2).sum(1)
        exact, mean = mean_square_distance(a, chosen, MEAN, variance), float(square.mean())
        error = float(square.std(ddof=1)) / math.sqrt(DRAWS)
        rows.append(("distance", length, chosen, T, mean, exact, on_average(mean, exact, error)))
    spread, cap = variance * float((a**2).sum()), variance * math.exp(2 * REACH / T) / length
    return [*rows, ("its least", length, length, T, spread, cap, at_most(spread, cap))]


def _separable(
    rng: np.random.Generator, width: int, chosen: int, spread: float, draws: int = 40
) -> tuple[Cell, ...]:
    """The share of the chosen that is separable; T is 1 and scores have a spread."""
    found = draw_separations(rng, width, 512, chosen, spread, draws)
    share, odds = (np.array([getattr(x, name) for x in found]) for name in ("share", "predicted"))
    mean, exact = float(share.mean()), float(odds.mean())
    # Independent tokens would vary so much; where all of them agree the sample says nothing.
    least = math.sqrt(max(exact * (1 - exact), 1e-6) / (draws * chosen))
    error = max(float((share - odds).std(ddof=1)) / math.sqrt(draws), least)
    counted = max(x.counted for x in found) if spread == 0 else 0.0
    kept = max(on_average(mean, exact, error), counted)
    return (f"separable, σ = {spread:g}", 512, chosen, 1.0, mean, exact, kept)


def _gradients(rng: np.random.Generator, T: float) -> list[tuple[Cell, ...]]:
    """The worst of sixty draws, a third with a tie, at four lengths."""
    cases: defaultdict[str, list[tuple[Cell, ...]]] = defaultdict(list)
    for length in (2, 3, 8, 64):
        for draw in range(15):
            scores = np.sort(rng.normal(size=length) * rng.choice([0.1, 1, 3]))[::-1]
            scores[1] = scores[0] if draw % 3 == 0 else scores[1]
            a = weights(scores, T)
            norm, steep = _norm(a, T), gradient_bound(a, T)
            entry = float((a * _others(a)).max()) / T
            lead = lead_bound(scores[0] - scores[1], length, T)
            cases["entry"].append((length, 1, T, entry, 1 / (4 * T), at_most(entry * 4 * T, 1)))
            cases["norm"].append((length, 1, T, norm, steep, at_most(norm, steep)))
            cases["floor"].append((length, 1, T, norm, steep / 2, at_least(norm, steep / 2)))
            cases["ceiling"].append((length, 1, T, steep, 1 / (2 * T), at_most(steep * 2 * T, 1)))
            cases["lead"].append((length, 1, T, norm, lead, at_most(norm, lead)))
    return [(f"gradient: {k}", *max(v, key=lambda x: x[-1])) for k, v in cases.items()]


def _norm(a: np.ndarray, T: float) -> float:
    """The 2-norm of (diag a - a a^T) / T, whose diagonal is a_i (1 - a_i)."""
    jacobian = -np.outer(a, a)
    jacobian[np.diag_indices(len(a))] = a * _others(a)
    return float(np.abs(np.linalg.eigvalsh(jacobian)).max()) / T


def _others(a: np.ndarray) -> np.ndarray:
    """1 - a_i as a sum: where one weight is nearly 1, the subtraction would leave nothing."""
    rest, top = 1 - a, int(a.argmax())
    rest[top] = a[:top].sum() + a[top + 1 :].sum()
    return rest


_evidence = partial(Evidence.of_ratios, "what is measured, as a share of its bound", COLUMNS)


THEOREM = Theorem(
    id="normalization-limits",
    title="what bounded scores cannot do",
    statement=(
        r"Let $|l_i| \le D$ for $L$ scores, $a = \mathrm{softmax}(l/T)$, $A_N$ the weight of the "
        r"$N$ largest and $J = (\mathrm{diag}\, a - a a^\top)/T$. (a) $e^{-2D/T}/L \le a_i \le 1/(1"
        r" + (L-1) e^{-2D/T}) \le e^{2D/T}/L$. (b) $A_N / (N/L) \le 1/(N/L + (1 - N/L) e^{-2D/T})$;"
        r" half the weight on $N$ keys takes $D/T \ge \frac12 \ln(L/N - 1)$; $KL(a \| u) \le "
        r"D^2/2T^2$ for the uniform $u$, and $|a(S) - |S|/L| \le D/2T$ for every set $S$. (c) For "
        r"tokens $x_i$ with mean $m$ and variance $v$, independent of each other and of $a$, the "
        r"chosen differ from the rest by $E \lVert \sum_{i > N} a_i x_i - \sum_{i \le N} a_i x_i "
        r"\rVert^2 = (1 - 2 A_N)^2 \lVert m \rVert^2 + v \sum_i a_i^2$. (d) With $s = \sum_{i \le "
        r"N} a_i x_i$ and the other $x_j$ uniform on the sphere, token $i$ is nearer to $s$ than "
        r"every other, each scaled by its weight, with probability $\prod_{j > N} F_d((a_j^2 + 2 "
        r"a_i \langle x_i, s \rangle - a_i^2) / (2 a_j \lVert s \rVert))$, $F_d(c)$ the share of "
        r"the sphere below height $c$; for equal weights at most $\lambda_{\max}(\sum_{i \le N} x_i"
        r" x_i^\top)/\tau^2$ tokens are, $\tau > 0$ the greatest height of another. (e) $|J_{ij}| "
        r"\le 1/4T$ and $\max_i a_i(1-a_i)/T \le \lVert J \rVert_2 \le (2/T) \max_i a_i (1 - a_i) "
        r"\le 1/2T$, all equal at a tie of two, and $\lVert J \rVert_2 \le (2/T) (L-1) e^{-g/T}$ if"
        r" the best score leads by $g$."
    ),
    assumptions=(
        r"scores within $\pm D$, for (a) and (b)",
        "tokens independent of each other and of the weights, for (c) and (d)",
        r"the norm of the gradient is promised $1/2T$, its entries $1/4T$",
    ),
    source=Paper(
        "Limitations of Normalization in Attention Mechanism",
        "Mudarisov et al.",
        2025,
        "2508.17821",
        "NeurIPS 2025",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"(a) and the first of (b) are monotone in every score. With $\psi(s) = \log \frac1L \sum_i"
        r" e^{s l_i}$, $KL = \int_0^{1/T} s \psi''(s)\, ds$ and $\psi'' \le D^2$, a variance; then "
        r"Pinsker. (c) Signs square away, and what is left of the cross terms is the mean's. (d) "
        r"Squares expanded, the event is that $\langle x_j, s / \lVert s \rVert \rangle$ lies below"
        r" the height given; for the count, $N_{sep} \tau^2 \le \sum_i \langle x_i, s/\lVert s "
        r"\rVert \rangle^2$. (e) $|J_{ij}| = a_i |\delta_{ij} - a_j| / T$; rows sum to $2 a_i (1 - "
        r"a_i)/T$ in absolute value (Gershgorin), the norm is no less than an entry of the "
        r"diagonal, and $1 - a_1 \le (L-1) e^{-g/T}$."
    ),
)
