r"""Gated linear attention: each key channel of the state forgets at a rate read from the input.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,      o_t = S_t^T q_t / sqrt(H)
    alpha_t = sigmoid(x_t W^1 W^2 + b)^(1 / 16),      y_t = RMSNorm_D(o_t) * silu(x_t W^R)

Yang et al. 2023, arXiv:2312.06635.  W^1 is 16 wide; dividing the logarithm by 16 keeps decays near
1.  The norm has one gain of width D for all heads and epsilon 1e-5, and the output gate no bias, as
in the authors' library.  The paper's heads are 4, keys half as wide as the model, values as wide.
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import RECURRENCE, Entry, Paper
from attnlab.core.gates import Projection, control, narrowed, widened
from attnlab.core.linear_attention import (
    linear_attention,
    real_inputs,
    repeat_heads,
)
from attnlab.core.modules import RecurrentMechanism, RMSNorm

TEMPERATURE = 16.0
RANK = 16


def gated_linear_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    log_decay: Float[Array, "*B S N H"],
    **options: Any,
) -> Any:
    """Linear attention with a decay per step and key channel: "*B T N D".

    Args:
      log_decay: log alpha, none above 0; 0 keeps a channel exactly, -inf clears it.
      options: as for `attnlab.linear_attention`; states have a head for each query head.

    Raises:
      ValueError: a log decay above 0 (outside of jit), or of another shape.
    """
    query, key, value = real_inputs(query, key, value, options)
    *_, heads, width = query.shape
    dtype = query.dtype
    query, key, value = widened(query, key, value)
    shape = (*key.shape[:-2], heads, width)
    log_decay = control("log_decay", log_decay, shape, query.dtype)
    out = linear_attention(
        query * width**-0.5, repeat_heads(key, heads), repeat_heads(value, heads),
        log_decay=log_decay, **options,
    )  # fmt: skip
    return narrowed(out, dtype)


class GLA(RecurrentMechanism):
    """Gated linear attention: low-rank decays "F 16" and "16 N*H", output gate, norm per head."""

    function = staticmethod(gated_linear_attention)

    def __init__(
        self, features: int, num_heads: int, head_width: int, value_width: int, *,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.num_heads = num_heads
        self.down = Projection(features, RANK, rngs=rngs)
        self.up = Projection(RANK, (num_heads, head_width), bias=0.0, rngs=rngs)
        self.gate = Projection(features, (num_heads, value_width), rngs=rngs)
        self.norm = RMSNorm(value_width, epsilon=1e-5)

    def controls(self, x: Float[Array, "*B T F"]) -> dict[str, Any]:
        return {"log_decay": jax.nn.log_sigmoid(self.up(self.down(x))) / TEMPERATURE}

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        (wide,) = widened(out)
        return narrowed(self.norm(wide) * jax.nn.silu(self.gate(x)), out.dtype)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> GLA:
    return GLA(num_heads * head_width, num_heads, head_width, head_width, rngs=rngs)


ENTRY = Entry(
    id="gla",
    title="Gated linear attention",
    family="linear",
    paper=Paper(
        "Gated Linear Attention Transformers with Hardware-Efficient Training",
        "Yang, Wang, Shen, Panda & Kim",
        2023,
        "2312.06635",
    ),
    summary="Every key channel of the state is damped by a gate computed from the token, so a "
    "layer chooses what to forget.",
    formula=r"S_t = \mathrm{diag}(\alpha_t)\, S_{t-1} + k_t v_t^\top, \qquad "
    r"\alpha_t = \sigma(x_t W^1 W^2 + b)^{1/16}",
    patterns=("causal self",),
    time="O(T·H·D)",
    memory="O(T)",
    exact="Exact; weights are damped products, not those of softmax.",
    properties=frozenset({"translation-invariant", "gqa", "linear-memory", "state"}),
    function=gated_linear_attention,
    module=GLA,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
