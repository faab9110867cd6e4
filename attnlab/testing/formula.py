"""Attention as a formula in float64: the user's functions on the whole score matrix, then NumPy.

No tile, no fold and no implementation of the library takes part; only the user's own function is
taken at its word, once, on all pairs at a time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from attnlab.core.terms import At, axes_of
from attnlab.testing.case import Case, float64, precision, spread


def everywhere(case: Case) -> At:
    """All pairs of the score matrix."""
    queries, keys = case.lengths
    lead = (1,) * len(case.batch)
    return At(
        jnp.arange(queries, dtype=jnp.int32).reshape(*lead, 1, queries, 1),
        jnp.arange(keys, dtype=jnp.int32).reshape(*lead, 1, 1, keys),
        jnp.arange(case.heads, dtype=jnp.int32).reshape(*lead, case.heads, 1, 1),
    )


def dense_mask(case: Case) -> np.ndarray:
    """What the mask says of all pairs, "*B N T S", in whatever dtype it says it."""
    leaves, tree = jax.tree.flatten(case.mask)
    placed = [
        jnp.asarray(spread(np.asarray(x), t, case.shape))
        for x, t in zip(leaves, axes_of(case.mask), strict=True)
    ]
    said = np.asarray(jax.tree.unflatten(tree, placed).allowed(everywhere(case)))
    return np.broadcast_to(said, case.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Weighed:
    """Scores after the modifiers, what the normalizer makes of them, and its extra term.

    `made` is log-weights (kind "shared") or weights, "*B N T S".
    """

    scores: np.ndarray
    made: np.ndarray
    extra: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Formula:
    """Attention of one case by its formula; the user's functions computed in `dtype`."""

    case: Case
    dtype: Any = np.float64

    def leaves(self) -> list[np.ndarray]:
        """The arrays of modifiers and normalizer, floating-point ones in `dtype`."""
        return [x.value.astype(self.dtype) if x.trainable else x.value for x in self.case.leaves]

    def terms(self, leaves: list[Any]) -> Any:
        tags = [x.tag for x in self.case.leaves]
        return self.case.with_leaves(
            [spread(jnp.asarray(x), t, self.case.shape) for x, t in zip(leaves, tags, strict=True)]
        )

    def modify(self, scores: Any, leaves: list[Any]) -> Any:
        """The user's modifiers, in order, as a JAX function: "*B N T S" to what they return."""
        modifiers, _ = self.terms(leaves)
        at = everywhere(self.case)
        for modifier in modifiers:
            scores = modifier(scores, at)
        return scores

    def _weigh(self, scores: Any, allowed: Any, leaves: list[Any]) -> Any:
        scores = jnp.broadcast_to(self.modify(scores, leaves), self.case.shape)
        _, normalizer = self.terms(leaves)
        if normalizer.kind == "shared":
            return scores, normalizer.log_weight(scores), normalizer.log_extra()
        if normalizer.kind == "separate":
            return scores, normalizer.weight(scores), None
        return scores, normalizer.row_weights(jnp.where(allowed, scores, 0), allowed), None

    @functools.cached_property
    def modified(self) -> Any:
        """`modify`, compiled."""
        return jax.jit(self.modify)

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self._weigh)

    def products(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Scaled products of queries and keys, "*B N T S"."""
        group = self.case.heads // self.case.key_heads
        key = np.repeat(key, group, axis=-2)
        product = np.einsum("...tnh,...snh->...nts", query, key) * self.case.scale
        return product.astype(self.dtype)

    def weigh(
        self, query: np.ndarray, key: np.ndarray, allowed: np.ndarray, leaves: list[Any]
    ) -> Weighed:
        """The user's functions on all pairs; what they say of hidden pairs is kept."""
        with float64() if self.dtype == np.float64 else precision(self.dtype):
            found = self._compiled(self.products(query, key), allowed, leaves)
        scores, made = (np.asarray(x).astype(np.float64) for x in found[:2])
        extra = None if found[2] is None else np.asarray(found[2]).astype(np.float64)
        return Weighed(scores, np.broadcast_to(made, self.case.shape), extra)

    def attention(
        self,
        query: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        allowed: np.ndarray,
        leaves: list[Any],
    ) -> tuple[Float[np.ndarray, "*B T N D"], Float[np.ndarray, "*B N T"] | None]:
        """Output and, for a normalizer with a shared sum, its logarithm."""
        weighed = self.weigh(query, key, allowed, leaves)
        value = np.repeat(value, self.case.heads // self.case.key_heads, axis=-2)
        if self.case.normalizer.kind != "shared":
            weights, lse = np.where(allowed, weighed.made, 0), None
        else:
            weights, lse = _softmax(weighed, allowed)
        return np.einsum("...nts,...snd->...tnd", weights, value), lse


def _softmax(weighed: Weighed, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    masked = np.where(allowed, weighed.made, -np.inf)
    floor = np.full(masked.shape[:-1], -np.inf)
    if weighed.extra is not None:
        # A scalar, or one number to a head.
        extra = (
            weighed.extra.reshape(-1, 1) if weighed.extra.size > 1 else weighed.extra.reshape(())
        )
        floor = np.broadcast_to(extra, floor.shape)
    top = np.maximum(masked.max(-1), floor)
    safe = np.where(np.isfinite(top), top, 0)
    exp = np.exp(masked - safe[..., None])
    total = exp.sum(-1) + np.exp(floor - safe)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + safe
    return exp / np.where(total > 0, total, 1)[..., None], lse
