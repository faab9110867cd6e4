"""Checks of attention with the user's terms in it, on every implementation that can run."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import attention as front
from attnlab.core.kernels import interpret
from attnlab.core.masks import Mask
from attnlab.testing.case import Case, float64, precision
from attnlab.testing.formula import Formula
from attnlab.testing.report import FAILED, NOTE, OK, SKIPPED, Collector, Finding
from attnlab.testing.slopes import Step, difference, judge
from attnlab.testing.terms import differences, sample

# Small tiles, of odd sizes where they may be, so that there are several and the last are ragged.
_TILES = {"blockwise": (5, 7), "triton": (16, 16), "tpu": (16, 16), "mosaic_gpu": (64, 64)}
_INPUTS = ("query", "key", "value")

# Those of other libraries, which have no gradient of the log-sum-exp: asked for the output alone.
_OUTPUT_ALONE = ("xla", "cudnn", "tokamax")


def context_for(implementation: str) -> Any:
    """How an implementation is run here: as it is, or else interpreted.

    Raises:
      ValueError: there is no such implementation.
      NotImplementedError: it can be run neither way.
    """
    if implementation not in front.IMPLEMENTATIONS:
        raise ValueError(
            f"implementations: expected some of {', '.join(front.IMPLEMENTATIONS)}, "
            f"got {implementation!r}."
        )
    missing = front.availability().get(implementation)
    if missing is None:
        return contextlib.nullcontext()
    with interpret():
        if front.availability().get(implementation) is None:
            return interpret()
    raise NotImplementedError(missing)


class AttentionChecks:
    """Attention of one case against the formula; gradients, forward mode, NaN, batches."""

    def __init__(self, case: Case, allowed: np.ndarray, narrow: str | None = None) -> None:
        self.case, self.allowed = case, allowed
        self.step = Step.of(narrow)
        self.formula = Formula(case)
        self.inputs = (case.query, case.key, case.value)
        self.leaves = self.formula.leaves()
        self.trained = [n for n, x in enumerate(case.leaves) if x.trainable]
        self.shared = case.normalizer.kind == "shared"
        self.out, self.lse = self.formula.attention(*self.inputs, allowed, self.leaves)
        rng = case.rng(6)
        self.read = rng.standard_normal(self.out.shape)
        self.read_lse = np.zeros(self.out.shape[:-1])
        if self.lse is not None:
            drawn = rng.standard_normal(self.lse.shape)
            self.read_lse = np.where(np.isfinite(self.lse), drawn, 0)
        self.compiled: dict[Any, Any] = {}
        self.exact: list[np.ndarray] | None = None
        self.reach = [1.0] * (3 + len(self.trained))

    @property
    def names(self) -> list[str]:
        """Of everything that has a gradient."""
        return [*_INPUTS, *(self.case.leaves[n].name for n in self.trained)]

    def everything(self, collector: Collector, implementations: Sequence[str] | None) -> None:
        """All checks on all implementations, or on those named."""
        names = front.IMPLEMENTATIONS if implementations is None else tuple(implementations)
        collector.run("gradient", self.slopes, "float64")
        for name in names:
            before = len(collector.findings)
            collector.run("agreement", lambda n=name: self.compare(n), name)
            if not any(f.status == SKIPPED for f in collector.findings[before:]):
                collector.run("masked NaN", lambda n=name: self.poison(n), name)
        plain = [n for n in ("reference", "blockwise") if n in names]
        if self.case.normalizer.kind == "row":
            plain = plain[:1]
        collector.run("forward mode", lambda: self.forward_mode(plain))
        collector.run("transforms", self.batched, "vmap of attention")

    # -- running -----------------------------------------------------------------------------------

    def attend(
        self, implementation: str, inputs: Any, leaves: Any, mask: Mask | None = None
    ) -> tuple[Any, Any]:
        """Output and log-sum-exp (None where there is none)."""
        return_lse = self.shared and implementation not in _OUTPUT_ALONE
        modifiers, normalizer = self.case.with_leaves(leaves)
        out = front.attention(
            *inputs,
            mask=self.case.mask if mask is None else mask,
            modifiers=modifiers,
            normalizer=normalizer,
            implementation=implementation,
            return_lse=return_lse,
            block_sizes=_TILES.get(implementation),
        )
        return out if return_lse else (out, None)

    def _full(self, chosen: Any) -> list[Any]:
        full: list[Any] = list(self.leaves)
        for n, x in zip(self.trained, chosen, strict=True):
            full[n] = x
        return full

    def run(
        self, implementation: str, dtype: Any, inputs: Any, read: Any, read_lse: Any
    ) -> tuple[np.ndarray, Any, list[np.ndarray]]:
        """Output, log-sum-exp and gradients of <out, read> + <lse, read_lse>, in float64 NumPy."""

        def value(inputs: Any, chosen: Any) -> tuple[Any, Any]:
            return self.attend(implementation, inputs, self._full(chosen))

        def both(inputs: Any, chosen: Any, read: Any, read_lse: Any) -> Any:
            (out, lse), pull = jax.vjp(value, inputs, chosen)
            cotangent = (
                read.astype(out.dtype),
                None if lse is None else read_lse.astype(lse.dtype),
            )
            return out, lse, pull(cotangent)

        wide = np.dtype(dtype) == np.float64
        # JAX's own attention mixes dtypes, which a caller may have forbidden.
        promotion: Any = contextlib.nullcontext()
        if implementation in _OUTPUT_ALONE:
            promotion = jax.numpy_dtype_promotion("standard")
        with context_for(implementation), float64() if wide else precision(dtype), promotion:
            # On TPUs products of float32 are rounded to bfloat16 unless told otherwise.
            exact = jax.default_matmul_precision("highest")
            compiled = self.compiled.setdefault((implementation, np.dtype(dtype)), jax.jit(both))
            chosen = [self.leaves[n].astype(self._leaf_dtype(dtype)) for n in self.trained]
            inputs = [x.astype(dtype) for x in inputs]
            with exact:
                out, lse, (by_input, by_leaf) = compiled(inputs, chosen, read, read_lse)
        lse = None if lse is None else np.asarray(lse).astype(np.float64)
        gradients = [np.asarray(x).astype(np.float64) for x in (*by_input, *by_leaf)]
        return np.asarray(out).astype(np.float64), lse, gradients

    def _leaf_dtype(self, dtype: Any) -> Any:
        return np.float64 if np.dtype(dtype) == np.float64 else np.float32

    # -- findings ----------------------------------------------------------------------------------

    def slopes(self) -> Iterator[Finding]:
        """The reference's gradient in float64 against differences of the formula."""
        _, _, self.exact = self.run("reference", np.float64, self.inputs, self.read, self.read_lse)
        total = self._read_out(self.inputs, self.leaves)
        arrays = [*self.inputs, *(self.leaves[n] for n in self.trained)]
        for number, (name, gradient) in enumerate(zip(self.names, self.exact, strict=True)):
            if number >= 3:
                self.reach[number] = max(1.0, self._reach(self.trained[number - 3]))
            reach = self.reach[number]
            size = self.step.size / reach
            found, places = [], []
            for index in sample(self.case.rng(7, number), arrays[number].shape):
                one = float(gradient[index])
                found.append(difference(lambda d, n=number, i=index: self._moved(n, i, d), total,
                                        size, one))  # fmt: skip
                places.append(f"{name}{list(index) or ''}")
            largest = float(np.max(np.abs(gradient), initial=0))
            scale = max(1.0, largest, reach)
            yield judge("gradient", f"float64, {name}", found, places,
                        self.step.tolerance * scale * 4, largest)  # fmt: skip

    def _read_out(self, inputs: Any, leaves: Any) -> float:
        query, key, value = inputs
        out, lse = self.formula.attention(query, key, value, self.allowed, leaves)
        total = np.sum(out * self.read)
        if lse is not None:
            seen = np.isfinite(lse)
            total += np.sum(lse[seen] * self.read_lse[seen])
        return float(total)

    def _moved(self, number: int, index: Any, by: float) -> float:
        inputs, leaves = list(self.inputs), list(self.leaves)
        arrays = inputs if number < 3 else leaves
        place = number if number < 3 else self.trained[number - 3]
        arrays[place] = arrays[place].copy()
        arrays[place][index] += by
        return self._read_out(inputs, leaves)

    def _reach(self, n: int) -> float:
        """How strongly scores answer to an array, at most, among pairs that are seen."""
        moved = list(self.leaves)
        moved[n] = moved[n] + 1e-6
        query, key, _ = self.inputs
        made = [
            self.formula.weigh(query, key, self.allowed, x).scores for x in (self.leaves, moved)
        ]
        with np.errstate(invalid="ignore"):
            gap = np.abs(made[1] - made[0])
        return float(np.max(gap[np.isfinite(gap) & self.allowed], initial=0)) / 1e-6

    def budget(self) -> tuple[float, float]:
        """What output and log-sum-exp may err: four times the formula in the accumulator's dtype,
        and some roundings, in units of the scores and values that take part.
        """
        case = self.case
        plain = Formula(case, case.accumulator)
        out, lse = plain.attention(*self.inputs, self.allowed, plain.leaves())
        weighed = self.formula.weigh(case.query, case.key, self.allowed, self.leaves)
        size = 1 + _relevant(weighed, self.allowed, self.shared)
        sums = 1.0
        if not self.shared:
            sums = max(1.0, float(np.where(self.allowed, np.abs(weighed.made), 0).sum(-1).max()))
        eps = float(np.finfo(case.accumulator).eps)
        values = float(np.abs(case.value).max())
        rounding = (8 * eps * size + 4 * _eps(case.dtype)) * sums * values
        first = 4 * float(differences(out, self.out).max()) + rounding
        second = 0.0
        if lse is not None and self.lse is not None:
            second = 4 * float(differences(lse, self.lse).max())
            second += 8 * eps * (size + float(_finite(self.lse).max(initial=0)))
        return first, second

    def compare(self, implementation: str) -> Iterator[Finding]:
        """One implementation in the dtype asked for, against the formula; then its gradients."""
        case = self.case
        where = implementation
        if implementation in _TILES:
            rows, cols = _TILES[implementation]
            where += f", tiles {rows} x {cols}"
        read = self.read, self.read_lse * (implementation not in _OUTPUT_ALONE)
        out, lse, gradients = self.run(implementation, case.dtype, self.inputs, *read)
        for what, found, exact, limit in zip(
            ("output", "log-sum-exp"), (out, lse), (self.out, self.lse), self.budget(), strict=True
        ):
            if found is not None and exact is not None:
                yield _judged("agreement", f"{where}, {what}", found, exact, limit)
        true = self.exact
        if true is None:
            yield Finding("gradient", SKIPPED, "there is no gradient to compare with.", where)
            return
        plain = gradients
        if implementation != "reference":
            *_, plain = self.run("reference", case.dtype, self.inputs, *read)
        if implementation in _OUTPUT_ALONE:
            *_, true = self.run("reference", np.float64, self.inputs, *read)
        weighed = self.formula.weigh(case.query, case.key, self.allowed, self.leaves)
        size = 1 + _relevant(weighed, self.allowed, self.shared)
        eps = 64 * float(np.finfo(case.accumulator).eps) * size + 8 * _eps(case.dtype)
        worst, failed = 0.0, False
        for n, (name, found) in enumerate(zip(self.names, gradients, strict=True)):
            exact = true[n]
            scale = max(1.0, float(np.abs(_finite(exact)).max(initial=0)), self.reach[n])
            limit = eps * scale
            if implementation != "reference":
                limit += 4 * min(float(differences(plain[n], exact).max()), limit)
            gap = differences(found, exact)
            worst = max(worst, float(gap.max(initial=0)) / scale)
            if gap.max(initial=0) > limit:
                failed = True
                place = np.unravel_index(np.argmax(gap), gap.shape) if gap.ndim else ()
                words = (
                    f"at {list(map(int, place)) or name} it is {found[place]:.6g}, in float64 "
                    f"{exact[place]:.6g}; off by {gap[place]:.3g}, allowed {limit:.2g}."
                )
                yield Finding("gradient", FAILED, words, f"{where}, {name}")
        if not failed:
            words = f"of {', '.join(self.names)}: float64's, to {worst:.1g} of its size."
            yield Finding("gradient", OK, words, where)

    def forward_mode(self, implementations: Sequence[str]) -> Iterator[Finding]:
        """<read, J d> = <J^T read, d>, in float64, where derivatives are plain JAX's."""
        rng = self.case.rng(8)
        chosen = [self.leaves[n] for n in self.trained]
        inputs = list(self.inputs)
        directions = [rng.standard_normal(x.shape) for x in (*inputs, *chosen)]
        for implementation in implementations:

            def push(inputs: Any, chosen: Any, moved: Any, n: str = implementation) -> Any:
                def value(inputs: Any, chosen: Any) -> Any:
                    out, lse = self.attend(n, inputs, self._full(chosen))
                    total = jnp.sum(out * self.read)
                    if lse is not None:
                        seen = jnp.isfinite(lse)
                        total += jnp.sum(
                            jnp.where(seen, jnp.where(seen, lse, 0) * self.read_lse, 0)
                        )
                    return total

                return jax.jvp(value, (inputs, chosen), moved)[1]

            try:
                with float64():
                    along = float(jax.jit(push)(inputs, chosen, (directions[:3], directions[3:])))
            except TypeError as error:
                if "custom_vjp" not in str(error):
                    raise
                words = (
                    "there is none: a custom_vjp knows reverse mode only. Use jax.custom_jvp and "
                    "both modes, and second derivatives, follow."
                )
                yield Finding("forward mode", NOTE, words)
                return
            _, _, gradients = self.run(
                implementation, np.float64, self.inputs, self.read, self.read_lse
            )
            parts = [g * d for g, d in zip(gradients, directions, strict=True)]
            back = float(sum(p.sum() for p in parts))
            size = 1 + float(sum(np.abs(p).sum() for p in parts))
            gap = abs(along - back)
            limit = size * (1e-10 if self.step.size < 1e-3 else 1e-3)
            words = f"forward gives {along:.10g}, reverse {back:.10g}"
            if gap <= limit:
                yield Finding("forward mode", OK, words + ".", implementation)
            else:
                words += ": a custom rule of one of them is wrong."
                yield Finding("forward mode", FAILED, words, implementation)

    def poison(self, implementation: str) -> Iterator[Finding]:
        """NaN in one key and value touches the queries that see it and no other."""
        case = self.case
        group = case.heads // case.key_heads
        by_key = self.allowed.reshape(*case.batch, case.key_heads, group, *case.lengths)
        sees = by_key.any(-2).any(-2), (~by_key).any(-2).any(-2)
        candidates = np.argwhere(sees[0] & sees[1])
        if not len(candidates):
            candidates = np.argwhere(sees[1])
        if not len(candidates):
            return
        *batch, shared, place = candidates[len(candidates) // 2]
        at = (*batch, place, shared)
        key, value = case.key.copy(), case.value.copy()
        key[at], value[at] = np.nan, np.nan
        seeing = np.zeros(case.shape[:-1], bool)
        heads = slice(shared * group, (shared + 1) * group)
        seeing[(*batch, heads)] = self.allowed[(*batch, heads)][..., place]
        quiet = np.where(seeing, 0, 1).swapaxes(-1, -2)[..., None]
        read = self.read * quiet
        clean, _, clean_gradients = self.run(
            implementation, case.dtype, self.inputs, read, self.read_lse * 0
        )
        out, _, gradients = self.run(
            implementation, case.dtype, (case.query, key, value), read, self.read_lse * 0
        )
        unseeing = np.broadcast_to(quiet, out.shape) > 0
        who = f"the {int((~seeing).sum())} queries that may not see it"
        gap = np.where(unseeing, differences(out, clean), 0)
        if gap.max() > 1e-5 * (1 + np.abs(_finite(clean)).max()):
            words = f"NaN in key {place} of key head {shared} reaches {who}."
            yield Finding("masked NaN", FAILED, words, implementation)
            return
        # A modifier may hide a pair too, by -inf.
        weighed = self.formula.weigh(case.query, case.key, self.allowed, self.leaves)
        taken = np.zeros(case.shape[:-1], bool)
        taken[(*batch, heads)] = np.isfinite(weighed.scores[(*batch, heads)][..., place])
        lost = (taken & seeing).swapaxes(-1, -2)[..., None] & ~np.isnan(out)
        if lost.any():
            words = (
                f"NaN in key {place} of key head {shared} is lost on queries that see it: what the "
                "terms make of their score does not depend on it."
            )
            yield Finding("masked NaN", NOTE, words, implementation)
            return
        # The gradients of what sees the key are not looked at; its cotangents are zero.
        bad = [
            name
            for name, new, old in zip(
                self.names[3:], gradients[3:], clean_gradients[3:], strict=True
            )
            if np.isfinite(old).all() and not np.isfinite(new).all()
        ]
        if not np.isfinite(gradients[0][np.broadcast_to(quiet > 0, gradients[0].shape)]).all():
            bad.insert(0, "query")
        if bad and not seeing.any():
            words = f"NaN in key {place}, which no query sees, reaches the gradient of {bad}."
            yield Finding("masked NaN", FAILED, words, implementation)
            return
        yield Finding("masked NaN", OK, f"NaN in key {place} does not reach {who}.", implementation)

    def batched(self) -> Iterator[Finding]:
        """Under vmap over inputs, trained arrays and the mask's arrays: as one after the other."""
        case = self.case
        mask_leaves, tree = jax.tree.flatten(case.mask)
        mask_leaves = [np.asarray(x) for x in mask_leaves]
        dtype = case.dtype
        inputs = [np.stack([x, x[..., ::-1]]).astype(dtype) for x in self.inputs]
        leaves = [
            np.stack([x, x]).astype(case.accumulator if n in self.trained else x.dtype)
            for n, x in enumerate(self.leaves)
        ]
        masks = [np.stack([x, x]) for x in mask_leaves]

        def one(inputs: Any, leaves: Any, mask: Any) -> Any:
            return self.attend("reference", inputs, leaves, jax.tree.unflatten(tree, mask))[0]

        with precision(dtype):
            mapped = np.asarray(jax.jit(jax.vmap(one))(inputs, leaves, masks)).astype(np.float64)
        limit, _ = self.budget()
        query, key, value = (x[..., ::-1] for x in self.inputs)
        second, _ = self.formula.attention(query, key, value, self.allowed, self.leaves)
        expected = np.stack([self.out, second])
        yield _judged("transforms", "vmap of attention", mapped, expected, 2 * limit)


def _judged(name: str, subject: str, found: np.ndarray, exact: np.ndarray, limit: float) -> Finding:
    if found.shape != exact.shape:
        words = f"shape {found.shape}, expected {exact.shape}."
        return Finding(name, FAILED, words, subject)
    gap = differences(found, exact)
    worst = tuple(int(n) for n in np.unravel_index(np.argmax(gap), gap.shape))
    if gap.max() <= limit:
        words = f"largest error against float64 {gap.max():.2g}, allowed {limit:.2g}."
        return Finding(name, OK, words, subject)
    words = (
        f"at {list(worst)} it is {found[worst]:.6g}, in float64 {exact[worst]:.6g}; off by "
        f"{gap.max():.3g}, allowed {limit:.2g}."
    )
    return Finding(name, FAILED, words, subject)


def _relevant(weighed: Any, allowed: np.ndarray, shared: bool) -> float:
    """The largest score among those that have a say: the rest round to no weight at all."""
    scores, made = weighed.scores, weighed.made
    seen = allowed & np.isfinite(scores)
    if shared:
        top = np.max(np.where(allowed, made, -np.inf), axis=-1, keepdims=True)
        with np.errstate(invalid="ignore"):
            seen &= made > top - 50
    return float(np.max(np.abs(scores), where=seen, initial=0))


def _finite(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x[np.isfinite(x)]


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)
