"""Which implementation serves a call: what each can do, and what "auto" takes."""

import dataclasses
import math

from attnlab.core.kernels import BACKENDS, device, kernel_limits, missing
from attnlab.core.library import library_limits
from attnlab.core.masks import Causal, Full
from attnlab.core.reference import Call
from attnlab.core.tokamax import tokamax_limits, tokamax_missing

# Up to this many scores, holding them all (16 MB of float32) is faster than recomputing them.
_SMALL = 2**22


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `implementation="auto"` takes for a call, why, and why not the others."""

    implementation: str
    reason: str
    rejected: dict[str, str]


def availability() -> dict[str, str | None]:
    """For each implementation, None if it can run on this device, else the reason it cannot."""
    platform, kind = device()
    cudnn = None if platform == "gpu" else f"needs an NVIDIA GPU; the device here is {kind}"
    return {
        "reference": None,
        "blockwise": None,
        "xla": None,
        "cudnn": cudnn,
        "tokamax": tokamax_missing(),
        **{name: missing(name) for name in BACKENDS},
    }


def limits(
    call: Call,
    implementation: str,
    return_lse: bool = False,
    block_sizes: tuple[int, int] | None = None,
) -> str | None:
    """Why an implementation cannot serve this call, or not on this machine; None if it can."""
    if implementation in ("xla", "cudnn"):
        return availability()[implementation] or library_limits(call, implementation)
    if implementation == "tokamax":
        return tokamax_limits(call, return_lse)
    if implementation in BACKENDS:
        return missing(implementation) or kernel_limits(call, implementation, block_sizes)
    return None


def choose(call: Call, return_lse: bool = False) -> Choice:
    """What "auto" takes.

    On a GPU cuDNN serves the plain calls and our Triton kernels all else; on a TPU our kernels;
    the Hopper kernels and tokamax are taken by name.  Whatever a kernel cannot, and everything on
    a CPU, is left to plain JAX, which keeps the scores where they are few.
    """
    rejected = {}
    for name in ("xla", "cudnn", "tokamax", *BACKENDS):
        limit = limits(call, name, return_lse)
        if limit:
            rejected[name] = limit
    scores = math.prod(call.query.shape[:-1]) * call.lengths[1]
    simple_mask = isinstance(call.mask, Full | Causal)
    plain = "cudnn" not in rejected and simple_mask and not call.modifiers
    reasons = {
        "xla": "holds the whole score matrix and is no faster than the reference",
        "cudnn": "is taken for half-precision calls with no or a causal mask",
        "tokamax": "is taken when it is asked for",
        "mosaic_gpu": "is taken when it is asked for",
        "triton": "is taken for what cuDNN cannot serve",
    }
    for name, reason in reasons.items():
        rejected.setdefault(name, reason)
    if scores <= _SMALL:
        rejected["blockwise"] = "would recompute scores that fit in memory"
        rejected.setdefault("tpu", "is taken for more scores than that")
        reason = f"the {scores:,} scores fit in memory, and keeping them is fastest"
        return Choice("reference", reason, rejected)
    rejected["reference"] = f"would hold all {scores:,} scores at once"
    taken = "blockwise"
    reason = f"{scores:,} scores are too many to hold; exact, O(n)"
    if plain:
        taken, reason = "cudnn", "a fused GPU kernel serves this call as it is"
    elif rejected["triton"] == reasons["triton"]:
        taken, reason = "triton", f"{scores:,} scores, fused with their mask and modifiers"
    elif "tpu" not in rejected:
        taken, reason = "tpu", f"{scores:,} scores, fused with their mask and modifiers"
    rejected.pop(taken, None)
    if taken != "blockwise":
        rejected["blockwise"] = "is slower than a fused kernel"
    return Choice(taken, reason, rejected)
