r"""The linear-state recurrence with its sequence cut over a mesh: states travel, steps stay.

A run of steps, whatever its length, maps the state before it to the state behind it,

    S  ->  A S + B,      (A2, B2) after (A1, B1)  =  (A2 A1, A2 B1 + B2),

where A is the identity, the product of the decays, or with erasing a matrix.  Each device runs its
own steps from zeros, which gives B and outputs that lack what came before; P devices exchange the
maps of windows of 1, 2, 4, ... devices, an associative scan in log2 P rounds; and what a query
reads of the state S before its device's first step is added,

    o_t  =  o_t from zeros + S^T A_{1..t}^T q_t,

no key or value having left its device.  `exchanged_bytes` says what a device sends: it does not
grow with the length.  With erasing, A and A^T q come from the same recurrence, as H more columns of
its state that begin as the identity; so every form and kernel serves, with derivatives.

Lengths that the devices do not divide are filled up; JAX then keeps no array of that length cut.

Within `attnlab.distributed.over` every mechanism that ends in the recurrence is computed so, the
two writes of RWKV-7 and what a token reads of itself included.  Other loops over time are left to
the compiler, which in `jax.jit` partitions them as their inputs are cut, and gives the same
numbers.  It sends the last W - 1 tokens for a short convolution, and a few rows for each level of
the scans of running maxima and sums (Latte, Performer, efficient attention, log-normal attention);
what inline attention sums cumulatively, it gathers.  Loops over blocks, as in NATS, send states
round once for every block.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from attnlab.core import recurrence
from attnlab.core.decay_tree import product
from attnlab.core.kernels import interpreted
from attnlab.core.recurrence_forms import Steps
from attnlab.distributed.meshes import axis_names, check_axes, on_devices


@dataclasses.dataclass(frozen=True)
class Relay:
    """A mesh, and what its axes share out of a recurrence.

    Attributes:
      mesh: of `jax.make_mesh`, or what describes one.
      axis: the axis or axes over which the sequence is cut, the outermost first; () for none.
      batch: the axis, or axes, over which the first batch axis is cut, or None.
      heads: the axis over which key heads are cut, and the query heads that share them, or None.
      layout: in which order the arrays given are, of `attnlab.distributed.LAYOUTS`.

    Raises:
      TypeError: no mesh.
      ValueError: an axis that the mesh has not, the same axis twice.
    """

    mesh: Any
    axis: str | tuple[str, ...]
    batch: str | tuple[str, ...] | None = None
    heads: str | None = None
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        check_axes(self.mesh, axis=self.axis, batch=self.batch, heads=self.heads)

    def size(self, argument: str) -> int:
        """Devices along the axes that serve as "axis", "batch" or "heads"."""
        return math.prod(self.mesh.shape[name] for name in axis_names(getattr(self, argument)))

    @contextlib.contextmanager
    def running(self) -> Iterator["Relay"]:
        """Within this context every `attnlab.linear_recurrence` is cut so."""
        token = recurrence.spread.set(self)
        try:
            yield self
        finally:
            recurrence.spread.reset(token)

    def __call__(
        self, steps: Steps, state: Array, implementation: str, chunk_size: int
    ) -> tuple[Array, Array]:
        """Output "*B K G T D" and last state "*B K H D", as `attnlab.core.recurrence.solve`."""
        length = steps.key.shape[-2]
        if not length:
            return recurrence.solve(steps, state, implementation, chunk_size)
        self._check(steps)
        # Fewer steps than devices, as in decoding: all take them, none has to wait.
        devices = self.size("axis") if length >= self.size("axis") else 1
        missing = -length % devices
        steps = jax.tree.map(lambda x: _longer(x, missing), steps)
        plan = _Plan(
            dataclasses.replace(self, axis=axis_names(self.axis) if devices > 1 else ()),
            steps.key.ndim - 3, implementation, chunk_size, interpreted(),
        )  # fmt: skip
        out, state = _run(plan, steps, state)
        return out[..., :length, :], state

    def _check(self, steps: Steps) -> None:
        if self.layout != "contiguous":
            raise NotImplementedError(
                f'layout: a recurrence takes its steps in natural order, not in "{self.layout}"; '
                'arranged=False or layout="contiguous" goes with one, and '
                "attnlab.distributed.restore puts arrays back in order."
            )
        *batch, heads, _, _ = steps.key.shape
        if self.batch is not None and (not batch or batch[0] % self.size("batch")):
            raise ValueError(
                f"query: the first batch axis should be a multiple of the {self.batch!r} axis of "
                f"the mesh, {self.size('batch')}, got batch axes {tuple(batch)}."
            )
        if heads % self.size("heads"):
            raise ValueError(
                f"key: the number of heads, {heads}, should be a multiple of the {self.heads!r} "
                f"axis of the mesh, {self.size('heads')}."
            )


def linear_recurrence(
    query: Any,
    key: Any,
    value: Any,
    *,
    mesh: Any,
    axis: str | tuple[str, ...],
    batch: str | tuple[str, ...] | None = None,
    heads: str | None = None,
    **options: Any,
) -> Any:
    """`attnlab.linear_recurrence` with the sequence cut over devices: "*B T N D", cut likewise.

    The last state, where it is asked for, is on all devices of `axis`.  Any length will do; one
    that the devices do not divide is filled up with steps that do nothing.

        mesh = jax.make_mesh((2, 4), ("data", "sequence"))
        out = linear_recurrence(query, key, value, mesh=mesh, axis="sequence", batch="data")

    Args:
      query, key, value, options: as for `attnlab.linear_recurrence`; arrays are in natural order.
      mesh, axis, batch, heads: as for `Relay`.

    Raises:
      TypeError, ValueError, NotImplementedError: as `attnlab.linear_recurrence` and `Relay`; a
        batch axis or key heads that the mesh does not divide.
    """
    with Relay(mesh, axis, batch, heads).running():
        return recurrence.linear_recurrence(query, key, value, **options)


def exchanged_bytes(
    devices: int,
    batch: int,
    kv_heads: int,
    width: int,
    value_width: int,
    *,
    transition: int = 0,
    itemsize: int = 4,
) -> int:
    """Bytes that a device sends, at most, in a forward pass; a backward pass sends as many.

    In each of ceil(log2 P) rounds it sends a state, in all but the last the transition A of each
    head too: `transition` numbers, 0 without decay, 1 with one decay to a head, H with one to a
    channel, H² with erasing.  The last state costs one sum of states over the devices more.

    Args:
      batch, kv_heads: what one device has of them.
    """
    rounds = (devices - 1).bit_length()
    numbers = rounds * width * value_width + max(rounds - 1, 0) * transition
    return batch * kv_heads * numbers * itemsize


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call, so that it is compiled once."""

    relay: Relay
    batch_rank: int
    implementation: str
    chunk_size: int
    interpret: bool  # read while kernels are traced: programs traced so are others

    def spec(self, *behind: Any) -> P:
        """How an array "*B K ..." lies on the mesh."""
        lead = (self.relay.batch, *(None,) * (self.batch_rank - 1)) if self.batch_rank else ()
        return P(*lead, self.relay.heads, *behind)


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: _Plan, steps: Steps, state: Array) -> tuple[Array, Array]:
    cut = plan.relay.axis or None
    alone, shared = plan.spec(None, None), plan.spec(cut, None)
    grouped = plan.spec(None, cut, None)
    specs = jax.tree.map(lambda _: shared, steps)._replace(query=grouped)
    body = functools.partial(_on_device, plan)
    return on_devices(body, plan.relay.mesh, (specs, alone), (grouped, alone))(steps, state)


