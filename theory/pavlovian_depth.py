r"""Errors of retrieval through depth, and what width and redundant heads do about them.

A chain of L conditioned layers: what layer l foretells is what layer l+1 is asked with. Each layer
stores the same m associations, j -> j, in N heads of width d, every head under keys of its own, and
the next layer hears the mean of the heads. With R = m-1 the crosstalk of one head of width one,

    E |o_L - v|²  =  (1 + R / Nd)^L - 1        passed on as it is: errors breed errors

exactly. Depth, load, width and redundancy trade against each other: the noise stays below ε up to
the depth log(1+ε) / log(1 + R/Nd), near εNd/R, and N heads are as good as one of N times the width.
If instead every layer names the strongest of C outcomes and passes on that one's stimulus, a layer
fails with a probability 1-p that falls like e^(-C Nd/4m), and

    P(right after L)  =  1/C + (1 - 1/C) ((C p - 1) / (C - 1))^L

so that depth costs width only by its logarithm. Qiao's abstract names the trade-off between depth,
width and head redundancy; these two laws of it and their proofs are ours.
"""

import itertools
import math

import numpy as np

from attnlab.core.entry import Paper
from theory.conditioning import generator, respond, standard_error, unit_keys
from theory.pavlovian_curves import recall_rate
from theory.theorem import Cell, Evidence, Key, Theorem, worst

DEPTHS = (1, 2, 4, 8)
PAIRS = 16  # associations in every layer
SHAPES = ((32, 1), (64, 1), (32, 2), (32, 4))  # width, heads
TRIALS = 256
OUTCOMES, EACH = 4, 4  # of a layer that names: how many outcomes, and how many pairs to each
SIGMAS, NORMALITY = 5.0, 0.015
COLUMNS = ("layers", "depth", "width", "heads", "measured", "predicted", "share")


def noise_power(depth: int | float, pairs: int, width: int, heads: int = 1) -> float:
    """E |o_L - v|² = (1 + (m-1)/Nd)^L - 1."""
    return math.expm1(depth * math.log1p((pairs - 1) / (width * heads)))


def depth_budget(noise: float, pairs: int, width: int, heads: int = 1) -> float:
    """The depth at which the noise reaches this power."""
    return math.log1p(noise) / math.log1p((pairs - 1) / (width * heads))


def reliability(depth: int, rate: float, outcomes: int = OUTCOMES) -> float:
    """P(right) after so many layers that each name rightly with probability `rate`."""
    kept = (outcomes * rate - 1) / (outcomes - 1)
    return 1 / outcomes + (1 - 1 / outcomes) * kept**depth


def check(key: Key | None = None) -> Evidence:
    """Chains of eight layers, of four shapes, that pass on what they hear or what they name."""
    return _evidence(generator(key), redundant=True, note=f"{PAIRS} associations in every layer")


def counter_check(key: Key | None = None) -> Evidence:
    """Heads that all have the same keys: they err together, and their mean errs as one."""
    return _evidence(generator(key), redundant=False, note="the heads of a layer share their keys")


def passed_on(
    rng: np.random.Generator, width: int, heads: int, redundant: bool = True
) -> np.ndarray:
    """Noise power of the answer after each of DEPTHS, per trial: "trials depths"."""
    layers = [_keys(rng, PAIRS, width, heads, redundant) for _ in range(max(DEPTHS) + 1)]
    heard, powers = layers[0][:, 0], []
    names = np.broadcast_to(np.eye(PAIRS), (TRIALS, PAIRS, PAIRS))
    for keys, following in itertools.pairwise(layers):
        values = np.concatenate([following.reshape(TRIALS, PAIRS, -1), names], -1)
        told = _ask(keys, values, heard)
        heard = told[:, :-PAIRS].reshape(TRIALS, heads, width)
        powers.append(((told[:, -PAIRS:] - names[:, 0]) ** 2).sum(-1))
    return np.stack([powers[depth - 1] for depth in DEPTHS], -1)


def named(rng: np.random.Generator, width: int, heads: int, redundant: bool = True) -> np.ndarray:
    """Whether the outcome named after each of DEPTHS is the right one: "trials depths"."""
    values = np.broadcast_to(
        np.eye(OUTCOMES)[np.arange(PAIRS) % OUTCOMES], (TRIALS, PAIRS, OUTCOMES)
    )
    name, right = np.zeros(TRIALS, int), []
    for _ in range(max(DEPTHS)):
        keys = _keys(rng, PAIRS, width, heads, redundant)
        name = _ask(keys, values, keys[np.arange(TRIALS), name]).argmax(-1)
        right.append(name == 0)
    return np.stack([right[depth - 1] for depth in DEPTHS], -1).astype(np.float64)


