r"""TransNormer: lightning attention, a fixed decay per head and layer and one norm for all heads.

    o_t = SRMSNorm( sum_{s <= t} lambda^(t-s) (silu(q_t) . silu(k_s)) v_s ) * x_t W^U
    SRMSNorm(y) = y / sqrt(mean y^2 + 1e-6), over the channels of all heads

Qin et al. 2023, arXiv:2307.14995 (TransNormerLLM).  There is no scale and no sum of weights; the
first layer has relative positions besides (LRPE-d): score_ts sums q_c k_c cos(theta_c (t - s)),
with theta learned.  Lightning attention is the chunked form.  Two rules for lambda are known: that
of the released model, exp(-slope_n (1 - l / (L - 1) + 1e-5)) with ALiBi's slopes, and that of the
paper, exp(-(8 n / N) (1 - l / L)); heads n and layers l are counted from 0 in both.  Left out: the
gated linear unit between such layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import RECURRENCE, Entry, Paper
from attnlab.core.gates import Projection, control, narrowed, rms_unit, widened
from attnlab.core.linear_attention import (
    linear_attention,
    linear_state,
    real_inputs,
    repeat_heads,
)
from attnlab.core.modules import Mechanism
from attnlab.core.scores import alibi_slopes

EPSILON = 1e-6
RULES = ("release", "paper")


def lightning_decay(
    num_heads: int, *, layer: int = 0, num_layers: int = 1, rule: str = "release"
) -> Float[Array, " N"]:
    """Log decays of a layer's heads, by the rule of the released model or that of the paper.

    Raises:
      ValueError: an unknown rule, or a layer that is not one of so many.
    """
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer: expected 0 to {num_layers - 1} of {num_layers=}, got {layer}.")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}.")
    if rule == "release":
        depth = layer / max(num_layers - 1, 1)
        return -alibi_slopes(num_heads) * (1 - depth + 1e-5)
    heads = jnp.arange(num_heads, dtype=jnp.float32)
    return -8 * heads / num_heads * (1 - layer / num_layers)


def lightning_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    log_decay: Float[Array, " N"] | None = None,
    theta: Float[Array, "N H"] | None = None,
    **options: Any,
) -> Any:
    """Damped products of silu(q) and silu(k), before the norm: "*B T N D".

    Args:
      log_decay: log lambda per query head; `lightning_decay(N)` by default.
      theta: angles per step; each channel then counts twice, by cosine and sine of its angle, and
        states are 2H wide.  None: no positions but the decay.
      options: as for `attnlab.linear_attention`; states have a head for each query head.
    """
    query, key, value = real_inputs(query, key, value, options)
    heads, dtype = query.shape[-2], query.dtype
    query, key, value = widened(query, key, value)
    query, key = jax.nn.silu(query), repeat_heads(jax.nn.silu(key), heads)
    decay = lightning_decay(heads) if log_decay is None else log_decay
    if theta is not None:
        theta = control("theta", theta, query.shape[-2:], query.dtype)
        query = _angles(query, theta, options.get("query_offset", 0))
        key = _angles(key, theta, options.get("key_offset", 0))
    value = repeat_heads(value, heads)
    return narrowed(linear_attention(query, key, value, log_decay=decay, **options), dtype)


def _angles(x: Array, theta: Array, offset: Any) -> Array:
    """Each channel by the cosine and by the sine of its angle: the product has their difference."""
    position = (jnp.arange(x.shape[-3], dtype=jnp.int32) + offset).astype(x.dtype)
    angle = position[:, None, None] * theta[None]
    angle = jnp.expand_dims(angle, range(x.ndim - 3))
    return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], -1)


class TransNormer(Mechanism):
    """Lightning attention of layer `layer` of `num_layers`, with gate "F N*D" and norm.

    The first layer has angles `theta` "N H", 10,000^(-2 j / (N H)) at the start.
    """

    def __init__(
        self, features: int, num_heads: int, head_width: int, value_width: int, *,
        layer: int = 0, num_layers: int = 1, rule: str = "release", rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        lightning_decay(num_heads, layer=layer, num_layers=num_layers, rule=rule)  # checks
        self.num_heads, self.layer, self.num_layers, self.rule = num_heads, layer, num_layers, rule
        count = jnp.arange(num_heads * head_width, dtype=jnp.float32).reshape(num_heads, head_width)
        angles = 10_000.0 ** (-2 * count / count.size)
        self.theta = nnx.data(None if layer else nnx.Param(angles))
        normal = nnx.initializers.normal(0.02)
        self.gate = Projection(features, (num_heads, value_width), initializer=normal, rngs=rngs)

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        (wide,) = widened(out)
        return narrowed(rms_unit(wide, epsilon=EPSILON, axes=(-2, -1)) * self.gate(x), out.dtype)

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Float[Array, "*B N E D"]:
        width = head_width if self.theta is None else 2 * head_width
        return linear_state(batch_shape, self.num_heads, width, value_width)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        decay = lightning_decay(
            self.num_heads, layer=self.layer, num_layers=self.num_layers, rule=self.rule
        )
        theta = None if self.theta is None else self.theta[...]
        return lightning_attention(query, key, value, log_decay=decay, theta=theta, **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> TransNormer:
    features = num_heads * head_width
    return TransNormer(features, num_heads, head_width, head_width, num_layers=2, rngs=rngs)


ENTRY = Entry(
    id="transnormer",
    title="TransNormer",
    family="linear",
    paper=Paper(
        "TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
        "Qin et al.",
        2023,
        "2307.14995",
    ),
    summary="Linear attention with a fixed decay per head and layer, computed in chunks (lightning "
    "attention), normalized by one RMS over all heads and gated.",
    formula=r"o_t = \mathrm{SRMSNorm}\Big(\sum_{s \le t} \lambda^{t-s} (\hat q_t^\top \hat k_s)\, "
    r"v_s\Big) \odot x_t W^U, \quad \hat q = \mathrm{silu}(q)",
    patterns=("causal self",),
    time="O(T·H·D)",
    memory="O(T)",
    exact="Exact; weights are damped products and may be negative.",
    properties=frozenset({"translation-invariant", "gqa", "linear-memory", "state"}),
    function=lightning_attention,
    module=TransNormer,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
