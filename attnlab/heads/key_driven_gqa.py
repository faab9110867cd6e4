r"""Grouped queries whose groups differ in size: a key head that is longer serves more queries.

    n_g = about N r_g,     r_g = ||K_g|| / sum_h ||K_h||,     n_g >= 1,     sum_g n_g = N
    query heads in order: the first n_1 read key head 1, the next n_2 key head 2, ...

Khan, Khaquan, Tafveez, Samiwala & Raza 2024, arXiv:2408.08454.  Two variants (the third, of equal
groups and noise, is in `perturbed_gqa`):

    KDGQA   K_g are the keys of the call: the norm over all positions and channels
    DGQA    r_g is of norms remembered from training, and then stands still

The authors' code differs from the text and was not followed: there norms are summed over the batch
and stretched so that the smallest key head serves no query.  Settled here: sizes are rounded down
to 1 at least, then what is missing goes one by one to where N r_g - n_g is largest, and what is too
much is taken where it is smallest (of equals, the first); norms that are all zero make equal
groups; no gradient reaches an allocation.  KDGQA is of each sequence by itself and of its real keys
alone.  As it reads all keys before any query does, it has no causal form; an allocation that is
given, as DGQA's, has all.  Keys are repeated to N heads for the computation; a cache holds K.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.gates import widened
from attnlab.core.heads import allocate, assigned, gather_heads
from attnlab.core.mask_layout import layout
from attnlab.core.masks import Full, as_mask
from attnlab.core.modules import Mechanism

KINDS = ("difference", "average")


def key_norms(
    key: Float[Array, "*B S K H"], real: Bool[Array, "*B S"] | None = None
) -> Float[Array, "*B K"]:
    """Length of each key head over positions and channels, without a gradient; `real`: of these."""
    (wide,) = widened(jax.lax.stop_gradient(key))
    if real is not None:
        wide = jnp.where(jnp.broadcast_to(real, key.shape[:-2])[..., None, None], wide, 0)
    return jnp.sqrt(jnp.sum(jnp.square(wide), axis=(-3, -1)))


class NormState(NamedTuple):
    """What DGQA remembers in training: steps done, norms, and what groups are in proportion to."""

    step: Int[Array, ""]
    cache: Float[Array, " K"]
    shares: Float[Array, " K"]


def norm_state(num_kv_heads: int) -> NormState:
    """Before training: nothing is known, and groups are equal."""
    if num_kv_heads < 1:
        raise ValueError(f"num_kv_heads: expected a positive int, got {num_kv_heads}.")
    zeros = jnp.zeros((num_kv_heads,), jnp.float32)
    return NormState(jnp.zeros((), jnp.int32), zeros, zeros)


def remember(
    state: NormState, norms: Float[Array, "*B K"], *, kind: str = "difference", beta: float = 0.9,
    window: int = 1,
) -> NormState:  # fmt: skip
    """The state after a step of training, in which keys had these norms (of a batch: their mean).

    Every `window` steps, "difference": groups are in proportion to how far norms moved since they
    were last looked at; "average": to beta norms + (1 - beta) of what that was before.

    Raises:
      ValueError: norms of another number of heads, another kind, beta or window out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}.")
    if not 0 < beta <= 1 or window < 1:
        raise ValueError(f"beta, window: expected (0, 1] and a positive int, got {beta}, {window}.")
    if norms.shape[-1:] != state.cache.shape:
        raise ValueError(f"norms: expected shape (*B, {state.cache.size}), got {norms.shape}.")
    new = jnp.mean(norms, axis=tuple(range(norms.ndim - 1))).astype(state.cache.dtype)
    if kind == "difference":
        cache, shares = new, jnp.abs(new - state.cache)
    else:
        cache = shares = beta * new + (1 - beta) * state.cache
    step = state.step + 1
    due = step % window == 0
    return NormState(step, jnp.where(due, cache, state.cache), jnp.where(due, shares, state.shares))


def key_driven_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    assignment: Any = None,
    mask: Any = None,
    query_offset: Any = 0,
    key_offset: Any = 0,
    **options: Any,
) -> Any:
    """Softmax attention in groups of unequal size: "*B T N D".  N need be no multiple of K.

    Args:
      assignment: the key head of each query head, integers "N" or "*B N"; by default what the
        norms of the keys say (KDGQA), which takes no mask but padding.
      mask, query_offset, key_offset, options: as for `attnlab.attention`.

    Raises:
      TypeError, ValueError: an assignment of another shape or dtype, or to a head that there is
        not; without one, fewer query heads than key heads, or a mask that is no padding.
    """
    query, key, value = check_inputs(query, key, value, grouped=False)
    offsets, heads = (query_offset, key_offset), query.shape[-2]
    if assignment is None:
        real = _real(mask, (query.shape[-3], key.shape[-3]), offsets)
        assignment = assigned(allocate(key_norms(key, real), heads), heads)
    elif np.shape(assignment)[-1:] != (heads,):
        raise ValueError(
            f"assignment: expected one key head to each of {heads} query heads, got shape "
            f"{np.shape(assignment)}."
        )
    key, value = (gather_heads(x, assignment) for x in (key, value))
    places = {"mask": mask, "query_offset": query_offset, "key_offset": key_offset}
    return attention(query, key, value, **places, **options)


