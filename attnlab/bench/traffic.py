"""What a compiled program sends from device to device, read off its text.

A collective inside a loop counts as often as the loop turns, which the compiler writes down.  Each
device is taken to send, of an array of n bytes and among P devices of a group,

    collective-permute   n              all-to-all      n (P - 1) / P
    all-gather           n (P - 1) / P  of the result   reduce-scatter  n (P - 1) / P of the operand
    all-reduce           2 n (P - 1) / P

as the best algorithms on a ring do (Thakur, Rabenseifner & Gropp 2005).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

KINDS = (
    "collective-permute", "all-to-all", "all-gather", "reduce-scatter", "all-reduce",
)  # fmt: skip

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "f64": 8,
           "s64": 8, "u64": 8}  # fmt: skip
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"(?:body|to_apply|calls|branch_computations|async_execution_thread)="
                     r"\{?((?:%?[\w.\-]+(?:, )?)+)\}?")  # fmt: skip
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends, by the kind of collective, and how many of each there are."""

    bytes: Mapping[str, float]
    count: Mapping[str, int]

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


def traffic(compiled: Any) -> Traffic:
    """The traffic of a compiled function (`jax.jit(f).lower(...).compile()`).

    Raises:
      ValueError: a loop with a collective whose number of turns the compiler does not know.
    """
    computations, entry = _computations(compiled.as_text())
    size: dict[str, float] = collections.defaultdict(float)
    count: dict[str, int] = collections.defaultdict(int)
    for kind, sent, times in _collectives(computations, entry):
        size[kind] += sent * times
        count[kind] += times
    return Traffic(dict(size), dict(count))


def sent_by(function: Callable, *arguments: Any) -> Traffic:
    """The traffic of a function of these arrays or shapes, compiled for their devices."""
    return traffic(jax.jit(function).lower(*arguments).compile())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[1]
            found[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name and " = " in line:
            found[name].append(line)
    return found, entry


def _collectives(computations: dict[str, list[str]], name: str) -> Iterator[tuple[str, float, int]]:
    for line in computations[name]:
        kind = next((k for k in KINDS if f" {k}(" in line or f" {k}-start(" in line), None)
        if kind is not None:
            yield kind, _sent(kind, line), 1
        inner = [
            part
            for called in _called(line)
            if called in computations
            for part in _collectives(computations, called)
        ]
        turns = 1
        if inner and " while(" in line:
            known = _TURNS.search(line)
            if known is None:
                raise ValueError(f"compiled: how often this loop turns is not known: {line[:200]}")
            turns = int(known[1])
        for kind, sent, times in inner:
            yield kind, sent, times * turns


def _called(line: str) -> list[str]:
    return [
        name.strip().lstrip("%") for group in _CALLED.findall(line) for name in group.split(",")
    ]


def _sent(kind: str, line: str) -> float:
    result, rest = line.split(" = ", 1)[1].split(f" {kind}", 1)
    arrays = [_bytes(*array) for array in _ARRAY.findall(result)]
    if rest.startswith("-start"):  # operands, results, and a few words of state
        arrays = arrays[: 2 * (len(arrays) // 2)]
        arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
    if kind == "collective-permute":
        return float(sum(arrays))
    devices = _group(line)
    share = (devices - 1) / devices
    if kind == "reduce-scatter":
        return float(sum(arrays) * (devices - 1))  # the operand is as often as large
    return sum(arrays) * share * (2 if kind == "all-reduce" else 1)


def _bytes(kind: str, sizes: str) -> int:
    return _WIDTHS.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n)


def _group(line: str) -> int:
    """How many devices take part in one group of a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if counted:
        return int(counted[2])
    mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']*)'", mesh[2]))
    raise ValueError(f"compiled: who takes part is not said as expected: {line[:300]}")
