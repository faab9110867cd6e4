"""Derivatives against differences in float64, with a word for corners."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnlab.testing.report import FAILED, NOTE, OK, Finding
from attnlab.testing.terms import equations


@dataclasses.dataclass(frozen=True)
class Step:
    """How far to step, and how far a derivative may be from the difference, relative to size."""

    size: float
    tolerance: float

    @classmethod
    def of(cls, narrow: str | None) -> "Step":
        """Where the user's code rounds to float32, a small step would measure the rounding."""
        return cls(1e-5, 2e-6) if narrow is None else cls(1e-2, 2e-2)


def narrow_work(jaxpr: Any) -> str | None:
    """The first operation that computes in less than float64 although its operands allow more."""
    for equation in equations(jaxpr):
        if equation.primitive.name in ("pjit", "jit", "custom_jvp_call", "custom_vjp_call"):
            continue
        for out in equation.outvars:
            dtype = getattr(out.aval, "dtype", None)
            if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or dtype == jnp.float64:
                continue
            inputs = [getattr(v.aval, "dtype", None) for v in equation.invars]
            exact = not any(d is not None and jnp.issubdtype(d, jnp.floating) for d in inputs)
            moves = equation.primitive.name in ("broadcast_in_dim", "reshape", "squeeze", "slice")
            if not (exact and equation.primitive.name == "convert_element_type") and not moves:
                return f"{equation.primitive.name} in {dtype}"
    return None


@dataclasses.dataclass(frozen=True)
class Slopes:
    """Left, right and central differences of a number, and the derivative that JAX gives."""

    given: Any
    left: Any
    right: Any

    @property
    def central(self) -> Any:
        return (self.left + self.right) / 2

    def error(self) -> Any:
        """Of the derivative against the central difference, infinite where it is not finite."""
        gap = np.abs(self.given - self.central)
        gap = np.where(np.isfinite(self.central), gap, 0)
        return np.where(np.isfinite(self.given), gap, np.inf)

    def corner(self, allowed: Any) -> Any:
        """Where the slope jumps and the derivative lies between the two sides: a fair choice."""
        low, high = np.minimum(self.left, self.right), np.maximum(self.left, self.right)
        inside = (self.given >= low - allowed) & (self.given <= high + allowed)
        return inside & (high - low > allowed)


def difference(
    function: Callable[[float], float], middle: float, step: float, given: float
) -> Slopes:
    """Slopes of `function` at zero, where it is `middle`."""
    left = (middle - function(-step)) / step
    right = (function(step) - middle) / step
    return Slopes(*(np.asarray(x, np.float64) for x in (given, left, right)))


def judge(
    name: str, subject: str, slopes: list[Slopes], places: list[str], allowed: float, scale: float
) -> Finding:
    """One finding on the derivatives of one array."""
    worst, corners = 0.0, 0
    for slope, place in zip(slopes, places, strict=True):
        error = float(slope.error())
        if error <= allowed:
            worst = max(worst, error)
            continue
        if bool(slope.corner(allowed)):
            corners += 1
            continue
        given, true = float(slope.given), float(slope.central)
        words = f"the derivative at {place} is {given:.6g}, the slope there {true:.6g}"
        if given == 0:
            words += (
                ": nothing of it arrives. Rounding, a comparison, a cast to integers or a "
                "stop_gradient stands in the way, or a custom rule drops it."
            )
        elif not np.isfinite(given):
            words += ": a square root or logarithm at its edge, behind a where, does this."
        else:
            words += ": a custom derivative rule is wrong, or the function is not smooth there."
        return Finding(name, FAILED, words, subject)
    words = f"{len(slopes)} entries agree with differences to {worst:.1g} (largest {scale:.2g})."
    if corners:
        words = f"{corners} of {len(slopes)} entries lie on a corner; " + words
    return Finding(name, NOTE if corners else OK, words, subject)
