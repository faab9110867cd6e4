"""One call of attention spread over a mesh: who holds what, and how it gets there.

The sequence is cut over the devices of one or two mesh axes.  Over the axis `ring` keys and values
travel (`attnlab.distributed.ring`); over the axis `heads` queries, keys and values are exchanged
once, all to all, so that each device has whole sequences of some heads (Jacobs et al. 2023,
arXiv:2309.14509); with both, each group of heads goes round a ring of its own (Fang & Zhao 2024,
arXiv:2405.07719).  The arrays of masks, modifiers and normalizers are cut along the axes they are
tagged with, and go where the queries, keys or heads that they belong to go.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from attnlab.core import attention as front
from attnlab.core.blockwise import BACKWARD, default_block_sizes
from attnlab.core.choice import Choice, choose
from attnlab.core.derivatives import make_solver
from attnlab.core.folds import Folds
from attnlab.core.kernels import (
    BACKENDS,
    KernelFolds,
    device,
    interpreted,
    kernel_blocks,
    kernel_limits,
    missing,
)
from attnlab.core.reference import Call
from attnlab.core.scores import whole_rows
from attnlab.core.spans import Span
from attnlab.core.terms import sized_axes
from attnlab.core.tiles import Signature
from attnlab.distributed import layouts
from attnlab.distributed.calls import Arrays, Fixed, batch_is_cut, padded
from attnlab.distributed.linear import Relay
from attnlab.distributed.meshes import automatic, axis_names, check_axes
from attnlab.distributed.remote import RemoteFolds
from attnlab.distributed.ring import COLUMNS, STAYS, TRAVELS, RingFolds
from pallas_kernels.ring import tpu as ring_kernel
from pallas_kernels.ring.plan import Ring


@dataclasses.dataclass(frozen=True)
class Across:
    """A mesh, and what its axes share out.

    Attributes:
      mesh: of `jax.make_mesh`, or what describes one.
      ring: the axis around which keys and values travel, or None.
      heads: the axis over which heads are exchanged for positions, or None.
      batch: the axis, or axes, over which the first batch axis is cut, or None.
      layout: which tokens a device of the ring works on, "contiguous", "striped" or "zigzag"
        (`attnlab.distributed.layouts`).
      arranged: the arrays given are in that order already, and so are results; otherwise they are
        in natural order, and two moves of what each device holds, at most, change it.

    Raises:
      ValueError: an axis that the mesh has not, the same axis twice, an unknown layout.
    """

    mesh: Mesh
    ring: str | None = None
    heads: str | None = None
    batch: str | tuple[str, ...] | None = None
    layout: str = "contiguous"
    arranged: bool = False

    def __post_init__(self) -> None:
        check_axes(self.mesh, ring=self.ring, heads=self.heads, batch=self.batch)
        # Around our own cuts the compiler decides, whatever the caller's mesh says of types.
        object.__setattr__(self, "mesh", automatic(self.mesh))
        layouts.check_layout(self.layout)
        if self.ring is None and self.heads is None and self.batch is None:
            raise ValueError(
                "ring, heads, batch: expected the name of a mesh axis for one at least, got None."
            )

    def size(self, argument: str) -> int:
        """Devices along the axis that serves as "ring", "heads" or "batch"."""
        return math.prod(self.mesh.shape[name] for name in axis_names(getattr(self, argument)))

    @property
    def sequence(self) -> tuple[str, ...]:
        """The mesh axes that cut the sequence, the outermost first."""
        return tuple(name for name in (self.ring, self.heads) if name is not None)

    @property
    def unit(self) -> int:
        """Lengths that need no padding are multiples of this."""
        return layouts.unit(self.layout, self.size("ring")) * self.size("heads")

    def spec(self, axes: str) -> P:
        """How an array lies on the mesh; `axes` names its axes by letters, as in "B T N H".

        B is cut over the batch axis, T and S over those of the sequence, all others are whole.
        """
        where = {"B": self.batch, "T": self.sequence or None, "S": self.sequence or None}
        return P(*(where.get(letter) for letter in axes.split()))

    def __call__(
        self,
        call: Call,
        implementation: str,
        block_sizes: tuple[int, int] | None,
        with_lse: bool,
    ) -> tuple[Array, Array]:
        """Output "*B N T D" and log-sum-exp "*B N T", as `attnlab.core.attention.solve`."""
        plan, arrays = self._prepared(call, implementation, block_sizes, with_lse)
        out, lse = _run(plan, arrays)
        length = call.lengths[0]
        return out[..., :length, :], lse[..., :length]

    def explain(self, call: Call, implementation: str, with_lse: bool) -> Choice:
        """What a device runs for a call, and in which way the call is spread."""
        plan, arrays = self._prepared(call, implementation, None, with_lse)
        return plan.fixed.explain(
            lambda arrays: _choice(plan, _here(plan, arrays)[0]), arrays, *plan.cuts
        )

    def _prepared(
        self, call: Call, implementation: str, block_sizes: Any, with_lse: bool
    ) -> tuple["_Plan", Arrays]:
        self._check(call, implementation)
        call = _with_equal_heads(front.without_sink(call), self.size("heads"))
        call = padded(call, *(-n % self.unit for n in call.lengths))
        return _Plan.of(self, call, implementation, block_sizes, with_lse)

    def _check(self, call: Call, implementation: str) -> None:
        heads, entries = call.query.shape[-3], call.query.shape[:-3]
        if heads % self.size("heads"):
            raise ValueError(
                f"query: the number of heads, {heads}, should be a multiple of the {self.heads!r} "
                f"axis of the mesh, {self.size('heads')}."
            )
        if self.batch is not None and (not entries or entries[0] % self.size("batch")):
            raise ValueError(
                f"query: the first batch axis should be a multiple of the {self.batch!r} axis of "
                f"the mesh, {self.size('batch')}, got batch axes {entries}."
            )
        if self.arranged:
            for name, length in zip(("query", "key"), call.lengths, strict=True):
                if length % self.unit:
                    raise ValueError(
                        f"{name}: arranged inputs should have a length that is a multiple of "
                        f"{self.unit}, got {length}; pad before arranging."
                    )
        if self.size("ring") > 1 and implementation not in ("auto", "blockwise", *BACKENDS):
            raise NotImplementedError(
                f'implementation="{implementation}" does not go around a ring; '
                'implementation="blockwise" can.'
            )


@contextlib.contextmanager
def over(
    mesh: Mesh,
    *,
    ring: str | None = None,
    heads: str | None = None,
    batch: str | tuple[str, ...] | None = None,
    layout: str = "contiguous",
    arranged: bool = False,
) -> Iterator[Across]:
    """Within this context attention runs across the devices of a mesh.

    That is every `attnlab.attention` and every `attnlab.linear_recurrence`.

    Mechanisms and models need not know: what they compute beside attention is cut by the compiler
    as its inputs are.  What was traced inside stays spread, also where `jax.jit` runs it later, and
    what was traced outside is not; trace where you mean it.

        mesh = jax.make_mesh((2, 4), ("data", "sequence"))
        with attnlab.distributed.over(mesh, ring="sequence", batch="data", layout="zigzag"):
            loss, grads = jax.jit(jax.value_and_grad(loss_of))(params, tokens)

    Args and errors: see `Across`.
    """
    across = Across(mesh, ring, heads, batch, layout, arranged)
    token = front.spread.set(across)
    order = layout if arranged else "contiguous"
    try:
        with Relay(across.mesh, across.sequence, batch, layout=order).running():
            yield across
    finally:
        front.spread.reset(token)


def _with_equal_heads(call: Call, devices: int) -> Call:
    """Key heads repeated until each device has some, where there are fewer than devices."""
    heads, kv_heads = call.query.shape[-3], call.key.shape[-3]
    if kv_heads % devices == 0:
        return call
    repeats = math.lcm(kv_heads, devices) // kv_heads
    if (heads // kv_heads) % repeats:
        repeats = heads // kv_heads
    key, value = (jnp.repeat(x, repeats, axis=-3) for x in (call.key, call.value))
    return call._replace(key=key, value=value)


Role = tuple[str, int]
Move = tuple[int, str]  # an axis that is CUT over the ring, WHOLE, or whole beside GATHERED keys
CUT, WHOLE, GATHERED = "cut", "whole", "gathered"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call that is spread, so that it is compiled once."""

    across: Across
    fixed: Fixed
    specs: tuple[P, ...]
    roles: tuple[Role, ...]
    moves: tuple[tuple[Move, ...], ...]  # of each leaf, what is to be arranged
    hops: int
    gathers: bool  # whole rows of scores are needed, so that every device gets all keys
    interpreted: bool

    @classmethod
    def of(
        cls, across: Across, call: Call, implementation: str, block_sizes: Any, with_lse: bool
    ) -> tuple["_Plan", Arrays]:
        """The plan, and the arrays that it takes."""
        fixed, arrays = Fixed.of(
            across.mesh, across.batch, call, implementation, block_sizes, with_lse
        )
        whole = call.normalizer.kind == "row" or whole_rows(call.modifiers) is not None
        gathers = whole and across.ring is not None
        cut = [
            _cut(across, x, tag, fixed.batch, whole)
            for x, tag in zip(arrays["leaves"], fixed.tags, strict=True)
        ]
        plan = cls(
            across, fixed, tuple(c[0] for c in cut), tuple(c[1] for c in cut),
            tuple(c[2] for c in cut), _hops(across, call), gathers, interpreted(),
        )  # fmt: skip
        return plan, arrays

    @property
    def turns(self) -> bool:
        """Whether keys travel."""
        return self.across.ring is not None and not self.gathers

    @property
    def cuts(self) -> tuple[Any, Any, tuple[P, ...]]:
        """How queries, keys and the arrays of mask, modifiers and normalizer are cut."""
        sequence = self.across.sequence or None
        return sequence, sequence, self.specs


