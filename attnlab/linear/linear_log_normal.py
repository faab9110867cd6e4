r"""Linear log-normal attention (LLN): exponential features, as concentrated as softmax.

    w_ts = sum_h exp(alpha q_th) exp(beta k_sh) / sum_s' sum_h exp(alpha q_th) exp(beta k_s'h)

    alpha = c / sigma_q,   beta = c / sigma_k,   c^2 = (sigma_q^2 sigma_k^2 - b) / (2 a)

with the spreads sigma of queries and keys.  Nahshan, Kampeas & Haleva 2023, arXiv:2311.13541: for
Gaussian inputs both softmax attention and this are nearly log-normal, and alpha and beta match the
variance of log w to that of softmax; a, b are the constants of the authors' code, a linear fit.
LLN + Diag averages LLN with softmax attention inside blocks as long as a head is wide.

The authors take the spreads over a whole batch; here over the positions of an example and a head,
padding left out, without gradient.  Spreads over a sequence tell of its future: a causal mask needs
alpha and beta given.  There is no 1 / sqrt(H) but in the blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnlab.core.attention import attention
from attnlab.core.entry import PATTERNS, RECURRENCE, Entry, Paper
from attnlab.core.linear_attention import real_inputs, real_positions, repeat_heads
from attnlab.core.masks import Segments, as_mask
from attnlab.core.modules import Mechanism
from attnlab.core.past_softmax import exponential_attention, peak_state
from attnlab.core.recurrence import state_dtype

SLOPE, OFFSET = 0.14855178144710912, -0.35487039130661086  # a and b
LEAST_SPREAD = 1e-6
HYBRIDS = ("average", "scale", "ratio")


def matched(sigma_q: Any, sigma_k: Any) -> tuple[Array, Array]:
    """Alpha and beta for queries and keys of these standard deviations."""
    sigma_q, sigma_k = (jnp.maximum(jnp.asarray(x), LEAST_SPREAD) for x in (sigma_q, sigma_k))
    common = jnp.sqrt((jnp.square(sigma_q * sigma_k) - OFFSET) / (2 * SLOPE))
    return common / sigma_q, common / sigma_k


def spread(
    x: Float[Array, "*B S K H"], real: Bool[Array, "*B S"] | None = None
) -> Float[Array, "*B K"]:
    """Standard deviation over the real positions and channels of each example and head."""
    real = jnp.ones(x.shape[:-2], bool) if real is None else jnp.broadcast_to(real, x.shape[:-2])
    weight = real[..., None, None].astype(x.dtype)
    count = jnp.maximum(jnp.sum(weight, -3) * x.shape[-1], 1)
    mean = jnp.sum(x * weight, (-3, -1))[..., None] / count
    squares = jnp.square((x - mean[..., None, :, :]) * weight)
    return jnp.sqrt(jnp.sum(squares, (-3, -1)) / count[..., 0])


def lln_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    alpha: Any = None,
    beta: Any = None,
    **options: Any,
) -> Any:
    """Exponential features of matched concentration, O(T + S): "*B T N D".

    Args:
      alpha, beta: both numbers, such as `matched` gives; None: from the spreads of these queries
        and keys.
      options: as for `attnlab.linear_attention`; a state is a `PeakState`.

    Raises:
      ValueError: one of alpha and beta without the other, or neither with a causal mask.
    """
    query, key, value = real_inputs(query, key, value, options)
    dtype, wide = query.dtype, state_dtype(query.dtype)
    query, key, value = (x.astype(wide) for x in (query, key, value))
    if (alpha is None) != (beta is None):
        raise ValueError(f"alpha: expected numbers for both or for none, got {alpha=}, {beta=}.")
    if alpha is None:
        known = real_positions(query, key, options)
        if known.causal or options.get("causal"):
            raise ValueError(
                "alpha: expected numbers for alpha and beta with a causal mask, as spreads over a "
                "sequence tell of its future; got None. `matched` gives them for known spreads."
            )
        key, value = (repeat_heads(x, query.shape[-2]) for x in (key, value))
        found = jax.lax.stop_gradient((spread(query, known.queries), spread(key, known.keys)))
        alpha, beta = (x[..., None, :, None] for x in matched(*found))
    query, key = query * jnp.asarray(alpha, wide), key * jnp.asarray(beta, wide)
    found = exponential_attention(query, key, value, **options)
    out, *state = found if options.get("return_state") else (found,)
    return (out.astype(dtype), *state) if state else out.astype(dtype)


def diagonal_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    block_size: int | None = None,
    mask: Any = None,
    **options: Any,
) -> Float[Array, "*B T N D"]:
    """Softmax attention inside blocks of `block_size` positions, H by default.

    Options are those of `attnlab.attention`.
    """
    size = query.shape[-1] if block_size is None else block_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"block_size: expected a positive int, got {block_size!r}.")
    blocks = Segments(
        *(
            (jnp.arange(x.shape[-3], dtype=jnp.int32) + options.get(offset, 0)) // size
            for x, offset in ((query, "query_offset"), (key, "key_offset"))
        )
    )
    mask = blocks if mask is None else blocks & as_mask(mask)
    return attention(query, key, value, mask=mask, **options)


class LinearLogNormal(Mechanism):
    """LLN; with `hybrid`, mixed with softmax attention inside blocks.

    Args:
      alpha, beta: as for `lln_attention`.
      hybrid: None for LLN alone; "average": half of each; "scale": both with learned factors per
        head and channel; "ratio": r and 1 - r, learned.  All begin at one half.
      num_heads, value_width: of the learned factors.
      block_size: of the blocks, H by default.
    """

    def __init__(
        self,
        alpha: float | None = None,
        beta: float | None = None,
        *,
        hybrid: str | None = None,
        num_heads: int = 1,
        value_width: int = 1,
        block_size: int | None = None,
    ) -> None:
        if hybrid is not None and hybrid not in HYBRIDS:
            raise ValueError(f"hybrid: expected one of {', '.join(HYBRIDS)}, got {hybrid!r}.")
        self.alpha, self.beta, self.hybrid, self.block_size = alpha, beta, hybrid, block_size
        half = jnp.full((num_heads, value_width), 0.5)
        self.linear_part = nnx.data(nnx.Param(half) if hybrid in ("scale", "ratio") else None)
        self.block_part = nnx.data(nnx.Param(half) if hybrid == "scale" else None)

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Any:
        if self.hybrid is not None or self.alpha is None:
            return None
        return peak_state(batch_shape, num_kv_heads, head_width, value_width)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        out = lln_attention(query, key, value, alpha=self.alpha, beta=self.beta, **options)
        if self.hybrid is None:
            return out
        kept = {k: options[k] for k in ("mask", "query_offset", "key_offset") if k in options}
        near = diagonal_attention(query, key, value, block_size=self.block_size, **kept)
        first, second = self._shares(out)
        return out * first + near * second

    def _shares(self, out: Array) -> list[Array]:
        """The factors of LLN and of the blocks."""
        half = jnp.full((1, 1), 0.5)
        first = half if self.linear_part is None else self.linear_part[...]
        second = 1 - first if self.block_part is None else self.block_part[...]
        return [jnp.expand_dims(x.astype(out.dtype), range(out.ndim - 2)) for x in (first, second)]


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> LinearLogNormal:
    alpha, beta = matched(1.0, 1.0)
    return LinearLogNormal(float(alpha), float(beta))


ENTRY = Entry(
    id="linear-log-normal",
    title="Linear log-normal attention",
    family="linear",
    paper=Paper(
        "Linear Log-Normal Attention with Unbiased Concentration",
        "Nahshan, Kampeas & Haleva",
        2023,
        "2311.13541",
    ),
    summary="Exponential features with a temperature that makes weights vary as much as those of "
    "softmax attention, whose law is nearly log-normal too.",
    formula=r"w_{ts} \propto \sum_h e^{\alpha q_{th}} e^{\beta k_{sh}}, \qquad "
    r"\alpha = \frac{c}{\sigma_q}, \; \beta = \frac{c}{\sigma_k}, \; "
    r"c^2 = \frac{\sigma_q^2\sigma_k^2 - b}{2a}",
    patterns=PATTERNS,
    time="O((T + S)·H·D)",
    memory="O((T + S)·H)",
    exact="Exact; weights agree with softmax in the variance of their logarithm only.",
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
    function=lln_attention,
    module=LinearLogNormal,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