def _real(mask: Any, lengths: tuple[int, int], offsets: tuple[Any, Any]) -> Array | None:
    """Which keys are no padding."""
    known = layout(Full() if mask is None else as_mask(mask), lengths, offsets)
    if known is None or known.causal or known.ids is not None:
        raise ValueError(
            f"mask: {type(mask).__name__} is no padding, and norms read all keys of a sequence, "
            "later ones too; give an assignment, which takes any mask."
        )
    return known.keys


class KDGQA(Mechanism):
    """Groups by the norms of a call's keys; no parameters, and no causal masks.

    Args:
      num_heads: query heads N.
    """

    function = staticmethod(key_driven_attention)

    def __init__(self, num_heads: int) -> None:
        self.num_heads = _positive(num_heads)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        _check_heads(query, self.num_heads)
        return key_driven_attention(query, key, value, **options)


class GroupShares(nnx.Variable):
    """What the sizes of groups are in proportion to: kept, and not trained."""


class DGQA(KDGQA):
    """Groups by norms that were seen in training; holds their shares "K".

    Training keeps a `NormState` beside its parameters, and after a step hands it over:

        state = remember(state, key_norms(keys_of_the_layer))
        mechanism.store(state)

    Args:
      num_heads, num_kv_heads: N and K.
      shares: "K"; equal ones by default.

    Raises:
      ValueError: fewer query heads than key heads, or shares of another shape.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, *, shares: Float[Array, " K"] | None = None
    ) -> None:
        super().__init__(num_heads)
        start = norm_state(num_kv_heads).shares if shares is None else jnp.asarray(shares)
        if start.shape != (num_kv_heads,):
            raise ValueError(f"shares: expected shape ({num_kv_heads},), got {start.shape}.")
        allocate(start, num_heads)  # refuses what cannot be
        self.shares, self.key_heads = GroupShares(start), num_kv_heads

    def store(self, state: NormState) -> None:
        """Groups as `remember` left them."""
        self.shares[...] = state.shares

    def sizes(self) -> Int[Array, " K"]:
        """How many query heads read each key head."""
        return allocate(self.shares[...], self.num_heads)

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        _check_heads(query, self.num_heads)
        groups = self.shares[...].shape[-1]
        if getattr(key, "ndim", 0) >= 3 and key.shape[-2] != groups:
            raise ValueError(f"key: expected {groups} heads, got shape {key.shape}.")
        own = assigned(self.sizes(), self.num_heads)
        return key_driven_attention(query, key, value, assignment=own, **options)


def _positive(num_heads: int) -> int:
    if num_heads < 1:
        raise ValueError(f"num_heads: expected a positive int, got {num_heads}.")
    return num_heads


def _check_heads(query: Any, num_heads: int) -> None:
    if getattr(query, "ndim", 0) >= 3 and query.shape[-2] != num_heads:
        raise ValueError(f"query: expected {num_heads} heads, got shape {query.shape}.")


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> KDGQA:
    return KDGQA(num_heads)


def _build_dynamic(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> DGQA:
    groups = max(num_heads // 2, 1)
    return DGQA(num_heads, groups, shares=jnp.arange(1.0, 1.0 + groups))


_PAPER = Paper(
    "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention",
    "Khan, Khaquan, Tafveez, Samiwala & Raza",
    2024,
    "2408.08454",
)
_FORMULA = (
    r"\mathrm{head}_n = \operatorname{softmax}\!\left(\frac{q_n k_{g(n)}^\top}{\sqrt{H}}\right) "
    r"v_{g(n)}, \qquad \#\{n : g(n) = g\} \approx N \frac{\lVert K_g \rVert}{\sum_h \lVert K_h "
    r"\rVert}"
)

ENTRY = Entry(
    id="key-driven-gqa",
    title="Key-driven grouped-query attention",
    family="heads",
    paper=_PAPER,
    summary="Query heads are shared out among key heads in proportion to the norms of these keys, "
    "anew for every sequence.",
    formula=_FORMULA,
    patterns=("noncausal self", "noncausal cross"),
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact; the groups are whole numbers and have no gradient.",
    properties=frozenset({"position-free", "lse", "rows-sum-to-one", "linear-memory"}),
    function=key_driven_attention,
    module=KDGQA,
    build=_build,
    masks="keys",
)

ENTRY_DYNAMIC = Entry(
    id="key-driven-gqa-dynamic",
    title="Dynamic key-driven grouped-query attention",
    family="heads",
    paper=_PAPER,
    summary="Query heads are shared out among key heads by norms that training remembers; at "
    "inference the groups stand still, so that it decodes as grouped queries do.",
    formula=_FORMULA,
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact; the groups are whole numbers and have no gradient.",
    properties=frozenset(
        {
            "position-free",
            "translation-invariant",
            "decode",
            "lse",
            "rows-sum-to-one",
            "linear-memory",
        }
    ),
    function=key_driven_attention,
    module=DGQA,
    build=_build_dynamic,
)
