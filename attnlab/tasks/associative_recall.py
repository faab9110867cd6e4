"""Multi-query associative recall (MQAR): pairs of a key and its value first, then keys alone.

    tokens   k1 v1 k2 v2 k3 v3   k2 ·  ·  ·  k1 ·  k3 ·  ·  ·
    asked                        v2          v1    v3

Arora, Eyuboglu et al., "Zoology: Measuring and Improving Recall in Efficient Language Models",
2023, arXiv:2312.04927; the construction is that of their code (HazyResearch/zoology,
`multiquery_ar`).  Every key of a row is distinct and so is every value; the value is due at the
query itself and does not follow it.  Behind the P pairs, every second place is a slot for a query,
S = (L - 2P) / 2 slots in all, numbered r = 1 .. S.  The keys take their slots in turn, each without
replacement with

    p(r) ∝ r^(power_a - 1)

so that `power_a` = 1 spreads them evenly and a small one crowds them behind the pairs, as the gaps
between a bigram and its repetition are distributed in text.  Softmax attention finds a value
however many pairs there are; a state of fixed size has to hold them all.

Settled here: id 0 is the dull token, keys are 1 .. V//2 - 1 and values V//2 .. V - 1, as in their
code; where they ask for a vocabulary larger than the row we ask only for enough keys.  With
`random_filler` (their `random_non_queries`) every dull token becomes a random one of the whole
vocabulary, and may by chance look like a query that nobody scores.

Axes: B batch, L tokens in a row, V vocabulary, P pairs.
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
class AssociativeRecall:
    """The task's sizes.

    `num_kv_pairs` pairs out of a vocabulary of `vocab_size` ids, asked for at slots drawn by the
    power law of `power_a`; dull places hold random tokens with `random_filler`, else 0.
    Raises ValueError where the vocabulary has too few keys, and for a power that is not positive.
    """

    vocab_size: int = 64
    num_kv_pairs: int = 4
    power_a: float = 0.01
    random_filler: bool = True

    def __post_init__(self):
        check_at_least(1, num_kv_pairs=self.num_kv_pairs)
        check_at_least(2 * (self.num_kv_pairs + 1), vocab_size=self.vocab_size)
        if not self.power_a > 0:
            raise ValueError(f"power_a: expected more than 0, got {self.power_a}.")

    @property
    def shortest(self) -> int:
        """The least length of a row: the pairs, and a slot of two places for each query."""
        return 4 * self.num_kv_pairs

    @property
    def chance(self) -> float:
        """The share of answers that a guess among the row's own values gets right."""
        return 1 / self.num_kv_pairs

    def rows(self, key: Key[Array, ""], batch_size: int, length: int) -> Rows:
        """Rows of exactly `length` tokens.

        Raises ValueError for a length that is odd, or below `shortest`.
        """
        check_at_least(self.shortest, length=length)
        if length % 2:
            raise ValueError(f"length: expected an even number, got {length}.")
        pairs, half = self.num_kv_pairs, self.vocab_size // 2
        key_key, value_key, slot_key, filler_key = jax.random.split(key, 4)
        keys = 1 + draw_distinct(key_key, batch_size, pairs, half - 1)
        values = half + draw_distinct(value_key, batch_size, pairs, self.vocab_size - half)
        places = 2 * pairs + 2 * self._slots(slot_key, batch_size, length // 2 - pairs)
        row = jnp.arange(batch_size)[:, None]
        empty = jnp.zeros((batch_size, length), jnp.int32)
        asked = empty.astype(bool).at[row, places].set(True)
        if self.random_filler:
            tokens = jax.random.randint(filler_key, empty.shape, 0, self.vocab_size, jnp.int32)
        else:
            tokens = empty
        context = jnp.stack([keys, values], -1).reshape(batch_size, 2 * pairs)
        tokens = tokens.at[:, : 2 * pairs].set(context).at[row, places].set(keys)
        return Rows(tokens, empty.at[row, places].set(values), asked)

    def _slots(self, key, batch_size, slots):
        """The slot of each key: the largest of log p + Gumbel noise are drawn without replacement.

        The order of the largest is that of drawing one after the other (Kool et al. 2019,
        arXiv:1903.06059).
        """
        log_p = (self.power_a - 1) * jnp.log(jnp.arange(1.0, slots + 1))
        noisy = log_p[None, :] + jax.random.gumbel(key, (batch_size, slots))
        return jax.lax.top_k(noisy, self.num_kv_pairs)[1]

    def loss(self, logits: Float[Array, "B L V"], batch: Rows) -> Float[Array, ""]:
        """The mean cross-entropy, in nats, of the values at the queries."""
        return cross_entropy(logits, batch)

    def accuracy(
        self, logits: Float[Array, "B L V"], batch: Rows
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The share of rows with every query answered right, and the share of queries."""
        return shares_right(logits, batch)
