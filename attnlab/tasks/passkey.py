"""The passkey task: a short secret in a long, dull text, asked for at the end.

    the grass is green …  KEY 3 1 4 1  … the grass is green …  ASK 3 1 4 1

Mohtashami & Jaggi, "Landmark Attention", 2023, arXiv:2305.16300, section 4.2 hide a number in
repeated English sentences; here each word is one token of a small vocabulary and the sentences are
one cycle of `filler` words, so that a model of two layers can learn the task in a minute and any
length can be asked.  With `noise`, some of the dull words are digits too, so that a digit is part
of the key by its place only, not by its kind.  The answer's digits follow the question in the same
row; a model is right when it predicts every one of them.

Axes: B batch, L tokens in a row, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key


@dataclass(frozen=True)
class Passkey:
    """The task's sizes.

    `digits` digits of base `base` make a key; the dull text repeats a cycle of `filler` words, of
    which a share `noise` is replaced by random digits.  Ids: 0 .. base-1 the digits, then KEY, ASK,
    then the filler words.
    """

    digits: int = 4
    base: int = 10
    filler: int = 16
    noise: float = 0.0

    def __post_init__(self):
        for name in ("digits", "filler"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        if self.base < 2:
            raise ValueError(f"base: expected at least 2, got {self.base}.")
        if not 0.0 <= self.noise < 1.0:
            raise ValueError(f"noise: expected a share in [0, 1), got {self.noise}.")

    @property
    def vocab_size(self) -> int:
        """Digits, KEY, ASK and the filler words."""
        return self.base + 2 + self.filler

    @property
    def shortest(self) -> int:
        """The least length of a row: KEY, the key, ASK, the key."""
        return 2 * (self.digits + 1)

    def rows(
        self,
        key: Key[Array, ""],
        batch_size: int,
        length: int,
        *,
        depth: float | int | Float[Array, " B"] | None = None,
    ) -> Int[Array, "B L"]:
        """Rows of exactly `length` tokens, the key hidden at a random depth, or at `depth`.

        Depth 0 puts the key at the start of the row and 1 right before the question.  Raises
        ValueError for a length below `shortest` and for a number outside [0, 1].
        """
        if length < self.shortest:
            raise ValueError(f"length: expected at least {self.shortest}, got {length}.")
        if isinstance(depth, (int, float)) and not 0 <= depth <= 1:
            raise ValueError(f"depth: expected 0 .. 1, got {depth}.")
        secret_key, depth_key, phase_key, noise_key, digit_key = jax.random.split(key, 5)
        secret = jax.random.randint(secret_key, (batch_size, self.digits), 0, self.base)
        room = length - self.shortest
        if depth is None:
            start = jax.random.randint(depth_key, (batch_size, 1), 0, room + 1)
        else:
            at = jnp.broadcast_to(jnp.asarray(depth, jnp.float32), (batch_size,))
            start = jnp.round(at * room).astype(jnp.int32)[:, None]
        phase = jax.random.randint(phase_key, (batch_size, 1), 0, self.filler)
        dull = self.base + 2 + jnp.remainder(jnp.arange(length)[None, :] + phase, self.filler)
        if self.noise > 0:
            noisy = jax.random.bernoulli(noise_key, self.noise, dull.shape)
            dull = jnp.where(noisy, jax.random.randint(digit_key, dull.shape, 0, self.base), dull)
        return self._lay_out(secret, start, dull, length)

    def _lay_out(self, secret, start, dull, length):
        """KEY and the secret at `start`, ASK and the secret at the end, dull words elsewhere."""
        position = jnp.arange(length)[None, :]
        inside = position - start  # 0 at KEY, 1 .. digits at the key's digits
        asked = position - (length - self.digits - 1)  # 0 at ASK, 1 .. digits at the answer
        behind = jnp.roll(dull, self.digits + 1, axis=1)  # the sentences go on after the key
        row = jnp.where(inside < 0, dull, behind)
        row = jnp.where(inside == 0, self.base, row)
        row = jnp.where(asked == 0, self.base + 1, row)
        for place in (inside, asked):
            digit = jnp.take_along_axis(secret, jnp.clip(place - 1, 0, self.digits - 1), axis=1)
            row = jnp.where((place > 0) & (place <= self.digits), digit, row)
        return row

    def loss(self, logits: Float[Array, "B L V"], rows: Int[Array, "B L"]) -> Float[Array, ""]:
        """The mean cross-entropy, in nats, of the answer's digits; nothing else is scored."""
        logits, answer = self._answer(logits, rows)
        return optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()

    def accuracy(
        self, logits: Float[Array, "B L V"], rows: Int[Array, "B L"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The share of keys told right in every digit, and the share of digits told right.

        Each digit is predicted from the true ones before it.  A guess gets base**-digits and
        1 / base.
        """
        logits, answer = self._answer(logits, rows)
        right = jnp.argmax(logits, -1) == answer
        return right.all(-1).astype(jnp.float32).mean(), right.astype(jnp.float32).mean()

    def _answer(self, logits, rows):
        return logits[:, -self.digits - 1 : -1], rows[:, -self.digits :]
