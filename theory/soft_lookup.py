r"""Attention is a smooth dictionary look-up: cold it reads one entry, hot it averages all.

With scores x_1 … x_S, weights p = softmax(x / τ), γ the margin of the best score over the second
and R the distance from the best score to the worst,

    |out - v_best|  ≤  max_j |v_j - v_best| · (S - 1) e^(-γ/τ) / (1 + (S - 1) e^(-γ/τ))
    |out - mean(v)| ≤  max_j |v_j - mean(v)| · (e^(R/τ) - 1)

so the temperature slides between the two, and the margin says how cold is cold enough.
"""

import jax
import jax.numpy as jnp
import numpy as np

import attnlab
from attnlab.core.entry import Paper
from theory.theorem import Evidence, Key, Theorem, worst

ENTRIES, WIDTH, VALUES = 12, 8, 3
TEMPERATURES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
ROUNDING = ENTRIES * float(np.finfo(np.float32).eps)  # what float32 may add to any entry


def check(key: Key | None = None) -> Evidence:
    """Distances to the best value and to the mean, over temperatures, as shares of the bounds."""
    return _measure(*_dictionary(jax.random.key(0) if key is None else key))


def counter_check(key: Key | None = None) -> Evidence:
    """No margin: the best key is there twice, with two values, and no cold chooses between them."""
    query, keys, values = _dictionary(jax.random.key(0) if key is None else key)
    best, worst = int(jnp.argmax(keys @ query)), int(jnp.argmin(keys @ query))
    return _measure(query, keys.at[worst].set(keys[best]), values)


def _dictionary(key: Key) -> tuple[jax.Array, jax.Array, jax.Array]:
    for_query, for_keys, for_values = jax.random.split(key, 3)
    query = jax.random.normal(for_query, (WIDTH,))
    keys = jax.random.normal(for_keys, (ENTRIES, WIDTH))
    return query, keys, jax.random.normal(for_values, (ENTRIES, VALUES))


def _measure(query: jax.Array, keys: jax.Array, values: jax.Array) -> Evidence:
    scores = np.asarray(keys, np.float64) @ np.asarray(query, np.float64)
    table = np.asarray(values, np.float64)
    ranked = np.unique(scores)  # ties collapse: the margin is to the next *different* score
    margin, spread = ranked[-1] - ranked[-2], ranked[-1] - ranked[0]
    best, mean = table[np.argmax(scores)], table.mean(0)
    reach_best = np.linalg.norm(table - best, axis=1).max()
    reach_mean = np.linalg.norm(table - mean, axis=1).max()

    rows = []
    for temperature in TEMPERATURES:
        out = attnlab.attention(
            query[None, None, :], keys[:, None, :], values[:, None, :], scale=1 / temperature
        )
        read = np.asarray(out, np.float64)[0, 0]
        others = (len(scores) - 1) * np.exp(-margin / temperature)
        cold = reach_best * others / (1 + others)
        hot = reach_mean * np.expm1(min(spread / temperature, 700.0))
        to_best, to_mean = np.linalg.norm(read - best), np.linalg.norm(read - mean)
        share = max(to_best / (cold + ROUNDING), to_mean / (hot + ROUNDING))
        rows.append(
            (temperature, float(to_best), float(cold), float(to_mean), float(hot), float(share))
        )
    return Evidence(
        quantity="worst distance as a share of its bound",
        measured=worst(rows),
        bound=1.0,
        columns=("temperature", "to the best", "bound", "to the mean", "bound ", "share"),
        rows=tuple(rows),
        note=f"margin {margin:.3g}, spread {spread:.3g}, {len(scores)} entries",
    )


THEOREM = Theorem(
    id="soft-lookup",
    title="a soft look-up",
    statement=(
        r"Let $p = \operatorname{softmax}(x/\tau)$ and $o = \sum_j p_j v_j$. If the best score "
        r"leads the second by $\gamma$, then $\lVert o - v_\star\rVert \le "
        r"\frac{(S-1)e^{-\gamma/\tau}}{1+(S-1)e^{-\gamma/\tau}}\max_j\lVert v_j - v_\star\rVert$; "
        r"and if all scores lie within $R$ of the best, $\lVert o - \bar v\rVert \le "
        r"(e^{R/\tau}-1)\max_j\lVert v_j-\bar v\rVert$."
    ),
    assumptions=(
        r"one key is strictly best: $\gamma > 0$",
        r"the scores are finite: $R < \infty$",
        "sums are exact up to float32 rounding",
    ),
    source=Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762", "NeurIPS 2017"),
    check=check,
    counter_check=counter_check,
    proof=(
        r"Every other weight is at most $e^{-\gamma/\tau}p_\star$, hence $1-p_\star$ is at most "
        r"the first fraction, and $o - v_\star = \sum_j p_j (v_j - v_\star)$. For heat, "
        r"$e^{-R/\tau} \le S p_j \le e^{R/\tau}$, so $|p_j - 1/S| \le (e^{R/\tau}-1)/S$."
    ),
)
