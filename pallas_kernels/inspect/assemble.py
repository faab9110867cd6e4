"""PTX to machine code, by the library and with the options that XLA and Mosaic GPU use.

XLA takes nvJitLink where it finds one, which the CUDA plugin's wheels see to.  It is not ptxas on
its own: it assembles for linking, and what it cannot know about other units it must assume.
"""

import ctypes
import functools
import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

_PTX = 2  # nvJitLinkInputType


def cuda_file(pattern: str) -> Path | None:
    """A file out of NVIDIA's wheels, by a pattern below `nvidia/`."""
    spec = importlib.util.find_spec("nvidia")
    roots = (spec.submodule_search_locations or ()) if spec else ()
    return next((path for root in roots for path in sorted(Path(root).glob(pattern))), None)


@functools.cache
def _library() -> ctypes.CDLL:
    path = cuda_file("*/lib/libnvJitLink.so.*")
    if path is None:
        raise ImportError("libnvJitLink not found; it comes with 'attnlab[cuda]'.")
    return ctypes.CDLL(str(path))


def assemble(ptx: str, arch: str) -> tuple[bytes, str]:
    """The cubin, and what the assembler says of it; RuntimeError where it refuses."""
    library, handle = _library(), ctypes.c_void_p()
    # The options that XLA logs at TF_CPP_MAX_VLOG_LEVEL=5.
    options = [f"-arch={arch}", "-verbose", "-Xptxas=--warn-on-spills", "-no-cache"]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if library.nvJitLinkCreate(ctypes.byref(handle), len(options), array):
        raise RuntimeError(f"nvJitLink refused {options}")
    try:
        data = ptx.encode()
        failed = library.nvJitLinkAddData(handle, _PTX, data, ctypes.c_size_t(len(data)), b"ptx")
        if failed or library.nvJitLinkComplete(handle):
            raise RuntimeError(_read(library, handle, "ErrorLog").decode())
        return _read(library, handle, "LinkedCubin"), _read(library, handle, "InfoLog").decode()
    finally:
        library.nvJitLinkDestroy(ctypes.byref(handle))


def _read(library: ctypes.CDLL, handle: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    if library[f"nvJitLinkGet{what}Size"](handle, ctypes.byref(size)):
        raise RuntimeError(f"nvJitLink has no {what}")
    buffer = ctypes.create_string_buffer(size.value)
    if library[f"nvJitLinkGet{what}"](handle, buffer):
        raise RuntimeError(f"nvJitLink has no {what}")
    return buffer.raw


def assemble_whole(ptx: str, arch: str) -> str | None:
    """What ptxas says when it may take the PTX for the whole program; None without ptxas."""
    ptxas = cuda_file("*/bin/ptxas")
    if ptxas is None:
        return None
    command = [str(ptxas), "-v", f"--gpu-name={arch}", "-", "-o", "/dev/null"]
    run = subprocess.run(command, input=ptx, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"ptxas refused:\n{run.stdout}{run.stderr}")
    return run.stderr


def disassemble(cubin: bytes) -> str | None:
    """SASS; None without nvdisasm (the wheel nvidia-cuda-nvdisasm brings it)."""
    tool = cuda_file("*/bin/nvdisasm") or shutil.which("nvdisasm")
    if tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-ndf", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
