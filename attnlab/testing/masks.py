"""Checks of a mask by itself: what it says of pairs, and what it says of whole tiles."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.masks import Mask, Span, TilePlan
from attnlab.core.terms import Tile
from attnlab.testing.case import Case, precision
from attnlab.testing.formula import dense_mask
from attnlab.testing.report import FAILED, NOTE, OK, Finding
from attnlab.testing.terms import at_pair, check_tiles, differences, restricted


class MaskChecks:
    """One method to a finding."""

    def __init__(self, case: Case, block_sizes: tuple[int, int]) -> None:
        self.case, self.mask, self.block_sizes = case, case.mask, block_sizes
        with precision(np.float32):
            self.said = dense_mask(case)
        self.allowed = self.said.astype(bool)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Block sizes to try: the user's, one tile for all, odd ones, single pairs."""
        queries, keys = self.case.lengths
        odd = (min(7, queries), min(11, keys))
        tried = [self.block_sizes, (queries, keys), odd, (1, min(4, keys)), (min(4, queries), 1)]
        return list(dict.fromkeys(tried))

    def output(self) -> Iterator[Finding]:
        """Boolean, and of a shape that broadcasts."""
        if self.said.dtype != bool:
            words = (
                f"returns {self.said.dtype}, expected bool: True where a query may look. Numbers "
                "to be added to scores are attnlab.scores.Bias; for 0 and 1 write `!= 0`."
            )
            yield Finding("output", FAILED, words)
        else:
            yield Finding("output", OK, "boolean.")

    def tiles(self) -> Iterator[Finding]:
        """The same on any tile as on the whole matrix."""
        leaves = [np.asarray(x) for x in jax.tree.leaves(self.mask)]

        def evaluate(tile: Tile) -> Any:
            return restricted(self.mask, leaves, tile).allowed(tile.at())

        with precision(np.float32):
            yield from check_tiles(self.case, self.said, evaluate, 0.0)

    def transforms(self) -> Iterator[Finding]:
        """Compiled, with its arrays traced: the same pairs."""
        leaves = [jnp.asarray(x) for x in jax.tree.leaves(self.mask)]
        whole = self.case.tile(0, 0, *self.case.lengths)

        def evaluate(leaves: Any) -> Any:
            return restricted(self.mask, leaves, whole).allowed(whole.at())

        try:
            compiled = np.asarray(jax.jit(evaluate)(leaves))
        except jax.errors.ConcretizationTypeError:
            words = (
                "cannot be compiled: it asks whether something is true, or how large, before it "
                "runs. Positions are arrays: use & | ~ and jnp.where instead of and, or, not, if."
            )
            yield Finding("transforms", FAILED, words, "jit")
            return
        again = dense_mask(self.case)
        for subject, found in (("jit", compiled), ("called twice", again)):
            gap = differences(np.broadcast_to(found, self.case.shape), self.said)
            if gap.any():
                words = f"says otherwise of {int(gap.sum())} pairs."
                yield Finding("transforms", FAILED, words, subject)
                return
        yield Finding("transforms", OK, "the same pairs compiled, and called again.", "jit")

    def bounds(self) -> Iterator[Finding]:
        """What `bounds` says of tiles, without looking at pairs, is true of their pairs."""
        settled = unsettled = 0
        for grid in self.grids:
            some, every = (np.asarray(x) for x in self.mask.bounds(self._span(grid)))
            truth = true_plan(self.allowed, grid)
            shape = truth.empty.shape
            for what, x in (("first", some), ("second", every)):
                if x.dtype != bool:
                    words = f"the {what} of its two answers is {x.dtype}, expected bool."
                    yield Finding("bounds", FAILED, words)
                    return
            some, every = np.broadcast_to(some, shape), np.broadcast_to(every, shape)
            for lie, words in (
                (~some & ~truth.empty, "is called empty, but {} is allowed"),
                (every & ~truth.full, "is called full, but {} is hidden"),
                (every & ~some, "is called full and empty at once{}"),
            ):
                if lie.any():
                    yield self._lie(grid, lie, words)
                    return
            exact = (some == ~truth.empty) & (every == truth.full)
            if self.mask.exact_bounds and not exact.all():
                i, j = np.argwhere(~exact)[0]
                words = (
                    f"says its bounds are exact, but of {self._tile(grid, i, j)} it knows less "
                    "than there is to know; let exact_bounds be False."
                )
                yield Finding("bounds", FAILED, words)
                return
            settled, unsettled = settled + int(exact.sum()), unsettled + int((~exact).sum())
            lie = self._data_lie(grid)
            if lie is not None:
                yield lie
                return
        words = f"true of all tiles in {len(self.grids)} block sizes; "
        if not unsettled:
            yield Finding("bounds", OK, words + "every tile is settled without looking.")
        else:
            words += (
                f"{unsettled} of {settled + unsettled} are settled only by looking at pairs, "
                "within the run where a mask is data."
            )
            yield Finding("bounds", OK, words)

    def _data_lie(self, grid: tuple[int, int]) -> Finding | None:
        """What `data_bounds` says of the tiles of each batch entry and head, if it is wrong."""
        span = self._span(grid)
        mask: Any = jax.tree.map(jnp.asarray, self.mask)
        blocks = span.query_first.shape[0], span.key_first.shape[1]
        shape = (*self.case.shape[:-2], *blocks)
        with jax.numpy_rank_promotion("allow"):
            some, every = mask.data_bounds(span)
        some, every = (np.broadcast_to(np.asarray(x), shape) for x in (some, every))
        for index in np.ndindex(self.case.shape[:-2]):
            truth = true_plan(self.allowed[index], grid)
            for lie, words in (
                (~some[index] & ~truth.empty, "data_bounds calls {} of {} empty, which it is not"),
                (every[index] & ~truth.full, "data_bounds calls {} of {} full, which it is not"),
            ):
                if lie.any():
                    where = self._tile(grid, *np.argwhere(lie)[0])
                    words = words.format(where, f"batch and head {list(index)}")
                    return Finding("bounds", FAILED, words + ". Unknown is (True, False).")
        return None

    def _span(self, grid: tuple[int, int]) -> Span:
        return Span.of(self.case.lengths, grid, (0, 0))

    def _lie(self, grid: tuple[int, int], lie: np.ndarray, words: str) -> Finding:
        i, j = np.argwhere(lie)[0]
        rows, cols = grid
        part = self.allowed[..., i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
        wanted = part if "empty, but" in words else ~part
        pair = ""
        if wanted.any():
            index = np.argwhere(wanted)[0]
            index[-2:] += (i * rows, j * cols)
            pair = at_pair(self.case, index)
        words = f"{self._tile(grid, i, j)} {words.format(pair)}."
        return Finding("bounds", FAILED, words + " Unknown is (True, False).")

    def _tile(self, grid: tuple[int, int], i: Any, j: Any) -> str:
        ends = []
        for name, n, block, length in zip(
            ("queries", "keys"), (i, j), grid, self.case.lengths, strict=True
        ):
            ends.append(f"{name} {n * block}–{min((n + 1) * block, length) - 1}")
        return f"the tile of {' and '.join(ends)}"

    def plan(self) -> Iterator[Finding]:
        """The plan that implementations follow equals the truth, tile by tile."""
        # Small tiles that stay undecided are looked at one by one, which takes its time.
        for grid in self.grids[:3]:
            found = self.mask.plan(*self.case.lengths, grid, num_heads=self.case.heads)
            truth = true_plan(self.allowed, grid)
            for what in ("empty", "full"):
                wrong = getattr(found, what) != getattr(truth, what)
                if wrong.any():
                    i, j = np.argwhere(wrong)[0]
                    said = "" if getattr(found, what)[i, j] else "not "
                    words = f"calls {self._tile(grid, i, j)} {said}{what}; its pairs say otherwise."
                    yield Finding("plan", FAILED, words)
                    return
        counts = true_plan(self.allowed, self.block_sizes).counts()
        total = sum(counts.values())
        words = ", ".join(f"{n} {what}" for what, n in counts.items())
        rows, cols = self.block_sizes
        yield Finding(
            "plan",
            OK,
            f"{words} of {total} tiles of {rows} x {cols}: {1 - counts['empty'] / total:.0%} are "
            f"visited for {self.allowed.mean():.0%} of the pairs.",
        )

    def future(self, causal: bool | None) -> Iterator[Finding]:
        """Whether a query may see keys that come after it."""
        queries, keys = self.case.lengths
        later = np.arange(keys)[None, :] > np.arange(queries)[:, None]
        leaks = np.argwhere(self.allowed & later)
        if not len(leaks):
            yield Finding("future", OK, "no query sees a key after it: causal.")
            return
        words = f"{at_pair(self.case, leaks[0])} and {len(leaks) - 1} more pairs look ahead"
        if causal:
            yield Finding("future", FAILED, words + ", although causal=True was asked for.")
        elif causal is None:
            yield Finding("future", NOTE, words + ": not causal. Combine with & Causal() if meant.")
        else:
            yield Finding("future", OK, words + ", as was asked for.")

    def rows(self) -> Iterator[Finding]:
        """Queries that see nothing, and keys that nobody sees."""
        blind, unseen = ~self.allowed.any(-1), ~self.allowed.any(-2)
        for name, hit, words in (
            ("empty rows", blind, "{} of {} queries see no key; their output and gradient are 0"),
            ("unseen keys", unseen, "{} of {} keys are seen by no query"),
        ):
            if hit.any():
                index = [int(n) for n in np.argwhere(hit)[0]]
                place = f"head {index[-2]}, position {index[-1]}"
                counted = words.format(int(hit.sum()), hit.size)
                yield Finding(name, NOTE, f"{counted}. The first: {place}.")
        if not blind.any():
            yield Finding("empty rows", OK, "every query sees some key.")


def true_plan(allowed: np.ndarray, block_sizes: tuple[int, int]) -> TilePlan:
    """The plan, from all pairs: of all batch entries and heads together."""
    rows, cols = block_sizes
    over = tuple(range(allowed.ndim - 2))
    some, every = allowed.any(over), allowed.all(over)
    firsts = (np.arange(0, some.shape[0], rows), np.arange(0, some.shape[1], cols))

    def reduce(ufunc: Any, x: np.ndarray) -> np.ndarray:
        return ufunc.reduceat(ufunc.reduceat(x, firsts[0], axis=0), firsts[1], axis=1)

    return TilePlan(block_sizes, ~reduce(np.logical_or, some), reduce(np.logical_and, every))


def plan_of(mask: Mask, case: Case, block_sizes: tuple[int, int]) -> TilePlan:
    """The plan that implementations follow."""
    return mask.plan(*case.lengths, block_sizes, num_heads=case.heads)
