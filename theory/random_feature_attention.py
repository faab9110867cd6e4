r"""How many samples a layer of attention with random, frozen heads needs, and what their mean buys.

Tokens are iid N(0, I_d); only values are learnt (theory/random_feature_models.py). What is missed
is a share of the target's variance.

    linear heads     (d+1)² of them and n ≥ p = (d+1)² (d+2)/2 samples recover every average of
                     (x̃_0^T C x̃_i)(u^T x̃_i) exactly: p does not depend on the number of keys N
    a network        of two layers with random weights on all (N+1) d numbers misses, of a harmonic
                     of degree l, a share 1 - min(n, M) / N((N+1) d, l) or more
    centred heads    of any activation miss of (1/N) Σ <x_0, x_i><u, x_i> a share Σ_{k>n} λ_k/Σ λ_k,
                     λ being d times N + 2 and d (d-1) times 1: some d² samples are needed
    biased heads     drawn around c times the identity miss it by |u| P_n(x) / c, P_n the kernel's
                     power function: d + 1 samples leave O(1/c)

Fu, Guo, Bai & Mei (2023) introduce the model, bound its risk from above, and find that it needs
fewer samples than a network and that a mean helps for some targets. Statement and proofs here are
ours; upper bounds are for linear heads (a ReLU head and its mirror image, with values v and -v, are
one), while ReLU heads are measured against the lower bound only. M = (d+1)(d+2)/2 heads seem to do
in place of (d+1)²: this is seen, not proved.
"""

import math
from functools import partial

import numpy as np

from attnlab.core.entry import Paper
from theory import random_feature_models as models
from theory.conditioning import generator, recall
from theory.shares import SIGMAS, at_least, at_most
from theory.theorem import Cell, Evidence, Key, Theorem
from theory.zonal import harmonics

WIDTH = 6
KEYS = (2, 8)
UNKNOWNS = (WIDTH + 1) ** 2 * (WIDTH + 2) // 2  # p
SAMPLES, TESTS = 224, 400
EXACT = 1e-18  # a mean square, relative: nine digits of a fit to 196 unknowns
ROUNDING = 2e-6  # float32, relative to the largest feature
COLUMNS = ("what", "N", "samples", "heads", "measured", "promised", "share")


def check(key: Key | None = None) -> Evidence:
    """Every promise at two and at eight keys: recovery, two floors, and the power function."""
    rng = generator(key)
    rows: list[tuple[Cell, ...]] = []
    for keys in KEYS:
        data = _inputs(rng, keys)
        rows += [_recovered(rng, data, (WIDTH + 1) ** 2), _of_attnlab(rng, data)]
        rows += [_network(rng, data, n, 0) for n in (32, 128)]
        rows.append(_network(rng, data, SAMPLES, 64))
        rows += [_centred(data, n, name) for n in (8, 16) for name in ("linear", "relu")]
        rows += [_biased(data, n, c) for n in (8, 32) for c in (6.0, 30.0)]
    return _evidence(rows, f"shares of variance; floors have {SIGMAS:g} errors of 400 test points")


def counter_check(key: Key | None = None) -> Evidence:
    """Biased heads, of which the centred ones' floor is asked; and too few heads to recover."""
    rng = generator(key)
    data = _inputs(rng, 2)
    return _evidence(
        [_centred(data, 8, "linear", bias=6.0), _recovered(rng, data, 20)],
        "a mean of the heads beats what no centred ones can do; 140 features for 196 unknowns",
    )


def network_floor(keys: int, samples: int, degree: int = 2) -> float:
    """1 - n / N((N+1) d, l), n the samples or the hidden units if there are fewer.

    Raises:
      ValueError: there are no samples, or no keys.
    """
    if samples < 1 or keys < 1:
        raise ValueError(f"samples, keys: expected positive ints, got {samples}, {keys}.")
    return max(0.0, 1 - samples / harmonics((keys + 1) * WIDTH, degree))


def centred_floor(keys: int, samples: int) -> float:
    """Σ_{k>n} λ_k / Σ λ_k, λ = N+2 (d times) and 1 (d (d-1) times)."""
    large = np.concatenate([np.full(WIDTH, keys + 2.0), np.ones(WIDTH * (WIDTH - 1))])
    return float(large[samples:].sum() / large.sum())


def _inputs(rng: np.random.Generator, keys: int) -> np.ndarray:
    """Training inputs, and after them those of the test."""
    return rng.normal(size=(SAMPLES + TESTS, keys + 1, WIDTH))


