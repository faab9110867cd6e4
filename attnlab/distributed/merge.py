r"""A few queries everywhere, keys and values where they lie: what devices found is merged.

With the keys cut over the devices h of a mesh axis, for each head and query

    out_h, lse_h = attention to the keys of device h
    lse = log sum_h e^(lse_h),   out = sum_h e^(lse_h - lse) out_h

which is the merge of `attnlab.core.partial`, its fold replaced by collectives: one maximum, of the
lse, and one sum, of D + 1 numbers.  Nothing that is sent grows with the number of keys.  So a cache
too long for one device is read; it is phase 2 of Star Attention (Acharya et al. 2024,
arXiv:2411.17116), whose hosts gather out and lse, the same D + 1 numbers.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from attnlab.core import attention as front
from attnlab.core.choice import Choice
from attnlab.core.partial import Partial, finish, finite
from attnlab.core.reference import Call
from attnlab.core.scores import whole_rows
from attnlab.core.terms import sized_axes
from attnlab.distributed.calls import Arrays, Fixed, batch_is_cut, by_index, padded
from attnlab.distributed.meshes import automatic, axis_names, check_axes


@dataclasses.dataclass(frozen=True)
class Parts:
    """Attention in which each device of a mesh axis has a part of the keys, in order.

    A subclass says what a device does, in `on_device`, and along which axes the arrays of masks and
    the like are cut, in `letters`: T as the queries are then, S as the keys always are.

    Attributes:
      mesh: of `jax.make_mesh`.
      axis: the mesh axis over which keys are cut.
      batch: the axis, or axes, over which the first batch axis is cut, or None.

    Raises:
      TypeError: `mesh` is none.
      ValueError: an axis that the mesh has not, or the same axis twice.
    """

    mesh: Mesh
    axis: str
    batch: str | tuple[str, ...] | None = None

    letters: ClassVar[str] = "S"

    def __post_init__(self) -> None:
        check_axes(self.mesh, axis=self.axis, batch=self.batch)
        # Around our own cuts the compiler decides, whatever the caller's mesh says of types.
        object.__setattr__(self, "mesh", automatic(self.mesh))

    @property
    def over_batch(self) -> tuple[str, ...]:
        """The mesh axes that cut the batch."""
        return axis_names(self.batch)

    @property
    def size(self) -> int:
        """Devices along the axis of the keys."""
        return int(self.mesh.shape[self.axis])

    def prepared(self, call: Call) -> Call:
        """The call as it is cut: checked, and padded where that changes nothing."""
        needy = whole_rows(call.modifiers)
        if call.normalizer.kind == "row" or needy:
            raise NotImplementedError(
                f"{needy or type(call.normalizer).__name__} needs whole rows of scores, and no "
                "device has them here; `attnlab.distributed.over` gathers what they are made of, "
                'and implementation="reference" on one device can.'
            )
        batch, parts = call.query.shape[:-3], math.prod(self.mesh.shape[n] for n in self.over_batch)
        if self.over_batch and (not batch or batch[0] % parts):
            raise ValueError(
                f"query: the first batch axis should be a multiple of the {self.batch!r} axis of "
                f"the mesh, {parts}, got batch axes {batch}."
            )
        return front.without_sink(call)

    def on_device(self, call: Call, part: Any, options: tuple[Any, ...]) -> tuple[Array, Array]:
        """Output and lse of what a device has: `options` are those of `solve`."""
        raise NotImplementedError

    def __call__(
        self,
        call: Call,
        implementation: str,
        block_sizes: tuple[int, int] | None,
        with_lse: bool,
    ) -> tuple[Array, Array]:
        """Output "*B N T D" and log-sum-exp "*B N T", as `attnlab.core.attention.solve`."""
        fixed, arrays = self._fixed(call, implementation, block_sizes, with_lse)
        return _run(self, fixed, arrays)

    def explain(self, call: Call, implementation: str, with_lse: bool) -> Choice:
        """What a device runs for a call."""
        fixed, arrays = self._fixed(call, implementation, None, with_lse)

        def look(arrays: Arrays) -> Choice:
            found = front.choice(fixed.here(arrays), implementation, with_lse)
            return dataclasses.replace(
                found, reason=f"each of {self.size} has a part of the keys; {found.reason}"
            )

        return fixed.explain(look, arrays, *self.cuts(fixed, arrays))

    def _fixed(
        self, call: Call, implementation: str, block_sizes: Any, with_lse: bool
    ) -> tuple[Fixed, Arrays]:
        call = self.prepared(call)
        return Fixed.of(self.mesh, self.batch, call, implementation, block_sizes, with_lse)

    def cuts(self, fixed: Fixed, arrays: Arrays) -> tuple[Any, Any, list[P]]:
        """How queries, keys and the arrays of mask, modifiers and normalizer are cut."""
        leaves = [
            self.spec(x, tag, fixed.batch)
            for x, tag in zip(arrays["leaves"], fixed.tags, strict=True)
        ]
        return self.axis if "T" in self.letters else None, self.axis, leaves

    def spec(self, x: Any, tag: str, batch: tuple[int, ...]) -> P:
        """How an array of the call lies on the mesh; `tag` names its axes."""
        axes: list[Any] = [None] * x.ndim
        named = sized_axes(tag, x.ndim) if tag else []
        if batch_is_cut(x, tag, batch):
            axes[0] = self.batch
        for letter, axis, block in named:
            if letter in self.letters and block == 1 and x.shape[axis] > 1:
                axes[axis] = self.axis
        return P(*axes)

    def place(self, part: Any, length: int, base: Any, by_index: bool) -> Any:
        """The offset of a part of so many queries or keys."""
        offset = base + part * length
        # One for each says which of the whole call's they are: `attnlab.core.terms.Tile`.
        return jnp.broadcast_to(offset, (length,)) if by_index else offset


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(parts: Parts, fixed: Fixed, arrays: Arrays) -> tuple[Array, Array]:
    options = (fixed.implementation, fixed.block_sizes, fixed.with_lse)

    def body(arrays: Arrays) -> tuple[Array, Array]:
        return parts.on_device(fixed.here(arrays), jax.lax.axis_index(parts.axis), options)

    return fixed.on_mesh(body, arrays, *parts.cuts(fixed, arrays))


@dataclasses.dataclass(frozen=True)
class Merged(Parts):
    """Queries are whole on every device, keys and values cut; results are merged."""

    def prepared(self, call: Call) -> Call:
        return padded(super().prepared(call), 0, -call.key.shape[-2] % self.size)

    def on_device(self, call: Call, part: Any, options: tuple[Any, ...]) -> tuple[Array, Array]:
        implementation, block_sizes, _ = options
        shared = call.normalizer.kind == "shared"
        offset = self.place(part, call.key.shape[-2], call.key_offset, by_index(call))
        out, lse = front.solve(
            call._replace(key_offset=offset), implementation, block_sizes, shared
        )
        if not shared:
            out = jax.lax.psum(out, self.axis)
            return out, jnp.zeros(out.shape[:-1], out.dtype)
        # The result does not depend on the shift, so neither should its derivative.
        top = jax.lax.pmax(jax.lax.stop_gradient(lse), self.axis)
        weight = jnp.exp(lse - finite(top))[..., None]
        both = jax.lax.psum(jnp.concatenate([out * weight, weight], -1), self.axis)
        return finish(Partial(both[..., :-1], top, both[..., -1]))


@contextlib.contextmanager
def merging(
    mesh: Mesh, *, axis: str, batch: str | tuple[str, ...] | None = None
) -> Iterator[Merged]:
    """Within this context every `attnlab.attention` reads keys cut over a mesh axis, as below.

    For models that decode: their caches lie cut along the capacity, and are never moved.
    """
    merged = Merged(mesh, axis, batch)
    token = front.spread.set(merged)
    try:
        yield merged
    finally:
        front.spread.reset(token)


def merge_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    mesh: Mesh,
    axis: str,
    batch: str | tuple[str, ...] | None = None,
    **options: Any,
) -> Any:
    """Attention of queries that every device has to keys cut over a mesh axis: "*B T N D".

    Exact, and so are gradients, with every mask, every modifier of single scores and every
    normalizer that streams; what a device sends does not depend on S.

    Args:
      query, key, value: as for `attnlab.attention`; keys and values cut along S, or to be.
      mesh, axis, batch: see `Parts`.
      options: as for `attnlab.attention`; for queries after S' keys of a longer cache,
        `mask=Causal(), query_offset=S'`.

    Raises:
      TypeError, ValueError: as for `attnlab.attention`, and where mesh and axes do not fit.
      NotImplementedError: a normalizer or modifier that needs whole rows of scores.
    """
    with merging(mesh, axis=axis, batch=batch):
        return front.attention(query, key, value, **options)
