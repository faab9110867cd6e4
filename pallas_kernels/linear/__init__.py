r"""Fused kernels of the linear-state recurrence, forward and backward.

    S_t = diag(exp(g_t)) S_{t-1} + k_t (v_t - S_{t-1}^T e_t)^T,      o_t = S_t^T q_t

`tile` is the mathematics of a chunk of steps, `plan` says how a sequence is cut, `triton` and `tpu`
hold the bodies, each with `forward` and `backward`.  `attnlab.core.recurrence` calls what is here;
nothing here needs attnlab or Flax:

    out, state = linear_recurrence(Steps(query, key, value, log_decay, erase), state, "triton")
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from pallas_kernels.linear.plan import device_kind, padded
from pallas_kernels.linear.problem import Plan, Steps

__all__ = ["Cut", "Plan", "Steps", "backward", "body", "forward", "limits", "linear_recurrence"]


def body(backend: str) -> Any:
    """The module with the kernels of a backend, imported when first needed."""
    return importlib.import_module(f"pallas_kernels.linear.{backend}")


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is static about a call: whose kernels, how cut (None: as the backend has it)."""

    backend: str
    chunk_size: int | None = None
    value_block: int | None = None
    interpret: Any = False

    def plan(self, steps: Steps, backward: bool, chunk_size: int | None = None) -> Plan:
        plan = body(self.backend).plan(
            steps, chunk_size or self.chunk_size, backward, device_kind()
        )
        return dataclasses.replace(plan, value_block=self.value_block or plan.value_block)


def linear_recurrence(
    steps: Steps,
    state: Array,
    backend: str,
    *,
    chunk_size: int | None = None,
    value_block: int | None = None,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Output "*B K G T D" and the state after the last step, float32 "*B K H D".

    Args:
      steps: query "*B K G T H" (G queries share a key head), key "*B K T H", value "*B K T D";
        log_decay <= 0 "*B K T X", X = H or 1, and erase "*B K T H", or None.
      state: before the first step, float32 "*B K H D".
      backend: "triton" or "tpu".
      chunk_size, value_block: steps to a chunk and columns of the state to a program, for tests and
        tuning; by default as the backend's `plan` has it.
      interpret: True, or for "tpu" parameters of its interpreter, where the device is missing.

    Raises:
      NotImplementedError: what the backend cannot do, as its `limits` say.
    """
    limit = limits(steps, backend, chunk_size)
    if limit:
        raise NotImplementedError(f'backend="{backend}" {limit}.')
    return _solve(Cut(backend, chunk_size, value_block, interpret), steps, state)


def limits(steps: Steps, backend: str, chunk_size: int | None = None) -> str | None:
    """What keeps the kernels of a backend from serving these steps, or None."""
    return body(backend).limits(steps, chunk_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(cut: Cut, steps: Steps, state: Array) -> tuple[Array, Array]:
    return forward(cut, steps, state)[:2]


def _keep(cut: Cut, steps: Steps, state: Array) -> Any:
    out, final, found = forward(cut, steps, state, keep=True)
    return (out, final), (steps, found)


def _pull(cut: Cut, kept: Any, cotangent: tuple[Array, Array]) -> tuple[Steps, Array]:
    steps, found = kept
    return backward(cut, steps, found, *cotangent)


_solve.defvjp(_keep, _pull)


def forward(
    cut: Cut, steps: Steps, state: Array, *, keep: bool = False
) -> tuple[Array, Array, Any]:
    """Output, last state, and with `keep` what `backward` wants."""
    plan = cut.plan(steps, False, cut.plan(steps, True).chunk if keep else None)
    flat = _flat(cut.backend, plan, steps)
    width, columns = flat.key.shape[-1], flat.value.shape[-1]
    start = _fit(state.astype(jnp.float32), width, columns)
    start = start.reshape(-1, width, columns)
    out, final, kept = _run("forward", cut, plan, keep, (flat, start))
    *lead, length, _ = steps.query.shape
    out = out.reshape(*lead, *out.shape[-2:])[..., :length, : steps.value.shape[-1]]
    final = final[:, : state.shape[-2], : state.shape[-1]].reshape(state.shape)
    return out.astype(steps.query.dtype), final, kept


def backward(
    cut: Cut, steps: Steps, kept: Any, d_out: Array, d_final: Array
) -> tuple[Steps, Array]:
    """Cotangents of the steps and of the first state."""
    plan = cut.plan(steps, True)
    flat = _flat(cut.backend, plan, steps)
    (size, length, width), columns = flat.key.shape, flat.value.shape[-1]
    d_end = _fit(d_final, width, columns).reshape(size, width, columns)
    d_read = _fit(d_out, length, columns).reshape(size, -1, length, columns)
    found, d_start = _run("backward", cut, plan, None, (flat, kept, d_read, d_end))

    def restore(d: Array, like: Array) -> Array:
        d = d[..., : like.shape[-2], : like.shape[-1]]
        return d.reshape(like.shape).astype(like.dtype)

    return jax.tree.map(restore, found, steps), restore(d_start, d_final)


def _flat(backend: str, plan: Plan, steps: Steps) -> Steps:
    """One axis of key heads, whole chunks, widths that the backend takes."""
    fit = body(backend).padded_width
    length = padded(steps.key.shape[-2], plan.chunk)
    width = fit(steps.key.shape[-1])
    columns = fit(padded(steps.value.shape[-1], plan.value_block))
    widths = (width, width, columns, 1 if steps.decay == "step" else width, width)

    def one(x: Array | None, width: int, axes: int) -> Array | None:
        return (
            None
            if x is None
            else _fit(x, length, width).reshape(-1, *(x.shape[-axes:-2]), length, width)
        )

    axes = (3, 2, 2, 2, 2)
    flat = Steps(*(one(x, w, a) for x, w, a in zip(steps, widths, axes, strict=True)))
    decay = flat.log_decay
    return flat._replace(log_decay=None if decay is None else decay.astype(jnp.float32))


def _fit(x: Array, rows: int, columns: int) -> Array:
    """Zeros behind the last rows and columns: they neither write, decay, erase nor read."""
    missing = rows - x.shape[-2], columns - x.shape[-1]
    widths = [(0, 0)] * (x.ndim - 2) + [(0, n) for n in missing]
    return jnp.pad(x, widths) if any(missing) else x


def _run(name: str, cut: Cut, plan: Plan, keep: bool | None, arrays: Any) -> Any:
    """A kernel on arrays with one axis in front; what `vmap` maps joins that axis."""
    function = getattr(body(cut.backend), name)
    more = {} if keep is None else {"keep": keep}
    call = functools.partial(function, plan, interpret=cut.interpret, **more)

    @custom_vmap
    def mapped(arrays: Any) -> Any:
        return call(*arrays)

    @mapped.def_vmap
    def rule(size: int, batched: Any, arrays: Any) -> Any:
        def join(x: Array, is_mapped: bool) -> Array:
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        flat, tree = jax.tree.flatten(arrays)
        joined = map(join, flat, jax.tree.leaves(batched))
        found = mapped(jax.tree.unflatten(tree, joined))
        found = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return mapped(arrays)
