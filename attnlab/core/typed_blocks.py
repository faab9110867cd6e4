"""Blocks of tokens that are chosen, or not: what attention sees of them, and what a state keeps.

A query sees its own block whatever its kind, up to itself, and of earlier blocks the chosen ones.
"""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.core.masks import Mask
from attnlab.core.recurrence import linear_recurrence
from attnlab.core.scores import ScoreModifier
from attnlab.core.terms import ArrayLeaf, At, leaf, static


class OwnOrChosen(Mask):
    """Real keys of the query's own block, and of earlier blocks those that were chosen."""

    chosen: ArrayLeaf = leaf("B N S")
    real: ArrayLeaf = leaf("B S")
    block: int = static(default=1)

    def allowed(self, at: At) -> Bool[Array, "..."]:
        own = at.query // self.block == at.key // self.block
        return (own | self.chosen) & self.real


class Factor(ScoreModifier):
    """The logarithm of a factor of 1 on weights of earlier blocks: `gate` is 0, its slope is 1."""

    additive: ClassVar[bool] = True
    gate: ArrayLeaf = leaf("B N S")
    block: int = static(default=1)

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        own = at.query // self.block == at.key // self.block
        return score + jnp.where(own, jnp.zeros_like(self.gate), self.gate)


@functools.partial(jax.jit, static_argnames="block")
def through_blocks(
    steps: dict[str, Array], chosen: Float[Array, "*B C N"], block: int
) -> Float[Array, "*B T N D"]:
    """The linear recurrence through each block, from the state that earlier chosen blocks left.

    Args:
      steps: arguments of `attnlab.linear_recurrence`, each with its T tokens.
      chosen: a factor on the keys of each block in the states of later ones: at 0 nothing of it is
        written or erased, and the state only decays.
      block: tokens to a block, C = ceil(T / block).
    """
    key, value = steps["key"], steps["value"]
    axis, length = key.ndim - 3, key.shape[-3]
    parts = {name: in_blocks(x, axis, block) for name, x in steps.items()}
    factors = jnp.moveaxis(chosen, axis, 0)[..., None, :, None]

    def through(state: Array, now: Any) -> tuple[Array, Array]:
        part, factor = now
        out = linear_recurrence(**part, initial_state=state)
        written = part | {"key": part["key"] * factor}
        return linear_recurrence(**written, initial_state=state, return_state=True)[1], out

    start = jnp.zeros((*key.shape[:axis], key.shape[-2], key.shape[-1], value.shape[-1]), key.dtype)
    _, out = jax.lax.scan(through, start, (parts, factors))
    out = jnp.moveaxis(out, 0, axis)
    out = out.reshape(*out.shape[:axis], -1, *out.shape[axis + 2 :])
    return jax.lax.slice_in_dim(out, 0, length, axis=axis)


def in_blocks(x: Array, axis: int, block: int) -> Array:
    """Blocks as the first axis, the last filled up with zeros."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    x = jnp.pad(x, widths)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)
