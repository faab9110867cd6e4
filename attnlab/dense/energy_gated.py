r"""Energy-gated attention: keys of high energy get more of every query's weight.

    A'_ij = A_ij g_ij / sum_j A_ij g_ij,     g_ij = sigmoid(alpha ((e_j - m_i) / d_i - tau))

A are softmax weights, e_j = w . x_j is read from the layer's input by one vector to a head, and
m_i, d_i are mean and standard deviation of the energies.  Zeris 2026, arXiv:2605.21842.  Weighing
by g and dividing by the sum is adding log g to the score, which is what runs here.

The released code takes m and d over the whole window, also for queries in its middle: training and
the published losses read the future through these two numbers.  Here they are taken over the keys
that query i sees, which is the same where nothing is masked, and for the last row of a window;
`statistics="window"` is the published form, and refuses a causal mask unless told that it may leak.
A bias of e and the weights of several scales, which the paper counts, cancel and are not kept.
Where the energies are alike (one key, say) they are taken as the mean, and the gate has no effect.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs, log_num_visible, mean_visible
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.gates import control, widened
from attnlab.core.mask_layout import without_causal
from attnlab.core.masks import as_mask
from attnlab.core.modules import Mechanism
from attnlab.core.normalizers import ReluSquared
from attnlab.core.reference import zero_bad
from attnlab.core.scores import ScoreModifier, after
from attnlab.core.terms import ArrayLeaf, At, accumulator, leaf
from attnlab.core.tokens import marked, to_queries

STEEPNESS, THRESHOLD = 2.0, 0.0
ALIKE = 64  # a deviation of fewer roundings of the mean is none
PASSED = ("mask", "query_offset", "key_offset", "implementation", "block_sizes")
STATISTICS = ("seen", "window")


class LogGate(ScoreModifier):
    """Adds log g: `energy` "B N S"; `mean` and `inverse`, of the deviation, "B N T"."""

    additive: ClassVar[bool] = True
    energy: ArrayLeaf = leaf("B N S")
    mean: ArrayLeaf = leaf("B N T")
    inverse: ArrayLeaf = leaf("B N T")
    steepness: ArrayLeaf = leaf("N")
    threshold: ArrayLeaf = leaf("N")

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        standard = (self.energy - self.mean) * self.inverse
        return score + jax.nn.log_sigmoid(self.steepness * (standard - self.threshold))


class Deviation(ScoreModifier):
    """Adds |e_j - m_i|: `energy` "B N S", `mean` "B N T"."""

    additive: ClassVar[bool] = True
    energy: ArrayLeaf = leaf("B N S")
    mean: ArrayLeaf = leaf("B N T")

    def __call__(self, score: Float[Array, "..."], at: At) -> Float[Array, "..."]:
        return score + jnp.abs(self.energy - self.mean)


def energy_gated_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    energy: Float[Array, "*B S N"],
    steepness: Float[Array, " N"] | None = None,
    threshold: Float[Array, " N"] | None = None,
    statistics: str = "seen",
    allow_leak: bool = False,
    **options: Any,
) -> Any:
    """Softmax attention gated by the energy of keys: "*B T N D".

    The keys' energies are read twice more, for mean and deviation.

    Args:
      energy: e, of each key for each query head.
      steepness, threshold: alpha, 2 by default, and tau, 0.
      statistics: "seen", over the keys that a query sees; "window", over all, as published.
      allow_leak: take "window" under a causal mask; a mask that is causal by its data is not
        noticed.
      options: as for `attnlab.attention`.

    Raises:
      ValueError: an energy of another shape, unknown statistics, or "window" under a causal mask.
    """
    query, key, value = check_inputs(query, key, value)
    num_heads, dtype = query.shape[-2], accumulator(query.dtype)
    energy = control("energy", energy, (*key.shape[:-2], num_heads), dtype)
    key, energy = marked(key, energy), zero_bad(energy)
    mask = _counted(options.get("mask"), statistics, allow_leak)
    mean, inverse = _statistics(query, energy, options | {"mask": mask})

    def by_head(x: Any, default: float) -> Array:
        return jnp.full(num_heads, default, dtype) if x is None else jnp.asarray(x)

    gate = LogGate(
        to_queries(energy), mean, inverse, by_head(steepness, STEEPNESS),
        by_head(threshold, THRESHOLD),
    )  # fmt: skip
    return attention(query, key, value, **after(gate, options))


def _counted(mask: Any, statistics: str, allow_leak: bool) -> Any:
    """The mask under which mean and deviation are taken."""
    if statistics not in STATISTICS:
        raise ValueError(f"statistics: expected one of {STATISTICS}, got {statistics!r}.")
    whole = None if mask is None else without_causal(as_mask(mask))
    if statistics == "seen" or whole is None:
        return mask
    if not allow_leak:
        raise ValueError(
            'statistics: "window" takes mean and deviation of later keys too, which a causal mask '
            'hides; use "seen", or allow_leak=True to measure what that does.'
        )
    return whole


def _statistics(query: Array, energy: Array, options: dict[str, Any]) -> tuple[Array, Array]:
    """Mean and inverse standard deviation of what each query sees, "*B N T"; 0 for no deviation.

    Squares of deviations are summed pair by pair: the mean square less the squared mean would lose
    what a few energies of alike size differ in.
    """
    known = {name: options[name] for name in PASSED if name in options}
    nothing = (jnp.zeros((*x.shape[:-1], 1), energy.dtype) for x in (query, energy[..., None]))
    seen = mean_visible(query, energy[..., None], **known)
    mean = to_queries(seen[..., 0])
    squares = attention(
        *nothing, jnp.ones((*energy.shape, 1), energy.dtype), normalizer=ReluSquared(),
        modifiers=Deviation(to_queries(energy), mean), **known,
    )  # fmt: skip
    count = jnp.exp(log_num_visible(query.astype(energy.dtype), energy[..., None], **known))
    variance = to_queries(squares[..., 0]) / count
    noise = ALIKE * float(jnp.finfo(energy.dtype).eps)
    alike = variance <= jnp.square(noise * mean)
    return mean, jnp.where(alike, 0.0, jax.lax.rsqrt(jnp.where(alike, 1.0, variance)))


class EnergyGatedAttention(Mechanism):
    """Holds w "F N", alpha "N" and tau "N"; a cache keeps energies as more channels of the keys.

    Args:
      features: width F of the layer's input.
      num_heads: query heads N.
      statistics, allow_leak: as for `energy_gated_attention`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        statistics: str = "seen",
        allow_leak: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        _counted(None, statistics, allow_leak)
        drawn = 0.02 * jax.random.normal(rngs.params(), (features, num_heads), param_dtype)
        self.direction = nnx.Param(drawn)
        self.steepness = nnx.Param(jnp.full(num_heads, STEEPNESS, param_dtype))
        self.threshold = nnx.Param(jnp.full(num_heads, THRESHOLD, param_dtype))
        self.statistics, self.allow_leak = statistics, allow_leak

    def keep(
        self,
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        x: Float[Array, "*B S F"],
    ) -> tuple[Array, Array]:
        """Keys with the energies that their query heads see behind them."""
        (wide,) = widened(x)
        energy = wide @ self.direction[...].astype(wide.dtype)
        heads = key.shape[-2], energy.shape[-1] // key.shape[-2]
        energy = energy.reshape(*energy.shape[:-1], *heads).astype(key.dtype)
        energy = jnp.broadcast_to(energy, (*key.shape[:-1], heads[1]))
        return jnp.concatenate([key, energy], axis=-1), value

    def kept_widths(self, head_width: int, value_width: int, num_kv_heads: int) -> tuple[int, int]:
        return head_width + self.direction.shape[-1] // num_kv_heads, value_width

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K E"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        """Attend to keys as `keep` returns them."""
        width = key.shape[-1] - self.direction.shape[-1] // key.shape[-2]
        key, energy = key[..., :width], key[..., width:]
        query, key, value = check_inputs(query, key, value)
        energy = energy.reshape(*energy.shape[:-2], -1)
        return energy_gated_attention(
            query, key, value, energy=energy, steepness=self.steepness[...],
            threshold=self.threshold[...], statistics=self.statistics,
            allow_leak=self.allow_leak, **options,
        )  # fmt: skip


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> EnergyGatedAttention:
    return EnergyGatedAttention(num_heads * head_width, num_heads, rngs=rngs)


ENTRY = Entry(
    id="energy-gated",
    title="Energy-gated attention",
    family="dense",
    paper=Paper(
        "Energy-Gated Attention: Spectral Salience as an Inductive Bias for Transformer Attention",
        "Zeris",
        2026,
        "2605.21842",
    ),
    summary="One vector to a head reads an energy from every token; tokens above the average of "
    "what a query sees get more of its weight, those below less.",
    formula=r"A'_{ij} \propto A_{ij}\, \sigma\!\left(\alpha \left(\frac{e_j - m_i}{d_i} - \tau"
    r"\right)\right), \qquad e_j = w^\top x_j",
    patterns=PATTERNS[:2],
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact; mean and deviation are those of the keys seen, which the paper's are not.",
    properties=frozenset(
        {"translation-invariant", "decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}
    ),
    function=energy_gated_attention,
    module=EnergyGatedAttention,
    build=_build,
)
