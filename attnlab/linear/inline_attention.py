r"""InLine attention: linear attention normalized by a difference, and so injective.

    w_ts = phi(q_t) . (phi(k_s) - mean_s' phi(k_s')) / (sqrt(H) n) + 1 / n,       n keys

Weights sum to one without a division by the query's own sum, so that queries which differ in
length alone are told apart; they may be negative.  Summed up, the output is the mean of the values
and what a query reads from the covariance of keys and values,

    out_t = mean v + phi(q_t)^T cov(phi(k), v) / sqrt(H),

the form computed here.  Han, Pu, Xia, Han, Pan, Li, Lu, Song & Huang 2024, arXiv:2412.06590: with
`phi` the identity, and with a local residual, a 3 x 3 filter of the values for each channel that an
MLP makes from the mean of the layer's input, linear attention beats softmax in vision.

The paper is not causal.  Our reading: means and covariances over the keys so far, updated as
running ones are (Welford), which is a linear recurrence.  The residual is for images alone.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.decay_tree import product
from attnlab.core.entry import PATTERNS, RECURRENCE, Entry, Paper
from attnlab.core.linear_attention import (
    _kept,
    linear_attention,
    linear_state,
    real_inputs,
    repeat_heads,
)
from attnlab.core.mask_layout import Layout, layout
from attnlab.core.masks import Full, as_mask
from attnlab.core.modules import Mechanism
from attnlab.core.past_sums import at_queries, past_sums
from attnlab.core.recurrence import resets, state_dtype


class InLineState(NamedTuple):
    """Sums of keys and values about their means, and plain sums of key, value and one."""

    covariance: Float[Array, "*B K H D"]
    sums: Float[Array, "*B K E"]


def inline_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    feature_map: Callable[[Array], Array] | None = None,
    filters: Float[Array, "*B N D 3 3"] | None = None,
    grid: tuple[int, int] | None = None,
    **options: Any,
) -> Any:
    """Attention whose weights are affine in the query, O(T + S): "*B T N D".

    Args:
      feature_map: phi, for queries and keys; None for the identity.
      filters, grid: of the local residual, one filter per channel, and the rows and columns of the
        image that the tokens make up, row by row.
      options: as for `attnlab.linear_attention`, but masks that pick pairs; a state is an
        `InLineState`.

    Raises:
      ValueError: a grid that is not the length of the sequence, or filters with a causal mask.
      NotImplementedError: a mask that picks pairs.
    """
    query, key, value = real_inputs(query, key, value, options)
    dtype, wide = query.dtype, state_dtype(query.dtype)
    query, key, value = (x.astype(wide) for x in (query, key, value))
    if feature_map is not None:
        query, key = feature_map(query), feature_map(key)
    known = _known(query, key, options)
    causal = bool(options.pop("causal", False)) or known.causal
    before = options.pop("initial_state", None)
    lengths = (query.shape[-3], key.shape[-3])
    offsets = (options.get("query_offset", 0), options.get("key_offset", 0))
    both = jnp.concatenate([key, value, jnp.ones_like(value[..., :1])], -1)
    start = None if known.ids is None else resets(jnp.broadcast_to(known.ids, key.shape[:-2]))
    sums = past_sums(_kept(both, known.keys), start, causal=causal, before=before and before.sums)
    mean, count = _mean(sums)
    moved = both[..., :-1] - mean
    if causal:  # what one more key adds to the sum of products about a mean that moves as well
        moved = moved * jnp.sqrt(count / jnp.maximum(count - 1, 1))
    at_query = at_queries(sums, lengths, offsets) if causal else sums
    mean, count = (repeat_heads(x, query.shape[-2]) for x in _mean(at_query))
    width = key.shape[-1]
    found = linear_attention(
        query * width**-0.5 / count, moved[..., :width], moved[..., width:], causal=causal,
        initial_state=before and before.covariance, **options,
    )  # fmt: skip
    out, *covariance = found if options.get("return_state") else (found,)
    mean = jnp.broadcast_to(mean[..., width:], out.shape)
    out = out + _kept(mean, known.queries)
    if filters is not None:
        if causal:
            raise ValueError("filters: a local residual looks ahead; got a causal mask with it.")
        out = out + local_residual(repeat_heads(value, query.shape[-2]), filters, grid)
    out = out.astype(dtype)
    return (out, InLineState(covariance[0], sums[..., -1, :, :])) if covariance else out


def _known(query: Array, key: Array, options: dict[str, Any]) -> Layout:
    offsets = (options.get("query_offset", 0), options.get("key_offset", 0))
    mask = Full() if options.get("mask") is None else as_mask(options["mask"])
    known = layout(mask, (query.shape[-3], key.shape[-3]), offsets)
    if known is None:
        raise NotImplementedError(
            f"mask: {type(mask).__name__} picks pairs, and InLine attention takes Causal, padding "
            "and Segments; attnlab.attention takes any mask."
        )
    return known


def _mean(sums: Array) -> tuple[Array, Array]:
    """Means, and how many they are of, at least 1."""
    count = jnp.maximum(sums[..., -1:], 1)
    return sums[..., :-1] / count, count


def local_residual(
    value: Float[Array, "*B S N D"], filters: Float[Array, "*B N D 3 3"], grid: Any
) -> Float[Array, "*B S N D"]:
    """Each channel of an image through its own 3 x 3 filter, with zeros around the image."""
    if grid is None or len(grid) != 2 or math.prod(grid) != value.shape[-3]:
        raise ValueError(
            f"grid: expected rows and columns of {value.shape[-3]} tokens, got {grid}."
        )
    rows, cols = grid
    image = value.reshape(*value.shape[:-3], rows, cols, *value.shape[-2:])
    edges = [(0, 0)] * (image.ndim - 4) + [(1, 1), (1, 1), (0, 0), (0, 0)]
    image, filters = jnp.pad(image, edges), filters.astype(value.dtype)
    out = jnp.zeros((), value.dtype)
    for i in range(3):
        for j in range(3):
            here = image[..., i : i + rows, j : j + cols, :, :]
            out = out + here * filters[..., None, None, :, :, i, j]
    return out.reshape(value.shape)


class InLine(Mechanism):
    """InLine attention; with a `grid` it has the local residual's MLP, a block for each head.

    Args:
      feature_map: as for `inline_attention`.
      grid: rows and columns of the image, None for no residual.
      num_heads, value_width: of the residual, whose layer is their product wide.
    """

    def __init__(
        self,
        *,
        feature_map: Callable[[Array], Array] | None = None,
        grid: tuple[int, int] | None = None,
        num_heads: int = 1,
        value_width: int = 1,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        self.feature_map, self.grid = feature_map, grid
        if grid is not None and rngs is None:
            raise ValueError("rngs: expected random streams for the residual's MLP, got None.")
        draw = None if grid is None else (lambda *shape: _uniform(rngs, value_width, shape))
        width = value_width

        def param(*shape: int) -> Any:
            return nnx.data(None if draw is None else nnx.Param(draw(num_heads, *shape)))

        self.inner, self.inner_bias = param(width, width), param(width)
        self.outer, self.outer_bias = param(9 * width, width), param(9 * width)

    def controls(self, x: Float[Array, "*B T F"]) -> dict[str, Any]:
        """The filters, from the mean of the layer's input."""
        if self.grid is None:
            return {}
        heads, width = self.inner[...].shape[:2]
        pooled = jnp.mean(x.astype(jnp.float32), -2)
        pooled = pooled.reshape(*pooled.shape[:-1], heads, width)
        hidden = _grouped(pooled, self.inner[...], self.inner_bias[...])
        taps = _grouped(
            jax.nn.gelu(hidden, approximate=False), self.outer[...], self.outer_bias[...]
        )
        return {"filters": taps.reshape(*taps.shape[:-1], width, 3, 3)}

    def init_state(
        self, batch_shape: tuple[int, ...], num_kv_heads: int, head_width: int, value_width: int
    ) -> Any:
        if self.grid is not None:
            return None
        shape = (*batch_shape, num_kv_heads, head_width + value_width + 1)
        memory = linear_state(batch_shape, num_kv_heads, head_width, value_width)
        return InLineState(memory, jnp.zeros(shape, jnp.float32))

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return inline_attention(
            query, key, value, feature_map=self.feature_map, grid=self.grid, **options
        )


