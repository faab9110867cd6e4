"""A linear map with a transpose of one's own choosing.

JAX derives reverse mode by transposing the tangent map.  Where the transpose it would derive is
correct but wasteful (it would keep every tile of a fold), `custom_linear` puts a better one in its
place, while forward mode, `vmap`, `jit`, `checkpoint` and further derivatives go on working.
`jax.custom_vjp` forbids forward mode and `jax.custom_derivatives.linear_call` cannot be batched or
differentiated in its residuals; hence this primitive.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

linear_p = Primitive("attnlab_linear")
linear_p.multiple_results = True


def custom_linear(fun: Callable, transpose: Callable, residuals: Any, operand: Any) -> Any:
    """`fun(residuals, operand)`, linear in `operand`, transposed as `transpose` says.

    `transpose(residuals, cotangent)` maps a cotangent of the result to one of `operand`.  All
    leaves of `operand` and of the result are floating-point arrays.
    """
    flat_residuals, residual_tree = jax.tree.flatten(residuals)
    flat_operand, operand_tree = jax.tree.flatten(operand)
    num_residuals = len(flat_residuals)
    _, out_tree = jax.tree.flatten(jax.eval_shape(fun, residuals, operand))

    def flat_call(function: Callable, in_tree: Any) -> Callable:
        def call(*args: Any) -> list:
            left = jax.tree.unflatten(residual_tree, args[:num_residuals])
            right = jax.tree.unflatten(in_tree, args[num_residuals:])
            return jax.tree.leaves(function(left, right))

        return call

    out = linear_p.bind(
        *flat_residuals,
        *flat_operand,
        fun=flat_call(fun, operand_tree),
        transpose=flat_call(transpose, out_tree),
        num_residuals=num_residuals,
    )
    return jax.tree.unflatten(out_tree, out)


def _run(*args: Any, fun: Callable, transpose: Callable, num_residuals: int) -> list:
    return fun(*args)


def _abstract(*avals: Any, fun: Callable, **_: Any) -> tuple[list, Any]:
    """Shapes, and effects: interpreted kernels of several devices have some."""
    code = jax.make_jaxpr(fun)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
    return [jax.core.ShapedArray(s.shape, s.dtype) for s in code.out_avals], code.effects


def _instantiate(tangent: Any) -> Any:
    return ad.instantiate_zeros(tangent)


def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    fun: Callable,
    transpose: Callable,
    num_residuals: int,
) -> tuple[list, list]:
    params = {"fun": fun, "transpose": transpose, "num_residuals": num_residuals}
    out = linear_p.bind(*primals, **params)
    residuals, operand = primals[:num_residuals], primals[num_residuals:]
    d_residuals, d_operand = tangents[:num_residuals], tangents[num_residuals:]
    parts = []
    if any(type(t) is not ad.Zero for t in d_operand):
        parts.append(linear_p.bind(*residuals, *map(_instantiate, d_operand), **params))
    moving = [i for i, t in enumerate(d_residuals) if type(t) is not ad.Zero and _floating(t)]
    if moving:

        def in_residuals(*values: Any) -> list:
            full = list(residuals)
            for i, value in zip(moving, values, strict=True):
                full[i] = value
            return fun(*full, *operand)

        at = [residuals[i] for i in moving]
        parts.append(jax.jvp(in_residuals, at, [d_residuals[i] for i in moving])[1])
    if not parts:
        return out, [jnp.zeros_like(x) for x in out]
    return out, [sum(terms[1:], terms[0]) for terms in zip(*parts, strict=True)]


def _floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, np.floating)


def _transpose(
    cotangents: Sequence[Any],
    *args: Any,
    fun: Callable,
    transpose: Callable,
    num_residuals: int,
) -> list:
    residuals = args[:num_residuals]
    out = linear_p.bind(
        *residuals,
        *map(_instantiate, cotangents),
        fun=transpose,
        transpose=fun,
        num_residuals=num_residuals,
    )
    return [None] * num_residuals + list(out)


def _batch(
    args: Sequence[Any],
    dims: Sequence[Any],
    *,
    fun: Callable,
    transpose: Callable,
    num_residuals: int,
) -> tuple[list, list]:
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    residuals = list(args[:num_residuals])
    # With every operand mapped, the transpose never has to sum over the new axis.
    operand = [
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args[num_residuals:], dims[num_residuals:], strict=True)
    ]
    axes = dims[:num_residuals]

    def mapped(function: Callable) -> Callable:
        def call(*flat: Any) -> list:
            in_axes = (*axes, *(0,) * (len(flat) - num_residuals))
            return jax.vmap(function, in_axes, 0, axis_size=size)(*flat)

        return call

    out = linear_p.bind(
        *residuals,
        *operand,
        fun=mapped(fun),
        transpose=mapped(transpose),
        num_residuals=num_residuals,
    )
    return out, [0] * len(out)


linear_p.def_impl(_run)
linear_p.def_effectful_abstract_eval(_abstract)
ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.primitive_batchers[linear_p] = _batch
mlir.register_lowering(linear_p, mlir.lower_fun(_run, multiple_results=True))
