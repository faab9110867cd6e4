"""Checks of a normalizer by itself."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.normalizers import Normalizer
from attnlab.testing.case import Case, float64, precision
from attnlab.testing.formula import Formula
from attnlab.testing.report import FAILED, NOTE, OK, Finding
from attnlab.testing.slopes import Slopes, Step, judge
from attnlab.testing.terms import at_pair, differences, listen

_METHODS = {"shared": "log_weight", "separate": "weight", "row": "row_weights"}


class NormalizerChecks:
    """One method to a finding."""

    def __init__(self, case: Case, allowed: np.ndarray) -> None:
        self.case, self.allowed = case, allowed
        self.wide, self.narrow = Formula(case), Formula(case, case.accumulator)
        self.scores = 2 * case.rng(2).standard_normal(case.shape)

    def apply(self, formula: Formula, scores: Any) -> Any:
        """What the method of its kind makes of scores, as a JAX function."""
        _, normalizer = formula.terms(formula.leaves())
        if normalizer.kind == "row":
            return normalizer.row_weights(scores, jnp.asarray(self.allowed))
        return getattr(normalizer, _METHODS[normalizer.kind])(scores)

    def _run(self, scores: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
        formula = self.wide if dtype == np.float64 else self.narrow
        with float64() if dtype == np.float64 else precision(dtype):
            out = jax.jit(lambda s: self.apply(formula, s))(scores.astype(dtype))
        return np.asarray(out).astype(np.float64)

    def output(self) -> Iterator[Finding]:
        """Its kind, the method that goes with it, and shape and dtype of what comes out."""
        normalizer: Normalizer = self.case.normalizer
        kind = getattr(normalizer, "kind", None)
        if kind not in _METHODS:
            words = f'kind is {kind!r}, expected "shared", "separate" or "row".'
            yield Finding("output", FAILED, words)
            return
        method = _METHODS[kind]
        if getattr(type(normalizer), method) is getattr(Normalizer, method):
            yield Finding("output", FAILED, f'a normalizer of kind "{kind}" defines {method}.')
            return
        dtype = self.case.accumulator
        with precision(dtype):
            given = jnp.asarray(self.scores.astype(dtype))
            out, heard = listen(lambda: self.apply(self.narrow, given))
            extra = self.narrow.terms(self.narrow.leaves())[1].log_extra()
        shape = getattr(out, "shape", None)
        if any("float64" in w for w in heard):
            words = f"{method} asks for float64; cast to score.dtype instead."
        elif shape != self.case.shape or out.dtype != dtype:
            words = (
                f"{method} makes {getattr(out, 'dtype', type(out).__name__)} of shape {shape} of "
                f"{dtype} scores {self.case.shape}; both should stay."
            )
        elif kind != "shared" and extra is not None:
            words = f'log_extra joins a sum, and kind "{kind}" has none; it would be ignored.'
        elif extra is not None and np.size(extra) not in (1, self.case.heads):
            words = f"log_extra has shape {np.shape(extra)}, expected a number, or one to a head."
        else:
            words = f'kind "{kind}": shape and {dtype} come out as they went in.'
            yield Finding("output", OK, words)
            return
        yield Finding("output", FAILED, words)

    def pairs(self) -> Iterator[Finding]:
        """Log-weights and weights depend on their own score alone; rows on what they may see."""
        base, rng = self._run(self.scores), self.case.rng(3)
        if self.case.normalizer.kind == "row":
            other = np.where(self.allowed, self.scores, rng.standard_normal(self.case.shape) * 9)
            gap = differences(self._run(other), base)
            leak = np.where(self.allowed, 0, base)
            if gap.max() > 1e-9:
                words = "hidden scores change the weights of others: use `allowed`."
                yield Finding("pairs", FAILED, words)
            elif np.abs(leak).max() > 0 or np.isnan(leak).any():
                yield Finding("pairs", FAILED, "gives weight to pairs that are not allowed.")
            else:
                yield Finding("pairs", OK, "hidden pairs get no weight and have no influence.")
            return
        gap, half = np.zeros(self.case.shape), rng.random(self.case.shape) < 0.5
        for moved in (half, ~half):
            found = differences(self._run(self.scores + 1.5 * moved), base)
            gap = np.maximum(gap, np.where(moved, 0, found))
        if gap.max() > 1e-12 * (1 + np.abs(base).max()):
            where = at_pair(self.case, np.unravel_index(np.argmax(gap), gap.shape))
            words = (
                f"what it makes of {where} changes with other pairs' scores. The sum over a row is "
                'attention\'s part; what needs the row itself is of kind "row".'
            )
            yield Finding("pairs", FAILED, words)
        else:
            yield Finding("pairs", OK, "each pair is weighed by its own score alone.")

    def extremes(self) -> Iterator[Finding]:
        """No NaN at scores of 0 and of 1e4 either way, and no weight at -inf."""
        kind, dtype = self.case.normalizer.kind, self.case.accumulator

        def pull(scores: Any) -> Any:
            out, back = jax.vjp(lambda s: self.apply(self.narrow, s), scores)
            return out, back(jnp.ones_like(out))[0]

        for size in (0.0, 1e4, -1e4):
            with precision(dtype):
                found = jax.jit(pull)(np.full(self.case.shape, size, dtype))
            for what, x in zip(("result", "derivative"), map(np.asarray, found), strict=True):
                bad = ~np.isfinite(x) & self.allowed
                if what == "result" and kind == "shared":
                    bad &= ~np.isneginf(x)
                if bad.any():
                    value = x[tuple(np.argwhere(bad)[0])]
                    words = f"for a score of {size:g} the {what} is {value}."
                    if kind == "shared":
                        words += " log_weight is a logarithm: never take it of what underflows."
                    yield Finding("extremes", FAILED, words)
                    return
        if kind == "separate":
            at_minus = self._run(np.full(self.case.shape, -np.inf), dtype)
            if not (at_minus == 0).all():
                words = f"the weight at -inf is {at_minus.flat[0]:g}, expected 0: hidden pairs."
                yield Finding("extremes", FAILED, words)
                return
        yield Finding("extremes", OK, "finite, with its derivative, at scores of 0 and ±10000.")

    def derivative(self) -> Iterator[Finding]:
        """Of log-weights and weights, pair by pair, against differences."""
        if self.case.normalizer.kind == "row":
            return
        with float64():
            given = jax.jit(
                lambda s: jax.vjp(lambda z: self.apply(self.wide, z), s)[1](jnp.ones_like(s))[0]
            )(self.scores)
        middle, step = self._run(self.scores), Step.of(None)
        ends = [self._run(self.scores + sign * step.size) for sign in (-1, 1)]
        slopes = Slopes(
            np.asarray(given), (middle - ends[0]) / step.size, (ends[1] - middle) / step.size
        )
        limit = step.tolerance * (1 + np.abs(slopes.central))
        bad = (slopes.error() > limit) & ~slopes.corner(limit)
        if not bad.any():
            yield Finding("derivative", OK, "agrees with differences.", "score")
            return
        worst = np.unravel_index(np.argmax(np.where(bad, slopes.error(), 0)), bad.shape)
        chosen = Slopes(*(np.asarray(x[worst]) for x in (slopes.given, slopes.left, slopes.right)))
        yield judge("derivative", "score", [chosen], [at_pair(self.case, worst)], 0.0, 0.0)

    def rows(self) -> Iterator[Finding]:
        """What the weights of a row sum to: worth knowing, no defect."""
        kind = self.case.normalizer.kind
        made = self._run(self.scores)
        extra = self.wide.terms(self.wide.leaves())[1].log_extra() if kind == "shared" else None
        if kind == "shared":
            words = "sum to one" if extra is None else "sum to less than one: log_extra joins them"
            yield Finding("row sums", OK, f"the weights of a row {words}.")
            return
        sums = np.where(self.allowed, made, 0).sum(-1)[self.allowed.any(-1)]
        if np.where(self.allowed, made, 0).min() < 0:
            yield Finding("row sums", NOTE, "some weights are negative.")
        if np.allclose(sums, 1, atol=1e-6):
            yield Finding("row sums", OK, "the weights of a row sum to one.")
        else:
            words = f"the weights of a row sum to between {sums.min():.3g} and {sums.max():.3g}."
            yield Finding("row sums", NOTE, words)
