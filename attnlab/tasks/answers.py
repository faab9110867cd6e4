"""Rows of tokens with answers asked for at some places: what the synthetic tasks share.

Axes: B batch, L tokens in a row, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key


class Rows(NamedTuple):
    """A batch: at each place where `asked`, the model that read `tokens` so far owes `targets`.

    Elsewhere `targets` is 0 and counts for nothing.
    """

    tokens: Int[Array, "B L"]
    targets: Int[Array, "B L"]
    asked: Bool[Array, "B L"]


def cross_entropy(logits: Float[Array, "B L V"], rows: Rows) -> Float[Array, ""]:
    """The mean cross-entropy, in nats, of the answers asked for; nothing else is scored."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
    return each.mean(where=rows.asked)


def shares_right(
    logits: Float[Array, "B L V"], rows: Rows
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The share of rows with every answer right, and the share of answers right."""
    right = jnp.argmax(logits, -1) == rows.targets
    whole = right.all(-1, where=rows.asked).astype(jnp.float32).mean()
    return whole, right.astype(jnp.float32).mean(where=rows.asked)


def draw_distinct(
    key: Key[Array, ""], batch_size: int, number: int, choices: int
) -> Int[Array, "B M"]:
    """For each row, `number` of the integers 0 .. choices - 1, none twice, in random order."""
    return jax.lax.top_k(jax.random.uniform(key, (batch_size, choices)), number)[1]


def check_at_least(least: int, **sizes: int) -> None:
    """Raises ValueError, naming the first size that is below `least`."""
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}.")
