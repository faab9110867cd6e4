r"""Dual attention: some heads read what tokens are, others how tokens stand to the one that reads.

    sensory head n:     o^n_i = sum_j a^n_ij v^n_j
    relational head n:  o^n_i = sum_j a^n_ij (R^n r_ij + W^n s_j)
    r_ij,l = phi(<Q_l x_i, K_l x_j> / sqrt(P)),   l = 1 ... L

with softmax weights a of each head's own queries and keys, L relations that all relational heads
share, and symbols s_j, which say which token it is: retrieved from a library by what the token is
like (`SymbolicAttention`), or its position (`PositionalSymbols`), or its distance from the reader
(`RelativeSymbols`).  Altabaa & Lafferty 2024, arXiv:2405.16727; the factor 1 / sqrt(P) is that of
the authors' code.  There L is the number of relational heads and L P their width together.

Where phi is the identity, sum_j a_ij r_ij is <Q x_i, sum_j a_ij K x_j> relation by relation:
relational keys ride behind the values and meet the query after they were averaged.  So any
implementation runs it, and a cache keeps K x_j, L P numbers to a token, shared out among key heads.
Another phi, and symbols by distance, take all weights: "reference" alone.

The paper has a last projection for each kind of head; the layer here has one for all, of which two
are the block-diagonal case.  Of its value projection the columns of relational heads are not read.
The authors' models retrieve symbols once, from embedded tokens; here each layer does so from its
input, with one `SymbolicAttention` for all layers if it is given to all.  Left out: rotary
positions, and groups of relations.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.attention import attention, check_inputs
from attnlab.core.entry import PATTERNS, Entry, Paper
from attnlab.core.gates import Projection
from attnlab.core.linear_attention import repeat_heads
from attnlab.core.modules import Mechanism
from attnlab.core.relations import (
    check_relations,
    explicit_relations,
    read,
    related,
    sensory_heads,
)
from attnlab.heads.symbols import PositionalSymbols, RelativeSymbols, SymbolicAttention


def dual_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K D"],
    *,
    query_relations: Float[Array, "*B T L P"],
    key_relations: Float[Array, "*B S L P"],
    weight: Float[Array, "R D L"],
    **options: Any,
) -> Any:
    """Sensory heads, and after them R relational ones: "*B T N D".

    Args:
      value: of sensory heads, and the symbols W s of relational ones.
      query_relations, key_relations: Q x and K x.
      weight: R of each relational head.
      options: as for `attnlab.attention`.

    Raises:
      ValueError: relations or weights that do not fit, heads of both kinds that share a key.
    """
    query, key, value = check_inputs(query, key, value)
    keys, _ = check_relations(query, key, value, query_relations, key_relations, weight)
    out = read(query, key, value, keys, weight.shape[0], **options)
    first, *rest = out if isinstance(out, tuple) else (out,)
    first = related(first, query_relations, weight)
    return (first, *rest) if rest else first


class DualAttention(Mechanism):
    """Holds Q, K "F L*P", R "R D L", W "F_s M D" and where symbols come from.

    Args:
      features: width F of the layer's input.
      num_heads, head_width: N, and D = H.
      num_relational: R, the last of the heads.
      num_relations: L, a divisor of R D; R by default.
      num_symbol_heads: M, values of symbols; R by default, fewer where heads share keys.
      symbols: `SymbolicAttention`, which layers may share, `PositionalSymbols`, `RelativeSymbols`.
      symmetric: relations with K = Q.
      activation: phi; None for the identity.

    Raises:
      ValueError: heads or relations that do not divide, relational heads without symbols.
    """

    def __init__(
        self, features: int, num_heads: int, head_width: int, *, num_relational: int,
        num_relations: int | None = None, num_symbol_heads: int | None = None, symbols: Any = None,
        symmetric: bool = False, activation: Callable[[Array], Array] | None = None,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        heads = self.num_relational = num_relational
        self.num_heads, self.head_width, self.activation = num_heads, head_width, activation
        count = heads if num_relations is None else num_relations
        if min(num_heads, head_width) < 1 or not 0 <= heads <= num_heads:
            raise ValueError(
                f"num_relational: expected from 0 to {num_heads=}, a positive number, got {heads}."
            )
        if heads and (count < 1 or heads * head_width % count):
            raise ValueError(
                f"num_relations: expected a divisor of {heads * head_width}, got {count}."
            )
        if heads and symbols is None:
            raise ValueError("symbols: relational heads need some, got None.")
        self.symbols = nnx.data(symbols if heads else None)
        self.query_relations = self.key_relations = self.symbol = nnx.data(None)
        self.weight: Any = nnx.data(None)
        if not heads:
            return
        shape = (count, heads * head_width // count)
        self.query_relations = Projection(features, shape, rngs=rngs)
        self.key_relations = nnx.data(None if symmetric else Projection(features, shape, rngs=rngs))
        own = heads if num_symbol_heads is None else num_symbol_heads
        self.symbol = Projection(symbols.features, (own, head_width), rngs=rngs)
        bound = count**-0.5
        drawn = jax.random.uniform(
            rngs.params(), (heads, head_width, count), minval=-bound, maxval=bound
        )
        self.weight = nnx.Param(drawn)

    @property
    def explicit(self) -> bool:
        """Whether all weights are needed, so that memory is O(T S)."""
        return self.activation is not None or isinstance(self.symbols, RelativeSymbols)

    @property
    def _width(self) -> int:
        """Numbers of a token's relational keys, L P."""
        return self.num_relational * self.head_width

    def kept_widths(self, head_width: int, value_width: int, num_kv_heads: int) -> tuple[int, int]:
        return head_width, value_width + -(-self._width // num_kv_heads)

    def controls(self, x: Float[Array, "*B T F"]) -> dict[str, Any]:
        """The queries' relations, where they are needed before weights are mixed."""
        return {"query_relations": self.query_relations(x)} if self.explicit else {}

    def keep(
        self,
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        x: Float[Array, "*B S F"],
    ) -> tuple[Array, Array]:
        """Values with symbols in relational heads, and relational keys behind, shared out."""
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"value: batch axes, length and heads {value.shape[:-1]} differ from those of "
                f"key, {key.shape[:-1]}."
            )
        if not self.num_relational:
            return key, value
        if isinstance(self.symbols, SymbolicAttention):
            value = self._with_symbols(value, self.symbol(self.symbols(x)))
        project = self.query_relations if self.key_relations is None else self.key_relations
        heads = key.shape[-2]
        relations = project(x).reshape(*x.shape[:-1], self._width)
        pads = [(0, 0)] * (relations.ndim - 1) + [(0, -self._width % heads)]
        relations = jnp.pad(relations, pads).reshape(*x.shape[:-1], heads, -1)
        return key, jnp.concatenate([value, relations.astype(value.dtype)], axis=-1)

    def _with_symbols(self, value: Array, symbols: Float[Array, "*B S M D"]) -> Array:
        """Values whose last heads, those of relational queries, are symbols'."""
        heads = self._shared(value.shape[-2])
        if heads % symbols.shape[-2]:
            raise ValueError(
                f"num_symbol_heads: expected a divisor of {heads}, the relational heads of values, "
                f"got {symbols.shape[-2]}."
            )
        symbols = jnp.broadcast_to(
            repeat_heads(symbols, heads), (*value.shape[:-2], heads, symbols.shape[-1])
        )
        sensory = value[..., : value.shape[-2] - heads, :]
        return jnp.concatenate([sensory, symbols.astype(value.dtype)], axis=-2)

    def _shared(self, heads: int) -> int:
        """How many of so many key heads are those of relational queries."""
        return heads - sensory_heads(self.num_heads, heads, self.num_relational)[1]

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K E"],
        *,
        query_relations: Any = None,
        **options: Any,
    ) -> Any:
        """Attend to values as `keep` returns them; `finish` is still to come."""
        query, key, value = check_inputs(query, key, value)
        if not self.num_relational:
            return attention(query, key, value, **options)
        value, relations = value[..., : self.head_width], value[..., self.head_width :]
        relations = relations.reshape(*key.shape[:-2], -1)[..., : self._width]
        if isinstance(self.symbols, PositionalSymbols):
            first = options.get("key_offset", 0)
            value = self._with_symbols(value, self.symbol(self.symbols(first, key.shape[-3])))
        if not self.explicit:
            return read(query, key, value, relations, self.num_relational, **options)
        return self._explicit(query, key, value, relations, query_relations, options)

    def _explicit(
        self, query: Array, key: Array, value: Array, relations: Array, own: Any, options: Any
    ) -> Any:
        relative = None
        if isinstance(self.symbols, RelativeSymbols):
            relative = repeat_heads(self.symbol(self.symbols.table[...]), self.num_relational)
        return explicit_relations(
            query, key, value, query_relations=own, weight=self.weight[...],
            key_relations=relations.reshape(*relations.shape[:-1], *own.shape[-2:]),
            activation=self.activation, relative=relative, **options,
        )  # fmt: skip

    def finish(self, out: Float[Array, "*B T N E"], x: Float[Array, "*B T F"]) -> Array:
        """Relational keys that were read, met with the relations of the input's queries."""
        if self.explicit or not self.num_relational:
            return out
        return related(out, self.query_relations(x), self.weight[...])


