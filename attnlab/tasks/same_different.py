"""Same or different: two objects are shown; are they one? Also for objects never seen.

    tokens   red round small   red round small   ?
    asked                                        same

The simplest of relations, on which networks that learn what objects are, and not how they stand to
each other, fail for new objects: Kim, Ricci & Serre 2018, arXiv:1802.03390; it is the base of the
relational games (Shanahan et al. 2020, arXiv:1905.10307) on which Altabaa & Lafferty 2024,
arXiv:2405.16727, test dual attention, there with pictures.

Settled here: an object is one value of each of A attributes, a token each.  Objects are of one of
`classes` classes by the sum of their values; those of class 0 are never trained on, though each of
their values is.  Objects that differ do so in exactly two attributes and stay in their class, so
that no single token tells them apart from a pair that is the same.  Ids: attribute a's value v is
a U + v, of U values; then the question, "same", "different".

Axes: B batch, L = 2 A + 1 tokens in a row, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from attnlab.tasks.answers import Rows, check_at_least, cross_entropy, shares_right


@dataclass(frozen=True)
class SameDifferent:
    """The task's sizes: `attributes` of `values` values each, objects in `classes` classes.

    With `unseen` rows are of objects of class 0 alone, else of the others.  Raises ValueError for
    fewer than two of any, and for classes that do not divide the values.
    """

    attributes: int = 4
    values: int = 8
    classes: int = 4
    unseen: bool = False

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("attributes", "values", "classes")}
        check_at_least(2, **sizes)
        if self.values % self.classes:
            raise ValueError(f"classes: {self.classes} does not divide values={self.values}.")

    @property
    def vocab_size(self) -> int:
        """The values of all attributes, the question and two answers."""
        return self.attributes * self.values + 3

    @property
    def length(self) -> int:
        """Tokens in a row: two objects and the question."""
        return 2 * self.attributes + 1

    @property
    def chance(self) -> float:
        """The share of answers that a guess gets right."""
        return 0.5

    def rows(self, key: Key[Array, ""], batch_size: int, length: int | None = None) -> Rows:
        """Rows of `self.length` tokens; raises ValueError for another length."""
        if length not in (None, self.length):
            raise ValueError(f"length: expected {self.length}, got {length}.")
        object_key, same_key, pair_key, step_key = jax.random.split(key, 4)
        first = self._objects(object_key, batch_size)
        same = jax.random.bernoulli(same_key, 0.5, (batch_size,))
        order = jax.random.uniform(pair_key, (batch_size, self.attributes))
        up, down = jnp.moveaxis(jax.lax.top_k(order, 2)[1], -1, 0)
        step = jax.random.randint(step_key, (batch_size,), 1, self.values)
        step = jnp.where(same, 0, step)
        row = jnp.arange(batch_size)
        second = first.at[row, up].add(step).at[row, down].add(-step) % self.values
        begins = jnp.arange(self.attributes)[None, :] * self.values
        question = jnp.full((batch_size, 1), self.vocab_size - 3)
        tokens = jnp.concatenate([first + begins, second + begins, question], axis=1)
        empty = jnp.zeros((batch_size, self.length), jnp.int32)
        answer = jnp.where(same, self.vocab_size - 2, self.vocab_size - 1)
        asked = empty.astype(bool).at[:, -1].set(True)
        return Rows(tokens.astype(jnp.int32), empty.at[:, -1].set(answer), asked)

    def _objects(self, key: Key[Array, ""], batch_size: int) -> Int[Array, "B A"]:
        """Objects of the classes asked for: the last attribute makes the sum what it shall be."""
        value_key, class_key, last_key = jax.random.split(key, 3)
        shape = (batch_size, self.attributes - 1)
        free = jax.random.randint(value_key, shape, 0, self.values)
        kind = jax.random.randint(class_key, (batch_size,), 1, self.classes)
        kind = jnp.zeros_like(kind) if self.unseen else kind
        steps = self.values // self.classes
        more = self.classes * jax.random.randint(last_key, (batch_size,), 0, steps)
        last = (kind - free.sum(1) + more) % self.values
        return jnp.concatenate([free, last[:, None]], axis=1)

    def loss(self, logits: Float[Array, "B L V"], batch: Rows) -> Float[Array, ""]:
        """The mean cross-entropy, in nats, of the answers."""
        return cross_entropy(logits, batch)

    def accuracy(
        self, logits: Float[Array, "B L V"], batch: Rows
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The share of rows answered right, twice: each has one answer."""
        return shares_right(logits, batch)
