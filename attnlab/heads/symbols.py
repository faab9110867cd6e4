r"""Symbols: vectors that say which token it is, and nothing of what the token holds.

    symbolic attention:   s_j = concat_n softmax_m(<W_n x_j + b_n, template_nm> / sqrt(H)) symbol_nm
    by position:          s_j = table[j]
    by distance:          s_ij = table[j - i], of the ends for what is further away

Altabaa & Lafferty 2024, arXiv:2405.16727.  Templates and symbols are drawn from N(0, 1), W, b like
a linear layer.  Tables by distance start Xavier-uniform, those by position from N(0, 1).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnlab.core.gates import Projection


class SymbolicAttention(nnx.Module):
    """Retrieves a token's symbol from a library by what the token is like: `templates` "M F".

    Args:
      features: width F of the input and of symbols.
      num_symbols: M.
      num_heads: heads of the retrieval, each with its part of templates and symbols.

    Raises:
      ValueError: sizes that are not positive, heads that do not divide F.
    """

    def __init__(
        self, features: int, num_symbols: int, *, num_heads: int = 1, rngs: nnx.Rngs
    ) -> None:
        if min(features, num_symbols, num_heads) < 1 or features % num_heads:
            raise ValueError(
                "num_heads: expected positive sizes and a divisor of features, got "
                f"{features=}, {num_symbols=}, {num_heads=}."
            )
        self.features, self.num_heads = features, num_heads
        self.query = Projection(features, features, bias=0.0, rngs=rngs)
        shape = (num_symbols, features)
        self.templates = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.library = nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, x: Float[Array, "*B S F"]) -> Float[Array, "*B S F"]:
        """The symbol of each token, in float32 at least."""
        query = self._heads(self.query(x))
        templates, library = (
            self._heads(y[...].astype(query.dtype)) for y in (self.templates, self.library)
        )
        score = jnp.einsum("...snh,mnh->...snm", query, templates) * query.shape[-1] ** -0.5
        found = jnp.einsum("...snm,mnh->...snh", jax.nn.softmax(score, axis=-1), library)
        return found.reshape(*x.shape[:-1], self.features)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class PositionalSymbols(nnx.Module):
    """A symbol for each of the first `length` positions: `table` "M F".

    Raises:
      ValueError: sizes that are not positive.
    """

    def __init__(self, features: int, length: int, *, rngs: nnx.Rngs) -> None:
        if min(features, length) < 1:
            raise ValueError(f"length: expected positive sizes, got {features=}, {length=}.")
        self.features = features
        self.table = nnx.Param(jax.random.normal(rngs.params(), (length, features)))

    def __call__(self, first: Any, count: int) -> Float[Array, "S F"]:
        """Those of `count` positions from `first` on.

        Raises:
          ValueError: positions beyond the table, where `first` is known.
        """
        length = self.table.shape[0]
        if count > length or (isinstance(first, int) and not 0 <= first <= length - count):
            raise ValueError(
                f"key: {count} positions from {first} on are more than the {length} that have "
                "symbols."
            )
        return jax.lax.dynamic_slice_in_dim(self.table[...], first, count)


class RelativeSymbols(nnx.Module):
    """A symbol for each distance from -`reach` to `reach`: `table` "2 reach + 1 F".

    Raises:
      ValueError: sizes that are not positive.
    """

    def __init__(self, features: int, reach: int, *, rngs: nnx.Rngs) -> None:
        if min(features, reach) < 1:
            raise ValueError(f"reach: expected positive sizes, got {features=}, {reach=}.")
        self.features = features
        draw = nnx.initializers.xavier_uniform()
        self.table = nnx.Param(draw(rngs.params(), (2 * reach + 1, features)))
