r"""Multiple head embeddings: all heads share one projection, and differ by a vector each.

    q = x W_q,  k = x W_k,  v = x W_v,       W "F H", one head of each
    add:       q_n = q + e^q_n,        k_n = k + e^k_n,        v_n = v + e^v_n
    multiply:  q_n = q (1 + e^q_n),    k_n = k (1 + e^k_n),    v_n = v (1 + e^v_n)
    out = concat_n softmax(q_n k_n^T / sqrt(H)) v_n W^O

Xue & Aletras 2023, arXiv:2310.07911.  Beside a single head that is 3 N H numbers more; multi-head
attention has (3 N^2 - 3 N) H^2 more (`InputCounts`; the abstract's number for it is the difference
to these).  The layer is `MultiHeadAttention(F, N, mechanism=...)`; K shared heads are taken too.

Keys and values stay shared, so that a layer keeps and reads those of one head:

    multiply:  q_n . k_n = q (1 + e^q_n) (1 + e^k_n) . k,   and (1 + e^v_n) multiplies what is read
    add:       q_n . k_n = q_n . k + q_n . e^k_n,           and e^v_n is added to what is read

Of `add`, q_n . e^k_n is the same for all keys: softmax does not see it, and e^k is never trained.
Where weights do not sum to one, or a modifier is not a sum, that does not hold and keys and values
are written out for every head; so they must be (`embed_heads`) where positions come between, as
when heads are rotated after their embedding.

No code of the authors was released.  Settled here: embeddings start normal with deviation 0.02, as
heads that start equal would differ by their rows of W^O alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.gates import widened
from attnlab.core.linear_attention import repeat_heads
from attnlab.core.masks import Full
from attnlab.core.modules import Mechanism
from attnlab.core.normalizers import Softmax
from attnlab.core.reference import default_scale
from attnlab.core.scores import as_modifiers

OPERATIONS = ("multiply", "add")


@dataclasses.dataclass(frozen=True)
class InputCounts:
    """Parameters of the projections to query, key and value, F = N H wide, without biases.

    Raises:
      ValueError: sizes that are not positive.
    """

    num_heads: int
    head_width: int

    def __post_init__(self) -> None:
        if min(self.num_heads, self.head_width) < 1:
            raise ValueError(f"num_heads, head_width: expected positive ints, got {self}.")

    @property
    def shared(self) -> int:
        """One head alone: 3 n d^2."""
        return 3 * self.num_heads * self.head_width**2

    @property
    def embedded(self) -> int:
        """One head and the embeddings of all: 3 n d^2 + 3 n d."""
        return self.shared + 3 * self.num_heads * self.head_width

    @property
    def multi_head(self) -> int:
        """Projections of their own for all heads: 3 n^2 d^2."""
        return self.num_heads * self.shared


def embed_heads(
    x: Float[Array, "*B T K H"], embedding: Float[Array, "N H"], operation: str = "multiply"
) -> Float[Array, "*B T N H"]:
    """What N heads make of the K that they share, each with its own embedding.

    Raises:
      ValueError: an embedding of another width, K that does not divide N, or another operation.
    """
    _check_operation(operation)
    heads, width = embedding.shape
    if width != x.shape[-1] or heads % x.shape[-2]:
        raise ValueError(
            f"embedding: expected width {x.shape[-1]} and a multiple of {x.shape[-2]} heads, got "
            f"shape {embedding.shape}."
        )
    return _embedded(repeat_heads(x, heads), operation, embedding)


def _embedded(x: Float[Array, "*B T N H"], operation: str, *embeddings: Array | None) -> Array:
    """Each head's embeddings on it, in the dtype of x; None is none."""
    (wide,) = widened(x)
    for embedding in embeddings:
        if embedding is not None:
            own = jnp.expand_dims(embedding.astype(wide.dtype), range(x.ndim - 2))
            wide = wide * (1 + own) if operation == "multiply" else wide + own
    return wide.astype(x.dtype)


