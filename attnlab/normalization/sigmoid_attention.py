r"""Sigmoid attention: each pair decides on its own; nothing is shared along the row.

    O = sigmoid(Q K^T / sqrt(H) + b) V,   b = -log n

Ramapuram et al. 2024, arXiv:2409.04431, section 2.  With b = -log n, n the number of keys, a row of
small scores sums to about one, as softmax would; with b = 0 it sums to about n / 2.  The paper uses
one n for all rows, causal ones too, and so does this.  It finds that large early outputs are what
breaks training, and recommends QK-norm and LayerScale (`MultiHeadAttention(qk_norm=True,
layer_scale=1e-4)`), and for long sequences a norm after attention as well.
Left out: the paper's CUDA kernel.  As no row statistic is needed, tiles add up without rescaling.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.modules import Mechanism
from attnlab.core.normalizers import Sigmoid
from attnlab.core.scores import Bias, after


def sigmoid_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    bias: Float[Array, "*#N"] | float | None = None,
    **options: Any,
) -> Float[Array, "*B T N D"]:
    """Sigmoid attention: "*B T N D".

    Args:
      bias: b, a number, or an array "" or "N"; -log S by default.  To decode step by step as the
        whole sequence would have been computed, give the same b to both.
      options: as for `attnlab.attention`, but for `normalizer` and `return_lse`.

    Raises:
      ValueError: as `attnlab.attention`; there is no log-sum-exp to return.
    """
    query, key, value = check_inputs(query, key, value)
    bias = -math.log(key.shape[-3]) if bias is None else bias
    shift = Bias(jnp.reshape(jnp.asarray(bias, jnp.float32), (-1, 1, 1)))
    return attention(query, key, value, normalizer=Sigmoid(), **after(shift, options))


class SigmoidAttention(Mechanism):
    """Sigmoid attention with b = -log(length) fixed, or of each call's own length if None.

    Raises:
      ValueError: length is not positive.
    """

    def __init__(self, length: int | None = None) -> None:
        if length is not None and length < 1:
            raise ValueError(f"length: expected a positive int or None, got {length}.")
        self.bias = None if length is None else -math.log(length)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Float[Array, "*B T N D"]:
        return sigmoid_attention(query, key, value, bias=self.bias, **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> SigmoidAttention:
    return SigmoidAttention(length=256)


ENTRY = Entry(
    id="sigmoid-attention",
    title="Sigmoid attention",
    family="normalization",
    paper=Paper(
        "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        "Ramapuram et al.",
        2024,
        "2409.04431",
    ),
    summary="The softmax is replaced by a sigmoid with a bias of -log n: weights are independent "
    "of one another, and no row needs a maximum or a sum.",
    formula=r"O = \sigma\!\left(\frac{Q K^\top}{\sqrt{H}} + b\right) V, \qquad b = -\log n",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact; its rows do not sum to one, by design.",
    properties=frozenset(
        {"position-free", "translation-invariant", "decode", "gqa", "linear-memory"}
    ),
    function=sigmoid_attention,
    module=SigmoidAttention,
    build=_build,
)
