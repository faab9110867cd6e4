r"""Attention as a marginal: who points at whom is not known, so one averages over it.

Let node i have one edge φ_i to some node j, unobserved, and let the edges be independent a priori:

    p(φ, x)  ∝  Π_i π_i(φ_i) e^(q_i·k_{φ_i})
    p(φ_i = j | x) = softmax_j( q_i·k_j + log π_i(j) ),      out_i = E[ v_{φ_i} | x ]

Soft attention is the posterior mean, hard attention a draw from the posterior, and the mean of M
draws is off by Σ_j p_j |v_j - out|² / M. What else is unknown makes other mechanisms, all of them
one step of expectation maximisation for a Gaussian mixture:

    the query   z ~ Σ_j π_j N(k_j, I/β):   z' = Σ_j p(j | z) k_j                    Hopfield network
    the keys    x_j ~ Σ_i N(μ_i, s² I):    μ_i' = Σ_j r_ji x_j / Σ_j r_ji           slot attention

with responsibilities r a softmax over the slots. A step never loses likelihood, and we say how
much it gains. Singh & Buckley (2023) read attention as inference over a latent adjacency, with
mixtures and Hopfield networks as instances; statement and constants here are ours. Left out: their
extensions to values over several nodes and to a prior on the window.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np

import attnlab
from attnlab.core.entry import Paper
from attnlab.core.scores import Bias
from theory.conditioning import generator
from theory.latent_mixtures import (
    assign,
    energy,
    log_likelihood,
    refine,
    retrieve,
    softmax,
)
from theory.shares import at_most, on_average
from theory.theorem import Cell, Evidence, Key, Theorem

NODES, WIDTH = 5, 4
DRAWS = (16, 256, 4096)
EXACT = 64 * float(np.finfo(np.float64).eps)
ROUNDING = 10 * float(np.finfo(np.float32).eps)  # of a weight below one, as in softmax_posterior
STILL = 1e-6  # a step that gains less than this has arrived
COLUMNS = ("what", "size", "measured", "promised", "share")
WORST = 1e6  # a share that would be infinite, so that a table shows it


def check(key: Key | None = None) -> Evidence:
    """All 3125 graphs on five nodes; draws of an edge; steps of Hopfield networks and of slots."""
    rng = generator(key)
    rows = [*_soft(rng), *_hard(rng)]
    rows += [_hopfield(rng, beta, prior) for beta in (0.5, 2.0, 8.0) for prior in (False, True)]
    rows += [_slots(rng, variance) for variance in (0.3, 1.0)]
    return _evidence(rows, "steps: the least gain promised, as a share of the gain")


def counter_check(key: Key | None = None) -> Evidence:
    """Edges that like to agree with their neighbour's; slots that normalise over the tokens."""
    rng = generator(key)
    scores = _scores(rng)[-1]
    error = float(np.abs(marginals(scores, coupling=0.5) - softmax(scores)).max())
    rows = [("coupled edges", NODES**NODES, error, EXACT, at_most(error, EXACT))]
    rows += [_slots(rng, variance, axis=0) for variance in (0.3, 1.0)]
    return _evidence(rows, "the slots' softmax is over the tokens, as a query's would be")


def marginals(scores: np.ndarray, coupling: float = 0.0) -> np.ndarray:
    """p(φ_i = j), "n m", of edges with weight e^(Σ_i score[i, φ_i] + J #{i: φ_i = φ_{i+1}}).

    Every one of the m^n graphs is listed.

    Raises:
      ValueError: there are more than a million graphs.
    """
    nodes, ends = scores.shape
    if ends**nodes > 10**6:
        raise ValueError(f"scores: at most 10**6 graphs are listed, got {ends}**{nodes}.")
    edges = np.indices((ends,) * nodes).reshape(nodes, -1)
    exponent = np.take_along_axis(scores, edges, 1).sum(0)
    exponent = exponent + coupling * (edges[1:] == edges[:-1]).sum(0)
    mass = np.exp(exponent - exponent.max())
    counts = np.stack([np.bincount(row, mass, ends) for row in edges])
    return counts / mass.sum()


