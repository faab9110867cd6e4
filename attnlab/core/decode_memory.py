"""What decoding attends to, and one call over it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.core.cache import KVCache, PagedKVCache, check_table
from attnlab.core.masks import Mask, Span
from attnlab.core.normalizers import Normalizer
from attnlab.core.quantize import Quantized
from attnlab.core.terms import axes_of, sized_axes


class Memory(NamedTuple):
    """What is attended to: keys "*B S K H", or "S K H" that all share, or a pool "K P L H".

    `pages` "*B J" says where the keys lie in a pool; scales "*B S K" or "K P L" belong to int8.
    Only the first `length` "*B" keys count; None: all.
    """

    key: Array
    value: Array
    key_scale: Array | None = None
    value_scale: Array | None = None
    pages: Array | None = None
    length: Array | None = None

    @property
    def num_keys(self) -> int:
        if self.pages is None:
            return self.key.shape[-3]
        return self.pages.shape[-1] * self.page_size

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[-2 if self.pages is None else 0]

    @property
    def page_size(self) -> int:
        """Keys to a page; 0 without pages."""
        return 0 if self.pages is None else self.key.shape[-2]

    @property
    def widths(self) -> tuple[int, int]:
        return self.key.shape[-1], self.value.shape[-1]


class DecodeCall(NamedTuple):
    """Queries "*B N T H" over one memory whose first key is at position `start`.

    `first` "*B": the position of the first query.
    """

    query: Float[Array, "*B N T H"]
    memory: Memory
    modifiers: tuple[Any, ...]
    normalizer: Normalizer
    mask: Mask
    first: Int[Array, "*B"]
    start: int
    scale: float

    @property
    def batch(self) -> tuple[int, ...]:
        return self.query.shape[:-3]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Query heads, key heads, queries."""
        return self.query.shape[-3], self.memory.num_kv_heads, self.query.shape[-2]

    def shaped(self, x: Array) -> Array:
        """An array "*B" with the rank of the scores."""
        return x.reshape(*x.shape, 1, 1, 1)

    def end(self) -> Any:
        """The position after the last key: a number, or "*B 1 1 1"."""
        if self.memory.length is None:
            return self.start + self.memory.num_keys
        return self.shaped(self.memory.length) + self.start

    def tables(self, block: int) -> tuple[Array, Array]:
        """For each block of keys: may it hold an allowed pair, are all allowed?  "*B N 1 M"."""
        length, num_keys = self.query.shape[-2], self.memory.num_keys
        query = self.shaped(self.first)
        begin = np.arange(0, num_keys, block, dtype=np.int32) + self.start
        last = begin + block - 1
        span = Span(
            query, query + length - 1, begin[None, :],
            np.minimum(last, self.start + num_keys - 1)[None, :],
            (length, num_keys), (length, block),
        )  # fmt: skip
        # To look at each pair here would cost as much as attention itself.
        some: Any = np.True_
        every: Any = np.False_
        if not self.mask.opaque:
            with jax.numpy_rank_promotion("allow"):
                some, every = self.mask.data_bounds(span)
        shape = (1,) * len(self.batch) + (1, 1, begin.size)
        some, every = (jnp.asarray(x).reshape((1,) * (len(shape) - np.ndim(x)) + np.shape(x))
                       for x in (some, every))  # fmt: skip
        begin, last = begin.reshape(shape), last.reshape(shape)
        return some & (begin < self.end()), every & (last < self.end())


