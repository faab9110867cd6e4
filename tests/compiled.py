"""What the compiler counts, in tests that compile everything else with few optimisations."""

from collections.abc import Callable
from typing import Any

import jax

AS_USERS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def compiled(function: Callable, *arguments: Any) -> Any:
    """The function compiled as users compile, for these arguments or their shapes."""
    return jax.jit(function).lower(*arguments).compile(AS_USERS)


def temporaries(function: Callable, *arguments: Any) -> int:
    """Bytes of temporary memory that it takes."""
    return compiled(function, *arguments).memory_analysis().temp_size_in_bytes
