r"""Multi-head latent attention (MLA): keys and values of all heads, from one narrow latent.

    c = norm(x W^DKV),   k^R = RoPE(x W^KR),   q_n = norm(x W^DQ) W^UQ_n,   q^R_n = RoPE(...)
    s_n = (q_n . (c W^UK_n) + q^R_n . k^R) / sqrt(H + R)
    out = concat_n (softmax(s_n) c W^UV_n) W^O

DeepSeek-AI 2024, arXiv:2405.04434 (DeepSeek-V2).  The latent c is C wide and k^R, one for all
heads, R wide: a cache keeps C + R numbers of a token, not 2 N H.  Two orders of the same products:

- expanded: keys c W^UK_n and values c W^UV_n are formed, attention is multi-head, H + R wide;
- absorbed: q_n W^UK_n^T meets c itself, attention is multi-query with keys [c; k^R] and values c.

Expanded costs less work where there are many queries, absorbed where there are few, as in decoding
(`LatentSizes.multiply_adds`).  RoPE has channels of its own because a rotation by position between
W^UQ and W^UK could not be absorbed.

Read in three ports of the released model.  The norm covers c, not k^R; pairs of RoPE are
neighbouring channels.  Left out: the scaling of long contexts (YaRN).  Settled here: weights start
lecun-normal, cross-attention is not offered.  Weights W^UK and W^UQ are never multiplied into one.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.cache import KVCache
from attnlab.core.entry import Entry, Paper
from attnlab.core.linear_attention import _kept
from attnlab.core.mask_layout import layout
from attnlab.core.masks import KeyPadding, as_mask, check_mask
from attnlab.core.modules import RMSNorm
from attnlab.core.rotary import rotate
from attnlab.heads.latents import FORMS, LatentSizes, latent_attention, product


class MultiHeadLatentAttention(nnx.Module):
    """The layer of DeepSeek-V2, in place of `MultiHeadAttention`.

    Args:
      features: width F of input and output.
      num_heads: N.
      latent_width: C, what a cache keeps of keys and values.
      rope_width: R, channels that RoPE turns; even, 0 for no positions.
      head_width, value_width: H and D; F / N and H by default.
      query_rank: width of the query's latent; None for a plain projection.
      norm: whether latents are RMS-normalized, with a learned gain.
      theta: of RoPE.
      form: as for `latent_attention`.
      dropout_rate: dropout of weights, applied when a call gives `dropout_key`.
      implementation: as for `attnlab.attention`.

    Raises:
      ValueError: sizes that do not fit, or another form.
    """

    def __init__(
        self, features: int, num_heads: int, *, latent_width: int, rope_width: int,
        head_width: int | None = None, value_width: int | None = None,
        query_rank: int | None = None, norm: bool = True, theta: float = 10_000.0,
        form: str = "auto", dropout_rate: float = 0.0, implementation: str = "auto",
        param_dtype: Any = jnp.float32, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        if head_width is None and (num_heads < 1 or features % num_heads):
            raise ValueError(
                f"features: {features} is not a multiple of {num_heads=}; give head_width."
            )
        width = head_width or features // num_heads
        self.sizes = sizes = LatentSizes(
            features, num_heads, latent_width, rope_width, width, value_width or width, query_rank
        )
        if rope_width % 2:
            raise ValueError(f"rope_width: RoPE turns pairs of channels, got {rope_width}.")
        if form not in ("auto", *FORMS):
            raise ValueError(f"form: expected one of {('auto', *FORMS)}, got {form!r}.")
        self.theta, self.form, self.implementation = theta, form, implementation
        self.dropout_rate = dropout_rate

        def weight(*shape: int, axes: int = 1) -> nnx.Param:
            """Lecun-normal: `axes` of the shape are of the input."""
            draw = nnx.initializers.lecun_normal((*range(axes),), (*range(axes, len(shape)),))
            return nnx.Param(draw(rngs.params(), shape, param_dtype))

        source = features if query_rank is None else query_rank
        self.down = weight(features, latent_width + rope_width)
        self.down_query = nnx.data(None if query_rank is None else weight(features, query_rank))
        self.up_query = weight(source, num_heads, width + rope_width)
        self.up_key = weight(latent_width, num_heads, width)
        self.up_value = weight(latent_width, num_heads, sizes.value_width)
        self.out = weight(num_heads, sizes.value_width, features, axes=2)
        self.norm = nnx.data(RMSNorm(latent_width) if norm else None)
        self.query_norm = nnx.data(RMSNorm(query_rank) if norm and query_rank else None)

    def create_cache(
        self, batch_shape: tuple[int, ...], capacity: int, dtype: Any = jnp.float32
    ) -> KVCache:
        """An empty cache: keys [c; k^R] of one head; values are part of them, and 0 wide."""
        return KVCache.create(batch_shape, capacity, 1, self.sizes.cache_per_token, 0, dtype)

    def queries(self, x: Float[Array, "*B T F"], *, offset: Any = 0) -> Float[Array, "*B T N E"]:
        """q_n and q^R_n, turned."""
        if self.down_query is not None:
            x = product("...tf,fc->...tc", x, self.down_query[...])
        if self.query_norm is not None:
            x = self.query_norm(x)
        query = product("...tf,fne->...tne", x, self.up_query[...])
        return self._turned(query, self.sizes.head_width, offset)

    def memory(self, x: Float[Array, "*B S F"], *, offset: Any = 0) -> Float[Array, "*B S M"]:
        """What is cached of tokens: c and k^R, turned."""
        latent, turned = jnp.split(
            product("...sf,fm->...sm", x, self.down[...]), [self.sizes.latent_width], axis=-1
        )
        if self.norm is not None:
            latent = self.norm(latent)
        turned = self._turned(turned[..., None, :], 0, offset)[..., 0, :]
        return jnp.concatenate([latent, turned], axis=-1)

    def _turned(self, x: Float[Array, "*B T N E"], first: int, offset: Any) -> Array:
        """`x` with its channels from `first` on turned by RoPE."""
        if not self.sizes.rope_width:
            return x
        own, other = jnp.split(x, [first], axis=-1)
        return jnp.concatenate([own, rotate(other, offset=offset, theta=self.theta)], axis=-1)

    def __call__(
        self,
        x: Float[Array, "*B T F"],
        *,
        mask: Any = None,
        cache: KVCache | None = None,
        dropout_key: Any = None,
    ) -> Any:
        """Self-attention: "*B T F", or that and the cache.

        Args:
          mask: as for `attnlab.attention`; positions count from the cache's length.
          cache: what `create_cache` makes, holding earlier positions.
          dropout_key: a JAX random key turns dropout on.

        Raises:
          TypeError: `x` is not floating-point, or the cache is no `KVCache`.
          ValueError: `x` is not `features` wide, or a mask or cache of other sizes.
        """
        self._check(x, mask, cache)
        offset = 0 if cache is None else cache.length
        readers, tokens = _real(x, mask, offset)
        query, memory = self.queries(readers, offset=offset), self.memory(tokens, offset=offset)
        if cache is not None:
            entry = memory[..., None, :]
            cache = cache.append(entry, entry[..., :0])
            memory = cache.key[..., 0, :].astype(x.dtype)
            filled = KeyPadding(offset + x.shape[-2])
            mask = filled if mask is None else as_mask(mask) & filled
        drop = self.dropout_rate if dropout_key is not None else 0.0
        out = latent_attention(
            query, memory, self.up_key[...], self.up_value[...], form=self.form, mask=mask,
            query_offset=offset, dropout_rate=drop, dropout_key=dropout_key if drop else None,
            implementation=self.implementation,
        )  # fmt: skip
        out = product("...tnd,ndf->...tf", out, self.out[...])
        return out if cache is None else (out, cache)

    def _check(self, x: Array, mask: Any, cache: Any) -> None:
        features, width = self.sizes.features, self.sizes.cache_per_token
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x: expected a floating-point array, got dtype {x.dtype}.")
        if x.ndim < 2 or x.shape[-1] != features:
            raise ValueError(f"x: expected shape (*B, T, {features}), got {x.shape}.")
        keys = x.shape[-2]
        if cache is not None:
            if not isinstance(cache, KVCache):
                raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}.")
            shapes = cache.key.shape[-2:], cache.value.shape[-2:]
            if shapes != ((1, width), (1, 0)):
                raise ValueError(
                    f"cache: expected what create_cache makes, one key head of width {width} and "
                    f"values of width 0, got {shapes}."
                )
            keys = cache.capacity
        if mask is not None:
            sizes = {"N": self.sizes.num_heads, "T": x.shape[-2], "S": keys}
            check_mask(as_mask(mask), x.shape[:-2], sizes)


def _real(x: Float[Array, "*B T F"], mask: Any, offset: Any) -> list[Array]:
    """The input as it asks and as it is read, with zeros in place of padding.

    Padding may hold anything; NaN in it would reach the gradients of weights.
    """
    known = None
    if mask is not None:
        known = layout(as_mask(mask), (x.shape[-2],) * 2, (offset, offset))
    if known is None:
        return [x, x]
    return [_kept(x[..., None, :], real)[..., 0, :] for real in (known.queries, known.keys)]


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> MultiHeadLatentAttention:
    return MultiHeadLatentAttention(
        num_heads * head_width, num_heads, latent_width=2 * head_width,
        rope_width=2 * (head_width // 4) or 2, rngs=rngs,
    )  # fmt: skip


ENTRY = Entry(
    id="mla",
    title="Multi-head latent attention",
    family="heads",
    paper=Paper(
        "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        "DeepSeek-AI",
        2024,
        "2405.04434",
    ),
    summary="Keys and values of all heads are made of one narrow latent per token, which is all "
    "that a cache keeps; decoding reads the latent itself, as one head.",
    formula=r"s_n = \frac{q_n^\top W^{UK}_n c + {q^R_n}^\top k^R}{\sqrt{H + R}}, \qquad "
    r"\mathrm{out} = \mathrm{concat}_n\!\left(\mathrm{softmax}(s_n)\, c\, W^{UV}_n\right) W^O",
    patterns=("noncausal self", "causal self"),
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact; the expanded and the absorbed form are the same function.",
    properties=frozenset({"translation-invariant", "decode", "linear-memory"}),
    function=latent_attention,
    module=MultiHeadLatentAttention,
    build=_build,
    kind="layer",
)
