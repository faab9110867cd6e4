"""What is compared: attnlab's blockwise attention and its peers, with one signature.

Each is a function of query, key and value, all "B T N H", causal or not.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import attnlab
from attnlab.core.masks import Causal

Attention = Callable[[Array, Array, Array], Array]
OURS, FORMULA, LIBRARY = "blockwise", "formula", "jax.nn"


def formula(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    causal: bool = False,
) -> Float[Array, "B T N H"]:
    """The textbook form, which materialises all T·S scores."""
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
    if causal:
        allowed = jnp.tri(*scores.shape[-2:], dtype=bool)[None, None]
        scores = jnp.where(allowed, scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), value)


def attentions(*, causal: bool = False) -> dict[str, Attention]:
    """The subject and its peers, by name."""

    def ours(query: Array, key: Array, value: Array) -> Array:
        mask = Causal() if causal else None
        return attnlab.attention(query, key, value, mask=mask, implementation="blockwise")

    def plain(query: Array, key: Array, value: Array) -> Array:
        return formula(query, key, value, causal=causal)

    def library(query: Array, key: Array, value: Array) -> Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal)

    return {OURS: ours, FORMULA: plain, LIBRARY: library}


def with_gradients(attention: Attention) -> Callable[[Array, Array, Array, Array], tuple]:
    """The output, and the gradients of <out, cotangent> in query, key and value."""

    def both(query: Array, key: Array, value: Array, cotangent: Array) -> tuple:
        out, pull = jax.vjp(attention, query, key, value)
        return out, pull(cotangent)

    return both


def inputs(length: int, heads: int, width: int = 64, seed: int = 0) -> list[Array]:
    """Query, key, value and cotangent of one sequence, standard normal, float32."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, (1, length, heads, width), jnp.float32) for key in keys]
