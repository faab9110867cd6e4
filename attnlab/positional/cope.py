r"""CoPE: a position is how many tokens that matter lie between query and key, counted by gates.

    g_ij = sigmoid(s_ij) where i sees j, else 0,        s_ij = q_i . k_j / sqrt(H)
    p_ij = min(sum_{t >= j} g_it, P - 1),               z_i[m] = q_i . e_m
    A_ij = softmax_j(s_ij + (1 - w) z_i[floor p] + w z_i[floor p + 1]),    w = p - floor p

Golovneva, Wang, Weston & Sukhbaatar 2024, arXiv:2405.18719.  The vectors e "P H" start at zero and
are shared by all heads of a layer, as in the authors' code.  The code divides z by sqrt(H) as well
(`scale_positions=True`), the listing that others reproduce does not; here that is the default.
Between the two entries floor p and floor p + 1, not floor and ceil: where p is a whole number, as
with saturated gates, it keeps its derivative.

Positions are counted among the keys that a query sees, so padding and other documents count
nothing.  Where a query sees later keys, these are counted as well, as in the code's encoders.  Of
another sequence's keys no order relative to the query is defined: there is no cross-attention.
A whole row of scores is needed before any weight is known; what streams over keys refuses.
The code's variants with values as gates or relative positions beside CoPE are left out.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import Entry, Paper
from attnlab.core.gates import control
from attnlab.core.linear_attention import repeat_heads
from attnlab.core.modules import Mechanism
from attnlab.core.reference import bad_rows, default_scale, heads_first, zero_bad
from attnlab.core.scores import RowModifier, after
from attnlab.core.terms import ArrayLeaf, At, accumulator, leaf


class ContextualPosition(RowModifier):
    """Adds a query's product with the vector of a key's contextual position.

    `table` "B N T P": the products z.  Gates are of the scores, or of `gate_query` "B N T H" times
    `gate_key` "B N S H" where these are given.
    """

    table: ArrayLeaf = leaf("B N T *")
    gate_query: ArrayLeaf = leaf("B N T *", default=None)
    gate_key: ArrayLeaf = leaf("B N S *", default=None)

    def rows(
        self, score: Float[Array, "... S"], at: At, allowed: Bool[Array, "... S"]
    ) -> Float[Array, "... S"]:
        logits = score
        if self.gate_query is not None:
            # As with keys, what no query sees may be NaN.
            bad = bad_rows(self.gate_key)[..., None, :]
            logits = self.gate_query @ jnp.swapaxes(zero_bad(self.gate_key), -1, -2)
            logits = jnp.where(allowed, jnp.where(bad, jnp.nan, logits), 0)
        place = positions(logits, allowed, self.table.shape[-1])
        low = jnp.clip(jnp.floor(place), 0, self.table.shape[-1] - 2).astype(jnp.int32)
        above = place - low.astype(place.dtype)
        table = jnp.broadcast_to(self.table, (*low.shape[:-1], self.table.shape[-1]))
        first, second = (jnp.take_along_axis(table, low + n, axis=-1) for n in (0, 1))
        return score + (1 - above) * first + above * second


def positions(
    logits: Float[Array, "... S"], allowed: Bool[Array, "... S"], num_positions: int
) -> Float[Array, "... S"]:
    """p: the sum of the gates of a key and of what is seen after it, at most P - 1."""
    gates = jnp.where(allowed, jax.nn.sigmoid(logits), 0)
    total = jax.lax.cumsum(gates, axis=gates.ndim - 1, reverse=True)
    return jnp.minimum(total, num_positions - 1)


def cope_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    table: Float[Array, "P H"],
    gate_key: Float[Array, "*B S K H"] | None = None,
    scale_positions: bool = False,
    **options: Any,
) -> Any:
    """Softmax attention with contextual positions: "*B T N D".

    Args:
      table: the vectors e of positions 0 to P - 1; P is at least 2.
      gate_key: keys of the gates, if they are not those of the scores.
      scale_positions: also divide what is added to the scores by sqrt(H).
      options: as for `attnlab.attention`, implementations "reference" and "blockwise".

    Raises:
      TypeError, ValueError: a table of fewer than 2 positions or another width, or gate keys of
        another shape than the keys.
      NotImplementedError: an implementation that streams over keys.
    """
    query, key, value = check_inputs(query, key, value)
    dtype, width = accumulator(query.dtype), query.shape[-1]
    rows = table.shape[0] if jnp.ndim(table) == 2 else 0
    if rows < 2:
        raise ValueError(f"table: expected (P, {width}), P >= 2, got {jnp.shape(table)}.")
    table = control("table", table, (rows, width), dtype)
    first = heads_first(query).astype(dtype)
    near = first @ table.T
    gates: tuple[Any, ...] = ()
    if gate_key is not None:
        gate_key = control("gate_key", gate_key, key.shape, dtype)
        scaled = first * default_scale(width)
        gates = (scaled, heads_first(repeat_heads(gate_key, query.shape[-2])))
    own = ContextualPosition(near * default_scale(width) if scale_positions else near, *gates)
    return attention(query, key, value, **after(own, options))


class CoPE(Mechanism):
    """Contextual positions; holds e "P H".

    Args:
      head_width: H.
      num_positions: P, at least 2; what is further away is at position P - 1.
      scale_positions: also divide what is added to the scores by sqrt(H).
    """

    def __init__(
        self, head_width: int, num_positions: int = 64, *, scale_positions: bool = False
    ) -> None:
        if num_positions < 2:
            raise ValueError(f"num_positions: expected 2 or more, got {num_positions}.")
        self.table = nnx.Param(jnp.zeros((num_positions, head_width)))
        self.scale_positions = scale_positions

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        own: dict[str, Any] = {"table": self.table[...], "scale_positions": self.scale_positions}
        return cope_attention(query, key, value, **own, **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> CoPE:
    return CoPE(head_width, 16)


ENTRY = Entry(
    id="cope",
    title="Contextual position encoding",
    family="positional",
    paper=Paper(
        "Contextual Position Encoding: Learning to Count What's Important",
        "Golovneva, Wang, Weston & Sukhbaatar",
        2024,
        "2405.18719",
    ),
    summary="Position is a count of the tokens that a query's gates let through, so that a head "
    "can attend to the n-th word or sentence instead of the n-th token.",
    formula=r"A_{ij} = \operatorname{softmax}_j\!\left(\frac{q_i^\top k_j}{\sqrt{H}} + "
    r"q_i^\top e[p_{ij}]\right), \qquad p_{ij} = \sum_{t=j}^{i} \sigma\!\left(\frac{q_i^\top k_t}"
    r"{\sqrt{H}}\right)",
    patterns=("noncausal self", "causal self"),
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset(
        {"translation-invariant", "decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}
    ),
    function=cope_attention,
    module=CoPE,
    build=_build,
)
