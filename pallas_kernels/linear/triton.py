"""The linear-state recurrence for GPUs from Ampere on, through Triton.

Only what must be is done in sequence: `linear_scan` takes the state from chunk to chunk, a program
for each key head and block of the state's columns, and writes down where each chunk starts.  What a
chunk needs for it (`linear_prepare`, with `erase`) and what its queries read (`linear_read`) is
done for all chunks at once.  The backward pass turns the three around: cotangents of reads, then
of states, from the last chunk to the first, then of all that was written.
"""

import contextvars
import dataclasses
import functools
import math
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
from pallas_kernels.linear.tile import BEFORE, THROUGH, Decay, Device, Rows, State


def limits(steps: Steps, chunk_size: int | None = None) -> str | None:
    """What keeps these bodies from serving steps of these dtypes and widths, or None."""
    return step_limits(steps) or (chunk_size and chunk_limit(chunk_size)) or None


def padded_width(width: int) -> int:
    """Triton's arrays have powers of two as sizes."""
    return power_of_two(width)


def plan(steps: Steps, chunk_size: int | None, backward: bool, kind: str) -> Plan:
    """How to cut these steps."""
    return triton_plan(steps.decay, chunk_size)


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


@dataclasses.dataclass(frozen=True)
class _At:
    """Where a program is: key head, chunk, block of value columns."""

    plan: Plan
    p: Any
    chunk: Any
    block: Any

    @property
    def rows(self) -> Any:
        return pl.ds(self.chunk * self.plan.chunk, self.plan.chunk)

    @property
    def columns(self) -> Any:
        return pl.ds(self.block * self.plan.value_block, self.plan.value_block)

    def parts(self, width: int) -> list[Any]:
        size = min(self.plan.part, width)
        return [pl.ds(first, size) for first in range(0, width, size)]

    def keys(self, ref: Any) -> Any:
        """`Rows`, or None of an array that is not there."""
        if ref is None:
            return None
        parts = (ref[self.p, self.rows, part] for part in self.parts(ref.shape[-1]))
        return tuple(x.astype(jnp.float32) for x in parts)

    def values(self, ref: Any) -> Array:
        return ref[self.p, self.rows, self.columns].astype(jnp.float32)

    def queries(self, ref: Any, member: Any) -> Rows:
        parts = (ref[self.p, member, self.rows, part] for part in self.parts(ref.shape[-1]))
        return tuple(x.astype(jnp.float32) for x in parts)

    def outputs(self, ref: Any, member: Any) -> Array:
        return ref[self.p, member, self.rows, self.columns].astype(jnp.float32)

    def state(self, ref: Any) -> State:
        """Of the present chunk, or one to a sequence."""
        place = (self.p, self.chunk)[: ref.ndim - 2]
        return tuple(ref[*place, part, self.columns] for part in self.parts(ref.shape[-2]))

    def decay(self, device: Device, steps: Steps, upto: str | None = None) -> Decay:
        if steps.log_decay is None:
            return Decay()
        if steps.decay == "channel":
            return Decay(tuple(map(tile.floored, self.keys(steps.log_decay))))
        g = tile.floored(steps.log_decay[self.p, self.rows, 0])
        size, parts = self.plan.chunk, self.parts(steps.key.shape[-1])
        wide = tuple(jnp.broadcast_to(g[:, None], (size, part.size)) for part in parts)
        if upto is None:
            return Decay(wide)
        row = jnp.broadcast_to(g[None, :], (size, size))
        return Decay(wide, tile.between(device, row, upto))

    def put_state(self, ref: Any, state: State) -> None:
        place = (self.p, self.chunk)[: ref.ndim - 2]
        for part, x in zip(self.parts(ref.shape[-2]), state, strict=True):
            ref[*place, part, self.columns] = x

    def put_keys(self, ref: Any, rows: Rows, *lead: Any, more: Any = None) -> None:
        """Rows like keys, where `lead` says, and what is to be added to them."""
        for part, x in zip(self.parts(ref.shape[-1]), rows, strict=True):
            place = (*(lead or (self.p,)), self.rows, part)
            ref[place] = (x if more is None else x + more[place]).astype(ref.dtype)

    def put_decay(self, ref: Any, d: Decay, more: Any = None) -> None:
        """The cotangent of `wide`, each row of it summed where channels decay alike."""
        if d.wide is None:
            return
        if ref.shape[-1] > 1:
            self.put_keys(ref, d.wide, self.block, self.p, more=more)
            return
        place = (self.block, self.p, self.rows, 0)
        total = functools.reduce(jnp.add, (jnp.sum(x, axis=1) for x in d.wide))
        ref[place] = total if more is None else total + more[place]

    def put_pairs(self, ref: Any, d: Decay) -> None:
        if ref is not None:
            ref[self.block, self.p, self.rows, :] = d.pairs


