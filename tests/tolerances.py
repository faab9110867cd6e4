"""One table of tolerances, in units of the dtype's own rounding, and the derived error budget.

An error is measured against the size of the whole array it belongs to (its largest entry):
rounding in a sum is proportional to what was added, not to what was left over. Nothing here is
widened by the machine, the environment or a test; a test that needs more has found something.
"""

import ml_dtypes
import numpy as np

# How many roundings of its dtype a result may be away from the float64 oracle. Each
# derivative passes through the softmax once more.
ROUNDINGS = {
    "float64": {"value": 256, "gradient": 1024, "second": 4096},
    "float32": {"value": 64, "gradient": 256, "second": 1024},
    "bfloat16": {"value": 4, "gradient": 8, "second": 16},
    "float16": {"value": 4, "gradient": 8, "second": 16},
}

# A gradient in the oracle is a central difference in float64: this is what the difference itself
# errs with the steps of `oracles.directional` and `oracles.curvature`.
DIFFERENCE = {"gradient": 2e-7, "second": 2e-5}

# Two orders of the same sum (jit and eager, batch and vmap, decode and prefill) may differ by this
# many roundings.
REORDERED = 16

# The derived budget: an implementation may err against float64 by at most this multiple of what the
# plain formula errs, step by step in the same dtype on the same inputs ...
BUDGET_MULTIPLE = 4.0
# ... or by this many roundings of the result, where the plain formula happens to be exact.
BUDGET_FLOOR = 2.0

# Compiled temporaries when n grows fourfold: linear memory may grow by at most this factor;
# quadratic memory grows by 16.
LINEAR_GROWTH = 5.0

_EPSILON = {
    "float64": float(np.finfo(np.float64).eps),
    "float32": float(np.finfo(np.float32).eps),
    "bfloat16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps),
    "float16": float(np.finfo(np.float16).eps),
}


def epsilon(dtype) -> float:
    return _EPSILON[np.dtype(dtype).name]


def as_float64(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def largest(array) -> float:
    array = as_float64(array)
    return float(np.max(np.abs(array))) if array.size else 0.0


def error(actual, expected) -> float:
    """The largest absolute error; infinite where only one is finite, or they are not alike."""
    actual, expected = as_float64(actual), as_float64(expected)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape}, expected {expected.shape}")
    if not actual.size:
        return 0.0
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(actual - expected))
    return float(np.max(np.where(np.isfinite(gap), gap, np.inf)))


def assert_close(actual, expected, dtype, kind="value", *, scale=None, words="result"):
    """`actual`, computed in `dtype`, is the float64 `expected` up to the table."""
    name = np.dtype(dtype).name
    finite = as_float64(expected)
    finite = finite[np.isfinite(finite)]
    scale = max(1.0, largest(finite)) if scale is None else scale
    allowed = scale * (ROUNDINGS[name][kind] * _EPSILON[name] + DIFFERENCE.get(kind, 0.0))
    found = error(actual, expected)
    assert found <= allowed, f"{words}: off by {found:.3g}, allowed {allowed:.3g} ({name} {kind})"


def assert_reordered(actual, expected, dtype, *, scale=None, words="result"):
    """The same numbers summed in another order."""
    scale = max(1.0, largest(expected)) if scale is None else scale
    allowed = REORDERED * epsilon(dtype) * scale
    found = error(actual, expected)
    assert found <= allowed, f"{words}: differs by {found:.3g}, allowed {allowed:.3g}"


def budget(exact, plain, dtype) -> float:
    """What an implementation may err, from what the plain formula errs in the same dtype."""
    plain_error = error(plain, exact)
    return BUDGET_MULTIPLE * plain_error + BUDGET_FLOOR * epsilon(dtype) * largest(exact)


def assert_within_budget(actual, exact, plain, dtype, *, words="result"):
    allowed, found = budget(exact, plain, dtype), error(actual, exact)
    assert np.all(np.isfinite(as_float64(actual))), f"{words}: not finite"
    assert found <= allowed, (
        f"{words}: errs by {found:.3g} against float64; the plain formula in "
        f"{np.dtype(dtype).name} errs by {error(plain, exact):.3g}, so {allowed:.3g} is allowed"
    )
