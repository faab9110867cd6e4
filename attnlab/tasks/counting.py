"""Counting: variables are set to zero and counted up among dull steps; how many is it now?

    tokens   a=0  b=0  ·  ·  a++  ·  a++  b++  ·  a?  ·  a=0  a++  ·  b?
    asked                                         2                   1

Golovneva, Wang, Weston & Sukhbaatar, "Contextual Position Encoding", 2024, arXiv:2405.18719; the
weights of the operations (50 dull, 7 increments, 1 reset) and the largest count, 10, are those of
the authors' generator (facebookresearch/RAM, `count_data_gen.py`).  The answer is the
number of increments of a variable since it was last set: positions that count every token do not
tell it, and a longer or duller row changes them while the answer stays in the same range.

Settled here: an operation is one token, where theirs are several words; a row begins with every
variable set to zero; questions come anywhere, as often as increments, and are not answered in the
row; the last token is a question, and an increment beyond the largest count becomes a dull step.
Ids: 0 .. most are the counts (answers only), then the dull step, then reset, increment and question
of each variable.

Axes: B batch, L tokens in a row, V vocabulary, M variables.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from attnlab.tasks.answers import Rows, check_at_least, cross_entropy, shares_right

RESET, INCREMENT, QUESTION = range(3)


@dataclass(frozen=True)
class Counting:
    """The task's sizes: how many variables, the largest count, and weights of the operations.

    `dull`, `increment`, `reset` and `question` are odds.  Raises ValueError for sizes below 1 and
    odds that are negative.
    """

    variables: int = 1
    most: int = 10
    dull: float = 50.0
    increment: float = 7.0
    reset: float = 1.0
    question: float = 7.0

    def __post_init__(self):
        check_at_least(1, variables=self.variables, most=self.most)
        for name in ("dull", "increment", "reset", "question"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected odds of 0 or more, got {getattr(self, name)}.")
        if self.increment == 0:
            raise ValueError("increment: expected odds above 0, or there is nothing to count.")

    @property
    def nothing(self) -> int:
        """The id of the dull step."""
        return self.most + 1

    @property
    def vocab_size(self) -> int:
        """The counts, the dull step, and three operations of each variable."""
        return self.most + 2 + 3 * self.variables

    @property
    def shortest(self) -> int:
        """The least length of a row: every variable set, and a question."""
        return self.variables + 1

    def rows(self, key: Key[Array, ""], batch_size: int, length: int) -> Rows:
        """Rows of exactly `length` tokens; raises ValueError for a length below `shortest`."""
        check_at_least(self.shortest, length=length)
        kind_key, name_key = jax.random.split(key)
        shape = (batch_size, length)
        odds = jnp.array([self.reset, self.increment, self.question, self.dull])
        kind = jax.random.categorical(kind_key, jnp.log(odds), shape=shape)
        name = jax.random.randint(name_key, shape, 0, self.variables)
        first = self.variables
        kind = kind.at[:, :first].set(RESET).at[:, -1].set(QUESTION)
        name = name.at[:, :first].set(jnp.arange(first)[None, :])
        count = self._since_reset(kind, name)
        beyond = (kind == INCREMENT) & (count > self.most)
        operation = self.most + 2 + 3 * name + kind
        tokens = jnp.where((kind > QUESTION) | beyond, self.nothing, operation)
        asked = kind == QUESTION
        targets = jnp.where(asked, jnp.minimum(count, self.most), 0)
        return Rows(tokens.astype(jnp.int32), targets.astype(jnp.int32), asked)

    def _since_reset(self, kind: Int[Array, "B L"], name: Int[Array, "B L"]) -> Int[Array, "B L"]:
        """Increments of each token's variable since it was last set, itself included."""

        def counted(variable: Int[Array, ""]) -> Int[Array, "B L"]:
            own: Bool[Array, "B L"] = name == variable
            total = jnp.cumsum(own & (kind == INCREMENT), axis=1)
            before = jax.lax.cummax(jnp.where(own & (kind == RESET), total, 0), axis=1)
            return total - before

        counts = jax.vmap(counted, out_axes=-1)(jnp.arange(self.variables))
        return jnp.take_along_axis(counts, name[..., None], axis=-1)[..., 0]

    def loss(self, logits: Float[Array, "B L V"], batch: Rows) -> Float[Array, ""]:
        """The mean cross-entropy, in nats, of the counts asked for."""
        return cross_entropy(logits, batch)

    def accuracy(
        self, logits: Float[Array, "B L V"], batch: Rows
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The share of rows with every question answered right, and the share of questions."""
        return shares_right(logits, batch)