# -- forward -------------------------------------------------------------------------------------


def _prepare(device: Device, at: _At, inputs: Any, outputs: Any) -> None:
    steps, (fresh_ref, taken_ref) = inputs, outputs
    fresh, taken = tile.prepare(
        device,
        at.keys(steps.key),
        at.keys(steps.value),
        at.decay(device, steps, BEFORE),
        at.keys(steps.erase),
    )
    at.put_keys(fresh_ref, fresh)
    at.put_keys(taken_ref, taken or ())


def _scan(device: Device, at: _At, inputs: Any, outputs: Any) -> None:
    steps, fresh_ref, taken_ref, initial_ref = inputs
    starts_ref, final_ref, write_ref = outputs

    def visit(chunk: Any, state: State) -> State:
        here = dataclasses.replace(at, chunk=chunk)
        here.put_state(starts_ref, state)
        write = tile.take(device, state, here.values(fresh_ref), here.keys(taken_ref))
        if write_ref is not None:
            write_ref[at.p, here.rows, at.columns] = write
        return tile.put(device, state, here.keys(steps.key), write, here.decay(device, steps))

    count, _ = sizes(steps, at.plan)
    first = at.state(initial_ref)
    at.put_state(final_ref, jax.lax.fori_loop(0, jnp.int32(count), visit, first))


def _read(device: Device, at: _At, inputs: Any, outputs: Any) -> None:
    steps, write_ref, starts_ref = inputs
    (out_ref,) = outputs
    state, key, write, decay = (
        at.state(starts_ref), at.keys(steps.key), at.values(write_ref),
        at.decay(device, steps, THROUGH),
    )  # fmt: skip

    def each(member: Any, carry: Any) -> Any:
        query = at.queries(steps.query, member)
        out = tile.read(device, state, query, key, write, decay)
        out_ref[at.p, member, at.rows, at.columns] = out.astype(out_ref.dtype)
        return carry

    _for_each(steps.query.shape[1], each, jnp.int32(0))


def _for_each(count: int, body: Callable, state: Any) -> Any:
    return body(0, state) if count == 1 else jax.lax.fori_loop(0, jnp.int32(count), body, state)


def forward(
    plan: Plan, steps: Steps, state: Array, *, keep: bool = False, interpret: Any = False
) -> tuple[Array, Array, Any]:
    """Output "P G T D", the last state, and with `keep` what `backward` wants."""
    run = functools.partial(_call, plan, steps, interpret)
    count, _ = sizes(steps, plan)
    value, fresh, taken = steps.value.shape, steps.value, None
    writes = None
    if steps.erase is not None:
        out: Any = _float32(value), _float32(steps.key.shape)
        fresh, taken = run(_prepare, "pc", steps, out, "linear_prepare")
        writes = _float32(value)
    out = _float32((len(state), count, *state.shape[1:])), _float32(state.shape), writes
    starts, final, write = run(_scan, "pb", (steps, fresh, taken, state), out, "linear_scan")
    write = steps.value if write is None else write
    shape = (*steps.query.shape[:3], value[-1])
    out = (jax.ShapeDtypeStruct(shape, steps.query.dtype),)
    (out,) = run(_read, "pcb", (steps, write, starts), out, "linear_read")
    return out, final, (starts, taken, write) if keep else None


# -- backward ------------------------------------------------------------------------------------


def _read_back(device: Device, at: _At, inputs: Any, outputs: Any) -> None:
    steps, write_ref, starts_ref, d_out_ref = inputs
    d_starts_ref, d_query_ref, d_key_ref, d_write_ref, d_decay_ref, d_pairs_ref = outputs
    shared = (
        at.state(starts_ref), at.keys(steps.key), at.values(write_ref),
        at.decay(device, steps, THROUGH),
    )  # fmt: skip

    def each(member: Any, totals: Any) -> Any:
        state, *rest = shared
        d_out = at.outputs(d_out_ref, member)
        at_query = state, at.queries(steps.query, member), *rest
        pull = jax.vjp(functools.partial(tile.read, device), *at_query)[1]
        d_state, d_query, *parts = pull(d_out)
        at.put_keys(d_query_ref, d_query, at.block, at.p, member)
        return jax.tree.map(jnp.add, totals, (d_state, *parts))

    start = jax.tree.map(jnp.zeros_like, shared)
    d_state, d_key, d_write, d_decay = _for_each(steps.query.shape[1], each, start)
    at.put_state(d_starts_ref, d_state)
    at.put_keys(d_key_ref, d_key, at.block, at.p)
    d_write_ref[at.p, at.rows, at.columns] = d_write
    at.put_decay(d_decay_ref, d_decay)
    at.put_pairs(d_pairs_ref, d_decay)


