r"""PGQA: grouped queries whose weights are disturbed by noise in training.

    out_i = sum_j (W - G)_ij v_j,      W = softmax(q k^T / sqrt(H))
    G_ij = mu_i + sigma_i z_ij where i sees j, 0 on the diagonal

with mu_i and sigma_i mean and deviation of row i of W, and z normal, standardised in its row; but
for the diagonal, rows of W - G sum to 0.  It is the third variant, beside those of
`key_driven_gqa`, of Khan, Khaquan, Tafveez, Samiwala & Raza 2024, arXiv:2408.08454: a case study of
what variability does where groups stand still.

In the authors' code the noise is uniform, subtracted from what is read, and there at inference
too; that was not followed.  Here it needs a random key; without one this is grouped queries.
Positions, heads and the key alone decide it, so that it does not depend on the implementation.
Gradients pass through mu and sigma.  Noise is no mechanism to compare by itself, so the atlas has
no entry of it.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnlab.core.attention import attention
from attnlab.core.dropout import key_words, pair_bits
from attnlab.core.modules import Mechanism
from attnlab.core.normalizers import Normalizer
from attnlab.core.refusals import refuse
from attnlab.core.scores import RowModifier, as_modifiers
from attnlab.core.terms import ArrayLeaf, At, leaf


class PerturbedRows(RowModifier):
    """Weights W - G in place of scores; `words` are those of a random key."""

    words: ArrayLeaf = leaf("")

    def rows(
        self, score: Float[Array, "... S"], at: At, allowed: Bool[Array, "... S"]
    ) -> Float[Array, "... S"]:
        top = jnp.max(jnp.where(allowed, score, -jnp.inf), axis=-1, keepdims=True)
        top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))
        weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, score - top, 0)), 0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.where(total == 0, 1, total)
        noise = normal_pairs(self.words, at, score.shape[:-3], score.dtype)
        return perturbed(weights, noise, allowed, at.relative == 0)


class _Weights(Normalizer):
    """Scores that are weights already."""

    kind: ClassVar[str] = "separate"

    def weight(self, score: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.where(jnp.isneginf(score), 0, score)


def normal_pairs(words: Array, at: At, batch: tuple[int, ...], dtype: Any) -> Array:
    """Normal numbers of all pairs "*B N t s", the same whatever the tile."""
    bits = pair_bits(words, at, batch)
    uniform = ((bits >> 8).astype(dtype) + 0.5) * 2.0**-24
    return jax.scipy.special.erfinv(2 * uniform - 1) * 2.0**0.5


def perturbed(
    weights: Float[Array, "... S"],
    noise: Float[Array, "... S"],
    allowed: Bool[Array, "... S"],
    own: Bool[Array, "... S"],
) -> Float[Array, "... S"]:
    """W - G for rows of weights; `own` is where i = j, and nothing is subtracted."""
    mean, _, deviation = _moments(weights, allowed)
    _, centred, spread = _moments(noise, allowed)
    given = mean + deviation * centred / jnp.where(spread > 0, spread, 1)
    return jnp.where(allowed & ~own, weights - given, weights)


def _moments(x: Array, allowed: Array) -> tuple[Array, Array, Array]:
    """Mean, distances from it, and deviation of what is allowed in each row."""
    count = jnp.maximum(jnp.sum(allowed, axis=-1, keepdims=True), 1).astype(x.dtype)
    mean = jnp.sum(jnp.where(allowed, x, 0), axis=-1, keepdims=True) / count
    centred = jnp.where(allowed, x - mean, 0)
    square = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / count
    deviation = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return mean, centred, deviation


def perturbed_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    noise_key: Any = None,
    **options: Any,
) -> Any:
    """PGQA, attention whose weights are W - G: "*B T N D".

    Args:
      noise_key: a JAX random key; None for no noise, as at inference.
      options: as for `attnlab.attention`; with noise, implementations "reference" and "blockwise",
        neither `normalizer` nor `return_lse`.

    Raises:
      TypeError: no random key.
      ValueError: an option that noise does not take.
      NotImplementedError: an implementation that streams over keys.
    """
    if noise_key is None:
        return attention(query, key, value, **options)
    options = refuse(options, "noise is for weights of softmax", "normalizer", "return_lse")
    noise = PerturbedRows(key_words(noise_key, "noise_key"))
    own = {"modifiers": (*as_modifiers(options.get("modifiers")), noise), "normalizer": _Weights()}
    return attention(query, key, value, **options | own)


class NoiseKey(nnx.Variable):
    """Words of a random key: kept, and not trained."""


class PGQA(Mechanism):
    """Equal groups and noise; plain grouped queries without a key.

    Args:
      noise_key: a JAX random key, or None.  `renew` sets another, as training does at every step;
        a layer that was made without one stays without.
    """

    function = staticmethod(perturbed_attention)

    def __init__(self, *, noise_key: Any = None) -> None:
        words = None if noise_key is None else NoiseKey(key_words(noise_key, "noise_key"))
        self.words = nnx.data(words)

    def renew(self, noise_key: Any) -> None:
        """Other noise."""
        if self.words is None:
            raise ValueError("noise_key: this layer was made without one, and has no noise.")
        self.words[...] = key_words(noise_key, "noise_key")

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        if self.words is not None:
            options.setdefault("noise_key", self.words[...])
        return perturbed_attention(query, key, value, **options)
