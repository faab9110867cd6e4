r"""Which of the chosen tokens lie nearer to their sum than any other, and how likely that is.

Token i of the N chosen is separable if |a_i x_i - s| < |a_j x_j - s| for every j not chosen, where
s is the sum of the chosen a_i x_i. Squares expand to <x_j, s/|s|> < c_ij, and for x_j uniform on
the sphere S^{d-1}, independent of the rest, that has probability F_d(c_ij), the share of the sphere
on one side of a plane.
"""

from dataclasses import dataclass

import numpy as np

from theory.conditioning import unit_keys


def sphere_share(height: np.ndarray, width: int) -> np.ndarray:
    """F_d(c) = P(u_1 ≤ c) for u uniform on the unit sphere of R^d; 0 or 1 beyond it.

    Raises:
      ValueError: d < 2.
    """
    if width < 2:
        raise ValueError(f"width: a sphere needs 2 dimensions or more, got {width}.")
    angles = np.linspace(-np.pi / 2, np.pi / 2, 40_001)
    density = np.cos(angles) ** (width - 2)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return np.interp(np.arcsin(np.clip(height, -1, 1)), angles, below / below[-1])


@dataclass(frozen=True)
class Separation:
    """Of one draw of tokens: the shares separable and predicted, and the count's bound."""

    share: float
    predicted: float
    counted: float  # N_sep τ² / λ_max, which is 1 at most for equal weights


def separate(tokens: np.ndarray, weights: np.ndarray, chosen: int) -> Separation:
    """The first `chosen` tokens against the others.

    Raises:
      ValueError: none is chosen, or none is not.
    """
    if not 0 < chosen < len(tokens):
        raise ValueError(f"chosen: expected 1 to {len(tokens) - 1} tokens, got {chosen}.")
    scaled = weights[:, None] * tokens
    total = scaled[:chosen].sum(0)
    near = ((scaled - total) ** 2).sum(1)
    inside = near[:chosen] < near[chosen:].min()
    return Separation(
        float(inside.mean()),
        float(separation_odds(tokens, weights, chosen).mean()),
        _counted(tokens, total, chosen, int(inside.sum())),
    )


def separation_odds(tokens: np.ndarray, weights: np.ndarray, chosen: int) -> np.ndarray:
    """P(i is separable), given the chosen tokens, for each of them."""
    a, others = weights[:chosen, None], weights[chosen:]
    total = (a * tokens[:chosen]).sum(0)
    length = np.linalg.norm(total)
    height = (others**2 + 2 * a * (tokens[:chosen] @ total)[:, None] - a**2) / (2 * others * length)
    share = sphere_share(height, tokens.shape[1])
    return np.exp(np.log(np.maximum(share, 1e-300)).sum(1))


def draw_separations(
    rng: np.random.Generator, width: int, length: int, chosen: int, spread: float, draws: int
) -> list[Separation]:
    """Tokens uniform on the sphere, scores N(0, spread²), the largest of them chosen."""
    scores = np.sort(spread * rng.normal(size=length))[::-1]
    weights = np.exp(scores - scores[0])
    weights /= weights.sum()
    return [separate(unit_keys(rng, length, width), weights, chosen) for _ in range(draws)]


def _counted(tokens: np.ndarray, total: np.ndarray, chosen: int, inside: int) -> float:
    highest = float((tokens[chosen:] @ total).max() / np.linalg.norm(total))
    largest = np.linalg.norm(tokens[:chosen], 2) ** 2
    return inside * max(highest, 0.0) ** 2 / float(largest)
