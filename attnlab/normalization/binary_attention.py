r"""Binary attention: scores from the signs of queries and keys alone, one bit to a channel.

    s_ij = mu_i nu_j sgn(q_i) . sgn(k_j) / sqrt(H) + b_{j-i},      softmax over j

Xiao, Zhang & Zhang 2026, arXiv:2603.09582.  sgn(0) = 1; a product of signs is H less twice the
number of bits that differ.  For Gaussians its mean is 2/pi asin of their correlation, so keys keep
their order on the whole.  Training is straight-through: the sign's derivative is taken as 1 in
[-1, 1] and 0 outside.

In the paper mu and nu are means of |q| and |k| over channels and all tokens of a head, which reads
the future (and padding): `magnitude="head"`, for attention that is not causal.  By default each
token has its own.  The bias here is a table of relative positions in buckets, as in T5; the paper's
is one of relative places in an image.  Left out: eight-bit weights and values, caches of bits, and
training by distillation.  `popcount_products` is what hardware would do, exactly.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.linear_attention import repeat_heads
from attnlab.core.mask_layout import layout
from attnlab.core.masks import as_mask
from attnlab.core.modules import Mechanism
from attnlab.core.reference import zero_bad
from attnlab.core.scores import PairScale, RelativeBias, ScoreModifier, after
from attnlab.core.terms import accumulator
from attnlab.core.tokens import per_token, to_keys, to_queries

MAGNITUDES = ("token", "head", None)
BUCKETS, MAX_DISTANCE = 32, 128
WORD = 32  # bits


@jax.custom_jvp
def signs(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 where x >= 0, else -1; its derivative is taken as 1 in [-1, 1], 0 outside."""
    return jnp.where(x >= 0, 1, -1).astype(x.dtype)


@signs.defjvp
def _straight_through(primals: Any, tangents: Any) -> Any:
    inside = jnp.abs(primals[0]) <= 1
    return signs(primals[0]), jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))


def binary_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    magnitude: str | None = "token",
    table: Float[Array, "N R"] | None = None,
    **options: Any,
) -> Any:
    """Softmax attention by signs: "*B T N D".

    Args:
      magnitude: "token", mean absolute values of each query and key; "head", of all real ones of
        a head; None, ones.
      table: the bias, one number to a head and bucket of relative position; None for none.
      options: as for `attnlab.attention`.

    Raises:
      ValueError: an unknown magnitude, or "head" under a mask that says more than padding.
    """
    query, key, value = check_inputs(query, key, value)
    own: list[ScoreModifier] = []
    if magnitude is not None:
        sizes = _magnitudes(query, key, magnitude, options)
        own.append(PairScale(to_queries(sizes[0]), to_keys(sizes[1], query.shape[-2])))
    if table is not None:
        own.append(RelativeBias(table, True, MAX_DISTANCE))
    query, key = per_token(signs, query), per_token(signs, key)
    return attention(query, key, value, **after(own, options))


def _magnitudes(
    query: Array, key: Array, magnitude: str, options: dict[str, Any]
) -> tuple[Array, Array]:
    """Factors of queries "*B T N" and keys "*B S K", in float32 at least."""
    if magnitude not in MAGNITUDES:
        raise ValueError(f"magnitude: expected one of {MAGNITUDES}, got {magnitude!r}.")
    sizes = [
        jnp.mean(jnp.abs(zero_bad(x).astype(accumulator(x.dtype))), axis=-1) for x in (query, key)
    ]
    if magnitude == "token":
        return sizes[0], sizes[1]
    mask = options.get("mask")
    lengths = query.shape[-3], key.shape[-3]
    offsets = options.get("query_offset", 0), options.get("key_offset", 0)
    known = None if mask is None else layout(as_mask(mask), lengths, offsets)
    if mask is not None and (known is None or known.causal or known.ids is not None):
        raise ValueError(
            'magnitude: "head" is a mean over all tokens, which this mask forbids some queries to '
            'know of; it takes padding alone. Use magnitude="token".'
        )
    real = (None, None) if known is None else (known.queries, known.keys)
    both = [_mean_of_real(x, r) for x, r in zip(sizes, real, strict=True)]
    return both[0], both[1]


