r"""NAtS-L: each block of tokens is kept for softmax attention, or written into a linear state.

    type_c = argmax W mean(x of block c): softmax or linear, per head
    o^s_t: softmax attention over earlier softmax blocks and the query's own, up to itself
    o^l_t: gated delta rule from the state of earlier linear blocks, then through the query's own
    y_t = (w_1 RMSNorm(o^l_t) + w_2 RMSNorm(o^s_t)) * silu(x_t W^G),    w = softmax(W^O q_t)

Deng, Winje, Fehring & Lindauer 2026, arXiv:2602.03681 (neural attention search, linear).  Both
reads see the query's own block, so a block's type matters to later blocks alone, and the average
over the block leaks nothing.  A softmax block still decays the state.  Types get a straight-through
gradient: that of a factor of 1 on the weights, or the writes, of blocks that were chosen.  Queries
and keys are RMS-normalized for the softmax and of length 1 for the delta rule.  Left out: twice as
many heads for the softmax as for the state, the Gumbel noise, and decoding from a cache of chosen
blocks, which is what saves time: here the softmax masks the others.  Where documents are packed, a
block may hold the end of one and the start of another.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention
from attnlab.core.entry import Entry, Paper
from attnlab.core.gates import (
    Projection,
    SoftplusDecay,
    control,
    narrowed,
    rms_unit,
    scaled,
    unit,
    widened,
)
from attnlab.core.linear_attention import real_inputs, repeat_heads
from attnlab.core.mask_layout import Layout, layout
from attnlab.core.masks import Causal, Segments, as_mask
from attnlab.core.modules import Mechanism, RMSNorm
from attnlab.core.recurrence import resets
from attnlab.core.refusals import refuse
from attnlab.core.scores import after
from attnlab.core.typed_blocks import Factor, OwnOrChosen, in_blocks, through_blocks

EPSILON = 1e-5
BLOCK = 64
RATES = (1e-3, 16.0)


def straight_through(score: Float[Array, "*S O"]) -> Float[Array, "*S O"]:
    """One at the largest score and 0 elsewhere, with the gradient of the softmax."""
    soft = jax.nn.softmax(score)
    hard = jax.nn.one_hot(jnp.argmax(score, -1), score.shape[-1], dtype=score.dtype)
    return soft - jax.lax.stop_gradient(soft) + hard


def nats_linear_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B T K H"],
    value: Float[Array, "*B T K D"],
    *,
    beta: Float[Array, "*B T N"],
    log_decay: Float[Array, "*B T N"],
    types: Float[Array, "*B C N 2"],
    block: int = BLOCK,
    gains: tuple[Array, Array] | None = None,
    mask: Any = None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> tuple[Float[Array, "*B T N D"], Float[Array, "*B T N D"]]:
    """What softmax attention reads, and what the state gives: two outputs, "*B T N D" each.

    Args:
      beta, log_decay: of the gated delta rule.
      types: for each of the C = ceil(T / block) blocks (1, 0) for softmax, (0, 1) for the state.
      block: tokens that share a type.
      gains: of the RMS norms of queries and keys before the softmax, "H" each; ones by default.
      mask: Causal (implied), KeyPadding, QueryPadding, Segments and what `&` makes of them.
      query_offset, key_offset: the same for both; blocks count from the first token.
      options: of the softmax, as for `attnlab.attention`.

    Raises:
      ValueError: queries and keys of different lengths; a state, or the log-sum-exp, asked for.
      NotImplementedError: a mask that picks pairs.
    """
    at = {"query_offset": query_offset, "key_offset": key_offset}
    query, key, value = real_inputs(query, key, value, {"mask": mask} | at)
    known = _taken_apart(query, key, mask, tuple(at.values()))
    words = "there is none of two reads that see different tokens"
    options = refuse(options, words, "initial_state", "return_state", "return_lse")
    *batch, length, heads, _ = query.shape
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    wide = widened(query)[0].dtype
    types = control("types", types, (*batch, -(-length // block), heads, 2), wide)
    real = jnp.ones((*batch, length), bool) if known.keys is None else known.keys
    real = jnp.broadcast_to(real, (*batch, length))
    normed = [rms_unit(x, epsilon=EPSILON) for x in (query, key)]
    if gains is not None:
        normed = [scaled(x, gain) for x, gain in zip(normed, gains, strict=True)]
    softmax = _softmax(normed[0], normed[1], value, types[..., 0], real, known, block, options)
    beta = control("beta", beta, (*batch, length, heads), wide)
    log_decay = control("log_decay", log_decay, beta.shape, wide)
    log_decay = jnp.where(real[..., None], log_decay, 0)
    steps = query, key, value, beta, log_decay
    linear = _linear(steps, types[..., 1], known.ids, block)
    outputs = softmax, narrowed(linear, query.dtype)
    if known.queries is None:
        return outputs
    kept = jnp.broadcast_to(known.queries, (*batch, length))[..., None, None]
    return tuple(jnp.where(kept, x, jnp.zeros((), x.dtype)) for x in outputs)  # type: ignore


def _taken_apart(query: Array, key: Array, mask: Any, offsets: tuple[Any, Any]) -> Layout:
    if query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"key: length {key.shape[-3]} differs from that of query, {query.shape[-3]}; blocks "
            "are typed as a whole sequence is read."
        )
    if mask is None:
        return Layout()
    known = layout(as_mask(mask), (query.shape[-3], key.shape[-3]), offsets)
    if known is None:
        raise NotImplementedError(
            f"mask: {type(mask).__name__} picks pairs, which a state cannot; attnlab.attention "
            "takes any mask."
        )
    return known


def _softmax(
    query: Array, key: Array, value: Array, chosen: Array, real: Array, known: Layout, block: int,
    options: dict[str, Any],
) -> Array:  # fmt: skip
    factor = jnp.swapaxes(jnp.repeat(chosen, block, axis=-2), -1, -2)[..., : query.shape[-3]]
    mask = Causal() & OwnOrChosen(jax.lax.stop_gradient(factor) > 0.5, real, block)
    if known.ids is not None:
        mask = mask & Segments(jnp.broadcast_to(known.ids, real.shape))
    own = Factor(factor - jax.lax.stop_gradient(factor), block)
    return attention(query, key, value, mask=mask, **after(own, options))


def _linear(steps: tuple[Array, ...], chosen: Array, ids: Any, block: int) -> Array:
    """The gated delta rule through each block, from the state that earlier chosen blocks left."""
    query, key, value, beta, log_decay = (x.astype(steps[-1].dtype) for x in steps)
    key = unit(key)
    arrays = {
        "query": unit(query) * query.shape[-1] ** -0.5, "key": key,
        "value": beta[..., None] * value, "log_decay": log_decay,
        "erase": (beta * jnp.exp(log_decay))[..., None] * key,
    }  # fmt: skip
    if ids is not None:
        arrays["reset"] = resets(jnp.broadcast_to(ids, key.shape[:-2]))
    return through_blocks(arrays, chosen, block)


class NATSLinear(Mechanism):
    """The router, the delta rule's gates, and the norms and weights of the two reads.

    `trained` gives the router its straight-through gradient; without it, it has none.
    """

    conv_width = 4

    def __init__(
        self, features: int, num_heads: int, head_width: int, value_width: int, *,
        block: int = BLOCK, trained: bool = True, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        if block < 1:
            raise ValueError(f"block: expected a positive int, got {block}.")
        self.block, self.trained = block, trained
        self.router = Projection(features, (num_heads, 2), rngs=rngs)
        self.rate = Projection(features, num_heads, rngs=rngs)
        self.forget = Projection(features, num_heads, rngs=rngs)
        self.decay = SoftplusDecay(num_heads, rates=RATES, rngs=rngs)
        self.gate = Projection(features, (num_heads, value_width), rngs=rngs)
        self.mix = Projection(num_heads * head_width, (num_heads, 2), rngs=rngs)
        self.query_gain, self.key_gain = (nnx.Param(jnp.ones((head_width,))) for _ in range(2))
        self.linear_norm, self.softmax_norm = (
            RMSNorm(value_width, epsilon=EPSILON) for _ in range(2)
        )

    def controls(self, x: Float[Array, "*B T F"]) -> dict[str, Any]:
        (wide,) = widened(x)
        means = jnp.mean(jnp.moveaxis(in_blocks(wide, x.ndim - 2, self.block), 0, x.ndim - 2), -2)
        types = straight_through(self.router(means))
        return {
            "beta": jax.nn.sigmoid(self.rate(x)),
            "log_decay": self.decay(self.forget(x))[1],
            "types": types if self.trained else jax.lax.stop_gradient(types),
        }

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        (wide,) = widened(out)
        return narrowed(wide * jax.nn.silu(self.gate(x)), out.dtype)

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Any:
        """Refused: a block's type is the router's, once it has read the block."""
        raise NotImplementedError(
            "NATSLinear reads whole sequences: it types a block by the average of its tokens; "
            "decode with attnlab.linear.gated_deltanet, its linear half."
        )

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B T K H"],
        value: Float[Array, "*B T K D"],
        **options: Any,
    ) -> Any:
        query, key, value = real_inputs(query, key, value, options)
        gains = self.query_gain[...], self.key_gain[...]
        softmax, linear = nats_linear_attention(
            query, key, value, gains=gains, block=self.block, **options
        )
        weights = jax.nn.softmax(self.mix(query.reshape(*query.shape[:-2], -1)))
        (softmax, linear), dtype = widened(softmax, linear), query.dtype
        out = self.linear_norm(linear) * weights[..., :1]
        return narrowed(out + self.softmax_norm(softmax) * weights[..., 1:], dtype)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> NATSLinear:
    # Short blocks, so that few tokens are routed; gradients are slopes of what is computed, which
    # the straight-through one of a router is not.
    return NATSLinear(
        num_heads * head_width, num_heads, head_width, head_width, block=4, trained=False, rngs=rngs
    )


ENTRY = Entry(
    id="nats-linear",
    title="NAtS-L",
    family="linear",
    paper=Paper(
        "Neural Attention Search Linear: Towards Adaptive Token-Level Hybrid Attention Models",
        "Deng, Winje, Fehring & Lindauer",
        2026,
        "2602.03681",
    ),
    summary="A router sends each block of tokens either to softmax attention, which keeps it, or "
    "into the state of a gated delta rule; both see the block at hand.",
    formula=r"y_t = w_1\, \mathrm{RMSNorm}(o^{\mathrm{lin}}_t) + "
    r"w_2\, \mathrm{RMSNorm}(o^{\mathrm{soft}}_t), \quad w = \mathrm{softmax}(W^O q_t)",
    patterns=("causal self",),
    time="O(T²·H)",
    memory="O(T)",
    exact="Exact, given the types of the blocks.",
    properties=frozenset({"translation-invariant", "gqa", "linear-memory"}),
    function=nats_linear_attention,
    module=NATSLinear,
    build=_build,
    masks="documents",
)
