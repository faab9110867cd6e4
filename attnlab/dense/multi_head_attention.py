r"""Scaled dot-product attention, the mechanism inside multi-head and grouped-query attention.

    A = softmax(Q K^T / sqrt(H)),   O = A V,   N query heads sharing K key heads

Vaswani et al. 2017, arXiv:1706.03762, section 3.2.  Shared key heads follow Ainslie et al. 2023,
arXiv:2305.13245: consecutive query heads share one; a single one is Shazeer 2019, arXiv:1911.02150.
The projections around it are `attnlab.MultiHeadAttention`.  Order enters only through a mask.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.modules import Mechanism


def dot_product(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    **options: Any,
) -> Any:
    """Softmax attention: "*B T N D".  `options` are those of `attnlab.attention`, which this is."""
    return attention(query, key, value, **options)


class DotProduct(Mechanism):
    """Scaled dot-product attention; no parameters."""


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> DotProduct:
    return DotProduct()


ENTRY = Entry(
    id="multi-head-attention",
    title="Multi-head and grouped-query attention",
    family="dense",
    paper=Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762"),
    summary="Each query reads the values in proportion to the exponential of its product with "
    "their keys; heads do so in parallel, and may share keys.",
    formula=r"O = \operatorname{softmax}\!\left(\frac{Q K^\top}{\sqrt{H}}\right) V",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset(
        {
            "position-free",
            "translation-invariant",
            "decode",
            "gqa",
            "lse",
            "rows-sum-to-one",
            "linear-memory",
        }
    ),
    function=dot_product,
    module=DotProduct,
    build=_build,
)
