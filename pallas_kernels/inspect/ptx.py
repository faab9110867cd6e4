"""The kernels in a file of PTX, and what the assembler says of them."""

import dataclasses
import re
import struct
from pathlib import Path
from typing import Any

from pallas_kernels.inspect.assemble import assemble, assemble_whole, disassemble


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """One kernel of a compiled program; sizes in bytes, registers a thread."""

    name: str
    made_by: str  # "xla" (Triton kernels and XLA's fusions) or "mosaic"
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared_static: int
    shared_dynamic: int
    code_bytes: int
    wgmma: int  # instructions in the PTX: of the text, not of a run
    mma_sync: int
    tcgen05_mma: int
    notes: tuple[str, ...]  # what else the assembler had to say
    ptx: str = dataclasses.field(repr=False)
    sass: str | None = dataclasses.field(repr=False)  # None without nvdisasm

    @property
    def shared(self) -> int:
        """Shared memory of a block, static and dynamic."""
        return self.shared_static + self.shared_dynamic

    def __str__(self) -> str:
        figures = (
            f"{self.name} [{self.made_by}]: {self.registers} registers, spills "
            f"{self.spill_stores}/{self.spill_loads} B, stack {self.stack} B, shared "
            f"{self.shared_static}+{self.shared_dynamic} B, code {self.code_bytes} B, "
            f"wgmma {self.wgmma}, mma.sync {self.mma_sync}, tcgen05.mma {self.tcgen05_mma}"
        )
        return "\n    ".join((figures, *self.notes))


def read_kernels(path: Path, arch: str, launches: str) -> list[GpuKernel]:
    """The kernels of one dumped PTX file.

    XLA lists its launches in `launches`; Mosaic leaves the passes beside the PTX.
    """
    text = path.read_text()
    names = re.findall(r"\.entry\s+(\w+)", text)
    bodies = re.split(r"\.entry\s+\w+", text)[1:]
    passes = path.with_suffix(".mlir-passes.log")
    cubin, log = assemble(text, arch)
    code, sass = _code_sizes(cubin), disassemble(cubin)
    return [
        GpuKernel(
            name=name.removesuffix("_mosaic_gpu_kernel"),
            made_by="mosaic" if passes.exists() else "xla",
            **_said_of(name, log),
            shared_dynamic=_asked_at_launch(name, launches, passes),
            code_bytes=code[name],
            wgmma=len(re.findall(r"\bwgmma\.mma_async", body)),
            mma_sync=len(re.findall(r"\bmma\.sync", body)),
            tcgen05_mma=len(re.findall(r"\btcgen05\.mma", body)),
            notes=_notes(name, log, text, arch),
            ptx=text,
            sass=sass,
        )
        for name, body in zip(names, bodies, strict=True)
    ]


def _said_of(name: str, log: str) -> dict[str, Any]:
    """Figures of one kernel out of the assembler's log."""
    about = re.search(
        rf"Function properties for {name}\n.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        rf"(\d+) bytes spill loads\n.*?Used (\d+) registers([^\n]*)",
        log,
        re.DOTALL,
    )
    if about is None:
        raise RuntimeError(f"the assembler said nothing of {name}: {log!r}")
    stack, stores, loads, registers = map(int, about.groups()[:4])
    shared = re.search(r"(\d+) bytes smem", about[5])
    return {
        "registers": registers,
        "spill_stores": stores,
        "spill_loads": loads,
        "stack": stack,
        "shared_static": int(shared[1]) if shared else 0,
    }


def _notes(name: str, log: str, text: str, arch: str) -> tuple[str, ...]:
    notes = re.findall(r"\(C\d+\)\s*(.*)", log)
    if any("compilation units" in note for note in notes) and (alone := assemble_whole(text, arch)):
        said = _said_of(name, alone)
        notes.append(
            f"assembled as a whole program it would have {said['registers']} registers, spills "
            f"{said['spill_stores']}/{said['spill_loads']} B"
        )
    return tuple(dict.fromkeys(note.strip() for note in notes))


def _asked_at_launch(name: str, launches: str, passes: Path) -> int:
    """Dynamic shared memory, from XLA's list of launches or from Mosaic's passes."""
    if not passes.exists():
        listed = re.search(rf"\b{name} grid:.*shared_memory: (\d+) bytes", launches)
        if listed is None:
            raise RuntimeError(f"no launch of {name} in {launches!r}")
        return int(listed[1])
    constants: dict[str, int] = {}
    with passes.open() as lines:  # tens of megabytes; the launch comes early
        for line in lines:
            if constant := re.search(r"(%\w+) = arith\.constant (\d+) : i32", line):
                constants[constant[1]] = int(constant[2])
            if launch := re.search(r"dynamic_shared_memory_size (%\w+)", line):
                return constants[launch[1]]
    return 0


def _code_sizes(elf: bytes) -> dict[str, int]:
    """Bytes of machine code of each kernel: the sections .text.NAME of a cubin."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, strings = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + entry * i) for i in range(count)]
    at = sections[strings][4]
    names = [elf[at + s[0] : elf.index(b"\0", at + s[0])].decode() for s in sections]
    return {
        name.removeprefix(".text."): section[5]
        for name, section in zip(names, sections, strict=True)
        if name.startswith(".text.")
    }