def cut_terms(terms: Any, first: int, last: int) -> Any:
    """Masks, modifiers and normalizer for the keys from `first` to `last` alone.

    Raises:
      NotImplementedError: the cut goes through a block of an array with entries for whole blocks.
    """
    mask, modifiers, normalizer = terms
    leaves, tree = jax.tree.flatten(terms)
    tags = axes_of(mask) + axes_of(modifiers) + axes_of(normalizer)
    cut = []
    for x, tag in zip(leaves, tags, strict=True):
        x = jnp.asarray(x)
        for letter, axis, block in sized_axes(tag, x.ndim) if tag else ():
            if letter != "S" or x.shape[axis] == 1:
                continue
            if first % block:
                raise NotImplementedError(
                    f"prefix: {first} keys end within a block of {block} of a mask (axes '{tag}'); "
                    "use a prefix of whole blocks."
                )
            x = jax.lax.slice_in_dim(x, first // block, -(-last // block), axis=axis)
        cut.append(x)
    return jax.tree.unflatten(tree, cut)


# -- checks ----------------------------------------------------------------------------------------


def _known(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def memory_of(cache: Any, lengths: Any, query: Array) -> Memory:
    """A cache, checked against a query "*B T N H"."""
    batch = query.shape[:-3]
    if isinstance(cache, PagedKVCache):
        memory = _paged(cache, query)
        lengths = cache.lengths if lengths is None else lengths
    else:
        if isinstance(cache, KVCache):
            lengths = cache.length if lengths is None else lengths
            pair: Any = (cache.key, cache.value)
        else:
            pair = cache
        memory = _dense(pair, query, batch, "cache")
    if lengths is not None:
        memory = memory._replace(length=_check_lengths(lengths, batch, memory))
    return memory


def _paged(cache: PagedKVCache, query: Array) -> Memory:
    batch = query.shape[:-3]
    if cache.table.shape[:-1] != batch or cache.table.shape[-1] < 1:
        raise ValueError(
            f"cache: expected a table of shape {(*batch, 'J')} for query of shape {query.shape}, "
            f"got {cache.table.shape}."
        )
    if cache.key.shape[:3] != cache.value.shape[:3]:
        raise ValueError(
            f"cache: pools of keys {cache.key.shape} and values {cache.value.shape} differ."
        )
    check_table(cache.table, cache.num_pages)
    memory = Memory(cache.key, cache.value, cache.key_scale, cache.value_scale, cache.table)
    _check_memory(memory, query, "cache")
    return memory


def _dense(pair: Any, query: Array, batch: tuple[int, ...], name: str) -> Memory:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(
            f"{name}: expected a PagedKVCache, a KVCache or a pair of keys and values, got "
            f"{type(pair).__name__}."
        )
    scales: list[Any] = [None, None]
    arrays = []
    for i, (x, what) in enumerate(zip(pair, ("key", "value"), strict=True)):
        if isinstance(x, Quantized):
            scales[i], x = x.token_scale(), x.values
        elif not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name}: expected an array as {what}, got {type(x).__name__}.")
        if x.shape[:-3] != batch or len(x.shape) != len(batch) + 3:
            raise ValueError(
                f"{name}: expected a {what} of shape {(*batch, 'S', 'K', 'H')} for query of shape "
                f"{query.shape}, got {x.shape}."
            )
        arrays.append(jnp.asarray(x))
    if arrays[0].shape[:-1] != arrays[1].shape[:-1]:
        raise ValueError(
            f"{name}: length and heads of key {arrays[0].shape} and value {arrays[1].shape} differ."
        )
    memory = Memory(*arrays, *scales)
    _check_memory(memory, query, name)
    return memory


def prefix_of(prefix: Any, query: Array, memory: Memory) -> Memory:
    """Keys and values that all sequences share, checked."""
    found = _dense(prefix, query, (), "prefix")
    if found.num_kv_heads != memory.num_kv_heads or found.widths != memory.widths:
        raise ValueError(
            f"prefix: heads and widths of key {found.key.shape} and value {found.value.shape} "
            "differ from those of the cache."
        )
    return found


def _check_memory(memory: Memory, query: Array, name: str) -> None:
    quantized = [scale is not None for scale in (memory.key_scale, memory.value_scale)]
    if quantized[0] != quantized[1]:
        raise TypeError(f"{name}: quantize both key and value, or neither.")
    for x in (memory.key, memory.value):
        expected = jnp.dtype(jnp.int8) if quantized[0] else query.dtype
        if x.dtype != expected:
            raise TypeError(f"{name}: expected arrays of dtype {expected}, got {x.dtype}.")
        if 0 in x.shape:
            raise ValueError(f"{name}: no axis may be empty, got shape {x.shape}.")
    if memory.widths[0] != query.shape[-1]:
        raise ValueError(
            f"{name}: key width {memory.widths[0]} differs from that of query, {query.shape[-1]}."
        )
    if query.shape[-2] % memory.num_kv_heads:
        raise ValueError(
            f"query: the number of heads, {query.shape[-2]}, should be a multiple of the number of "
            f"key heads, {memory.num_kv_heads}."
        )


def _check_lengths(lengths: Any, batch: tuple[int, ...], memory: Memory) -> Array:
    found = jnp.asarray(lengths)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(f"lengths: expected integers, got dtype {found.dtype}.")
    if found.shape not in ((), batch):
        raise ValueError(f"lengths: expected shape {batch} or a number, got shape {found.shape}.")
    found = jnp.broadcast_to(found.astype(jnp.int32), batch)
    if _known(found) and found.size:
        low, high = int(found.min()), int(found.max())
        if low < 0 or high > memory.num_keys:
            raise ValueError(
                f"lengths: expected 0 to {memory.num_keys}, which the cache has room for, got "
                f"{low if low < 0 else high}."
            )
        if memory.pages is not None and _known(memory.pages):
            table = np.asarray(memory.pages)
            needed = -(-np.asarray(found)[..., None] // memory.page_size)
            if np.any((table < 0) & (np.arange(table.shape[-1]) < needed)):
                raise ValueError("cache: a sequence has tokens on a page that is missing (-1).")
    return jnp.clip(found, 0, memory.num_keys)
