"""The linear-state recurrence for GPUs from Ampere on, through Triton.

One program owns one key head and a block of the state's columns, and walks the chunks of a sequence
in order; the state stays in registers.  The backward pass walks them from the last to the first,
with the state at the start of each chunk as the forward pass kept it, and the cotangent of the
state in registers.
"""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.linear import tile
from pallas_kernels.linear.plan import chunk_limit, power_of_two, triton_plan
from pallas_kernels.linear.problem import Plan, Steps, sizes, step_limits
from pallas_kernels.linear.tile import Decay, Device


def limits(steps: Steps, chunk_size: int | None = None) -> str | None:
    """What keeps these bodies from serving steps of these dtypes and widths, or None."""
    return step_limits(steps) or (chunk_size and chunk_limit(chunk_size)) or None


def padded_width(width: int) -> int:
    """Triton's arrays have powers of two as sizes."""
    return power_of_two(width)


def plan(steps: Steps, chunk_size: int | None, backward: bool, kind: str) -> Plan:
    """How to cut these steps."""
    *_, length, width = steps.key.shape
    columns, erase = steps.value.shape[-1], steps.erase is not None
    return triton_plan(width, columns, length, steps.decay, erase, backward, chunk_size)


# Set while a kernel is traced for the interpreter.
_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


def _dot(a: Array, b: Array, trans_a: bool, trans_b: bool) -> Array:
    precision = None
    if a.dtype == jnp.float32:
        # Three products in tf32 keep float32's precision, on the tensor cores; interpreted, XLA
        # multiplies in float32 itself.
        three = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = jax.lax.Precision.HIGHEST if _interpreted.get() else three
    return plgpu.dot(a, b, trans_a, trans_b, precision=precision).astype(jnp.float32)


class _Chunk:
    """The refs of a call, read chunk by chunk."""

    def __init__(self, plan: Plan, refs: Steps, p: Any, block: Any) -> None:
        self.plan, self.refs, self.p = plan, refs, p
        self.columns = pl.ds(block * plan.value_block, plan.value_block)

    def rows(self, number: Any) -> Any:
        return pl.ds(number * self.plan.chunk, self.plan.chunk)

    def state(self, ref: Any) -> Array:
        return ref[self.p, :, self.columns]

    def decay(self, number: Any) -> Decay:
        ref, rows = self.refs.log_decay, self.rows(number)
        if ref is None:
            return Decay()
        if ref.shape[-1] > 1:
            return Decay(ref[self.p, rows, :].astype(jnp.float32))
        size, width = self.plan.chunk, self.plan.value_block
        g = ref[self.p, rows, 0].astype(jnp.float32)[:, None]
        return Decay(*(jnp.broadcast_to(g, (size, n)) for n in (width, size)))

    def written(self, number: Any) -> tuple[Array, Array, Decay, Array | None]:
        """Key, value, decay and erase."""
        refs, rows = self.refs, self.rows(number)
        key = refs.key[self.p, rows, :].astype(jnp.float32)
        value = refs.value[self.p, rows, self.columns].astype(jnp.float32)
        erase = None if refs.erase is None else refs.erase[self.p, rows, :].astype(jnp.float32)
        return key, value, self.decay(number), erase

    def query(self, number: Any, member: Any) -> Array:
        return self.refs.query[self.p, member, self.rows(number), :].astype(jnp.float32)


def _forward_kernel(plan: Plan, tree: Any, half: Any, keep: bool, *refs: Any) -> None:
    *inputs, out_ref, final_ref = refs[:-1] if keep else refs
    steps, initial_ref = jax.tree.unflatten(tree, inputs)
    device = Device(_dot, half)
    p, block = pl.program_id(0), pl.program_id(1)
    chunk = _Chunk(plan, steps, p, block)

    def step(number: Any, state: Array) -> Array:
        if keep:
            refs[-1][p, number, :, chunk.columns] = state
        key, value, decay, erase = chunk.written(number)
        following, write = tile.advance(device, state, key, value, decay, erase)

        def one(member: Any, carry: Any) -> Any:
            query = chunk.query(number, member)
            out = tile.read(device, state, query, key, write, decay)
            out_ref[p, member, chunk.rows(number), chunk.columns] = out.astype(out_ref.dtype)
            return carry

        _for_each(steps.query.shape[1], one, jnp.int32(0))
        return following

    count, _ = sizes(steps, plan)
    final = jax.lax.fori_loop(0, count, step, chunk.state(initial_ref))
    final_ref[p, :, chunk.columns] = final


def _for_each(count: int, body: Callable, state: Any) -> Any:
    return body(0, state) if count == 1 else jax.lax.fori_loop(0, count, body, state)


