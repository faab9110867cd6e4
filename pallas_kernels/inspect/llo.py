"""Reading libtpu's dumps of one kernel: what lies in VMEM, and how long its schedule is.

A TPU core issues one bundle of instructions a cycle.  The bundles of a loop's body are therefore
the fewest cycles one round of it can take; waiting for memory comes on top and is not in a dump,
nor is how often a loop runs.
"""

import dataclasses
import re
from pathlib import Path

LABELS = "post-delay-converter|final_bundles|final_hlo-static-per-bundle-utilization"
"""A pattern for the stages worth dumping: each holds every instruction."""


@dataclasses.dataclass(frozen=True)
class TpuLoop:
    """A loop of the schedule: where it starts, how many bundles its body has, what they do."""

    depth: int  # 1 is the loop over the grid
    start: int
    bundles: int
    innermost: bool
    units: dict[str, int]  # instructions a round, by unit of the core as libtpu names it


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    """One Pallas kernel of a compiled program."""

    name: str
    # VMEM it allocates: windows (twice where pipelined), scratch, spilled registers.  Operands
    # that XLA keeps in VMEM between operations have no window and are not among it.
    vmem_bytes: int
    vmem: dict[str, int]  # bytes by purpose; what lives at different times may share addresses
    bundles: int
    capacity: dict[str, int]  # instructions a bundle can hold, by unit
    units: dict[str, int]  # instructions of the whole text
    loops: tuple[TpuLoop, ...]

    @property
    def spills(self) -> tuple[int, int]:
        """Vector register spills in the text: stores, loads."""
        return self.units["VSTORE:SPILL"], self.units["VLOAD:FILL"]

    def __str__(self) -> str:
        stores, loads = self.spills
        lines = [
            f"{self.name}: VMEM {self.vmem_bytes} B, {self.bundles} bundles, spills "
            f"{stores}/{loads} instructions"
        ]
        for loop in self.loops:
            busy = ", ".join(f"{unit} {n}" for unit, n in loop.units.items() if n)
            kind = "innermost loop" if loop.innermost else "loop"
            lines.append(f"{kind} at depth {loop.depth}: {loop.bundles} bundles; {busy}")
        return "\n    ".join(lines)


def read_kernel(folder: Path, name: str) -> TpuKernel:
    """The kernel of this HLO instruction, from the files that libtpu left in `folder`."""
    vmem_bytes, vmem = _allocations(_dump(folder, name, "post-delay-converter"))
    capacity, rows = _utilization(_dump(folder, name, "final_hlo-static-per-bundle-utilization"))
    total = {unit: sum(row[i] for row in rows) for i, unit in enumerate(capacity)}
    return TpuKernel(
        name=name,
        vmem_bytes=vmem_bytes,
        vmem=vmem,
        bundles=len(rows),
        capacity=capacity,
        units=total,
        loops=_loops(_dump(folder, name, "final_bundles"), list(capacity), rows),
    )


def _dump(folder: Path, name: str, stage: str) -> str:
    pattern = rf"\d+-{re.escape(name)}-\d+-{stage}\.txt"
    files = [file for file in folder.iterdir() if re.fullmatch(pattern, file.name)]
    if len(files) != 1:
        raise RuntimeError(f"libtpu left {len(files)} dumps of {name} at stage {stage!r}.")
    return files[0].read_text()


def _allocations(text: str) -> tuple[int, dict[str, int]]:
    """Where the kernel's share of VMEM ends, and its bytes by tag."""
    pattern = (
        r"#allocation\w+ \[.*?, space=vmem, size = (0x[0-9a-f]+), offset = (0x[0-9a-f]+|0),"
        r".*?tag = '([^'.]*)"  # a window's shapes follow a full stop
    )
    end = 0
    by_tag: dict[str, int] = {}
    for size, offset, tag in re.findall(pattern, text):
        end = max(end, int(size, 16) + int(offset, 16))
        by_tag[tag] = by_tag.get(tag, 0) + int(size, 16)
    return end, by_tag


def _utilization(text: str) -> tuple[dict[str, int], list[list[int]]]:
    """How many instructions of each unit a bundle can hold, and does: a row for each bundle."""
    lines = text.splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    capacity = dict(zip(units, map(int, lines[2].split()), strict=True))
    rows = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
    return capacity, rows


def _loops(text: str, units: list[str], rows: list[list[int]]) -> tuple[TpuLoop, ...]:
    """Every loop, outermost first: a branch back to a region that began at or before it.

    Not by the marks for depth: an instruction moved into a loop keeps the mark it had outside.
    """
    bundles = re.split(r"^ *(?:0x[0-9a-f]+|\d+) +(?:[A-Z]{2})? *:", text, flags=re.MULTILINE)[1:]
    if len(bundles) != len(rows):
        raise RuntimeError(f"{len(bundles)} bundles in the text, {len(rows)} in the table.")
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    backward: dict[str, int] = {}
    for here, bundle in enumerate(bundles):
        for region in re.findall(r"\bStart region (\d+)", bundle):
            starts[region] = here
        for region in re.findall(r"\bEnd region (\d+)", bundle):
            ends[region] = here
        for region in re.findall(r"target = \$region(\d+)", bundle):
            if region in starts:
                backward[region] = here
    # The slots behind a branch are executed too; where the region's end is marked they are in it.
    spans = sorted(
        {(starts[r], -max(branch, ends.get(r, branch))) for r, branch in backward.items()}
    )
    return tuple(
        TpuLoop(
            depth=sum(s <= start and e <= end for s, e in spans),  # ends are negative
            start=start,
            bundles=1 - end - start,
            innermost=not any(s >= start and e >= end and (s, e) != (start, end) for s, e in spans),
            units={u: sum(row[i] for row in rows[start : 1 - end]) for i, u in enumerate(units)},
        )
        for start, end in spans
    )
