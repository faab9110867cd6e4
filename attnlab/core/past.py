"""What lies a few tokens back: for layers that look there before keys and values are cached.

Only tokens of the same document count, and none that is padding.  While decoding, the last tokens
of what came before are kept as tails, one for each time a layer looked back.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from attnlab.core.mask_layout import layout
from attnlab.core.masks import as_mask


@struct.dataclass
class Tail:
    """The last W tokens, "*B W ...", and which of them there are and are real, "*B W"; a pytree."""

    values: Any
    real: Any


class Past:
    """The tokens before each token of one call.

    Args:
      batch_rank: how many batch axes arrays have; the next one is T.
      real: False where a token is padding, "*B T".
      ids: documents, "*B T"; the tail belongs to that of the first token.
      offset: position of the first token.
      tails: of the call before, as `tails` gives them; None at the beginning.
    """

    def __init__(
        self,
        batch_rank: int,
        *,
        real: Bool[Array, "..."] | None = None,
        ids: Int[Array, "..."] | None = None,
        offset: Any = 0,
        tails: tuple[Tail, ...] | None = None,
    ) -> None:
        self.axis, self.real, self.ids, self.offset = batch_rank, real, ids, offset
        self._given, self._found = tails, list[Tail]()

    @classmethod
    def of(
        cls,
        mask: Any,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        *,
        offset: Any = 0,
        tails: tuple[Tail, ...] | None = None,
    ) -> "Past":
        """With what a mask says of padding and documents, where queries are the keys' tokens.

        A mask of pairs says nothing: the token before is then the one before it in the array.
        """
        lengths, known = (query.shape[-3], key.shape[-3]), None
        if mask is not None and lengths[0] == lengths[1]:
            known = layout(as_mask(mask), lengths, (offset, offset))
        told = {} if known is None else {"real": known.keys, "ids": known.ids}
        return cls(query.ndim - 3, offset=offset, tails=tails, **told)

    @property
    def begins(self) -> bool:
        """Whether nothing was kept of a call before."""
        return self._given is None

    @property
    def tails(self) -> tuple[Tail, ...]:
        """What the next call needs, in the order in which `previous` was called."""
        return tuple(self._found)

    def previous(
        self, x: Float[Array, "..."], steps: int = 1, *, missing: Any = 0.0
    ) -> tuple[Array, ...]:
        """`x` of one token before, of two, up to `steps`; `missing` where there is none.

        Every call of a layer should look back the same number of times, in the same order.
        """
        length, tail = x.shape[self.axis], self._tail(x, steps)
        real = True if self.real is None else self.real
        real = jnp.broadcast_to(real, x.shape[: self.axis + 1])
        values = jnp.concatenate([tail.values.astype(x.dtype), x], self.axis)
        known = jnp.concatenate([tail.real, real], self.axis)
        missing = jnp.asarray(missing, x.dtype)
        missing = jnp.expand_dims(missing, range(x.ndim - missing.ndim))

        def cut(array: Array, first: int, size: int) -> Array:
            return jax.lax.slice_in_dim(array, first, first + size, axis=self.axis)

        found = []
        for back in range(1, steps + 1):
            has = cut(known, steps - back, length) & self._same(back, length)
            has = jnp.expand_dims(has, range(has.ndim, x.ndim))
            found.append(jnp.where(has, cut(values, steps - back, length), missing))
        last = cut(values, length, steps).astype(tail.values.dtype)
        self._found.append(Tail(last, cut(known, length, steps)))
        return tuple(found)

    def cleaned(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`x` with zeros in place of padding, for what is not linear: that may hold anything."""
        if self.real is None:
            return x
        real = jnp.broadcast_to(self.real, x.shape[: self.axis + 1])
        real = jnp.expand_dims(real, range(real.ndim, x.ndim))
        return jnp.where(real, x, jnp.zeros((), x.dtype))

    def _tail(self, x: Array, steps: int) -> Tail:
        if self._given is not None:
            return self._given[len(self._found)]
        batch, rest = x.shape[: self.axis], x.shape[self.axis + 1 :]
        return Tail(jnp.zeros((*batch, steps, *rest), x.dtype), jnp.zeros((*batch, steps), bool))

    def _same(self, back: int, length: int) -> Any:
        """Whether a token is of the document of the one `back` tokens before it."""
        if self.ids is None:
            return True
        pads = [(0, 0)] * (self.ids.ndim - 1) + [(back, 0)]
        return jnp.pad(self.ids, pads, mode="edge")[..., :length] == self.ids
