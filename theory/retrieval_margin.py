r"""How much louder a far key must be, why small shapes extrapolate, and what log n buys.

A needle lies n keys back, its content score Δ above all others; the log-prior is -α r^β. It wins
at least half of the attention exactly when

    Δ  ≥  α n^β + log Z_n,      Z_n = Σ_{r < N, r ≠ n} e^(-α r^β),

the price of distance plus the price of the crowd. From training length L to cL the first grows by
α L^β (c^β - 1): linearly in c for ALiBi (β = 1), hardly at all for small β, not at all for NoPE (β
= 0), whose crowd however costs log N. A margin with slack σ at L reaches c ≈ (1 + σ / αL^β)^(1/β)
times as far. SSMax multiplies all scores by s log N; the same reckoning then leaves the price of
distance and caps that of the crowd at 1/s, whatever its size (Nakanishi, 2025). The prior and the
question are Bianchessi et al.'s (2025), the reckoning is ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.core.entry import Paper
from attnlab.positional.bam import bam_attention, bam_ssmax_attention
from theory.generalized_gaussian import log_prior, mass_brackets
from theory.theorem import Cell, Evidence, Key, Theorem, worst

TRAINED, BEYOND = 512, (1, 4, 16)
PRICE = 4.0  # nats that every prior takes off at the trained length, so that shapes compare fairly
SLACK = 3.0  # nats the model's margin has to spare there
COLUMNS = ("shape", "length", "margin needed", "lower", "upper", "with SSMax", "cap", "found")
ROUNDING = 1e-4  # nats: float32 attention read through a bisection


def check(key: Key | None = None) -> Evidence:
    """Bisect attention for the margin it takes, over shapes and lengths; the closed form beside."""
    del key  # nothing here is random
    rows = []
    for shape in (0.0, 0.25, 0.5, 1.0):
        scale = PRICE / TRAINED**shape
        margin = _margin(TRAINED, scale, shape) + SLACK
        for times in BEYOND:
            length = times * TRAINED
            found = _share(margin, length, scale, shape) >= 0.5
            rows.append(_row(shape, length, scale, found))
    return _evidence(
        rows, f"found: does the margin that sufficed at {TRAINED}, + {SLACK:g} nats, still win?"
    )


def counter_check(key: Key | None = None) -> Evidence:
    """Distractors that shout too: Gaussian scores, not bounded ones, cost some σ²/2 nats more."""
    key = jax.random.key(0) if key is None else key
    rows = []
    for times in BEYOND:
        length, scale = times * TRAINED, PRICE / TRAINED**0.25
        noise = np.asarray(2.0 * jax.random.normal(key, (length,)), np.float64)
        found = _share(margin_bounds(length, scale, 0.25)[1], length, scale, 0.25, noise) >= 0.5
        rows.append(_row(0.25, length, scale, found, noise))
    return _evidence(
        rows,
        "Gaussian distractors, σ = 2; found: does the margin of the theorem's bracket still win?",
    )


def margin_bounds(
    length: int, scale: float, shape: float, sharpness: float = 1.0
) -> tuple[float, float]:
    """Bounds on the margin of a needle at distance length - 1, all scores times `sharpness`."""
    price = -float(log_prior(length - 1, scale, shape))
    low, high = mass_brackets(0, length - 1, sharpness * scale, shape)
    return price + float(np.log(low)) / sharpness, price + float(np.log(high)) / sharpness


def _share(
    margin: float,
    length: int,
    scale: float,
    shape: float,
    noise: np.ndarray | None = None,
    ssmax: bool = False,
) -> float:
    """The attention that a needle at the far end of `length` keys gets, measured."""
    content = np.zeros(length) if noise is None else noise.copy()
    content[0] = margin
    last_row = _last_row_ssmax if ssmax else _last_row
    prior = jnp.float32(scale), jnp.float32(shape)
    return float(last_row(jnp.asarray(content, jnp.float32), *prior))


@jax.jit
def _last_row(
    content: Float[Array, " S"], scale: Float[Array, ""], shape: Float[Array, ""]
) -> Float[Array, ""]:
    """BAM's weight on the first of S keys, for the last query."""
    return bam_attention(**_call(content, scale, shape)).reshape(())


