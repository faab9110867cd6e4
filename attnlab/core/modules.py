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
from attnlab.core.past import Past, Tail
from attnlab.core.short_convolution import ShortConvolution

PROJECTIONS = ("query", "key", "value")


class Mechanism(nnx.Module):
    """What one paper changes about attention: it maps query, key and value to an output.

    A mechanism holds the parameters its paper adds, and nothing else; projections belong to
    `MultiHeadAttention`.  The base class is plain softmax attention without positions.

    `function` is what a call runs.  `conv_width` is the width of the short convolution that the
    paper's layer has after its projections; None for none.  `projected` names the projections of
    that layer: in place of another, its input is cut into heads.  `query_heads` is how many heads
    the query's projection makes, where a call makes all N of fewer, and `key_heads` how many key
    heads K that layer has unless it is told; None for N.
    """

    function: ClassVar[Callable[..., Any]] = staticmethod(attention)
    conv_width: int | None = None
    projected: tuple[str, ...] = PROJECTIONS
    query_heads: int | None = None
    key_heads: int | None = None

    def embed(self, x: Float[Array, "*B T F"], *, offset: Any = 0) -> Float[Array, "*B T F"]:
        """Applied to a model's token embeddings; only encodings added at the input override it."""
        return x

    def controls(self, x: Float[Array, "*B T F"]) -> dict[str, Any]:
        """What the mechanism computes from the layer's input, such as decays: options of a call."""
        return {}

    def prepare(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        past: Past,
    ) -> tuple[Array, Array, Array]:
        """Query, key and value as they attend, where that takes a few tokens before each.

        `past.previous` gives those, and `past.offset` the position of the first token.  A call is
        given what `prepare` returns, and so is a cache.
        """
        return query, key, value

    def keep(
        self,
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        x: Float[Array, "*B S F"],
    ) -> tuple[Array, Array]:
        """Keys and values as a cache keeps them: with what else depends on their tokens alone.

        `x` is the input that they were projected from.  A call is given what `keep` returns;
        `kept_widths` says how wide that is.
        """
        return key, value

    def kept_widths(self, head_width: int, value_width: int, num_kv_heads: int) -> tuple[int, int]:
        """Widths of the keys and values that `keep` returns."""
        return head_width, value_width

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


class Unprojected(nnx.Module):
    """Stands where a projection does not: the input as it is, in the dtype a projection gives."""

    def __init__(self, features: int, *, dtype: Any = None, param_dtype: Any = jnp.float32):
        self.out_features, self.dtype, self.param_dtype = features, dtype, param_dtype

    def __call__(self, x: Float[Array, "*B T F"]) -> Float[Array, "*B T F"]:
        """`x` itself."""
        given = jnp.result_type(x, self.param_dtype) if self.dtype is None else self.dtype
        return x.astype(given)


