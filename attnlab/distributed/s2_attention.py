r"""S2-Attention: the context is dealt out to the heads, and together they see all of it.

    head n sees key j from query i >= j   if   i' - j' < w   or   (j' + n) mod s = 0
    i' = floor(i / b), j' = floor(j / b)

in blocks of b tokens: the last w blocks, its own among them, and before those one of every s
blocks, another one for each head.  A head reads about 1/s of a long context, and what is behind its
window and not in its share it never reads again, so that a cache can drop it.  Lin, Zhang, Ge,
Ren, Patra, Chaudhary, Peng & Song 2024, arXiv:2407.17678.

Settled by the authors' code, linxihui/dkernel, dkernel/utils.py, get_sparse_attn_mask: shares are
counted in absolute blocks where attention is causal; query heads of one key head have one share, as
they have one cache; an `offset` is added to n; dense heads are the last ones, of key heads; all
heads may be given the same share (there `homo_head`), which is what the paper compares with.
There, heads fewer than s take every (s / heads)-th share, and where key heads are fewer than s but
query heads are not, the first shares: either way some blocks are seen by no head.  Here such
numbers are refused.  Left out: the pattern without a causal order, in which shares are relative.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import Entry, Paper
from attnlab.core.masks import Mask, as_mask
from attnlab.core.modules import Mechanism
from attnlab.core.spans import Span, same_rank
from attnlab.core.terms import ArrayLeaf, At, leaf, static

DENSE = -1  # the share of a head that sees everything


class Shards(Mask):
    """Causal: the last blocks, and of those before them one of every `stride`, by head.

    Args:
      share: integers "N": head n sees the blocks j with (j + share[n]) mod stride = 0; `DENSE` for
        one that sees all of them.  `shares` makes them.
      stride, block_size, local_blocks: s, b and w.

    Raises:
      TypeError: a size that is not an int.
      ValueError: a size that is not positive.
    """

    share: ArrayLeaf = leaf("N")
    stride: int = static()
    block_size: int = static(default=64)
    local_blocks: int = static(default=1)

    def __post_init__(self) -> None:
        for name in ("stride", "block_size", "local_blocks"):
            _check_size(name, getattr(self, name))

    def allowed(self, at: At) -> Bool[Array, "..."]:
        query, key = at.query // self.block_size, at.key // self.block_size
        share: Any = self.share
        mine = (share < 0) | ((key + share) % self.stride == 0)
        return (at.key <= at.query) & ((query - key < self.local_blocks) | mine)

    def bounds(self, span: Span) -> tuple[Any, Any]:
        """Of all heads together: some see whatever is before, and all see what is near."""
        some, every = self._causal(span)
        return some, every & (self._reach(span.query_last, span.key_first) | (self.stride == 1))

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        """Of each head; exact."""
        share = jnp.asarray(self.share)[..., None, None]
        ends = (span.query_first, span.query_last, span.key_first, span.key_last, share)
        first_query, last_query, first_key, last_key, share = same_rank(*map(jnp.asarray, ends))
        some, every = self._causal(span)
        some, every = same_rank(jnp.asarray(some), jnp.asarray(every))
        some, every, _ = same_rank(some, every, share)
        near_key = jnp.minimum(last_key, last_query)
        near = self._reach(jnp.maximum(first_query, near_key), near_key)
        first, last = first_key // self.block_size, near_key // self.block_size
        found = first + (-first - share) % self.stride <= last
        # Of the blocks behind every window, the furthest behind from the last query.
        last = jnp.minimum(last_key, last_query) // self.block_size
        last = jnp.minimum(last, last_query // self.block_size - self.local_blocks)
        mine = (first == last) & ((first + share) % self.stride == 0)
        whole = (share < 0) | (last < first) | mine | (self.stride == 1)
        return some & (near | found | (share < 0)), every & whole

    def _causal(self, span: Span) -> tuple[Any, Any]:
        return span.key_first <= span.query_last, span.key_last <= span.query_first

    def _reach(self, query: Any, key: Any) -> Any:
        return query // self.block_size - key // self.block_size < self.local_blocks

    def needed(self, num_keys: int, query_offset: int) -> Bool[Array, "N S"]:
        """Which of the first keys a head reads from the query at `query_offset` on, if only once.

        All others can be dropped, whatever follows.
        """
        block = jnp.arange(num_keys, dtype=jnp.int32) // self.block_size
        share = jnp.asarray(self.share)[:, None]
        near = query_offset // self.block_size - block < self.local_blocks
        return near[None] | (share < 0) | ((block[None] + share) % self.stride == 0)


def shares(
    num_heads: int,
    stride: int,
    *,
    shard_heads: int | None = None,
    dense_heads: int = 0,
    homogeneous: bool = False,
    offset: int = 0,
) -> np.ndarray:
    """The share of each query head, "N": 0 to stride - 1, or `DENSE`.

    Args:
      num_heads: query heads N.
      stride: s.
      shard_heads: heads that differ, a divisor of N; consecutive heads are alike.  N by default.
      dense_heads: of these, how many of the last see everything.
      homogeneous: all heads have one share, and together do not see more than each of them.
      offset: added to the numbers of heads.

    Raises:
      TypeError: a number that is not an int.
      ValueError: heads that do not divide, more dense heads than heads, dense heads among equal
        ones, or too few heads to see everything.
    """
    shard_heads = num_heads if shard_heads is None else shard_heads
    for name, size in (("num_heads", num_heads), ("stride", stride), ("shard_heads", shard_heads)):
        _check_size(name, size)
    if num_heads % shard_heads:
        raise ValueError(
            f"shard_heads: expected a divisor of the {num_heads} query heads, got {shard_heads}."
        )
    if not isinstance(offset, int):
        raise TypeError(f"offset: expected an int, got {offset!r}.")
    if not isinstance(dense_heads, int) or not 0 <= dense_heads <= shard_heads:
        raise ValueError(
            f"dense_heads: expected 0 to {shard_heads}, the heads that differ, got {dense_heads!r}."
        )
    if homogeneous:
        if dense_heads:
            raise ValueError(f"dense_heads: homogeneous heads are all alike, got {dense_heads}.")
        return np.full(num_heads, offset % stride, np.int32)
    if not dense_heads and shard_heads < stride:
        raise ValueError(
            f"stride: {shard_heads} heads cannot see all of a context dealt out in {stride} "
            f"shares; expected at most {shard_heads}, or a dense head."
        )
    share = (np.arange(shard_heads) + offset) % stride
    share[shard_heads - dense_heads :] = DENSE
    return np.repeat(share, num_heads // shard_heads).astype(np.int32)


def _check_size(name: str, size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise TypeError(f"{name}: expected an int, got {size!r}.")
    if size < 1:
        raise ValueError(f"{name}: expected 1 or more, got {size}.")


def s2_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    stride: int,
    block_size: int = 64,
    local_blocks: int = 1,
    shard_heads: int | None = None,
    dense_heads: int = 0,
    homogeneous: bool = False,
    offset: int = 0,
    mask: Any = None,
    **options: Any,
) -> Any:
    """Causal attention, the context dealt out to heads: "*B T N D".

    Args:
      stride, block_size, local_blocks: see `Shards`; positions count from 0.
      shard_heads: how many heads differ; the K key heads by default.
      dense_heads, homogeneous, offset: see `shares`.
      mask: narrows what may meet.
      options: as for `attnlab.attention`.
    """
    query, key, value = check_inputs(query, key, value)
    share = shares(
        query.shape[-2], stride, shard_heads=key.shape[-2] if shard_heads is None else shard_heads,
        dense_heads=dense_heads, homogeneous=homogeneous, offset=offset,
    )  # fmt: skip
    shards: Mask = Shards(jnp.asarray(share), stride, block_size, local_blocks)
    if mask is not None:
        shards = shards & as_mask(mask)
    return attention(query, key, value, mask=shards, **options)


class S2Attention(Mechanism):
    """S2-Attention; no parameters.  Args: see `s2_attention`."""

    function = staticmethod(s2_attention)

    def __init__(
        self,
        stride: int,
        *,
        block_size: int = 64,
        local_blocks: int = 1,
        shard_heads: int | None = None,
        dense_heads: int = 0,
        homogeneous: bool = False,
        offset: int = 0,
    ) -> None:
        for name, size in (
            ("stride", stride), ("block_size", block_size), ("local_blocks", local_blocks)
        ):  # fmt: skip
            _check_size(name, size)
        self.stride, self.block_size, self.local_blocks = stride, block_size, local_blocks
        self.shard_heads, self.dense_heads = shard_heads, dense_heads
        self.homogeneous, self.offset = homogeneous, offset

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        """Attend: "*B T N D"."""
        return self.function(
            query, key, value, stride=self.stride, block_size=self.block_size,
            local_blocks=self.local_blocks, shard_heads=self.shard_heads,
            dense_heads=self.dense_heads, homogeneous=self.homogeneous, offset=self.offset,
            **options,
        )  # fmt: skip


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> S2Attention:
    # As many shares as the example has key heads, so that repeating these changes none.
    return S2Attention(2, block_size=2, shard_heads=2 if num_heads % 2 == 0 else None)


ENTRY = Entry(
    id="s2-attention",
    title="S2-Attention",
    family="distributed",
    paper=Paper(
        "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention "
        "Heads",
        "Lin, Zhang, Ge, Ren, Patra, Chaudhary, Peng & Song",
        2024,
        "2407.17678",
    ),
    summary="The context is dealt out to the heads: each sees what is near and every s-th block "
    "of what is not, and together they see all.",
    formula=r"A^{(n)}_{ij} \propto e^{q_i^\top k_j / \sqrt{H}} \text{ if } j \le i \text{ and }"
    r"\left(i' - j' < w \text{ or } (j' + n) \bmod s = 0\right), \qquad x' = \lfloor x / b \rfloor",
    patterns=("causal self",),
    time="O(T·(w·b + S / s)·H)",
    memory="O(T + S)",
    exact="Each head leaves out what belongs to others; together they leave out nothing.",
    properties=frozenset({"decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}),
    function=s2_attention,
    module=S2Attention,
    build=_build,
)