def _scan_back(device: Device, at: _At, inputs: Any, outputs: Any) -> None:
    """The cotangent of the state, from the last chunk to the first."""
    steps, taken_ref, d_starts_ref, d_write_ref, d_final_ref = inputs
    d_ends_ref, d_initial_ref = outputs
    count, _ = sizes(steps, at.plan)

    def visit(number: Any, d_end: State) -> State:
        here = dataclasses.replace(at, chunk=count - 1 - number)
        here.put_state(d_ends_ref, d_end)
        d_write = here.values(d_write_ref)
        zero = jax.tree.map(jnp.zeros_like, (d_end, d_write))  # linear: at any will do
        put = zero[0], here.keys(steps.key), zero[1], here.decay(device, steps)
        d_state, _, more, _ = jax.vjp(functools.partial(tile.put, device), *put)[1](d_end)
        if taken_ref is not None:
            take = *zero, here.keys(taken_ref)
            pull = jax.vjp(functools.partial(tile.take, device), *take)[1]
            d_state = tuple(map(jnp.add, d_state, pull(d_write + more)[0]))
        return tuple(map(jnp.add, d_state, here.state(d_starts_ref)))

    last = at.state(d_final_ref)
    at.put_state(d_initial_ref, jax.lax.fori_loop(0, jnp.int32(count), visit, last))


def _put_back(device: Device, at: _At, inputs: Any, outputs: Any) -> None:
    steps, write_ref, taken_ref, starts_ref, d_ends_ref, *more_refs = inputs
    d_key_ref, d_fresh_ref, d_decay_ref, d_taken_ref = outputs
    more_key_ref, more_write_ref, more_decay_ref = more_refs
    state, write = at.state(starts_ref), at.values(write_ref)
    put = state, at.keys(steps.key), write, at.decay(device, steps)
    _, d_key, d_write, d_decay = jax.vjp(functools.partial(tile.put, device), *put)[1](
        at.state(d_ends_ref)
    )
    d_write = d_write + at.values(more_write_ref)
    at.put_keys(d_key_ref, d_key, at.block, at.p, more=more_key_ref)
    at.put_decay(d_decay_ref, d_decay, more_decay_ref)
    d_fresh_ref[at.p, at.rows, at.columns] = d_write.astype(d_fresh_ref.dtype)
    if taken_ref is not None:
        take = state, write, at.keys(taken_ref)
        _, _, d_taken = jax.vjp(functools.partial(tile.take, device), *take)[1](d_write)
        at.put_keys(d_taken_ref, d_taken, at.block, at.p)


def _prepare_back(device: Device, at: _At, inputs: Any, outputs: Any) -> None:
    steps, d_fresh_ref, d_taken_ref = inputs
    d_key_ref, d_value_ref, d_decay_ref, d_pairs_ref, d_erase_ref = outputs
    place = (
        at.keys(steps.key),
        at.keys(steps.value),
        at.decay(device, steps, BEFORE),
        at.keys(steps.erase),
    )
    pull = jax.vjp(functools.partial(tile.prepare, device), *place)[1]
    d_key, d_value, d_decay, d_erase = pull((at.keys(d_fresh_ref), at.keys(d_taken_ref)))
    at.put_keys(d_key_ref, d_key, at.block, at.p)
    at.put_decay(d_decay_ref, d_decay)
    at.put_pairs(d_pairs_ref, d_decay)
    at.put_keys(d_value_ref, d_value)
    at.put_keys(d_erase_ref, d_erase)


