r"""How scores become weights.

A normalizer that streams needs one pass over the keys.  There are two kinds:

    shared:    w_ij = f(s_ij) / sum_j f(s_ij), given by u = log f(s), so that softmax over u with a
               running maximum is exact and never overflows (softmax: u = s; softplus: log softplus)
    separate:  w_ij = f(s_ij), each pair on its own (sigmoid, squared ReLU)

Sparsemax and entmax need the whole row before any weight is known; they do not stream.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.core.terms import ArrayLeaf, Term, leaf


class Normalizer(Term):
    """Base: a subclass sets `kind` and defines the method of that kind."""

    kind: ClassVar[str]  # "shared", "separate" or "row"

    def log_weight(self, score: Float[Array, "..."]) -> Float[Array, "..."]:
        """Kind "shared": the logarithm of the unnormalized weight."""
        raise NotImplementedError

    def weight(self, score: Float[Array, "..."]) -> Float[Array, "..."]:
        """Kind "separate": the weight of a pair; 0 at -inf."""
        raise NotImplementedError

    def row_weights(
        self, score: Float[Array, "... S"], allowed: Bool[Array, "... S"]
    ) -> Float[Array, "... S"]:
        """Kind "row": the weights of whole rows; 0 where not allowed."""
        raise NotImplementedError

    def log_extra(self) -> Float[Array, "..."] | None:
        """Logarithm of what is added to the normalizing sum, "N" or a scalar; None for nothing."""
        return None


class Softmax(Normalizer):
    """softmax; with `sink` "N", exp(sink) joins each head's normalizing sum and carries no value.

    A sink lets a head attend to nothing.  Xiao et al. 2023, arXiv:2309.17453 found the need;
    learned per-head logits are the form used by recent open models.
    """

    kind: ClassVar[str] = "shared"
    sink: ArrayLeaf = leaf("N", default=None)

    def log_weight(self, score: Float[Array, "..."]) -> Float[Array, "..."]:
        return score

    def log_extra(self) -> Float[Array, "..."] | None:
        return self.sink


class SoftmaxPlusOne(Normalizer):
    """exp(s) / (1 + sum exp(s)): a sink whose logit is fixed at zero."""

    kind: ClassVar[str] = "shared"

    def log_weight(self, score: Float[Array, "..."]) -> Float[Array, "..."]:
        return score

    def log_extra(self) -> Float[Array, "..."] | None:
        return jnp.zeros((), jnp.float32)


def log_softplus(score: Float[Array, "..."]) -> Float[Array, "..."]:
    """The logarithm of softplus; s - e^s / 2 + ... where that underflows."""
    edge = jnp.log(jnp.finfo(score.dtype).eps)
    near = jnp.maximum(score, edge)
    return jnp.where(score > edge, jnp.log(jax.nn.softplus(near)), score)


class SoftplusL1(Normalizer):
    """softplus(s) / sum softplus(s)."""

    kind: ClassVar[str] = "shared"

    def log_weight(self, score: Float[Array, "..."]) -> Float[Array, "..."]:
        return log_softplus(score)


class TaylorSoftmax(Normalizer):
    """Softmax whose exponential is its second-order series, 1 + s + s^2 / 2 >= 1/2.

    It grows on both sides of its least value, at s = -1: very negative scores weigh much.
    """

    kind: ClassVar[str] = "shared"

    def log_weight(self, score: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.log1p(score * (1 + score / 2))


class Sigmoid(Normalizer):
    """sigmoid(s), pair by pair; rows do not sum to one (Ramapuram et al. 2024, arXiv:2409.04431).

    The bias that keeps the sum near one, -log n, is a score modifier: see `sigmoid_attention`.
    """

    kind: ClassVar[str] = "separate"

    def weight(self, score: Float[Array, "..."]) -> Float[Array, "..."]:
        return jax.nn.sigmoid(score)


class ReluSquared(Normalizer):
    """max(s, 0)^2, pair by pair (Hua et al. 2022, arXiv:2202.10447, there with scale 1/n)."""

    kind: ClassVar[str] = "separate"

    def weight(self, score: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.square(jax.nn.relu(score))


def _sorted_threshold(
    score: Float[Array, "... S"], allowed: Bool[Array, "... S"]
) -> tuple[Float[Array, "... S"], Float[Array, "... S"], Float[Array, "... _"]]:
    """Scores shifted by their row's maximum, the same in descending order, and ranks 1..S."""
    lowest = jnp.finfo(score.dtype).min / 4  # finite, so that sums and squares of it stay ordered
    top = jnp.max(jnp.where(allowed, score, -jnp.inf), axis=-1, keepdims=True)
    shifted = jnp.where(allowed, score - jnp.where(jnp.isfinite(top), top, 0), lowest)
    # Nothing further than 2 below the maximum ever gets weight, in sparsemax or in entmax-1.5.
    shifted = jnp.maximum(shifted, -4.0)
    descending = -jnp.sort(-shifted, axis=-1)
    ranks = jnp.arange(1, score.shape[-1] + 1, dtype=score.dtype)
    return shifted, descending, ranks.reshape((1,) * (score.ndim - 1) + (-1,))


class Sparsemax(Normalizer):
    """Euclidean projection onto the simplex: sparse weights (Martins & Astudillo 2016)."""

    kind: ClassVar[str] = "row"

    def row_weights(
        self, score: Float[Array, "... S"], allowed: Bool[Array, "... S"]
    ) -> Float[Array, "... S"]:
        z, descending, ranks = _sorted_threshold(score, allowed)
        sums = jnp.cumsum(descending, axis=-1)
        support = jnp.sum(ranks * descending > sums - 1, axis=-1, keepdims=True)
        tau = (jnp.take_along_axis(sums, support - 1, -1) - 1) / support.astype(score.dtype)
        return jnp.where(allowed, jax.nn.relu(z - tau), 0)


class Entmax15(Normalizer):
    """1.5-entmax: sparse, between softmax and sparsemax (Peters et al. 2019, arXiv:1905.05702)."""

    kind: ClassVar[str] = "row"

    def row_weights(
        self, score: Float[Array, "... S"], allowed: Bool[Array, "... S"]
    ) -> Float[Array, "... S"]:
        z, descending, ranks = _sorted_threshold(score / 2, allowed)
        mean = jnp.cumsum(descending, axis=-1) / ranks
        mean_square = jnp.cumsum(jnp.square(descending), axis=-1) / ranks
        spread = ranks * (mean_square - jnp.square(mean))
        delta = (1 - spread) / ranks
        tau = mean - jnp.where(delta > 0, jnp.sqrt(jnp.where(delta > 0, delta, 1)), 0)
        support = jnp.sum(tau <= descending, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(tau, support - 1, -1)
        return jnp.where(allowed, jnp.square(jax.nn.relu(z - chosen)), 0)