def _backward_kernel(plan: Plan, tree: Any, half: Any, *refs: Any) -> None:
    inputs, outputs = refs[: tree.num_leaves], refs[tree.num_leaves :]
    steps, starts_ref, d_out_ref, d_final_ref = jax.tree.unflatten(tree, inputs)
    d_initial_ref, *d_refs = outputs
    d_steps = jax.tree.unflatten(jax.tree.structure(steps), d_refs)
    device = Device(_dot, half, pulled=True)
    p, block = pl.program_id(0), pl.program_id(1)
    chunk = _Chunk(plan, steps, p, block)
    count, _ = sizes(steps, plan)

    def step(number: Any, d_following: Array) -> Array:
        number = count - 1 - number
        rows = chunk.rows(number)
        state = starts_ref[p, number, :, chunk.columns]
        key, value, decay, erase = chunk.written(number)
        (_, write), pull = jax.vjp(
            functools.partial(tile.advance, device), state, key, value, decay, erase
        )

        def one(member: Any, totals: Any) -> Any:
            query = chunk.query(number, member)
            d_out = d_out_ref[p, member, rows, chunk.columns].astype(jnp.float32)
            at = (state, query, key, write, decay)
            d_state, d_query, *parts = jax.vjp(functools.partial(tile.read, device), *at)[1](d_out)
            ref = d_steps.query
            ref[block, p, member, rows, :] = d_query.astype(ref.dtype)
            return jax.tree.map(jnp.add, totals, (d_state, *parts))

        start = jax.tree.map(jnp.zeros_like, (state, key, write, decay))
        d_state, d_key, d_write, d_decay = _for_each(steps.query.shape[1], one, start)
        more = pull((d_following, d_write))
        d_state, d_key, d_decay = jax.tree.map(
            jnp.add, (d_state, d_key, d_decay), (more[0], more[1], more[3])
        )
        for ref, d in ((d_steps.key, d_key), (d_steps.erase, more[4])):
            if ref is not None:
                ref[block, p, rows, :] = d.astype(ref.dtype)
        d_steps.value[p, rows, chunk.columns] = more[2].astype(d_steps.value.dtype)
        if decay.shared:
            d_steps.log_decay[block, p, rows, 0] = sum(jnp.sum(d, axis=1) for d in d_decay)
        elif d_steps.log_decay is not None:
            d_steps.log_decay[block, p, rows, :] = d_decay.wide
        return d_state

    d_state = jax.lax.fori_loop(0, count, step, chunk.state(d_final_ref))
    d_initial_ref[p, :, chunk.columns] = d_state


def _call(
    kernel: Callable, plan: Plan, grid: tuple[int, ...], inputs: Any, out: Any, name: str,
    interpret: Any,
) -> Any:  # fmt: skip
    flat, tree = jax.tree.flatten(inputs)

    def traced(*refs: Any) -> None:
        token = _interpreted.set(bool(interpret))
        try:
            kernel(tree, *refs)
        finally:
            _interpreted.reset(token)

    return pl.pallas_call(
        traced,
        grid=grid,
        out_shape=out,
        interpret=bool(interpret),
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        name=name,
    )(*flat)


def forward(
    plan: Plan, steps: Steps, state: Array, *, keep: bool = False, interpret: Any = False
) -> tuple[Array, Array, Array | None]:
    """Output "P G T D", the last state, and with `keep` the states before chunks, "P C H D"."""
    count, blocks = sizes(steps, plan)
    shape = (*steps.query.shape[:3], steps.value.shape[-1])
    out = [
        jax.ShapeDtypeStruct(shape, steps.query.dtype),
        jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ]
    if keep:
        shape = (state.shape[0], count, *state.shape[1:])
        out.append(jax.ShapeDtypeStruct(shape, jnp.float32))

    def kernel(tree: Any, *refs: Any) -> None:
        _forward_kernel(plan, tree, steps.half, keep, *refs)

    grid = (state.shape[0], blocks)
    found = _call(kernel, plan, grid, (steps, state), tuple(out), "linear_forward", interpret)
    return found if keep else (*found, None)


def backward(
    plan: Plan, steps: Steps, starts: Array, d_out: Array, d_final: Array, *,
    interpret: Any = False,
) -> tuple[Steps, Array]:  # fmt: skip
    """The cotangents of the steps and of the first state, from those of what `forward` gave."""
    blocks = sizes(steps, plan)[1]

    def partial_sums(x: Array) -> jax.ShapeDtypeStruct:
        dtype = x.dtype if blocks == 1 else jnp.float32
        return jax.ShapeDtypeStruct((blocks, *x.shape), dtype)

    out = jax.tree.map(partial_sums, steps)
    out = out._replace(value=jax.ShapeDtypeStruct(steps.value.shape, steps.value.dtype))

    def kernel(tree: Any, *refs: Any) -> None:
        _backward_kernel(plan, tree, steps.half, *refs)

    d_state, *found = _call(
        kernel, plan, (d_final.shape[0], blocks), (steps, starts, d_out, d_final),
        (jax.ShapeDtypeStruct(d_final.shape, jnp.float32), *jax.tree.leaves(out)),
        "linear_backward", interpret,
    )  # fmt: skip
    d_steps = jax.tree.unflatten(jax.tree.structure(out), found)
    value = d_steps.value
    d_steps = jax.tree.map(lambda x: x[0] if blocks == 1 else jnp.sum(x, 0), d_steps)
    return d_steps._replace(value=value), d_state
