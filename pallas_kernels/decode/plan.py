"""Decoding with the flash kernels: few queries, many keys.

The bodies are those of `pallas_kernels.flash`; what differs is how a call is laid out for them.
Query heads that share a key head become rows of one tile, so that every key is read once; keys are
divided between programs, whose results are merged; a table says on which page a block of keys lies.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.flash import plan
from pallas_kernels.flash.problem import Leaf

# What the bodies of a backend can do: divide keys, read int8, keep NaN of unseen keys apart, read
# pages that are not blocks, read keys that come as "B S K H".
ABILITIES = {
    "triton": frozenset({"splits", "scales", "isolated", "page", "heads_last"}),
    "mosaic_gpu": frozenset({"splits"}),
    "tpu": frozenset({"scales", "isolated"}),
}

# Streaming multiprocessors, by a part of the device's name; the first that fits.
_CORES = (
    ("H100 PCIe", 114), ("H100", 132), ("H200", 132), ("GH200", 132), ("B200", 148), ("B100", 148),
    ("A100", 108), ("A30", 56), ("A10", 72), ("L40", 142), ("L4", 58), ("4090", 128), ("3090", 82),
    ("V100", 80), ("T4", 40),
)  # fmt: skip
_UNKNOWN_CORES = 108

# A program should have this many keys at least: its start and its share of the merge cost about as
# much as reading a few tiles.
_LEAST_KEYS = 256
_MOST_SPLITS = 128


def cores(kind: str) -> int:
    """Streaming multiprocessors of a kind of GPU; those of an A100 where the name is not known."""
    return next((count for name, count in _CORES if name in kind), _UNKNOWN_CORES)


def num_splits(kind: str, programs: int, num_keys: int) -> int:
    """Into how many parts to divide the keys: a power of two.

    `programs`: how many there are without dividing (batch, key heads, blocks of rows).  Decoding is
    limited by memory, and a memory system is busy only when every multiprocessor reads; so there
    are enough parts for two programs to each, but none with too few keys to be worth it.

    Raises:
      ValueError: programs or num_keys is not positive.
    """
    if programs < 1 or num_keys < 1:
        raise ValueError(f"num_splits: expected positive ints, got {programs=}, {num_keys=}.")
    wanted = math.ceil(2 * cores(kind) / programs)
    most = max(1, min(_MOST_SPLITS, num_keys // _LEAST_KEYS))
    return 1 << (min(wanted, most).bit_length() - 1)


def row_block(backend: str, num_rows: int, itemsize: int) -> int:
    """Rows of a tile."""
    if backend == "mosaic_gpu":
        return 64
    if backend == "tpu":
        return min(plan.padded(num_rows, 16), 256)
    return min(plan.power_of_two(num_rows), 32 if itemsize >= 4 else 64)


# Sizes of tiles that must divide a page; Triton reads any page.
_PAGE_TILES = {"mosaic_gpu": (128, 64), "tpu": (256, 128, 64, 32, 16)}


def page_limit(backend: str, page: int) -> str | None:
    """What keeps a backend from reading pages of this many keys, or None."""
    sizes = _PAGE_TILES.get(backend)
    if not page or sizes is None or page % sizes[-1] == 0:
        return None
    return f"reads pages of a multiple of {sizes[-1]} keys, not {page}"


def column_block(backend: str, preferred: int, num_keys: int, page: int) -> tuple[int, int]:
    """Columns of a tile, and `Spec.page`: 0, or the size of pages that are not read block by block.

    Without pages (`page` = 0) a size that divides the number of keys is taken if there is one, as
    keys must else be copied to be padded.

    Raises:
      NotImplementedError: the backend cannot read pages of this size.
    """
    if not page:
        least = {"triton": 16, "mosaic_gpu": 64, "tpu": 128}[backend]
        block = preferred
        while block > least and num_keys % block:
            block //= 2
        return (block if num_keys % block == 0 else preferred), 0
    if backend == "triton":
        fits = page % 16 == 0 and page & (page - 1) == 0
        if page >= preferred and page % preferred == 0:
            return preferred, 0
        return (page, 0) if fits and page >= preferred else (preferred, page)
    limit = page_limit(backend, page)
    if limit:
        raise NotImplementedError(
            f'implementation="{backend}" {limit}; implementation="blockwise" can.'
        )
    return next(size for size in _PAGE_TILES[backend] if page % size == 0), 0


def block_table(
    pages: Int[Array, "B J"], num_pages: int, page: int, block: int
) -> Int[Array, "B M"]:
    """From pages to blocks of `block` keys, which divide a page; all within the pool.

    What a table says of pages that hold no keys yet is not looked at, but kernels fetch ahead:
    every entry is moved to a page that exists.
    """
    pages = jnp.clip(pages.astype(jnp.int32), 0, num_pages - 1)
    parts = page // block
    if parts == 1:
        return pages
    within = jnp.arange(parts, dtype=jnp.int32).reshape((1,) * pages.ndim + (parts,))
    return (pages[..., None] * parts + within).reshape(*pages.shape[:-1], -1)


def unfold(leaf: Leaf, x: Array, lengths: tuple[int, int]) -> tuple[Array, Leaf]:
    """A leaf with one entry for a block of pairs as one with an entry for each."""
    if leaf.blocks == (0, 0):
        return x, leaf
    for axis, (block, length) in enumerate(zip(leaf.blocks, lengths, strict=True), 2):
        if block:
            x = jnp.repeat(x, block, axis)
            x = x[:, :, :length] if axis == 2 else x[..., :length]
    return x, Leaf(_full(x), leaf.trainable, boolean=leaf.boolean)


def pack(leaf: Leaf, x: Array, sizes: tuple[int, int, int], batch: int = 0) -> tuple[Array, Leaf]:
    """A leaf "b n t s" for rows that are G heads times T queries: "b k G*T s".

    `sizes`: query heads N, key heads K, queries T.  With `batch` the rows are G heads times
    `batch` sequences times T queries, and b becomes one.
    """
    heads, shared, length = sizes
    group = heads // shared
    by_row = x.shape[1] > 1 or x.shape[2] > 1 or (batch and x.shape[0] > 1)
    if not by_row:
        return x, leaf
    b, n, t, s = x.shape
    if n > 1:
        x = x.reshape(b, shared, group, t, s)
    else:
        x = x.reshape(b, 1, 1, t, s)
    x = jnp.broadcast_to(x, (b, x.shape[1], group, length, s))
    if batch:
        x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
        x = jnp.moveaxis(x, 0, 2).reshape(1, x.shape[1], -1, s)
    else:
        x = x.reshape(b, x.shape[1], -1, s)
    axes = _full(x)
    if leaf.table:
        axes = axes.replace("s", "")
    # Rows count as an axis even where there is but one.
    if "t" not in axes:
        axes = "".join(a for a in "bnts" if a in axes or a == "t")
    return x, Leaf(axes, leaf.trainable, leaf.table, boolean=leaf.boolean)


def _full(x: Array) -> str:
    return "".join(letter for letter, n in zip("bnts", x.shape, strict=True) if n > 1)
