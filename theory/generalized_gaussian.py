r"""The generalised-Gaussian prior over distance and its tail in closed form, for two theorems.

    log prior(r) = -α r^β + constant,   r = 0, 1, 2, … the distance of a key behind its query

β = 2 is a Gaussian, β = 1 a Laplace prior (ALiBi), β = 0 no prior at all (NoPE). In the continuous
limit

    G(x) = ∫_x^∞ e^(-α r^β) dr = Γ(1/β, α x^β) / (β α^(1/β))
"""

import numpy as np
from scipy import special


def log_prior(distance: int | np.ndarray, scale: float, shape: float) -> np.ndarray:
    """-α r^β, with 0^0 read as 1 so that shape 0 is flat."""
    return np.asarray(-scale * np.power(np.asarray(distance, np.float64), shape))


def tail_integral(start: int, scale: float, shape: float) -> float:
    """G(start), for shape > 0."""
    if not (scale > 0 and shape > 0):
        raise ValueError(f"tail_integral: needs scale > 0 and shape > 0, got {scale=}, {shape=}.")
    whole = special.gamma(1 / shape) / (shape * scale ** (1 / shape))
    return float(whole * special.gammaincc(1 / shape, scale * start**shape))


def mass_brackets(first: int, end: int, scale: float, shape: float) -> tuple[float, float]:
    """Bounds on Σ e^(-α r^β) over first <= r < end: a decreasing sum lies between two integrals."""
    if shape == 0:
        mass = (end - first) * float(np.exp(-scale))
        return mass, mass

    def between(a: int, b: int) -> float:
        return tail_integral(a, scale, shape) - tail_integral(b, scale, shape)

    head = float(np.exp(log_prior(first, scale, shape)))
    return between(first, end), head + between(first, end - 1)