def _build(num_heads: int, head_width: int, *, rngs: nnx.Rngs) -> DualAttention:
    """Half of the heads relational, with one head of symbols."""
    features = num_heads * head_width
    symbols = SymbolicAttention(features, 5, num_heads=2, rngs=rngs)
    return DualAttention(
        features, num_heads, head_width, num_relational=num_heads // 2, num_symbol_heads=1,
        symbols=symbols, rngs=rngs,
    )  # fmt: skip


ENTRY = Entry(
    id="dual-attention-transformer",
    title="Dual attention",
    family="heads",
    paper=Paper(
        "Disentangling and Integrating Relational and Sensory Information in Transformer "
        "Architectures",
        "Altabaa & Lafferty",
        2024,
        "2405.16727",
    ),
    summary="Some heads read what tokens hold; relational heads read how tokens compare with the "
    "one that reads, and a symbol that says which token it is.",
    formula=r"o_i = \sum_j a_{ij} \left(R\, r_{ij} + W s_j\right), \qquad r_{ij,l} = "
    r"\frac{\langle Q_l x_i, K_l x_j \rangle}{\sqrt{P}}",
    patterns=PATTERNS,
    time="O(T·S·(H + L·P))",
    memory="O(T + S)",
    exact="Exact.",
    properties=frozenset(
        {"position-free", "translation-invariant", "decode", "gqa", "lse", "linear-memory"}
    ),
    function=dual_attention,
    module=DualAttention,
    build=_build,
)
