r"""Learning from errors: what Rescorla and Wagner's rule, the delta rule, adds to Hebb's.

    S_t = S_{t-1} + β k_t (v_t - S_{t-1}^T k_t)^T

writes only what was not foretold. A stimulus of unit length alone is then learned as 1 - (1-β)^n
over n trials and extinguished as (1-β)^n; a stimulus shown together with one already learned gains
nothing (Kamin's blocking), and two novel ones shown together share the outcome (overshadowing).
Hebb's rule knows none of this: it adds β per trial, forever.

Presented over and over, m linearly independent keys are recalled exactly, for then S_* = K^+ V
answers all of them and a round of trials multiplies S - S_* by P = Π_j (1 - β k_j k_j^T), a
contraction of the keys' span (Kaczmarz, 1937). More than d keys are dependent: no rule holds them,
and the best memory misses on average a share 1 - d/m of random outcomes. One round is not enough,
unless the keys are orthonormal, when Hebb's rule is as good.
"""

from functools import partial

import numpy as np

from attnlab.core.entry import Paper
from theory.conditioning import generator, orthonormal_keys, recall, respond, unit_keys
from theory.theorem import Cell, Evidence, Key, Theorem

RATE = 0.25
TRIALS = 48  # of every conditioning experiment, the first of them empty if it needs fewer
ROUNDS = 64
LEAN = 0.4  # how far the m = d keys are from orthonormal: that far on, they are hard to tell apart
ROUNDING = 5e-6  # of responses of order one, after some thousand float32 steps
COLUMNS = ("what", "width", "pairs", "trials", "measured", "predicted", "share")


def check(key: Key | None = None) -> Evidence:
    """Conditioning by single stimuli and compounds, recall of m <= d pairs, and of more."""
    rng = generator(key)
    rows = [*_phenomena(), *_exact(rng), *_beyond(rng)]
    return _evidence(
        rows, "a response; the largest error of recall; beyond d pairs, its mean square"
    )


