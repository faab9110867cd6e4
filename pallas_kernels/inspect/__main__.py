"""`python -m pallas_kernels.inspect`: which compilers are here, and for which accelerators."""

import importlib.metadata

from pallas_kernels.inspect import gpu_kinds, gpu_missing, tpu_kinds, tpu_missing
from pallas_kernels.inspect.assemble import cuda_file
from pallas_kernels.inspect.gpu import plugin_path


def main() -> None:
    """Print it."""
    print(f"jax {importlib.metadata.version('jax')}")
    print(f"GPU kinds: {', '.join(f'{k.name} ({k.arch})' for k in gpu_kinds().values())}")
    print(f"  compile: {gpu_missing() or f'yes, with {plugin_path()}'}")
    sass = "yes" if cuda_file("*/bin/nvdisasm") else "no: pip install nvidia-cuda-nvdisasm"
    print(f"  disassemble: {sass}")
    print(f"TPU kinds: {', '.join(tpu_kinds())}")
    found = None if tpu_missing() else f"yes, with libtpu {importlib.metadata.version('libtpu')}"
    print(f"  compile: {found or tpu_missing()}")


if __name__ == "__main__":
    main()
