r"""Latte: attention through latents, each with a probability over the past.

    out_t = sum_l p(l | t) sum_{s <= t} p(s | l, t) v_s,
    p(l | t) = softmax_l(q_tl),      p(s | l, t) = exp(k_sl) / sum_{u <= t} exp(k_ul)

Queries and keys are L = H wide, a channel for each latent.  Dolga, Maystre, Cobzarenco & Barber
2024, arXiv:2402.17512: linear time, and constant time for the next token, from a state of L rows
and their normalizers.  Without a causal mask p(s | l) runs over all positions, which is efficient
attention (Shen et al. 2018, arXiv:1812.01243).  There is no 1 / sqrt(H).

Left out: dropout of p(l | t), and the sliding softmax window of the paper's later version.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import PATTERNS, RECURRENCE, Entry, Paper
from attnlab.core.modules import Mechanism
from attnlab.core.past_softmax import PeakState, latent_attention, peak_state


def latte_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    **options: Any,
) -> Any:
    """Attention through H latents to a head, O(T + S): "*B T N D".

    Args:
      query: logits of the latents that a position picks.
      key: logits of the positions that a latent picks.
      options: as for `attnlab.linear_attention`; a state is a `PeakState`.
    """
    return latent_attention(query, key, value, **options)


class Latte(Mechanism):
    """Latte; no parameters.  The number of latents is `MultiHeadAttention(head_width=...)`."""

    function = staticmethod(latte_attention)

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> PeakState:
        return peak_state(batch_shape, num_kv_heads, head_width, value_width)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> Latte:
    return Latte()


ENTRY = Entry(
    id="latte",
    title="Latte",
    family="linear",
    paper=Paper(
        "Latte: Latent Attention for Linear Time Transformers",
        "Dolga, Maystre, Cobzarenco & Barber",
        2024,
        "2402.17512",
    ),
    summary="A position picks latents and a latent picks earlier positions: a mixture of a few "
    "distributions over the past, kept as a state.",
    formula=r"o_t = \sum_l p(l \mid t) \sum_{s \le t} p(s \mid l, t)\, v_s, \qquad "
    r"p(l \mid t) = \mathrm{softmax}_l(q_{tl}), \quad "
    r"p(s \mid l, t) = \frac{e^{k_{sl}}}{\sum_{u \le t} e^{k_{ul}}}",
    patterns=PATTERNS,
    time="O((T + S)·H·D)",
    memory="O((T + S)·H)",
    exact="Exact; weights are a mixture of H distributions, not softmax of products.",
    properties=frozenset(
        {
            "position-free",
            "translation-invariant",
            "decode",
            "gqa",
            "rows-sum-to-one",
            "linear-memory",
            "state",
        }
    ),
    function=latte_attention,
    module=Latte,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
