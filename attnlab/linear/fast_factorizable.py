r"""FAST (Fastmax): the exponential cut off after its square, which factorizes.

    w_ts = f(x_ts) / sum_s' f(x_ts'),   f(x) = sum_{l <= p} x^l / l!,   x_ts = q^_t . k^_s / tau

with normalized queries and keys q^, k^ and p = 1 or 2.  Gerami, Hoover, Dulepet & Duraiswami 2024,
arXiv:2402.07901: an all-to-all matrix of weights in O(n H^(p+1)) time, for f(q . k) is a product of
(H + 1)(H + 2) / 2 features [1, x, x_i^2 / sqrt 2, x_i x_j].  For p = 2, f is at least 1/2; for
p = 1 weights may be negative and may sum to nothing, so p = 2 is the default.

The authors' repositories normalize in different ways.  "token", the default here, makes each token
have mean 0 and variance 1 over its channels, and alone knows nothing of other tokens; "max" takes
off that mean and divides by the longest token of the example and head, as their later code does.
Their dropout of quadratic features is left out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import PATTERNS, RECURRENCE, Entry, Paper
from attnlab.core.linear_attention import (
    linear_attention,
    linear_state,
    real_inputs,
    real_positions,
)
from attnlab.core.modules import Mechanism
from attnlab.core.recurrence import state_dtype

EPSILON = 1e-6


def taylor_features(x: Float[Array, "*S H"], order: int = 2) -> Float[Array, "*S M"]:
    """Features whose products are 1 + x . y + (x . y)^2 / 2, or the first two terms."""
    terms = [jnp.ones_like(x[..., :1]), x]
    if order == 2:
        rows, cols = np.triu_indices(x.shape[-1])
        weight = jnp.asarray(np.where(rows == cols, 0.5**0.5, 1.0), x.dtype)
        weight = jnp.expand_dims(weight, range(x.ndim - 1))
        terms.append(x[..., rows] * x[..., cols] * weight)
    return jnp.concatenate(terms, -1)


def fastmax_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    order: int = 2,
    normalization: str | None = "token",
    temperature: float = 1.0,
    **options: Any,
) -> Any:
    """Attention by a polynomial of the scores, O((T + S) H^(order + 1)): "*B T N D".

    Args:
      order: p, 1 or 2.
      normalization: of queries and keys: "token", "max" (not causal), or None.
      temperature: tau, which divides scores.
      options: as for `attnlab.linear_attention`.

    Raises:
      ValueError: another order or normalization, a temperature that is not positive, or "max" with
        a causal mask.
    """
    _check(order, normalization, temperature)
    query, key, value = real_inputs(query, key, value, options)
    dtype, wide = query.dtype, state_dtype(query.dtype)
    query, key, value = (x.astype(wide) for x in (query, key, value))
    if normalization == "max":
        known = real_positions(query, key, options)
        if known.causal or options.get("causal"):
            raise ValueError(
                'normalization: "max" looks at every token, later ones too; with a causal mask '
                'expected "token" or None.'
            )
        query, key = _by_longest(query), _by_longest(key)
    elif normalization == "token":
        query, key = _standardized(query), _standardized(key)
    features = (taylor_features(x * temperature**-0.5, order) for x in (query, key))
    found = linear_attention(*features, value, normalize=True, **options)
    out, *state = found if options.get("return_state") else (found,)
    return (out.astype(dtype), *state) if state else out.astype(dtype)


def _check(order: Any, normalization: Any, temperature: Any) -> None:
    if order not in (1, 2):
        raise ValueError(f"order: expected 1 or 2, got {order!r}.")
    if normalization not in ("token", "max", None):
        raise ValueError(f'normalization: expected "token", "max" or None, got {normalization!r}.')
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}.")


def _standardized(x: Array) -> Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPSILON)


def _by_longest(x: Array) -> Array:
    x = x - jnp.mean(x, -1, keepdims=True)  # what is hidden is zero, and stays so
    squares = jnp.max(jnp.sum(jnp.square(x), -1, keepdims=True), -3, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, EPSILON))


class Fastmax(Mechanism):
    """FAST attention; no parameters."""

    def __init__(
        self, order: int = 2, *, normalization: str | None = "token", temperature: float = 1.0
    ) -> None:
        _check(order, normalization, temperature)
        self.order, self.normalization, self.temperature = order, normalization, temperature

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Any:
        if self.normalization == "max":
            return None
        width = 1 + head_width
        width = width * (width + 1) // 2 if self.order == 2 else width
        return linear_state(batch_shape, num_kv_heads, width, value_width + 1)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return fastmax_attention(
            query, key, value, order=self.order, normalization=self.normalization,
            temperature=self.temperature, **options,
        )  # fmt: skip


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> Fastmax:
    return Fastmax()


ENTRY = Entry(
    id="fast-factorizable",
    title="FAST (Fastmax)",
    family="linear",
    paper=Paper(
        "FAST: Factorizable Attention for Speeding up Transformers",
        "Gerami, Hoover, Dulepet & Duraiswami",
        2024,
        "2402.07901",
    ),
    summary="The exponential of softmax cut off after its square: all pairs meet, and yet the "
    "matrix of weights factorizes.",
    formula=r"w_{ts} = \frac{f(\hat q_t^\top \hat k_s)}{\sum_{s'} f(\hat q_t^\top \hat k_{s'})}, "
    r"\qquad f(x) = 1 + x + \tfrac{1}{2} x^2",
    patterns=PATTERNS,
    time="O((T + S)·H²·D)",
    memory="O((T + S)·H²)",
    exact="Exact; a second-order Taylor polynomial in place of the exponential.",
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
    function=fastmax_attention,
    module=Fastmax,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
