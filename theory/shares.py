"""Three ways to put a measured number beside a promised one; each is at most 1 where it is kept."""

import numpy as np

Number = float | int | np.floating

SIGMAS = 5.0  # standard errors a mean may stray from what is predicted
ROUNDING = 1e-12  # float64 sums, relative: where a bound is met with equality


def at_most(measured: Number, bound: Number) -> float:
    """What was measured as a share of an upper bound."""
    return float(measured) / (float(bound) * (1 + ROUNDING))


def at_least(measured: Number, bound: Number) -> float:
    """A lower bound as a share of what was measured; a bound of nothing promises nothing."""
    return float(bound) / (float(measured) * (1 + ROUNDING)) if bound > 0 else 0.0


def on_average(measured: Number, exact: Number, error: Number) -> float:
    """How far a mean is from its prediction, as a share of SIGMAS standard errors."""
    return abs(float(measured) - float(exact)) / (SIGMAS * float(error))
