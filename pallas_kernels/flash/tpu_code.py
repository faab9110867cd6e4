"""Elementwise code in primitives that Mosaic lowers for TPUs.

User code is arbitrary `jax.numpy`; a few primitives that it comes to have no lowering, but an
expression in others that have.  Derivatives are taken before, so that custom rules are honoured.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash.rewrite import evaluate, rewritten

# Calls of other code that nothing but inlining would lower.
_CALLS = frozenset(("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint",
                    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))  # fmt: skip


def _expm1(x: Any) -> Any:
    # A series where e^x - 1 would cancel.
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return jnp.where(jnp.abs(x) < 0.4, series, jnp.exp(x) - 1)


def _atan(x: Any) -> Any:
    return lax.atan2(x, jnp.ones_like(x))


def _asinh(x: Any) -> Any:
    return jnp.log1p(x + x * x / (1 + jnp.sqrt(x * x + 1)))


def _polynomial(x: Any, *coefficients: Any) -> Any:
    total = jnp.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total


_EXPRESSIONS: dict[str, Callable] = {
    "acos": lambda x: lax.atan2(jnp.sqrt((1 - x) * (1 + x)), x),
    "acosh": lambda x: jnp.log(x + jnp.sqrt((x - 1) * (x + 1))),
    "asin": lambda x: lax.atan2(x, jnp.sqrt((1 - x) * (1 + x))),
    "asinh": lambda x: jnp.sign(x) * _asinh(jnp.abs(x)),
    "atan": _atan,
    "atanh": lambda x: (jnp.log1p(x) - jnp.log1p(-x)) / 2,
    "cbrt": lambda x: jnp.sign(x) * jnp.exp2(jnp.log2(jnp.abs(x)) / 3),
    "copy": lambda x: x,
    "cosh": lambda x: (jnp.exp(x) + jnp.exp(-x)) / 2,
    "expm1": _expm1,
    "polynomial": _polynomial,
    "sinh": lambda x: (_expm1(x) - _expm1(-x)) / 2,
}


def lowered(function: Callable) -> Callable:
    """The same function of pytrees of arrays, in primitives that TPUs have.

    Raises:
      NotImplementedError: an array is captured instead of being an argument.
    """

    return rewritten(function, _apply, _refuse_arrays)


def _refuse_arrays(consts: Sequence[Any]) -> None:
    for x in consts:
        if jnp.ndim(x) and not isinstance(x, jax.core.Tracer):
            raise NotImplementedError(
                f'implementation="tpu" cannot compile code that captures an array, here of '
                f"shape {jnp.shape(x)}; make it a parameter of the mask or modifier, or use "
                'implementation="blockwise".'
            )


def _apply(equation: Any, inputs: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        return evaluate(inner, getattr(inner, "consts", ()), inputs, _apply)
    if name == "select_n" and equation.outvars[0].aval.dtype == jnp.bool_ and len(inputs) == 3:
        # Registers of booleans cannot be selected from.
        which, otherwise, chosen = inputs
        return [(which & chosen) | (~which & otherwise)]
    if name in _EXPRESSIONS:
        dtypes = [x.aval.dtype for x in equation.invars]
        return [_EXPRESSIONS[name](*map(jnp.asarray, inputs, dtypes))]
    if params.get("accuracy") is not None:
        params = {**params, "accuracy": None}
    out = equation.primitive.bind(*inputs, **params)
    return list(out) if equation.primitive.multiple_results else [out]
