r"""LSSA and LSSAR: softplus weights of unit vectors, sharpened by a power of what is above par.

    s_ij = log(H) log(N_i) q_i/|q_i| . k_j/|k_j|,     A_ij = softplus(s_ij) / sum_j softplus(s_ij)
    R_ij = max(N_i A_ij - o_i, 0)^p / sum_j max(N_i A_ij - o_i, 0)^p

N_i counts the keys that query i sees, so N_i A_ij is a weight against the uniform one; o_i = 1 but
0 where three keys or fewer are seen.  Gao, Spratling & Gionfrida 2025, arXiv:2501.13428.  The paper
was read in notes and reimplementations that agree; it has p = 15 (3 is as good at the length of
training only).  No power is formed here: R is the softmax of p log(N_i A_ij - o_i), as 4096^15
overflows.  N_i is the row's number in the paper, which the count equals under a causal mask.

A row none of whose keys is above par (all scores equal, up to rounding) reads nothing: zeros.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs, log_num_visible
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.modules import Mechanism
from attnlab.core.normalizers import SoftplusL1, log_softplus
from attnlab.core.reference import zero_bad
from attnlab.core.refusals import refuse
from attnlab.core.scores import PairScale, ScoreModifier, after
from attnlab.core.terms import ArrayLeaf, At, accumulator, leaf, static
from attnlab.core.tokens import to_keys, to_queries

POWER = 15.0
FEW = 3  # rows that see no more keys keep all of them
EPSILON = 1e-6  # added to squared lengths
ROUNDINGS = 32  # above par by fewer of them is noise


class AbovePar(ScoreModifier):
    """p log(N A - o) of a softplus weight A, from its score; -inf where that is not positive.

    `log_total` "B N T": of the sum of the row's softplus; `log_count` "B N T": of N.
    """

    log_total: ArrayLeaf = leaf("B N T")
    log_count: ArrayLeaf = leaf("B N T")
    power: float = static(default=POWER)

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        relative = jnp.exp(log_softplus(score) + self.log_count - self.log_total)
        offset = (self.log_count > math.log(FEW + 0.5)).astype(score.dtype)
        above = relative - offset
        # Asked this way, NaN is not below par: whoever sees it shall notice.
        below = above <= ROUNDINGS * float(jnp.finfo(score.dtype).eps)
        safe = jnp.where(below, jnp.ones_like(above), above)
        return jnp.where(below, -jnp.inf, self.power * jnp.log(safe))


def softplus_reweighting_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    power: float | None = POWER,
    **options: Any,
) -> Float[Array, "*B T N D"]:
    """LSSAR, or LSSA where the power is None: "*B T N D".

    The keys are read twice: first for the sums of softplus, then for what lies above par.

    Args:
      power: p > 0.
      options: as for `attnlab.attention`, but for `scale`, `normalizer` and `return_lse`.

    Raises:
      ValueError: a power that is not positive, or an option that has no meaning here.
    """
    query, key, value = check_inputs(query, key, value)
    _check_power(power)
    own = "softplus re-weighting has its own"
    options = refuse(options, own, "scale", "normalizer", "return_lse")
    count = log_num_visible(query, key, **options)
    rows = math.log(query.shape[-1]) * count * to_queries(_inverse_length(query))
    cosine = PairScale(rows, to_keys(_inverse_length(key), query.shape[-2]))
    first = after(cosine, options) | {"scale": 1.0}
    if power is None:
        return attention(query, key, value, normalizer=SoftplusL1(), **first)
    sums = {name: x for name, x in first.items() if not name.startswith("dropout")}
    nothing = jnp.zeros_like(value[..., :1])
    _, total = attention(query, key, nothing, normalizer=SoftplusL1(), return_lse=True, **sums)
    sharpen = AbovePar(zero_bad(total), count, power)
    return attention(query, key, value, **first | {"modifiers": (*first["modifiers"], sharpen)})


def _inverse_length(x: Float[Array, "*B S K H"]) -> Float[Array, "*B S K"]:
    """1 / |x|, float32 at least; what is not finite is left to the vectors."""
    wide = zero_bad(x).astype(accumulator(x.dtype))
    return jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1) + EPSILON)


def _check_power(power: float | None) -> None:
    if power is not None and not 0 < power < math.inf:
        raise ValueError(f"power: expected a positive number or None, got {power}.")


class SoftplusReweighting(Mechanism):
    """LSSAR with a power, LSSA with None; no parameters.

    Raises:
      ValueError: a power that is not positive.
    """

    def __init__(self, power: float | None = POWER) -> None:
        _check_power(power)
        self.power = power

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return softplus_reweighting_attention(query, key, value, power=self.power, **options)


def _build(num_heads: int, head_width: int, *, rngs: Any) -> SoftplusReweighting:
    return SoftplusReweighting()


ENTRY = Entry(
    id="softplus-reweighting",
    title="Softplus attention with re-weighting",
    family="normalization",
    paper=Paper(
        "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
        "Gao, Spratling & Gionfrida",
        2025,
        "2501.13428",
    ),
    summary="Softplus takes the exponential's place, a logarithm of the length its temperature, "
    "and a power sharpens what is above the uniform weight: the loss hardly grows with the length.",
    formula=r"R_{ij} \propto \max(N_i A_{ij} - 1, 0)^p, \qquad A_{ij} \propto \mathrm{softplus}"
    r"\!\left(\log H \log N_i \frac{q_i^\top k_j}{\lVert q_i \rVert \lVert k_j \rVert}\right)",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact, by design: a row none of whose keys is above par is zero.",
    properties=frozenset(
        {"position-free", "translation-invariant", "decode", "gqa", "linear-memory"}
    ),
    function=softplus_reweighting_attention,
    module=SoftplusReweighting,
    build=_build,
)