def _cut(
    across: Across, x: Array, tag: str, batch: tuple[int, ...], gathers: bool
) -> tuple[P, Role, tuple[Move, ...]]:
    """Of a leaf: how it lies on the mesh, what becomes of it, and which axes to arrange."""
    axes: list[Any] = [None] * x.ndim
    named = sized_axes(tag, x.ndim) if tag else []
    if batch_is_cut(x, tag, batch):
        axes[0] = across.batch
    full = {letter: axis for letter, axis, block in named if block == 1 and x.shape[axis] > 1}
    role, moves = (STAYS, 0), []
    if "N" in full and across.heads is not None:
        axes[full["N"]] = across.heads
    if "T" in full:
        axes[full["T"]] = across.ring
        moves.append((full["T"], CUT))
    if "S" in full and gathers:
        moves.append((full["S"], GATHERED))
    elif "S" in full:
        alone = "T" not in full
        role = (TRAVELS if alone else COLUMNS, full["S"] - x.ndim)
        axes[full["S"]] = across.ring if alone else None
        moves.append((full["S"], CUT if alone else WHOLE))
    return P(*axes), role, tuple(moves)


def _hops(across: Across, call: Call) -> int:
    """How many visitors any device has to see: a window needs few, where parts are contiguous."""
    size = across.size("ring")
    offsets = (call.query_offset, call.key_offset)
    if across.layout != "contiguous" or not all(isinstance(o, int) for o in offsets):
        return size
    parts = tuple(n // size for n in call.lengths)
    some = call.mask.bounds(Span.of(call.lengths, (parts[0], parts[1]), offsets))[0]
    some = np.broadcast_to(np.asarray(some), (size, size))
    return 1 + max((int((i - j) % size) for i, j in np.argwhere(some)), default=0)


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: _Plan, arrays: Arrays) -> tuple[Array, Array]:
    return plan.fixed.on_mesh(functools.partial(_on_device, plan), arrays, *plan.cuts)


