r"""Decayed products and the inverse of a triangle, within a chunk, by matrix products alone.

What a key at j contributes to a row at i of the same chunk is damped by the decays between them,

    A_ij = sum_h row_ih key_jh exp( sum_{j < l <= i} g_lh ),      j <= i.

Splitting the sum at the start of the chunk, exp(G_i) exp(-G_j), makes it one product, and overflows
as soon as a decay is strong; taking differences of running sums loses digits.  Here the chunk is
halved again and again: between the first half of a block and its second, the sum is split at the
middle, where both parts are sums of non-positive numbers.  No term is ever subtracted, so -inf (a
state that is cleared) is an ordinary decay, and every level is a batch of matrix products.

The same halving inverts a triangle with a unit diagonal:

    [[L1, 0], [M, L2]]^-1  =  [[L1^-1, 0], [-L2^-1 M L1^-1, L2^-1]].

Arrays here: "... C X", C a power of two, X the width or 1 for a decay common to all channels.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = "highest"  # float32 products stay float32 on accelerators too


class Sums(NamedTuple):
    """Sums of log decays within blocks of one size, "... C/b b X".

    `through`: from the block's start to i, i included; `before`: without i; `after`: from behind i
    to the block's end; `total` "... C/b 1 X".
    """

    through: Array
    before: Array
    after: Array
    total: Array


def block_sums(log_decay: Float[Array, "... C X"]) -> list[Sums]:
    """The sums for blocks of 1, 2, 4, ... C."""
    g = log_decay[..., None, :]
    zero = jnp.zeros_like(g)
    levels = [Sums(g, zero, zero, g)]
    while levels[-1].total.shape[-3] > 1:
        one, two = (Sums(*(x[..., half::2, :, :] for x in levels[-1])) for half in (0, 1))
        levels.append(
            Sums(
                jnp.concatenate([one.through, one.total + two.through], -2),
                jnp.concatenate([one.before, one.total + two.before], -2),
                jnp.concatenate([one.after + two.total, two.after], -2),
                one.total + two.total,
            )
        )
    return levels


def damping(levels: list[Sums], *, through: bool) -> Float[Array, "... C C"]:
    """Exp of the sum between j and i, common to all channels; zero where j > i.

    With `through` the decay at i counts, and the diagonal is 1; without it the sum stops before i,
    and the diagonal is 0.
    """
    start = levels[0].total
    matrix = jnp.ones_like(start) if through else jnp.zeros_like(start)
    for below in levels[:-1]:
        rows = below.through if through else below.before
        between = _halves(rows)[1] + jnp.swapaxes(_halves(below.after)[0], -1, -2)
        matrix = _join(matrix, jnp.exp(between))
    return matrix[..., 0, :, :]


def damped_product(
    rows: Float[Array, "... C H"],
    keys: Float[Array, "... C H"],
    levels: list[Sums],
    *,
    through: bool,
) -> Float[Array, "... C C"]:
    """The products A_ij with a decay per channel: j <= i with `through`, j < i without."""
    matrix = jnp.sum(rows * keys, -1)[..., None, None]
    if not through:
        matrix = jnp.zeros_like(matrix)
    for below in levels[:-1]:
        count = below.total.shape[-3]
        damp = below.through if through else below.before
        late = _halves(_blocks(rows, count))[1] * jnp.exp(_halves(damp)[1])
        early = _halves(_blocks(keys, count))[0] * jnp.exp(_halves(below.after)[0])
        matrix = _join(matrix, product("...ih,...jh->...ij", late, early))
    return matrix[..., 0, :, :]


def unit_triangle_inverse(lower: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
    """(I + L)^-1 of a strictly lower triangular L."""
    size = lower.shape[-1]
    inverse = jnp.ones((*lower.shape[:-2], size, 1, 1), lower.dtype)
    block = 1
    while block < size:
        one, two = _halves(inverse)
        corner = _corners(lower, block)
        left = -product("...ij,...jk->...ik", two, corner)
        inverse = _join(inverse, product("...ij,...jk->...ik", left, one))
        block *= 2
    return inverse[..., 0, :, :]


def product(formula: str, *arrays: Array) -> Array:
    """A product in the full precision of its factors."""
    return jnp.einsum(formula, *arrays, precision=HIGHEST)


def _blocks(x: Array, count: int) -> Array:
    return x.reshape(*x.shape[:-2], count, x.shape[-2] // count, x.shape[-1])


def _halves(x: Array) -> tuple[Array, Array]:
    """Blocks of even and of odd number."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


def _join(diagonal: Array, corner: Array) -> Array:
    """Blocks twice the size: those on the diagonal two by two, and what lies below between them."""
    one, two = _halves(diagonal)
    top = jnp.concatenate([one, jnp.zeros_like(corner)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, two], -1)], -2)


def _corners(matrix: Array, block: int) -> Array:
    """The blocks of a matrix that lie below each odd diagonal block: "... C/2b b b"."""
    size = matrix.shape[-1]
    count = size // (2 * block)
    tiles = matrix.reshape(*matrix.shape[:-2], count, 2, block, count, 2, block)
    below = tiles[..., :, 1, :, :, 0, :]  # "... count block count block"
    index = jnp.arange(count)
    picked = below[..., index, :, index, :]  # the picked axis comes first
    return jnp.moveaxis(picked, 0, -3)
