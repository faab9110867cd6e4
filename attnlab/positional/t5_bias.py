r"""T5's relative position bias: a learned number per head and bucket of distance.

    s_nij = q_i . k_j / sqrt(H) + table[n, bucket(j - i)]

Raffel et al. 2020, arXiv:1910.10683, section 2.1: 32 buckets, exact for near keys, logarithmic up
to a distance of 128, one for all beyond; bucket edges follow the released implementation.  T5
itself leaves out 1/sqrt(H), having scaled down the initial query projection instead: `scale=1`
gives that.  The table starts at zero, so that training starts from NoPE.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.modules import Mechanism
from attnlab.core.scores import RelativeBias, after


def t5_bias_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    table: Float[Array, "N R"],
    bidirectional: bool = True,
    max_distance: int = 128,
    **options: Any,
) -> Any:
    """Softmax attention with bucketed relative biases: "*B T N D".

    Args:
      table: one bias per query head and bucket.
      bidirectional: half of the buckets serve keys after the query; otherwise all such keys share
        the bucket of distance zero, which suits decoders.
      max_distance: where the last bucket begins.
      options: as for `attnlab.attention`.

    Raises:
      ValueError: too few buckets, or a max_distance within the exact ones.
    """
    bias = RelativeBias(table, bidirectional, max_distance)
    return attention(query, key, value, **after(bias, options))


class T5Bias(Mechanism):
    """Bucketed relative biases; holds the table, "N R"."""

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.table = nnx.Param(jnp.zeros((num_heads, num_buckets), param_dtype))
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return t5_bias_attention(
            query,
            key,
            value,
            table=self.table[...],
            bidirectional=self.bidirectional,
            max_distance=self.max_distance,
            **options,
        )


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> T5Bias:
    return T5Bias(num_heads)


ENTRY = Entry(
    id="t5-bias",
    title="T5 relative position bias",
    family="positional",
    paper=Paper(
        "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
        "Raffel et al.",
        2020,
        "1910.10683",
    ),
    summary="A learned bias per head for each bucket of relative position, fine near the query and "
    "logarithmic far from it.",
    formula=r"s_{nij} = \frac{q_i^\top k_j}{\sqrt{H}} + b_{n,\,\mathrm{bucket}(j - i)}",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset(
        {"translation-invariant", "decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}
    ),
    function=t5_bias_attention,
    module=T5Bias,
    build=_build,
)