@jax.jit
def _last_row_ssmax(
    content: Float[Array, " S"], scale: Float[Array, ""], shape: Float[Array, ""]
) -> Float[Array, ""]:
    """The same, of scalable softmax with a length scale of one."""
    call = _call(content, scale, shape)
    return bam_ssmax_attention(length_scale=jnp.ones(1), **call).reshape(())


def _call(
    content: Float[Array, " S"], scale: Float[Array, ""], shape: Float[Array, ""]
) -> dict[str, Any]:
    return {
        "query": jnp.ones((1, 1, 1)),
        "key": content[:, None, None],
        "value": jnp.zeros((len(content), 1, 1)).at[0].set(1.0),
        "prior_scale": jnp.log(scale)[None],
        "prior_shape": shape[None],
        "eps": 0.0,
        "scale": 1.0,
        "query_offset": len(content) - 1,
    }


def _margin(
    length: int, scale: float, shape: float, noise: np.ndarray | None = None, ssmax: bool = False
) -> float:
    low, high = 0.0, 128.0
    while high - low > ROUNDING / 4:
        middle = (low + high) / 2
        if _share(middle, length, scale, shape, noise, ssmax) < 0.5:
            low = middle
        else:
            high = middle
    return high


def _row(
    shape: float, length: int, scale: float, found: bool, noise: np.ndarray | None = None
) -> tuple[Cell, ...]:
    needed = _margin(length, scale, shape, noise)
    low, high = margin_bounds(length, scale, shape)
    sharp = _margin(length, scale, shape, noise, ssmax=True)
    cap = -float(log_prior(length - 1, scale, shape)) + 1.0
    return (shape, length, needed, low, high, sharp, cap, found)


def _evidence(rows: list[tuple[Cell, ...]], note: str) -> Evidence:
    outside = []
    for _, _, needed, low, high, sharp, cap, _ in rows:
        beyond = float(needed) - float(high), float(low) - float(needed), float(sharp) - float(cap)
        outside.append((max(beyond),))
    return Evidence(
        quantity="nats by which a measured margin leaves its bracket, or SSMax's its cap",
        measured=worst(outside),
        bound=ROUNDING,
        columns=COLUMNS,
        rows=tuple(rows),
        note=note,
    )


THEOREM = Theorem(
    id="retrieval-margin",
    title="the margin a far key needs",
    statement=(
        r"Let all content scores be at most $0$ but the needle's, $\Delta$, at distance $n$, and "
        r"the log-prior $-\alpha r^\beta$. A margin $\Delta \ge \alpha n^\beta + \log Z_n$, $Z_n "
        r"= \sum_{r \ne n} e^{-\alpha r^\beta}$, gives the needle at least half of the attention, "
        r"and no less does when the distractors' scores are $0$. From length $L$ to $cL$ the "
        r"price of distance grows by $\alpha L^\beta (c^\beta - 1)$: the prior odds of the far "
        r"key fall by $e^{-\alpha((cL)^\beta - L^\beta)}$. With all scores multiplied by $s\log "
        r"n$ a margin $\Delta \ge \alpha n^\beta + 1/s$ suffices: the crowd has a fixed price."
    ),
    assumptions=(
        "the distractors' content scores are bounded: none above 0",
        "the needle's margin does not shrink with the length of the text",
        "the prior is centred on the query",
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
        r"The needle's weight is $1/(1+e^{-\Delta+\alpha n^\beta}Z_n)$ when the others' scores "
        r"are 0, and no less when they are below. It is one half where the exponent balances "
        r"$\log Z_n$. Multiplied scores cost $\alpha n^\beta + \log(Z'_n)/(s\log n)$, and $Z'_n "
        r"\le n$."
    ),
)
