r"""The mathematics of one chunk, the same on every device.

    S_t = diag(exp(g_t)) S_{t-1} + k_t (v_t - S_{t-1}^T e_t)^T,      o_t = S_t^T q_t

`prepare` looks at a chunk of C steps alone, `take` and `put` bring the state "H D" behind it and
`read` gives what a query head reads there; `jax.vjp` differentiates each within a kernel.  Arrays
are 2-D and float32, and nothing is sliced, joined or reshaped: what depends on two positions is a
product with a mask.  The H channels of keys come in one part or several: a program multiplies part
by part where the whole would not fit its registers.

The decay between two positions is a sum, within a 0/1 mask, of numbers <= 0; no sum is ever the
difference of two, so no exponent is positive, nothing overflows, and no digit is lost beside a
strong decay.  A decay per channel cannot be one factor to a pair: blocks of 1, 2, 4, ... positions
are halved, and between the halves the sum is split at the middle, where both parts are <= 0 again.
Yang et al. 2024, arXiv:2406.06484 is the algorithm with `erase`, in its WY form.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FLOOR = -1e30  # takes the place of -inf, which a mask's zero would make NaN
THROUGH, BEFORE, AFTER = "through", "before", "after"  # sums to i, to i - 1, from i + 1


@dataclasses.dataclass(frozen=True)
class Device:
    """How a device multiplies and repeats.

    `dot(a, b, trans_a, trans_b)`: op(a) op(b) with the precision of float32.  `half`: the dtype
    that rows and keys came in, if a product of it is exact in float32.  `unroll`: write loops out.
    `pulled`: `jax.vjp` will be taken; without it there is no rule for derivatives in the program.
    """

    dot: Callable[..., Array]
    half: Any = None
    unroll: bool = False
    pulled: bool = False
    again: Callable[[Array, Any], Array] = lambda x, number: x

    def loop(self, start: int, stop: int, body: Callable, state: Any) -> Any:
        if self.unroll:
            for step in range(start, stop):
                state = body(jnp.int32(step), state)
            return state
        return jax.lax.fori_loop(jnp.int32(start), jnp.int32(stop), body, state)

    def rule(self, function: Callable, keep: Callable, pull: Callable) -> Callable:
        """`function`, with `pull(kept, cotangent)` for its derivative."""
        if not self.pulled:
            return function
        ruled = jax.custom_vjp(function)
        ruled.defvjp(keep, pull)
        return ruled

    def product(self, a: Array, b: Array, *, left: bool = False, right: bool = False) -> Array:
        """op(a) op(b), a transposed with `left`, b with `right`; so are its derivatives."""

        def pull(kept: Any, c: Array) -> tuple[Array, Array]:
            a, b = kept
            d_a = self.dot(b, c, right, True) if left else self.dot(c, b, False, not right)
            d_b = self.dot(c, a, True, left) if right else self.dot(a, c, not left, False)
            return d_a, d_b

        def multiply(a: Array, b: Array) -> Array:
            return self.dot(a, b, left, right)

        return self.rule(multiply, lambda a, b: (multiply(a, b), (a, b)), pull)(a, b)

    def inner(self, rows: Array, keys: Array) -> Array:
        """Rows times keys^T, exact also where both are multiplied in the precision they came in."""
        if self.half is None:
            return self.product(rows, keys, right=True)

        def multiply(rows: Array, keys: Array) -> Array:
            return self.dot(rows.astype(self.half), keys.astype(self.half), False, True)

        def pull(kept: Any, c: Array) -> tuple[Array, Array]:
            rows, keys = kept
            return self.dot(c, keys, False, False), self.dot(c, rows, True, False)

        return self.rule(multiply, lambda r, k: (multiply(r, k), (r, k)), pull)(rows, keys)

    def within(self, mask: Array, x: Array) -> Array:
        """Sums of rows of x within a 0/1 mask."""

        def total(mask: Array, x: Array) -> Array:
            return self.dot(mask, x, False, False)

        def pull(mask: Array, c: Array) -> tuple[None, Array]:
            return None, self.dot(mask, c, True, False)

        return self.rule(total, lambda m, x: (total(m, x), m), pull)(mask, x)


class Decay(NamedTuple):
    """The log decays of a chunk, none of them -inf, for each part of the channels; or none at all.

    `pairs`: their sums `between` two positions, where all channels decay alike.
    """

    wide: "Rows | None" = None
    pairs: Float[Array, "C C"] | None = None


Rows = tuple[Float[Array, "C _"], ...]  # the parts of an array "C H"
State = tuple[Float[Array, "_ D"], ...]  # the parts of an array "H D"


def floored(decay: Array) -> Array:
    """Log decays without -inf.  What passes through exp(-1e30) = 0 has no gradient either."""
    return jnp.where(decay < FLOOR, FLOOR, decay)


def between(device: Device, decay: Float[Array, "C C"], upto: str) -> Float[Array, "C C"]:
    """Sums from behind j up to i, of decays that are the same in each row."""
    i, j = _places(len(decay))
    return device.dot(jnp.where(_reached(i, j, upto), decay, 0.0), _mask(j < i), False, False)


def of_between(device: Device, d_pairs: Float[Array, "C C"], upto: str) -> Float[Array, "C C"]:
    """The cotangent of what `between` was given; its sum over rows is that of the decays."""
    i, j = _places(len(d_pairs))
    return jnp.where(_reached(i, j, upto), device.dot(d_pairs, _mask(j < i), False, True), 0.0)


def prepare(
    device: Device, key: Rows, value: Rows, decay: Decay, erase: Rows | None
) -> tuple[Rows, Rows | None]:
    """What the keys would write if the state were zero, and what they take of it: (U, W).

    The columns of values come in parts as well.
    """
    if erase is None:
        return value, None
    lower = _damped(device, erase, key, decay, BEFORE)
    solved = _solve(device, lower, *value, *_decayed(device, erase, decay, BEFORE))
    return solved[: len(value)], solved[len(value) :]


def take(
    device: Device, state: State, fresh: Float[Array, "C D"], taken: Rows | None
) -> Float[Array, "C D"]:
    """What each key writes, from what `prepare` gives and the state before the chunk."""
    return fresh if taken is None else fresh - _of_state(device, taken, state)


def put(device: Device, state: State, key: Rows, write: Float[Array, "C D"], decay: Decay) -> State:
    """The state behind a chunk."""
    late = _decayed(device, key, decay, AFTER)
    added = tuple(device.product(part, write, left=True) for part in late)
    if decay.wide is not None:
        ones = jnp.ones_like(write)
        totals = (device.product(part, ones, left=True) for part in decay.wide)
        state = tuple(s * jnp.exp(total) for s, total in zip(state, totals, strict=True))
    return tuple(map(jnp.add, state, added))


def read(
    device: Device,
    state: State,
    query: Rows,
    key: Rows,
    write: Float[Array, "C D"],
    decay: Decay,
) -> Float[Array, "C D"]:
    """What one head of queries reads in a chunk that starts with `state`."""
    out = _of_state(device, _decayed(device, query, decay, THROUGH), state)
    return out + device.product(_damped(device, query, key, decay, THROUGH), write)


def _of_state(device: Device, rows: Rows, state: State) -> Array:
    return _sum(map(device.product, rows, state))


def _decayed(device: Device, rows: Rows, decay: Decay, upto: str) -> Rows:
    """Rows times the decays from the chunk's start up to each step, or AFTER it."""
    if decay.wide is None:
        return rows
    mask = _mask(_reached(*_places(len(rows[0])), upto))
    sums = (device.within(mask, part) for part in decay.wide)
    return tuple(row * jnp.exp(total) for row, total in zip(rows, sums, strict=True))


