r"""The state it takes for linear attention to pass for softmax.

Softmax attention is linear attention too, with the features of the exponential: all monomials of
the key, infinitely many. Cut at degree p they are n = C(H+p, p) numbers, a state of n (D+1), and

    Σ_{l≤p} s^l / l!  =  e^s (1 + ε),     |ε| ≤ e^R R^(p+1) / (p+1)! = ρ_p      for |s| ≤ R

so that the output, Σ_j w_j (1+ε_j) v_j / Σ_j w_j (1+ε_j), is off by no more than

    |out_p - out|  ≤  ρ_p / (1 - ρ_p) · max_j |v_j - out|        once ρ_p < 1

Since ρ_p < e^(R-p-1) from p + 1 = e²R on, the order need not grow faster than log 1/E for an error
E, and the state is C(H+p, p): polynomial in the head's width, with the order as its degree. No n
suffices for all lengths, for e^(q·k) between distinct tokens has full rank. Infinite features and
their truncation are in Sieber et al. (2024), who measure how linear attention nears softmax as n
grows; the constants here are ours.
"""

import math
from functools import partial

import jax.numpy as jnp
import numpy as np

import attnlab
from attnlab.core.entry import Paper
from theory.conditioning import generator
from theory.dsf import recurrence
from theory.dsf_forms import linear_attention, scan, taylor_features
from theory.theorem import Cell, Evidence, Key, Theorem

