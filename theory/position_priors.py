r"""NoPE and ALiBi are priors: the uniform one and the Laplace one. BAM's family holds both.

A prior enters attention as log p(j | i), and a factor that depends on the query alone cancels in
the softmax. So the normalisation may be left out, which is why nobody noticed that these were
priors:

    NoPE    log p(j | i) = -log(i + 1)                                  uniform over the past
    ALiBi   log p(j | i) = log(m / 2) - m |i - j|                       Laplace, mean |r| of 1/m
    BAM     log p(j | i) = log(β α^(1/β) / 2Γ(1/β)) - α |i - j|^β       generalised Gaussian

The released BAM code adds 1e-5 to the distance; at shape 1 that is a constant, and cancels as
well.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from attnlab.core.entry import Paper
from attnlab.core.masks import Causal
from attnlab.positional.alibi import alibi_attention, alibi_slopes
from attnlab.positional.bam import bam_attention
from attnlab.positional.nope import nope_attention
from theory.theorem import Evidence, Key, Theorem

LENGTH, HEADS, WIDTH = 96, 4, 8
COLUMNS = ("mechanism", "prior", "error", "bound", "share")
# Scores of order ten, a softmax over LENGTH keys, values of order one: a few roundings of each.
ROUNDING = 64 * float(np.finfo(np.float32).eps)


def check(key: Key | None = None) -> Evidence:
    """The functions of attnlab against float64 attention under each fully normalised prior."""
    arrays = _arrays(key)
    slopes = np.asarray(alibi_slopes(HEADS), np.float64)
    one, scale = jnp.ones(HEADS), jnp.log(alibi_slopes(HEADS))
    bam = bam_attention(*arrays, prior_scale=scale, prior_shape=one, mask=Causal())
    flat = bam_attention(*arrays, prior_scale=scale, prior_shape=0 * one, mask=Causal())
    rows = [
        _row("NoPE", "uniform", nope_attention(*arrays, mask=Causal()), arrays, uniform()),
        _row("ALiBi", "Laplace", alibi_attention(*arrays, mask=Causal()), arrays, laplace(slopes)),
        _row("BAM, shape 1", "Laplace", bam, arrays, laplace(slopes)),
        _row("BAM, shape 0", "uniform", flat, arrays, uniform()),
    ]
    return _evidence(
        rows, "each prior with its own normalising constant, which the softmax removes"
    )


def counter_check(key: Key | None = None) -> Evidence:
    """A constant that depends on the key stays: normalise each prior over queries instead."""
    arrays = _arrays(key)
    slopes = np.asarray(alibi_slopes(HEADS), np.float64)
    rows = []
    for name, prior, out in (
        ("NoPE", uniform(), nope_attention(*arrays, mask=Causal())),
        ("ALiBi", laplace(slopes), alibi_attention(*arrays, mask=Causal())),
    ):
        seen = np.tril(np.ones((LENGTH, LENGTH)))
        wrong = prior - np.log(np.sum(np.exp(prior) * seen, axis=-2, keepdims=True))
        rows.append(_row(name, "normalised over queries", out, arrays, wrong))
    return _evidence(rows, "p(i | j) instead of p(j | i): the constant now differs from key to key")


def uniform() -> np.ndarray:
    """Log p(j | i) = -log(i + 1), "T S"."""
    return np.broadcast_to(-np.log(np.arange(LENGTH) + 1.0)[:, None], (LENGTH, LENGTH))


def laplace(slopes: np.ndarray) -> np.ndarray:
    """The Laplace log-density of the distance, "N T S"."""
    distance = np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH)))
    slopes = slopes[:, None, None]
    return np.log(slopes / 2) - slopes * distance


def generalised_gaussian(distance: np.ndarray, scale: float, shape: float) -> np.ndarray:
    """The generalised Gaussian's log-density with its constant, for shape > 0."""
    constant = np.log(shape) + np.log(scale) / shape - np.log(2) - special.gammaln(1 / shape)
    return constant - scale * np.abs(distance) ** shape


def _row(
    name: str, prior: str, out: jax.Array, arrays: tuple[jax.Array, ...], log_prior: np.ndarray
) -> tuple[str, str, float, float, float]:
    error = float(np.max(np.abs(np.asarray(out, np.float64) - _attend(arrays, log_prior))))
    return name, prior, error, ROUNDING, error / ROUNDING


def _attend(arrays: tuple[jax.Array, ...], log_prior: np.ndarray) -> np.ndarray:
    """Causal attention in float64 NumPy: the product of content and prior, normalised."""
    query, key, value = (np.asarray(array, np.float64) for array in arrays)
    content = np.exp(np.einsum("tnh,snh->nts", query, key) / np.sqrt(WIDTH))
    joint = content * np.exp(log_prior) * np.tril(np.ones((LENGTH, LENGTH)))
    return np.einsum("nts,snd->tnd", joint / joint.sum(-1, keepdims=True), value)


def _arrays(key: Key | None) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0) if key is None else key, 3)
    return tuple(jax.random.normal(one, (LENGTH, HEADS, WIDTH)) for one in keys)


_evidence = partial(
    Evidence.of_ratios, "worst difference of an output, as a share of float32 rounding", COLUMNS
)


THEOREM = Theorem(
    id="position-priors",
    title="NoPE is the uniform prior, ALiBi the Laplace prior",
    statement=(
        r"For any positive $c(i)$, the log-priors $\log p(j \mid i)$ and $\log c(i) + \log p(j "
        r"\mid i)$ give the same attention. Hence attention without positional encoding has the "
        r"uniform prior over the admissible keys; ALiBi with slope $m$ has the prior "
        r"$\mathrm{Laplace}(0, 1/m)$, and both belong to the generalised Gaussians $p(j \mid i) "
        r"\propto e^{-\alpha|i-j|^\beta}$, at $\beta = 0$ and $\beta = 1$."
    ),
    assumptions=(
        "the constant left out may depend on the query, never on the key",
        "content and position enter the score as a sum",
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
        r"$c(i)$ multiplies numerator and denominator of row $i$ alike. A constant log-prior is a "
        r"uniform prior; $-m|i-j|$ is the log-density of a Laplace variable without its constant "
        r"$\log(m/2)$."
    ),
)
