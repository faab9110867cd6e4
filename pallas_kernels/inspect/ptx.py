"""A kernel's PTX, and what ptxas says of it."""

import dataclasses
import re
import struct
import subprocess
from pathlib import Path


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
    notes: tuple[str, ...]  # what else ptxas had to say
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
            f"wgmma {self.wgmma}, mma.sync {self.mma_sync}"
        )
        return "\n    ".join((figures, *self.notes))


def read_kernels(
    path: Path, arch: str, ptxas: str, nvdisasm: str | None, launches: str
) -> list[GpuKernel]:
    """The kernels of one dumped PTX file.

    XLA lists its launches in `launches`.  Mosaic leaves ptxas's log and the passes beside the PTX.
    """
    text = path.read_text()
    names = re.findall(r"\.entry\s+(\w+)", text)
    own_log, passes = path.with_suffix(".ptxas"), path.with_suffix(".mlir-passes.log")
    cubin = path.with_suffix(".cubin")
    run = subprocess.run(
        [ptxas, "-v", f"--gpu-name={arch}", str(path), "-o", str(cubin)],
        capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"ptxas refused {names}: {run.stdout}{run.stderr}")
    code = _code_sizes(cubin.read_bytes())
    # Mosaic calls ptxas with options of its own, so its own log counts.
    log = own_log.read_text() if own_log.exists() else run.stderr
    kernels = []
    for name in names:
        said = _said_of(name, log)
        body = text[re.search(rf"\.entry\s+{name}\b", text).start() :]
        end = body.find("\n}")
        body = body[: end if end >= 0 else None]
        kernels.append(
            GpuKernel(
                name=name.removesuffix("_mosaic_gpu_kernel"),
                made_by="mosaic" if own_log.exists() else "xla",
                shared_dynamic=_asked_at_launch(name, launches, passes),
                code_bytes=code[name],
                wgmma=len(re.findall(r"\bwgmma\.mma_async", body)),
                mma_sync=len(re.findall(r"\bmma\.sync", body)),
                ptx=text,
                sass=_disassemble(nvdisasm, cubin),
                **said,
            )
        )
    return kernels


def _said_of(name: str, log: str) -> dict:
    """Figures of one kernel out of the log of `ptxas -v`."""
    about = re.search(
        rf"Function properties for {name}\n.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        rf"(\d+) bytes spill loads\n.*?Used (\d+) registers([^\n]*)",
        log,
        re.DOTALL,
    )
    if about is None:
        raise RuntimeError(f"ptxas said nothing of {name}: {log!r}")
    stack, stores, loads, registers = map(int, about.groups()[:4])
    shared = re.search(r"(\d+) bytes smem", about[5])
    notes = re.findall(r"(?:\(C\d+\)|warning\s*:)\s*(.*)", log)
    return {
        "registers": registers,
        "spill_stores": stores,
        "spill_loads": loads,
        "stack": stack,
        "shared_static": int(shared[1]) if shared else 0,
        "notes": tuple(dict.fromkeys(note.strip() for note in notes)),
    }


def _asked_at_launch(name: str, launches: str, passes: Path) -> int:
    """Dynamic shared memory, from XLA's list of launches or from Mosaic's passes."""
    if not passes.exists():
        line = re.search(rf"\b{name} grid:.*shared_memory: (\d+) bytes", launches)
        if line is None:
            raise RuntimeError(f"no launch of {name} in {launches!r}")
        return int(line[1])
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
    text = ".text."
    return {
        name.removeprefix(text): section[5]
        for name, section in zip(names, sections, strict=True)
        if name.startswith(text)
    }


def _disassemble(nvdisasm: str | None, cubin: Path) -> str | None:
    if nvdisasm is None:
        return None
    return subprocess.run(
        [nvdisasm, "-ndf", "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