def _damped(device: Device, rows: Rows, keys: Rows, decay: Decay, upto: str) -> Array:
    """What each row reads of each key: j <= i THROUGH the chunk, j < i BEFORE; "C C"."""
    i, j = _places(len(keys[0]))
    if decay.wide is not None and decay.pairs is None:
        matrix = _sum(map(_halves(device, upto), rows, keys, decay.wide))
        if upto == BEFORE:
            return matrix
        return matrix + jnp.where(i == j, _sum(map(device.inner, rows, keys)), 0.0)
    matrix = _sum(map(device.inner, rows, keys))
    if decay.pairs is not None:
        matrix = matrix * jnp.exp(decay.pairs)
    return jnp.where(_reached(i, j, upto), matrix, 0.0)


def _sum(parts: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, parts)


def _halves(device: Device, upto: str) -> Callable[..., Array]:
    """The damped products of all pairs but the diagonal, level by level."""

    plain = dataclasses.replace(device, pulled=False)

    def level(device: Device, number: Any, rows: Array, keys: Array, decay: Array) -> Array:
        """Rows of the second half of each block, keys of its first."""
        i, j = _places(len(keys))
        of_row, of_col = i >> number, j >> number
        second = (of_row & 1) == 1
        # In the second half from the middle to the row, in the first from behind the key.
        reach = (second & _reached(i, j, upto)) | (~second & (j > i))
        damp = jnp.exp(device.within(_mask(reach & (of_row == of_col)), decay))
        found = device.product(rows * damp, keys * damp, right=True)
        return jnp.where(second & (of_row == of_col + 1), found, 0.0)

    def matrix(rows: Array, keys: Array, decay: Array) -> Array:
        def add(number: Any, total: Array) -> Array:
            return total + level(plain, number, rows, keys, device.again(decay, number))

        size = len(keys)
        return device.loop(0, _levels(size), add, jnp.zeros((size, size), jnp.float32))

    def pull(kept: Any, cotangent: Array) -> Any:
        # All of a level is computed again: nothing of one lives on beside another.
        def add(number: Any, totals: Any) -> Any:
            rows, keys, decay = kept
            at = rows, keys, device.again(decay, number)
            parts = jax.vjp(functools.partial(level, device, number), *at)[1](cotangent)
            return tuple(t + part for t, part in zip(totals, parts, strict=True))

        start = tuple(map(jnp.zeros_like, kept))
        return device.loop(0, _levels(len(kept[1])), add, start)

    return device.rule(matrix, lambda *x: (matrix(*x), x), pull)


