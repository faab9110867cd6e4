r"""How well a Hebbian memory answers, measured and predicted, over widths and loads.

A memory of key width d that has stored m random pairs, asked with a stored key, is measured by the
mean power of its crosstalk, by the crosstalk's length against outcomes chosen for the worst, and by
how often the right one of C orthogonal outcomes is the strongest. `curves` returns the three as
arrays to plot, each beside its closed form; `capacities` where recall falls below 95 %.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from theory.conditioning import correlated_keys, generator, respond, standard_error, unit_keys
from theory.theorem import Key

WIDTHS = (16, 32, 64, 128, 256)
OUTCOMES = 8  # orthogonal unconditional stimuli
LOADS = (0.5, 1.0, 1.5, 2.0)  # pairs per width at which a memory is read
TARGET = 0.95
QUANTITIES = ("crosstalk power", "worst crosstalk", "recall")

Number = int | float
Read = tuple[int, np.ndarray, np.ndarray]  # pairs stored, responses, names of the right outcomes


class Curves(NamedTuple):
    """Axes: quantity (as in QUANTITIES), width, load."""

    pairs: Float[np.ndarray, "W L"]
    measured: Float[np.ndarray, "3 W L"]
    predicted: Float[np.ndarray, "3 W L"]
    error: Float[np.ndarray, "3 W L"]  # standard errors of what was measured


def crosstalk_power(pairs: Number, width: Number) -> float:
    """E |Σ_{j≠i} (k_i·k_j) v_j|² = (m-1)/d, exactly; the SNR is its root's reciprocal."""
    return (pairs - 1) / width


def worst_crosstalk(pairs: Number, width: Number) -> float:
    """E Σ_{j≠i} |k_i·k_j| = (m-1) Γ(d/2) / (√π Γ((d+1)/2)), near (m-1) √(2/πd)."""
    log_overlap = math.lgamma(width / 2) - math.lgamma((width + 1) / 2) - math.log(math.pi) / 2
    return (pairs - 1) * math.exp(log_overlap)


def recall_rate(pairs: Number, width: Number, outcomes: int = OUTCOMES) -> float:
    """P(one N(1, (n-1)/d) exceeds C - 1 of N(0, n/d)) with n = m/C pairs to an outcome."""
    each = pairs / outcomes
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    right = 1 + nodes * math.sqrt(max(each - 1, 0.0) / width)
    wins = special.ndtr(right / math.sqrt(each / width)) ** (outcomes - 1)
    return float(weights @ wins / weights.sum())


def capacity(width: Number, outcomes: int = OUTCOMES, target: float = TARGET) -> float:
    """The load at which predicted recall falls through `target`, by bisection."""
    low, high = float(outcomes), 64.0 * outcomes * width
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        enough = recall_rate(middle, width, outcomes) >= target
        low, high = (middle, high) if enough else (low, middle)
    return low


def curves(
    key: Key | None = None, widths: tuple[int, ...] = WIDTHS, correlation: float = 0.0
) -> Curves:
    """Fill memories of each width, reading at every load; `correlation` is the keys' common part.

    Returns arrays over `widths` and LOADS. Trials are independent memories, 32 or more.
    """
    rng = generator(key)
    reads = [_filled(rng, width, correlation) for width in widths]
    pairs = np.array([[m for m, *_ in row] for row in reads], np.float64)
    found = np.array([[_scores(told, names) for _, told, names in row] for row in reads])
    laws = [
        [[law(m, d) for m in row] for d, row in zip(widths, pairs.tolist(), strict=True)]
        for law in (crosstalk_power, worst_crosstalk, recall_rate)
    ]
    measured, error = found.transpose(3, 2, 0, 1)  # was: width, load, quantity, mean or error
    return Curves(pairs, measured, np.array(laws), error)


def capacities(found: Curves) -> Float[np.ndarray, " W"]:
    """The loads at which measured recall falls through 95 %, between the loads that were read.

    Recall is close to Φ(c / √m), so its probit is interpolated over 1/√m.
    """
    probit = special.ndtri(np.clip(found.measured[2], 1e-9, 1 - 1e-9))
    depth = 1 / np.sqrt(found.pairs)
    target = special.ndtri(TARGET)
    read = [np.interp(target, y[::-1], x[::-1]) for y, x in zip(probit, depth, strict=True)]
    return np.array(read) ** -2.0


def _filled(rng: np.random.Generator, width: int, correlation: float) -> list[Read]:
    """Memories of one width, filled to each load in turn and asked for their first pairs."""
    trials, asked, pairs = max(32, 4096 // width), width // 2, int(LOADS[-1] * width)
    keys = unit_keys(rng, trials, pairs, width)
    if correlation:
        keys = correlated_keys(rng, correlation, trials, pairs, width)
    names = np.arange(pairs) % OUTCOMES  # every outcome equally often
    against = np.sign(keys @ keys[:, 0, :, None])  # the worst outcomes for the first stimulus
    values = np.concatenate([np.eye(OUTCOMES)[names] + np.zeros((trials, 1, 1)), against], -1)
    marks = [int(load * width) for load in LOADS]
    told = _read_at(keys, values, keys[:, :asked], marks)
    return [(mark, out, names[:asked]) for mark, out in zip(marks, told, strict=True)]


def _read_at(
    keys: np.ndarray, values: np.ndarray, cues: np.ndarray, marks: list[int]
) -> list[np.ndarray]:
    """One pass over all pairs, in which the cues are asked whenever a mark is reached."""
    line: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    silence = np.zeros((*cues.shape[:2], values.shape[-1]))
    for start, end in zip([0, *marks[:-1]], marks, strict=True):
        trial = keys[:, start:end]
        line.append((np.zeros_like(trial), trial, values[:, start:end]))
        line.append((cues, np.zeros_like(cues), silence))
    tests, trials, outcomes = (
        np.concatenate(part, 1)[:, :, None] for part in zip(*line, strict=True)
    )
    out = respond(tests, trials, outcomes)
    asked = cues.shape[1]
    ends = [mark + asked * (i + 1) for i, mark in enumerate(marks)]
    return [out[:, end - asked : end, 0] for end in ends]


def _scores(told: np.ndarray, names: np.ndarray) -> list[tuple[float, float]]:
    """Mean and standard error over trials of each of QUANTITIES."""
    answers = told[..., :OUTCOMES]
    power = ((answers - np.eye(OUTCOMES)[names]) ** 2).sum(-1)
    length = told[:, 0, OUTCOMES] - 1  # the first stimulus, and its own outcome taken off
    right = (answers.argmax(-1) == names).astype(np.float64)
    return [(float(x.mean()), standard_error(x)) for x in (power, length, right)]