def _mean_of_real(x: Float[Array, "*B S K"], real: Any) -> Float[Array, "*B S K"]:
    """The mean over real tokens, at each of them."""
    kept = jnp.ones((), bool) if real is None else real[..., None]
    weight = jnp.broadcast_to(kept, x.shape).astype(x.dtype)
    count = jnp.maximum(jnp.sum(weight, axis=-2, keepdims=True), 1)
    return jnp.broadcast_to(jnp.sum(x * weight, axis=-2, keepdims=True) / count, x.shape)


def packed_signs(x: Float[Array, "*B S K H"]) -> UInt[Array, "*B S K W"]:
    """Bits of the signs, 1 for x >= 0: W = ceil(H / 32) words; bits beyond H are 0."""
    width = x.shape[-1]
    words = -(-width // WORD)
    bits = jnp.pad(x >= 0, [(0, 0)] * (x.ndim - 1) + [(0, words * WORD - width)])
    bits = bits.reshape(*x.shape[:-1], words, WORD).astype(jnp.uint32)
    place = jnp.expand_dims(jnp.arange(WORD, dtype=jnp.uint32), range(x.ndim))
    return jnp.sum(bits << place, axis=-1, dtype=jnp.uint32)


def popcount_products(
    query: UInt[Array, "*B T N W"], key: UInt[Array, "*B S K W"], width: int
) -> Int[Array, "*B N T S"]:
    """Products sgn(q) . sgn(k) of packed signs, H less twice the bits that differ: exact.

    Args:
      query, key: as `packed_signs` gives them.
      width: H.

    Raises:
      ValueError: words that `width` does not fill.
    """
    words = -(-width // WORD)
    if query.shape[-1] != words or key.shape[-1] != words:
        raise ValueError(
            f"width: {width} bits are {words} words, got {query.shape[-1]} and {key.shape[-1]}."
        )
    key = repeat_heads(key, query.shape[-2])
    rows, cols = (jnp.swapaxes(x, -3, -2) for x in (query, key))
    shape = (*rows.shape[:-1], cols.shape[-2])
    differ = jnp.zeros(shape, jnp.int32)
    for w in range(words):  # a word at a time, as all at once would be W times the scores
        both = rows[..., :, None, w] ^ cols[..., None, :, w]
        differ = differ + jax.lax.population_count(both).astype(jnp.int32)
    return width - 2 * differ


class BinaryAttention(Mechanism):
    """Binary attention; holds the bias's table "N R".

    Args:
      num_heads: query heads N.
      magnitude: as for `binary_attention`.
      num_buckets: R, four at least; None for no bias.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        magnitude: str | None = "token",
        num_buckets: int | None = BUCKETS,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if magnitude not in MAGNITUDES:
            raise ValueError(f"magnitude: expected one of {MAGNITUDES}, got {magnitude!r}.")
        self.magnitude = magnitude
        table = None
        if num_buckets is not None:
            drawn = jax.random.normal(rngs.params(), (num_heads, num_buckets), param_dtype)
            table = nnx.Param(0.02 * drawn)
        self.table = nnx.data(table)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        table = None if self.table is None else self.table[...]
        return binary_attention(query, key, value, magnitude=self.magnitude, table=table, **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> BinaryAttention:
    return BinaryAttention(num_heads, rngs=rngs)


ENTRY = Entry(
    id="binary-attention",
    title="Binary attention",
    family="normalization",
    paper=Paper(
        "BinaryAttention: One-Bit QK-Attention for Vision and Diffusion Transformers",
        "Xiao, Zhang & Zhang",
        2026,
        "2603.09582",
    ),
    summary="Queries and keys keep the signs of their channels and one magnitude; a learned bias "
    "of relative position makes up for some of what is lost.",
    formula=r"s_{ij} = \mu_i \nu_j \frac{\operatorname{sgn}(q_i)^\top \operatorname{sgn}(k_j)}"
    r"{\sqrt{H}} + b_{j-i}",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact in its signs; the gradient is a surrogate's.",
    properties=frozenset(
        {"translation-invariant", "decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}
    ),
    function=binary_attention,
    module=BinaryAttention,
    build=_build,
    gradient="straight-through",
)
