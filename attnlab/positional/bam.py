r"""The Bayesian attention mechanism: positional encoding is a prior over where to look.

    A_ij = softmax_j(q_i . k_j / sqrt(H) + log p(j | i))
    log p(j | i) = -e^scale (|j - i - mu| + eps)^shape,   mu = e^loc - e^-loc

with scale, shape and loc learned per head.  Bianchessi, Aguirre, Barros & Kupssinskü 2025,
arXiv:2505.22842.  The prior is a generalised Gaussian: shape 1 is a Laplace distribution, which is
ALiBi; a scale going to -infinity, or shape 0, is the uniform one, which is NoPE; shape below 1 has
a heavy tail, and shape below 0 even turns away from near keys.  The prior's normalizing constant
cancels in the softmax.  As in the authors' code, scale starts at the logarithm of ALiBi's slopes,
shape at 1 and loc at 0, and eps = 1e-5 keeps the derivative in `shape` finite at distance zero.

BAM-SSMax multiplies scores and prior by s_n log n_i, with n_i the number of keys that query i sees
(in packed documents, of its own document) and s_n a learned number per head that starts at 1:
scalable softmax, Nakanishi 2025, arXiv:2501.19399, without its optional bias.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs, log_num_visible
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.modules import Mechanism
from attnlab.core.scores import ScoreModifier, after, alibi_slopes
from attnlab.core.terms import ArrayLeaf, At, leaf, static


class GeneralizedGaussianPrior(ScoreModifier):
    """Adds log p(j | i), up to its constant; `scale`, `shape`, `loc` are "N"."""

    additive: ClassVar[bool] = True
    scale: ArrayLeaf = leaf("N")
    shape: ArrayLeaf = leaf("N")
    loc: ArrayLeaf = leaf("N")
    eps: float = static(default=1e-5)

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        mu = jnp.exp(self.loc) - jnp.exp(-self.loc)
        distance = jnp.abs(at.relative.astype(score.dtype) - mu) + self.eps
        return score - jnp.exp(self.scale) * distance**self.shape


def bam_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    prior_scale: Float[Array, " N"],
    prior_shape: Float[Array, " N"],
    prior_loc: Float[Array, " N"] | None = None,
    eps: float = 1e-5,
    **options: Any,
) -> Any:
    """Softmax attention with a generalised Gaussian prior: "*B T N D".

    Args:
      prior_scale: logarithm of the prior's inverse width, one per query head.
      prior_shape: its exponent.
      prior_loc: its location mu = e^loc - e^-loc, in positions from the query; 0 by default.
      eps: added to distances, in positions.
      options: as for `attnlab.attention`.
    """
    loc = jnp.zeros_like(prior_scale) if prior_loc is None else prior_loc
    prior = GeneralizedGaussianPrior(prior_scale, prior_shape, loc, eps)
    return attention(query, key, value, **after(prior, options))


def bam_ssmax_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    length_scale: Float[Array, " N"],
    prior_scale: Float[Array, " N"],
    prior_shape: Float[Array, " N"],
    prior_loc: Float[Array, " N"] | None = None,
    eps: float = 1e-5,
    **options: Any,
) -> Any:
    """BAM with scalable softmax: "*B T N D".

    Args:
      length_scale: s, one per query head; scores and prior are multiplied by s log n.
      prior_scale, prior_shape, prior_loc, eps, options: as for `bam_attention`.
    """
    query, key, value = check_inputs(query, key, value)
    loc = jnp.zeros_like(prior_scale) if prior_loc is None else prior_loc
    log_n = log_num_visible(query, key, **options)
    factor = length_scale.astype(log_n.dtype).reshape((1,) * (log_n.ndim - 2) + (-1, 1)) * log_n
    own = (
        GeneralizedGaussianPrior(prior_scale, prior_shape, loc, eps),
        _Sharpen(factor[..., None]),
    )
    return attention(query, key, value, **after(own, options))


class _Sharpen(ScoreModifier):
    """Multiply by a factor that broadcasts to "*B N T S"."""

    factor: ArrayLeaf = leaf("B N T S")

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        return score * self.factor


class BAM(Mechanism):
    """BAM; holds scale, shape and loc of each head's prior.

    Args:
      num_heads: query heads N.
      train_loc: whether loc is a parameter; fixed at 0 otherwise, as in the authors' defaults.
      eps: added to distances, in positions.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        train_loc: bool = False,
        eps: float = 1e-5,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.scale = nnx.Param(jnp.log(alibi_slopes(num_heads)).astype(param_dtype))
        self.shape = nnx.Param(jnp.ones(num_heads, param_dtype))
        self.loc = nnx.data(nnx.Param(jnp.zeros(num_heads, param_dtype)) if train_loc else None)
        self.eps = eps

    def prior(self) -> dict[str, Any]:
        """The prior's parameters, as `bam_attention` takes them."""
        loc = None if self.loc is None else self.loc[...]
        return {
            "prior_scale": self.scale[...],
            "prior_shape": self.shape[...],
            "prior_loc": loc,
            "eps": self.eps,
        }

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return bam_attention(query, key, value, **self.prior(), **options)


class BAMSSMax(BAM):
    """BAM with scalable softmax; also holds a length scale per head."""

    def __init__(self, num_heads: int, **options: Any) -> None:
        super().__init__(num_heads, **options)
        self.length_scale = nnx.Param(jnp.ones_like(self.scale[...]))

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return bam_ssmax_attention(
            query, key, value, length_scale=self.length_scale[...], **self.prior(), **options
        )


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> BAM:
    return BAM(num_heads, train_loc=True)


def _build_ssmax(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> BAMSSMax:
    return BAMSSMax(num_heads, train_loc=True)


_PAPER = Paper(
    "Bayesian Attention Mechanism: A Probabilistic Framework for Positional Encoding and Context "
    "Length Extrapolation",
    "Bianchessi, Aguirre, Barros & Kupssinskü",
    2025,
    "2505.22842",
)
_PROPERTIES = frozenset(
    {"translation-invariant", "decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}
)

ENTRY = Entry(
    id="bam",
    title="Bayesian attention mechanism",
    family="positional",
    paper=_PAPER,
    summary="Position enters as a log-prior over keys: a generalised Gaussian whose scale, shape "
    "and location each head learns. NoPE and ALiBi are special cases.",
    formula=r"A_{ij} = \operatorname{softmax}_j\!\left(\frac{q_i^\top k_j}{\sqrt{H}} - "
    r"e^{\alpha} \left(|j - i - \mu| + \varepsilon\right)^{\beta}\right)",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=_PROPERTIES,
    function=bam_attention,
    module=BAM,
    build=_build,
)

ENTRY_SSMAX = Entry(
    id="bam-ssmax",
    title="Bayesian attention mechanism with scalable softmax",
    family="positional",
    paper=_PAPER,
    summary="BAM whose scores and prior are multiplied by a learned multiple of log n, so that "
    "attention does not fade as more keys come into view.",
    formula=r"A_{ij} = \operatorname{softmax}_j\!\left(s \log n_i \left[\frac{q_i^\top k_j}"
    r"{\sqrt{H}} - e^{\alpha} \left(|j - i - \mu| + \varepsilon\right)^{\beta}\right]\right)",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=_PROPERTIES,
    function=bam_ssmax_attention,
    module=BAMSSMax,
    build=_build_ssmax,
)
