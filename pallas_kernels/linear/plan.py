"""How a recurrence is cut: steps to a chunk, columns of the state to a program."""

from pallas_kernels.linear.problem import Plan


def padded(length: int, block: int) -> int:
    """`length` rounded up to whole blocks."""
    return -(-length // block) * block


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is not below n or `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def triton_plan(
    key_width: int,
    value_width: int,
    length: int,
    decay: str,
    erase: bool,
    backward: bool,
    chunk_size: int | None,
) -> Plan:
    """The largest chunk and block for which the compiler keeps all in registers on an H100."""
    chunk = 32
    block = 32
    chunk = chunk_size or min(chunk, power_of_two(length))
    return Plan(chunk, min(block, power_of_two(value_width)), 4, 1)


def chunk_limit(chunk_size: int) -> str | None:
    """What is wrong with a chunk size, or None."""
    if chunk_size >= 16 and chunk_size & (chunk_size - 1) == 0:
        return None
    return f"takes a chunk_size that is a power of two from 16 on, not {chunk_size}"
