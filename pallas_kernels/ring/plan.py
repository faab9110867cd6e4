"""Who sends what to whom, hop by hop.

With P devices, the keys of device d - n visit device d in hop n.  A hop sends:

    forward    keys and values, unless it is the last
    backward   keys and values beside the rows (dq), unless it is the last; beside the columns (dk,
               dv) the sums of the keys that visited before, unless it is the first: they arrive in
               time for what this hop adds to them
"""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices along a mesh axis; each sends to the next, the last one to the first.

    `collective_id`: of the barriers between neighbours; rings over different axes of a mesh need
    different ones.
    """

    axis: str
    size: int
    collective_id: int = 0

    def neighbour(self, by: int) -> dict[str, Any]:
        """The device `by` places further, as its index along the axis; within `shard_map`."""
        here = jax.lax.axis_index(self.axis)
        return {self.axis: jax.lax.rem(here + by % self.size, here * 0 + self.size)}


@dataclasses.dataclass(frozen=True)
class Hop:
    """What one of `hops` hops of the backward pass sends."""

    sends_keys: bool
    sends_sums: bool

    @classmethod
    def of(cls, first: bool, last: bool) -> "Hop":
        return cls(not last, not first)