def _recovered(rng: np.random.Generator, data: np.ndarray, heads: int) -> tuple[Cell, ...]:
    """A fit on the features of so many heads, of a target drawn from those they may express."""
    weights = rng.normal(size=(heads, WIDTH + 1, WIDTH + 1))
    features, tokens = models.head_features(data, weights), models.extended(data)
    C, u = rng.normal(size=(WIDTH + 1, WIDTH + 1)), rng.normal(size=WIDTH + 1)
    asked = np.einsum("na,ab,nib->ni", tokens[:, 0], C, tokens[:, 1:])
    target = (asked * (tokens[:, 1:] @ u)).mean(1)
    values = np.linalg.lstsq(features[:SAMPLES], target[:SAMPLES], rcond=1e-11)[0]
    missed = (features[SAMPLES:] @ values - target[SAMPLES:]) ** 2
    share = float(missed.mean() / (target[SAMPLES:] ** 2).mean())
    return ("linear heads", _keys(data), SAMPLES, heads, share, EXACT, at_most(share, EXACT))


def _of_attnlab(rng: np.random.Generator, data: np.ndarray, heads: int = 5) -> tuple[Cell, ...]:
    """Linear heads are attnlab's recurrence without a normaliser, each token key and value."""
    weights, few = rng.normal(size=(heads, WIDTH + 1, WIDTH + 1)), data[:32]
    tokens, exact = models.extended(few), models.head_features(few, weights)
    asked = np.einsum("na,mab->nmb", tokens[:, 0], weights)
    told = recall(tokens[:, 1:], tokens[:, 1:], asked).reshape(exact.shape) / _keys(data)
    error, allowed = float(np.abs(told - exact).max()), ROUNDING * float(np.abs(exact).max())
    return ("attnlab's heads", _keys(data), 32, heads, error, allowed, at_most(error, allowed))


def _network(rng: np.random.Generator, data: np.ndarray, n: int, hidden: int) -> tuple[Cell, ...]:
    """A random network, infinite or of M hidden units, on a harmonic of degree two."""
    along, other = np.eye(WIDTH)[:2]
    target, test = models.products(data, along, other), data[SAMPLES:]
    if hidden:
        units = rng.normal(size=(hidden, data[0].size + 1))
        a, b = models.network_features(data[:n], units), models.network_features(test, units)
        kernel, cross = a @ a.T, b @ a.T
    else:
        kernel = models.network_kernel(data[:n], data[:n])
        cross = models.network_kernel(test, data[:n])
    told = models.ridge(kernel, cross, target[:n])
    floor = network_floor(_keys(data), min(n, hidden or n))
    row = _floored(told - target[SAMPLES:], 1 / _keys(data), floor)
    return (f"network, M = {hidden}" if hidden else "network", _keys(data), n, hidden, *row)


def _centred(data: np.ndarray, n: int, name: str, bias: float = 0.0) -> tuple[Cell, ...]:
    """Infinitely many heads on the correlations of the query with its keys."""
    target, test = models.correlations(data, np.eye(WIDTH)[0]), data[SAMPLES:]
    if name == "relu":
        kernel, cross = models.relu_kernel(data[:n], data[:n]), models.relu_kernel(test, data[:n])
    else:
        a, b = (models.linear_features(x, bias) for x in (data[:n], test))
        kernel, cross = a @ a.T, b @ a.T
    told = models.ridge(kernel, cross, target[:n])
    variance = (WIDTH + _keys(data) + 1) / _keys(data)
    row = _floored(told - target[SAMPLES:], variance, centred_floor(_keys(data), n))
    return (f"{name}, c = {bias:g}", _keys(data), n, 0, *row)


def _floored(missed: np.ndarray, variance: float, floor: float) -> tuple[float, float, float]:
    """A share of variance, its floor, and the floor's share of it and its errors."""
    square = missed**2 / variance
    share, error = float(square.mean()), float(square.std(ddof=1)) / math.sqrt(len(square))
    return share, floor, at_least(share + SIGMAS * error, floor)