def _on_device(plan: _Plan, arrays: Arrays) -> tuple[Array, Array]:
    """What one device does with its part."""
    across = plan.across
    ring, size = across.ring, across.size("ring")
    call, offset = _here(plan, arrays)
    if plan.turns:
        out, lse = _around(plan, call, offset)
    else:
        out, lse = front.solve(
            call, plan.fixed.implementation, plan.fixed.block_sizes, plan.fixed.with_lse
        )
        lse = jnp.zeros(out.shape[:-1], out.dtype) if lse is None else lse
    if ring is not None and not across.arranged:
        out, lse = (
            layouts.natural_part(x, across.layout, ring, size, axis)
            for x, axis in ((out, out.ndim - 2), (lse, lse.ndim - 1))
        )
    return _positions_for_heads(across, out), _positions_for_heads(across, lse[..., None])[..., 0]


def _here(plan: _Plan, arrays: Arrays) -> tuple[Call, Any]:
    """The call of one device, arranged, and where the keys of a part begin."""
    across = plan.across
    ring, size = across.ring, across.size("ring")
    inputs = tuple(_heads_for_positions(across, x) for x in arrays["inputs"])
    heads = inputs[0].shape[-3]
    head = 0 if across.heads is None else jax.lax.axis_index(across.heads) * heads
    moved = ring is not None and not across.arranged

    def arranged(x: Array, axis: int, how: str = CUT) -> Array:
        if how == GATHERED and ring is not None and across.arranged:
            order = layouts.order(across.layout, size, x.shape[axis])
            return jnp.take(x, np.argsort(order), axis)
        if not moved or how == GATHERED:
            return x
        if how == CUT:
            return layouts.arranged_part(x, across.layout, str(ring), size, axis % x.ndim)
        return jnp.take(x, layouts.order(across.layout, size, x.shape[axis]), axis)

    leaves = list(arrays["leaves"])
    for i, moves in enumerate(plan.moves):
        for axis, how in moves:
            leaves[i] = arranged(leaves[i], axis, how)
    call = plan.fixed.here({**arrays, "inputs": inputs, "leaves": leaves}, head)
    query, key, value = arranged(call.query, -2), call.key, call.value
    if not plan.gathers:
        key, value = (arranged(x, -2) for x in (key, value))
    elif across.arranged:
        key, value = (layouts.natural_part(x, across.layout, str(ring), size, x.ndim - 2)
                      for x in (key, value))  # fmt: skip

    def offset(part: Any, length: int, base: Any) -> Any:
        if ring is None:
            return base
        if across.layout != "contiguous" or plan.fixed.by_index:
            index = np.arange(length, dtype=np.int32)
            return base + layouts.places(across.layout, part, size, length) - index
        return base + part * length

    part = 0 if ring is None else jax.lax.axis_index(ring)
    query_offset = offset(part, query.shape[-2], call.query_offset)
    if ring is not None and plan.gathers:
        key, value = (jax.lax.all_gather(x, ring, axis=x.ndim - 2, tiled=True)
                      for x in (key, value))  # fmt: skip
    call = call._replace(query=query, key=key, value=value, query_offset=query_offset)
    return call, offset


