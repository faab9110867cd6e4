"""The ring with kernels that send keys and values on themselves, while they compute.

`RingFolds` computes a hop and asks the compiler to move what travels; here one launch does both
(`pallas_kernels.ring`).  Gradients of keys and values follow one hop behind: those of the keys that
were here before are sent while those of the keys at hand are computed, and what arrives meanwhile
is added to them.  What else travels (arrays of masks and modifiers) is small, and left to the
compiler.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from attnlab.core.kernels import KernelFolds
from attnlab.core.launch import launch_forward, over_batch
from attnlab.core.terms import accumulator
from attnlab.core.tiles import Leaves
from attnlab.distributed.ring import TRAVELS, RingFolds
from pallas_kernels.flash.problem import Spec
from pallas_kernels.flash.tpu_layout import supported
from pallas_kernels.ring import tpu
from pallas_kernels.ring.plan import Hop, Ring


@functools.cache
def _forward(spec: Spec, ring: Ring, interpret: Any) -> Callable:
    return over_batch(lambda arrays: tpu.forward(spec, arrays, ring, interpret=interpret), False)


@functools.cache
def _backward(spec: Spec, wanted: tuple[int, ...], ring: Ring, hop: Hop, interpret: Any) -> Any:
    def launch(inputs: Any) -> Any:
        arrays, *statistics = inputs[:5]
        return tpu.backward(
            spec, arrays, statistics, wanted, ring, hop, inputs[5:], interpret=interpret
        )

    return over_batch(launch, False)


@dataclasses.dataclass(frozen=True)
class RemoteFolds(RingFolds):
    """The folds of a ring of TPUs."""

    inner: KernelFolds
    ring: Ring

    @property
    def _interpret(self) -> Any:
        return pltpu.InterpretParams() if self.inner.interpreted else False

    def forward(self, x: Leaves, aux: dict[str, Any]) -> tuple[Array, Array]:
        if self.hops == 1:
            return super().forward(x, aux)

        def hop(state: Any, n: Any, last: bool = False) -> Any:
            total, pair, others = state
            problem, arrays = self.inner.forward_problem(*self._met(x, aux, others, n))
            arrays = arrays._replace(key=pair[0], value=pair[1])
            if last:
                out, lse = launch_forward("tpu", problem.spec, self.inner.interpreted, 1, arrays)
                out, lse = out[0], lse[0]
            else:
                launch = _forward(problem.spec, self.ring, self._interpret)
                out, lse, pair = launch(arrays)
                pair = list(pair)
            total = self._joined(total, self.inner.forward_results(problem, out, lse))
            return total, pair, others

        def step(state: Any, n: Array) -> tuple[Any, None]:
            total, pair, others = hop(state, n)
            return (total, pair, self._on(others)), None

        others = self._others(x, aux)
        _, arrays = self.inner.forward_problem(*self._met(x, aux, others, 0))
        state = (self._empty(x), [supported(z) for z in (arrays.key, arrays.value)], others)
        # Two hops to a turn of the loop: then two sets of buffers alternate and nothing is copied.
        state, _ = jax.lax.scan(step, state, jnp.arange(self.hops - 1, dtype=jnp.int32), unroll=2)
        return self._finished(hop(state, self.hops - 1, last=True)[0])

    def gradients(
        self,
        wanted: tuple[int, ...],
        x: Leaves,
        aux: dict[str, Any],
        out: Array,
        lse: Array,
        cotangent: tuple[Array, Array],
    ) -> Leaves:
        if self.hops == 1:
            return super().gradients(wanted, x, aux, out, lse, cotangent)
        of_keys = tuple(i for i in wanted if i in (1, 2))
        zeros = {
            i: jnp.zeros(x[i].shape, accumulator(x[0].dtype)) for i in wanted if i not in of_keys
        }
        staying = {i: z for i, z in zeros.items() if self.roles[i][0] != TRAVELS}
        leaving = {i: z for i, z in zeros.items() if self.roles[i][0] == TRAVELS}

        def hop(state: Any, n: Any, first: bool = False, last: bool = False) -> Any:
            staying, leaving, pair, sums, others = state
            met = self._met(x, aux, others, n)
            problem, inputs = self.inner.backward_problem(*met, out, lse, cotangent)
            arrays = inputs[0]._replace(key=pair[0], value=pair[1])
            launch = _backward(
                problem.spec, self.inner.chosen(problem, wanted), self.ring,
                Hop.of(first, last), self._interpret,
            )  # fmt: skip
            found, pair, arrived = launch((arrays, *inputs[1:], *sums))
            pair = list(pair)
            if of_keys:
                own = list(found[1:3])
                sums = [a + b for a, b in zip(arrived, own, strict=True)] if arrived else own
            results = self.inner.backward_results(problem, wanted, met[0], arrays.leaves, found)
            new = dict(zip(wanted, results, strict=True))
            staying = {i: self._add(z, new[i], self.roles[i], n) for i, z in staying.items()}
            leaving = {i: z + new[i] for i, z in leaving.items()}
            return staying, leaving, pair, sums, others

        def step(state: Any, n: Any, first: bool = False) -> tuple[Any, None]:
            staying, leaving, pair, sums, others = hop(state, n, first)
            return (staying, self._on(leaving), pair, sums, self._on(others)), None

        others = self._others(x, aux)
        _, inputs = self.inner.backward_problem(*self._met(x, aux, others, 0), out, lse, cotangent)
        pair = [supported(z) for z in (inputs[0].key, inputs[0].value)]
        state, _ = step((staying, leaving, pair, [], others), 0, first=True)
        numbers = jnp.arange(1, self.hops - 1, dtype=jnp.int32)
        if numbers.size:
            state, _ = jax.lax.scan(step, state, numbers, unroll=2)
        staying, leaving, _, sums, _ = hop(state, self.hops - 1, last=True)
        for i, total in zip((1, 2), sums, strict=False):
            leaving[i] = total[..., : x[i].shape[-2], : x[i].shape[-1]].reshape(x[i].shape)
        home = jax.tree.map(lambda z: self._moved(z, 1 - self.hops), leaving)
        done = staying | home
        return [done[i] for i in wanted]

    # -- what the compiler moves -------------------------------------------------------------------

    def _others(self, x: Leaves, aux: dict[str, Any]) -> tuple[Leaves, Leaves]:
        """What travels beside keys and values."""
        of_call, of_mask = self._travelling(x, aux)
        return of_call[2:], of_mask

    def _on(self, moving: Any) -> Any:
        return jax.tree.map(lambda z: self._moved(z, 1), moving)

    def _met(self, x: Leaves, aux: dict[str, Any], others: Any, n: Any) -> tuple[Leaves, Any]:
        """`_visited`, with keys and values of the right shape: those that visit are `pair`."""
        return self._visited(x, aux, ([x[1], x[2], *others[0]], others[1]), n)
