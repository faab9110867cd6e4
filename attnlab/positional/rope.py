r"""RoPE: queries and keys are rotated by an angle proportional to their position.

    (R_p x)_(2c, 2c+1) = rotation by p theta^(-2c/H) of (x_2c, x_2c+1),   theta = 10,000
    s_ij = (R_i q_i) . (R_j k_j) / sqrt(H) = q_i . R_(j-i) k_j / sqrt(H)

Su et al. 2021, arXiv:2104.09864, section 3.2: the score depends on positions only through j - i.
Channels are paired as in the paper, neighbours (2c, 2c+1); many released models pair c with
c + H/2 instead, which is the same up to a permutation of channels (`interleaved=False`).
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.modules import Mechanism
from attnlab.core.rotary import rotate


def rope_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    theta: float = 10_000.0,
    interleaved: bool = True,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> Any:
    """Softmax attention with rotated queries and keys: "*B T N D".

    Args:
      theta: base of the frequencies theta^(-2c/H).
      interleaved: pair channel 2c with 2c + 1 (the paper), else c with c + H/2.
      query_offset, key_offset, options: as for `attnlab.attention`.

    Raises:
      ValueError: H is odd, or theta is not positive.
    """
    query, key, value = check_inputs(query, key, value)
    query = rotate(query, offset=query_offset, theta=theta, interleaved=interleaved)
    key = rotate(key, offset=key_offset, theta=theta, interleaved=interleaved)
    return attention(query, key, value, query_offset=query_offset, key_offset=key_offset, **options)


class RoPE(Mechanism):
    """Rotary positions; no parameters."""

    def __init__(self, theta: float = 10_000.0, interleaved: bool = True) -> None:
        self.theta, self.interleaved = theta, interleaved

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return rope_attention(
            query, key, value, theta=self.theta, interleaved=self.interleaved, **options
        )


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> RoPE:
    return RoPE()


ENTRY = Entry(
    id="rope",
    title="RoPE",
    family="positional",
    paper=Paper(
        "RoFormer: Enhanced Transformer with Rotary Position Embedding",
        "Su et al.",
        2021,
        "2104.09864",
    ),
    summary="Queries and keys are rotated by angles proportional to their positions, so that their "
    "product depends on the distance alone.",
    formula=r"s_{ij} = \frac{(R_i q_i)^\top (R_j k_j)}{\sqrt{H}} = "
    r"\frac{q_i^\top R_{j-i}\, k_j}{\sqrt{H}}",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset(
        {"translation-invariant", "decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}
    ),
    function=rope_attention,
    module=RoPE,
    build=_build,
)
