r"""Mamba-2: a state space model whose heads forget by one number, which is linear attention.

    S_t = exp(-a_n dt_t) S_{t-1} + B_t (dt_t x_t)^T,      y_t = S_t^T C_t + d_n x_t
    dt_t = softplus(u_t w_n + b_n),      out_t = RMSNorm(y_t * silu(u_t W^Z))

Dao & Gu 2024, arXiv:2405.21060: C, B and x are query, key and value, the damped scores C B^T a
semiseparable matrix (state-space duality).  One step size both writes and forgets.  The norm comes
after the gate and runs over all heads' channels.  C, B and x pass a short convolution and SiLU;
there is no scale.  The authors' layer shares B and C among heads (`num_kv_heads` shares keys *and*
values here; for theirs repeat C and B); its convolution has a bias, ours none; norm in one group.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import RECURRENCE, Entry, Paper
from attnlab.core.gates import (
    Projection,
    SoftplusDecay,
    control,
    narrowed,
    rms_unit,
    scaled,
    widened,
)
from attnlab.core.linear_attention import (
    linear_attention,
    real_inputs,
    repeat_heads,
)
from attnlab.core.modules import RecurrentMechanism
from attnlab.core.own_token import own_token

EPSILON = 1e-5


def state_space_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    step: Float[Array, "*B S N"],
    log_decay: Float[Array, "*B S N"],
    skip: Float[Array, " N"] | None = None,
    **options: Any,
) -> Any:
    """The recurrence of Mamba-2: "*B T N D".

    Args:
      step: dt, by which values are multiplied; 0 leaves the state alone where log_decay is 0 too.
      log_decay: -a dt, none above 0.
      skip: d, how much of its own value a token gets; None for none.
      options: as for `attnlab.linear_attention`; states have a head for each query head.

    Raises:
      ValueError: a log decay above 0 (outside of jit).
    """
    query, key, value = real_inputs(query, key, value, options)
    heads, dtype = query.shape[-2], query.dtype
    query, key, value = widened(query, key, value)
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    step = control("step", step, key.shape[:-1], key.dtype)[..., None]
    log_decay = control("log_decay", log_decay, key.shape[:-1], key.dtype)
    result = linear_attention(query, key, step * value, log_decay=log_decay, **options)
    if skip is None:
        return narrowed(result, dtype)
    skip = control("skip", skip, (heads,), key.dtype)
    out, *state = result if isinstance(result, tuple) else (result,)
    out = out + scaled(own_token(value, query, options), skip[:, None])
    return narrowed((out, *state) if state else out, dtype)


class Mamba2(RecurrentMechanism):
    """Mamba-2: steps, decays and skips per head, output gate and norm; convolutions 4 wide."""

    conv_width = 4

    def __init__(self, features: int, num_heads: int, value_width: int, *, rngs: nnx.Rngs) -> None:
        self.num_heads = num_heads
        self.step = Projection(features, num_heads, rngs=rngs)
        self.decay = SoftplusDecay(num_heads, rngs=rngs)
        self.skip = nnx.Param(jnp.ones((num_heads,)))
        self.gate = Projection(features, (num_heads, value_width), rngs=rngs)
        self.gain = nnx.Param(jnp.ones((num_heads, value_width)))

    def controls(self, x: Float[Array, "*B T F"]) -> dict[str, Any]:
        step, log_decay = self.decay(self.step(x))
        return {"step": step, "log_decay": log_decay}

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        (wide,) = widened(out)
        wide = rms_unit(wide * jax.nn.silu(self.gate(x)), epsilon=EPSILON, axes=(-2, -1))
        return narrowed(scaled(wide, self.gain[...]), out.dtype)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return state_space_attention(query, key, value, skip=self.skip[...], **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> Mamba2:
    return Mamba2(num_heads * head_width, num_heads, head_width, rngs=rngs)


ENTRY = Entry(
    id="mamba2",
    title="Mamba-2",
    family="linear",
    paper=Paper(
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured "
        "State Space Duality",
        "Dao & Gu",
        2024,
        "2405.21060",
    ),
    summary="A selective state space model with one decay per head and step: the same function as "
    "attention whose scores are damped by a semiseparable matrix.",
    formula=r"S_t = e^{-a_n \Delta_t} S_{t-1} + B_t (\Delta_t x_t)^\top, \qquad "
    r"y_t = S_t^\top C_t + d_n x_t",
    patterns=("causal self",),
    time="O(T·H·D)",
    memory="O(T)",
    exact="Exact; weights are damped products, not those of softmax.",
    properties=frozenset({"translation-invariant", "gqa", "linear-memory", "state"}),
    function=state_space_attention,
    module=Mamba2,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
