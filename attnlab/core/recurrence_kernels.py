"""The fused kernels behind `linear_recurrence`.

Forward and backward run in `pallas_kernels.linear`; forward-mode and higher derivatives, which no
kernel has, come from the chunked form, which computes the same function.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.core.kernels import device, interpreted, missing
from attnlab.core.linear_map import custom_linear
from attnlab.core.recurrence_forms import Steps, chunked
from pallas_kernels import linear
from pallas_kernels.linear import Cut

BACKENDS = ("triton", "tpu")
_CHUNK_SIZE = 64  # of the chunked form, where it stands in


def limit(steps: Steps, backend: str) -> str | None:
    """Why the kernels of a backend cannot serve these steps, or not on this machine, or None."""
    return missing(backend) or linear.limits(linear.Steps(*steps), backend)


def best(steps: Steps) -> str | None:
    """The backend of the present device, if it serves these steps."""
    backend = {"gpu": "triton", "tpu": "tpu"}.get(device()[0])
    return backend if backend and not limit(steps, backend) else None


def kernel_recurrence(steps: Steps, state: Array, backend: str) -> tuple[Array, Array]:
    """Output "*B K G T D" in the dtype of the query, and the last state.

    Raises NotImplementedError, with the reason, where the backend cannot.
    """
    reason = limit(steps, backend)
    if reason:
        raise NotImplementedError(
            f'implementation="{backend}" {reason}. implementation="chunked" can.'
        )
    return _solve(Cut(backend, interpret=interpreted()), linear.Steps(*steps), state)


def _formula(steps: Any, state: Array) -> tuple[Array, Array]:
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), Steps(*steps))
    out, state = chunked(wide, state, _CHUNK_SIZE)
    return out.astype(steps.query.dtype), state


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(cut: Cut, steps: Any, state: Array) -> tuple[Array, Array]:
    return linear.forward(cut, steps, state)[:2]


@_solve.defjvp
def _solve_tangent(cut: Cut, primals: Any, tangents: Any) -> Any:
    (*out, _), (*moved, _) = _keep_tangent(cut, primals, tangents)
    return tuple(out), tuple(moved)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _keep(cut: Cut, steps: Any, state: Array) -> tuple[Array, Array, Any]:
    """With what the backward pass wants."""
    return linear.forward(cut, steps, state, keep=True)


@_keep.defjvp
def _keep_tangent(cut: Cut, primals: Any, tangents: Any) -> Any:
    *out, kept = _keep(cut, *primals)

    def push(residuals: Any, moved: Any) -> Any:
        return jax.jvp(_formula, residuals[0], moved)[1]

    def pull(residuals: Any, cotangent: Any) -> Any:
        return _pull(cut, *residuals, cotangent)

    moved = custom_linear(push, pull, (primals, kept), tangents)
    # A function of the primals, as the rule of `_pull` takes it: no tangent of its own.
    return (*out, kept), (*moved, jax.tree.map(jnp.zeros_like, kept))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pull(cut: Cut, primals: Any, kept: Any, cotangent: Any) -> Any:
    steps, _ = primals
    return linear.backward(cut, steps, kept, *cotangent)


@_pull.defjvp
def _pull_tangent(cut: Cut, primals: Any, tangents: Any) -> Any:
    (at, kept, cotangent), (moved, _, d_cotangent) = primals, tangents

    def plain(at: Any, cotangent: Any) -> Any:
        return jax.vjp(_formula, *at)[1](cotangent)

    _, change = jax.jvp(plain, (at, cotangent), (moved, d_cotangent))
    return _pull(cut, at, kept, cotangent), change
