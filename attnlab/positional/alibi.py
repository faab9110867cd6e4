r"""ALiBi: order enters as a penalty that grows linearly with distance.

    s_nij = q_i . k_j / sqrt(H) - m_n |i - j|

Press, Smith & Lewis 2022, arXiv:2108.12409, section 3: slopes m_n are fixed, not trained, a
geometric sequence from 2^(-8/N) to 2^-8.  The paper is about decoders; |i - j| also serves
noncausal attention, as the authors suggest in their repository.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.modules import Mechanism
from attnlab.core.scores import AlibiSlopes, after, alibi_slopes


def alibi_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    slopes: Float[Array, " N"] | None = None,
    **options: Any,
) -> Any:
    """Softmax attention with linear biases: "*B T N D".

    Args:
      slopes: m_n, one per query head; `alibi_slopes(N)` by default.
      options: as for `attnlab.attention`.
    """
    query, key, value = check_inputs(query, key, value)
    slopes = alibi_slopes(query.shape[-2]) if slopes is None else slopes
    return attention(query, key, value, **after(AlibiSlopes(slopes), options))


class ALiBi(Mechanism):
    """ALiBi; adds no parameters, as slopes are fixed."""

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return alibi_attention(query, key, value, **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> ALiBi:
    return ALiBi()


ENTRY = Entry(
    id="alibi",
    title="ALiBi",
    family="positional",
    paper=Paper(
        "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
        "Press, Smith & Lewis",
        2022,
        "2108.12409",
    ),
    summary="A penalty proportional to distance, with a fixed slope per head; as a prior over "
    "positions, a Laplace distribution.",
    formula=r"s_{nij} = \frac{q_i^\top k_j}{\sqrt{H}} - m_n\,|i - j|, \qquad m_n = 2^{-8n/N}",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset(
        {"translation-invariant", "decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}
    ),
    function=alibi_attention,
    module=ALiBi,
    build=_build,
)