class MultiHeadAttention(nnx.Module):
    """Multi-head attention around any mechanism, with grouped-query heads and a cache.

        out = concat_n mechanism(x W^Q_n, c W^K_n, c W^V_n) W^O,   c = x or a context

    Vaswani et al. 2017, arXiv:1706.03762; shared key heads as in Ainslie et al. 2023,
    arXiv:2305.13245 (num_kv_heads = 1 is Shazeer 2019, arXiv:1911.02150).

    Args:
      features: width F of the input and of the output.
      num_heads: query heads N.
      mechanism: what happens between the projections; plain softmax attention by default.
      num_kv_heads: key heads K, a divisor of N; by default what the mechanism asks for, else N.
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

    A mechanism may ask for less: `Mechanism.projected` names the projections that there are,
    `Mechanism.query_heads` how many heads the query's makes, and `Mechanism.key_heads` K.

    Raises:
      ValueError: heads or widths that do not divide; heads of a projection that the mechanism does
        without, which are not as wide as the input.
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
        self.mechanism = Mechanism() if mechanism is None else mechanism
        if num_kv_heads is None:
            asked = self.mechanism.key_heads
            num_kv_heads = num_heads if asked is None else asked
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

        def linear(width_in: int, width_out: int) -> nnx.Linear:
            return nnx.Linear(
                width_in, width_out, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype,
                kernel_init=nnx.initializers.lecun_normal(), rngs=rngs,
            )  # fmt: skip

        widths = (self.head_width, self.head_width, self.value_width)
        sizes = [n * width for n, width in zip(self._counts, widths, strict=True)]
        absent = _absent(self.mechanism.projected, features, sizes)

        def projection(name: str, size: int) -> Any:
            if name not in absent:
                return linear(features, size)
            return Unprojected(features, dtype=dtype, param_dtype=param_dtype)

        self.query, self.key, self.value = map(projection, PROJECTIONS, sizes)
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
            heads = self.num_kv_heads
            widths = self.mechanism.kept_widths(self.head_width, self.value_width, heads)
            memory = KVCache.create(batch_shape, capacity, heads, *widths, dtype)
            if self.convolutions is None and not self._looks_back:
                return memory
        tails: tuple[Any, ...] = tuple(
            jnp.zeros((*batch_shape, c.weight.shape[0] - 1, c.weight.shape[1]), dtype)
            for c in self.convolutions or ()
        )
        tails += self._empty_tails(batch_shape, dtype)
        return StateCache(memory, tails, jnp.zeros((), jnp.int32))

    @property
    def _counts(self) -> tuple[int, int, int]:
        """Heads of query, key and value as projected."""
        heads = self.mechanism.query_heads
        return (self.num_heads if heads is None else heads, *(self.num_kv_heads,) * 2)

    @property
    def _looks_back(self) -> bool:
        return type(self.mechanism).prepare is not Mechanism.prepare

    def _empty_tails(self, batch_shape: tuple[int, ...], dtype: Any) -> tuple[Tail, ...]:
        """Tails before the first token: of the shapes that `prepare` leaves, nothing in them."""
        if not self._looks_back:
            return ()
        widths = (self.head_width, self.head_width, self.value_width)
        shapes = [(*batch_shape, 1, n, w) for n, w in zip(self._counts, widths, strict=True)]

        def run(query: Array, key: Array, value: Array) -> tuple[Tail, ...]:
            past = Past(len(batch_shape))
            self.mechanism.prepare(query, key, value, past)
            return past.tails

        tails = jax.eval_shape(run, *(jax.ShapeDtypeStruct(s, dtype) for s in shapes))
        return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), tails)

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
        query, key, value = (_heads(y, n) for y, n in zip(projected, self._counts, strict=True))
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self._looks_back:
            # A mask of a context's tokens says nothing of the tokens of x.
            past = self._past(query, key, mask if context is None else None, cache)
            query, key, value = self.mechanism.prepare(query, key, value, past)
            tails = (*(tails or ()), *past.tails)
        key, value = self.mechanism.keep(key, value, source)
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
        tails = (None,) * 3 if cache is None else cache.tails[:3]
        done = [
            convolve(y, tail=tail, **options)
            for convolve, y, tail in zip(self.convolutions, projected, tails, strict=True)
        ]
        return tuple(y for y, _ in done), tuple(tail for _, tail in done)

    def _past(self, query: Array, key: Array, mask: Any, cache: Any) -> Past:
        """What came before: the tails behind those of the short convolutions."""
        if cache is None:
            return Past.of(mask, query, key)
        tails = cache.tails[0 if self.convolutions is None else 3 :]
        return Past.of(mask, query, key, offset=cache.length, tails=tails)

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


def _absent(projected: tuple[str, ...], features: int, sizes: list[int]) -> set[str]:
    """Names of the projections that are not there; their heads are those of the input."""
    if not set(projected) <= set(PROJECTIONS):
        raise ValueError(f"projected: expected some of {PROJECTIONS}, got {projected}.")
    absent = {name: n for name, n in zip(PROJECTIONS, sizes, strict=True) if name not in projected}
    for name, size in absent.items():
        if size != features:
            raise ValueError(
                f"{name}: the mechanism has no projection of it, so that its heads together are "
                f"as wide as the input, {features=}; got {size}. See num_kv_heads and head_width."
            )
    return set(absent)


def _heads(x: Float[Array, "*B T C"], count: int) -> Float[Array, "*B T N H"]:
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)
