"""Which tiles a kernel visits, in what order, and how large they are.

Everything works alike on NumPy arrays (a plan known before running) and on JAX arrays (a plan that
depends on data, as routed attention needs).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash.problem import Flat, Lists

FIRST, LAST, MASKED, DEAD, SKIP = 1, 2, 4, 8, 16


def _namespace(*arrays: Any) -> Any:
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def check_tables(some: Any, every: Any) -> None:
    """Raise ValueError unless both tables have the shape (b, n, I, J)."""
    if some.ndim != 4 or some.shape != every.shape:
        raise ValueError(
            "some, every: expected two boolean tables of one shape (b, n, I, J), got "
            f"{some.shape} and {every.shape}."
        )


def make_lists(some: Any, every: Any) -> Lists:
    """The live blocks of each row of tiles, full ones first.

    `some`, `every`: boolean (b, n, I, J): does tile (i, j) hold an allowed pair; only allowed ones?
    For lists by column hand over both transposed.
    """
    check_tables(some, every)
    xp = _namespace(some, every)
    every = every & some
    rank = xp.where(every, 0, xp.where(some, 1, 2))
    index = xp.argsort(rank, axis=-1, stable=True)
    count, full = some.sum(-1), every.sum(-1)
    if xp is np:
        index = index[..., : max(1, int(count.max()))]
    return Lists(*(x.astype(np.int32) for x in (index, full, count)))


def make_flat(some: Any, every: Any) -> Flat:
    """All live tiles in one sequence, row by row; a row without any has one DEAD step."""
    check_tables(some, every)
    xp = _namespace(some, every)
    b, n, rows, cols = some.shape
    every = every & some
    dead = ~some.any(-1)
    column = xp.arange(cols).reshape(1, 1, 1, cols)
    taken = some | (dead[..., None] & (column == 0))
    flat = taken.reshape(b, n, rows * cols)
    totals = flat.sum(-1)
    order = xp.argsort(~flat, axis=-1, stable=True)
    total: Any = totals.max()
    if xp is np:
        total = int(total)
        order = order[..., :total]
    steps = xp.arange(order.shape[-1]).reshape(1, 1, -1)
    late = steps >= totals[..., None]
    # Steps beyond the end stay at the last tile, so that nothing new is fetched for them.
    final = xp.take_along_axis(order, totals[..., None] - 1, -1)
    order = xp.where(late, final, order)
    owner, other = order // cols, order % cols

    def pick(table: Any) -> Any:
        return xp.take_along_axis(table.reshape(b, n, rows * cols), order, -1)

    edge = xp.ones((b, n, 1), bool)
    change = owner[..., 1:] != owner[..., :-1]
    first = xp.concatenate([edge, change], -1)
    last = xp.concatenate([change, edge], -1) | (steps == totals[..., None] - 1)
    is_dead = xp.take_along_axis(dead, owner, -1)
    masked = ~pick(every) & ~is_dead
    flags = xp.zeros(owner.shape, np.int32)
    for marked, flag in ((first, FIRST), (last, LAST), (masked, MASKED), (is_dead, DEAD)):
        flags = flags + xp.where(marked, np.int32(flag), np.int32(0))
    flags = xp.where(late, np.int32(SKIP), flags)
    owner, other, flags = (x.astype(np.int32) for x in (owner, other, flags))
    return Flat(owner, other, flags, total)


def padded(length: int, block: int) -> int:
    """`length` rounded up to whole blocks."""
    return -(-length // block) * block


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is not below n or `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def triton_block_sizes(
    key_width: int, value_width: int, itemsize: int, backward: bool
) -> tuple[int, int]:
    """Rows and columns of a tile for the Triton bodies.

    The largest for which the compiler keeps the inner loops in registers on an H100 (with
    `triton_warps`); to be tuned by time on each device.
    """
    width = power_of_two(max(key_width, value_width))
    if itemsize >= 4:
        if width > 128:
            return 16, 16
        return (16, 32) if width > 64 else (32, 32)
    if backward:
        return (32, 32) if width > 128 else (64, 64)
    return (64, 32) if width > 128 else (128, 64)


def triton_warps(
    key_width: int, value_width: int, itemsize: int, rows: int, backward: bool, extras: bool
) -> int:
    """Warps of a program: more where a tile's sums would not fit the registers of four.

    `extras`: masks or modifiers hold arrays, which need registers of their own.
    """
    width = power_of_two(max(key_width, value_width))
    if itemsize >= 4:
        return 16 if width > 128 else 8
    if backward:
        return 8 if width > 64 or extras else 4
    return 8 if rows >= 128 or width > 128 else 4


def divide_blocks(block_sizes: tuple[int, int], mask_blocks: tuple[int, int]) -> tuple[int, int]:
    """Block sizes that lie within the blocks of a block mask; unchanged where it has none (0)."""
    rows, cols = (math.gcd(b, m) if m else b for b, m in zip(block_sizes, mask_blocks, strict=True))
    return rows, cols
