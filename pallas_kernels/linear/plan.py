"""How a recurrence is cut: steps to a chunk, columns of the state to a program."""

from typing import Any

import jax

from pallas_kernels.linear.problem import Plan


def padded(length: int, block: int) -> int:
    """`length` rounded up to whole blocks."""
    return -(-length // block) * block


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is not below n or `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def triton_plan(decay: str, chunk_size: int | None) -> Plan:
    """Small chunks, whose products fit the registers of eight warps.

    More columns than steps: Triton divides a product between warps along the longer side, and
    where neither is longer each warp computes all of it.
    """
    return Plan(chunk_size or 16, 32, part=32 if decay == "channel" else 64)


TPU_CHUNK = 64


def tpu_plan(value_width: int, length: int, chunk_size: int | None) -> Plan:
    """A chunk of 64, or a short sequence whole; all columns of the state, up to 256, at once."""
    return Plan(chunk_size or min(TPU_CHUNK, power_of_two(length)), value_width)


def tpu_memory(kind: str) -> int | None:
    """Bytes of vector memory to ask for on a kind of TPU, None on other devices.

    Three quarters of what there is; all of it where there is little, as on v4.
    """
    sizes = {"v4": 16, "v5 lite": 96, "v5e": 96, "v5": 48, "v6": 96, "7": 48}
    if "TPU" not in kind:
        return None
    return next((size for name, size in sizes.items() if name in kind), 16) << 20


def device_kind() -> str:
    """The kind of the device that is traced for: an abstract mesh's, else the default."""
    mesh = jax.sharding.get_abstract_mesh()
    device: Any = getattr(mesh, "abstract_device", None) or jax.devices()[0]
    return str(device.device_kind)


def chunk_limit(chunk_size: int) -> str | None:
    """What is wrong with a chunk size, or None."""
    if chunk_size >= 16 and chunk_size & (chunk_size - 1) == 0:
        return None
    return f"takes a chunk_size that is a power of two from 16 on, not {chunk_size}"
