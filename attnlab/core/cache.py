"""Key/value caches: what decoding remembers."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Shaped

from attnlab.core.quantize import Quantized, quantize


@struct.dataclass
class KVCache:
    """The first `length` of `capacity` keys "*B C K H" and values "*B C K D"; a pytree."""

    key: Float[Array, "*B C K H"]
    value: Float[Array, "*B C K D"]
    length: Int[Array, ""]

    @classmethod
    def create(
        cls,
        batch_shape: tuple[int, ...],
        capacity: int,
        num_kv_heads: int,
        head_width: int,
        value_width: int | None = None,
        dtype: Any = jnp.float32,
    ) -> "KVCache":
        """An empty cache; of values that are 0 wide where they are part of the keys.

        Raises:
          ValueError: capacity is not positive.
        """
        if capacity < 1:
            raise ValueError(f"capacity: expected a positive int, got {capacity}.")
        shape = (*batch_shape, capacity, num_kv_heads)
        return cls(
            jnp.zeros((*shape, head_width), dtype),
            jnp.zeros((*shape, head_width if value_width is None else value_width), dtype),
            jnp.zeros((), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        return self.key.shape[-3]

    def append(self, key: Float[Array, "*B T K H"], value: Float[Array, "*B T K D"]) -> "KVCache":
        """The cache with T more entries.

        Under `jit` the length is not known: writing past the capacity is then the caller's to
        prevent, as for any `jax.lax.dynamic_update_slice`.

        Raises:
          ValueError: shapes that do not fit, or entries beyond the capacity.
        """
        new = []
        for name, old, x in (("key", self.key, key), ("value", self.value, value)):
            fits = x.ndim == old.ndim and x.shape[:-3] == old.shape[:-3]
            if not fits or x.shape[-2:] != old.shape[-2:]:
                raise ValueError(f"{name}: shape {x.shape} does not fit a cache of {old.shape}.")
            new.append(x.astype(old.dtype))
        steps = key.shape[-3]
        known = not isinstance(self.length, jax.core.Tracer)
        if steps > self.capacity or (known and int(self.length) + steps > self.capacity):
            raise ValueError(
                f"key: {steps} entries do not fit a cache of capacity {self.capacity} that holds "
                f"{self.length}."
            )
        put = jax.lax.dynamic_update_slice_in_dim
        return KVCache(
            put(self.key, new[0], self.length, axis=self.key.ndim - 3),
            put(self.value, new[1], self.length, axis=self.value.ndim - 3),
            self.length + steps,
        )


@struct.dataclass
class StateCache:
    """What a layer that looks back remembers after `length` tokens; a pytree.

    `memory` is the mechanism's state, or a `KVCache` where it has none; `tails` the last inputs of
    each short convolution, "*B W-1 C", and a `Tail` for each time `Mechanism.prepare` looks back.
    """

    memory: Any
    tails: tuple[Any, ...]
    length: Any


@struct.dataclass
class PagedKVCache:
    """Keys and values of many sequences in a pool of P pages for L tokens each; a pytree.

    `key` "K P L H", `value` "K P L D": the pool, heads first, as kernels read it.  `table` "*B J":
    on which page of the pool tokens j L to (j + 1) L - 1 of a sequence lie; -1 where none is needed
    yet.  `lengths` "*B": how many tokens of a sequence there are.  In int8 the pool has scales,
    `key_scale` and `value_scale` "K P L", one for each token and head.

    Sequences may share pages: a prefix common to several lies in the pool once, and the table of
    each names its pages.  Only pages that belong to one sequence alone may be written to.  Kwon et
    al. 2023, arXiv:2309.06180.
    """

    # Any: what stands for arrays where a program is only traced or compiled is welcome as well.
    key: Any
    value: Any
    table: Any
    lengths: Any
    key_scale: Any = None
    value_scale: Any = None

    @classmethod
    def create(
        cls,
        table: Any,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_width: int,
        value_width: int | None = None,
        dtype: Any = jnp.float32,
    ) -> "PagedKVCache":
        """An empty cache; `table` "*B J" says which page is whose (a plain one: `consecutive`).

        With dtype int8 what is appended is quantized (`attnlab.quantize`, scales by token).

        Raises:
          TypeError: the table does not hold integers.
          ValueError: sizes that are not positive, or a page that the pool does not have.
        """
        for name, n in (("num_pages", num_pages), ("page_size", page_size)):
            if n < 1:
                raise ValueError(f"{name}: expected a positive int, got {n}.")
        table = jnp.asarray(table)
        check_table(table, num_pages)
        shape = (num_kv_heads, num_pages, page_size)
        scales = [
            jnp.zeros(shape, jnp.float32) if dtype == jnp.int8 else None for _ in ("key", "value")
        ]
        return cls(
            jnp.zeros((*shape, head_width), dtype),
            jnp.zeros((*shape, value_width or head_width), dtype),
            table.astype(jnp.int32),
            jnp.zeros(table.shape[:-1], jnp.int32),
            *scales,
        )

    @staticmethod
    def consecutive(
        batch_shape: tuple[int, ...], capacity: int, page_size: int
    ) -> Int[Array, "*B J"]:
        """A table that gives each sequence its own pages, enough for `capacity` tokens."""
        pages = -(-capacity // page_size)
        count = math.prod(batch_shape) * pages
        return jnp.arange(count, dtype=jnp.int32).reshape(*batch_shape, pages)

    @property
    def page_size(self) -> int:
        return self.key.shape[-2]

    @property
    def num_pages(self) -> int:
        return self.key.shape[-3]

    @property
    def capacity(self) -> int:
        """How many tokens the table of one sequence has room for."""
        return self.table.shape[-1] * self.page_size

    def append(
        self,
        key: Shaped[Array, "..."],
        value: Shaped[Array, "..."],
        counts: Int[Array, "..."] | None = None,
    ) -> "PagedKVCache":
        """The cache with T more tokens of each sequence, or the first `counts` "*B" of the T.

        `key` "*B T K H", `value` "*B T K D".

        Under `jit` lengths and table are not known: what lies beyond the table, or on a page -1, is
        then not written, though it counts in `lengths`.

        Raises:
          ValueError: shapes that do not fit, tokens beyond the capacity, a page that is missing
            from the table, or one that another sequence shares.
        """
        batch, steps = self.table.shape[:-1], key.shape[-3]
        for name, pool, x in (("key", self.key, key), ("value", self.value, value)):
            expected = (*batch, steps, pool.shape[0], pool.shape[-1])
            if x.shape != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {x.shape}.")
        counts = jnp.full(batch, steps, jnp.int32) if counts is None else jnp.asarray(counts)
        if counts.shape != batch:
            raise ValueError(f"counts: expected shape {batch}, got {counts.shape}.")
        step = jnp.arange(steps, dtype=jnp.int32).reshape((1,) * len(batch) + (steps,))
        place = self.lengths[..., None] + step
        real = step < counts[..., None]
        number = jnp.minimum(place // self.page_size, self.table.shape[-1] - 1)
        page = jnp.take_along_axis(self.table, number, -1)
        fits = (place < self.capacity) & (page >= 0)
        self._check_append(place, real, page)
        # A page beyond the pool: nothing is written.
        page = jnp.where(real & fits, page, self.num_pages).reshape(-1)
        slot = (place % self.page_size).reshape(-1)

        def put(pool: Array, x: Array) -> Array:
            x = x.reshape(-1, *x.shape[len(batch) + 1 :])
            return pool.at[:, page, slot].set(jnp.moveaxis(x, 1, 0).astype(pool.dtype), mode="drop")

        pools: dict[str, Any] = {"lengths": self.lengths + counts.astype(jnp.int32)}
        for name, x in (("key", key), ("value", value)):
            if getattr(self, f"{name}_scale") is not None:
                small = quantize(x)
                pools[f"{name}_scale"] = put(getattr(self, f"{name}_scale"), small.scale)
                x = small.values
            pools[name] = put(getattr(self, name), x)
        return dataclasses.replace(self, **pools)

    def _check_append(self, place: Array, real: Array, page: Array) -> None:
        arrays = (place, real, page, self.table)
        if any(isinstance(x, jax.core.Tracer) for x in arrays):
            return
        place, real, page, table = (np.asarray(x) for x in arrays)  # type: ignore[assignment]
        if np.any(real & (place >= self.capacity)):
            raise ValueError(
                f"key: tokens up to position {place[real].max()} do not fit a table of capacity "
                f"{self.capacity}, {table.shape[-1]} pages of {self.page_size}."
            )
        if np.any(real & (page < 0)):
            raise ValueError(
                "table: a sequence needs a page that its table does not name (-1); "
                "put one there with `replace(table=...)`."
            )
        owners = np.zeros(self.num_pages, np.int64)
        for row in table.reshape(-1, table.shape[-1]):
            owners[np.unique(row[row >= 0])] += 1
        shared = np.unique(page[real][owners[page[real]] > 1])
        if shared.size:
            raise ValueError(
                f"table: page {shared[0]} belongs to several sequences and cannot be written to; "
                "give each a copy of its own first (`copy_pages`)."
            )

    def copy_pages(self, source: Int[Array, " M"], target: Int[Array, " M"]) -> "PagedKVCache":
        """The cache with pages `source` of the pool copied to `target`."""
        source, target = jnp.asarray(source), jnp.asarray(target)

        def copy(pool: Any) -> Any:
            return None if pool is None else pool.at[:, target].set(pool[:, source])

        names = ("key", "value", "key_scale", "value_scale")
        return dataclasses.replace(self, **{n: copy(getattr(self, n)) for n in names})

    def gather(self) -> tuple[Any, Any]:
        """Keys and values in order, "*B S K H" and "*B S K D": `Quantized` where the pool is int8.

        S is the capacity; what lies beyond the length of a sequence is arbitrary.
        """
        pages = jnp.clip(self.table, 0, self.num_pages - 1)
        found: list[Any] = []
        for name in ("key", "value"):
            x, scale = ordered(getattr(self, name), pages), getattr(self, f"{name}_scale")
            found.append(x if scale is None else Quantized(x, ordered(scale, pages)))
        return found[0], found[1]


def ordered(pool: Array, pages: Int[Array, "*B J"]) -> Array:
    """Pages of a pool "K P L ..." in the order of a table: "*B J*L K ..."."""
    x = jnp.moveaxis(jnp.take(pool, pages, axis=1, mode="clip"), 0, pages.ndim + 1)
    return x.reshape(*pages.shape[:-1], -1, *x.shape[pages.ndim + 1 :])


def check_table(table: Any, num_pages: int) -> None:
    """Raise unless a table of pages fits a pool; of a traced one only the dtype is known."""
    if not jnp.issubdtype(table.dtype, jnp.integer):
        raise TypeError(f"table: expected integers, got dtype {table.dtype}.")
    if table.ndim < 1 or isinstance(table, jax.core.Tracer) or not table.size:
        return
    low, high = int(table.min()), int(table.max())
    if low < -1 or high >= num_pages:
        raise ValueError(
            f"table: expected pages from 0 to {num_pages - 1}, or -1 for none, got "
            f"{low if low < -1 else high}."
        )
