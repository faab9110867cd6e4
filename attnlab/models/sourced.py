r"""A causal language model whose queries and keys are made of another stream than its values.

    x_{l+1/2} = x_l + softmax(q(z_l) k(z_l)^T / sqrt(H)) v(x_l) W^O      q, k, v after the norm

    source "hidden":  z_l = x_l, the model as it is
    source "static":  z_l = x_0, the embedded tokens
    source "random":  z_0 = noise, always the same, and z_{l+1} what the layers make of it
    source "text":    z_0 = a text, always the same, embedded, and so on

Xue, Moosavi & Aletras 2025, arXiv:2510.11602, ask by this what of the context weights must know.
Not said there, and settled here: noise of variance 1, as embedded tokens begin; the block's norm
acts on both streams.

With noise or a text weights are those of positions: up to `length` tokens, and no packed documents.
The other stream is of one sequence, whatever the batch, and is made anew in every call; with a
cache all of it, which a served model would keep.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from attnlab.core.mask_layout import layout
from attnlab.core.masks import Causal, Mask, as_mask
from attnlab.dense.deconstructing_attention import SOURCES
from attnlab.models.language_model import Cache, CausalLM
from attnlab.models.layers import dropout

FIXED = ("random", "text")


class SourcedLM(CausalLM):
    """A `CausalLM` with queries and keys made of `source` in the layers `sourced`.

    Args:
      vocab_size, num_layers, features, num_heads, options: as for `CausalLM`.
      source: "hidden", "static", "random" or "text".
      sourced: which layers, from 0; all by default, and the others are standard.
      length: the most tokens, for "random".
      text: tokens, as many as there may be, for "text".

    Raises:
      ValueError: an unknown source, a layer that there is not, a length or text that is missing or
        not asked for.
    """

    def __init__(
        self, vocab_size: int, num_layers: int = 4, features: int = 128, num_heads: int = 4, *,
        source: str, sourced: tuple[int, ...] | None = None, length: int | None = None,
        text: Int[Array, " L"] | None = None, rngs: nnx.Rngs, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(vocab_size, num_layers, features, num_heads, rngs=rngs, **options)
        if source not in SOURCES.values():
            raise ValueError(f"source: expected one of {(*SOURCES.values(),)}, got {source!r}.")
        for name, given, user in (("length", length, "random"), ("text", text, "text")):
            if (given is None) == (source == user):
                raise ValueError(
                    f"{name}: belongs to source={user!r}, got {given} with {source!r}."
                )
        self.source = source
        self.sourced = tuple(range(num_layers)) if sourced is None else tuple(sourced)
        if not set(self.sourced) <= set(range(num_layers)):
            raise ValueError(f"sourced: expected layers below {num_layers}, got {self.sourced}.")
        fixed: Any = None
        if length is not None:
            fixed = jax.random.normal(rngs.params(), (length, features))
        if source == "text":
            fixed = jnp.asarray(text)
        self.fixed: Any = nnx.data(None if fixed is None else nnx.Variable(fixed))

    def streams(self, x: Float[Array, "*B T F"], offset: Any = 0) -> list[Any]:
        """What queries and keys of each layer are made of, None for `x` itself: x embedded.

        Raises:
          ValueError: more tokens than noise or text have.
        """
        count = len(self.blocks)
        if self.source not in FIXED:
            found = [x if self.source == "static" else None] * count
        else:
            found = self._fixed_streams(x, offset)
        return [z if layer in self.sourced else None for layer, z in enumerate(found)]

    def init_cache(self, batch_shape: Sequence[int], capacity: int) -> Cache:
        """As `CausalLM`.

        Raises:
          ValueError: room for more tokens than noise or text have.
        """
        if self.source in FIXED and capacity > self.fixed.shape[0]:
            raise ValueError(
                f"capacity: {capacity} tokens are more than the {self.fixed.shape[0]} of "
                f"source={self.source!r}."
            )
        return super().init_cache(batch_shape, capacity)

    def _fixed_streams(self, x: Array, offset: Any) -> list[Any]:
        fixed, length = self.fixed[...], x.shape[-2]
        first = offset if isinstance(offset, int) else 0
        if first + length > fixed.shape[0]:
            raise ValueError(
                f"tokens: {first + length} are more than the {fixed.shape[0]} of "
                f"source={self.source!r}."
            )
        z = fixed
        if self.source == "text":
            z = self.embedding(fixed) * math.sqrt(self.features)
        z = z.astype(x.dtype)
        z = z if not isinstance(offset, int) else z[: first + length]
        found = []
        for block in self.blocks:
            found.append(jax.lax.dynamic_slice_in_dim(z, offset, length))
            z, _ = block(z, mask=Causal())
        return found

    def __call__(
        self,
        tokens: Int[Array, "*B T"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        cache: Cache | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Any:
        """As `CausalLM`.

        Raises:
          ValueError: a cache of another number of layers; with noise or a text, more tokens than
            that has, or a mask that says more than causality and padding.
        """
        layers = len(self.blocks)
        if cache is not None and len(cache) != layers:
            raise ValueError(f"cache: expected {layers} layers, got {len(cache)}.")
        offset = 0 if cache is None else cache[0].length
        self._check_mask(mask, tokens.shape[-1], offset)
        mask = Causal() if mask is None else Causal() & as_mask(mask)
        keys: list[Any] = [None] * (layers + 1)
        if dropout_key is not None and self.dropout_rate > 0.0:
            keys = list(jax.random.split(dropout_key, layers + 1))
        x = self.embedding(tokens) * math.sqrt(self.features)
        x = self.blocks[0].attention.mechanism.embed(x, offset=offset)
        x = dropout(x, self.dropout_rate, keys[layers])
        caches: list[Any] = []
        for layer, (block, z) in enumerate(zip(self.blocks, self.streams(x, offset), strict=True)):
            past = None if cache is None else cache[layer]
            x, past = block(x, mask=mask, cache=past, dropout_key=keys[layer], source=z)
            caches.append(past)
        x = self.norm(x)
        logits = self.embedding.attend(x) if self.readout is None else self.readout(x)
        return logits if cache is None else (logits, tuple(caches))

    def _check_mask(self, mask: Any, length: int, offset: Any) -> None:
        if mask is None or self.source not in FIXED:
            return
        known = layout(as_mask(mask), (length, length), (offset, offset))
        if known is None or known.ids is not None:
            raise ValueError(
                f"mask: weights of source={self.source!r} are those of positions in one document; "
                f"expected padding, got {type(as_mask(mask)).__name__}."
            )