def _keys(
    rng: np.random.Generator, pairs: int, width: int, heads: int, redundant: bool
) -> np.ndarray:
    """One layer's keys, "trials pairs heads width": of each head its own, or the same for all."""
    keys = unit_keys(rng, TRIALS, pairs, heads if redundant else 1, width)
    return np.broadcast_to(keys, (TRIALS, pairs, heads, width))


def _ask(keys: np.ndarray, values: np.ndarray, heard: np.ndarray) -> np.ndarray:
    """The heads' mean answer to a test stimulus, "trials heads width", after all pairs."""
    end = np.zeros((TRIALS, 1, *keys.shape[2:]))
    trials = np.concatenate([keys, end], 1)
    tests = np.concatenate([np.zeros_like(keys), heard[:, None]], 1)
    outcomes = np.concatenate([values, np.zeros_like(values[:, :1])], 1)[:, :, None]
    outcomes = np.broadcast_to(outcomes, (*trials.shape[:3], values.shape[-1]))
    return respond(tests, trials, outcomes)[:, -1].mean(1)


def _evidence(rng: np.random.Generator, redundant: bool, note: str) -> Evidence:
    rows: list[tuple[Cell, ...]] = []
    for width, heads in SHAPES:
        rate = recall_rate(PAIRS, width * heads, OUTCOMES)
        heard, right = (run(rng, width, heads, redundant) for run in (passed_on, named))
        for depth, power, hits in zip(DEPTHS, heard.T, right.T, strict=True):
            said = noise_power(depth, PAIRS, width, heads)
            rows.append(_row("pass on", depth, width, heads, power, said, 0.0))
            said = reliability(depth, rate)
            rows.append(_row("name", depth, width, heads, hits, said, NORMALITY))
    return Evidence(
        quantity="distance from the closed forms, as a share of what chance allows",
        measured=worst(rows),
        bound=1.0,
        columns=COLUMNS,
        rows=tuple(sorted(rows, key=lambda row: str(row[0]), reverse=True)),
        note=note,
    )


def _row(
    kind: str, depth: int, width: int, heads: int, trials: np.ndarray, said: float, grain: float
) -> tuple[Cell, ...]:
    found, error = float(trials.mean()), standard_error(trials)
    # A share that is almost always one varies too little for its own error to say so.
    error = max(error, 1 / TRIALS) if grain else error
    return (kind, depth, width, heads, found, said, abs(found - said) / (SIGMAS * error + grain))


THEOREM = Theorem(
    id="pavlovian-depth",
    title="depth against width and redundant heads",
    statement=(
        r"Let each of $L$ layers store $m$ associations in $N$ heads of key width $d_k$ and hand "
        r"on the mean of its heads. If the answer is passed on as it is, its noise has mean power "
        r"exactly $\bigl(1 + \frac{m-1}{N d_k}\bigr)^L - 1$: it stays below $\varepsilon$ up to "
        r"the depth $\log(1+\varepsilon) / \log(1 + \frac{m-1}{N d_k})$. If every layer names the "
        r"strongest of $C$ orthogonal outcomes, rightly with probability $p$, and passes on that "
        r"one's stimulus, the last name is right with probability $\frac1C + (1 - \frac1C) "
        r"\bigl(\frac{Cp-1}{C-1}\bigr)^L$, where $p$ depends on $m/(C N d_k)$: reliability over a "
        r"depth $L$ costs a width or a number of heads that grows with $\log L$ only."
    ),
    assumptions=(
        "the heads of a layer have independent keys",
        "the layers have independent keys, uniform on the unit sphere",
        "no layer learns from its errors, and none has a softmax",
        "for names: every outcome is stored equally often",
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
        r"Passed on, item $j$ enters layer $l$ with the weight $x_j$ and leaves with $(xG)_j$, $G "
        r"= \frac1N \sum_h K_h K_h^\top$. Changing the sign of one key changes the sign of its "
        r"overlaps, so $E[G^2]$ is diagonal with $1 + \frac{m-1}{N d_k}$, and $E[G] = I$: the "
        r"power $E\lVert x \rVert^2$ grows by that factor in each layer, while the mean of $x$ "
        r"stays $e_i$, and $E \lVert x - e_i \rVert^2 = E\lVert x \rVert^2 - 1$. Named, the layers"
        r" are equal and independent symmetric channels of $C$ letters, whose matrices have the "
        r"eigenvalues $1$ and $\frac{Cp-1}{C-1}$; Gaussian tails give $1-p \approx e^{-C N "
        r"d_k/4m}$ up to factors."
    ),
)
