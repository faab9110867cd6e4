r"""Selective self-attention: each query has a temperature of its own, and each value a gain.

    out_i = sum_j softmax_j(tau_i q_i . k_j / sqrt(H)) t_j v_j
    tau_i = 1 + tanh(w . gelu(q_i)) + sigmoid(alpha) log n_i,      t_j = 1 + tanh(u . gelu(v_j))

n_i counts the keys that query i sees: the row's number under a causal mask.  Zhang, Chang, Li,
Roy-Chowdhury, Chen & Oymak 2024, arXiv:2411.12892.  A fixed temperature lets attention dilute as
keys come into view; one that grows with log n keeps a key that scores m above all others visible
exactly where sigmoid(alpha) m >= 1.

The paper's token temperature is a small network that shares a projection of the layer; here, where
details could not be confirmed, that is the query (or value) itself under one gelu, so that a layer
has fewer than three numbers more per feature, and all start as softmax attention but for the 2% of
log n that sigmoid(-4) is.  There is one alpha to a layer, as in the authors' released code, which
has the position's part alone: `token=False`.  Left out: the paper's larger variant with a network
of its own on the layer's input, and values that grow with log n.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs, log_num_visible
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.gates import narrowed, widened
from attnlab.core.modules import Mechanism
from attnlab.core.tokens import per_token

START = -4.0  # of alpha


def token_gain(x: Float[Array, "*B S K H"], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 + tanh(w . gelu(x)), in (0, 2): "*B S K 1".  `weight` is "H" or "K H"."""
    weight = jnp.expand_dims(weight.astype(x.dtype), range(x.ndim - weight.ndim))
    return 1 + jnp.tanh(jnp.sum(weight * jax.nn.gelu(x, approximate=False), -1, keepdims=True))


def selected_values(
    value: Float[Array, "*B S K D"], weight: Float[Array, "..."]
) -> Float[Array, "*B S K D"]:
    """Values times their gains t, in their own dtype.

    Args:
      weight: u, "D" or "K D".

    Raises:
      ValueError: another shape.
    """
    _check("value_weight", weight, value.shape, (value.shape[-1:], value.shape[-2:]))
    (wide,) = widened(value)
    return narrowed(per_token(lambda v: v * token_gain(v, weight), wide), value.dtype)


def selective_self_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    alpha: Float[Array, ""] | float = START,
    query_weight: Float[Array, "..."] | None = None,
    value_weight: Float[Array, "..."] | None = None,
    **options: Any,
) -> Any:
    """Softmax attention with temperatures of queries and gains of values: "*B T N D".

    Args:
      alpha: of the position's part; -inf for none.
      query_weight: w, "N H"; None leaves the token's part out.
      value_weight: u, "D" or "K D"; None leaves the values as they are.
      options: as for `attnlab.attention`.

    Raises:
      ValueError: weights of another shape.
    """
    query, key, value = check_inputs(query, key, value)
    log_n = jnp.swapaxes(log_num_visible(query, key, **options), -1, -2)[..., None]
    position = jax.nn.sigmoid(jnp.asarray(alpha, log_n.dtype)) * log_n
    (wide,) = widened(query)
    if query_weight is None:
        sharpened = wide * (1 + position)
    else:
        _check("query_weight", query_weight, query.shape, (query.shape[-2:],))
        gains = per_token(lambda q: token_gain(q, query_weight), wide)
        sharpened = wide * (gains + position)
    if value_weight is not None:
        value = selected_values(value, value_weight)
    return attention(narrowed(sharpened, query.dtype), key, value, **options)


def _check(name: str, weight: Any, shape: tuple[int, ...], allowed: tuple[Any, ...]) -> None:
    if jnp.shape(weight) not in allowed:
        raise ValueError(
            f"{name}: expected shape {' or '.join(map(str, allowed))} for an array of shape "
            f"{shape}, got {jnp.shape(weight)}."
        )


class SelectiveSelfAttention(Mechanism):
    """Holds w "N H", u "D" for the values of all heads, and alpha; a cache keeps selected values.

    Args:
      num_heads, head_width: query heads N and their width H.
      value_width: D; H by default.
      token: whether tokens have temperatures and gains; else positions alone.
    """

    def __init__(
        self,
        num_heads: int,
        head_width: int,
        *,
        value_width: int | None = None,
        token: bool = True,
        param_dtype: Any = jnp.float32,
    ) -> None:
        def zeros(*shape: int) -> Any:
            return nnx.data(nnx.Param(jnp.zeros(shape, param_dtype)) if token else None)

        self.alpha = nnx.Param(jnp.asarray(START, param_dtype))
        self.query_weight = zeros(num_heads, head_width)
        self.value_weight = zeros(value_width or head_width)

    def keep(
        self,
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        x: Float[Array, "*B S F"],
    ) -> tuple[Array, Array]:
        if self.value_weight is None:
            return key, value
        return key, selected_values(value, self.value_weight[...])

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        """Attend to values that were selected by `keep`."""
        weight = None if self.query_weight is None else self.query_weight[...]
        return selective_self_attention(
            query, key, value, alpha=self.alpha[...], query_weight=weight, **options
        )


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> SelectiveSelfAttention:
    return SelectiveSelfAttention(num_heads, head_width)


ENTRY = Entry(
    id="selective-self-attention",
    title="Selective self-attention",
    family="normalization",
    paper=Paper(
        "Selective Attention: Enhancing Transformer through Principled Context Control",
        "Zhang, Chang, Li, Roy-Chowdhury, Chen & Oymak",
        2024,
        "2411.12892",
    ),
    summary="A query's temperature is read from the query and from how many keys it sees, so that "
    "each decides how sparse its attention is; values are damped by a gain of their own.",
    formula=r"o_i = \sum_j \operatorname{softmax}_j\!\left(\tau_i \frac{q_i^\top k_j}{\sqrt{H}}"
    r"\right) t_j v_j, \qquad \tau_i = 1 + \tanh(w^\top \mathrm{gelu}(q_i)) "
    r"+ \sigma(\alpha) \log n_i",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact; values are scaled, so weights times gains do not sum to one.",
    properties=frozenset(
        {"position-free", "translation-invariant", "decode", "gqa", "lse", "linear-memory"}
    ),
    function=selective_self_attention,
    module=SelectiveSelfAttention,
    build=_build,
)
