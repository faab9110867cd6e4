r"""Gated DeltaNet: the state decays as a whole, and a write replaces what its key then reads.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,      o_t = S_t^T q_t / sqrt(H)
    log alpha_t = -exp(A) softplus(x_t w^a + d),      beta_t = sigmoid(x_t w^b)
    y_t = RMSNorm_D(o_t) * silu(x_t W^G)

Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464: alpha clears quickly, the delta rule replaces
precisely.  The error is read from the *decayed* state; in terms of the state before, erase = beta
alpha k.  Queries and keys have length 1, after a short convolution and SiLU.  exp(A) starts in
[0.001, 16]: the authors draw from [0, 16], where the logarithm of a 0 would freeze a head.  Left
out: more value heads than key heads; repeat keys for that.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import RECURRENCE, Entry, Paper
from attnlab.core.gates import Projection, SoftplusDecay, control, narrowed, unit, widened
from attnlab.core.linear_attention import (
    linear_attention,
    real_inputs,
    repeat_heads,
)
from attnlab.core.modules import RecurrentMechanism, RMSNorm

RATES = (1e-3, 16.0)


def gated_delta_rule_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    beta: Float[Array, "*B S N"],
    log_decay: Float[Array, "*B S N"],
    unit_keys: bool = True,
    **options: Any,
) -> Any:
    """The delta rule on a state that decays first: "*B T N D".

    Args:
      beta: how much of what a key reads is replaced, in [0, 2] for a stable state.
      log_decay: log alpha, none above 0; 0 keeps the state exactly, -inf clears it.
      unit_keys: make queries and keys of length 1 first.
      options: as for `attnlab.linear_attention`; states have a head for each query head.

    Raises:
      ValueError: a log decay above 0 (outside of jit).
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
    log_decay = control("log_decay", log_decay, key.shape[:-1], key.dtype)
    erase = beta * jnp.exp(log_decay)[..., None] * key
    out = linear_attention(
        query * width**-0.5, key, beta * value, erase=erase, log_decay=log_decay, **options
    )
    return narrowed(out, dtype)


class GatedDeltaNet(RecurrentMechanism):
    """The gated delta rule, its gates "F N", and an output norm and gate; convolutions 4 wide.

    `negative_eigenvalues` doubles beta.
    """

    function = staticmethod(gated_delta_rule_attention)
    conv_width = 4

    def __init__(
        self, features: int, num_heads: int, value_width: int, *,
        negative_eigenvalues: bool = False, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.num_heads, self.largest = num_heads, 2.0 if negative_eigenvalues else 1.0
        self.rate = Projection(features, num_heads, rngs=rngs)
        self.forget = Projection(features, num_heads, rngs=rngs)
        self.decay = SoftplusDecay(num_heads, rates=RATES, rngs=rngs)
        self.gate = Projection(features, (num_heads, value_width), rngs=rngs)
        self.norm = RMSNorm(value_width, epsilon=1e-5)

    def controls(self, x: Float[Array, "*B T F"]) -> dict[str, Any]:
        beta = self.largest * jax.nn.sigmoid(self.rate(x))
        return {"beta": beta, "log_decay": self.decay(self.forget(x))[1]}

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        (wide,) = widened(out)
        return narrowed(self.norm(wide) * jax.nn.silu(self.gate(x)), out.dtype)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> GatedDeltaNet:
    return GatedDeltaNet(num_heads * head_width, num_heads, head_width, rngs=rngs)


ENTRY = Entry(
    id="gated-deltanet",
    title="Gated DeltaNet",
    family="linear",
    paper=Paper(
        "Gated Delta Networks: Improving Mamba2 with Delta Rule",
        "Yang, Kautz & Hatamizadeh",
        2024,
        "2412.06464",
    ),
    summary="A decay per head and step clears the memory, a delta rule corrects it: Mamba-2 and "
    "DeltaNet in one recurrence.",
    formula=r"S_t = \alpha_t (I - \beta_t k_t k_t^\top)\, S_{t-1} + \beta_t k_t v_t^\top",
    patterns=("causal self",),
    time="O(T·H·D)",
    memory="O(T)",
    exact="Exact.",
    properties=frozenset({"translation-invariant", "gqa", "linear-memory", "state"}),
    function=gated_delta_rule_attention,
    module=GatedDeltaNet,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
