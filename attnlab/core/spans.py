"""Blocks of positions, and which tiles of the score matrix a mask empties or fills."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Span:
    """First and last position of each block: (rows, 1) for queries, (1, columns) for keys.

    NumPy arrays, or JAX arrays where offsets are traced.
    """

    query_first: Any
    query_last: Any
    key_first: Any
    key_last: Any
    lengths: tuple[int, int] = (0, 0)
    block_sizes: tuple[int, int] = (1, 1)

    @classmethod
    def of(
        cls, lengths: tuple[int, int], block_sizes: tuple[int, int], offsets: tuple[Any, Any]
    ) -> "Span":
        """The blocks of a score matrix; with traced offsets the ends are traced as well."""
        ends = []
        for length, block, offset in zip(lengths, block_sizes, offsets, strict=True):
            first = np.arange(0, length, block, dtype=np.int32)
            last = np.minimum(first + block, length).astype(np.int32) - 1
            if np.ndim(offset):  # one for each position, in any order
                places = _in_blocks(jnp.arange(length, dtype=jnp.int32) + offset, block)
                ends.append((places.min(-1), places.max(-1)))
            else:
                ends.append((first + offset, last + offset))
        (qf, ql), (kf, kl) = ends
        return cls(qf[:, None], ql[:, None], kf[None, :], kl[None, :], lengths, block_sizes)

    def in_blocks(self, x: Array, axis: int) -> Array:
        """Axis 0 (queries) or 1 (keys) last in `x`, cut into blocks: "... I r" or "... J c"."""
        return _in_blocks(x, self.block_sizes[axis])


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """Which tiles hold no allowed pair (`empty`), only allowed pairs (`full`), or both (`partial`).

    Each is a boolean array of shape (query blocks, key blocks).
    """

    block_sizes: tuple[int, int]
    empty: np.ndarray
    full: np.ndarray

    @property
    def partial(self) -> np.ndarray:
        return ~self.empty & ~self.full

    def counts(self) -> dict[str, int]:
        return {name: int(getattr(self, name).sum()) for name in ("empty", "full", "partial")}


def _in_blocks(x: Array, block: int) -> Array:
    """The last axis cut into blocks, its last entry repeated up to a whole one."""
    short = -x.shape[-1] % block
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)], mode="edge")
    return x.reshape(*x.shape[:-1], -1, block)


def same_rank(*tables: Any) -> tuple[Any, ...]:
    """Tables "*B N I J" with axes of length one in front, of one rank; scalars as they are."""
    rank = max(np.ndim(x) for x in tables)

    def lift(x: Any) -> Any:
        return x.reshape((1,) * (rank - x.ndim) + x.shape) if np.ndim(x) else x

    return tuple(lift(x) for x in tables)