def backward(
    plan: Plan, steps: Steps, kept: Any, d_out: Array, d_final: Array, *, interpret: Any = False
) -> tuple[Steps, Array]:
    """The cotangents of the steps and of the first state, from those of what `forward` gave."""
    run = functools.partial(_call, plan, steps, interpret)
    starts, taken, write = kept
    blocks = sizes(steps, plan)[1]
    erased = taken is not None

    def part(x: Any, count: int = blocks, dtype: Any = jnp.float32) -> Any:
        """One for each block of columns, to be summed."""
        return None if x is None else jax.ShapeDtypeStruct((count, *x.shape), dtype)

    def whole(x: Array) -> Array:
        return x[0] if len(x) == 1 else jnp.sum(x, 0)

    pairs = None
    if steps.decay == "step":
        pairs = jax.ShapeDtypeStruct((*steps.key.shape[:2], plan.chunk), jnp.float32)
    out: Any = (
        _float32(starts.shape), part(steps.query), part(steps.key), _float32(write.shape),
        part(steps.log_decay), part(pairs),
    )  # fmt: skip
    found = run(_read_back, "pcb", (steps, write, starts, d_out), out, "linear_read_back")
    d_starts, d_query, *more, d_read = found
    out = _float32(starts.shape), _float32(d_final.shape)
    d_ends, d_state = run(
        _scan_back, "pb", (steps, taken, d_starts, more[1], d_final), out, "linear_scan_back"
    )
    d_value = _float32(write.shape) if erased else _like(steps.value)
    out = part(steps.key), d_value, part(steps.log_decay), part(taken)
    d_key, d_value, d_decay, d_taken = run(
        _put_back, "pcb", (steps, write, taken, starts, d_ends, *more), out, "linear_put_back"
    )
    d_steps = jax.tree.map(whole, Steps(d_query, d_key, d_key, d_decay))._replace(value=d_value)
    if d_read is not None:
        d_steps = _with_pairs(d_steps, whole(d_read), THROUGH)
    if not erased:
        return d_steps, d_state
    out = (
        part(steps.key, 1), _like(steps.value), part(steps.log_decay, 1), part(pairs, 1),
        _like(steps.erase),
    )  # fmt: skip
    d_key, d_value, d_decay, d_pairs, d_erase = run(
        _prepare_back, "pc", (steps, d_value, whole(d_taken)), out, "linear_prepare_back"
    )
    if d_pairs is not None:
        d_steps = _with_pairs(d_steps, d_pairs[0], BEFORE)
    d_key = d_steps.key + d_key[0]
    d_decay = None if d_decay is None else d_steps.log_decay + d_decay[0]
    return Steps(d_steps.query, d_key, d_value, d_decay, d_erase), d_state


def _with_pairs(d_steps: Steps, d_pairs: Array, upto: str) -> Steps:
    """With what the sums of decays between pairs, "P T C", add to the cotangent of the decays.

    Not in the kernel they come from: one more product of products there, and Triton lays all of
    them out so that every warp computes the same, in more registers than there are.
    """
    size = d_pairs.shape[-1]
    in_chunks = d_pairs.reshape(-1, size, size)
    more = jax.vmap(lambda d: jnp.sum(tile.of_between(Device(_plain_dot), d, upto), 0))(in_chunks)
    return d_steps._replace(log_decay=d_steps.log_decay + more.reshape(d_steps.log_decay.shape))


def _plain_dot(a: Array, b: Array, trans_a: bool, trans_b: bool) -> Array:
    return jnp.matmul(a.T if trans_a else a, b.T if trans_b else b, precision="highest")


# -- launching -----------------------------------------------------------------------------------


def _like(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _call(
    plan: Plan, steps: Steps, interpret: Any, kernel: Callable, axes: str, inputs: Any, out: Any,
    name: str,
) -> Any:  # fmt: skip
    """`kernel(device, at, inputs, outputs)` over the named axes: key heads, chunks, blocks."""
    flat, tree = jax.tree.flatten(inputs)
    shapes, out_tree = jax.tree.flatten(out)
    count, blocks = sizes(steps, plan)
    full = {"p": len(steps.key), "c": count, "b": blocks}

    def traced(ones_ref: Any, *refs: Any) -> None:
        device = Device(
            _dot, steps.half, pulled=name.endswith("back"), again=lambda x, n: x * ones_ref[n]
        )
        places, number = dict.fromkeys("pcb", jnp.int32(0)), pl.program_id(0)
        for axis in reversed(axes):
            size = jnp.int32(full[axis])
            places[axis], number = jax.lax.rem(number, size), jax.lax.div(number, size)
        part = plan.part if "c" in axes else plan.scan_part
        at = _At(dataclasses.replace(plan, part=part), *(places[axis] for axis in "pcb"))
        token = _interpreted.set(bool(interpret))
        try:
            given = jax.tree.unflatten(tree, refs[: len(flat)])
            kernel(device, at, given, jax.tree.unflatten(out_tree, refs[len(flat) :]))
        finally:
            _interpreted.reset(token)

    found = pl.pallas_call(
        traced,
        grid=(math.prod(full[axis] for axis in axes),),
        out_shape=shapes,
        interpret=bool(interpret),
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        name=name,
    )(jnp.ones((8,), jnp.float32), *flat)
    return jax.tree.unflatten(out_tree, found)
