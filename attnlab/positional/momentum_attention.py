r"""Momentum attention: a query and a key move on in the direction in which they came.

    u_t = R_t q_t,  w_t = R_t k_t                      (RoPE; without it, u = q and w = k)
    q^_t = u_t + gamma (u_t - u_{t-1}),   k^_t = w_t + gamma (w_t - w_{t-1})
    out = softmax(q^ k^^T / sqrt(H)) v

Maitra 2026, arXiv:2602.04902.  A key carries a part of the token before it, so that one layer can
look up what followed an earlier occurrence: induction, for which plain attention needs two layers.
Along the sequence it is a filter, 1 + gamma (1 - e^-iw), of gain 1 for what is constant and 1 + 2
gamma for what alternates.  With RoPE a constant token is not constant any more: each pair of
channels has the gain |1 + gamma (1 - e^-i theta_c)|.  Values stay as they are.

The first token, and the first of a document or after padding, has no momentum.  The paper finds
that the best gamma falls with the number of layers as 4.17 L^-0.74 (`momentum_for_depth`).  Its
text was read in its abstract and in a summary of its theorems; whether gamma is learned there is
not known.  Here it is a number, or with `trainable=True` one parameter for all heads of a layer.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import Entry, Paper
from attnlab.core.gates import widened
from attnlab.core.modules import Mechanism
from attnlab.core.past import Past
from attnlab.core.rotary import rotate


def momentum_for_depth(num_layers: int) -> float:
    """The gamma that the paper finds best for so many layers: 4.17 L^-0.74.

    Raises:
      ValueError: a number of layers that is not positive.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers: expected a positive int, got {num_layers}.")
    return float(4.17 * num_layers**-0.74)


def sheared(
    x: Float[Array, "*B T N H"], momentum: Any, past: Past
) -> Float[Array, "*B T N H"]:  # fmt: skip
    """x_t + gamma (x_t - x_{t-1}), in float32 at least; x_t where there is no token before."""
    wide = past.cleaned(*widened(x))  # or NaN in padding would reach the gradient of gamma
    (before,) = past.previous(wide, missing=wide)
    return (wide + jnp.asarray(momentum, wide.dtype) * (wide - before)).astype(x.dtype)


def momentum_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    momentum: Any,
    theta: float | None = 10_000.0,
    interleaved: bool = True,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> Any:
    """Softmax attention of queries and keys with momentum: "*B T N D".

    For whole sequences: the first token given has no momentum.  Layers decode by
    `MomentumAttention`, which remembers the token before.  As many queries as keys are taken for
    those of the same tokens.  Of a mask, causality, padding and documents are understood; under any
    other the token before is the one before in the array.

    Args:
      momentum: gamma, a number or a scalar array, not negative.
      theta, interleaved: of RoPE; theta None for none.
      query_offset, key_offset, options: as for `attnlab.attention`.

    Raises:
      ValueError: a number below 0, which would damp what alternates, or an odd head width.
    """
    query, key, value = check_inputs(query, key, value)
    _check(momentum)
    past = Past.of(options.get("mask"), query, key, offset=query_offset)
    if theta is not None:
        query = rotate(query, offset=query_offset, theta=theta, interleaved=interleaved)
        key = rotate(key, offset=key_offset, theta=theta, interleaved=interleaved)
    query, key = sheared(query, momentum, past), sheared(key, momentum, past)
    return attention(query, key, value, query_offset=query_offset, key_offset=key_offset, **options)


def _check(momentum: Any) -> None:
    if isinstance(momentum, int | float) and momentum < 0:
        raise ValueError(f"momentum: expected a number of 0 or more, got {momentum}.")


class MomentumAttention(Mechanism):
    """Momentum attention; no parameters unless gamma is `trainable`.

    Args:
      momentum: gamma, or where it starts from.
      trainable: whether it is a parameter, one number.
      theta, interleaved: of RoPE; theta None for none.

    Raises:
      ValueError: a momentum below 0.
    """

    def __init__(
        self, momentum: float, *, trainable: bool = False, theta: float | None = 10_000.0,
        interleaved: bool = True,
    ) -> None:  # fmt: skip
        _check(momentum)
        self.fixed, self.theta, self.interleaved = momentum, theta, interleaved
        start = jnp.asarray(momentum, jnp.float32)
        self.gamma = nnx.data(nnx.Param(start) if trainable else None)

    @property
    def momentum(self) -> Any:
        """gamma: a number, or the parameter's value."""
        return self.fixed if self.gamma is None else self.gamma[...]

    def prepare(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        past: Past,
    ) -> tuple[Array, Array, Array]:
        """Queries and keys rotated and then moved on; attention to them is plain."""
        query, key, value = check_inputs(query, key, value)
        if self.theta is not None:
            turn = {"offset": past.offset, "theta": self.theta, "interleaved": self.interleaved}
            query, key = rotate(query, **turn), rotate(key, **turn)
        return sheared(query, self.momentum, past), sheared(key, self.momentum, past), value


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> MomentumAttention:
    return MomentumAttention(0.5, trainable=True)


ENTRY = Entry(
    id="momentum-attention",
    title="Momentum attention",
    family="positional",
    paper=Paper(
        "Momentum Attention: The Physics of In-Context Learning and Spectral Forensics for "
        "Mechanistic Interpretability",
        "Maitra",
        2026,
        "2602.04902",
    ),
    summary="Queries and keys are moved on by their difference from the token before, so that a "
    "single layer can match what came before a token.",
    formula=r"\hat q_t = u_t + \gamma\,(u_t - u_{t-1}), \quad \hat k_t = w_t + \gamma\,"
    r"(w_t - w_{t-1}), \qquad u_t = R_t q_t,\ w_t = R_t k_t",
    patterns=("noncausal self", "causal self"),
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset(
        {"translation-invariant", "decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}
    ),
    function=momentum_attention,
    module=MomentumAttention,
    build=_build,
    masks="documents",
)