def _soft(rng: np.random.Generator) -> list[tuple[Cell, ...]]:
    """Marginals of all graphs, to a softmax in float64 and to attnlab's attention."""
    query, keys, prior, scores = _scores(rng)
    listed = marginals(scores)
    said = float(np.abs(listed - softmax(scores)).max())
    told = float(np.abs(listed - weights(query, keys, prior)).max())
    graphs = NODES**NODES
    return [
        ("marginals", graphs, said, EXACT, at_most(said, EXACT)),
        ("attnlab's weights", graphs, told, ROUNDING, at_most(told, ROUNDING)),
    ]


def weights(query: np.ndarray, keys: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """What attnlab's attention gives each key, with a log-prior "n m" and the scale 1."""
    with np.errstate(divide="ignore"):  # an edge that cannot be
        bias = Bias(jnp.asarray(np.log(prior), jnp.float32)[None])
    q, k, v = (jnp.asarray(x, jnp.float32)[:, None] for x in (query, keys, np.eye(len(keys))))
    return np.asarray(attnlab.attention(q, k, v, modifiers=bias, scale=1.0), np.float64)[:, 0]


def _hard(rng: np.random.Generator) -> list[tuple[Cell, ...]]:
    """Means of M drawn values: their square error times M, to the variance of one draw."""
    p, values, rows = rng.dirichlet(np.ones(NODES)), rng.normal(size=(NODES, 3)), []
    out = p @ values
    one = float(p @ ((values - out) ** 2).sum(1))
    for draws in DRAWS:
        off = rng.multinomial(draws, p, 400) / draws @ values - out
        square = draws * (off**2).sum(1)
        error = float(square.std(ddof=1)) / len(square) ** 0.5
        mean = float(square.mean())
        rows.append(("square error x M", draws, mean, one, on_average(mean, one, error)))
    bias = off.mean(0) / (off.std(0, ddof=1) / len(off) ** 0.5)
    worst = float(np.abs(bias).max())  # in standard errors
    return [*rows, ("bias", DRAWS[-1], worst, 0.0, on_average(worst, 0.0, 1.0))]


def _hopfield(rng: np.random.Generator, beta: float, mixture: bool) -> tuple[Cell, ...]:
    """Twenty steps among twenty keys: |z' - z|²/2, and how much the energy falls.

    As a network, with no bias; or as a mixture, with a prior and the keys' lengths.
    """
    keys, z = rng.normal(size=(20, 6)), 2 * rng.normal(size=6)
    log_prior = np.log(rng.dirichlet(np.ones(20)))
    bias = log_prior - beta * (keys**2).sum(1) / 2 if mixture else np.zeros(20)
    steps = []
    for _ in range(20):
        after = retrieve(z, keys, beta, bias)
        gain, drop = float((after - z) @ (after - z) / 2), _drop(z, after, keys, beta, bias)
        if gain > STILL:
            steps.append((drop, gain, _gain_share(gain, drop)))
        z = after
    return ("mixture" if mixture else "Hopfield", 20, *max(steps, key=lambda step: step[-1]))


def _drop(z: np.ndarray, after: np.ndarray, *world) -> float:
    return energy(z, *world) - energy(after, *world)


def _slots(rng: np.random.Generator, variance: float, axis: int = 1) -> tuple[Cell, ...]:
    """Fifteen steps of four slots on four clusters of thirty tokens."""
    clusters = [rng.normal(size=(30, 3)) + 4 * rng.normal(size=3) for _ in range(4)]
    tokens, slots, steps = np.concatenate(clusters), rng.normal(size=(4, 3)), []
    for _ in range(15):
        shares = assign(tokens, slots, variance, axis)
        after = refine(tokens, slots, shares)
        gain = float(shares.sum(0) @ ((after - slots) ** 2).sum(1)) / (2 * variance)
        rise = log_likelihood(tokens, after, variance) - log_likelihood(tokens, slots, variance)
        if gain > STILL:
            steps.append((rise, gain, _gain_share(gain, rise)))
        slots = after
    return ("slots", len(tokens), *max(steps, key=lambda step: step[-1]))


def _gain_share(least: float, found: float) -> float:
    """The gain promised, as a share of that found; differences of sums are good to some 1e-10."""
    found += 1e-10
    return min(least / found, WORST) if found > 0 else WORST


def _scores(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Queries, keys, a prior under which one edge cannot be, and the scores of all edges."""
    query, keys = rng.normal(size=(2, NODES, WIDTH))
    prior = rng.dirichlet(np.ones(NODES), NODES)
    prior[0, 0] = 0.0
    prior /= prior.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        return query, keys, prior, query @ keys.T + np.log(prior)


_evidence = partial(
    Evidence.of_ratios, "distance from the promised, as a share of what is allowed", COLUMNS
)


THEOREM = Theorem(
    id="latent-edges",
    title="attention is a marginal over edges",
    statement=(
        r"Let edges $\varphi_1, \dots, \varphi_n$ have $p(\varphi, x) \propto \prod_i "
        r"\pi_i(\varphi_i)\, e^{q_i \cdot k_{\varphi_i}}$. Then $p(\varphi_i = j \mid x) = "
        r"\mathrm{softmax}_j(q_i \cdot k_j + \log \pi_i(j))$ and attention's output is "
        r"$E[v_{\varphi_i} \mid x]$; the mean of $M$ values drawn from the posterior has square "
        r"error $\frac{1}{M} \sum_j p_j \lVert v_j - o_i \rVert^2$ exactly. If instead the query is"
        r" unknown, $z' = \sum_j p_j k_j$ with $p = \mathrm{softmax}(\beta K z + b)$ lowers $E(z) ="
        r" \frac12 \lVert z \rVert^2 - \frac1\beta \log \sum_j e^{\beta k_j \cdot z + b_j}$ by "
        r"$\frac12 \lVert z' - z \rVert^2$ or more: for $b_j = \log \pi_j - \frac\beta2 \lVert k_j "
        r"\rVert^2$ it is expectation maximisation of $z \sim \sum_j \pi_j N(k_j, I/\beta)$, for $b"
        r" = 0$ a Hopfield network. If the keys are, $\mu_i' = \sum_j r_{ji} x_j / \sum_j r_{ji}$ "
        r"with $r$ a softmax over slots raises the log-likelihood of $x_j \sim \sum_i N(\mu_i, s^2 "
        r"I)$ by $\frac{1}{2 s^2} \sum_{ij} r_{ji} \lVert \mu_i' - \mu_i \rVert^2$ or more."
    ),
    assumptions=(
        "edges are independent given the nodes: no weight depends on two of them",
        "responsibilities are normalised over what is unknown: slots, not tokens",
    ),
    source=Paper(
        "Attention: Marginal Probability is All You Need?", "Singh & Buckley", 2023, "2304.04556"
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"The joint is a product over $i$, so each factor is normalised alone; the rest of the "
        r"first part is the variance of a mean. $\frac1\beta \log \sum_j e^{\beta k_j \cdot z + "
        r"b_j}$ is convex in $z$ with gradient $z'$, so it grows by $z' \cdot (z' - z)$ or more, "
        r"and $\frac12 \lVert z' \rVert^2 - \frac12 \lVert z \rVert^2 - z' \cdot (z' - z) = "
        r"-\frac12 \lVert z' - z \rVert^2$. The log-likelihood of the slots grows at least as much "
        r"as the expected complete one (Jensen), a quadratic of each $\mu_i$ with weight $\sum_j "
        r"r_{ji}/s^2$ and its maximum at $\mu_i'$."
    ),
)
