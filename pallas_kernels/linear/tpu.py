"""The linear-state recurrence for TPUs, through Mosaic.

One core takes the chunks of a key head and a block of value columns one after the other, the last
axis of the grid; the state waits in vector memory.  A chunk is fetched while the one before it is
computed, and everything between the state before it and the state behind it is one step of the
grid.  The backward pass walks the chunks from the last to the first, from the states that the
forward pass wrote down where each chunk starts, with the cotangent of the state in their place.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.linear import tile
from pallas_kernels.linear.plan import chunk_limit, device_kind, tpu_memory, tpu_plan
from pallas_kernels.linear.problem import Plan, Steps, sizes, step_limits
from pallas_kernels.linear.tile import BEFORE, THROUGH, Decay, Device, Rows


def limits(steps: Steps, chunk_size: int | None = None) -> str | None:
    """What keeps these bodies from serving steps of these dtypes and widths, or None."""
    return step_limits(steps) or (chunk_size and chunk_limit(chunk_size)) or None


def padded_width(width: int) -> int:
    """Any width will do: a block holds all of it."""
    return width


def plan(steps: Steps, chunk_size: int | None, backward: bool, kind: str) -> Plan:
    """How to cut these steps."""
    return tpu_plan(steps.value.shape[-1], steps.key.shape[-2], chunk_size)


def _dot(a: Array, b: Array, trans_a: bool, trans_b: bool) -> Array:
    dims = (((0 if trans_a else 1,), (1 if trans_b else 0,)), ((), ()))
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dims, exact, preferred_element_type=jnp.float32)


# -- blocks --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Which block of each array belongs to a step (p, block, number) of the grid."""

    plan: Plan
    steps: Steps  # arrays, or the refs of their blocks
    count: int
    reverse: bool

    def spec(self, shape: tuple[int, ...], where: Callable[..., Any]) -> pl.BlockSpec:
        def index(p: Any, block: Any, number: Any) -> Any:
            return where(p, block, self.count - 1 - number if self.reverse else number)

        return pl.BlockSpec(shape, index)

    def keys(self) -> pl.BlockSpec:
        shape = (1, self.plan.chunk, self.steps.key.shape[-1])
        return self.spec(shape, lambda p, b, c: (p, c, 0))

    def values(self) -> pl.BlockSpec:
        shape = (1, self.plan.chunk, self.plan.value_block)
        return self.spec(shape, lambda p, b, c: (p, c, b))

    def queries(self) -> pl.BlockSpec:
        _, group, _, width = self.steps.query.shape
        return self.spec((1, group, self.plan.chunk, width), lambda p, b, c: (p, 0, c, 0))

    def outputs(self) -> pl.BlockSpec:
        group, width = self.steps.query.shape[1], self.plan.value_block
        return self.spec((1, group, self.plan.chunk, width), lambda p, b, c: (p, 0, c, b))

    def decay(self) -> pl.BlockSpec | None:
        """One number to a step lies along the lanes, a chunk to a row."""
        if self.steps.decay == "step":
            return self.spec((1, 1, 1, self.plan.chunk), lambda p, b, c: (p, c, 0, 0))
        return self.keys()

    def state(self) -> pl.BlockSpec:
        shape = (1, self.steps.key.shape[-1], self.plan.value_block)
        return self.spec(shape, lambda p, b, c: (p, 0, b))

    def starts(self) -> pl.BlockSpec:
        shape = (1, 1, self.steps.key.shape[-1], self.plan.value_block)
        return self.spec(shape, lambda p, b, c: (p, c, 0, b))

    def inputs(self) -> Steps:
        """For the steps as `_lanes` gives them."""
        specs = Steps(self.queries(), self.keys(), self.values(), self.decay(), self.keys())
        return Steps(*(
            None if x is None else spec for x, spec in zip(self.steps, specs, strict=True)
        ))  # fmt: skip

    def part(self, spec: pl.BlockSpec | None) -> pl.BlockSpec | None:
        """The same for an array with one entry for each block of columns in front."""
        if spec is None:
            return None
        where: Any = spec.index_map
        return pl.BlockSpec((1, *spec.block_shape), lambda p, b, n: (b, *where(p, b, n)))


def _lanes(plan: Plan, steps: Steps) -> Steps:
    """What kernels are given: no float16, which vector units do not know; decays along lanes."""
    steps = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float16 else x, steps)
    if steps.decay != "step":
        return steps
    shape = (len(steps.key), -1, 1, plan.chunk)
    return steps._replace(log_decay=steps.log_decay.reshape(shape))


