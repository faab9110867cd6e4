r"""The ring: keys and values travel, queries stay, and partial softmaxes are merged.

With the parts of P devices, device d meets the keys of device d - n in hop n:

    forward   out, lse = merge of attention(queries here, keys of d - n) over n
    backward  gradients of queries add up here; those of keys and values travel with them, and come
              home after the last hop
    tangent   derivatives of out and lse add up here, those of keys and values travel along

Each hop is one fold of `attnlab.core.folds`, or of a fused kernel (`attnlab.core.kernels`), on the
part that visits, so that a device holds two parts at a time, its own and the visitor, whatever the
number of devices.  `attnlab.distributed.remote` has kernels that also send the part on.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.core.folds import Folds
from attnlab.core.partial import Partial, finish, merge
from attnlab.core.terms import accumulator
from attnlab.core.tiles import Leaves

# What becomes of an array of the call: it stays, travels with the keys, or stays with all of its
# columns, of which each visitor needs some.
STAYS, TRAVELS, COLUMNS = "stays", "travels", "columns"


@dataclasses.dataclass(frozen=True)
class RingFolds(Folds):
    """The three folds of a call whose keys lie on the devices of a mesh axis."""

    inner: Folds  # of the queries here and the keys of one device
    shared: bool  # the normalizer is of kind "shared"
    axis: str
    size: int
    hops: int  # visitors that any device has to see, the last of them included
    key_offset: Callable  # of the device whose keys visit
    roles: tuple[tuple[str, int], ...]  # of each of `x`, with the axis of keys
    aux_roles: tuple[tuple[str, int], ...]  # of the leaves of mask and fixed terms

    def forward(self, x: Leaves, aux: dict[str, Any]) -> tuple[Array, Array]:
        def visit(total: Any, n: Any, moving: Any) -> Any:
            return self._joined(total, self.inner.forward(*self._visited(x, aux, moving, n)))

        done, _ = self._around(visit, self._empty(x), self._travelling(x, aux))
        return self._finished(done)

    def _empty(self, x: Leaves) -> Partial:
        return Partial.identity(x[0].shape[:-1], x[2].shape[-1], accumulator(x[0].dtype))

    def _joined(self, total: Partial, found: tuple[Array, Array]) -> Partial:
        """What was seen before, with what this hop saw."""
        out, lse = found
        if not self.shared:
            return Partial(total.acc + out, total.max, total.sum)
        # NaN must survive the merge: it is not -inf.
        seen = jnp.where(lse == -jnp.inf, 0, 1).astype(lse.dtype)
        return merge(total, Partial(out, lse, seen))

    def _finished(self, total: Partial) -> tuple[Array, Array]:
        return finish(total) if self.shared else (total.acc, jnp.zeros_like(total.sum))

    def tangent(
        self, x: Leaves, aux: dict[str, Any], out: Array, lse: Array, dx: Leaves
    ) -> tuple[Array, Array]:
        def visit(total: Any, n: Any, moving: Any) -> Any:
            carried, d_carried = moving
            direction = self._placed(dx, d_carried, self.roles, x, n)
            new = self.inner.tangent(*self._visited(x, aux, carried, n), out, lse, direction)
            return jax.tree.map(jnp.add, total, new)

        start = (jnp.zeros_like(out), jnp.zeros_like(lse))
        moving = (self._travelling(x, aux), self._of(dx, self.roles, TRAVELS))
        return self._around(visit, start, moving)[0]

    def gradients(
        self,
        wanted: tuple[int, ...],
        x: Leaves,
        aux: dict[str, Any],
        out: Array,
        lse: Array,
        cotangent: tuple[Array, Array],
    ) -> Leaves:
        dtype = accumulator(x[0].dtype)
        zeros = {i: jnp.zeros(x[i].shape, dtype) for i in wanted}
        staying = {i: z for i, z in zeros.items() if self.roles[i][0] != TRAVELS}
        leaving = {i: z for i, z in zeros.items() if self.roles[i][0] == TRAVELS}

        def visit(total: Any, n: Any, moving: Any) -> Any:
            carried, _ = moving
            new = self.inner.gradients(
                wanted, *self._visited(x, aux, carried, n), out, lse, cotangent
            )
            found = dict(zip(wanted, new, strict=True))
            here, sums = total
            here = {i: self._add(z, found[i], self.roles[i], n) for i, z in here.items()}
            return here, {i: z + found[i] for i, z in sums.items()}

        done, leaving = self._around(
            visit, staying, (self._travelling(x, aux), leaving), with_sums=True
        )
        home = jax.tree.map(lambda z: self._moved(z, 1 - self.hops), leaving)
        done = done | home
        return [done[i] for i in wanted]

    # -- moving ----------------------------------------------------------------------------------

    def _around(self, visit: Callable, start: Any, moving: Any, with_sums: bool = False) -> Any:
        """`visit(total, n, moving)` in every hop; what `moving` holds goes on to the next device.

        `with_sums`: the second part of `moving` is added to in each hop, then goes on.
        """

        def hop(state: Any, n: Any) -> tuple[Any, Any]:
            total, moving = state
            if with_sums:
                total, sums = visit((total, moving[1]), n, moving)
                moving = (moving[0], sums)
            else:
                total = visit(total, n, moving)
            return total, moving

        def step(state: Any, n: Array) -> tuple[Any, None]:
            total, moving = hop(state, n)
            return (total, jax.tree.map(lambda z: self._moved(z, 1), moving)), None

        state = (start, moving)
        if self.hops > 1:
            state, _ = jax.lax.scan(step, state, jnp.arange(self.hops - 1, dtype=jnp.int32))
        total, moving = hop(state, self.hops - 1)
        return total, (moving[1] if with_sums else None)

    def _moved(self, x: Array, by: int) -> Array:
        if not by:
            return x
        pairs = [(d, (d + by) % self.size) for d in range(self.size)]
        return jax.lax.ppermute(x, self.axis, pairs)

    # -- what of the call is needed when n devices further back are visited ----------------------

    def _source(self, n: Any) -> Any:
        return (jax.lax.axis_index(self.axis) - n) % self.size

    def _aux_leaves(self, aux: dict[str, Any]) -> tuple[Leaves, Any]:
        leaves, tree = jax.tree.flatten((aux["mask"], aux["fixed"]))
        return leaves, tree

    def _travelling(self, x: Leaves, aux: dict[str, Any]) -> tuple[Leaves, Leaves]:
        leaves, _ = self._aux_leaves(aux)
        return self._of(x, self.roles, TRAVELS), self._of(leaves, self.aux_roles, TRAVELS)

    def _of(self, values: Sequence[Any], roles: Sequence[tuple[str, int]], role: str) -> Leaves:
        return [v for v, (own, _) in zip(values, roles, strict=True) if own == role]

    def _visited(self, x: Leaves, aux: dict[str, Any], moving: Any, n: Any) -> tuple[Leaves, Any]:
        """`x` and `aux` of a call on the queries here and the keys that visit."""
        leaves, tree = self._aux_leaves(aux)
        mask, fixed = jax.tree.unflatten(
            tree, self._placed(leaves, moving[1], self.aux_roles, x, n)
        )
        key_offset = jnp.asarray(self.key_offset(self._source(n)), jnp.int32)
        first, _, *others = aux["places"]
        aux = aux | {"mask": mask, "fixed": fixed, "places": (first, key_offset, *others)}
        return self._placed(x, moving[0], self.roles, x, n), aux

    def _placed(
        self, values: Sequence[Any], moving: Leaves, roles: Any, x: Leaves, n: Any
    ) -> Leaves:
        visitors, placed, cols = iter(moving), [], x[1].shape[-2]
        for value, (role, axis) in zip(values, roles, strict=True):
            if role == TRAVELS:
                value = next(visitors)
            elif role == COLUMNS and value is not None:
                value = jax.lax.dynamic_slice_in_dim(value, self._source(n) * cols, cols, axis)
            placed.append(value)
        return placed

    def _add(self, total: Array, new: Array, role: tuple[str, int], n: Any) -> Array:
        if role[0] != COLUMNS:
            return total + new
        start = self._source(n) * new.shape[role[1]]
        old = jax.lax.dynamic_slice_in_dim(total, start, new.shape[role[1]], role[1])
        return jax.lax.dynamic_update_slice_in_dim(total, old + new, start, role[1])