def counter_check(key: Key | None = None) -> Evidence:
    """Fewer keys than the width, but one of them twice, with two outcomes: not independent."""
    rng = generator(key)
    rows = []
    for width in (16, 64):
        keys, values = unit_keys(rng, width // 4, width), _signs(rng, width // 4)
        keys[-1], values[-1] = keys[0], -values[0]
        rows.append(_recalled("a key twice", keys, values, ROUNDS))
    return _evidence(rows, "no memory answers one stimulus in two ways")


def acquisition(
    trials: int = TRIALS, rewarded: int = 24, rate: float = RATE
) -> tuple[np.ndarray, np.ndarray]:
    """Responses to one stimulus after each trial, measured and predicted; a curve to plot.

    The outcome is there in the first `rewarded` trials: acquisition, then extinction.
    """
    when = np.arange(1, trials + 1)
    light = np.ones((trials, 1, 1))
    told = respond(light, light, (when <= rewarded)[:, None, None] * 1.0, rate)[:, 0, 0]
    learned = 1 - (1 - rate) ** np.minimum(when, rewarded)
    return told, learned * (1 - rate) ** np.maximum(when - rewarded, 0)


def remaining_error(keys: np.ndarray, values: np.ndarray, rounds: int) -> np.ndarray:
    """Errors of recall "M D" after so many rounds at β = 1, V - K (S_* - P^rounds S_*)."""
    best = np.linalg.pinv(keys) @ values
    through = np.eye(keys.shape[1])
    for k in keys:
        through -= np.outer(k, k @ through)
    return values - keys @ (best - np.linalg.matrix_power(through, rounds) @ best)


def _phenomena() -> list[tuple[Cell, ...]]:
    """A light and a tone, food or none: how strongly is food expected at the end?"""
    light, tone = np.eye(2)
    fed, unfed, with_tone = (light, 1.0), (light, 0.0), (light + tone, 1.0)
    learned = 1 - (1 - RATE) ** 24
    return [
        _conditioned("acquisition", [fed] * 6, light, 1 - (1 - RATE) ** 6),
        _conditioned("extinction", [fed] * 24 + [unfed] * 6, light, learned * (1 - RATE) ** 6),
        _conditioned("blocking", [fed] * 24 + [with_tone] * 24, tone, (1 - learned) / 2),
        _conditioned("overshadowing", [with_tone] * 24, tone, 0.5),
    ]


def _conditioned(
    name: str, shown: list[tuple[np.ndarray, float]], asked: np.ndarray, predicted: float
) -> tuple[Cell, ...]:
    stimuli, outcomes = np.zeros((TRIALS, 2)), np.zeros((TRIALS, 1))
    stimuli[-len(shown) :] = [stimulus for stimulus, _ in shown]
    outcomes[-len(shown) :, 0] = [outcome for _, outcome in shown]
    told = float(recall(stimuli, outcomes, asked[None], RATE)[0, 0])
    return (name, 2, 1, len(shown), told, float(predicted), abs(told - predicted) / ROUNDING)


def _exact(rng: np.random.Generator) -> list[tuple[Cell, ...]]:
    """Independent keys: exact in one round if orthonormal, in the end in any case."""
    rows = []
    for width in (16, 64):
        values, square = _signs(rng, width), orthonormal_keys(rng, width, width)
        leaning = square + LEAN * unit_keys(rng, width, width)
        leaning /= np.linalg.norm(leaning, axis=1, keepdims=True)
        few = unit_keys(rng, width // 4, width)
        rows.append(_recalled("Hebb, orthonormal", square, values, 1, None))
        rows.append(_recalled("orthonormal", square, values, 1))
        rows.append(_recalled("m = d", leaning, values, ROUNDS))
        rows.append(_recalled("m = d/4", few, values[: width // 4], ROUNDS))
    return rows


def _beyond(rng: np.random.Generator) -> list[tuple[Cell, ...]]:
    """More pairs than the width: no rule gets below the least squares of the same pairs."""
    rows: list[tuple[Cell, ...]] = []
    for width, pairs in ((16, 24), (64, 128)):
        keys, values = unit_keys(rng, pairs, width), _signs(rng, pairs)
        floor = float(np.mean((values - keys @ np.linalg.pinv(keys) @ values) ** 2))
        for name, rate in (("m > d, Hebb", None), ("m > d", RATE)):
            rounds = 1 if rate is None else 16
            error = float(np.mean((_rounds(keys, values, rounds, rate) - values) ** 2))
            rows.append((name, width, pairs, rounds * pairs, error, floor, floor / error))
    return rows


def _recalled(
    name: str, keys: np.ndarray, values: np.ndarray, rounds: int, rate: float | None = 1.0
) -> tuple[Cell, ...]:
    pairs, width = keys.shape
    error = float(np.abs(_rounds(keys, values, rounds, rate) - values).max())
    said = float(np.abs(remaining_error(keys, values, rounds)).max())
    return (name, width, pairs, rounds * pairs, error, said, error / ROUNDING)


def _rounds(keys: np.ndarray, values: np.ndarray, rounds: int, rate: float | None) -> np.ndarray:
    return recall(np.tile(keys, (rounds, 1)), np.tile(values, (rounds, 1)), keys, rate)


def _signs(rng: np.random.Generator, pairs: int) -> np.ndarray:
    return rng.choice([-1.0, 1.0], size=(pairs, 4))


_evidence = partial(
    Evidence.of_ratios,
    "distance from the prediction, as a share of rounding; floor to error beyond d",
    COLUMNS,
)


THEOREM = Theorem(
    id="pavlovian-delta",
    title="what learning from errors adds",
    statement=(
        r"Let $S_t = S_{t-1} + \beta k_t (v_t - S_{t-1}^\top k_t)^\top$. One stimulus of unit "
        r"length with outcome $v$ is answered $(1-(1-\beta)^n) v$ after $n$ trials and "
        r"$(1-\beta)^n$ of what it was after $n$ trials without; a stimulus in compound with a "
        r"learned one gains nothing, two novel ones share the outcome. If $m$ keys of unit length "
        r"are linearly independent, so that $m \le d_k$, rounds of trials with $\beta = 1$ "
        r"converge to $S_\star = K^+ V$, which recalls every pair exactly; after $r$ rounds the "
        r"error is $K P^r S_\star$, $P = \prod_j (I - k_j k_j^\top)$. For $m > d_k$ no memory of "
        r"width $d_k$ has an error below that of least squares, $1 - d_k/m$ of random outcomes on "
        r"average."
    ),
    assumptions=(
        "the stimuli are linearly independent, hence no more than the width",
        "each stimulus has one outcome, the same in every round",
        "enough rounds are presented; one is enough for orthonormal stimuli",
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
        r"With $E = S - S_\star$ and $K S_\star = V$ a trial is $E \mapsto (I - \beta k_j "
        r"k_j^\top) E$. For one key this shrinks the response's error by $1-\beta$. At $\beta = 1$"
        r" each factor is an orthogonal projection, and $\lVert P x \rVert = \lVert x \rVert$ only"
        r" if every one leaves $x$ alone, that is, if $x$ is orthogonal to all keys: on their "
        r"span, which contains $E$ from $S_0 = 0$ on, $P$ has norm below $1$. The best linear "
        r"memory projects the $m$ outcomes on a space of dimension $\min(m, d_k)$."
    ),
)
