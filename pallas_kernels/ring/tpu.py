"""Flash attention for TPUs that sends its keys and values to the next device while it computes.

One launch is one hop.  In the first step of its grid the kernel waits until the device after it has
come to the same launch, so that there is a place to send to, and starts the copies; in the last
step it waits for them.  In between run the tiles, and between hops two sets of buffers alternate:
what is read here was written in the hop before, and what arrives lies elsewhere.

The tiles are those of `pallas_kernels.flash.tpu`, with the same masks, modifiers and normalizers.
Liu, Zaharia & Abbeel 2023, arXiv:2310.01889 is the schedule.

Left out: the grid is not divided between the two cores of v4 and v5p, as only one would start the
copies (see `limits`); one direction of the ring is used; rows and columns of the backward pass are
two launches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.flash import tpu
from pallas_kernels.flash.problem import Arrays, Spec
from pallas_kernels.ring.plan import Hop, Ring


def limits(kind: str) -> str | None:
    """Why these bodies are not the ones to take on a kind of TPU, or None."""
    if any(name in kind for name in ("v4", "v5p")) or kind == "TPU v5":
        return f"uses one core of two, on {kind}"
    return None


@dataclasses.dataclass(frozen=True)
class Send:
    """Copies of whole arrays to the next device, as something done `beside` a kernel."""

    ring: Ring
    arrays: Sequence[Array]

    @property
    def outputs(self) -> list[Any]:
        return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.arrays]

    @property
    def scratch(self) -> list[Any]:
        """A semaphore for each copy, of what has left and of what has arrived."""
        return [pltpu.SemaphoreType.DMA((len(self.arrays),)) for _ in range(2)]

    @property
    def collective_id(self) -> int:
        return self.ring.collective_id

    def before(self, arrays: Any, outputs: Any, scratch: Any) -> None:
        """Start the copies, once the next device is there.

        To tell the device before is enough: it comes to its next launch only when what is sent
        here has arrived, so that no two signals of one launch are ever mixed up with another's.
        """
        barrier = pltpu.get_barrier_semaphore()
        pl.semaphore_signal(barrier, 1, device_id=self.ring.neighbour(-1))
        pl.semaphore_wait(barrier, 1)
        for copy in self._copies(arrays, outputs, scratch):
            copy.start()

    def after(self, arrays: Any, outputs: Any, scratch: Any) -> None:
        """Wait until all has left and all that the device before sends has arrived."""
        for copy in self._copies(arrays, outputs, scratch):
            copy.wait()

    def _copies(self, arrays: Any, outputs: Any, scratch: Any) -> list[Any]:
        left, arrived = scratch
        return [
            pltpu.make_async_remote_copy(
                source, target, left.at[n], arrived.at[n], device_id=self.ring.neighbour(1)
            )
            for n, (source, target) in enumerate(zip(arrays, outputs, strict=True))
        ]


def forward(
    spec: Spec, arrays: Arrays, ring: Ring, *, interpret: Any = False
) -> tuple[Array, Array, list[Array]]:
    """Output "B N T D" and log-sum-exp "B N T" of the keys at hand; keys and values that arrive."""
    send = Send(ring, (arrays.key, arrays.value))
    out, lse, arrived = tpu.forward_beside(spec, arrays, send, interpret=interpret)
    return out[0], lse[0], arrived


def backward(
    spec: Spec, arrays: Arrays, statistics: Sequence[Array], wanted: tuple[int, ...], ring: Ring,
    hop: Hop, sums: Sequence[Array], *, interpret: Any = False,
) -> tuple[Any, list[Array], list[Array]]:  # fmt: skip
    """Gradients of the keys at hand, as `pallas_kernels.flash.tpu.backward`; what arrives.

    `statistics`: live tiles, the cotangent of the output, its log-sum-exp and shift.  `sums`: the
    gradients of the keys that were here before, to be sent after them; those that arrive belong to
    the keys at hand.
    """
    keys = Send(ring, (arrays.key, arrays.value)) if hop.sends_keys else tpu.Nothing()
    ahead = Send(ring, sums) if hop.sends_sums and sums else tpu.Nothing()
    found, (pair, total) = tpu.backward_beside(
        spec, arrays, statistics, wanted, (keys, ahead), interpret=interpret
    )
    return found, pair, total
