r"""Concentric causal attention: image patches are ordered in rings, from the border to the centre.

    place(t) = t before an image of h x w patches at m, m + ring(r, c) in it, and after it
               t - h w + R,      ring(r, c) = min(r, c, h - 1 - r, w - 1 - c)
    out = softmax attention of queries and keys rotated by their places (RoPE),
          where i sees j if place(j) <= place(i)

with R = ceil(min(h, w) / 2) rings.  In raster order the first patch is h w tokens away from the
instruction that follows, and RoPE's preference for what is near makes the model see objects that
are not there; in rings no patch is further than R.  Text is causal, patches of one ring see each
other and the rings outside theirs, and what follows sees the whole image.  Xing, Li, Laptev & Lu
2024, arXiv:2410.15926; released for 24 x 24 patches in LLaVA-1.5, whose 576 positions become 12.
The authors' code has even squares only, for which the rule of `ring` is theirs.

Settled here: several images each save their h w - R.  An image is to be read in one call: patches
of a ring see later ones.  The caller's mask narrows this one; `attnlab.masks.Causal()` would take
from rings what they see.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import Entry, Paper
from attnlab.core.masks import CausalBy, as_mask
from attnlab.core.modules import Mechanism
from attnlab.core.rotary import rotate


def rings(height: int, width: int) -> Int[np.ndarray, "height width"]:
    """The ring of each patch: 0 at the border, ceil(min / 2) - 1 at the centre."""
    row, col = np.arange(height)[:, None], np.arange(width)[None, :]
    return np.minimum(np.minimum(row, height - 1 - row), np.minimum(col, width - 1 - col))


@dataclasses.dataclass(frozen=True)
class ConcentricLayout:
    """Where images lie in a sequence: `images` of (start, height, width), in order.

    Raises:
      ValueError: an image without patches, before the first token, or that begins within another.
    """

    images: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(tuple(image) for image in self.images))
        for start, height, width in self.images:
            if start < 0 or height < 1 or width < 1:
                raise ValueError(
                    "images: expected (start, height, width), start 0 or more and sizes positive, "
                    f"got {(start, height, width)}."
                )
        for (start, height, width), after in itertools.pairwise(self.images):
            if after[0] < start + height * width:
                raise ValueError(
                    f"images: {after} begins within {(start, height, width)} or before it; "
                    "they should be in order and apart."
                )

    def _table(self) -> tuple[Int[np.ndarray, " E"], int]:
        """Places of the tokens up to the end of the last image, and how far those after move."""
        place: list[int] = []
        moved = 0
        for start, height, width in self.images:
            place += [t - moved for t in range(len(place), start)]
            place += (rings(height, width).reshape(-1) + start - moved).tolist()
            moved += height * width - -(-min(height, width) // 2)
        return np.asarray(place, np.int32), moved

    def places(self, length: int, offset: Any = 0) -> Int[Array, " T"]:
        """Places of the tokens `offset` to offset + length - 1."""
        table, moved = self._table()
        t = jnp.arange(length, dtype=jnp.int32) + offset
        if not len(table):
            return t
        within = jnp.asarray(table)[jnp.clip(t, 0, len(table) - 1)]
        return jnp.where(t < len(table), within, t - moved)

    def mask(
        self, num_queries: int, num_keys: int, *, query_offset: Any = 0, key_offset: Any = 0
    ) -> CausalBy:
        """Who sees whom, for models with other encodings."""
        return CausalBy(self.places(num_queries, query_offset), self.places(num_keys, key_offset))

    def check_cut(self, last_query: Any, last_key: Any) -> None:
        """Raise ValueError where queries end within an image of which there may be more keys."""
        if not all(isinstance(x, int | np.integer) for x in (last_query, last_key)):
            return
        for start, height, width in self.images:
            if start <= last_query < start + height * width - 1 and last_key > last_query:
                raise ValueError(
                    f"images: the queries end at {last_query}, within the image "
                    f"{(start, height, width)}; read an image in one call."
                )


def concentric_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    layout: ConcentricLayout | None = None,
    positions: tuple[Array, Array] | None = None,
    theta: float = 10_000.0,
    interleaved: bool = True,
    mask: Any = None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> Any:
    """Softmax attention in the order of the layout: "*B T N D".

    Args:
      layout: where the images are; none by default, which is causal attention with RoPE.
      positions: instead of a layout, places of queries "*B T" and of keys "*B S", as where images
        lie elsewhere in each sequence of a batch.
      theta, interleaved: as for RoPE.
      mask: narrows what may meet.
      query_offset, key_offset, options: as for `attnlab.attention`.

    Raises:
      ValueError: both a layout and positions, queries that end within an image whose other patches
        are among the keys (where offsets are plain integers), or an odd head width.
    """
    query, key, value = check_inputs(query, key, value)
    if layout is not None and positions is not None:
        raise ValueError("positions: given as well as a layout; give one.")
    lengths = query.shape[-3], key.shape[-3]
    if positions is None:
        layout = ConcentricLayout() if layout is None else layout
        layout.check_cut(query_offset + lengths[0] - 1, key_offset + lengths[1] - 1)
        positions = (layout.places(lengths[0], query_offset), layout.places(lengths[1], key_offset))
    turn: dict[str, Any] = {"theta": theta, "interleaved": interleaved}
    query = rotate(query, position=positions[0], **turn)
    key = rotate(key, position=positions[1], **turn)
    order = CausalBy(*positions)
    return attention(
        query, key, value, mask=order if mask is None else order & as_mask(mask),
        query_offset=query_offset, key_offset=key_offset, **options,
    )  # fmt: skip


class ConcentricCausal(Mechanism):
    """Concentric causal attention for one layout of images; no parameters."""

    function = staticmethod(concentric_attention)

    def __init__(
        self, layout: ConcentricLayout, *, theta: float = 10_000.0, interleaved: bool = True
    ) -> None:
        self.layout, self.theta, self.interleaved = layout, theta, interleaved

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        """Attend: "*B T N D".  `positions`, if given, take the place of the layout."""
        own: dict[str, Any] = {"theta": self.theta, "interleaved": self.interleaved}
        if options.get("positions") is None:
            options["layout"] = self.layout
        return self.function(query, key, value, **own, **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> ConcentricCausal:
    return ConcentricCausal(ConcentricLayout(((2, 3, 3),)))


ENTRY = Entry(
    id="concentric-causal",
    title="Concentric causal attention",
    family="positional",
    paper=Paper(
        "Mitigating Object Hallucination via Concentric Causal Attention",
        "Xing, Li, Laptev & Lu",
        2024,
        "2410.15926",
    ),
    summary="Image patches are placed and masked by rings, from the border to the centre, so that "
    "no part of an image is far from the text that follows it.",
    formula=r"A_{ij} \propto e^{(R_{\rho(i)} q_i)^\top (R_{\rho(j)} k_j) / \sqrt{H}} \text{ if }"
    r"\ \rho(j) \le \rho(i), \quad \rho = m + \min(r, c, h - 1 - r, w - 1 - c) \text{ in an image}",
    patterns=("noncausal self",),
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset({"decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}),
    function=concentric_attention,
    module=ConcentricCausal,
    build=_build,
)