def _biased(data: np.ndarray, n: int, bias: float) -> tuple[Cell, ...]:
    """Linear heads around c times the identity; the share is the worst of all test points."""
    target, a = models.correlations(data, np.eye(WIDTH)[0]), models.linear_features(data, bias)
    kernel, cross = a[:n] @ a[:n].T, a[SAMPLES:] @ a[:n].T
    told = models.ridge(kernel, cross, target[:n])
    reach = models.power(kernel, cross, (a[SAMPLES:] ** 2).sum(1)) / bias
    missed, variance = np.abs(told - target[SAMPLES:]), (WIDTH + _keys(data) + 1) / _keys(data)
    shares = [float((x**2).mean() / variance) for x in (missed, reach)]
    worst = float((missed / (reach * (1 + 1e-6))).max())
    return (f"linear, c = {bias:g}", _keys(data), n, 0, *shares, worst)


def _keys(data: np.ndarray) -> int:
    return data.shape[1] - 1


_evidence = partial(
    Evidence.of_ratios, "measured to an upper bound, or a lower bound to measured", COLUMNS
)


THEOREM = Theorem(
    id="random-feature-attention",
    title="samples that random heads need",
    statement=(
        r"Let $f(x_0; x_1, \dots, x_N) = \frac1N \sum_{i,m} \sigma(\langle W_m, \tilde x_0 \tilde "
        r"x_i^\top \rangle) \langle v_m, \tilde x_i \rangle$, $\tilde x = [x; 1]$, with $W_m$ "
        r"Gaussian and only $v_m$ learnt, by least squares with the least norm or ridge on $n$ "
        r"samples without noise; tokens are iid $N(0, I_d)$. (a) If $\sigma(z) = z$, $M \ge "
        r"(d+1)^2$ heads and $n \ge (d+1)^2 (d+2)/2$ samples recover every $\frac1N \sum_i (\tilde "
        r"x_0^\top C \tilde x_i)(u^\top \tilde x_i)$, whatever $N$. (b) A two-layer network with $M"
        r"$ random isotropic units on all $D = (N+1) d$ numbers misses at least a share $1 - "
        r"\min(n, M) / N(D, l)$ of the variance of a harmonic of degree $l$; $\frac1N \sum_i "
        r"\langle b, x_i \rangle \langle u, x_i \rangle$ with $b \perp u$ is one, $N(D, 2) = (D+2)("
        r"D-1)/2$. (c) For any $\sigma$ and $M$, heads centred at $0$ miss of $\frac1N \sum_i "
        r"\langle x_0, x_i \rangle \langle u, x_i \rangle$ a share $\sum_{k > n} \lambda_k / "
        r"\sum_k \lambda_k$ on average, where $\lambda$ is $N + 2$ ($d$ times) and $1$ ($d(d-1)$ "
        r"times). (d) If $\sigma(z) = z$ and heads are centred at $c\, \mathrm{diag}(I_d, 0)$, it "
        r"is missed by at most $\frac{\lVert u \rVert}{c} P_n(x)$, $P_n(x)^2 = K(x,x) - K(x,X) "
        r"K(X,X)^{-1} K(X,x)$, as $M \to \infty$."
    ),
    assumptions=(
        r"$M \ge (d+1)^2$ heads, for (a)",
        r"heads are centred at $0$, for (c)",
        "tokens are Gaussian and isotropic, and targets have no noise",
    ),
    source=Paper(
        "What can a Single Attention Layer Learn? A Study Through the Random Features Lens",
        "Fu et al.",
        2023,
        "2307.11353",
        "NeurIPS 2023",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"(a) Where the $W_m$ span all matrices, the features span the forms $\tilde x_0 \otimes "
        r"\mathrm{Sym}^2 \tilde x_i$, of which there are $(d+1) \binom{d+2}{2}$, and as many "
        r"generic samples determine one. (b) Data and units are invariant under $O(D)$, so that the"
        r" error on $f$ is the mean over rotations $U$ of that on $f \circ U$; the fit lies in a "
        r"space of $\min(n, M)$ dimensions that does not see $U$, and the $f \circ U$ fill the "
        r"$N(D, l)$ dimensions of degree $l$ evenly. (c) The same with $O(d)$ turning $x_0$, of "
        r"which centred heads cannot tell: the $f \circ U$ have the second moment $\frac1d I "
        r"\otimes B$, $B = \frac1N (I + (N+1) u u^\top)$, of which $n$ dimensions are removed at "
        r"best. (d) $E \langle W, \tilde x_0 \tilde x_i^\top \rangle u / c = \langle x_0, x_i "
        r"\rangle u$, so the target's norm in the kernel's space is at most $\lVert u \rVert / c$."
    ),
)