STEPS, WIDTH, VALUES = 48, 4, 3
ORDERS = tuple(range(9))
RADIUS = 1.5  # no score is larger, either way
ERRORS = (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
ROUNDING = 1e-5  # what float32 may add to an output of order one, after a sum of 495 features
COLUMNS = ("order", "state", "system's error", "attnlab's error", "bound", "share")


def check(key: Key | None = None) -> Evidence:
    """Orders 0 to 8: the truncated system, and attnlab's recurrence on its features, to softmax."""
    rows = curve(key)
    needed = ", ".join(f"{e:g}: {m} ({b})" for e, m, b in state_needed(rows))
    return _evidence(
        rows, f"features needed for an error, and in brackets those that the bound asks: {needed}"
    )


def counter_check(key: Key | None = None) -> Evidence:
    """Longer keys: the scores reach 4 R, and the bound for R is promised all the same."""
    return _evidence(curve(key, stretch=4.0), f"scores up to {4 * RADIUS:g}, bound for {RADIUS:g}")


def relative_error(order: int, radius: float = RADIUS) -> float:
    """ρ_p = e^R R^(p+1) / (p+1)!: how far the truncated series is from e^s, as a share of it."""
    return math.exp(radius + (order + 1) * math.log(radius) - math.lgamma(order + 2))


def output_bound(order: int, reach: float, radius: float = RADIUS) -> float:
    """ρ/(1-ρ) times the farthest value's distance from the output; infinite where ρ ≥ 1."""
    rho = relative_error(order, radius)
    return rho / (1 - rho) * reach if rho < 1 else math.inf


def state_size(order: int, width: int = WIDTH) -> int:
    """The number of features, C(H+p, p)."""
    return math.comb(width + order, order)


def curve(key: Key | None = None, stretch: float = 1.0) -> list[tuple[Cell, ...]]:
    """Errors over ORDERS beside their bounds, with the columns COLUMNS."""
    query, keys, values = _tokens(generator(key), stretch)
    exact = _softmax(query, keys, values)
    reach = _reach(values, exact)
    rows: list[tuple[Cell, ...]] = []
    for order in ORDERS:
        q, k = (taylor_features(x, order) for x in (query, keys))
        system = scan(linear_attention(q, k, VALUES), values)
        told = recurrence(_padded(q), _padded(k), np.concatenate([values, np.ones((STEPS, 1))], 1))
        errors = [_distance(out, exact) for out in (system, told[:, :-1] / told[:, -1:])]
        bound = output_bound(order, reach)
        rows.append((order, q.shape[1], *errors, bound, max(errors) / (bound + ROUNDING)))
    return rows


def state_needed(rows: list[tuple[Cell, ...]]) -> list[tuple[float, int, int]]:
    """For each of ERRORS the smallest state measured to reach it, and the one the bound asks for.

    `rows` is a table of `curve` whose last order reaches the smallest error.
    """
    table = np.array(rows, np.float64)
    known = table[np.isfinite(table[:, 4])][0]
    reach = known[4] / output_bound(int(known[0]), 1.0)
    found = []
    for error in ERRORS:
        measured = int(table[np.argmax(table[:, 2] <= error), 1])
        order = next(p for p in range(200) if output_bound(p, reach) <= error)
        found.append((error, measured, state_size(order)))
    return found


def _reach(values: np.ndarray, outputs: np.ndarray) -> float:
    """The farthest that a value a query may see lies from that query's output."""
    seen = (np.linalg.norm(values[: i + 1] - out, axis=1).max() for i, out in enumerate(outputs))
    return float(max(seen))


def _tokens(rng: np.random.Generator, stretch: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries and keys with |q·k| ≤ R `stretch`, and values."""
    query, keys = rng.normal(size=(2, STEPS, WIDTH))
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    keys *= stretch * RADIUS / np.linalg.norm(keys, axis=1, keepdims=True)
    return query, keys, rng.normal(size=(STEPS, VALUES))


def _softmax(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal attention of attnlab with the scale 1."""
    ready = (jnp.asarray(x[:, None], jnp.float32) for x in (query, keys, values))
    out = attnlab.attention(*ready, mask=attnlab.masks.Causal(), scale=1.0)
    return np.asarray(out, np.float64)[:, 0]


def _padded(features: np.ndarray) -> np.ndarray:
    """Zeros up to the largest state, which change nothing: one program serves all orders."""
    return np.pad(features, ((0, 0), (0, state_size(ORDERS[-1]) - features.shape[1])))


def _distance(out: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(out - exact, axis=1).max())


_evidence = partial(
    Evidence.of_ratios, "largest error of an output as a share of its bound", COLUMNS
)


THEOREM = Theorem(
    id="dsf-softmax",
    title="the state that softmax takes",
    statement=(
        r"Let $|q_i \cdot k_j| \le R$ and let $\psi$ be the monomials $x^\alpha/\sqrt{\alpha!}$ of"
        r" degree at most $p$ in $H$ variables, $\binom{H+p}{p}$ of them. With $\rho = e^R R^{p+1}"
        r" / (p+1)! < 1$, linear attention with features $\psi$ and its own normaliser is within "
        r"$\frac{\rho}{1-\rho} \max_j \lVert v_j - o_i \rVert$ of softmax attention's output "
        r"$o_i$, whatever the length. A state of $\binom{H+p}{p}(D+1)$ numbers therefore does, and"
        r" $p$ need not grow faster than the logarithm of the error."
    ),
    assumptions=(
        r"no score exceeds $R$, either way",
        r"the order is high enough for the scores: $\rho < 1$",
        "sums are exact up to float32 rounding",
    ),
    source=Paper(
        "Understanding the differences in Foundation Models: Attention, State Space Models, and "
        "Recurrent Neural Networks",
        "Sieber et al.",
        2024,
        "2405.15731",
        "NeurIPS 2024",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"By the multinomial theorem $\psi(q) \cdot \psi(k)$ is the series of $e^{q \cdot k}$ up "
        r"to degree $p$. Taylor's remainder is at most $\max(1, e^s) |s|^{p+1}/(p+1)!$, which is "
        r"$\rho e^s$ at most for $|s| \le R$. With weights $w_j$ and relative errors "
        r"$\varepsilon_j$ the outputs differ by $\sum_j w_j \varepsilon_j (v_j - o) / (1 + \sum_j "
        r"w_j \varepsilon_j)$, because $\sum_j w_j (v_j - o) = 0$."
    ),
)
