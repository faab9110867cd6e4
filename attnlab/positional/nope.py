r"""NoPE: no positional encoding at all.

    O = softmax(Q K^T / sqrt(H) + causal mask) V

Kazemnejad et al. 2023, arXiv:2305.19466.  The causal mask alone breaks the symmetry between
positions, and a decoder can recover order from it.  As a Bayesian prior over positions it is the
uniform one (see `attnlab.positional.bam`).
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.modules import Mechanism


def nope_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    **options: Any,
) -> Any:
    """Plain attention: "*B T N D".  `options` are those of `attnlab.attention`.

    A decoder gives a causal mask, from which alone it can know the order.
    """
    return attention(query, key, value, **options)


class NoPE(Mechanism):
    """No positional encoding; no parameters."""


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> NoPE:
    return NoPE()


ENTRY = Entry(
    id="nope",
    title="NoPE",
    family="positional",
    paper=Paper(
        "The Impact of Positional Encoding on Length Generalization in Transformers",
        "Kazemnejad et al.",
        2023,
        "2305.19466",
    ),
    summary="No positional encoding; order is known only through the causal mask.",
    formula=r"\log p(j \mid i) = \text{const}",
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
    function=nope_attention,
    module=NoPE,
    build=_build,
)
