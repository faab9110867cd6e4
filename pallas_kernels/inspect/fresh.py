"""Compiling so that every kernel is really compiled, and nothing else notices."""

import secrets
from typing import Any

import jax
from jaxlib.mlir import ir


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
    module = lowered.compiler_ir("stablehlo")
    with module.context:
        name = ir.StringAttr(module.operation.attributes["sym_name"]).value
        module.operation.attributes["sym_name"] = ir.StringAttr.get(
            f"{name}_{secrets.token_hex(4)}"
        )
        module.operation.walk(_rehash)
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, least)
    jax.config.update(least, float("inf"))
    try:
        return lowered.compile(compiler_options=options)
    finally:
        jax.config.update(least, before)


def _rehash(operation: Any) -> ir.WalkResult:
    for key in ("backend_config", "mhlo.backend_config"):
        if key not in operation.attributes:
            continue
        config = operation.attributes[key]
        if isinstance(config, ir.DictAttr) and "kernel_hash" in config:
            entries = {entry.name: entry.attr for entry in config}
            entries["kernel_hash"] = ir.StringAttr.get(secrets.token_bytes(32))
            operation.attributes[key] = ir.DictAttr.get(entries)
    return ir.WalkResult.ADVANCE


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    """XLA's memory analysis, bytes on the device; empty where the compiler gives none."""
    stats = compiled.memory_analysis()
    if stats is None:
        return {}
    names = ("argument", "output", "alias", "temp", "generated_code")
    return {name: getattr(stats, f"{name}_size_in_bytes") for name in names}
