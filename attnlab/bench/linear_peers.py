"""flash-linear-attention's Triton kernels, on the same arrays, where PyTorch and a GPU are here.

The arrays are handed over without a copy (DLPack), and a call is awaited on its stream, so that
what is timed is what is timed of ours.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

PEER = "fla"


def missing_peer() -> str | None:
    """Why flash-linear-attention cannot run here, or None."""
    for package in ("torch", "fla"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    import torch

    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


def peer(rule: str, kind: str, given: dict[str, Array]) -> Callable[[], Any]:
    """A call of flash-linear-attention: forward, or forward and backward of sum(sin(out)).

    `rule` is one of `attnlab.bench.linear`; queries are not scaled.
    """
    import torch

    arrays = {name: torch.from_dlpack(x) for name, x in _theirs(given).items()}
    slopes = kind != "forward"
    for x in arrays.values():
        x.requires_grad_(slopes)
    run = _function(rule)

    def call() -> Any:
        out, _ = run(**arrays, scale=1.0)
        result = torch.autograd.grad(out.sin().sum(), list(arrays.values())) if slopes else out
        torch.cuda.synchronize()
        return result

    return call


def as_jax(out: Any) -> Array:
    """An output of a forward call, for comparison."""
    return jax.dlpack.from_dlpack(out.contiguous())


def _theirs(given: dict[str, Array]) -> dict[str, Array]:
    """The same step in their arguments: g the log decay, and for delta rules beta and plain v."""
    arrays = {"q": given["query"], "k": given["key"], "v": given["value"]}
    decay = given["log_decay"]
    arrays["g"] = jnp.broadcast_to(decay, given["key"].shape[:-1])
    if "erase" in given:
        # erase = beta e^g k for keys of length 1, and value = beta v.
        rate = jnp.sum(given["erase"] * given["key"], -1) * jnp.exp(-arrays["g"])
        arrays |= {"beta": rate, "v": given["value"] / rate[..., None]}
    return arrays


def _function(rule: str) -> Callable[..., Any]:
    if rule == "gated delta":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla
