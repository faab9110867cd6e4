r"""Low-rank multi-head attention (LAMA): heads that are rank-1 factors of one bilinear score.

    z_mt = tanh((P^T c)_m (Q^T h_t)_m),     a_m = softmax_t z_m,     r_m = sum_t a_mt h_t

A sequence h "S F" is pooled to M vectors, read by a learned context c "F" or by one that is given.
Mehta, Rangwala & Ramakrishnan 2019, arXiv:1912.00835.  (P^T c)_m (Q^T h)_m = c^T (P_m Q_m^T) h, so
that P and Q "F M" take the place of M matrices "F F": 2 F M + F parameters with c, in linear time.
tanh keeps scores within [-1, 1]: no weight exceeds e^2 times another, and over a long sequence
attention is close to a mean; without it (`activation=False`) it need not be.

Read in a third-party implementation, which leaves out that scores may be divided by their length
over the M heads of a token.  Settled here: that comes after tanh, is off by default, and lengths
are sqrt(sum + 1e-6).  The paper's recurrent encoder and classifier are left out.

All M heads are queries (P^T c)_m Q_m of one head whose keys and values are h itself: nothing is
copied.  `low_rank_attention` is the score alone, for queries and keys of any width.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnlab.core.attention import attention
from attnlab.core.entry import Entry, Paper
from attnlab.core.gates import unit, widened
from attnlab.core.mask_layout import layout
from attnlab.core.masks import ArrayMask, Mask, as_mask, check_mask
from attnlab.core.modules import Mechanism
from attnlab.core.scores import ScoreFunction, after


def _tanh(score: Array, at: Any) -> Array:
    return jnp.tanh(score)


def low_rank_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    activation: bool = True,
    **options: Any,
) -> Any:
    """Softmax attention with scores tanh(q . k), or q . k without the activation: "*B T N D".

    H may be 1, where q is the context's factor and k the token's.

    Args:
      options: as for `attnlab.attention`; a scale, 1 by default, is within the tanh.
    """
    own = (ScoreFunction(_tanh),) if activation else ()
    return attention(query, key, value, **{"scale": 1.0} | after(own, options))


class LowRankAttention(Mechanism):
    """Attention with scores tanh(q . k); no parameters.

    With `head_width=1` a layer has rank-1 scores.
    """

    def __init__(self, *, activation: bool = True) -> None:
        self.activation = activation

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return low_rank_attention(query, key, value, activation=self.activation, **options)


class LamaPooling(nnx.Module):
    """The paper's layer: a sequence "*B S F" pooled to one vector for each of M heads.

    Holds the context c "F" and the factors P and Q "F M".

    Args:
      features: F.
      num_heads: M.
      normalize: divide the scores of a token by their length over the heads.
      activation: whether scores pass through tanh.
      implementation: as for `attnlab.attention`.

    Raises:
      ValueError: sizes that are not positive.
    """

    def __init__(
        self, features: int, num_heads: int, *, normalize: bool = False, activation: bool = True,
        implementation: str = "auto", rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        if min(features, num_heads) < 1:
            raise ValueError(f"num_heads: expected positive sizes, got {features=}, {num_heads=}.")
        draw = nnx.initializers.xavier_uniform()
        self.context = nnx.Param(draw(rngs.params(), (features, 1))[:, 0])
        self.context_factor = nnx.Param(draw(rngs.params(), (features, num_heads)))
        self.token_factor = nnx.Param(draw(rngs.params(), (features, num_heads)))
        self.normalize, self.activation = normalize, activation
        self.implementation = implementation

    def logits(
        self, x: Float[Array, "*B S F"], context: Float[Array, "*B F"] | None = None
    ) -> Float[Array, "*B M S"]:
        """(P^T c)_m (Q^T h_t)_m, before the activation, in float32 at least."""
        (wide,) = widened(x)
        return self._read(context, wide) @ jnp.swapaxes(wide, -1, -2)

    def _read(self, context: Any, x: Array) -> Float[Array, "*B M F"]:
        """(P^T c)_m Q_m, in the dtype of x."""
        context = self.context[...] if context is None else context
        factors = (self.context_factor[...], self.token_factor[...])
        context, own, other = (y.astype(x.dtype) for y in (context, *factors))
        rows = (context @ own)[..., None] * jnp.expand_dims(other.T, range(context.ndim - 1))
        return jnp.broadcast_to(rows, (*x.shape[:-2], *rows.shape[-2:]))

    def __call__(
        self,
        x: Float[Array, "*B S F"],
        *,
        context: Float[Array, "*B F"] | None = None,
        mask: Any = None,
    ) -> Float[Array, "*B M F"]:
        """What each head reads: "*B M F", in the dtype of `x`; zeros where all is masked.

        Args:
          context: in place of the learned c, one to a sequence.
          mask: which tokens are real: booleans "*B S", or padding such as `masks.KeyPadding`.

        Raises:
          TypeError: `x` is not floating-point, or a mask that is none.
          ValueError: `x` or `context` of another shape, a mask that does not fit or knows of order.
        """
        features = self.token_factor.shape[0]
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x: expected a floating-point array, got dtype {x.dtype}.")
        if x.ndim < 2 or x.shape[-1] != features:
            raise ValueError(f"x: expected shape (*B, S, {features}), got {x.shape}.")
        if context is not None:
            _check("context", context, (*x.shape[:-2], features))
        real = _real(mask, x)
        if real is not None:
            x = jnp.where(real[..., None], x, jnp.zeros((), x.dtype))
            mask = ArrayMask(real[..., None, None, :])
        (wide,) = widened(x)
        query, key = self._read(context, wide), wide
        score = partial(low_rank_attention, activation=self.activation)
        if self.normalize:
            query, key = self._unit_scores(query, wide)
            score = partial(attention, scale=1.0)
        query, key, value = (y.astype(x.dtype)[..., None, :] for y in (query, key, x))
        return score(query, key, value, mask=mask, implementation=self.implementation)[..., 0, :]

    def _unit_scores(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Scores of length 1 over the heads, as keys "*B S M"; each query picks its own."""
        scores = jnp.einsum("...mf,...sf->...sm", query, key)
        scores = unit(jnp.tanh(scores) if self.activation else scores)
        eye = jnp.eye(query.shape[-2], dtype=query.dtype)
        eye = jnp.expand_dims(eye, range(key.ndim - 2))
        return jnp.broadcast_to(eye, (*key.shape[:-2], *eye.shape[-2:])), scores


def _real(mask: Any, x: Float[Array, "*B S F"]) -> Bool[Array, "*B S"] | None:
    """Which tokens a mask leaves; None for all."""
    if mask is None:
        return None
    if not isinstance(mask, Mask):
        as_mask(mask)  # booleans, or a TypeError
        _check("mask", mask, x.shape[:-1])
        return jnp.asarray(mask)
    check_mask(mask, x.shape[:-2], {"N": 1, "T": 1, "S": x.shape[-2]})
    known = layout(mask, (1, x.shape[-2]))
    if known is None or known.causal or known.ids is not None or known.queries is not None:
        raise ValueError(
            f"mask: pooling has one reader, and no order; expected padding of keys or booleans of "
            f"shape {x.shape[:-1]}, got {type(mask).__name__}."
        )
    return None if known.keys is None else jnp.broadcast_to(known.keys, x.shape[:-1])


def _check(name: str, x: Array, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}.")


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> LowRankAttention:
    return LowRankAttention()


def _build_pooling(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> LamaPooling:
    return LamaPooling(num_heads * head_width, num_heads, rngs=rngs)


_PAPER = Paper(
    "Low Rank Factorization for Compact Multi-Head Self-Attention",
    "Mehta, Rangwala & Ramakrishnan",
    2019,
    "1912.00835",
)

ENTRY = Entry(
    id="low-rank-mhsa",
    title="Low-rank attention scores",
    family="heads",
    paper=_PAPER,
    summary="Scores are bounded by tanh and each may be a product of two numbers, so that a head "
    "costs two vectors in place of two matrices.",
    formula=r"a = \mathrm{softmax}(\tanh(q^\top k)), \qquad H = 1 \text{ for factors of rank one}",
    patterns=("noncausal self", "noncausal cross"),
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset(
        {
            "position-free", "translation-invariant", "gqa", "lse", "rows-sum-to-one",
            "linear-memory",
        }
    ),
    function=low_rank_attention,
    module=LowRankAttention,
    build=_build,
)  # fmt: skip

ENTRY_POOLING = Entry(
    id="lama-pooling",
    title="Low-rank multi-head pooling (LAMA)",
    family="heads",
    paper=_PAPER,
    summary="A learned context reads a sequence by several heads, rank-1 factors of one bilinear "
    "score, and pools it to as many vectors.",
    formula=r"z_{mt} = \tanh\!\left((P^\top c)_m (Q^\top h_t)_m\right), \qquad "
    r"r_m = \sum_t \mathrm{softmax}_t(z_m)_t\, h_t",
    patterns=("noncausal cross",),
    time="O(S·M·F)",
    memory="O(S)",
    exact="Exact.",
    properties=frozenset({"position-free", "linear-memory"}),
    function=low_rank_attention,
    module=LamaPooling,
    build=_build_pooling,
    masks="keys",
    kind="layer",
)