def _choice(plan: _Plan, call: Call) -> Choice:
    """What serves the call of one device, and the way it is spread."""
    across = plan.across
    ways = []
    if across.batch is not None:
        ways.append(f"the batch is cut over {across.size('batch')}")
    if across.heads is not None:
        ways.append(f"heads are exchanged over {across.size('heads')}")
    if across.ring is not None and plan.gathers:
        ways.append(f"keys are gathered from {across.size('ring')}, as whole rows are needed")
    elif across.ring is not None:
        ways.append(f"{plan.hops} visits in a ring of {across.size('ring')}, {across.layout}")
    found = front.choice(call, plan.fixed.implementation, plan.fixed.with_lse)
    if plan.turns:
        found = _choice_of_a_hop(plan, call, found)
    return dataclasses.replace(found, reason=f"{'; '.join(ways)}; {found.reason}")


def _choice_of_a_hop(plan: _Plan, call: Call, found: Choice) -> Choice:
    name, reason, rejected = found.implementation, found.reason, dict(found.rejected)
    if plan.fixed.implementation == "auto":
        name = _backend(plan, call) or "blockwise"
        if name != found.implementation:
            reason = "a hop's summary is merged with those of others"
            rejected[found.implementation] = "is taken in a ring when it is asked for"
            rejected.pop(name)
    return Choice(name, reason, rejected | dict.fromkeys(
        ("reference", "xla", "cudnn", "tokamax"), "does not go around a ring"))  # fmt: skip