def _solve(device: Device, lower: Array, *sides: Array) -> tuple[Array, ...]:
    """(I + L)^-1 applied to right-hand sides; L strictly lower triangular."""

    def inverse(lower: Array) -> Array:
        i, j = _places(len(lower))

        def below(number: Any) -> Array:
            """The blocks of L that lie beside those inverted so far."""
            corner = ((i >> number) == (j >> number) + 1) & (((i >> number) & 1) == 1)
            return jnp.where(corner, device.again(lower, number), 0.0)

        def double(number: Any, found: Array) -> Array:
            product = device.dot(below(number), found, False, False)
            return found - device.dot(found, product, False, False)

        start = jnp.where(i == j, 1.0, 0.0) - below(jnp.int32(0))
        return device.loop(1, _levels(len(lower)), double, start)

    def solve(lower: Array, *sides: Array) -> tuple[Array, ...]:
        found = inverse(lower)
        return tuple(device.dot(found, x, False, False) for x in sides)

    def keep(lower: Array, *sides: Array) -> Any:
        found = inverse(lower)
        solved = tuple(device.dot(found, x, False, False) for x in sides)
        return solved, (found, solved)

    def pull(kept: Any, cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
        found, solved = kept
        d_sides = [device.dot(found, c, True, False) for c in cotangents]
        parts = [device.dot(d, x, False, True) for d, x in zip(d_sides, solved, strict=True)]
        return -sum(parts[1:], parts[0]), *d_sides

    return device.rule(solve, keep, pull)(lower, *sides)


def _reached(i: Array, j: Array, upto: str) -> Array:
    return {THROUGH: j <= i, BEFORE: j < i, AFTER: j > i}[upto]


def _mask(where: Array) -> Array:
    return jnp.where(where, 1.0, 0.0).astype(jnp.float32)


def _places(size: int) -> tuple[Array, Array]:
    """Row and column numbers, "C C"."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return i, j


def _levels(size: int) -> int:
    return size.bit_length() - 1
