r"""Softmax with a log-prior is a posterior: attention asks which key the query was drawn from.

Let J be the position of the key that made query i, with prior p(j | i), and let key k make the
query q with probability p(q | j) = c(q) e^(q·k / √H). Bayes' rule cancels c(q), whatever it is,
and leaves

    P(J = j | q)  =  softmax_j( q·k_j / √H + log p(j | i) )

The only assumption that bites is that c does not depend on j. It holds for a Gaussian around each
key, variance √H, exactly when all keys have the same length (which QK-norm sees to); otherwise
softmax silently prefers long keys, as if the prior carried a factor e^(|k_j|² / 2√H).
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import attnlab
from attnlab.core.entry import Paper
from attnlab.core.scores import Bias
from theory.theorem import Evidence, Key, Theorem

KEYS, WIDTH = 10, 6
COLUMNS = ("world", "queries", "error", "bound", "share")
# Ten float32 roundings of a weight below one: scores, prior, exponential, sum, quotient.
ROUNDING = 10 * float(np.finfo(np.float32).eps)


def check(key: Key | None = None) -> Evidence:
    """Attention against Bayes' rule in two worlds: every query listed, and Gaussian queries."""
    rng = _generator(key)
    prior = rng.dirichlet(np.ones(KEYS))
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=WIDTH)))
    length = rng.uniform(0.5, 2.0, WIDTH)
    signs = corners[rng.choice(len(corners), KEYS, replace=False)]
    sphere = rng.normal(size=(KEYS, WIDTH))
    sphere *= 3.0 / np.linalg.norm(sphere, axis=1, keepdims=True)
    cloud = rng.normal(size=(64, WIDTH)) * 1.5
    content = _posterior_from_table(corners, signs * length, np.full(KEYS, 1 / KEYS))
    rows = [
        _row("listed", corners, signs * length, prior, _posterior_from_table),
        _row("Gaussian, equal keys", cloud, sphere, prior, _posterior_from_density),
        _against(
            "content x position", corners, signs * length, prior, _normalised(content * prior)
        ),
    ]
    return _evidence(rows, "the same weights, whether from softmax or from Bayes' rule")


def counter_check(key: Key | None = None) -> Evidence:
    """Keys of unequal length, so that c depends on j: softmax then has another prior."""
    rng = _generator(key)
    prior = rng.dirichlet(np.ones(KEYS))
    keys = rng.normal(size=(KEYS, WIDTH)) * rng.uniform(0.3, 2.5, (KEYS, 1))
    cloud = rng.normal(size=(64, WIDTH)) * 1.5
    implied = prior * np.exp(-np.sum(keys**2, axis=1) / (2 * np.sqrt(WIDTH)))
    exact = _posterior_from_density(cloud, keys, prior)
    rows = [
        _against("Gaussian, unequal keys", cloud, keys, prior, exact),
        _against("the same, prior corrected", cloud, keys, implied / implied.sum(), exact),
    ]
    return _evidence(rows, "the corrected prior carries the factor exp(-|k|²/2√H)")


def weights(queries: np.ndarray, keys: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """What attnlab's attention gives each key, read off by attending to an identity of values."""
    q, k = (jnp.asarray(array[:, None, :], jnp.float32) for array in (queries, keys))
    bias = jnp.asarray(np.log(prior), jnp.float32)[None, None, :]
    out = attnlab.attention(q, k, jnp.eye(len(keys))[:, None, :], modifiers=Bias(bias))
    return np.asarray(out, np.float64)[:, 0]


def _posterior_from_table(queries: np.ndarray, keys: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Write down P(j, q) for every possible query, each row a true distribution, and condition."""
    alikeness = np.exp(queries @ keys.T / np.sqrt(WIDTH))
    query_given_key = alikeness / alikeness.sum(0)
    joint = query_given_key * prior
    return joint / joint.sum(1, keepdims=True)


def _posterior_from_density(queries: np.ndarray, keys: np.ndarray, prior: np.ndarray) -> np.ndarray:
    variance = np.sqrt(WIDTH)
    squared = np.sum((queries[:, None, :] - keys[None, :, :]) ** 2, axis=-1)
    return _normalised(np.exp(-squared / (2 * variance)) * prior)


def _normalised(table: np.ndarray) -> np.ndarray:
    return table / table.sum(-1, keepdims=True)


def _row(name: str, queries: np.ndarray, keys: np.ndarray, prior: np.ndarray, bayes) -> tuple:
    return _against(name, queries, keys, prior, bayes(queries, keys, prior))


def _against(
    name: str, queries: np.ndarray, keys: np.ndarray, prior: np.ndarray, exact: np.ndarray
) -> tuple:
    error = float(np.max(np.abs(weights(queries, keys, prior) - exact)))
    return (name, len(queries), error, ROUNDING, error / ROUNDING)


_evidence = partial(
    Evidence.of_ratios, "worst difference of a weight, as a share of float32 rounding", COLUMNS
)


def _generator(key: Key | None) -> np.random.Generator:
    key = jax.random.key(0) if key is None else key
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


THEOREM = Theorem(
    id="softmax-posterior",
    title="softmax is a posterior",
    statement=(
        r"If position $j$ has prior $p(j \mid i)$ and makes the query with likelihood $p(q \mid "
        r"j) = c(q)\,e^{q\cdot k_j/\sqrt H}$, then $P(j \mid q) \propto p(j \mid i)\,e^{q\cdot "
        r"k_j/\sqrt H}$: attention with the log-prior added to its scores is the posterior over "
        r"positions. Equivalently, it is the normalised product of what content says alone and "
        r"what position says alone."
    ),
    assumptions=(
        (
            r"$c(q)$ is the same for every key, for instance Gaussian likelihoods around keys of "
            r"equal length"
        ),
        "given the position, the query depends on the content of its key only",
    ),
    source=Paper(
        "Bayesian Attention Mechanism: A Probabilistic Framework for Positional Encoding and "
        "Context Length Extrapolation",
        "Bianchessi et al.",
        2025,
        "2505.22842",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"$P(j \mid q) = p(j \mid i)\,c(q)\,e^{q\cdot k_j/\sqrt H} / \sum_l p(l \mid "
        r"i)\,c(q)\,e^{q\cdot k_l/\sqrt H}$, and $c(q)$ cancels."
    ),
)