def _around(plan: _Plan, call: Call, offset: Any) -> tuple[Array, Array]:
    cols = call.key.shape[-2]
    base = call.key_offset
    # Offsets are traced: they differ from device to device.
    call = call._replace(
        query_offset=jnp.asarray(call.query_offset, jnp.int32), key_offset=jnp.int32(0)
    )
    backend = _backend(plan, call)
    forward, backward = (
        kernel_blocks(call, backend, plan.fixed.block_sizes) if backend else _blocks(plan, call)
    )
    signature, x, aux = Signature.of(call, forward, backward)
    plain = Folds(signature)
    count = signature.tree.num_leaves
    of_mask, of_terms = plan.roles[: len(plan.roles) - count], plan.roles[len(plan.roles) - count :]
    fixed = tuple(r for i, r in enumerate(of_terms) if i not in signature.trainable)
    travels = ((STAYS, 0), (TRAVELS, -2), (TRAVELS, -2))
    folds = RingFolds(
        signature, plain, call.normalizer.kind == "shared", str(plan.across.ring),
        plan.across.size("ring"), plan.hops, lambda part: offset(part, cols, base),
        (*travels, *(of_terms[i] for i in signature.trainable)), (*of_mask, *fixed),
    )  # fmt: skip
    if not backend:
        return make_solver(folds)(x, aux)
    fused = KernelFolds(signature, backend, plan.interpreted, part=True)
    around = dataclasses.replace(folds, inner=fused)
    # Copies of a kernel's own are made where they were asked for; the compiler's else.
    if plan.fixed.implementation == "tpu" and ring_kernel.limits(device()[1]) is None:
        axis = str(plan.across.ring)
        number = plan.across.mesh.axis_names.index(axis)
        ring = Ring(axis, plan.across.size("ring"), number)
        around = RemoteFolds(**(vars(around) | {"ring": ring}))
    return make_solver(around, folds)(x, aux)


def _backend(plan: _Plan, call: Call) -> str | None:
    """The kernel that serves each hop, or None for plain JAX."""
    name = plan.fixed.implementation
    if name not in ("auto", *BACKENDS):
        return None
    hop = _with_fewer_columns(plan, call)
    if name == "auto":
        return "tpu" if not plan.fixed.by_index and choose(hop).implementation == "tpu" else None
    limit = missing(name) or kernel_limits(hop, name, plan.fixed.block_sizes)
    if plan.fixed.by_index:
        limit = limit or "has no arrays with one entry for a block of positions in a ring"
    if limit:
        raise NotImplementedError(
            f'implementation="{name}" {limit}; implementation="blockwise" can.'
        )
    return name


def _with_fewer_columns(plan: _Plan, call: Call) -> Call:
    """The call with arrays as one hop sees them."""
    terms = (call.mask, call.modifiers, call.normalizer)
    leaves, tree = jax.tree.flatten(terms)
    for i, (role, axis) in enumerate(plan.roles):
        if role == COLUMNS:
            leaves[i] = jax.lax.slice_in_dim(leaves[i], 0, call.key.shape[-2], axis=axis)
    mask, modifiers, normalizer = jax.tree.unflatten(tree, leaves)
    return call._replace(mask=mask, modifiers=modifiers, normalizer=normalizer)


def _blocks(plan: _Plan, call: Call) -> tuple[tuple[int, int], tuple[int, int]]:
    if plan.fixed.block_sizes is not None:
        rows, cols = call.lengths
        blocks = (min(plan.fixed.block_sizes[0], rows), min(plan.fixed.block_sizes[1], cols))
        return blocks, blocks
    return default_block_sizes(call), default_block_sizes(call, BACKWARD)


def _heads_for_positions(across: Across, x: Array) -> Array:
    """Some of the positions of all heads become all (of a ring's part) of some heads."""
    if across.heads is None:
        return x
    return jax.lax.all_to_all(x, across.heads, x.ndim - 3, x.ndim - 2, tiled=True)


def _positions_for_heads(across: Across, x: Array) -> Array:
    if across.heads is None:
        return x
    return jax.lax.all_to_all(x, across.heads, x.ndim - 2, x.ndim - 3, tiled=True)