def _uniform(rngs: Any, fan_in: int, shape: tuple[int, ...]) -> Array:
    bound = fan_in**-0.5
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)


def _grouped(x: Array, weight: Array, bias: Array) -> Array:
    """A dense layer for each head: "*B N D" by "N E D"."""
    out = product("...nd,ned->...ne", x, weight)
    return out + jnp.expand_dims(bias, range(out.ndim - 2))


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> InLine:
    return InLine()


ENTRY = Entry(
    id="inline-attention",
    title="InLine attention",
    family="linear",
    paper=Paper(
        "Bridging the Divide: Reconsidering Softmax and Linear Attention",
        "Han, Pu, Xia, Han, Pan, Li, Lu, Song & Huang",
        2024,
        "2412.06590",
    ),
    summary="Weights of linear attention shifted to sum to one rather than divided: queries that "
    "differ in length alone stay different.",
    formula=r"w_{ts} = \frac{\phi(q_t)^\top \big(\phi(k_s) - \bar\phi(k)\big)}{\sqrt{H}\,n} "
    r"+ \frac{1}{n}",
    patterns=PATTERNS,
    time="O((T + S)·H·D)",
    memory="O(T + S)",
    exact="Exact; weights are affine in the query and may be negative.",
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
    function=inline_attention,
    module=InLine,
    build=_build,
    implementations=RECURRENCE,
    masks="documents",
)
