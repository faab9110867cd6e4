"""Memory at length: temporaries of blockwise attention against the materialising forms.

Read from the compiler (`compiled.memory_analysis()`), for this CPU and, where the `libtpu` wheel
is installed, for a TPU that need not be there.  Nothing runs; the numbers are deterministic.

Rabe & Staats 2021 (arXiv:2112.05682) report 59 times less memory forward and 32 times less with
gradients at 16,384 positions.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.bench.harness import Result, Row, finish
from attnlab.bench.subjects import FORMULA, LIBRARY, OURS, attentions, with_gradients

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
QUICK = (2048, 16384)
AT, FORWARD, GRADIENTS = 16384, 59.0, 32.0  # the paper's figures
GROWTH = 1.1  # the largest exponent of n that counts as linear
TPU = "v5p:2x2x1"  # its 95 GB hold the materialising form at every length here
PASSES = {"forward": FORWARD, "gradients": GRADIENTS}


def tpu_device() -> Any:
    """A TPU to compile for, which need not be there.

    Raises NotImplementedError where the compiler is not installed or does not start.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise NotImplementedError("the libtpu wheel is not installed (pip install libtpu)")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=TPU).devices[0]
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split(". ")[0]
        raise NotImplementedError(f"the TPU compiler does not start: {reason}") from error


def devices() -> tuple[dict[str, Any], list[str]]:
    """The devices to compile for, by name, and a note on each that cannot be had."""
    # Otherwise a second process with libtpu in it, on the same machine, would be turned away.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    with _quiet():
        found = {"CPU": jax.local_devices(backend="cpu")[0]}
        try:
            return {**found, "TPU v5p": tpu_device()}, []
        except NotImplementedError as error:
            return found, [f"TPU: skipped, {error}."]


def temporaries(function: Callable, shapes: Sequence[tuple[int, ...]], device: Any) -> int:
    """Bytes of temporary memory that the compiled function would take on the device."""
    place = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=place) for s in shapes]
    with _not_kept():
        compiled = jax.jit(function).lower(*arguments).compile()
    return counted(compiled, device)


def counted(compiled: Any, device: Any = "this device") -> int:
    """Bytes of temporary memory of a compiled function.

    Raises NotImplementedError where the compiler does not tell.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError("this compiler does not tell how much memory a program takes.")
    return int(analysis.temp_size_in_bytes)


def measure(name: str, passes: str, length: int, device: Any, *, width: int = 64) -> int:
    """Temporaries of one subject ("blockwise", "formula", "jax.nn"): one head, one sequence."""
    function = attentions()[name]
    if passes == "gradients":
        return temporaries(with_gradients(function), [(1, length, 1, width)] * 4, device)
    return temporaries(function, [(1, length, 1, width)] * 3, device)


def growth(lengths: Sequence[int], sizes: Sequence[int]) -> float:
    """The exponent p of the least-squares fit size ~ length**p."""
    return float(np.polyfit(np.log(lengths), np.log(sizes), 1)[0])


def run(save: Any = None, quick: bool = False) -> Result:
    """Table of temporaries by compiler, pass and length, with ratios and the growth of ours."""
    lengths = QUICK if quick else LENGTHS
    rows = []
    found, notes = devices()
    for place, device in found.items():
        for passes, wanted in PASSES.items():
            ours = []
            for length in lengths:
                size = {n: measure(n, passes, length, device) for n in (OURS, FORMULA, LIBRARY)}
                ours.append(size[OURS])
                least = min(size[FORMULA], size[LIBRARY]) / size[OURS]
                rows.append(
                    Row(
                        {
                            "compiler": place,
                            "pass": passes,
                            "n": f"{length:,}",
                            **{name: _megabytes(value) for name, value in size.items()},
                            "formula ÷ ours": f"{size[FORMULA] / size[OURS]:.0f}×",
                            "jax.nn ÷ ours": f"{size[LIBRARY] / size[OURS]:.0f}×",
                        },
                        target=f"≥ {wanted:.0f}×" if length == AT else "",
                        passed=least >= wanted if length == AT else None,
                        detail={"length": length, **size},
                    )
                )
            exponent = growth(lengths, ours)
            rows.append(
                Row(
                    {"compiler": place, "pass": passes, "n": "growth", OURS: f"n^{exponent:.2f}"},
                    target="O(n)",
                    passed=exponent <= GROWTH,
                    detail={"exponent": exponent},
                )
            )
    title = "Temporaries in MB, one head of width 64, float32"
    return finish(Result("memory", title, tuple(rows), tuple(notes)), save)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


@contextlib.contextmanager
def _not_kept() -> Iterator[None]:
    """Keep out of JAX's persistent cache what is compiled for a machine that is not there.

    It could be written to the cache, but not be read from it.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    saved = getattr(jax.config, name)
    try:
        jax.config.update(name, float("inf"))
        yield
    finally:
        jax.config.update(name, saved)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what libtpu writes to stderr when it finds no TPU: none is needed."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
