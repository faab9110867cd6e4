r"""Efficient attention: softmax over the channels of a query, softmax over the positions of a key.

    out_t = rho_q(q_t)^T (sum_s rho_k(k)_s v_s^T)

"softmax": rho_q is softmax over channels, rho_k softmax over positions, so that weights sum to one;
"scaling": both divide by sqrt(n), n positions, which is (Q K^T / n) V with the product turned.
Shen, Zhang, Zhao, Yi & Li 2018, arXiv:1812.01243: values gather into H global context vectors
first, at linear cost.  There is no 1 / sqrt(H).

The paper attends to all positions of an image.  Our reading for causal attention: rho_k over the
keys so far, and n their number, which is n also across sequences.  The residual of the authors'
block belongs to the layer around it.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import PATTERNS, RECURRENCE, Entry, Paper
from attnlab.core.linear_attention import linear_attention, linear_state, real_inputs
from attnlab.core.modules import Mechanism
from attnlab.core.past_softmax import latent_attention, peak_state
from attnlab.core.recurrence import state_dtype


def efficient_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    normalization: str = "softmax",
    **options: Any,
) -> Any:
    """Attention through H context vectors, O(T + S): "*B T N D".

    Args:
      normalization: "softmax" or "scaling".
      options: as for `attnlab.linear_attention`; a state is a `PeakState` for "softmax", and a pair
        of states for "scaling", of sums and of their number.

    Raises:
      ValueError: another normalization.
    """
    _check(normalization)
    if normalization == "softmax":
        return latent_attention(query, key, value, **options)
    return _scaled(query, key, value, **options)


def _check(normalization: Any) -> None:
    if normalization not in ("softmax", "scaling"):
        raise ValueError(f'normalization: expected "softmax" or "scaling", got {normalization!r}.')


def _scaled(query: Array, key: Array, value: Array, *, initial_state: Any = None, **options: Any):
    """Products over the number of keys that a query sees."""
    query, key, value = real_inputs(query, key, value, options)
    arrays = tuple(x.astype(state_dtype(query.dtype)) for x in (query, key, value))
    ones = tuple(jnp.ones_like(x[..., :1]) for x in arrays)
    before = (None, None) if initial_state is None else initial_state
    found = [
        linear_attention(*xs, initial_state=state, **options)
        for xs, state in zip((arrays, ones), before, strict=True)
    ]
    stateful = options.get("return_state")
    out, count = (out for out, _ in found) if stateful else found
    out = (out / jnp.maximum(count, 1)).astype(query.dtype)
    return (out, tuple(state for _, state in found)) if stateful else out


class EfficientAttention(Mechanism):
    """Efficient attention; no parameters."""

    def __init__(self, normalization: str = "softmax") -> None:
        _check(normalization)
        self.normalization = normalization

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Any:
        if self.normalization == "softmax":
            return peak_state(batch_shape, num_kv_heads, head_width, value_width)
        sums = linear_state(batch_shape, num_kv_heads, head_width, value_width)
        return sums, linear_state(batch_shape, num_kv_heads, 1, 1)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return efficient_attention(query, key, value, normalization=self.normalization, **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> EfficientAttention:
    return EfficientAttention()


ENTRY = Entry(
    id="efficient-attention-linear",
    title="Efficient attention",
    family="linear",
    paper=Paper(
        "Efficient Attention: Attention with Linear Complexities",
        "Shen, Zhang, Zhao, Yi & Li",
        2018,
        "1812.01243",
    ),
    summary="Keys are softmaxed over positions and queries over channels: each channel gathers a "
    "global context vector, and a query mixes these.",
    formula=r"o_t = \rho_q(q_t)^\top \Big(\sum_s \rho_k(k)_s\, v_s^\top\Big), \qquad "
    r"\rho_q = \mathrm{softmax}_h, \quad \rho_k = \mathrm{softmax}_s",
    patterns=PATTERNS,
    time="O((T + S)·H·D)",
    memory="O((T + S)·H)",
    exact="Exact; a softmax of each factor is not the softmax of their product.",
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
    function=efficient_attention,
    module=EfficientAttention,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
