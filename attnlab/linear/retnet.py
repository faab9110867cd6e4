r"""RetNet: linear attention that forgets at a fixed rate per head, with positions as rotations.

    S_t = gamma_n S_{t-1} + k_t v_t^T,      o_t = S_t^T q_t,      gamma_n = 1 - 2^(-5-n), n from 0
    y_t = swish(x_t W^G) * RMSNorm_D(o_t)

Sun et al. 2023, arXiv:2307.08621 (retention); queries and keys are turned by t theta^(-c / (P-1)),
c = 0 .. P-1 of P = H / 2 pairs of neighbours, and keys scaled by 1 / sqrt(H), as in the authors'
code.  Left out are the three normalizations of scores, by sqrt(H), by the sum of decays and by the
sum of weights: the norm per head makes any positive factor per query immaterial, epsilon aside.
The paper's values are twice as wide as its keys (`value_width`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import RECURRENCE, Entry, Paper
from attnlab.core.gates import Projection, narrowed, rms_unit, widened
from attnlab.core.linear_attention import (
    linear_attention,
    real_inputs,
    repeat_heads,
)
from attnlab.core.modules import RecurrentMechanism
from attnlab.core.rotary import turned

EPSILON = 1e-6


def retention_decay(num_heads: int, dtype: Any = jnp.float32) -> Float[Array, " N"]:
    """Log decays log(1 - 2^(-5-n)), exact where 1 - 2^(-5-n) is 1 in float32.

    Raises:
      ValueError: num_heads is not positive.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: expected a positive int, got {num_heads}.")
    return jnp.asarray(np.log1p(-np.exp2(-5.0 - np.arange(num_heads))), dtype)


def retention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    log_decay: Float[Array, " N"] | None = None,
    theta: float | None = 10_000.0,
    **options: Any,
) -> Any:
    """Retention, before the norm: "*B T N D".

    Args:
      log_decay: log gamma per query head; `retention_decay(N)` by default.
      theta: base of the rotations; None for none.
      options: as for `attnlab.linear_attention`; states have a head for each query head.

    Raises:
      ValueError: rotations of an odd head width, or a theta that is not positive.
    """
    query, key, value = real_inputs(query, key, value, options)
    *_, heads, width = query.shape
    dtype = query.dtype
    query, key, value = widened(query, key, value)
    if theta is not None:
        frequency = _frequency(width, theta, query.dtype)
        query = turned(query, frequency, offset=options.get("query_offset", 0))
        key = turned(key, frequency, offset=options.get("key_offset", 0))
    decay = retention_decay(heads, query.dtype) if log_decay is None else log_decay
    key, value = repeat_heads(key * width**-0.5, heads), repeat_heads(value, heads)
    return narrowed(linear_attention(query, key, value, log_decay=decay, **options), dtype)


def _frequency(width: int, theta: float, dtype: Any) -> Float[Array, " P"]:
    if theta <= 0:
        raise ValueError(f"theta: expected a positive number, got {theta}.")
    return jnp.asarray(theta ** -np.linspace(0.0, 1.0, width // 2), dtype)


class RetNet(RecurrentMechanism):
    """Retention, its norm per head and its gate; `gate.weight` "F N*D" is drawn small (2^-2.5)."""

    def __init__(
        self, features: int, num_heads: int, value_width: int, *, theta: float | None = 10_000.0,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.num_heads, self.theta = num_heads, theta
        small = nnx.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")
        self.gate = Projection(features, (num_heads, value_width), initializer=small, rngs=rngs)

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        (wide,) = widened(out)
        return narrowed(rms_unit(wide, epsilon=EPSILON) * jax.nn.silu(self.gate(x)), out.dtype)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return retention(query, key, value, theta=self.theta, **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> RetNet:
    return RetNet(num_heads * head_width, num_heads, head_width, rngs=rngs)


ENTRY = Entry(
    id="retnet",
    title="RetNet",
    family="linear",
    paper=Paper(
        "Retentive Network: A Successor to Transformer for Large Language Models",
        "Sun et al.",
        2023,
        "2307.08621",
    ),
    summary="Each head forgets at a fixed rate of its own; trained as a damped score matrix, "
    "decoded as a recurrence, read in chunks.",
    formula=r"S_t = \gamma_n S_{t-1} + k_t v_t^\top, \quad o_t = S_t^\top q_t, \quad "
    r"\gamma_n = 1 - 2^{-5-n}",
    patterns=("causal self",),
    time="O(T·H·D)",
    memory="O(T)",
    exact="Exact; weights are damped products, not those of softmax.",
    properties=frozenset({"translation-invariant", "gqa", "linear-memory", "state"}),
    function=retention,
    module=RetNet,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
