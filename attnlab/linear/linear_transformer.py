r"""Linear transformer: a feature map in place of the exponential, and the order of products turned.

    o_i = sum_j phi(q_i) . phi(k_j) v_j / (sum_j phi(q_i) . phi(k_j) + eps),    phi(x) = elu(x) + 1

Katharopoulos, Vyas, Pappas & Fleuret 2020, arXiv:2006.16236; the epsilon in the denominator, 1e-6,
is that of the authors' code.  There is no 1 / sqrt(H).  Below 0, elu(x) + 1 is computed as exp(x):
as written it is exactly 0 in float32 from x = -17.3 on.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import PATTERNS, RECURRENCE, Entry, Paper
from attnlab.core.linear_attention import (
    linear_attention,
    linear_state,
    positive_features,
    real_inputs,
)
from attnlab.core.modules import Mechanism

EPSILON = 1e-6


def elu_plus_one(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The feature map elu(x) + 1, positive however small x is."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def linear_transformer_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    feature_map: Callable[[Array], Array] = elu_plus_one,
    epsilon: float = EPSILON,
    **options: Any,
) -> Any:
    """Kernelized attention in O(T + S): "*B T N D".

    Args:
      feature_map: from "... H" to "... M", not negative anywhere.
      epsilon: added to the sum of weights, which is what the authors do.
      options: as for `attnlab.linear_attention`.

    Raises:
      ValueError: a feature map that gives negative features (where values are known, outside jit).
    """
    query, key, value = real_inputs(query, key, value, options)
    features = positive_features(feature_map, query, key)
    return linear_attention(*features, value, normalize=True, epsilon=epsilon, **options)


class LinearTransformer(Mechanism):
    """Linear attention with elu + 1; no parameters."""

    function = staticmethod(linear_transformer_attention)

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Float[Array, "*B K H E"]:
        return linear_state(batch_shape, num_kv_heads, head_width, value_width + 1)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> LinearTransformer:
    return LinearTransformer()


ENTRY = Entry(
    id="linear-transformer",
    title="Linear transformer",
    family="linear",
    paper=Paper(
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        "Katharopoulos, Vyas, Pappas & Fleuret",
        2020,
        "2006.16236",
    ),
    summary="Scores are products of positive features, so keys and values can be summed up once: "
    "a causal transformer becomes an RNN whose state is a matrix.",
    formula=r"o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j)\, v_j^\top}"
    r"{\phi(q_i)^\top \sum_j \phi(k_j) + \epsilon}, \qquad \phi(x) = \mathrm{elu}(x) + 1",
    patterns=PATTERNS,
    time="O((T + S)·H·D)",
    memory="O(T + S)",
    exact="Exact; weights are those of its kernel, not of softmax.",
    properties=frozenset(
        {"position-free", "translation-invariant", "decode", "gqa", "linear-memory", "state"}
    ),
    function=linear_transformer_attention,
    module=LinearTransformer,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
