"""Checks of score modifiers by themselves, before any attention is computed."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.scores import ScoreFunction, apply_modifiers
from attnlab.core.terms import Tile
from attnlab.core.tiles import pad_terms
from attnlab.testing.case import Case, float64, precision
from attnlab.testing.formula import Formula, everywhere
from attnlab.testing.report import FAILED, NOTE, OK, Finding
from attnlab.testing.slopes import Slopes, Step, judge, narrow_work
from attnlab.testing.terms import (
    at_pair,
    axes_of_many,
    check_tiles,
    differences,
    listen,
    restricted,
    sample,
)

_PADDING = 4


class ModifierChecks:
    """One method to a finding."""

    def __init__(self, case: Case, allowed: np.ndarray) -> None:
        self.case, self.allowed = case, allowed
        self.wide = Formula(case)
        self.narrow = Formula(case, case.accumulator)
        self.scores = 3 * case.rng(2).standard_normal(case.shape)
        self.names = [type(m).__name__ for m in case.modifiers]

    def _run(self, formula: Formula, scores: Any, leaves: list[Any] | None = None) -> np.ndarray:
        leaves = formula.leaves() if leaves is None else leaves
        with float64() if formula.dtype == np.float64 else precision(formula.dtype):
            out = formula.modified(scores.astype(formula.dtype), leaves)
        return np.broadcast_to(np.asarray(out), self.case.shape).astype(np.float64)

    def effect(self, scores: np.ndarray) -> np.ndarray:
        """What becomes of scores "*B N T S", in float64."""
        return self._run(self.wide, scores)

    def _eager(self, scores: np.ndarray) -> np.ndarray:
        with precision(self.case.accumulator):
            out = self.narrow.modify(jnp.asarray(scores), self.narrow.leaves())
        return np.broadcast_to(np.asarray(out), self.case.shape)

    def output(self) -> Iterator[Finding]:
        """Shape and dtype of what comes out are those of what goes in."""
        dtype = self.case.accumulator
        with precision(dtype):
            score: Any = jnp.asarray(self.scores.astype(dtype))
            modifiers, _ = self.narrow.terms(self.narrow.leaves())
            for name, modifier in zip(self.names, modifiers, strict=True):
                out, heard = listen(lambda m=modifier, s=score: m(s, everywhere(self.case)))
                asked = [w for w in heard if "float64" in w]
                shape = getattr(out, "shape", None)
                if not hasattr(out, "dtype") or shape is None:
                    words = f"returns {type(out).__name__}, expected an array of scores."
                elif asked:
                    words = (
                        "asks for float64, which no kernel computes in and JAX has switched off "
                        "unless told otherwise; cast to score.dtype instead."
                    )
                elif not _broadcasts(shape, score.shape):
                    words = f"returns shape {shape}, which does not fit scores {score.shape}."
                elif out.dtype != dtype:
                    words = (
                        f"returns {out.dtype} for scores of {dtype}; cast what joins the score by "
                        ".astype(score.dtype)."
                    )
                else:
                    score = jnp.broadcast_to(out, score.shape)
                    continue
                yield Finding("output", FAILED, words, name)
                return
        yield Finding(
            "output", OK, f"shape {self.case.shape} and {dtype} come out as they went in."
        )

    def transforms(self) -> Iterator[Finding]:
        """Compiled, mapped over a batch and called again: the same numbers."""
        dtype = self.case.accumulator
        scores = self.scores.astype(dtype)
        eager, again = self._eager(scores), self._eager(scores)
        limit = 32 * np.finfo(dtype).eps * (1 + _largest(eager))
        if differences(eager, again).max() > 0:
            words = "two calls with the same arrays differ: it draws random numbers or keeps state."
            yield Finding("transforms", FAILED, words, "called twice")
            return
        try:
            compiled = self._run(self.narrow, scores)
        except jax.errors.ConcretizationTypeError:
            words = (
                "cannot be compiled: it asks whether something is true, or how large, before it "
                "runs. Scores and positions are arrays: use jnp.where instead of if."
            )
            yield Finding("transforms", FAILED, words, "jit")
            return
        yield _same("transforms", "jit", compiled, eager, limit)
        leaves = self.narrow.leaves()
        stacked = [np.stack([x, x * 2]) if self._is_float(x) else np.stack([x, x]) for x in leaves]
        both = np.stack([scores, scores[..., ::-1]])
        with precision(dtype):
            mapped = np.asarray(jax.jit(jax.vmap(self.narrow.modify))(both, stacked))
        mapped = np.broadcast_to(mapped, (2, *self.case.shape))
        second = self._run(self.narrow, both[1], [x[1] for x in stacked])
        limit = 32 * np.finfo(dtype).eps * (1 + max(_largest(eager), _largest(second)))
        expected = np.stack([compiled, second])
        yield _same("transforms", "vmap", mapped, expected, limit)

    def pairs(self) -> Iterator[Finding]:
        """The score of a pair comes out the same whatever the scores of other pairs."""
        base = self._run(self.wide, self.scores)
        rng = self.case.rng(3)
        gap, half = np.zeros(self.case.shape), rng.random(self.case.shape) < 0.5
        for moved in (half, ~half):
            other = self.scores + np.where(moved, rng.standard_normal(self.case.shape), 0)
            found = np.where(moved, 0, differences(self._run(self.wide, other), base))
            gap = np.maximum(gap, found)
        if gap.max() > 1e-12 * (1 + _largest(base)):
            where = at_pair(self.case, np.unravel_index(np.argmax(gap), gap.shape))
            words = (
                f"the result at {where} changes by {gap.max():.3g} when only other pairs' scores "
                "change. A modifier sees one pair at a time; what needs a whole row (a mean, a "
                'maximum, a sum) is a normalizer of kind "row".'
            )
            yield Finding("pairs", FAILED, words)
        else:
            yield Finding("pairs", OK, "each score depends on its own pair alone.")

    def tiles(self) -> Iterator[Finding]:
        """The same on any tile as on the whole matrix."""
        whole = self._run(self.wide, self.scores)
        leaves = self.wide.leaves()

        def evaluate(tile: Tile) -> Any:
            part = jax.lax.dynamic_slice_in_dim(scores, tile.row, tile.rows, -2)
            part = jax.lax.dynamic_slice_in_dim(part, tile.col, tile.cols, -1)
            modifiers, _ = restricted(self.case.trained, leaves, tile)
            return apply_modifiers(modifiers, part, tile.at())

        with float64():
            scores = jnp.asarray(self.scores)
            allowance = 1e-5 if self.narrow_work() else 1e-11
            yield from check_tiles(self.case, whole, evaluate, allowance * (1 + _largest(whole)))

    def narrow_work(self) -> str | None:
        """What the modifier computes in less than float64 though the scores are float64."""
        with float64():
            return narrow_work(jax.make_jaxpr(self.wide.modify)(self.scores, self.wide.leaves()))

    def precision(self) -> Iterator[Finding]:
        """In the dtype of the accumulator against float64, pair by pair."""
        work = self.narrow_work()
        if work:
            words = (
                f"computes {work} even when scores are float64: for float64 inputs its result is "
                "no better than float32's. Cast to score.dtype instead of a dtype by name."
            )
            yield Finding("precision", NOTE, words)
        if self.case.accumulator == np.float64:
            return
        exact = self._run(self.wide, self.scores.astype(np.float32))
        gap = differences(self._run(self.narrow, self.scores.astype(np.float32)), exact)
        size = 1 + _largest(exact)
        eps = float(np.finfo(np.float32).eps)
        index = np.unravel_index(np.argmax(gap), gap.shape)
        words = f"float32 errs by {gap.max():.2g} against float64, in scores up to {size - 1:.3g}"
        if gap.max() <= 64 * eps * size:
            yield Finding("precision", OK, words + ".")
        else:
            status = NOTE if gap.max() <= 4096 * eps * size else FAILED
            words += f", the most at {at_pair(self.case, index)}: float32 cannot hold this formula."
            yield Finding("precision", status, words)

    def derivative(self) -> Iterator[Finding]:
        """Of the modifier itself, to the score and to each array, against differences."""
        step = Step.of(self.narrow_work())
        leaves, rng = self.wide.leaves(), self.case.rng(4)
        read = rng.standard_normal(self.case.shape)
        trained = [n for n, x in enumerate(self.case.leaves) if x.trainable]

        def read_out(scores: Any, chosen: list[Any], read: Any) -> Any:
            full = list(leaves)
            for n, x in zip(trained, chosen, strict=True):
                full[n] = x
            return jnp.broadcast_to(self.wide.modify(scores, full), self.case.shape)

        def pull(scores: Any, chosen: list[Any], read: Any) -> Any:
            out, back = jax.vjp(lambda s, c: read_out(s, c, read), scores, chosen)
            return out, back(jnp.ones_like(out))[0], back(read)[1]

        chosen = [leaves[n] for n in trained]
        with float64():
            out, by_score, by_leaf = jax.jit(pull)(self.scores, chosen, read)
        middle, by_score = np.asarray(out, np.float64), np.asarray(by_score)
        yield self._by_score(step, middle, by_score)
        finite = np.isfinite(middle)
        for place, (n, gradient) in enumerate(zip(trained, by_leaf, strict=True)):
            leaf = self.case.leaves[n]
            if n >= self._num_modifier_leaves():
                continue
            gradient = np.asarray(gradient)
            reach = self._reach(place, n, middle)
            size = step.size / max(1.0, reach)
            slopes, places = [], []
            for index in sample(rng, leaf.value.shape):
                ends = []
                for sign in (-1, 1):
                    moved = list(leaves)
                    moved[n] = leaves[n].copy()
                    moved[n][index] += sign * size
                    ends.append(self._run(self.wide, self.scores, moved))
                parts = [middle - ends[0], ends[1] - middle]
                left, right = (np.sum((read * p)[finite]) / size for p in parts)
                slopes.append(
                    Slopes(
                        np.asarray(gradient[index], np.float64), np.asarray(left), np.asarray(right)
                    )
                )
                places.append(f"{leaf.name}{list(map(int, index)) or ''}")
            scale = max(1.0, _largest(gradient), reach)
            limit = step.tolerance * scale * np.sqrt(read.size)
            yield judge("derivative", leaf.name, slopes, places, limit, _largest(gradient))

    def _num_modifier_leaves(self) -> int:
        return len(jax.tree.leaves(self.case.modifiers))

    def _reach(self, place: int, n: int, middle: np.ndarray) -> float:
        """How strongly scores answer to one array, so that steps and limits fit its size."""
        moved = self.wide.leaves()
        moved[n] = moved[n] + 1e-6
        gap = np.abs(self._run(self.wide, self.scores, moved) - middle)
        return float(np.max(gap[np.isfinite(gap)], initial=0)) / 1e-6

    def _by_score(self, step: Step, middle: np.ndarray, given: np.ndarray) -> Finding:
        ends = [self._run(self.wide, self.scores + sign * step.size) for sign in (-1, 1)]
        with np.errstate(invalid="ignore"):
            slopes = Slopes(given, (middle - ends[0]) / step.size, (ends[1] - middle) / step.size)
            size = 1 + np.abs(np.where(np.isfinite(slopes.central), slopes.central, 0))
            limit = step.tolerance * size + 1e-9 * _largest(middle)
            error = slopes.error()
            bad = (error > limit) & ~slopes.corner(limit)
        if not bad.any():
            words = f"agrees with differences to {np.where(error > limit, 0, error).max():.1g}."
            return Finding("derivative", OK, words, "score")
        worst = np.unravel_index(np.argmax(np.where(bad, error, 0)), error.shape)
        chosen = Slopes(*(np.asarray(x[worst]) for x in (slopes.given, slopes.left, slopes.right)))
        return judge("derivative", "score", [chosen], [at_pair(self.case, worst)], 0.0, 0.0)

    def extremes(self) -> Iterator[Finding]:
        """Finite, with a finite derivative, at scores of 0 and of 1e4 either way."""
        leaves, hides = self.narrow.leaves(), 0
        dtype = self.case.accumulator

        def pull(scores: Any) -> Any:
            out, back = jax.vjp(
                lambda s: jnp.broadcast_to(self.narrow.modify(s, leaves), self.case.shape), scores
            )
            return out, back(jnp.ones_like(out))[0]

        for size in (0.0, 1e4, -1e4):
            with precision(dtype):
                found = jax.jit(pull)(np.full(self.case.shape, size, dtype))
            value, slope = (np.asarray(x) for x in found)
            hides = max(hides, int(np.isneginf(value).sum()))
            for what, x in (("result", value), ("derivative", slope)):
                bad = ~np.isfinite(x) & self.allowed
                if what == "result":
                    bad &= ~np.isneginf(x)
                if bad.any():
                    index = tuple(np.argwhere(bad)[0])
                    words = (
                        f"for a score of {size:g} the {what} at {at_pair(self.case, index)}, which "
                        f"the mask shows, is {x[index]}; {int(bad.sum())} such pairs."
                    )
                    yield Finding("extremes", FAILED, words)
                    return
        yield Finding("extremes", OK, "finite, with its derivative, at scores of 0 and ±10000.")
        if hides:
            words = (
                f"hides {hides} pairs by -inf. It works; a Mask that says the same lets tiles that "
                "are hidden altogether be skipped."
            )
            yield Finding("extremes", NOTE, words)

    def masked_pairs(self) -> Iterator[Finding]:
        """What it makes of pairs that are hidden, or lie beyond the end, reaches no gradient."""
        case, dtype = self.case, self.case.accumulator
        rows, cols = (n + _PADDING for n in case.lengths)
        tags = axes_of_many(case.trained)
        widths = [(0, 0)] * (len(case.shape) - 2) + [(0, _PADDING)] * 2
        seen = np.pad(self.allowed, widths)
        scores = np.where(seen, np.pad(self.scores, widths), 0).astype(dtype)
        read = np.where(seen, case.rng(5).standard_normal(seen.shape), 0).astype(dtype)
        leaves = self.narrow.leaves()
        trained = [n for n, x in enumerate(case.leaves) if x.trainable]

        def pull(scores: Any, chosen: list[Any]) -> Any:
            def apply(scores: Any, chosen: list[Any]) -> Any:
                full = list(leaves)
                for n, x in zip(trained, chosen, strict=True):
                    full[n] = x
                terms = pad_terms(case.with_leaves(full), tags, _PADDING, _PADDING)
                tile = case.tile(0, 0, rows, cols)
                modifiers, _ = restricted(terms, jax.tree.leaves(terms), tile)
                return apply_modifiers(modifiers, scores, tile.at())

            out, back = jax.vjp(apply, scores, chosen)
            return out, *back(read)

        with precision(dtype):
            out, by_score, by_leaf = jax.jit(pull)(scores, [leaves[n] for n in trained])
        bad = np.isnan(np.asarray(out)) & ~seen
        hurt = [
            case.leaves[n].name
            for n, g in zip(trained, by_leaf, strict=True)
            if not np.isfinite(np.asarray(g)).all()
        ]
        if not np.isfinite(np.where(seen, by_score, 0)).all():
            hurt.insert(0, "the score")
        hidden = int((~seen).sum())
        if hurt:
            words = "finite values there, but derivatives that are not,"
            if bad.any():
                index = tuple(np.argwhere(bad)[0])
                words = f"NaN at {bad.sum()} of them, first at {at_pair(case, index)},"
            words = (
                f"of {hidden} pairs that are hidden or padding: {words} make the gradient of "
                f"{', '.join(hurt)} NaN, for 0 times NaN is NaN. Give the function a harmless "
                "argument there: jnp.log(jnp.where(distance > 0, distance, 1))."
            )
            yield Finding("masked pairs", FAILED, words)
        elif bad.any():
            words = f"NaN at {int(bad.sum())} pairs that are hidden or padding; it stays there."
            yield Finding("masked pairs", NOTE, words)
        else:
            words = f"harmless at {hidden} pairs that are hidden or padding beyond the end."
            yield Finding("masked pairs", OK, words)

    def additive(self) -> Iterator[Finding]:
        """Whether it adds what does not depend on the score, and says so."""
        with float64():
            modifiers, _ = self.wide.terms(self.wide.leaves())
            for name, modifier in zip(self.names, modifiers, strict=True):
                shifts = []
                for scores in (self.scores, -self.scores + 1):
                    given = jnp.asarray(scores)
                    out = jnp.broadcast_to(modifier(given, everywhere(self.case)), given.shape)
                    shifts.append(np.asarray(out).astype(np.float64) - scores)
                gap = differences(*shifts)
                index = np.unravel_index(np.argmax(gap), gap.shape)
                adds = gap.max() <= 1e-5 * (1 + _largest(shifts[0]))
                if modifier.additive and not adds:
                    first, second = (s[index] for s in shifts)
                    words = (
                        f"says it is additive, but at {at_pair(self.case, index)} it adds "
                        f"{first:.4g} to one score and {second:.4g} to another; remove "
                        "`additive = True`, or implementations that only add a bias err."
                    )
                    yield Finding("additive", FAILED, words, name)
                elif adds and not modifier.additive and not isinstance(modifier, ScoreFunction):
                    words = (
                        "adds something that does not depend on the score: declaring "
                        "`additive: ClassVar[bool] = True` lets JAX's own attention serve it too."
                    )
                    yield Finding("additive", NOTE, words, name)
                else:
                    words = "adds" if adds else "changes scores in a way that depends on them"
                    yield Finding("additive", OK, words + ", as it says.", name)

    @staticmethod
    def _is_float(x: Any) -> bool:
        return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def _same(name: str, subject: str, a: np.ndarray, b: np.ndarray, limit: Any) -> Finding:
    gap = float(differences(a, b).max())
    if gap <= limit:
        return Finding(name, OK, f"the same numbers to {gap:.1g}.", subject)
    return Finding(name, FAILED, f"differs by {gap:.3g}, allowed {limit:.2g}.", subject)


def _largest(x: Any) -> float:
    x = np.abs(np.asarray(x).astype(np.float64))
    return float(np.max(x[np.isfinite(x)], initial=0))
