"""The modules every mechanism plugs into: a mechanism, and the projections around it."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention
from attnlab.core.cache import KVCache, StateCache
from attnlab.core.linear_attention import linear_state
from attnlab.core.mask_layout import layout
from attnlab.core.masks import KeyPadding, Mask, as_mask
from attnlab.core.short_convolution import ShortConvolution


class Mechanism(nnx.Module):
    """What one paper changes about attention: it maps query, key and value to an output.

    A mechanism holds the parameters its paper adds, and nothing else; projections belong to
    `MultiHeadAttention`.  The base class is plain softmax attention without positions.

    `function` is what a call runs.  `conv_width` is the width of the short convolution that the
    paper's layer has after its projections; None for none.
    """

    function: ClassVar[Callable[..., Any]] = staticmethod(attention)
    conv_width: int | None = None

    def embed(self, x: Float[Array, "*B T F"], *, offset: Any = 0) -> Float[Array, "*B T F"]:
        """Applied to a model's token embeddings; only encodings added at the input override it."""
        return x

    def controls(self, x: Float[Array, "*B T F"]) -> dict[str, Any]:
        """What the mechanism computes from the layer's input, such as decays: options of a call."""
        return {}

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        """Applied to what the heads read, before the last projection: norms and gates."""
        return out

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Any:
        """The state before the first token, a pytree; None if decoding needs all keys and values.

        A mechanism with a state takes `initial_state` and `return_state`.  One that cannot decode
        token by token raises NotImplementedError.
        """
        return None

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        """Attend: "*B T N D".  `options` are those of `function`."""
        return self.function(query, key, value, **options)


class RecurrentMechanism(Mechanism):
    """A mechanism whose state is one matrix "H D" for each of its `num_heads` query heads."""

    num_heads: int

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Float[Array, "*B N H D"]:
        """Zeros; key heads that queries share are repeated, as each query head has its controls."""
        return linear_state(batch_shape, self.num_heads, head_width, value_width)


class RMSNorm(nnx.Module):
    """x / rms(x) times a learned gain, computed in float32 at least.

    `flax.nnx.RMSNorm` does the same, but not in bfloat16 under strict dtype promotion.
    """

    def __init__(self, features: int, *, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((features,)))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        """The same shape and dtype as `x`."""
        wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
        gain = self.scale[...].astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * rms * gain).astype(x.dtype)