def _chunk(refs: Steps) -> tuple[Rows, Rows, Rows | None]:
    """Key, value and erase of the present chunk, in one part each."""
    key, value = ((x[0].astype(jnp.float32),) for x in (refs.key, refs.value))
    return key, value, None if refs.erase is None else (refs.erase[0].astype(jnp.float32),)


def _decays(device: Device, kind: str, refs: Steps, *uptos: str) -> list[Decay]:
    """The decays of the present chunk, and their sums between pairs for each of `uptos`."""
    if kind == "none":
        return [Decay()] * len(uptos)
    if kind == "channel":
        return [Decay((tile.floored(refs.log_decay[0]),))] * len(uptos)
    row, size = tile.floored(refs.log_decay[0, 0]), refs.log_decay.shape[-1]
    wide = jnp.broadcast_to(row.T, (size, refs.key.shape[-1]))
    rows = jnp.broadcast_to(row, (size, size))
    return [Decay((wide,), tile.between(device, rows, upto)) for upto in uptos]


# -- kernels -------------------------------------------------------------------------------------


def _forward_kernel(
    device: Device, kind: str, count: int, steps: Steps, initial_ref: Any, out_ref: Any,
    final_ref: Any, starts_ref: Any, state_ref: Any,
) -> None:  # fmt: skip
    number = pl.program_id(2)

    @pl.when(number == 0)
    def _() -> None:
        state_ref[...] = initial_ref[0]

    state = (state_ref[...],)
    if starts_ref is not None:
        starts_ref[0, 0] = state[0]
    key, value, erase = _chunk(steps)
    before, decay = _decays(device, kind, steps, BEFORE, THROUGH)
    (fresh,), taken = tile.prepare(device, key, value, before, erase)
    write = tile.take(device, state, fresh, taken)

    def each(member: Any, carry: Any) -> Any:
        query = (steps.query[0, member].astype(jnp.float32),)
        out_ref[0, member] = tile.read(device, state, query, key, write, decay).astype(
            out_ref.dtype
        )
        return carry

    _for_each(steps.query.shape[1], each, jnp.int32(0))
    (state_ref[...],) = tile.put(device, state, key, write, decay)

    @pl.when(number == count - 1)
    def _() -> None:
        final_ref[0] = state_ref[...]


def _for_each(count: int, body: Callable, state: Any) -> Any:
    return body(0, state) if count == 1 else jax.lax.fori_loop(0, count, body, state)


def _backward_kernel(
    device: Device, kind: str, count: int, steps: Steps, starts_ref: Any, d_out_ref: Any,
    d_final_ref: Any, d_steps: Steps, d_initial_ref: Any, d_state_ref: Any,
) -> None:  # fmt: skip
    number = pl.program_id(2)

    @pl.when(number == 0)
    def _() -> None:
        d_state_ref[...] = d_final_ref[0]

    state = (starts_ref[0, 0],)
    key, value, erase = _chunk(steps)
    before, decay = _decays(device, kind, steps, BEFORE, THROUGH)
    ((fresh,), taken), pull_prepare = jax.vjp(
        functools.partial(tile.prepare, device), key, value, before, erase
    )
    write, pull_take = jax.vjp(functools.partial(tile.take, device), state, fresh, taken)

    def each(member: Any, totals: Any) -> Any:
        query = (steps.query[0, member].astype(jnp.float32),)
        pull = jax.vjp(functools.partial(tile.read, device), state, query, key, write, decay)[1]
        d_state, (d_query,), *parts = pull(d_out_ref[0, member].astype(jnp.float32))
        d_steps.query[0, 0, member] = d_query.astype(d_steps.query.dtype)
        return jax.tree.map(jnp.add, totals, (d_state, *parts))

    put = state, key, write, Decay(decay.wide)
    *totals, d_decay = jax.vjp(functools.partial(tile.put, device), *put)[1]((d_state_ref[...],))
    pairs = None if decay.pairs is None else jnp.zeros_like(decay.pairs)
    totals = *totals, Decay(d_decay.wide, pairs)
    totals = _for_each(steps.query.shape[1], each, totals)
    (d_state,), (d_key,), d_write, d_decay = totals
    (more,), d_fresh, d_taken = pull_take(d_write)
    d_state_ref[...] = d_state + more
    (more_key,), (d_value,), d_before, d_erase = pull_prepare(((d_fresh,), d_taken))
    d_key = d_key + more_key
    d_steps.value[0] = d_value.astype(d_steps.value.dtype)
    d_steps.key[0, 0] = d_key.astype(d_steps.key.dtype)
    if d_erase is not None:
        d_steps.erase[0, 0] = d_erase[0].astype(d_steps.erase.dtype)
    if kind == "channel":
        d_steps.log_decay[0, 0] = d_decay.wide[0] + d_before.wide[0]
    elif kind == "step":
        rows = tile.of_between(device, d_decay.pairs, THROUGH)
        rows = rows + tile.of_between(device, d_before.pairs, BEFORE)
        wide = jnp.sum(d_decay.wide[0] + d_before.wide[0], axis=1, keepdims=True)
        d_steps.log_decay[0, 0, 0] = wide.T + jnp.sum(rows, axis=0, keepdims=True)

    @pl.when(number == count - 1)
    def _() -> None:
        d_initial_ref[0] = d_state_ref[...]


