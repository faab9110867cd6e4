"""Compiling so that every kernel is really compiled, and nothing else notices."""

import functools
import hashlib
import secrets
from typing import Any, Protocol, cast

import jax
from jaxlib.mlir import ir


class Named(Protocol):
    """Whatever has a name."""

    @property
    def name(self) -> str: ...


def placed(shapes: Any, sharding: jax.sharding.Sharding) -> Any:
    """The same tree with every array or shape as a `ShapeDtypeStruct` of this sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )


def compile_afresh(lowered: jax.stages.Lowered, options: dict[str, Any]) -> jax.stages.Compiled:
    """Compile with these options, past the caches: a kernel out of a cache leaves no dump.

    There are two.  JAX keeps programs on disk under a key that ignores dump options; a name
    of its own keeps this one apart, and it is not written there.  Mosaic GPU keeps kernels in
    memory by a hash that travels in the program; another hash makes it look again.
    """
    module: Any = lowered.compiler_ir("stablehlo")
    salt = secrets.token_bytes(8)
    with module.context:
        name = ir.StringAttr(module.operation.attributes["sym_name"]).value
        module.operation.attributes["sym_name"] = ir.StringAttr.get(f"{name}_{salt.hex()}")
        module.operation.walk(functools.partial(_rehash, salt))
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, least)
    jax.config.update(least, float("inf"))
    try:
        return lowered.compile(compiler_options=options)
    finally:
        jax.config.update(least, before)


def _rehash(salt: bytes, operation: Any) -> ir.WalkResult:
    for key in ("backend_config", "mhlo.backend_config"):
        if key not in operation.attributes:
            continue
        config = operation.attributes[key]
        if isinstance(config, ir.DictAttr) and "kernel_hash" in config:
            entries = {entry.name: entry.attr for entry in cast(Any, config)}
            known = entries["kernel_hash"].value_bytes
            entries["kernel_hash"] = ir.StringAttr.get(hashlib.sha256(salt + known).digest())
            operation.attributes[key] = ir.DictAttr.get(entries)
    return ir.WalkResult.ADVANCE


def the_one[Kernel: Named](kernels: tuple[Kernel, ...], name: str) -> Kernel:
    """The kernel of this name, or else the only one whose name contains it; else KeyError."""
    found = [kernel for kernel in kernels if kernel.name == name]
    found = found or [kernel for kernel in kernels if name in kernel.name]
    if len(found) != 1:
        names = [kernel.name for kernel in kernels]
        raise KeyError(f"{name!r} names {len(found)} of the kernels {names}")
    return found[0]


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    """XLA's memory analysis, bytes on the device; empty where the compiler gives none."""
    stats = compiled.memory_analysis()
    if stats is None:
        return {}
    names = ("argument", "output", "alias", "temp")
    return {name: getattr(stats, f"{name}_size_in_bytes") for name in names}
