"""Key/value caches: what decoding remembers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


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
        """An empty cache.

        Raises:
          ValueError: capacity is not positive.
        """
        if capacity < 1:
            raise ValueError(f"capacity: expected a positive int, got {capacity}.")
        shape = (*batch_shape, capacity, num_kv_heads)
        return cls(
            jnp.zeros((*shape, head_width), dtype),
            jnp.zeros((*shape, value_width or head_width), dtype),
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
