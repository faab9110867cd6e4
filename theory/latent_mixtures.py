r"""Steps of expectation maximisation that are attention: for an unknown query, for unknown keys.

    z' = Σ_j p_j k_j,  p = softmax(β K z + b)           μ_i' = Σ_j r_ji x_j / Σ_j r_ji

the first a Hopfield network's, the second that of slot attention without its projections, gate and
network: r is a softmax over the slots.
"""

import numpy as np


def retrieve(z: np.ndarray, keys: np.ndarray, beta: float, bias: np.ndarray) -> np.ndarray:
    """One step for an unknown query: the mean of the keys under softmax(β K z + bias)."""
    return softmax(beta * keys @ z + bias) @ keys


def energy(z: np.ndarray, keys: np.ndarray, beta: float, bias: np.ndarray) -> float:
    """E(z) = |z|²/2 - log Σ_j e^(β k_j·z + bias_j) / β."""
    return float(z @ z / 2 - log_sum_exp(beta * keys @ z + bias) / beta)


def assign(tokens: np.ndarray, slots: np.ndarray, variance: float, axis: int = 1) -> np.ndarray:
    """Responsibilities "tokens slots", a softmax over the slots (axis 1) or the tokens (0).

    Raises:
      ValueError: the variance is not positive.
    """
    if variance <= 0:
        raise ValueError(f"variance: expected a positive number, got {variance}.")
    return softmax(_log_density(tokens, slots, variance), axis)


def refine(tokens: np.ndarray, slots: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Each slot moves to the mean of its tokens; one that has none stays where it is."""
    mass = shares.sum(0)[:, None]
    return np.where(mass > 0, shares.T @ tokens / np.where(mass > 0, mass, 1.0), slots)


def log_likelihood(tokens: np.ndarray, slots: np.ndarray, variance: float) -> float:
    """Of the mixture of slots with equal shares, without its constants."""
    return float(log_sum_exp(_log_density(tokens, slots, variance)).sum())


def _log_density(tokens: np.ndarray, slots: np.ndarray, variance: float) -> np.ndarray:
    return -((tokens[:, None] - slots[None]) ** 2).sum(-1) / (2 * variance)


def softmax(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Along an axis."""
    p = np.exp(scores - scores.max(axis, keepdims=True))
    return p / p.sum(axis, keepdims=True)


def log_sum_exp(scores: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    top = scores.max(-1)
    return np.asarray(top + np.log(np.exp(scores - top[..., None]).sum(-1)))
