r"""Linformer: keys and values compressed along the sequence, to R of each.

    out = softmax(q (E k)^T / sqrt(H)) (F v),      E, F "R L", learned, one column to a position

Wang, Li, Khabsa, Fang & Ma 2020, arXiv:2006.04768: matrices of softmax weights are nearly of low
rank, so O(n R) does nearly as well as O(n^2).  E and F are shared by the heads of a layer, may be
one matrix ("key-value"), and that the same in all layers (`projection`).

A sequence shorter than L uses the first columns.  Padding is left out of keys and values before
they are compressed.  Every compressed key mixes all positions, so there is no causal form, nor
any mask but padding.  The authors' variants by pooling and convolution are left out.  Projections
come after those to keys and values here; without biases the order does not matter.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention
from attnlab.core.decay_tree import product
from attnlab.core.entry import Entry, Paper
from attnlab.core.linear_attention import _kept, real_inputs
from attnlab.core.mask_layout import layout
from attnlab.core.masks import Full, as_mask
from attnlab.core.modules import Mechanism
from attnlab.core.recurrence import state_dtype

NUM_COMPRESSED = 256
SHARING = ("heads", "key-value", "none")


def linformer_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    key_projection: Float[Array, "..."],
    value_projection: Float[Array, "..."] | None = None,
    mask: Any = None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> Any:
    """Softmax attention to R compressed keys, O(T R + S R): "*B T N D".

    Args:
      key_projection, value_projection: E and F, "R L" or one for each key head, "K R L"; S at most
        L.  F is E by default.
      mask: padding of keys and of queries; positions count columns of E and F from `key_offset` on.
      options: as for `attnlab.attention`, but modifiers; dropout drops compressed keys.

    Raises:
      ValueError: more keys than columns, projections of another shape, modifiers.
      NotImplementedError: any mask but padding.
    """
    places = {"mask": mask, "query_offset": query_offset, "key_offset": key_offset}
    query, key, value = real_inputs(query, key, value, places)
    known = layout(
        Full() if mask is None else as_mask(mask), (query.shape[-3], key.shape[-3]),
        (query_offset, key_offset),
    )  # fmt: skip
    if known is None or known.causal or known.ids is not None:
        raise NotImplementedError(
            f"mask: {type(mask).__name__} is no padding, and compressed keys mix all positions; "
            "causal linear mechanisms such as linear-transformer take it, attnlab.attention any."
        )
    if options.get("modifiers"):
        raise ValueError("modifiers: compressed keys have no positions; expected none.")
    value_projection = key_projection if value_projection is None else value_projection
    pairs = (("key_projection", key_projection, key), ("value_projection", value_projection, value))
    key, value = (_compressed(*pair, key_offset) for pair in pairs)
    found = attention(query, key, value, **options)
    out, *lse = found if options.get("return_lse") else (found,)
    out = _kept(out, known.queries)
    return (out, *lse) if lse else out


def _compressed(name: str, projection: Any, x: Array, offset: Any) -> Array:
    """Positions mixed into R: "*B R K H", in the dtype of x."""
    projection, length = jnp.asarray(projection), x.shape[-3]
    shape = projection.shape
    if projection.ndim not in (2, 3) or (len(shape) == 3 and shape[0] != x.shape[-2]):
        raise ValueError(f"{name}: expected shape (R, L) or ({x.shape[-2]}, R, L), got {shape}.")
    last = length + (offset if isinstance(offset, int) else 0)
    if last > shape[-1]:
        raise ValueError(f"{name}: expected columns for {last} positions, got {shape[-1]}.")
    wide = state_dtype(x.dtype)
    columns = jax.lax.dynamic_slice_in_dim(projection, offset, length, axis=projection.ndim - 1)
    formula = "rs,...skh->...rkh" if projection.ndim == 2 else "krs,...skh->...rkh"
    return product(formula, columns.astype(wide), x.astype(wide)).astype(x.dtype)


class Linformer(Mechanism):
    """Linformer; holds E and F.

    Args:
      max_length: L, positions there are columns for.
      num_compressed: R.
      sharing: "heads", E and F for all heads; "key-value", E alone, for keys and values; "none", E
        and F for each of `num_heads` key heads.
      projection: another layer's `key_projection`, to be this layer's too ("key-value").
    """

    def __init__(
        self,
        max_length: int,
        *,
        num_compressed: int = NUM_COMPRESSED,
        sharing: str = "heads",
        num_heads: int = 1,
        projection: nnx.Param | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if sharing not in SHARING:
            raise ValueError(f"sharing: expected one of {', '.join(SHARING)}, got {sharing!r}.")
        if min(max_length, num_compressed) < 1:
            raise ValueError(
                f"max_length: expected positive sizes, got {max_length=}, {num_compressed=}."
            )
        if projection is not None and sharing != "key-value":
            raise ValueError(f'projection: goes with sharing="key-value", got {sharing!r}.')
        # Xavier with a gain of 1/sqrt(2), as in the implementation in fairseq.
        bound = (3 / (max_length + num_compressed)) ** 0.5
        heads = (num_heads,) if sharing == "none" else ()

        def drawn() -> nnx.Param:
            shape = (*heads, num_compressed, max_length)
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.key_projection = drawn() if projection is None else projection
        self.value_projection = nnx.data(None if sharing == "key-value" else drawn())

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        own = self.value_projection
        options["key_projection"] = self.key_projection[...]
        options["value_projection"] = None if own is None else own[...]
        return linformer_attention(query, key, value, **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> Linformer:
    return Linformer(4096, num_compressed=head_width, rngs=rngs)


ENTRY = Entry(
    id="linformer",
    title="Linformer",
    family="linear",
    paper=Paper(
        "Linformer: Self-Attention with Linear Complexity",
        "Wang, Li, Khabsa, Fang & Ma",
        2020,
        "2006.04768",
    ),
    summary="Learned matrices compress keys and values along the sequence to a fixed number, and "
    "softmax attention reads those.",
    formula=r"o = \mathrm{softmax}\!\left(\frac{q\,(E k)^\top}{\sqrt{H}}\right) (F v), \qquad "
    r"E, F \in \mathbb{R}^{R \times L}",
    patterns=("noncausal self", "noncausal cross"),
    time="O((T + S)·R·H)",
    memory="O(T + S)",
    exact="Exact; equals softmax attention for E = F = 1, R = S.",
    properties=frozenset({"gqa", "linear-memory"}),
    function=linformer_attention,
    module=Linformer,
    build=_build,
    masks="keys",
)
