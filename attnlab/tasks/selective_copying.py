"""Selective copying: repeat, in order, the few tokens that stood at random places in the noise.

    tokens   · · c · · · a · a · · b ·   ? ? ? ?
    asked                                c a a b

Gu & Dao, "Mamba", 2023, arXiv:2312.00752, sections 3.1 and 4.1.1, after the copying task of
Arjovsky et al. 2016, arXiv:1511.06464, and the denoising task of Jing et al. 2019,
arXiv:1706.02761; the construction is that of the S4 code (state-spaces/s4, `copying.py` with
`variable=True`).  What is to be kept is told from the noise by content alone, and what comes j-th
is asked for at the j-th marker: nothing in the markers says which.  A convolution, whose delays are
fixed, solves the plain task, where the tokens stand first (`spread=False`), and not this one.

Settled here: id 0 is the noise, 1 .. alphabet the tokens to keep (drawn with replacement), and
alphabet + 1 the marker, as in that code.  `length` counts the whole row, markers included.  The
paper's setting (appendix E.1: rows of 4096, a vocabulary of 16 with the noise, 16 tokens kept) is
`SelectiveCopying(num_tokens=16, alphabet=15).rows(key, 64, 4096)` if its marker comes on top and
its 4096 counts the markers; the paper says neither.

Axes: B batch, L tokens in a row, V vocabulary, M tokens kept.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from attnlab.tasks.answers import (
    Rows,
    check_at_least,
    cross_entropy,
    draw_distinct,
    shares_right,
)


@dataclass(frozen=True)
class SelectiveCopying:
    """The task's sizes.

    `num_tokens` tokens of `alphabet` kinds are to be kept; with `spread` they stand at random
    places, otherwise at the start of the row.  Raises ValueError for sizes that make no task.
    """

    num_tokens: int = 4
    alphabet: int = 8
    spread: bool = True

    def __post_init__(self):
        check_at_least(1, num_tokens=self.num_tokens)
        check_at_least(2, alphabet=self.alphabet)

    @property
    def vocab_size(self) -> int:
        """The noise, the tokens to keep, and the marker."""
        return self.alphabet + 2

    @property
    def marker(self) -> int:
        """The id of the marker."""
        return self.alphabet + 1

    @property
    def shortest(self) -> int:
        """The least length of a row: the tokens and as many markers, no noise."""
        return 2 * self.num_tokens

    @property
    def chance(self) -> float:
        """The share of answers that a guess among the kinds of tokens gets right."""
        return 1 / self.alphabet

    def rows(self, key: Key[Array, ""], batch_size: int, length: int) -> Rows:
        """Rows of exactly `length` tokens; raises ValueError for a length below `shortest`."""
        check_at_least(self.shortest, length=length)
        token_key, place_key = jax.random.split(key)
        shape = (batch_size, self.num_tokens)
        kept = jax.random.randint(token_key, shape, 1, self.alphabet + 1, jnp.int32)
        start = length - self.num_tokens
        if self.spread:
            places = jnp.sort(draw_distinct(place_key, *shape, start), axis=1)
        else:
            places = jnp.broadcast_to(jnp.arange(self.num_tokens)[None, :], shape)
        empty = jnp.zeros((batch_size, length), jnp.int32)
        tokens = empty.at[jnp.arange(batch_size)[:, None], places].set(kept)
        tokens = tokens.at[:, start:].set(self.marker)
        return Rows(
            tokens, empty.at[:, start:].set(kept), empty.astype(bool).at[:, start:].set(True)
        )

    def loss(self, logits: Float[Array, "B L V"], batch: Rows) -> Float[Array, ""]:
        """The mean cross-entropy, in nats, of the tokens due at the markers."""
        return cross_entropy(logits, batch)

    def accuracy(
        self, logits: Float[Array, "B L V"], batch: Rows
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The share of rows repeated whole, and the share of tokens repeated right."""
        return shares_right(logits, batch)
