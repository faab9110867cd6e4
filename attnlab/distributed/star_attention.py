r"""Star Attention: a long context is encoded in blocks, and read by the query as a whole.

    phase 1   a token of the context sees, of the tokens up to its own, those of its own block and
              the anchor, the first A <= b tokens:   j < A  or  floor(i / b) = floor(j / b)
    phase 2   the query and what is generated, i >= C, see everything up to their own token

with blocks of b tokens and a context of C.  Acharya, Jia & Ginsburg 2024, arXiv:2411.17116: blocks
lie on hosts; each encodes [anchor; block] by itself and keeps the keys and values of the block.
In phase 2 the query is on every host, and what they find is merged (`attnlab.distributed.merge`).

Settled by the authors' code, NVIDIA/Star-Attention, model.py: anchor and block keep their own
positions in the context; the first block has no anchor; A is b unless given, and comes off the
first block, so that it cannot be longer.  What a host computes of the anchor is what the first
block is, in every layer, so that phase 1 is one mask, and `star_context` is the same on devices:
the anchor's keys are sent once a layer, where the authors' hosts compute them again.
There the tokens of a query of several miss the last keys of every host but the last, as a causal
mask is laid against the end of each host's keys; the paper has no such rule, nor has this file.
What is looked for is found as with full attention if it lies within a block, and lost if a border
cuts it, as a trained model shows on passkeys: `attnlab bench claims`, chapter 12.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from attnlab.core import attention as front
from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import Entry, Paper
from attnlab.core.masks import Mask, Prefix, as_mask
from attnlab.core.modules import Mechanism
from attnlab.core.partial import Partial, finish, merge
from attnlab.core.reference import Call
from attnlab.core.spans import Span, same_rank
from attnlab.core.terms import ArrayLeaf, At, axes_of, leaf, sized_axes, static
from attnlab.distributed.calls import by_index
from attnlab.distributed.merge import Parts


class StarMask(Mask):
    """Who sees whom in both phases, by positions from 0.

    Args:
      block_size: tokens of a block.
      anchor_size: tokens of the anchor, the first of the first block; `block_size` if left out, 0
        for blocks that see themselves alone.
      context_length: where phase 2 begins, an int or integers "*B"; None for phase 1 throughout.

    Raises:
      TypeError: a size that is not an int.
      ValueError: a block without tokens, an anchor longer than a block, a negative length.
    """

    block_size: int = static()
    anchor_size: int | None = static(default=None)
    context_length: ArrayLeaf = leaf("B", default=None)
    fixed: int | None = static(default=None)

    def __post_init__(self) -> None:
        anchor = self.block_size if self.anchor_size is None else self.anchor_size
        for name, size, least in (("block_size", self.block_size, 1), ("anchor_size", anchor, 0)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}: expected an int, got {size!r}.")
            if size < least:
                raise ValueError(f"{name}: expected {least} or more, got {size}.")
        if anchor > self.block_size:
            raise ValueError(
                f"anchor_size: the anchor is part of the first block, {self.block_size} tokens; "
                f"got {anchor}."
            )
        object.__setattr__(self, "anchor_size", anchor)
        # A plain int becomes part of the type, so that empty tiles are known before running.
        if isinstance(self.context_length, int | np.integer):
            if self.context_length < 0:
                raise ValueError(f"context_length: expected 0 or more, got {self.context_length}.")
            object.__setattr__(self, "fixed", int(self.context_length))
            object.__setattr__(self, "context_length", None)

    def allowed(self, at: At) -> Bool[Array, "..."]:
        end: Any = self.context_length if self.fixed is None else self.fixed
        anchor: Any = self.anchor_size
        seen = (at.key < anchor) | self._together(at.query, at.key)
        return (at.key <= at.query) & (seen if end is None else seen | (at.query >= end))

    def bounds(self, span: Span) -> tuple[Any, Any]:
        if self.context_length is None:
            return self._settled(span, self.fixed)
        some, _ = self._settled(span, 0)
        return some, self._settled(span, None)[1]

    def data_bounds(self, span: Span) -> tuple[Any, Any]:
        if self.context_length is None:
            return self.bounds(span)
        return self._settled(span, jnp.asarray(self.context_length)[..., None, None, None])

    def _settled(self, span: Span, end: Any) -> tuple[Any, Any]:
        """Exact: the nearest pair of a tile meets if any does, the furthest if all do."""
        ends = (span.query_first, span.query_last, span.key_first, span.key_last)
        xp: Any = jnp if any(isinstance(x, jax.Array) for x in (*ends, end)) else np
        first_query, last_query, first_key, last_key, end = same_rank(*ends, end)
        anchor: Any = self.anchor_size
        near_key = xp.minimum(last_key, last_query)
        near_query = xp.maximum(first_query, near_key)
        some = (first_key < anchor) | self._together(near_query, near_key)
        far_key = xp.maximum(first_key, anchor)
        far_query = last_query if end is None else xp.minimum(last_query, end - 1)
        every = (far_key > last_key) | (far_query < first_query)
        every = every | self._together(far_query, far_key)
        if end is not None:
            some = some | (last_query >= end)
        return (first_key <= last_query) & some, (last_key <= first_query) & every

    def _together(self, query: Any, key: Any) -> Any:
        return query // self.block_size == key // self.block_size

    @property
    def exact_bounds(self) -> bool:
        return self.context_length is None


def star_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    block_size: int,
    anchor_size: int | None = None,
    context_length: Any = None,
    mask: Any = None,
    **options: Any,
) -> Any:
    """Both phases as one call of attention, by one mask: "*B T N D".

    Args:
      block_size, anchor_size, context_length: see `StarMask`; positions count from 0, so that a
        query after a cache of n keys gives `query_offset=n`.
      mask: narrows what may meet.
      options: as for `attnlab.attention`.
    """
    check_inputs(query, key, value)
    star: Mask = StarMask(block_size, anchor_size, context_length)
    if mask is not None:
        star = star & as_mask(mask)
    return attention(query, key, value, mask=star, **options)


@dataclasses.dataclass(frozen=True)
class _Hosts(Parts):
    """Queries and keys are cut; a device sees the anchor and its own part."""

    anchor_size: int = 0

    letters: ClassVar[str] = "T"  # for keys a device needs two parts, and takes them itself

    def on_device(self, call: Call, part: Any, options: tuple[Any, ...]) -> tuple[Array, Array]:
        length, indexed = call.query.shape[-2], by_index(call)
        shared = call.normalizer.kind == "shared"
        offset = self.place(part, length, 0, indexed)
        call = call._replace(query_offset=offset)

        def attend(key: Array, value: Array, start: Any, mask: Mask) -> Partial:
            count = key.shape[-2]
            mask, modifiers, normalizer = _columns(
                (mask, call.modifiers, call.normalizer), start, count, length * self.size
            )
            here = call._replace(
                key=key, value=value, mask=mask, modifiers=modifiers, normalizer=normalizer,
                key_offset=self.place(0, count, start, indexed),
            )  # fmt: skip
            out, lse = front.solve(here, options[0], options[1], shared)
            lse = jnp.zeros(out.shape[:-1], out.dtype) if lse is None else lse
            return Partial(out, lse, jnp.where(lse == -jnp.inf, 0, 1).astype(lse.dtype))

        own = attend(call.key, call.value, part * length, call.mask & ~Prefix(self.anchor_size))
        if not self.anchor_size:
            return own.acc, own.max
        key, value = (
            jax.lax.psum(jnp.where(part == 0, x[..., : self.anchor_size, :], 0), self.axis)
            for x in (call.key, call.value)
        )
        anchor = attend(key, value, 0, call.mask)
        return finish(merge(anchor, own)) if shared else (anchor.acc + own.acc, own.max)


def _columns(terms: tuple[Any, Any, Any], start: Any, count: int, whole: int) -> Any:
    """Mask, modifiers and normalizer of all keys, for `count` of them from `start`."""
    leaves, tree = jax.tree.flatten(terms)
    tags = axes_of((terms[0], *terms[1], terms[2]))

    def cut(x: Any, tag: str) -> Any:
        for letter, axis, block in sized_axes(tag, jnp.ndim(x)) if tag else ():
            if letter == "S" and block == 1 and x.shape[axis] == whole > 1:
                x = jax.lax.dynamic_slice_in_dim(x, start, count, axis)
        return x

    return jax.tree.unflatten(tree, [cut(x, tag) for x, tag in zip(leaves, tags, strict=True)])


def star_context(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B T K H"],
    value: Float[Array, "*B T K D"],
    *,
    mesh: Mesh,
    axis: str,
    block_size: int,
    anchor_size: int | None = None,
    batch: str | tuple[str, ...] | None = None,
    mask: Any = None,
    **options: Any,
) -> Any:
    """Phase 1 on devices: the context is cut over a mesh axis in whole blocks: "*B T N D".

    The first device sends the keys and values of the anchor to all others; that is all they hear of
    each other.  The numbers are those of `star_attention`, and so are gradients.

    Args:
      query, key, value: the context, from its first token on, cut along T or to be.
      mesh, axis, batch: as for `attnlab.distributed.merge.merge_attention`.
      block_size, anchor_size: see `StarMask`.
      mask: narrows what may meet.
      options: as for `attnlab.attention`, without offsets.

    Raises:
      TypeError, ValueError: as for `attnlab.attention`; a context that does not give each device
        the same number of whole blocks; keys that are not those of the queries; an offset.
      NotImplementedError: a normalizer or modifier that needs whole rows of scores.
    """
    check_inputs(query, key, value)
    star = StarMask(block_size, anchor_size)
    hosts = _Hosts(mesh, axis, batch, int(star.anchor_size or 0))
    if query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"key: expected the {query.shape[-3]} tokens of query, got {key.shape[-3]}."
        )
    if query.shape[-3] % (hosts.size * block_size):
        raise ValueError(
            f"query: a context over {hosts.size} devices in blocks of {block_size} should have a "
            f"length that is a multiple of {hosts.size * block_size}, got {query.shape[-3]}; "
            "pad it at the end and drop what comes of that."
        )
    for name in ("query_offset", "key_offset"):
        if not isinstance(options.get(name, 0), int) or options.get(name, 0):
            raise ValueError(f"{name}: blocks count from the first token, got {options[name]}.")
    whole = star if mask is None else star & as_mask(mask)
    token = front.spread.set(hosts)
    try:
        return attention(query, key, value, mask=whole, **options)
    finally:
        front.spread.reset(token)


def live_pairs(
    context_length: int, num_query_tokens: int, *, block_size: int, anchor_size: int | None = None
) -> dict[str, int]:
    """Pairs of queries and keys that meet; each costs 2 (H + D) FLOPs in every query head.

    "context": phase 1; "again": what hosts add that compute the anchor once more for each block but
    the first; "query": phase 2; "causal": all of it by full causal attention, as in a ring.
    """
    star = StarMask(block_size, anchor_size, context_length)
    anchor: int = star.anchor_size or 0
    whole, rest = divmod(context_length, block_size)

    def up_to(n: int) -> int:
        return n * (n + 1) // 2

    later = max(context_length - block_size, 0)
    return {
        "context": whole * up_to(block_size) + up_to(rest) + later * anchor,
        "again": max(whole + (rest > 0) - 1, 0) * up_to(anchor),
        "query": up_to(context_length + num_query_tokens) - up_to(context_length),
        "causal": up_to(context_length + num_query_tokens),
    }


class StarAttention(Mechanism):
    """Star Attention in blocks of one size; no parameters."""

    function = staticmethod(star_attention)

    def __init__(
        self, block_size: int, *, anchor_size: int | None = None, context_length: int | None = None
    ) -> None:
        StarMask(block_size, anchor_size, context_length)
        self.block_size, self.anchor_size = block_size, anchor_size
        self.context_length = context_length

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        """Attend: "*B T N D".  A call may have a `context_length` of its own."""
        options.setdefault("context_length", self.context_length)
        return self.function(
            query, key, value, block_size=self.block_size, anchor_size=self.anchor_size, **options
        )


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> StarAttention:
    return StarAttention(4, anchor_size=3, context_length=10)


ENTRY = Entry(
    id="star-attention",
    title="Star Attention",
    family="distributed",
    paper=Paper(
        "Star Attention: Efficient LLM Inference over Long Sequences",
        "Acharya, Jia & Ginsburg",
        2024,
        "2411.17116",
    ),
    summary="A long context is encoded in blocks that see themselves and the first of them; the "
    "query sees all, by merging what the devices that hold the blocks find.",
    formula=r"i < C:\ j \le i,\ j < A \text{ or } \lfloor i / b \rfloor = \lfloor j / b \rfloor;"
    r"\qquad i \ge C:\ j \le i,\ "
    r"o_i = \sum_h \frac{e^{\ell_{hi}}}{\sum_{h'} e^{\ell_{h'i}}}\, o_{hi}",
    patterns=("causal self",),
    time="O(C·(A + b)·H + (T - C)·T·H)",
    memory="O(T + S)",
    exact="Phase 2 is exact; phase 1 leaves out what lies between anchor and block.",
    properties=frozenset({"decode", "gqa", "lse", "rows-sum-to-one", "linear-memory"}),
    function=star_attention,
    module=StarAttention,
    build=_build,
)
