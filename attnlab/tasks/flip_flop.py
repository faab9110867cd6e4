"""Flip-flop: a bit is written, ignored and read; what is read is the bit written last.

    tokens   w 1   i 0   i 1   r 1   w 0   i 1   r 0
    asked                      1                 0

Liu, Ash, Goel, Krishnamurthy & Zhang, "Exposing Attention Glitches with Flip-Flop Language
Modeling", 2023, arXiv:2306.00946.  A row alternates instructions and bits; it begins with a write
and ends with a read, and between them an instruction is "ignore" with probability p, else one of
the two others.  FFL(0.8) is learned and FFL(0.98), where the last write is far away, and FFL(0.1),
where there are many, are asked.  One layer of attention that finds the last write is enough.

Settled here: ids 0 and 1 are the bits, then write, read and ignore; the answer is due at the "read"
and stands behind it in the row, as in their language; nothing else is scored.

Axes: B batch, L tokens in a row, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from attnlab.tasks.answers import Rows, check_at_least, cross_entropy, shares_right

WRITE, READ, IGNORE = 2, 3, 4


@dataclass(frozen=True)
class FlipFlop:
    """The task's only size: the probability `ignore` of an instruction to ignore a bit.

    Raises ValueError for one outside [0, 1).
    """

    ignore: float = 0.8

    def __post_init__(self):
        if not 0.0 <= self.ignore < 1.0:
            raise ValueError(f"ignore: expected a probability in [0, 1), got {self.ignore}.")

    @property
    def vocab_size(self) -> int:
        """Two bits and three instructions."""
        return 5

    @property
    def shortest(self) -> int:
        """The least length of a row: a write and a read, with their bits."""
        return 4

    @property
    def chance(self) -> float:
        """The share of answers that a guess gets right."""
        return 0.5

    def rows(self, key: Key[Array, ""], batch_size: int, length: int) -> Rows:
        """Rows of exactly `length` tokens.

        Raises ValueError for a length that is odd, or below `shortest`.
        """
        check_at_least(self.shortest, length=length)
        if length % 2:
            raise ValueError(f"length: expected an even number, got {length}.")
        bit_key, ignore_key, read_key = jax.random.split(key, 3)
        shape = (batch_size, length // 2)
        reads = jax.random.bernoulli(read_key, 0.5, shape)
        ignored = jax.random.bernoulli(ignore_key, self.ignore, shape)
        orders = jnp.where(ignored, IGNORE, jnp.where(reads, READ, WRITE))
        orders = orders.at[:, 0].set(WRITE).at[:, -1].set(READ)
        bits = jax.random.randint(bit_key, shape, 0, 2, jnp.int32)
        place = jnp.arange(length // 2)[None, :]
        last = jax.lax.cummax(jnp.where(orders == WRITE, place, 0), axis=1)
        written = jnp.take_along_axis(bits, last, axis=1)
        asked = orders == READ
        bits = jnp.where(asked, written, bits)
        empty = jnp.zeros((batch_size, length), jnp.int32)
        tokens = jnp.stack([orders.astype(jnp.int32), bits], -1).reshape(batch_size, length)
        targets = empty.at[:, ::2].set(jnp.where(asked, written, 0))
        return Rows(tokens, targets, empty.astype(bool).at[:, ::2].set(asked))

    def loss(self, logits: Float[Array, "B L V"], batch: Rows) -> Float[Array, ""]:
        """The mean cross-entropy, in nats, of the bits read."""
        return cross_entropy(logits, batch)

    def accuracy(
        self, logits: Float[Array, "B L V"], batch: Rows
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The share of rows with every read answered right, and the share of reads."""
        return shares_right(logits, batch)
