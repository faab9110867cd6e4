r"""What the shape of a generalised-Gaussian prior does to its tail: below 1 it never closes.

With log prior -α r^β over distances 0 … n - 1, the mass beyond a distance R,

    T(R) = Σ_{R < r < n} e^(-α r^β) / Σ_{r < n} e^(-α r^β),

lies between two ratios of incomplete gamma functions (a decreasing sum lies between two
integrals), and the factor the prior loses per step, e^(-α ((r+1)^β - r^β)), rises to 1 when β < 1,
stays e^(-α) when β = 1 and falls to 0 when β > 1. So ALiBi is local attention with a soft edge,
T(R) ≤ e^(-α (R+1)) however long the text, while a prior of shape below one keeps a share for the
far past, and shape 0 (NoPE) keeps all of it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.core.entry import Paper
from attnlab.positional.bam import bam_attention
from theory.generalized_gaussian import log_prior, mass_brackets
from theory.theorem import Cell, Evidence, Key, Theorem

CONTEXT = 8192
SHAPES = (0.0, 0.25, 0.5, 1.0, 2.0)
DISTANCES = (16, 64, 256, 1024)
HALF = 16  # every prior is scaled to have fallen by a factor e at this distance
COLUMNS = ("shape", "distance", "measured tail", "lower", "upper", "per-step factor", "share")


def tail_mass(distance: int, scale: float, shape: float, mode: int = 0) -> float:
    """Attention's weight beyond `distance`, when the content of all keys is alike."""
    away = np.arange(CONTEXT - 1, -1, -1)
    far = jnp.asarray(away > distance, jnp.float32)[:, None, None]
    return float(_last_row(far, *map(jnp.float32, (scale, shape, mode))).reshape(()))


@jax.jit
def _last_row(
    values: Float[Array, "S 1 1"],
    scale: Float[Array, ""],
    shape: Float[Array, ""],
    mode: Float[Array, ""],
) -> Float[Array, "1 1 1"]:
    """BAM for the last of S queries, with content that says nothing."""
    silent = jnp.zeros_like(values)
    return bam_attention(
        silent[:1],
        silent,
        values,
        prior_scale=jnp.log(scale)[None],
        prior_shape=shape[None],
        prior_loc=-jnp.arcsinh(mode / 2)[None],  # BAM's location is 2 sinh(loc), before the query
        eps=0.0,
        query_offset=len(values) - 1,
    )


def tail_bounds(distance: int, scale: float, shape: float) -> tuple[float, float]:
    """Lower and upper bound on the tail, from incomplete gamma functions."""
    low, high = mass_brackets(distance + 1, CONTEXT, scale, shape)
    near_low, near_high = mass_brackets(0, distance + 1, scale, shape)
    return low / (low + near_high), high / (high + near_low)


def check(key: Key | None = None) -> Evidence:
    """Five shapes, four distances: the measured tail against its bracket."""
    del key  # nothing here is random
    rows = [_row(shape, distance, HALF**-shape) for shape in SHAPES for distance in DISTANCES]
    return _evidence(rows, f"all shapes scaled to fall by e at distance {HALF}; {CONTEXT} keys")


def counter_check(key: Key | None = None) -> Evidence:
    """A prior that does not decrease: its mode, BAM's location, is put in the past."""
    del key
    rows = [_row(1.0, distance, 1 / HALF, mode=200) for distance in DISTANCES]
    return _evidence(
        rows, "Laplace prior centred 200 keys back, read as if it were centred on the query"
    )


def _row(shape: float, distance: int, scale: float, mode: int = 0) -> tuple[Cell, ...]:
    low, high = tail_bounds(distance, scale, shape)
    measured = tail_mass(distance, scale, shape, mode)
    # float32 sums round, and its smallest numbers underflow: a relative and an absolute grain.
    rounding = 64 * float(np.finfo(np.float32).eps)
    floor = float(np.finfo(np.float32).tiny)
    share = max(
        measured / (high * (1 + rounding) + floor),
        (low * (1 - rounding) - floor) / (measured + floor),
    )
    step = float(np.exp(log_prior(distance + 1, scale, shape) - log_prior(distance, scale, shape)))
    return (shape, distance, measured, low, high, step, share)


_evidence = partial(
    Evidence.of_ratios, "worst ratio to the bracket (measured/upper, lower/measured)", COLUMNS
)


THEOREM = Theorem(
    id="prior-tail",
    title="the shape is the tail",
    statement=(
        r"Let $\log p(r) = -\alpha r^\beta$ over $0 \le r < n$, $G(a, b) = \int_a^b e^{-\alpha "
        r"r^\beta}\,dr = \frac{\Gamma(1/\beta,\,\alpha a^\beta) - \Gamma(1/\beta,\,\alpha "
        r"b^\beta)}{\beta\,\alpha^{1/\beta}}$. The mass beyond $R$ is $F/(F+N)$ with far mass $F "
        r"\in [G(R{+}1, n),\; p(R{+}1)+G(R{+}1, n{-}1)]$ and near mass $N \in [G(0, R{+}1),\; "
        r"1+G(0, R)]$. Per step the prior keeps the factor $e^{-\alpha((r+1)^\beta - r^\beta)}$, "
        r"which tends to $1$, $e^{-\alpha}$ or $0$ as $\beta <, =, > 1$."
    ),
    assumptions=(
        r"the prior is centred on the query (location 0), so that it decreases with distance",
        "the content says nothing: all content scores are equal",
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
        r"For decreasing $f$, $\int_a^{b} f \le \sum_{r=a}^{b-1} f(r) \le f(a) + \int_a^{b-1} f$. "
        r"Substitute $u = \alpha r^\beta$ for the gamma functions; $(r+1)^\beta - r^\beta \to 0, "
        r"1, \infty$ gives the factor."
    ),
)
