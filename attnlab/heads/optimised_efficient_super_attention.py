r"""Optimised, efficient and super attention: slices of the input in place of projections.

    optimised:  out = concat_n softmax(x W^Q_n (x W^K_n)^T / sqrt(H)) x^n W^O        3 F^2
    efficient:  out = concat_n softmax(x W^Q_n (x^n)^T / sqrt(H)) x^n W^O            2 F^2
    super:      out = concat_n softmax(x W^Q_n (x^n)^T / sqrt(H)) (A x)^n W^O        2 F^2 + L^2

x^n is the n-th of N slices of the input, H = F / N wide, and A "L L" one matrix over positions,
shared by the heads.  Hosseini & Hosseini 2024, arXiv:2403.01643: of W^V W^O and W^Q W^K^T one
matrix each is enough for a single head; several heads lose what lies outside of their slices.  The
sequence may be L long; super has fewer parameters than optimised where L < F.

The paper was read in summaries.  Settled here: rows of A are the tokens that read, so under a
causal mask its lower triangle is used; A starts as 1, where super is efficient; shorter sequences
use its first rows and columns.  A row of A belongs to a position within the document, and padding
is taken out of the values before A mixes them.  Positions are absolute.

A cache keeps what is sliced, not what A makes of it: super decodes, and mixes all cached values
anew at every step.  Keys and values are cached both, though efficient has them alike.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention
from attnlab.core.decay_tree import product
from attnlab.core.documents import place_in_document
from attnlab.core.entry import Entry, Paper
from attnlab.core.linear_attention import real_inputs
from attnlab.core.mask_layout import Layout, layout
from attnlab.core.masks import Full, as_mask
from attnlab.core.modules import Mechanism
from attnlab.core.terms import accumulator

VARIANTS = {"optimised": ("query", "key"), "efficient": ("query",), "super": ("query",)}


def super_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    mixing: Float[Array, "L L"],
    mask: Any = None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> Any:
    """Softmax attention to values that `mixing` has mixed over positions: "*B T N D".

    Args:
      mixing: A, the values of token j becoming sum_k A_jk v_k; S at most L.
      mask: causality, padding and documents.
      key_offset: the position of the first key, where there are no documents.
      options: as for `attnlab.attention`.

    Raises:
      ValueError: more tokens than A has rows, or A that is not square.
      NotImplementedError: a mask that picks pairs.
    """
    places = {"mask": mask, "query_offset": query_offset, "key_offset": key_offset}
    query, key, value = real_inputs(query, key, value, places)
    whole = Full() if mask is None else as_mask(mask)
    known = layout(whole, (query.shape[-3], key.shape[-3]), (query_offset, key_offset))
    if known is None:
        raise NotImplementedError(
            f"mask: {type(whole).__name__} picks pairs, and mixed values may not tell what it "
            "hides; expected causality, padding and documents. attnlab.attention takes any mask."
        )
    value = _mixed(value, jnp.asarray(mixing), known, key_offset)
    return attention(query, key, value, **places, **options)


def _mixed(value: Array, mixing: Array, known: Layout, offset: Any) -> Array:
    """sum_k A_jk v_k over the tokens k of the document of j; not later ones if causal."""
    length, shape = value.shape[-3], mixing.shape
    last = length + (offset if isinstance(offset, int) else 0)
    if len(shape) != 2 or shape[0] != shape[1] or last > shape[0]:
        raise ValueError(f"mixing: expected a square matrix for {last} tokens, got shape {shape}.")
    place = jnp.arange(length, dtype=jnp.int32) + offset
    allowed = jnp.ones((length, length), bool)
    if known.ids is not None:
        ids = known.ids
        ids = ids if ids.ndim == 1 else jnp.broadcast_to(ids, value.shape[:-2])
        place = place_in_document(ids)
        allowed = ids[..., :, None] == ids[..., None, :]
    rows, columns = place[..., :, None], place[..., None, :]
    if known.causal:
        allowed = allowed & (columns <= rows)
    dtype = accumulator(value.dtype)
    weights = jnp.where(allowed, mixing.astype(dtype)[rows, columns], jnp.zeros((), dtype))
    formula = "ts,...skd->...tkd" if weights.ndim == 2 else "...ts,...skd->...tkd"
    return product(formula, weights, value.astype(dtype)).astype(value.dtype)


class SlicedAttention(Mechanism):
    """Optimised, efficient or super attention; only the last has a parameter, A "L L".

    `MultiHeadAttention(F, N, mechanism=SlicedAttention(variant))` is the paper's layer.

    Args:
      variant: "optimised", "efficient" or "super".
      max_length: L, for "super".

    Raises:
      ValueError: another variant; a length that is missing, not positive, or without use.
    """

    def __init__(self, variant: str = "super", *, max_length: int | None = None) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {list(VARIANTS)}, got {variant!r}.")
        fits = max_length is None if variant != "super" else (max_length or 0) > 0
        if not fits:
            raise ValueError(
                'max_length: expected a positive int with variant="super" and None otherwise, got '
                f"{max_length!r} with {variant=}."
            )
        self.variant, self.projected = variant, VARIANTS[variant]
        self.mixing = nnx.data(None if max_length is None else nnx.Param(jnp.eye(max_length)))

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        if self.mixing is None:
            return attention(query, key, value, **options)
        return super_attention(query, key, value, mixing=self.mixing[...], **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> SlicedAttention:
    return SlicedAttention("super", max_length=128)


ENTRY = Entry(
    id="optimised-efficient-super-attention",
    title="Optimised, efficient and super attention",
    family="heads",
    paper=Paper(
        "You Need to Pay Better Attention: Rethinking the Mathematics of Attention Mechanism",
        "Hosseini & Hosseini",
        2024,
        "2403.01643",
    ),
    summary="Slices of the input take the place of the value's projection, or also of the key's; "
    "super attention adds one learned matrix that mixes values over positions.",
    formula=r"\mathrm{out} = \mathrm{concat}_n \, \mathrm{softmax}\!\left(\frac{x W^Q_n (x^n)^\top}"
    r"{\sqrt{H}}\right) (A x)^n \, W^O, \qquad A \in \mathbb{R}^{L \times L}",
    patterns=("noncausal self", "causal self"),
    time="O(T·S·H + S²·H)",
    memory="O(S²)",
    exact="Exact; A serves sequences of up to L tokens.",
    properties=frozenset({"decode", "gqa", "lse"}),
    function=super_attention,
    module=SlicedAttention,
    build=_build,
    masks="documents",
)
