"""Running a kernel on the arrays of a problem, with a rule for `vmap`."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from pallas_kernels.flash.problem import Arrays, Spec


def body(backend: str) -> Any:
    """The module with the kernels of a backend, imported when first needed."""
    return importlib.import_module(f"pallas_kernels.flash.{backend}")


def over_batch(function: Callable, split: bool) -> Callable:
    """`function(arrays)` with a rule for `vmap`: the mapped axis joins the batch.

    Every array has a batch axis in front, of length one where nothing depends on it.  With `split`
    the outputs have one more axis before the batch.
    """
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, batched: Any, arrays: Any) -> Any:
        flat, tree = jax.tree.flatten(arrays)
        marks = jax.tree.leaves(batched)
        batch = max(x.shape[1] if m else x.shape[0] for x, m in zip(flat, marks, strict=True)
                    if x.ndim > int(m))  # fmt: skip

        def join(x: Array, is_mapped: bool, must: bool) -> Array:
            if x.ndim == int(is_mapped):  # the length of a list of tiles
                return x.max() if is_mapped else x
            lead = x.shape[1] if is_mapped else x.shape[0]
            if not is_mapped and lead == 1 and not must:
                return x
            x = x if is_mapped else x[None]
            rest = x.shape[2:]
            return jnp.broadcast_to(x, (size, batch, *rest)).reshape(size * batch, *rest)

        required = _required(arrays)
        joined = [join(x, m, id(x) in required) for x, m in zip(flat, marks, strict=True)]
        result = mapped(jax.tree.unflatten(tree, joined))

        def part(x: Array) -> Array:
            if split:
                return jnp.moveaxis(x.reshape(x.shape[0], size, batch, *x.shape[2:]), 1, 0)
            return x.reshape(size, x.shape[0] // size, *x.shape[1:])

        return jax.tree.map(part, result), jax.tree.map(lambda _: True, result)

    return mapped


def _required(arrays: Any) -> set[int]:
    """Arrays that must have the whole batch axis: query, key, value and what goes with queries."""
    first = arrays if isinstance(arrays, Arrays) else arrays[0]
    more = [] if isinstance(arrays, Arrays) else list(arrays[2:])
    return {id(x) for x in (first.query, first.key, first.value, *more)}


@functools.cache
def _launcher(kind: str, backend: str, spec: Spec, interpreted: bool, option: Any) -> Callable:
    module = body(backend)
    if kind == "forward":
        return over_batch(
            lambda arrays: module.forward(spec, arrays, splits=option, interpret=interpreted), True
        )
    return over_batch(
        lambda inputs: module.backward(spec, *inputs, option, interpret=interpreted), False
    )


def launch_forward(
    backend: str, spec: Spec, interpreted: bool, splits: int, arrays: Arrays
) -> tuple[Array, Array]:
    """Output "splits B N T D" and log-sum-exp "splits B N T" of a problem."""
    return _launcher("forward", backend, spec, interpreted, splits)(arrays)


def launch_backward(
    backend: str, spec: Spec, interpreted: bool, wanted: tuple[int, ...], inputs: Any
) -> tuple[Array, Array, Array, list[Array]]:
    """dq, dk, dv and gradients of leaves, each with a batch axis of its own."""
    return _launcher("backward", backend, spec, interpreted, wanted)(inputs)
