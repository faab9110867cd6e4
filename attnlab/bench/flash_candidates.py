"""One candidate of `attnlab bench flash`: a pass, compiled, compared with the answer, and sized.

Whatever goes wrong on the way becomes words for the table: what a subject refuses, what does not
fit in memory, and what disagrees with blockwise attention in float32.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import attnlab
from attnlab.bench.flash_cases import Case, Shape
from attnlab.bench.flash_peers import Maker, Subject, memory

TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}  # of the largest entry; gradients twice that


@dataclasses.dataclass
class Candidate:
    """A compiled pass, ready to be called; `error` in words if it is not to be timed."""

    call: Callable[[], Any] | None = None
    temporaries: int = 0
    error: str = ""
    wrong: bool = False  # it gave another answer, or broke


def arguments(shape: Shape, dtype: Any) -> list[Array]:
    """Query, key, value and cotangent, standard normal, from the same keys for everyone."""
    size = (shape.batch, shape.length, shape.heads, shape.width)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, size, jnp.float32).astype(dtype) for key in keys]


def prepare(subject: Subject, passes: str, inputs: Sequence[Array]) -> tuple[Callable, int]:
    """A pass as a function of nothing, compiled, and its temporaries in bytes.

    Raises:
      MemoryError: it would take more than half of the memory that is there.
    """
    *qkv, cotangent = inputs

    def keep(query: Array, key: Array, value: Array, extra: Any) -> Any:
        return jax.vjp(lambda q, k, v: subject.function(q, k, v, extra), query, key, value)[1]

    def fits(function: Callable, *args: Any) -> tuple[Any, int]:
        compiled = jax.jit(function).lower(*args).compile()
        analysis = compiled.memory_analysis()
        size = 0 if analysis is None else int(analysis.temp_size_in_bytes)
        results = 0 if analysis is None else int(analysis.output_size_in_bytes)
        if (limit := memory()) is not None and size + results > limit / 2:
            raise MemoryError(f"would take {(size + results) / 1e9:.0f} GB")
        return compiled, size

    run, size = fits(subject.function, *qkv, subject.extra)
    if passes == "forward":
        return lambda: run(*qkv, subject.extra), size
    kept = fits(keep, *qkv, subject.extra)[0](*qkv, subject.extra)
    gradients, size = fits(lambda kept, cotangent: kept(cotangent), kept, cotangent)
    size += sum(x.nbytes for x in jax.tree.leaves(kept))
    return lambda: gradients(kept, cotangent), size


def reference(case: Case, passes: str, inputs: Sequence[Array]) -> Any:
    """The answer: blockwise in float32, every product at full precision."""
    *qkv, cotangent = (x.astype(jnp.float32) for x in inputs)

    def attend(query: Array, key: Array, value: Array) -> Array:
        return attnlab.attention(
            query,
            key,
            value,
            mask=case.mask,
            modifiers=case.modifiers,
            normalizer=case.normalizer,
            implementation="blockwise",
        )

    with jax.default_matmul_precision("highest"):
        if passes == "forward":
            return jax.jit(attend)(*qkv)
        return jax.jit(lambda *x: jax.vjp(attend, *x[:3])[1](x[3]))(*qkv, cotangent)


@jax.jit
def difference(got: Any, want: Any) -> Array:
    """The largest error, relative to the largest entry of each expected array; inf for NaN."""

    def error(a: Array, b: Array) -> Array:
        worst = jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b))
        # Asked apart, for a maximum need not pass NaN on (XLA's fast one on CPUs does not).
        return jnp.where(jnp.all(jnp.isfinite(a)), worst, jnp.inf)

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return jnp.max(jnp.stack([error(a, b) for a, b in pairs]))


def candidate(
    make: Maker, case: Case, passes: str, inputs: Sequence[Array], want: Any, dtype: Any
) -> Candidate:
    """Compile, run and compare; whatever goes wrong becomes words."""
    allowed = TOLERANCE[jnp.dtype(dtype).name] * (2 if passes == "backward" else 1)
    try:
        call, size = prepare(make(case, dtype), passes, inputs)
        error = float(difference(jax.block_until_ready(call()), want))
    except Exception as failure:  # a peer may fail in any way; the table says how
        refused = isinstance(failure, NotImplementedError | MemoryError)
        return Candidate(error=in_words(failure), wrong=not refused)
    if error > allowed:
        words = f"off by {error:.1e} where {allowed:.0e} is allowed"
        return Candidate(error=words, wrong=True)
    return Candidate(call, size)


def in_words(error: Exception) -> str:
    """One line on why something was not measured: a refusal's words, a failure's with its type."""
    text = re.sub(r'^implementation="\w+" |; implementation="\w+" can\.$', "", str(error))
    text = " ".join(text.split())
    if not isinstance(error, NotImplementedError | MemoryError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) < 120 else text[:117] + "…"
