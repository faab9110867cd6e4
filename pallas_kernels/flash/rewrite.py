"""Running a traced function equation by equation, each as a compiler has it lowered."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

Apply = Callable[[Any, list[Any]], list[Any]]


def rewritten(
    function: Callable, apply: Apply, check: Callable[[Sequence[Any]], None] | None = None
) -> Callable:
    """The same function of pytrees of arrays, made of what `apply(equation, inputs)` returns.

    `check` is handed the arrays that the function captures.
    """

    def run(*args: Any) -> Any:
        flat, tree = jax.tree.flatten(args)
        closed, shape = jax.make_jaxpr(
            lambda *flat: function(*jax.tree.unflatten(tree, flat)), return_shape=True
        )(*flat)
        if check is not None:
            check(closed.consts)
        out = evaluate(closed.jaxpr, closed.consts, flat, apply)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], apply: Apply) -> list[Any]:
    """The outputs of a jaxpr, or of a closed one, whose equations `apply` carries out."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(x: Any) -> Any:
        return x.val if hasattr(x, "val") else values[x]

    for equation in _needed(jaxpr):
        out = apply(equation, [read(x) for x in equation.invars])
        values.update(zip(equation.outvars, out, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _needed(jaxpr: Any) -> list[Any]:
    """The equations that outputs depend on, or that have effects."""
    wanted = {x for x in jaxpr.outvars if not hasattr(x, "val")}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or wanted.intersection(equation.outvars):
            kept.append(equation)
            wanted.update(x for x in equation.invars if not hasattr(x, "val"))
    return kept[::-1]
