r"""DocMamba: a state space model that reads a page both ways, in the order of its segments.

    S_t = exp(dt_t A) * S_{t-1} + B_t (dt_t x_t)^T,      y_t = S_t^T C_t + d x_t
    out = (y forwards + y backwards) / 2 * silu(u W^Z),      dt = softplus(u W^1 W^2 + b)

Hu et al. 2024, arXiv:2409.11887: everything sees everything through two states, each direction with
step sizes, rates A and skips of its own.  The authors' code takes half the sum; their paper the
sum.  Tokens are put into the segment-first order (`segment_first_order`) before.  In the paper's
Mamba each channel is a head of value width 1 with H = 16 rates; here a head may be wider, and C, B
and x are projected, and convolved, once for both directions.  Left out: embeddings of layout boxes,
the convolution per direction.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnlab.core.entry import RECURRENCE, Entry, Paper
from attnlab.core.gates import (
    Projection,
    control,
    initial_steps,
    inverse_softplus,
    narrowed,
    scaled,
    widened,
)
from attnlab.core.linear_attention import linear_attention, real_inputs, repeat_heads
from attnlab.core.mask_layout import Layout, layout
from attnlab.core.masks import Segments, as_mask
from attnlab.core.modules import Mechanism
from attnlab.core.refusals import refuse


def segment_first_order(
    boxes: Int[Array, "T C"],
    segment_ids: Int[Array, " T"],
    *,
    real: Bool[Array, " T"] | None = None,
    line_height: int = 1,
) -> Int[Array, " T"]:
    """The order of the scan: segments from top to bottom, then left to right; tokens within alike.

    Args:
      boxes: corners, the upper left first: (x, y, ...), integers.
      segment_ids: which segment each token belongs to.  A segment lies where its topmost and
        leftmost tokens do; ties go by id, ties of tokens by their place in the input.
      real: False where a token is padding, which comes last.
      line_height: heights are compared in these units.

    Returns:
      A permutation: token `order[t]` is scanned at t.  Its `jnp.argsort` puts results back.

    Raises:
      ValueError: boxes without corners, ids of another length, a line height below 1.
    """
    count = segment_ids.shape[0]
    if boxes.ndim != 2 or boxes.shape[0] != count or boxes.shape[1] < 2:
        raise ValueError(f"boxes: expected shape ({count}, 4) or ({count}, 8), got {boxes.shape}.")
    if line_height < 1:
        raise ValueError(f"line_height: expected a positive int, got {line_height}.")
    real = jnp.ones((count,), bool) if real is None else real
    x, y = boxes[:, 0], boxes[:, 1] // line_height
    _, rank = jnp.unique(segment_ids, return_inverse=True, size=count)
    farthest = jnp.iinfo(x.dtype).max  # padding does not move a segment
    left, top = (
        jax.ops.segment_min(jnp.where(real, c, farthest), rank.reshape(-1), count)[rank.reshape(-1)]
        for c in (x, y)
    )
    return jnp.lexsort((x, y, segment_ids, left, top, ~real))


def docmamba_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B T K H"],
    value: Float[Array, "*B T K D"],
    *,
    step: Float[Array, "*B T 2 N"],
    log_decay: Float[Array, "*B T 2 N H"],
    skip: Float[Array, "2 N"] | None = None,
    mask: Any = None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> Any:
    """A state space model forwards and backwards, and half their sum: "*B T N D".

    Args:
      step: dt of the pass from the left and of that from the right; values are multiplied by it.
      log_decay: dt A, none above 0.
      skip: d, how much of its own value a token gets from each pass.
      mask: KeyPadding, QueryPadding, Segments and what `&` makes of them.
      query_offset, key_offset: the same for both.
      options: as for `attnlab.linear_attention`, but no states.

    Raises:
      ValueError: a causal mask, states, or queries and keys of different lengths.
      NotImplementedError: a mask that picks pairs.
    """
    at = {"query_offset": query_offset, "key_offset": key_offset}
    query, key, value = real_inputs(query, key, value, {"mask": mask} | at)
    known = _both_ways(query, key, mask, at, options)
    heads, dtype = query.shape[-2], query.dtype
    query, key, value = widened(query, key, value)
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    *steps, width = (*key.shape[:-2], key.shape[-1])
    step = control("step", step, (*steps, 2, heads), key.dtype)
    log_decay = control("log_decay", log_decay, (*steps, 2, heads, width), key.dtype)
    if known.keys is not None:  # a token that is hidden leaves the state alone
        real = jnp.broadcast_to(known.keys, steps)[..., None, None]
        step, log_decay = jnp.where(real, step, 0), jnp.where(real[..., None], log_decay, 0)
    passes = []
    for side in range(2):
        arrays = query, key, step[..., side, :, None] * value, log_decay[..., side, :, :]
        passes.append(_pass(arrays, known.ids, query.ndim - 3, bool(side), options))
    out = passes[0] + passes[1]
    if skip is not None:
        out = out + scaled(value, jnp.sum(control("skip", skip, (2, heads), key.dtype), 0)[:, None])
    if known.queries is not None:
        out = jnp.where(jnp.broadcast_to(known.queries, steps)[..., None, None], out, 0)
    return narrowed(out / 2, dtype)


def _pass(arrays: Any, ids: Any, axis: int, backwards: bool, options: dict[str, Any]) -> Array:
    """One pass over the sequence; backwards it is turned around, and so is what it gives."""
    if backwards:
        arrays = [jnp.flip(x, axis) for x in arrays]
        ids = None if ids is None else jnp.flip(ids, -1)
    *inputs, log_decay = arrays
    mask = None if ids is None else Segments(ids)
    out = linear_attention(*inputs, log_decay=log_decay, mask=mask, **options)
    return jnp.flip(out, axis) if backwards else out


def _both_ways(query: Array, key: Array, mask: Any, at: Any, options: Any) -> Layout:
    """The mask, taken apart; the refusals of this mechanism."""
    if query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"key: length {key.shape[-3]} differs from that of query, {query.shape[-3]}; a pass in "
            "both directions reads and writes at every token."
        )
    words = "a sequence read in both directions has no state to go on"
    refuse(options, words, "initial_state", "return_state")
    if mask is None:
        return Layout()
    known = layout(as_mask(mask), (query.shape[-3], key.shape[-3]), tuple(at.values()))
    if known is None:
        raise NotImplementedError(
            f"mask: {type(mask).__name__} picks pairs, which a state cannot; attnlab.attention "
            "takes any mask."
        )
    if known.causal:
        raise ValueError("mask: DocMamba reads in both directions; for a causal one take Mamba-2.")
    return known


class DocMamba(Mechanism):
    """Steps, rates `a_log` "2 N H" and skips "2 N" for both directions, and an output gate.

    Rates start at 1 .. H, steps between 0.001 and 0.1, as in Mamba (Gu & Dao 2023,
    arXiv:2312.00752).
    """

    conv_width = 4

    def __init__(
        self, features: int, num_heads: int, head_width: int, value_width: int, *,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        rank = math.ceil(features / 16)
        small = nnx.initializers.uniform(2 * rank**-0.5)

        def initializer(*args: Any) -> Array:
            return small(*args) - rank**-0.5

        def up() -> Projection:
            bias = inverse_softplus(initial_steps(rngs.params(), (num_heads,)))
            return Projection(rank, num_heads, bias=bias, initializer=initializer, rngs=rngs)

        self.down = Projection(features, (2, rank), rngs=rngs)
        self.up = nnx.data((up(), up()))
        rates = jnp.log(jnp.arange(1.0, head_width + 1))
        self.a_log = nnx.Param(jnp.broadcast_to(rates, (2, num_heads, head_width)))
        self.skip = nnx.Param(jnp.ones((2, num_heads)))
        self.gate = Projection(features, (num_heads, value_width), rngs=rngs)

    def controls(self, x: Float[Array, "*B T F"]) -> dict[str, Any]:
        low = self.down(x)
        step = jnp.stack([up(low[..., side, :]) for side, up in enumerate(self.up)], -2)
        step = jax.nn.softplus(step)
        return {"step": step, "log_decay": -scaled(step[..., None], jnp.exp(self.a_log[...]))}

    def finish(self, out: Float[Array, "*B T N D"], x: Float[Array, "*B T F"]) -> Array:
        (wide,) = widened(out)
        return narrowed(wide * jax.nn.silu(self.gate(x)), out.dtype)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B T K H"],
        value: Float[Array, "*B T K D"],
        **options: Any,
    ) -> Any:
        return docmamba_attention(query, key, value, skip=self.skip[...], **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> DocMamba:
    return DocMamba(num_heads * head_width, num_heads, head_width, head_width, rngs=rngs)


ENTRY = Entry(
    id="docmamba",
    title="DocMamba",
    family="linear",
    paper=Paper(
        "DocMamba: Efficient Document Pre-training with State Space Model",
        "Hu, Zhang, Ma, Liu, Du & Zhang",
        2024,
        "2409.11887",
    ),
    summary="A page is read segment by segment, forwards and backwards, by a state space model: "
    "every token sees all others at linear cost.",
    formula=r"o = \tfrac12 (\overrightarrow{y} + \overleftarrow{y}), \quad "
    r"S_t = e^{\Delta_t A} \odot S_{t-1} + B_t (\Delta_t x_t)^\top, \quad "
    r"y_t = S_t^\top C_t + d\, x_t",
    patterns=("noncausal self",),
    time="O(T·H·D)",
    memory="O(T)",
    exact="Exact; weights are damped products, not those of softmax.",
    properties=frozenset({"translation-invariant", "gqa", "linear-memory"}),
    function=docmamba_attention,
    module=DocMamba,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
