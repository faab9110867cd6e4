r"""RWKV-7: a state that decays by channel and is corrected by a delta rule with a rate per channel.

    S_t = (diag(w_t) - (a_t * u_t) u_t^T) S_{t-1} + c_t v_t^T,      o_t = S_t^T r_t
    u = k * xi / |k * xi|,      c = k * (1 + (a - 1) * alpha)
    log w = -e^(-1/2) sigmoid(w_0 + tanh(x W^1) W^2),      a = sigmoid(a_0 + x A^1 A^2)
    y_t = (norm(o_t) + (sum_H r_t * rho * c_t) v_t) * sigmoid(x G^1) G^2

Peng et al. 2025, arXiv:2503.14456 (time mixing of RWKV-7 "Goose"): r is the query, removal key u
and replacement key c are both made of the key.  Decays stay above exp(-e^(-1/2)) = 0.545.  The norm
is a group norm per head with epsilon H / 10^5, 64e-5 at the authors' width.  Each token takes two
steps of the recurrence (`two_writes`).  Left out, as matters between layers: the shift that mixes
each input with the one before, and the values of the first layer that later ones mix in; the last
projection, which the authors start at zero, is `MultiHeadAttention`'s.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.entry import RECURRENCE, Entry, Paper
from attnlab.core.gates import Projection, control, narrowed, scaled, shifted, unit, widened
from attnlab.core.linear_attention import real_inputs, repeat_heads
from attnlab.core.modules import RecurrentMechanism
from attnlab.core.own_token import own_token, sees_any
from attnlab.core.two_writes import two_writes

EPSILON = 1e-5  # times the head width
TINY = 1e-24  # of squares: a key shorter than 1e-12 is not made longer
SLOWEST = -math.exp(-0.5)  # the strongest log decay


def rwkv7_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    log_decay: Float[Array, "*B S N H"],
    rate: Float[Array, "*B S N H"],
    removal: Float[Array, "N H"],
    replacement: Float[Array, "N H"],
    bonus: Float[Array, "N H"] | None = None,
    norm: tuple[Array, Array] | None = None,
    **options: Any,
) -> Any:
    """The recurrence of RWKV-7, its norm and its bonus: "*B T N D".

    Args:
      query: r, the receptance; there is no scale.
      log_decay: log w, none above 0.
      rate: a, the in-context learning rate of each channel, in [0, 1]; up to 2 transitions may
        swap.
      removal, replacement: xi and alpha, which make u and c of the key.
      bonus: rho; None for no bonus.
      norm: gain and bias "N D" of the norm per head; None for no norm.
      options: as for `attnlab.linear_attention`; states have a head for each query head.

    Raises:
      ValueError: a log decay above 0 (outside of jit).
      NotImplementedError: a mask that picks pairs.
    """
    query, key, value = real_inputs(query, key, value, options)
    heads, dtype = query.shape[-2], query.dtype
    query, key, value = widened(query, key, value)
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    wide = key.dtype
    log_decay = control("log_decay", log_decay, key.shape, wide)
    rate = control("rate", rate, key.shape, wide)
    widths = key.shape[-2:]
    removal = control("removal", removal, widths, wide)
    replacement = control("replacement", replacement, widths, wide)
    removed = unit(scaled(key, removal), epsilon=TINY)
    key = key * (1 + scaled(rate - 1, replacement))
    result = two_writes(
        query, key, value, log_decay=log_decay, erase=removed, direction=rate * removed, **options
    )
    out, *state = result if isinstance(result, tuple) else (result,)
    if norm is not None:
        seen = sees_any(query, key, options)[..., None, None]
        out = jnp.where(seen, _group_norm(out, norm, key.shape[-1] * EPSILON), 0)
    if bonus is not None:
        weight = scaled(own_token(key, query, options), control("bonus", bonus, widths, wide))
        weight = jnp.sum(query * weight, -1, keepdims=True)
        out = out + weight * own_token(value, query, options)
    return narrowed((out, *state) if state else out, dtype)


def _group_norm(out: Array, norm: tuple[Array, Array], epsilon: float) -> Array:
    mean = jnp.mean(out, -1, keepdims=True)
    spread = jnp.mean(jnp.square(out - mean), -1, keepdims=True)
    return shifted(scaled((out - mean) * jax.lax.rsqrt(spread + epsilon), norm[0]), norm[1])


class RWKV7(RecurrentMechanism):
    """RWKV-7 as layer `layer` of `num_layers`; three low-rank networks for decay, rate and gate.

    Everything starts where the authors' code puts it, which depends on layer and channel.
    """

    def __init__(
        self, features: int, num_heads: int, head_width: int, value_width: int, *,
        layer: int = 0, num_layers: int = 1, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        if not 0 <= layer < num_layers:
            raise ValueError(
                f"layer: expected 0 to {num_layers - 1} of {num_layers=}, got {layer}."
            )
        self.num_heads = num_heads
        keys, values = (num_heads, head_width), (num_heads, value_width)
        start = _start(num_heads, head_width, layer / max(num_layers - 1, 1))
        self.decay = _low_rank(features, keys, 2.5, start["decay"], rngs)
        self.rate = _low_rank(features, keys, 2.5, start["rate"], rngs)
        self.gate = _low_rank(features, values, 5.0, None, rngs)
        self.removal = nnx.Param(start["removal"].reshape(keys))
        self.replacement = nnx.Param(jnp.full(keys, 1.02))
        self.bonus = nnx.Param(jnp.full(keys, -0.04))
        self.gain = nnx.Param(jnp.full(values, ((layer + 1) / num_layers) ** 0.7))
        self.bias = nnx.Param(jnp.zeros(values))

    def controls(self, x: Float[Array, "*B T F"]) -> dict[str, Any]:
        (down, up), (first, second) = self.decay, self.rate
        return {
            "log_decay": SLOWEST * jax.nn.sigmoid(up(jnp.tanh(down(x)))),
            "rate": jax.nn.sigmoid(second(first(x))),
        }

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        (wide,) = widened(out)
        down, up = self.gate
        return narrowed(wide * up(jax.nn.sigmoid(down(x))), out.dtype)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return rwkv7_attention(
            query, key, value, removal=self.removal[...], replacement=self.replacement[...],
            bonus=self.bonus[...], norm=(self.gain[...], self.bias[...]), **options,
        )  # fmt: skip


def _start(num_heads: int, head_width: int, depth: float) -> dict[str, Array]:
    """Where decays, rates and removal keys start, by channel; `depth` runs from 0 to 1."""
    count = num_heads * head_width
    n = jnp.arange(count, dtype=jnp.float32)
    along = n / max(count - 1, 1)
    middle = (head_width - 1) / 2
    zigzag = (n % head_width - middle) / max(middle, 1.0)
    zigzag = zigzag * jnp.abs(zigzag)
    return {
        "decay": -5.5 + 6 * along ** (1 + depth**0.3) + 2.5 * zigzag,
        "rate": -0.19 + 0.3 * zigzag + 0.4 * (along - 0.5),
        "removal": 0.71 - 0.1 * (along - 0.5),
    }


def _low_rank(
    features: int, shape: tuple[int, int], factor: float, bias: Any, rngs: nnx.Rngs
) -> Any:
    """Two factors, the first zero and the second orthogonal, as wide as the authors' rule says."""
    rank = max(32, round(factor * math.sqrt(features) / 32) * 32)
    size = 0.1 * math.sqrt(max(1.0, rank / math.prod(shape)))
    down = Projection(features, rank, initializer=nnx.initializers.zeros_init(), rngs=rngs)
    orthogonal = nnx.initializers.orthogonal(size)
    up = Projection(rank, shape, bias=bias, initializer=orthogonal, rngs=rngs)
    return nnx.data((down, up))


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> RWKV7:
    return RWKV7(num_heads * head_width, num_heads, head_width, head_width, rngs=rngs)


ENTRY = Entry(
    id="rwkv7",
    title="RWKV-7",
    family="linear",
    paper=Paper(
        'RWKV-7 "Goose" with Expressive Dynamic State Evolution',
        "Peng et al.",
        2025,
        "2503.14456",
    ),
    summary="A delta rule with decays and learning rates per channel, whose removal and "
    "replacement keys differ: transitions beyond diagonal ones, and constant memory.",
    formula=r"S_t = \big(\mathrm{diag}(w_t) - (a_t \odot \hat\kappa_t)\, \hat\kappa_t^\top\big)\, "
    r"S_{t-1} + \tilde k_t v_t^\top, \qquad o_t = S_t^\top r_t",
    patterns=("causal self",),
    time="O(T·H·D)",
    memory="O(T)",
    exact="Exact.",
    properties=frozenset({"translation-invariant", "gqa", "linear-memory", "state"}),
    function=rwkv7_attention,
    module=RWKV7,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
