"""Ring attention of others, where it is installed, beside ours.

`ringattention` (its authors' package) is read from its file: importing the package fails on the
JAX of today, which no longer has what its TPU kernel wants.  JAX's own cuDNN attention refuses a
sequence that is cut over devices, and tokamax's ring runs on TPUs alone.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

PACKAGE = "ringattention"


def missing() -> str | None:
    """Why the peer cannot be had, or None."""
    for name in (PACKAGE, "einops"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed (pip install --no-deps {name})"
    return None


@functools.cache
def _module() -> Any:
    found: Any = importlib.util.find_spec(PACKAGE)  # `missing` has seen that it is there
    file = Path(found.origin).parent / "ringattention_jax.py"
    spec: Any = importlib.util.spec_from_file_location("ringattention_jax", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attend(mesh: Any, causal: bool, chunk: int) -> Callable:
    """The peer's attention of arrays whose sequence is cut over the mesh axis "ring"."""
    options = {
        "causal_block_size": 1 if causal else None, "deterministic": True, "dropout_rng": None,
        "attn_pdrop": 0.0, "query_chunk_size": chunk, "key_chunk_size": chunk,
        "dtype": jnp.float32, "policy": jax.checkpoint_policies.nothing_saveable,
        "precision": None, "prevent_cse": False,
    }  # fmt: skip

    def part(query: Any, key: Any, value: Any) -> Any:
        return _module().ring_attention(query, key, value, None, None, None, "ring", True, options)

    cut = P(None, "ring")
    return jax.shard_map(part, mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut, check_vma=False)