# -- launching -----------------------------------------------------------------------------------


def forward(
    plan: Plan, steps: Steps, state: Array, *, keep: bool = False, interpret: Any = False
) -> tuple[Array, Array, Any]:
    """Output "P G T D", the last state, and with `keep` the states before chunks, "P C H D"."""
    count, _ = sizes(steps, plan)
    blocks = _Blocks(plan, steps, count, False)
    given = _lanes(plan, steps)
    out = (
        jax.ShapeDtypeStruct((*steps.query.shape[:3], steps.value.shape[-1]), given.query.dtype),
        _float32(state.shape),
        _float32((len(state), count, *state.shape[1:])) if keep else None,
    )
    device = Device(_dot, _half(steps), unroll=True)
    kernel = functools.partial(_forward_kernel, device, steps.decay, count)
    return _call(
        kernel, blocks, (given, state), (blocks.inputs(), blocks.state()), out,
        (blocks.outputs(), blocks.state(), blocks.starts() if keep else None), "linear_forward",
        interpret,
    )  # fmt: skip


def backward(
    plan: Plan, steps: Steps, kept: Array, d_out: Array, d_final: Array, *, interpret: Any = False
) -> tuple[Steps, Array]:
    """The cotangents of the steps and of the first state, from those of what `forward` gave."""
    count, columns = sizes(steps, plan)
    blocks = _Blocks(plan, steps, count, True)
    device = Device(_dot, _half(steps), unroll=True, pulled=True)
    given = _lanes(plan, steps)

    def part(x: Array) -> jax.ShapeDtypeStruct:
        """One for each block of columns, to be summed."""
        return jax.ShapeDtypeStruct((columns, *x.shape), x.dtype if columns == 1 else jnp.float32)

    out = jax.tree.map(part, given)._replace(
        value=jax.ShapeDtypeStruct(given.value.shape, given.value.dtype)
    )
    specs = blocks.inputs()
    parts = Steps(*map(blocks.part, specs))._replace(value=specs.value)
    d_steps, d_state = _call(
        functools.partial(_backward_kernel, device, steps.decay, count), blocks,
        (given, kept, d_out.astype(given.query.dtype), d_final),
        (specs, blocks.starts(), blocks.outputs(), blocks.state()), (out, _float32(d_final.shape)),
        (parts, blocks.state()), "linear_backward", interpret,
    )  # fmt: skip
    d_value = d_steps.value
    d_steps = jax.tree.map(lambda x: x[0] if columns == 1 else jnp.sum(x, 0), d_steps)
    if steps.decay == "step":
        d_steps = d_steps._replace(log_decay=d_steps.log_decay.reshape(steps.log_decay.shape))
    return d_steps._replace(value=d_value), d_state


def _half(steps: Steps) -> Any:
    return jnp.bfloat16 if steps.half == jnp.bfloat16 else None


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _call(
    kernel: Callable, blocks: _Blocks, inputs: Any, specs: Any, out: Any, out_specs: Any,
    name: str, interpret: Any,
) -> Any:  # fmt: skip
    """`kernel(*inputs, *outputs, state)` over key heads, blocks of columns and chunks."""
    steps, plan = blocks.steps, blocks.plan
    count, columns = sizes(steps, plan)
    flat, tree = jax.tree.flatten(inputs)
    shapes, out_tree = jax.tree.flatten(out)

    def leaves(specs: Any) -> Sequence[Any]:
        return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec))

    def traced(*places: Any) -> None:
        *refs, state_ref = places
        given = jax.tree.unflatten(tree, refs[: len(flat)])
        kernel(*given, *jax.tree.unflatten(out_tree, refs[len(flat) :]), state_ref)

    semantics: Any = ("parallel", "parallel", "arbitrary")
    found = pl.pallas_call(
        traced,
        grid=(len(steps.key), columns, count),
        in_specs=leaves(specs),
        out_specs=leaves(out_specs),
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((steps.key.shape[-1], plan.value_block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=tpu_memory(device_kind())
        ),
        interpret=interpret,
        name=name,
    )(*flat)
    return jax.tree.unflatten(out_tree, found)
