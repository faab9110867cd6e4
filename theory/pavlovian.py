r"""Attention as Pavlovian conditioning, and how many associations a head can hold.

Keys are conditional stimuli (CS), values unconditional stimuli (US), queries test stimuli. Hebb's
rule S = Σ_j k_j v_j^T stores the pairs, o = S^T q reads them: attention without its softmax. A head
that has stored m pairs and is asked with the key of pair i answers

    o  =  v_i  +  Σ_{j≠i} (k_i·k_j) v_j        what it should, and crosstalk

How much crosstalk is too much depends on what counts as an error. For keys in independent uniform
directions of width d it is

* on average of power (m-1)/d, a signal-to-noise ratio of √(d/(m-1)): O(d) associations;
* against outcomes chosen for the worst of length Σ|k_i·k_j|, on average (m-1) √(2/πd): retrieval
  free of errors whatever the outcomes takes m = O(√d);
* and one of C orthogonal outcomes, each stored equally often, is named rightly with a probability
  that depends on m/(Cd) alone: the load at which it falls below 95 % grows in proportion to d.

Qiao's first version states O(√d_k) associations, the second O(√d_k) for retrieval without errors
and O(d_k) on average; constants and proofs here are ours.
"""

import numpy as np

from attnlab.core.entry import Paper
from theory.conditioning import generator, respond, unit_keys
from theory.pavlovian_curves import OUTCOMES, WIDTHS, Curves, capacities, capacity, curves
from theory.theorem import Cell, Evidence, Key, Theorem, worst

SIGMAS = 5.0  # standard errors that a measured mean may stray
NORMALITY = 0.015  # sums of few overlaps are not quite normal: how far recall may stray for it
ROUNDING = 64 * float(np.finfo(np.float32).eps)  # of a response, as a share of the largest
COLUMNS = ("width", "pairs", "SNR", "√(d/(m-1))", "worst", "its mean", "recall", "normal", "share")


def check(key: Key | None = None) -> Evidence:
    """Five widths, four loads: crosstalk, worst crosstalk and recall against their closed forms."""
    found, mapped = curves(key), mapping_error(key)
    told = ", ".join(f"{m:.0f} ({capacity(d):.0f})" for m, d in _below(found))
    return _evidence(
        _rows(found),
        f"95 % recall of {OUTCOMES} outcomes up to m = {told} pairs, predicted in brackets; the "
        f"memory is attention without softmax to {mapped * ROUNDING:.1g}",
        mapped,
    )


def counter_check(key: Key | None = None) -> Evidence:
    """Stimuli that resemble each other: the keys share a direction, any two overlap by 0.16.

    Recall survives it: what all stimuli have in common speaks for all outcomes alike.
    """
    return _evidence(_rows(curves(key, correlation=0.4)), "keys overlap by 0.16 on average")


def attention_without_softmax(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """o_i = Σ_{j≤i} (q_i·k_j) v_j over "T H", "T H", "T D", in float64."""
    return np.tril(query @ key.T) @ value


def mapping_error(key: Key | None = None) -> float:
    """How far tests, CS and US are from queries, keys and values, as a share of rounding."""
    rng = generator(key)
    tests, stimuli = unit_keys(rng, 2, 96, WIDTHS[0])
    outcomes = rng.normal(size=(96, OUTCOMES))
    told = respond(tests[:, None], stimuli[:, None], outcomes[:, None])[:, 0]
    exact = attention_without_softmax(tests, stimuli, outcomes)
    return float(np.abs(told - exact).max() / np.abs(exact).max() / ROUNDING)


def _below(found: Curves) -> list[tuple[float, int]]:
    return list(zip(capacities(found).tolist(), WIDTHS, strict=True))


def _rows(found: Curves) -> list[tuple[Cell, ...]]:
    grain = np.array([0.0, 0.0, NORMALITY])[:, None, None] + SIGMAS * found.error
    shares = (np.abs(found.measured - found.predicted) / grain).max(0)
    rows: list[tuple[Cell, ...]] = []
    for at in np.ndindex(*found.pairs.shape):
        measured, said = found.measured[:, *at], found.predicted[:, *at]
        pairs = zip([measured[0] ** -0.5, *measured[1:]], [said[0] ** -0.5, *said[1:]], strict=True)
        cells = [float(x) for pair in pairs for x in pair]
        rows.append((WIDTHS[at[0]], int(found.pairs[at]), *cells, float(shares[at])))
    return rows


def _evidence(rows: list[tuple[Cell, ...]], note: str, mapped: float = 0.0) -> Evidence:
    return Evidence(
        quantity="distance from the closed forms, as a share of what chance and rounding allow",
        measured=float(np.maximum(worst(rows), mapped)),
        bound=1.0,
        columns=COLUMNS,
        rows=tuple(rows),
        note=note,
    )


THEOREM = Theorem(
    id="pavlovian",
    title="what a conditioned head can hold",
    statement=(
        r"Let $S = \sum_{j \le m} k_j v_j^\top$ and $o = S^\top k_i$, so that the crosstalk is $o "
        r"- v_i = \sum_{j \ne i} (k_i \cdot k_j) v_j$. For outcomes of unit length it has mean "
        r"power $(m-1)/d_k$: a signal-to-noise ratio of $\sqrt{d_k/(m-1)}$. Outcomes chosen "
        r"against $k_i$ give it the mean length $(m-1)\,\Gamma(d_k/2) / "
        r"(\sqrt\pi\,\Gamma((d_k{+}1)/2)) \approx (m-1)\sqrt{2/\pi d_k}$, which no outcomes "
        r"exceed. So $O(d_k)$ associations are held on average and $O(\sqrt{d_k})$ whatever the "
        r"outcomes. With $C$ orthogonal outcomes, $n = m/C$ pairs each, the strongest is the right"
        r" one with probability $P(Z_0 > \max_{c<C} Z_c)$ for independent, in the limit of large "
        r"$n$ normal $Z_0$ of mean $1$ and variance $(n-1)/d_k$ and $Z_c$ of mean $0$ and variance"
        r" $n/d_k$: the load at which it falls below $95\%$ grows in proportion to $d_k$."
    ),
    assumptions=(
        "the stimuli are independent and uniform on the unit sphere",
        "the test stimulus is one of those stored, unchanged",
        "Hebb's rule: no decay, no correction of errors, no softmax",
        "for recall: every outcome is stored equally often",
    ),
    source=Paper(
        "Understanding Transformers through the Lens of Pavlovian Conditioning",
        "Qiao",
        2025,
        "2508.08289",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"Given $k_i$, the overlaps $k_i \cdot k_j$ are independent and symmetric with variance "
        r"$1/d_k$, so mixed terms of the squared sum vanish and each of the $m-1$ others leaves "
        r"$\lVert v_j \rVert^2/d_k$. By the triangle inequality the sum is never longer than "
        r"$\sum_{j \ne i} |k_i \cdot k_j|$, which outcomes $\pm u$ attain, and $E|k_i \cdot k_j|$ "
        r"is the mean of $|x_1|$ on the sphere. For recall, the score of outcome $c$ sums the "
        r"overlaps of its own pairs: different outcomes share none, hence independence given "
        r"$k_i$; its law depends on $n/d_k$ up to the lone $-1$."
    ),
)