class MultiHeadAttention(nnx.Module):
    """Multi-head attention around any mechanism, with grouped-query heads and a cache.

        out = concat_n mechanism(x W^Q_n, c W^K_n, c W^V_n) W^O,   c = x or a context

    Vaswani et al. 2017, arXiv:1706.03762; shared key heads as in Ainslie et al. 2023,
    arXiv:2305.13245 (num_kv_heads = 1 is Shazeer 2019, arXiv:1911.02150).

    Args:
      features: width F of the input and of the output.
      num_heads: query heads N.
      mechanism: what happens between the projections; plain softmax attention by default.
      num_kv_heads: key heads K, a divisor of N; N by default.
      head_width, value_width: H and D; F / N and H by default.
      qk_norm: RMS-normalize each head's queries and keys, with a learned gain per channel; keeps
        scores bounded (recommended with sigmoid attention).
      layer_scale: initial value of a learned gain per output channel (Touvron et al. 2021,
        arXiv:2103.17239), such as 1e-4; None for no gain.
      use_bias: whether the projections have biases.
      conv_width: width of a short causal convolution, with SiLU, on queries, keys and values; the
        mechanism's own by default, 0 for none.
      dropout_rate: dropout of weights, applied when a call gives `dropout_key`.
      implementation: as for `attnlab.attention`.

    Raises:
      ValueError: heads or widths that do not divide.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        mechanism: Mechanism | None = None,
        num_kv_heads: int | None = None,
        head_width: int | None = None,
        value_width: int | None = None,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        use_bias: bool = False,
        conv_width: int | None = None,
        dropout_rate: float = 0.0,
        implementation: str = "auto",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                "num_kv_heads: expected a positive divisor of num_heads, "
                f"got {num_kv_heads=}, {num_heads=}."
            )
        if head_width is None and features % num_heads:
            raise ValueError(
                f"features: {features} is not a multiple of {num_heads=}; give head_width."
            )
        self.features, self.num_heads, self.num_kv_heads = features, num_heads, num_kv_heads
        self.head_width = head_width or features // num_heads
        self.value_width = value_width or self.head_width
        self.dropout_rate, self.implementation = dropout_rate, implementation
        self.mechanism = Mechanism() if mechanism is None else mechanism

        def linear(width_in: int, width_out: int) -> nnx.Linear:
            return nnx.Linear(
                width_in, width_out, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype,
                kernel_init=nnx.initializers.lecun_normal(), rngs=rngs,
            )  # fmt: skip

        self.query = linear(features, num_heads * self.head_width)
        self.key = linear(features, num_kv_heads * self.head_width)
        self.value = linear(features, num_kv_heads * self.value_width)
        self.out = linear(num_heads * self.value_width, features)

        def norm() -> Any:
            if not qk_norm:
                return None
            return RMSNorm(self.head_width)

        self.query_norm, self.key_norm = nnx.data(norm()), nnx.data(norm())
        width = self.mechanism.conv_width if conv_width is None else conv_width
        self.convolutions = nnx.data(
            [
                ShortConvolution(width, linear.out_features, rngs=rngs)
                for linear in (self.query, self.key, self.value)
            ]
            if width
            else None
        )
        gain = None if layer_scale is None else jnp.full((features,), layer_scale, param_dtype)
        self.gain = nnx.data(None if gain is None else nnx.Param(gain))

    def create_cache(
        self, batch_shape: tuple[int, ...], capacity: int, dtype: Any = jnp.float32
    ) -> KVCache | StateCache:
        """An empty cache for decoding with this module.

        Where the mechanism has a state the cache holds that instead of keys and values, and its
        size does not depend on `capacity`.

        Raises:
          NotImplementedError: the mechanism reads whole sequences only.
        """
        memory = self.mechanism.init_state(
            batch_shape, self.num_kv_heads, self.head_width, self.value_width
        )
        if memory is None:
            memory = KVCache.create(
                batch_shape, capacity, self.num_kv_heads, self.head_width, self.value_width, dtype
            )
            if self.convolutions is None:
                return memory
        tails = tuple(
            jnp.zeros((*batch_shape, c.weight.shape[0] - 1, c.weight.shape[1]), dtype)
            for c in self.convolutions or ()
        )
        return StateCache(memory, tails, jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x: Float[Array, "*B T F"],
        context: Float[Array, "*B S F"] | None = None,
        *,
        mask: Any = None,
        cache: KVCache | StateCache | None = None,
        dropout_key: Any = None,
    ) -> Any:
        """Attend from `x` to `context` (self-attention if None).

        Args:
          mask: as for `attnlab.attention`; positions count from the cache's length.
          cache: keys and values of earlier positions; the call then returns (out, new cache).
          dropout_key: a JAX random key turns dropout on; None turns it off.

        Returns:
          "*B T F", or that and the cache.

        Raises:
          ValueError: `x` or `context` is not `features` wide, or both context and cache are given.
          TypeError: the cache is not of the kind that `create_cache` makes.
        """
        for name, array in (("x", x), ("context", context)):
            if array is not None and array.shape[-1] != self.features:
                raise ValueError(
                    f"{name}: expected width {self.features}, got shape {array.shape}."
                )
        if cache is not None and context is not None:
            raise ValueError("cache: serves self-attention; give either a context or a cache.")
        if cache is not None:
            self._check_cache(cache)

        controls = self.mechanism.controls(x)
        if controls and context is not None:
            raise ValueError(
                f"context: {type(self.mechanism).__name__} computes its {', '.join(controls)} from "
                "the sequence it writes; it serves self-attention."
            )
        source = x if context is None else context
        plain = self.query(x), self.key(source), self.value(source)
        projected, tails = self._convolved(plain, mask, cache)
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = (_heads(y, n) for y, n in zip(projected, counts, strict=True))
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        drop = self.dropout_rate if dropout_key is not None else 0.0
        options = controls | {
            "mask": mask, "dropout_rate": drop, "dropout_key": dropout_key if drop else None,
            "implementation": self.implementation,
        }  # fmt: skip
        out, cache = self._attend(query, key, value, cache, tails, options)
        out = self.mechanism.finish(out, x)
        out = self.out(out.reshape(*out.shape[:-2], math.prod(out.shape[-2:])))
        if self.gain is not None:
            out = out * jax.lax.expand_dims(self.gain[...].astype(out.dtype), range(out.ndim - 1))
        return out if cache is None else (out, cache)

    def _check_cache(self, cache: Any) -> None:
        expected = self.create_cache((), 1)
        given: Any = jax.tree.structure(cache)
        if given != jax.tree.structure(expected):
            raise TypeError(
                f"cache: expected what create_cache makes, a {type(expected).__name__} of "
                f"{len(jax.tree.leaves(expected))} arrays; got {type(cache).__name__} of "
                f"{len(jax.tree.leaves(cache))}."
            )

    def _convolved(
        self, projected: tuple[Array, ...], mask: Any, cache: Any
    ) -> tuple[tuple[Array, ...], Any]:
        """Projections after their short convolutions, and the tails of these."""
        if self.convolutions is None:
            return projected, None
        lengths = projected[0].shape[-2], projected[1].shape[-2]
        offset = 0 if cache is None else cache.length
        known = None if mask is None else layout(as_mask(mask), lengths, (offset, offset))
        options = {} if known is None else {"real": known.keys, "ids": known.ids}
        tails = (None,) * 3 if cache is None else cache.tails
        done = [
            convolve(y, tail=tail, **options)
            for convolve, y, tail in zip(self.convolutions, projected, tails, strict=True)
        ]
        return tuple(y for y, _ in done), tuple(tail for _, tail in done)

    def _attend(
        self, query: Array, key: Array, value: Array, cache: Any, tails: Any, options: dict
    ) -> tuple[Array, Any]:
        """What the mechanism reads, and the cache with these tokens in it, if there is one."""
        if cache is None:
            return self.mechanism(query, key, value, **options), None
        offset = cache.length
        memory = cache.memory if isinstance(cache, StateCache) else cache
        options["query_offset"] = offset
        if isinstance(memory, KVCache):
            memory = memory.append(key, value)
            key, value = memory.key.astype(query.dtype), memory.value.astype(query.dtype)
            filled: Mask = KeyPadding(offset + query.shape[-3])
            mask = options["mask"]
            options["mask"] = filled if mask is None else as_mask(mask) & filled
            out = self.mechanism(query, key, value, **options)
        else:
            states = {"key_offset": offset, "initial_state": memory, "return_state": True}
            out, memory = self.mechanism(query, key, value, **options, **states)
        if not isinstance(cache, StateCache):
            return out, memory
        return out, StateCache(memory, tails or (), offset + query.shape[-3])


def _heads(x: Float[Array, "*B T C"], count: int) -> Float[Array, "*B T N H"]:
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)