def head_embedding_attention(
    query: Float[Array, "*B T M H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    query_embedding: Float[Array, "N H"],
    key_embedding: Float[Array, "N H"] | None = None,
    value_embedding: Float[Array, "N D"] | None = None,
    operation: str = "multiply",
    **options: Any,
) -> Any:
    """Softmax attention of N heads with embeddings: "*B T N D".

    Args:
      query: one head, or N; keys and values of K shared heads are embedded for each of the N.
      query_embedding, key_embedding, value_embedding: e; None for none.
      operation: "multiply" or "add".
      options: as for `attnlab.attention`.

    Raises:
      ValueError: heads or embeddings that do not fit, or another operation.
    """
    _check_operation(operation)
    heads = jnp.shape(query_embedding)[0] if jnp.ndim(query_embedding) == 2 else 0
    if getattr(query, "ndim", 0) >= 3 and query.shape[-2] == 1:
        query = jnp.repeat(query, max(heads, 1), axis=-2)
    query, key, value = check_inputs(query, key, value)
    own = (query_embedding, key_embedding, value_embedding)
    for name, x, embedding in zip(("query", "key", "value"), (query, key, value), own, strict=True):
        expected = (query.shape[-2], x.shape[-1])
        if embedding is not None and jnp.shape(embedding) != expected:
            raise ValueError(
                f"{name}_embedding: expected shape {expected} for a query of {expected[0]} heads, "
                f"got {jnp.shape(embedding)}."
            )
    if operation == "multiply":
        return _multiplied(query, key, value, own, options)
    return _added(query, key, value, own, options)


def _multiplied(query: Array, key: Array, value: Array, own: Any, options: dict[str, Any]) -> Any:
    found = attention(_embedded(query, "multiply", *own[:2]), key, value, **options)
    out, *lse = found if isinstance(found, tuple) else (found,)
    out = _embedded(out, "multiply", own[2])
    return (out, *lse) if lse else out


def _added(query: Array, key: Array, value: Array, own: Any, options: dict[str, Any]) -> Any:
    query = _embedded(query, "add", own[0])
    if not _ignores_constants(options):
        key, value = (
            x if e is None else embed_heads(x, e, "add")
            for x, e in zip((key, value), own[1:], strict=True)
        )
        heads = query.shape[-2]
        return attention(query, repeat_heads(key, heads), repeat_heads(value, heads), **options)
    asked, masked = options.get("return_lse", False), not _unmasked(options.get("mask"))
    if not asked and (own[2] is None or not masked):
        return _embedded(attention(query, key, value, **options), "add", own[2])
    out, lse = attention(query, key, value, **options | {"return_lse": True})
    if own[2] is not None:
        # What is read is a mean of values, but for a query that sees none.
        seen = jnp.swapaxes(lse > -jnp.inf, -1, -2)[..., None]
        out = jnp.where(seen, _embedded(out, "add", own[2]), out)
    return (out, lse + _constant(query, own[1], options)) if asked else out


def _ignores_constants(options: dict[str, Any]) -> bool:
    """Whether weights sum to one and are the same after a constant is added to a row's scores."""
    normalizer, rate = options.get("normalizer"), options.get("dropout_rate", 0.0)
    plain = normalizer is None or (isinstance(normalizer, Softmax) and normalizer.sink is None)
    additive = all(x.additive for x in as_modifiers(options.get("modifiers")))
    return plain and additive and isinstance(rate, float | int) and rate == 0


def _unmasked(mask: Any) -> bool:
    return mask is None or isinstance(mask, Full)


def _constant(query: Array, embedding: Array | None, options: dict[str, Any]) -> Array:
    """The product of a query and its head's key embedding, scaled: "*B N T"."""
    (wide,) = widened(query)
    if embedding is None:
        return jnp.zeros((), wide.dtype)
    own = jnp.expand_dims(embedding.astype(wide.dtype), range(query.ndim - 2))
    scale = options.get("scale")
    scale = default_scale(query.shape[-1]) if scale is None else jnp.asarray(scale, wide.dtype)
    return jnp.swapaxes(jnp.sum(wide * own, axis=-1), -1, -2) * scale


def _check_operation(operation: str) -> None:
    if operation not in OPERATIONS:
        raise ValueError(f"operation: expected one of {OPERATIONS}, got {operation!r}.")


class MHE(Mechanism):
    """Multiple head embeddings; holds e^q, e^k "N H" and e^v "N D".

    Its layer projects one head of each.

    Args:
      num_heads, head_width: N and H.
      value_width: D; H by default.
      operation: "multiply" or "add".

    Raises:
      ValueError: sizes that are not positive, or another operation.
    """

    query_heads: int | None = 1
    key_heads: int | None = 1

    def __init__(
        self, num_heads: int, head_width: int, *, value_width: int | None = None,
        operation: str = "multiply", deviation: float = 0.02, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        value_width = head_width if value_width is None else value_width
        _check_operation(operation)
        if min(num_heads, head_width, value_width) < 1:
            raise ValueError(
                "num_heads, head_width, value_width: expected positive ints, got "
                f"{num_heads}, {head_width}, {value_width}."
            )

        def drawn(width: int) -> nnx.Param:
            return nnx.Param(deviation * jax.random.normal(rngs.params(), (num_heads, width)))

        self.query_embedding = drawn(head_width)
        self.key_embedding = drawn(head_width)
        self.value_embedding = drawn(value_width)
        self.operation = operation

    def __call__(
        self,
        query: Float[Array, "*B T M H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        names = ("query_embedding", "key_embedding", "value_embedding")
        own: dict[str, Any] = {name: getattr(self, name)[...] for name in names}
        own["operation"] = self.operation
        return head_embedding_attention(query, key, value, **own, **options)


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> MHE:
    return MHE(num_heads, head_width, rngs=rngs)


def _build_added(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> MHE:
    return MHE(num_heads, head_width, operation="add", rngs=rngs)


_PAPER = Paper(
    "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head "
    "Attention",
    "Xue & Aletras",
    2023,
    "2310.07911",
)
_PROPERTIES = frozenset(
    {"position-free", "translation-invariant", "decode", "gqa", "lse", "linear-memory"}
)

ENTRY = Entry(
    id="attention-head-embeddings",
    title="Multiple head embeddings",
    family="heads",
    paper=_PAPER,
    summary="All heads share one projection and tell themselves apart by learned factors on its "
    "query, key and value: the parameters and the cache of a single head, nearly.",
    formula=r"\mathrm{head}_n = \operatorname{softmax}\!\left(\frac{q_n k_n^\top}{\sqrt{H}}\right) "
    r"v_n, \qquad q_n = q \odot (1 + e^q_n), \quad k_n = k \odot (1 + e^k_n), \quad "
    r"v_n = v \odot (1 + e^v_n)",
    patterns=PATTERNS,
    time="O(T·S·H)",
    memory="O(T + S)",
    exact="Exact; values are scaled, so weights times factors do not sum to one.",
    properties=_PROPERTIES,
    function=head_embedding_attention,
    module=MHE,
    build=_build,
)

ENTRY_ADD = dataclasses.replace(
    ENTRY,
    id="attention-head-embeddings-add",
    title="Multiple head embeddings, added",
    summary="All heads share one projection and add a learned vector each to its query and value; "
    "one added to keys changes nothing.",
    formula=r"\mathrm{head}_n = \operatorname{softmax}\!\left(\frac{q_n k_n^\top}{\sqrt{H}}\right) "
    r"v_n, \qquad q_n = q + e^q_n, \quad k_n = k + e^k_n, \quad v_n = v + e^v_n",
    exact="Exact; values are shifted, so that of ones the heads do not read ones.",
    build=_build_added,
)
