"""Attention to keys and values that are made of one latent per token, in two orders of products.

Expanded: the keys and values of all heads are formed, and attention is multi-head.  Absorbed: the
queries are multiplied instead, and attention is multi-query, its key the latent itself.
DeepSeek-AI 2024, arXiv:2405.04434.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.attention import attention

FORMS = ("expanded", "absorbed")


@dataclasses.dataclass(frozen=True)
class LatentSizes:
    """A layer's sizes, and what it holds and does.

    features F, num_heads N, latent_width C, rope_width R, head_width H and value_width D;
    `query_rank` is the width of the query's latent, None for a plain projection.

    Raises:
      ValueError: a size that is not positive; R may be 0.
    """

    features: int
    num_heads: int
    latent_width: int
    rope_width: int
    head_width: int
    value_width: int
    query_rank: int | None = None

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size is not None and size < (name != "rope_width"):
                raise ValueError(f"{name}: expected a positive int, got {size}.")

    @property
    def parameters(self) -> int:
        """Of projections and norms, without biases."""
        features, heads, latent = self.features, self.num_heads, self.latent_width
        query = heads * (self.head_width + self.rope_width)
        queries = features * query
        if self.query_rank is not None:
            queries = self.query_rank * (features + 1 + query)
        up = latent * heads * (self.head_width + self.value_width)
        down = features * (latent + self.rope_width) + latent
        return queries + down + up + heads * self.value_width * features

    @property
    def cache_per_token(self) -> int:
        """Numbers that a cache keeps of each token."""
        return self.latent_width + self.rope_width

    def multiply_adds(self, form: str, num_queries: int, num_keys: int) -> int:
        """Of one head's attention, from c and q_n to what it reads, D wide."""
        latent, rope = self.latent_width, self.rope_width
        pairs, up = num_queries * num_keys, latent * (self.head_width + self.value_width)
        if form == "absorbed":
            return pairs * (2 * latent + rope) + num_queries * up
        return pairs * (self.head_width + rope + self.value_width) + num_keys * up

    def cheaper(self, num_queries: int, num_keys: int) -> str:
        """The form of fewer multiply-adds; of equal ones the expanded."""
        return min(FORMS, key=lambda form: self.multiply_adds(form, num_queries, num_keys))


def latent_attention(
    query: Float[Array, "*B T N E"],
    memory: Float[Array, "*B S M"],
    up_key: Float[Array, "C N H"],
    up_value: Float[Array, "C N D"],
    *,
    form: str = "auto",
    **options: Any,
) -> Any:
    """Attention of N heads to what is made of one latent per token: "*B T N D".

    Args:
      query: q_n and behind it q^R_n, turned already: E = H + R.
      memory: c and behind it k^R, turned already: M = C + R.
      up_key, up_value: W^UK and W^UV.
      form: "expanded", "absorbed", or "auto" for the one of fewer multiply-adds.
      options: as for `attnlab.attention`; the scale is 1/sqrt(H + R) by default.

    Raises:
      ValueError: another form, or widths that do not fit.
    """
    sizes = _sizes(query, memory, up_key, up_value)
    if form not in ("auto", *FORMS):
        raise ValueError(f"form: expected one of {('auto', *FORMS)}, got {form!r}.")
    if form == "auto":
        form = sizes.cheaper(query.shape[-3], memory.shape[-2])
    run = absorbed_attention if form == "absorbed" else expanded_attention
    return run(query, memory, up_key, up_value, **options)


def expanded_attention(
    query: Float[Array, "*B T N E"],
    memory: Float[Array, "*B S M"],
    up_key: Float[Array, "C N H"],
    up_value: Float[Array, "C N D"],
    **options: Any,
) -> Any:
    """`latent_attention` by keys and values of each head."""
    sizes = _sizes(query, memory, up_key, up_value)
    latent, turned = jnp.split(memory, [sizes.latent_width], axis=-1)
    key, value = (product("...sc,cnh->...snh", latent, up) for up in (up_key, up_value))
    turned = jnp.broadcast_to(turned[..., None, :], (*key.shape[:-1], sizes.rope_width))
    return attention(query, jnp.concatenate([key, turned], axis=-1), value, **options)


def absorbed_attention(
    query: Float[Array, "*B T N E"],
    memory: Float[Array, "*B S M"],
    up_key: Float[Array, "C N H"],
    up_value: Float[Array, "C N D"],
    **options: Any,
) -> Any:
    """`latent_attention` by queries that meet the latent itself, the only key and value head."""
    sizes = _sizes(query, memory, up_key, up_value)
    own, turned = jnp.split(query, [sizes.head_width], axis=-1)
    query = jnp.concatenate([product("...tnh,cnh->...tnc", own, up_key), turned], axis=-1)
    key = memory[..., None, :]
    options = {"scale": (sizes.head_width + sizes.rope_width) ** -0.5} | options
    found = attention(query, key, key[..., : sizes.latent_width], **options)
    if not isinstance(found, tuple):
        return product("...tnc,cnd->...tnd", found, up_value)
    return product("...tnc,cnd->...tnd", found[0], up_value), *found[1:]


def product(formula: str, x: Array, weight: Array) -> Array:
    """A projection in the dtype of x."""
    return jnp.einsum(formula, x, weight.astype(x.dtype))


def _sizes(query: Array, memory: Array, up_key: Array, up_value: Array) -> LatentSizes:
    """The sizes of a call, or the error that names what does not fit."""
    latent, heads, width = up_key.shape
    rope = memory.shape[-1] - latent
    if up_value.shape[:2] != (latent, heads):
        raise ValueError(f"up_value: expected ({latent}, {heads}, D), got {up_value.shape}.")
    if rope < 0:
        raise ValueError(
            f"memory: expected at least the {latent} channels of the latent, got {memory.shape}."
        )
    if query.shape[-2:] != (heads, width + rope):
        raise ValueError(
            f"query: expected {heads} heads of width {width} and {rope} turned channels, got "
            f"{query.shape}."
        )
    return LatentSizes(1, heads, latent, rope, width, up_value.shape[-1])
