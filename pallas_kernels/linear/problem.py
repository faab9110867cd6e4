"""What a recurrence looks like to a kernel, whatever the device.

Batch and key heads are one axis P, G queries share a key head, T is whole chunks: query "P G T H",
key "P T H", value "P T D", log_decay "P T X" (X = H, or 1 where all channels decay alike) or None,
erase "P T H" or None, state "P H D".
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp


class Steps(NamedTuple):
    """What enters at each step: arrays, or what belongs to each of them (refs, specs, shapes)."""

    query: Any
    key: Any
    value: Any
    log_decay: Any = None
    erase: Any = None

    @property
    def decay(self) -> str:
        """ "none", "step" (all channels decay alike) or "channel"."""
        if self.log_decay is None:
            return "none"
        return "step" if self.log_decay.shape[-1] == 1 else "channel"

    @property
    def half(self) -> Any:
        """The half precision that everything a row is multiplied with came in, or None."""
        dtypes = {x.dtype for x in (self.query, self.key, self.erase) if x is not None}
        dtype = dtypes.pop()
        return dtype if not dtypes and dtype in (jnp.bfloat16, jnp.float16) else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a recurrence is cut: steps to a chunk, columns of the state to a program.

    Of Triton: how many channels are multiplied at a time, `scan_part` from chunk to chunk and
    `part` within one; `warps` and `stages`.
    """

    chunk: int
    value_block: int
    warps: int = 8
    stages: int = 1
    part: int = 32
    scan_part: int = 64


def sizes(steps: Steps, plan: Plan) -> tuple[int, int]:
    """How many chunks there are, and how many blocks of value columns."""
    *_, length, width = steps.value.shape
    return length // plan.chunk, width // plan.value_block


def step_limits(steps: Steps) -> str | None:
    """What keeps the kernels from serving steps of these dtypes and widths, or None."""
    for x in steps:
        if x is not None and x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"computes in bfloat16, float16 and float32, not {x.dtype}"
    for name, x in (("keys", steps.key), ("values", steps.value)):
        if x.shape[-1] > 256:
            return f"holds {name} up to 256 wide, got {x.shape[-1]}"
    return None
