r"""Ring attention: each device holds a part of the sequence, keys and values go round.

    (out, lse)_d = merge over n = 0 ... P - 1 of attention(queries of d, keys of d - n mod P)

Liu, Zaharia & Abbeel 2023, arXiv:2310.01889: device d computes blockwise attention of its queries
with the keys at hand while it sends these on to device d + 1 and receives those of d - 1, so that
contexts grow with the number of devices; the result is exact.  The merge is that of partial
softmaxes (`attnlab.core.partial`), the backward pass a second ring in which gradients of keys and
values travel with them.  Masks, modifiers, normalizers, documents packed across the borders of
parts, dropout and grouped heads are those of `attnlab.attention`, with the same numbers.

What was settled: the paper deals tokens out in order; `layout` offers two orders that share causal
work evenly.  A window's keys travel only as far as a window reaches.  Normalizers and modifiers
that need whole rows of scores (sparsemax, entmax) cannot be merged: their keys are gathered, O(S)
memory per device.  The paper's blockwise feed-forward is `attnlab.models`' `feed_forward_chunk`.
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from attnlab.core.attention import attention
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.modules import Mechanism
from attnlab.distributed.across import over


def device_ring(most: int | None = None) -> Mesh:
    """All devices, or `most` of them, in one mesh axis, "ring"."""
    devices = jax.devices()[:most]
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(devices),), ("ring",), devices=devices, axis_types=axis_types)


def ring_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    mesh: Mesh | None = None,
    ring: str | None = "ring",
    heads: str | None = None,
    batch: str | tuple[str, ...] | None = None,
    layout: str = "contiguous",
    arranged: bool = False,
    **options: Any,
) -> Any:
    """Attention with the sequence cut over a mesh axis: "*B T N D", in natural order.

    Args:
      mesh: where to; all devices in one axis "ring", if left out.
      ring: the mesh axis that cuts the sequence.
      heads: a second one, over which heads are exchanged for positions; with `ring=None` alone.
      batch, layout, arranged: see `attnlab.distributed.Across`.
      options: as for `attnlab.attention`; `implementation` says what computes on each device:
        "blockwise", or a fused kernel.  With "tpu", on TPUs with one core, the kernel itself sends
        keys, values and their gradients on while it computes (`pallas_kernels.ring`).

    Raises:
      ValueError: a mesh axis that is missing, heads or a batch that it does not divide, an unknown
        layout; else as `attnlab.attention`.
      NotImplementedError: an implementation that does not go round a ring.
    """
    mesh = device_ring() if mesh is None else mesh
    with over(mesh, ring=ring, heads=heads, batch=batch, layout=layout, arranged=arranged):
        return attention(query, key, value, **options)


def ulysses_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    mesh: Mesh,
    heads: str = "heads",
    batch: str | tuple[str, ...] | None = None,
    **options: Any,
) -> Any:
    """Attention with the sequence cut over a mesh axis, heads exchanged for positions: "*B T N D".

    Before, each device holds some positions of all heads; for attention, all positions of some
    heads; afterwards some positions of all again.  Jacobs et al. 2023, arXiv:2309.14509
    (DeepSpeed-Ulysses).  The number of query heads is a multiple of the axis; key heads are
    repeated where there are fewer.  Any implementation that serves the call on one device does.

    Args and errors: as for `ring_attention`.
    """
    with over(mesh, heads=heads, batch=batch):
        return attention(query, key, value, **options)


class RingAttention(Mechanism):
    """Ring attention over a mesh; adds no parameters."""

    def __init__(
        self,
        mesh: Mesh | None = None,
        *,
        ring: str | None = "ring",
        heads: str | None = None,
        batch: str | tuple[str, ...] | None = None,
        layout: str = "contiguous",
    ) -> None:
        self.mesh = device_ring() if mesh is None else mesh
        self.ring, self.heads, self.batch, self.layout = ring, heads, batch, layout

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        return ring_attention(
            query, key, value, mesh=self.mesh, ring=self.ring, heads=self.heads, batch=self.batch,
            layout=self.layout, **options,
        )  # fmt: skip


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> RingAttention:
    return RingAttention(device_ring(2), layout="zigzag")


ENTRY = Entry(
    id="ring-attention",
    title="Ring attention",
    family="distributed",
    paper=Paper(
        "Ring Attention with Blockwise Transformers for Near-Infinite Context",
        "Liu, Zaharia, Abbeel",
        2023,
        arxiv="2310.01889",
    ),
    summary="Each device keeps its queries and computes while keys and values travel round a ring.",
    formula=r"o_d = \bigoplus_{n=0}^{P-1} \mathrm{softmax}\!\left(Q_d K_{d-n}^\top / "
    r"\sqrt{H}\right) V_{d-n}",
    patterns=PATTERNS,
    time="O(T S H / P) per device",
    memory="O((T + S) / P) per device",
    exact="exact",
    properties=frozenset(
        {
            "position-free",
            "translation-invariant",
            "gqa",
            "lse",
            "rows-sum-to-one",
            "linear-memory",
            "decode",
        }
    ),
    function=ring_attention,
    module=RingAttention,
    build=_build,
    implementations=("blockwise",),
)
