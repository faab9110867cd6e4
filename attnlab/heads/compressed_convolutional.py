r"""Compressed convolutional attention: fewer and narrower heads, mixed with the tokens before.

    y_t = [q_t; k_t],   u_t = b + sum_j w_j * y_{t-j},   z_t = c + sum_j u_{t-j} G_j
    m^q_n = (q_n + k_{g(n)}) / 2,          m^k_g = (mean of the group's q_n + k_g) / 2
    q = sqrt(H) unit(z^q + m^q),           k = tau_g sqrt(H) unit(z^k + m^k),    then RoPE
    v = [x_t W^V1; x_{t-1} W^V2],          out = softmax(q k^T / sqrt(H)) v

Figliolia, Alonso, Iyer, Anthony & Millidge 2025, arXiv:2510.04476.  Queries are N H = F / C1 wide
and keys K H = F / C2: attention takes 1 / C1 of the work and the cache 1 / C2 of the numbers of
multi-head attention, where grouped queries save the cache alone.  The first convolution is
depthwise, the second has one matrix G_j "H H" per head; both are two tokens wide, with biases and
nothing between them.  RoPE turns the first half of the channels.

Two ports of the authors' model, ZAYA1, were read, and agree.  As there, the convolutions begin
before the first token: what lies before is y = 0, so that u is b there, not 0; here so at the start
of every document.  Settled here: convolutions start uniform in +- fan_in^-1/2 with biases of 0, and
tau at 1; lengths are sqrt(sum + 1e-6).  Convolutions look back only, whatever the mask.
`MultiHeadAttention(features, N, num_kv_heads=K, head_width=H, mechanism=...)` is the paper's layer:
its value projection is [W^V1, W^V2].
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import Entry, Paper
from attnlab.core.gates import unit, widened
from attnlab.core.modules import Mechanism
from attnlab.core.past import Past
from attnlab.core.rotary import rotate


@dataclasses.dataclass(frozen=True)
class CompressedSizes:
    """What a layer of these sizes holds and does; `widths` are those of the convolutions."""

    features: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    widths: tuple[int, int] = (2, 2)

    @property
    def _channels(self) -> tuple[int, int]:
        return self.num_heads * self.head_width, self.num_kv_heads * self.head_width

    @property
    def projections(self) -> int:
        """Parameters of the four projections."""
        query, key = self._channels
        return self.features * (2 * query + 2 * key)

    @property
    def mixing(self) -> int:
        """Parameters of the convolutions and the temperatures."""
        first, second = self.widths
        return sum(self._channels) * (first + second * self.head_width + 2) + self.num_kv_heads

    @property
    def cache_per_token(self) -> int:
        """Numbers that a cache keeps of each token."""
        return 2 * self._channels[1]

    @property
    def state(self) -> int:
        """Numbers that a cache keeps besides, whatever the length."""
        query, key = self._channels
        return (sum(self.widths) - 2) * (query + key) + key // 2

    def pairs(self, num_queries: int, num_keys: int) -> int:
        """Multiply-adds of scores and mixing."""
        return 2 * num_queries * num_keys * self._channels[0]


def convolved(
    x: Float[Array, "*B T M H"], weight: Float[Array, "..."], bias: Array, past: Past, missing: Any
) -> Float[Array, "*B T M H"]:
    """Sum of the bias and x_{t-j} weight_j: `weight` "W M H" by channel, or "W M H H" by head."""
    tokens = (x, *past.previous(x, weight.shape[0] - 1, missing=missing))
    total = jnp.expand_dims(bias, range(x.ndim - 2))
    for token, each in zip(tokens, weight, strict=True):
        if weight.ndim == 3:
            total = total + token * jnp.expand_dims(each, range(x.ndim - 2))
        else:
            total = total + jnp.einsum("...mh,mhd->...md", token, each)
    return total


def compressed(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B T K H"],
    value: Float[Array, "*B T K D"],
    past: Past,
    *,
    channel_weight: Float[Array, "W0 M H"],
    channel_bias: Float[Array, "M H"],
    head_weight: Float[Array, "W1 M H H"],
    head_bias: Float[Array, "M H"],
    temperature: Float[Array, " K"],
    theta: float = 10_000.0,
    rotary_width: int | None = None,
    add_mean: bool = True,
    shift_values: bool = True,
) -> tuple[Array, Array, Array]:
    """Query, key and value as they attend; M = N + K heads, queries first.

    `rotary_width`: how many of the first channels RoPE turns, H / 2 by default.

    Raises:
      NotImplementedError: keys that are not of the queries' tokens.
      ValueError: parameters for other sizes, or values that cannot be halved.
    """
    query, key, value = check_inputs(query, key, value)
    _check(query, key, value, channel_weight, head_weight)
    dtype, heads, width = query.dtype, query.shape[-2], query.shape[-1]
    query, key, value = (past.cleaned(x) for x in widened(query, key, value))
    channel_weight, channel_bias, head_weight, head_bias, temperature = (
        x.astype(query.dtype)
        for x in (channel_weight, channel_bias, head_weight, head_bias, temperature)
    )
    packed = jnp.concatenate([query, key], axis=-2)
    mixed = convolved(packed, channel_weight, channel_bias, past, 0.0)
    mixed = convolved(mixed, head_weight, head_bias, past, channel_bias)
    if add_mean:
        mixed = mixed + _means(query, key)
    mixed = unit(mixed) * width**0.5
    query, key = mixed[..., :heads, :], mixed[..., heads:, :]
    key = key * jnp.expand_dims(temperature[:, None], range(key.ndim - 2))
    turned = width // 2 if rotary_width is None else rotary_width
    query, key = (_turned(x, turned, theta, past.offset) for x in (query, key))
    if shift_values:
        value = _half_shifted(value, past)
    return query.astype(dtype), key.astype(dtype), value.astype(dtype)


def _means(query: Float[Array, "*B T N H"], key: Float[Array, "*B T K H"]) -> Array:
    """Halfway between each query and its key, and each key and the mean of its queries."""
    group = query.shape[-2] // key.shape[-2]
    grouped = query.reshape(*key.shape[:-1], group, key.shape[-1])
    return jnp.concatenate(
        [query + jnp.repeat(key, group, axis=-2), jnp.mean(grouped, axis=-2) + key], axis=-2
    ) / 2  # fmt: skip


def _turned(x: Array, width: int, theta: float, offset: Any) -> Array:
    if not width:
        return x
    part = rotate(x[..., :width], offset=offset, theta=theta, interleaved=False)
    return jnp.concatenate([part, x[..., width:]], axis=-1)


def _half_shifted(value: Float[Array, "*B T K D"], past: Past) -> Float[Array, "*B T K D"]:
    """The second half of all channels of the token before; zeros where there is none."""
    flat = value.reshape(*value.shape[:-2], -1)
    own, other = jnp.split(flat, 2, axis=-1)
    return jnp.concatenate([own, *past.previous(other)], axis=-1).reshape(value.shape)


def _check(query: Array, key: Array, value: Array, channel: Array, head: Array) -> None:
    if query.shape[-3] != key.shape[-3]:
        raise NotImplementedError(
            "compressed convolutional attention mixes a token's query with its key: it needs as "
            f"many queries as keys, got {query.shape[-3]} and {key.shape[-3]}; attnlab.attention "
            "serves cross-attention."
        )
    heads, width = query.shape[-2] + key.shape[-2], query.shape[-1]
    for name, x, tail in (
        ("channel_weight", channel, (heads, width)),
        ("head_weight", head, (heads, width, width)),
    ):
        if tuple(x.shape[1:]) != tail or x.shape[0] < 1:
            raise ValueError(f"{name}: expected shape {('W', *tail)}, got {tuple(x.shape)}.")
    if value.shape[-2] * value.shape[-1] % 2:
        raise ValueError(
            f"value: half of its channels are shifted; heads times width is odd in {value.shape}."
        )


def compressed_convolutional_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B T K H"],
    value: Float[Array, "*B T K D"],
    *,
    parameters: dict[str, Any],
    mask: Any = None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> Any:
    """Attention of what `compressed` makes of a whole sequence: "*B T N D".

    Layers decode by `CompressedConvolutional`, which remembers the tokens before.

    Args:
      parameters: keyword arguments of `compressed`.
      mask: causality, padding and documents are understood; under any other the token before is the
        one before in the array.
      query_offset, key_offset, options: as for `attnlab.attention`.

    Raises:
      NotImplementedError, ValueError: as for `compressed`.
    """
    query, key, value = check_inputs(query, key, value)
    past = Past.of(mask, query, key, offset=query_offset)
    query, key, value = compressed(query, key, value, past, **parameters)
    offsets = {"query_offset": query_offset, "key_offset": key_offset}
    return attention(query, key, value, mask=mask, **offsets, **options)


class CompressedConvolutional(Mechanism):
    """Compressed convolutional attention; holds both convolutions and a temperature per key head.

    Args:
      num_heads, num_kv_heads, head_width: N, K and H.
      widths: of the convolution by channel and of that by head, in tokens.
      theta, rotary_width: of RoPE; it turns the first H / 2 channels by default, none with 0.
      add_mean, shift_values: whether to add the means, and to shift half of the values.

    Raises:
      ValueError: sizes or widths that are not positive, K that does not divide N.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_width: int, *,
        widths: tuple[int, int] = (2, 2), theta: float = 10_000.0, rotary_width: int | None = None,
        add_mean: bool = True, shift_values: bool = True, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        if min(num_heads, num_kv_heads, head_width) < 1 or num_heads % num_kv_heads:
            raise ValueError(
                "num_kv_heads: expected positive sizes and a divisor of num_heads, got "
                f"{num_heads=}, {num_kv_heads=}, {head_width=}."
            )
        if min(widths) < 1:
            raise ValueError(f"widths: expected two positive ints, got {widths}.")
        shape = (num_heads + num_kv_heads, head_width)

        def drawn(*shape: int, fan_in: int) -> nnx.Param:
            bound = fan_in**-0.5
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.channel_weight = drawn(widths[0], *shape, fan_in=widths[0])
        self.channel_bias = nnx.Param(jnp.zeros(shape))
        self.head_weight = drawn(widths[1], *shape, head_width, fan_in=widths[1] * head_width)
        self.head_bias = nnx.Param(jnp.zeros(shape))
        self.temperature = nnx.Param(jnp.ones((num_kv_heads,)))
        self.theta, self.rotary_width, self.key_heads = theta, rotary_width, num_kv_heads
        self.add_mean, self.shift_values = add_mean, shift_values

    def parameters(self) -> dict[str, Any]:
        """Keyword arguments of `compressed`."""
        names = ("channel_weight", "channel_bias", "head_weight", "head_bias", "temperature")
        own = {name: getattr(self, name)[...] for name in names}
        return own | {
            "theta": self.theta, "rotary_width": self.rotary_width, "add_mean": self.add_mean,
            "shift_values": self.shift_values,
        }  # fmt: skip

    def prepare(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        past: Past,
    ) -> tuple[Array, Array, Array]:
        """What a cache keeps; attention to it is plain."""
        return compressed(query, key, value, past, **self.parameters())


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> CompressedConvolutional:
    return CompressedConvolutional(num_heads, num_heads // 2, head_width, rngs=rngs)


ENTRY = Entry(
    id="compressed-convolutional",
    title="Compressed convolutional attention",
    family="heads",
    paper=Paper(
        "Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
        "Figliolia, Alonso, Iyer, Anthony & Millidge",
        2025,
        "2510.04476",
    ),
    summary="Attention within a narrower space, whose queries and keys are mixed with those of the "
    "tokens before: less cache and less work.",
    formula=r"q = \sqrt{H}\,\frac{z^q + m^q}{\lVert z^q + m^q \rVert}, \quad k = \tau \sqrt{H}\,"
    r"\frac{z^k + m^k}{\lVert z^k + m^k \rVert}, \qquad z = \mathrm{conv}(\mathrm{conv}([q; k]))",
    patterns=("noncausal self", "causal self"),
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset({"translation-invariant", "decode", "lse", "linear-memory"}),
    function=compressed_convolutional_attention,
    module=CompressedConvolutional,
    build=_build,
    masks="documents",
)
