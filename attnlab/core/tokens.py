"""What depends on one query or one key alone, on its way into a score modifier.

NaN and infinity of a key may reach the queries that see it, and nothing else.  Attention takes care
of that for the arrays it is given; an array made from a key would carry NaN into the gradient of
whatever it meets.  So what is not finite stays in the key, and what is made of it sees zeros.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.linear_attention import repeat_heads
from attnlab.core.reference import bad_rows, zero_bad


def per_token(function: Callable[[Array], Array], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`function` of each vector, the last axis of x; NaN where the vector is not finite.

    The gradient of a vector that is not finite is zero.
    """
    made = function(zero_bad(x))
    return jnp.where(bad_rows(x)[..., None], jnp.nan, made)


def marked(
    x: Float[Array, "*B S K H"], numbers: Float[Array, "*B S M"]
) -> Float[Array, "*B S K H"]:
    """`x`, with NaN in all heads of a token of which some of the `numbers` are not finite."""
    bad = ~jnp.all(jnp.isfinite(numbers), axis=-1)
    return jnp.where(bad[..., None, None], jnp.nan, x)


def blank(x: Float[Array, "*B S K H"]) -> Float[Array, "*B S K 1"]:
    """Zeros in place of vectors whose products are not wanted; NaN where one is not finite."""
    return jnp.where(bad_rows(x), jnp.nan, jnp.zeros((), x.dtype))[..., None]


def to_queries(x: Float[Array, "*B T N"]) -> Float[Array, "*B N T"]:
    """Numbers of queries as a modifier holds them."""
    return jnp.swapaxes(x, -1, -2)


def to_keys(x: Float[Array, "*B S K"], num_heads: int) -> Float[Array, "*B N S"]:
    """Numbers of keys as a modifier holds them, one to a query head."""
    return jnp.swapaxes(repeat_heads(x[..., None], num_heads)[..., 0], -1, -2)
