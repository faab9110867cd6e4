r"""DeltaNet: a write replaces what its key reads, instead of adding to it.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,      o_t = S_t^T q_t / sqrt(H)
    beta_t = sigmoid(x_t w_n),      y_t = RMSNorm_D(o_t)

Schlag, Irie & Schmidhuber 2021, arXiv:2102.11174 (the delta rule of fast weights); Yang et al.
2024, arXiv:2406.06484 (parallel over the length by the WY form; queries and keys of length 1, a
short convolution and SiLU before).  Twice the sigmoid lets eigenvalues of the transition be
negative (Grazzi et al. 2024, arXiv:2411.12537).  Left out: the optional output gate, and the sum
normalization of keys.  Keys that are not of length 1 may let the state explode: beta |k|^2 > 2.
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import RECURRENCE, Entry, Paper
from attnlab.core.gates import Projection, control, narrowed, unit, widened
from attnlab.core.linear_attention import (
    linear_attention,
    real_inputs,
    repeat_heads,
)
from attnlab.core.modules import RecurrentMechanism, RMSNorm


def delta_rule_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    beta: Float[Array, "*B S N"],
    unit_keys: bool = True,
    **options: Any,
) -> Any:
    """The delta rule: "*B T N D".

    Args:
      beta: how much of what a key reads is replaced, in [0, 2] for a stable state.
      unit_keys: make queries and keys of length 1 first.
      options: as for `attnlab.linear_attention`; states have a head for each query head.

    Raises:
      NotImplementedError: a mask that picks pairs.
    """
    query, key, value = real_inputs(query, key, value, options)
    *_, heads, width = query.shape
    dtype = query.dtype
    query, key, value = widened(query, key, value)
    if unit_keys:
        query, key = unit(query), unit(key)
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    beta = control("beta", beta, key.shape[:-1], key.dtype)[..., None]
    out = linear_attention(query * width**-0.5, key, beta * value, erase=beta * key, **options)
    return narrowed(out, dtype)


class DeltaNet(RecurrentMechanism):
    """The delta rule with `rate.weight` "F N" and a norm per head; convolutions are 4 wide.

    `negative_eigenvalues` doubles beta.
    """

    function = staticmethod(delta_rule_attention)
    conv_width = 4

    def __init__(
        self, features: int, num_heads: int, value_width: int, *,
        negative_eigenvalues: bool = False, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.num_heads, self.largest = num_heads, 2.0 if negative_eigenvalues else 1.0
        self.rate = Projection(features, num_heads, rngs=rngs)
        self.norm = RMSNorm(value_width, epsilon=1e-5)

    def controls(self, x: Float[Array, "*B T F"]) -> dict[str, Any]:
        return {"beta": self.largest * jax.nn.sigmoid(self.rate(x))}

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        return self.norm(out)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> DeltaNet:
    return DeltaNet(num_heads * head_width, num_heads, head_width, rngs=rngs)


ENTRY = Entry(
    id="deltanet",
    title="DeltaNet",
    family="linear",
    paper=Paper(
        "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        "Yang, Wang, Zhang, Shen & Kim",
        2024,
        "2406.06484",
    ),
    summary="Before a value is written, what its key reads is erased: an associative memory that "
    "can be corrected, trained in parallel by the WY form.",
    formula=r"S_t = (I - \beta_t k_t k_t^\top)\, S_{t-1} + \beta_t k_t v_t^\top, \qquad "
    r"\lVert k_t \rVert = 1",
    patterns=("causal self",),
    time="O(T·H·D)",
    memory="O(T)",
    exact="Exact.",
    properties=frozenset({"translation-invariant", "gqa", "linear-memory", "state"}),
    function=delta_rule_attention,
    module=DeltaNet,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