def _on_device(plan: _Plan, steps: Steps, state: Array) -> tuple[Array, Array]:
    """What one device does with its steps."""
    axis = axis_names(plan.relay.axis)
    solve = functools.partial(
        recurrence.solve, implementation=plan.implementation, chunk_size=plan.chunk_size
    )
    if not axis:
        return solve(steps, state)
    out, reads, written, kept = (_erasing if steps.erase is not None else _decaying)(
        steps, jnp.zeros_like(state), solve
    )
    device, devices = jax.lax.axis_index(axis), plan.relay.size("axis")
    first = jnp.where(device == 0, state, jnp.zeros_like(state))
    before = _state_before(axis, devices, first, kept, written)
    out = out.astype(state.dtype) + product("...gth,...hd->...gtd", reads, before)
    last = _after(kept, before) + written
    last = jnp.where(device == devices - 1, last, jnp.zeros_like(last))
    return out, jax.lax.psum(last, axis)


def _decaying(steps: Steps, zeros: Array, solve: Any) -> tuple[Array, Array, Array, Array | None]:
    """Outputs from zeros, what queries read of a state before, B, and A "*B K X 1" or None."""
    out, written = solve(steps, zeros)
    query = steps.query.astype(zeros.dtype)
    if steps.log_decay is None:
        return out, query, written, None
    through = jnp.exp(jnp.cumsum(steps.log_decay, -2))
    reads = query * through[..., None, :, :]
    return out, reads, written, jnp.swapaxes(through[..., -1:, :], -1, -2)


def _erasing(steps: Steps, zeros: Array, solve: Any) -> tuple[Array, Array, Array, Array]:
    """The same of steps that erase, with A "*B K H H": columns of the state know no other."""
    width, columns = zeros.shape[-2:]
    identity = jnp.broadcast_to(jnp.eye(width, dtype=zeros.dtype), (*zeros.shape[:-1], width))
    value = jnp.concatenate([steps.value, jnp.zeros_like(steps.key, steps.value.dtype)], -1)
    out, state = solve(steps._replace(value=value), jnp.concatenate([zeros, identity], -1))
    reads = out[..., columns:].astype(zeros.dtype)
    return out[..., :columns], reads, state[..., :columns], state[..., columns:]


def _state_before(
    axis: tuple[str, ...], devices: int, first: Array, kept: Array | None, written: Array
) -> Array:
    """The state before each device's first step; `first` is that of the first, zeros on others.

    A device knows the map of the window of 2^r - 1 devices before it: it sends that with its own
    behind it 2^r devices on, and learns of a window as long and one more.
    """
    before, over = first, None
    for reach in (1 << r for r in range((devices - 1).bit_length())):
        sent = _moved(_after(kept, before) + written, axis, devices, reach)
        more = None
        if kept is not None and 2 * reach < devices:  # in the last round states will do
            more = _moved(kept if over is None else _after(kept, over), axis, devices, reach)
        before = before + (sent if over is None else _after(over, sent))
        over = more if over is None or more is None else _after(over, more)
    return before


def _after(kept: Array | None, state: Array) -> Array:
    """A times a state or another A: of a diagonal, "X 1", or a matrix, "H H"."""
    if kept is None:
        return state
    return kept * state if kept.shape[-1] == 1 else product("...ij,...jk->...ik", kept, state)


def _moved(x: Array, axis: tuple[str, ...], devices: int, reach: int) -> Array:
    """From each device to that `reach` behind it; the first get zeros."""
    return jax.lax.ppermute(x, axis, [(d, d + reach) for d in range(devices - reach)])


def _longer(x: Array, missing: int) -> Array:
    """Steps behind the last that neither write, decay nor erase."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]) if missing else x
