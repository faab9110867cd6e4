"""Fused attention for a TPU that is not there: what its compiler says, and what can be counted.

    attnlab bench flash --compile-for v5e

Nothing here is measured.  From the compiler: temporaries, code, VMEM, vector-register spills (in
the text of the kernels, stores / loads) and the length of the inner loops' schedules in bundles: a
core issues one bundle a cycle, so that is the fewest cycles a round can take; how many rounds there
are depends on the blocks, and waiting for memory comes on top.  Counted: operations on live pairs
(`flash_cases`), the bytes that must move at least once, and the time that these take at the chip's
stated rates, whichever is longer: what an implementation can hope for, not what it does.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.bench.flash_candidates import in_words
from attnlab.bench.flash_cases import CASES, Case, Shape, chosen
from attnlab.bench.flash_peers import OURS, Maker, Subject, jax_nn, ours, pallas_flash, splash
from attnlab.bench.harness import Result, Row, finish

# Of one chip: bfloat16 operations and bytes of HBM in a second, as its maker gives them.
ROOFS = {
    "v4": (275e12, 1228e9),
    "v5e": (197e12, 819e9),
    "v5p": (459e12, 2765e9),
    "v6e": (918e12, 1640e9),
}
NAMES = ("causal", "window", "packed", "alibi")
AT, BATCH, HEADS = (4096, 128), 1, 4
PASSES = ("forward", "with gradients")
MAKERS: dict[str, Maker] = {
    f"{OURS}tpu": ours("tpu"),
    f"{OURS}blockwise": ours("blockwise"),
    "jax.nn xla": jax_nn("xla"),
    "splash": splash,
    "pallas flash": pallas_flash,
}


def work(case: Case, passes: str) -> tuple[float, float]:
    """Operations on live pairs, and bytes that must cross HBM at least once, in bfloat16."""
    shape = case.shape
    rows = shape.batch * shape.length * shape.heads
    array = 2.0 * rows * shape.width
    if passes == "forward":
        return case.flops("forward"), 4 * array
    # Query, key, value and cotangent are read, three gradients are written.
    return case.flops("forward") + case.flops("backward"), 7 * array


def bound(kind: str, flops: float, size: float) -> tuple[float, str]:
    """Seconds that the work takes at the chip's stated rates, and which of them decides."""
    rate, bandwidth = ROOFS[kind]
    limits = {"compute": flops / rate, "memory": size / bandwidth}
    which = max(limits, key=lambda name: limits[name])
    return limits[which], which


def abstract(name: str, case: Case) -> Subject:
    """The subject with shapes for arrays, so that a bias of gigabytes is not made."""
    if name == "splash":  # which plans on the mask itself
        return MAKERS[name](case, jnp.bfloat16)
    found: list[Subject] = []

    def extra() -> Any:
        found.append(MAKERS[name](case, jnp.bfloat16))
        return found[0].extra

    shapes = jax.eval_shape(extra)
    return Subject(found[0].function, shapes)


def program(subject: Subject, passes: str) -> Any:
    """A pass as a function of query, key, value, cotangent and `extra`."""

    def forward(query: Array, key: Array, value: Array, cotangent: Array, extra: Any) -> Any:
        return subject.function(query, key, value, extra)

    def gradients(query: Array, key: Array, value: Array, cotangent: Array, extra: Any) -> Any:
        def attend(query: Array, key: Array, value: Array) -> Array:
            return subject.function(query, key, value, extra)

        return jax.vjp(attend, query, key, value)[1](cotangent)

    return forward if passes == "forward" else gradients


def measure(case: Case, passes: str, name: str, kind: str) -> Row:
    """One line: a subject's program, compiled, and what the compiler says of it."""
    from pallas_kernels.inspect import compile_tpu

    shape = case.shape
    flops, size = work(case, passes)
    least, which = bound(kind, flops, size)
    cells: dict[str, Any] = {
        "case": case.name,
        "pass": passes,
        "B·T·N·H": "·".join(map(str, (shape.batch, shape.length, shape.heads, shape.width))),
        "who": name,
    }
    counted = {
        "GFLOP": f"{flops / 1e9:,.1f}",
        "MB moved ≥": f"{size / 1e6:,.0f}",
        "ms ≥": f"{1e3 * least:.3g} ({which})",
    }
    tensor = jax.ShapeDtypeStruct(
        (shape.batch, shape.length, shape.heads, shape.width), jnp.bfloat16
    )
    try:
        subject = abstract(name, case)
        arguments = (tensor, tensor, tensor, tensor, subject.extra)
        report = compile_tpu(program(subject, passes), *arguments, kind=kind)
    except ImportError:
        raise
    except Exception as failure:  # what a compiler or a peer refuses, the table says
        return Row({**cells, **counted, "note": in_words(failure)})
    kernels = report.kernels
    inner = [
        max((loop.bundles for loop in k.loops if loop.innermost), default=k.bundles)
        for k in kernels
    ]
    spills = [sum(counts) for counts in zip(*(k.spills for k in kernels), strict=True)]
    cells |= {
        "temp MB": f"{report.memory['temp'] / 1e6:,.1f}",
        "code KB": f"{report.memory['generated_code'] / 1e3:,.0f}",
        "VMEM KB": ", ".join(f"{k.vmem_bytes / 1e3:,.0f}" for k in kernels),
        "bundles": ", ".join(f"{n:,}" for n in inner),
        "spills": " / ".join(f"{n:,}" for n in spills),
    }
    detail = {"memory": report.memory, "flops": flops, "bytes": size, "least": least}
    return Row({**cells, **counted}, detail=detail)


def run(
    kind: str,
    save: Any = None,
    quick: bool = False,
    *,
    case: str | None = None,
    lengths: Sequence[int] = (),
    widths: Sequence[int] = (),
) -> Result:
    """Table of what the compiler of a TPU says, by case, pass and subject; nothing runs.

    Raises:
      ValueError: a kind of TPU that is not among `ROOFS`, or an unknown case.
      ImportError: the TPU compiler (attnlab[tpu]) is not installed.
    """
    if kind not in ROOFS:
        raise ValueError(f"compile-for: expected one of {', '.join(ROOFS)}, got {kind!r}.")
    names = chosen(case) if case is not None else NAMES[:1] if quick else NAMES

    def rows() -> Iterator[Row]:
        for name in names:
            for width in widths or AT[1:]:
                for length in lengths or AT[:1]:
                    shape = Shape(BATCH, length, HEADS, width)
                    made = CASES[name](shape)
                    for passes in PASSES:
                        for who in MAKERS:
                            yield measure(made, passes, who, kind)

    title = f"Compiled for a TPU {kind}, bfloat16: counted by the compiler and by us, not measured"
    notes = (
        "bundles: of each kernel's longest innermost loop; spills: stores / loads of all kernels.",
        "attnlab's loops hold a tile with and without its mask, of which a round runs one.",
        "ms ≥: operations on live pairs and least bytes, over the chip's stated limits.",
    )
    return finish(Result(f"flash-{kind}", title, tuple(rows()), notes), save)
