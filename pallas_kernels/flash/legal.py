"""Rewriting of elementwise code into the primitives that Mosaic GPU can lower.

User code is arbitrary `jax.numpy`; Mosaic GPU lowers fewer primitives than XLA.  What has an exact
or equally accurate expression in those it has is rewritten, everything else is refused by name.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash.rewrite import evaluate, rewritten

# What Mosaic GPU lowers for whole warpgroups, as of JAX 0.12 (0.11 has no fewer of these).
_LOWERED = frozenset(
    {
        "abs", "add", "and", "atan2", "bitcast_convert_type", "broadcast_in_dim", "clamp",
        "div", "eq", "erf", "exp", "exp2", "ge", "gt", "iota", "layout_cast", "le",
        "log", "log2", "logistic", "lt", "max", "min", "mul", "ne", "neg", "one_minus_square",
        "or", "reduce_sum", "rem", "round", "rsqrt", "select_n", "shift_left",
        "shift_right_arithmetic", "shift_right_logical", "sign", "sqrt", "square", "sub",
        "xor",
    }
)  # fmt: skip


def _log1p(x: Any) -> Any:
    # Near 1 the hardware's logarithm is exact to 2e-7 only in absolute terms; there a series in
    # z = x / (2 + x), of which log(1 + x) is twice the inverse hyperbolic tangent.
    z = x / (2 + x)
    squared = z * z
    series = 2 * z * (1 + squared * (1 / 3 + squared * (1 / 5 + squared / 7)))
    return jnp.where(jnp.abs(x) < 0.25, series, jnp.log(1 + x))


def _expm1(x: Any) -> Any:
    # x e^(x/2) sinh(x/2) / (x/2): a series where e^x - 1 would cancel.
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))
    return jnp.where(jnp.abs(x) < 0.3, series, jnp.exp(x) - 1)


def _tanh(x: Any) -> Any:
    # The hardware's tanh is off by 5e-4, which a soft cap would multiply; this is off by 1e-7.
    squared = x * x
    series = x * (1 + squared * (-1 / 3 + squared * (2 / 15 - squared * (17 / 315))))
    return jnp.where(jnp.abs(x) < 0.1, series, 1 - 2 / (1 + jnp.exp(2 * x)))


def _pow(x: Any, y: Any) -> Any:
    y = y.astype(x.dtype)
    size = jnp.exp2(y * jnp.log2(jnp.abs(x)))
    whole = _floor(y) == y
    odd = whole & (_floor(y / 2) * 2 != y)
    signed = jnp.where(whole, jnp.where(odd, -size, size), jnp.nan)
    return jnp.where(y == 0, 1.0, jnp.where(x < 0, signed, size))


def _integer_pow(x: Any, y: int) -> Any:
    if y == 0:
        return jnp.ones_like(x)
    size = x if abs(y) == 1 else lax.integer_pow(x, abs(y))
    return size if y > 0 else 1 / size


def _turned(function: Callable) -> Callable:
    """Sine or cosine of an angle brought within half a turn, where the hardware's is accurate."""

    def run(x: Any, **_: Any) -> Any:
        turns = lax.round(x / (2 * np.pi), lax.RoundingMethod.TO_NEAREST_EVEN)
        # Two pi in two parts, of which the first has few bits, so that its product is exact.
        return function((x - turns * 6.28125) - turns * (2 * np.pi - 6.28125))

    return run


def _floor(x: Any) -> Any:
    near = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.where(near > x, near - 1, near)


def _convert(x: Any, *, new_dtype: Any, **options: Any) -> Any:
    if new_dtype == jnp.bool_ and x.dtype != jnp.bool_:
        return x != 0  # Mosaic would keep the lowest bit
    return lax.convert_element_type(x, new_dtype)


def _not(x: Any) -> Any:
    return x ^ True if x.dtype == jnp.bool_ else x ^ -1


_REWRITTEN: dict[str, Callable] = {
    "add_any": lax.add,
    "cbrt": lambda x, **_: jnp.sign(x) * jnp.exp2(jnp.log2(jnp.abs(x)) / 3),
    "ceil": lambda x: -_floor(-x),
    "convert_element_type": _convert,
    "cos": _turned(lax.cos),
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "cosh": lambda x: (jnp.exp(x) + jnp.exp(-x)) / 2,
    "erfc": lambda x: 1 - lax.erf(x),
    "expm1": lambda x, **_: _expm1(x),
    "floor": _floor,
    "integer_pow": _integer_pow,
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "log1p": lambda x, **_: _log1p(x),
    "not": _not,
    "pow": _pow,
    "reduce_precision": lambda x, **_: x,
    "reshard": lambda x, **_: x,
    "sin": _turned(lax.sin),
    "sinh": lambda x: (_expm1(x) - _expm1(-x)) / 2,
    "stop_gradient": lambda x: x,
    "tan": lambda x, **_: _turned(lax.sin)(x) / _turned(lax.cos)(x),
    "tanh": lambda x, **_: _tanh(x),
}


def legal(function: Callable) -> Callable:
    """The same function of pytrees of arrays, in primitives that Mosaic GPU can lower.

    Raises:
      NotImplementedError: a primitive that is neither lowered nor rewritten.
    """

    return rewritten(function, _apply)


def _apply(eqn: Any, inputs: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    inner = next((eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params), None)
    if inner is not None and name not in ("scan", "while", "cond"):
        # Calls are inlined; derivatives have been taken by now, so custom rules play no part.
        return evaluate(inner, getattr(inner, "consts", ()), inputs, _apply)
    if name == "broadcast_in_dim" and jnp.ndim(inputs[0]) == 0:
        # jax.numpy spreads a scalar over an array of rank 2 and size 1 first, which Mosaic cannot
        # spread further without a long search: such an array stays a scalar here.
        shape = eqn.params["shape"]
        return [inputs[0] if math.prod(shape) == 1 else lax.broadcast(inputs[0], shape)]
    if name in _REWRITTEN:
        inputs = [jnp.asarray(x, v.aval.dtype) for x, v in zip(inputs, eqn.invars, strict=True)]
        params = {k: v for k, v in eqn.params.items() if k != "accuracy"}
        return [_REWRITTEN[name](*inputs, **params)]
    if name not in _LOWERED or (name == "select_n" and len(inputs) > 3):
        raise NotImplementedError(
            f'implementation="mosaic_gpu" cannot compile the primitive "{name}" of a mask, '
            'modifier or normalizer; implementation="triton" can.'
        )
    if eqn.params.get("accuracy") is not None:
        raise NotImplementedError(
            f'implementation="mosaic_gpu" has one accuracy of "{name}"; '
            'implementation="blockwise" can choose.'
        )
    out = eqn.primitive.bind(*inputs, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]
