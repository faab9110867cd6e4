r"""Functions of the angle on the sphere S^(d-1), degree by degree, and those of the sign.

    P_l(1) = 1,  (l+d-3) P_l(t) = (2l+d-4) t P_{l-1}(t) - (l-1) P_{l-2}(t)      Gegenbauer, scaled
    sgn(x·y) = Σ_{l odd} m_l Σ_m Y_lm(x) Y_lm(y),     m_l = (2 c_d / (d-1)) P^{(d+2)}_{l-1}(0)

N(d, l) harmonics have degree l, c_d is the density of x·y at 0, and E_l = N(d, l) m_l² is the part
of the sign's square at degree l: these sum to one.
"""

import math

import numpy as np


def harmonics(width: int, degree: int) -> int:
    """N(d, l) = C(d+l-1, l) - C(d+l-3, l-2), the dimension of degree l."""
    lower = math.comb(width + degree - 3, degree - 2) if degree >= 2 else 0
    return math.comb(width + degree - 1, degree) - lower


def density(width: int) -> float:
    """c_d = Γ(d/2) / (√π Γ((d-1)/2)), at 0; elsewhere c_d (1-t²)^((d-3)/2).

    Raises:
      ValueError: d < 3, where the density has its maximum elsewhere.
    """
    if width < 3:
        raise ValueError(f"width: expected 3 or more, got {width}.")
    return math.exp(math.lgamma(width / 2) - math.lgamma((width - 1) / 2)) / math.sqrt(math.pi)


def polynomials(width: int, degree: int, t: np.ndarray) -> np.ndarray:
    """P_0 to P_degree at t, degrees first."""
    found = [np.ones_like(t), np.asarray(t)]
    for at in range(2, degree + 1):
        new = (2 * at + width - 4) * t * found[-1] - (at - 1) * found[-2]
        found.append(new / (at + width - 3))
    return np.stack(found[: degree + 1])


def sign_parts(width: int, degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Odd degrees up to `degree`, and of each the m_l and N(d, l)."""
    odd = np.arange(1, degree + 1, 2)
    at_zero = polynomials(width + 2, degree, np.zeros(()))[odd - 1]
    count = np.array([harmonics(width, int(at)) for at in odd], np.float64)
    return odd, 2 * density(width) / (width - 1) * at_zero, count


def mean_over_angle(width: int, values: np.ndarray, nodes: np.ndarray, mass: np.ndarray) -> float:
    """E of an even function of t = x·y, from its values at the nodes of `angles`."""
    return float(2 * density(width) * (mass * (1 - nodes**2) ** ((width - 3) / 2)) @ values)


def angles(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for integrals over t in (0, 1), crowded at 0: Gauss's after t = u²."""
    u, mass = np.polynomial.legendre.leggauss(count)
    u, mass = (u + 1) / 2, mass / 2
    return u**2, 2 * u * mass
