r"""Sinusoidal positions: a fixed vector of waves, added where tokens enter.

    PE(p, 2c) = sin(p theta^(-2c/F)),   PE(p, 2c+1) = cos(p theta^(-2c/F)),   theta = 10,000

Vaswani et al. 2017, arXiv:1706.03762, section 3.5: added to the embeddings, which is what a model
gets through `Sinusoidal.embed`.  As a function of query, key and value alone, the encoding is added
to queries and keys, which is the paper's first layer with identity projections for both.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.modules import Mechanism
from attnlab.core.terms import accumulator


def sinusoidal_encoding(
    length: int, features: int, *, offset: Any = 0, theta: float = 10_000.0,
    dtype: Any = jnp.float32,
) -> Float[Array, "T F"]:  # fmt: skip
    """The waves at positions offset, ..., offset + length - 1.

    Raises:
      ValueError: theta is not positive.
    """
    if theta <= 0:
        raise ValueError(f"theta: expected a positive number, got {theta}.")
    wide = accumulator(dtype)
    position = (jnp.arange(length, dtype=jnp.int32) + offset).astype(wide)
    frequency = theta ** (-jnp.arange(0, features, 2, dtype=wide) / features)
    angle = position[:, None] * frequency[None, :]
    waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return waves.reshape(length, -1)[:, :features].astype(dtype)


def sinusoidal_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    theta: float = 10_000.0,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> Any:
    """Softmax attention with encodings added to queries and keys: "*B T N D".

    Args:
      theta: base of the frequencies.
      query_offset, key_offset, options: as for `attnlab.attention`.
    """
    query, key, value = check_inputs(query, key, value)

    def placed(x: Array, offset: Any) -> Array:
        waves = sinusoidal_encoding(
            x.shape[-3], x.shape[-1], offset=offset, theta=theta, dtype=x.dtype
        )
        return x + waves.reshape((1,) * (x.ndim - 3) + (x.shape[-3], 1, x.shape[-1]))

    return attention(
        placed(query, query_offset),
        placed(key, key_offset),
        value,
        query_offset=query_offset,
        key_offset=key_offset,
        **options,
    )


class Sinusoidal(Mechanism):
    """Sinusoidal positions; no parameters.

    A model adds them to its embeddings through `embed`; attention itself is then plain.
    """

    def __init__(self, theta: float = 10_000.0) -> None:
        self.theta = theta

    def embed(self, x: Float[Array, "*B T F"], *, offset: Any = 0) -> Float[Array, "*B T F"]:
        """`x` plus the waves at positions offset, offset + 1, ..."""
        waves = sinusoidal_encoding(
            x.shape[-2], x.shape[-1], offset=offset, theta=self.theta, dtype=x.dtype
        )
        return x + waves.reshape((1,) * (x.ndim - 2) + waves.shape)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> Sinusoidal:
    return Sinusoidal()


ENTRY = Entry(
    id="sinusoidal",
    title="Sinusoidal positions",
    family="positional",
    paper=Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762"),
    summary="A fixed vector of sines and cosines of many wavelengths is added to each token.",
    formula=r"\mathrm{PE}(p, 2c) = \sin\!\left(p\,\theta^{-2c/F}\right), \quad "
    r"\mathrm{PE}(p, 2c + 1) = \cos\!\left(p\,\theta^{-2c/F}\right)",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset({"decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}),
    function=sinusoidal_attention,
    module=Sinusoidal,
    build=_build,
)
