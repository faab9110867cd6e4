"""All derivatives of attention from three folds, in O(T + S) memory.

Reverse mode is the tangent with the backward as its transpose.  Second derivatives need no fourth
fold: with f the forward, T(x, v) = f'(x) v and G(x, c) = f'(x)^T c, the derivative of <c, T(x, v)>
in x is the Hessian of <c, f> times v, which is also the derivative of G(x, c) along v, and the
Hessian is symmetric.  So the transposes of the derivatives of T and G are derivatives of G and T.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from attnlab.core.folds import Folds
from attnlab.core.linear_map import custom_linear
from attnlab.core.tiles import Leaves, replaced


def _spread(values: Sequence[Any], places: Sequence[int], size: int) -> Leaves:
    return replaced([None] * size, values, places)


def _moving(tangents: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero))


def _directional(function: Callable, x: Leaves, dx: Leaves) -> Any:
    """The derivative of `function(x)` along `dx`, where None means zero."""
    places = [i for i, d in enumerate(dx) if d is not None]

    def along(*values: Any) -> Any:
        return function(replaced(x, values, places))

    return jax.jvp(along, tuple(x[i] for i in places), tuple(dx[i] for i in places))[1]


def _no_change(result: Any) -> tuple[Any, Any]:
    return result, jax.tree.map(jnp.zeros_like, result)


def make_solver(folds: Folds, plain: Folds | None = None) -> Callable:
    """`solve(x, aux) -> (out, lse)`, differentiable in `x` to any order, forward and reverse.

    `plain`: folds that JAX can differentiate, for second derivatives; `folds` if left out.
    """
    plain = folds if plain is None else plain

    def total_tangent(x: Leaves, aux: Any, dx: Leaves) -> Any:
        return plain.tangent(x, aux, *plain.forward(x, aux), dx)

    def total_backward(wanted: tuple[int, ...], x: Leaves, aux: Any, cotangent: Any) -> Leaves:
        return plain.backward(wanted, x, aux, *plain.forward(x, aux), cotangent)

    @jax.custom_jvp
    def forward(x: Leaves, aux: Any) -> tuple[Array, Array]:
        return folds.forward(x, aux)

    def forward_rule(primals: Any, tangents: Any) -> Any:
        x, aux = primals
        out = forward(x, aux)
        moving = _moving(tangents[0])
        if not moving:
            return _no_change(out)

        def push(residuals: Any, dx: Leaves) -> Any:
            return tangent(moving)(*residuals, dx)

        def pull(residuals: Any, cotangent: Any) -> Leaves:
            return backward(moving)(*residuals, cotangent)

        dx = [tangents[0][i] for i in moving]
        return out, custom_linear(push, pull, (x, aux, *out), dx)

    # The derivatives of the two other folds.  `out` and `lse` are functions of x, so the rules take
    # total derivatives in x and ignore the tangents of `out` and `lse`.

    @functools.cache
    def tangent(moving: tuple[int, ...]) -> Callable:
        @jax.custom_jvp
        def apply(x: Leaves, aux: Any, out: Array, lse: Array, dx: Leaves) -> Any:
            return folds.tangent(x, aux, out, lse, _spread(dx, moving, len(x)))

        def rule(primals: Any, tangents: Any) -> Any:
            result = apply(*primals)
            in_x, in_dx = _moving(tangents[0]), _moving(tangents[4])
            if not in_x and not in_dx:
                return _no_change(result)

            def push(residuals: Any, operand: Any) -> Any:
                x, aux, _, _, dx = residuals
                n = len(x)
                return _directional(
                    lambda both: total_tangent(both[:n], aux, _spread(both[n:], moving, n)),
                    [*x, *dx],
                    [*_spread(operand[0], in_x, n), *_spread(operand[1], in_dx, len(dx))],
                )

            def pull(residuals: Any, cotangent: Any) -> Any:
                x, aux, out, lse, dx = residuals
                curved = _directional(
                    lambda y: total_backward(in_x, y, aux, cotangent),
                    x,
                    _spread(dx, moving, len(x)),
                )
                chosen = tuple(moving[i] for i in in_dx)
                return curved, folds.backward(chosen, x, aux, out, lse, cotangent)

            operand = [tangents[0][i] for i in in_x], [tangents[4][i] for i in in_dx]
            return result, custom_linear(push, pull, primals, operand)

        apply.defjvp(rule, symbolic_zeros=True)
        return apply

    @functools.cache
    def backward(wanted: tuple[int, ...]) -> Callable:
        @jax.custom_jvp
        def apply(x: Leaves, aux: Any, out: Array, lse: Array, cotangent: Any) -> Leaves:
            return folds.backward(wanted, x, aux, out, lse, cotangent)

        def rule(primals: Any, tangents: Any) -> Any:
            result = apply(*primals)
            in_x, in_cotangent = _moving(tangents[0]), _moving(tangents[4])
            if not in_x and not in_cotangent:
                return _no_change(result)

            def push(residuals: Any, operand: Any) -> Leaves:
                x, aux, _, _, cotangent = residuals
                n = len(x)
                return _directional(
                    lambda both: total_backward(wanted, both[:n], aux, tuple(both[n:])),
                    [*x, *cotangent],
                    [*_spread(operand[0], in_x, n), *_spread(operand[1], in_cotangent, 2)],
                )

            def pull(residuals: Any, u: Leaves) -> Any:
                x, aux, out, lse, cotangent = residuals
                direction = _spread(u, wanted, len(x))
                curved = _directional(
                    lambda y: total_backward(in_x, y, aux, cotangent), x, direction
                )
                moved = folds.tangent(x, aux, out, lse, direction)
                return curved, [moved[i] for i in in_cotangent]

            operand = [tangents[0][i] for i in in_x], [tangents[4][i] for i in in_cotangent]
            return result, custom_linear(push, pull, primals, operand)

        apply.defjvp(rule, symbolic_zeros=True)
        return apply

    forward.defjvp(forward_rule, symbolic_zeros=True)
    return forward
