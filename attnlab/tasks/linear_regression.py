"""In-context linear regression: from examples of a line never seen, what is y at the next x?

    y_i = w · x_i + noise ε_i,    x_i, w ~ N(0, I) in D dimensions, ε_i ~ N(0, 1), w new in each row

    interleaved   (x_1, 0) (0, y_1) (x_2, 0) (0, y_2) (x_3, 0)     asked at every x
    joined        (x_1, y_1) (x_2, y_2) (x_3, 0)                   asked at the last x

Garg et al. 2022, arXiv:2208.01066, interleave (dtsip/in-context-learning) and so ask after
0, 1, 2, … examples in one row; von Oswald et al. 2022, arXiv:2212.07677, join each x to its y
(google-research/self-organising-systems), where one layer of linear attention can do one step of
gradient descent, and ask once.  Both distributions of x and w here are those of Garg et al.;
von Oswald et al. draw x evenly from a cube.

Settled here: Garg et al. write y into the first entry of a token as wide as x, so that only its
place tells it from an x; here each token is one wider and y has the last entry, in both layouts,
so that a model without positions has a chance too.  Errors are divided by D, which makes 1 that of
always saying 0 (without noise).  The target is the noisy y: no error is below noise² / D.

Beside a model stand the estimators of both papers, in closed form.  They read the same `inputs`
and give what a model would give: a prediction at each x from the examples before it.

Axes: B batch, L tokens in a row, F input width, P examples, D width of x, A places asked.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from attnlab.tasks.answers import check_at_least


class Examples(NamedTuple):
    """A batch: where `asked`, the model that read `inputs` so far owes `targets`, elsewhere 0."""

    inputs: Float[Array, "B L F"]
    targets: Float[Array, "B L"]
    asked: Bool[Array, "B L"]


@dataclass(frozen=True)
class LinearRegression:
    """The task's sizes: the width D of x, the standard deviation of the noise, the layout.

    Raises ValueError for a dimension below 1, negative noise and an unknown layout.
    """

    dimension: int = 4
    noise: float = 0.0
    layout: Literal["interleaved", "joined"] = "interleaved"

    def __post_init__(self):
        check_at_least(1, dimension=self.dimension)
        if not self.noise >= 0:
            raise ValueError(f"noise: expected at least 0, got {self.noise}.")
        if self.layout not in ("interleaved", "joined"):
            raise ValueError(f"layout: expected 'interleaved' or 'joined', got {self.layout!r}.")

    @property
    def input_width(self) -> int:
        """How wide a token is: x, and one entry for y."""
        return self.dimension + 1

    @property
    def shortest(self) -> int:
        """The least length of a row: one example and a question."""
        return 3 if self.layout == "interleaved" else 2

    def rows(self, key: Key[Array, ""], batch_size: int, length: int) -> Examples:
        """Rows of exactly `length` tokens; raises ValueError for a length below `shortest`."""
        check_at_least(self.shortest, length=length)
        points = (length + 1) // 2 if self.layout == "interleaved" else length
        w_key, x_key, noise_key = jax.random.split(key, 3)
        w = jax.random.normal(w_key, (batch_size, self.dimension))
        x = jax.random.normal(x_key, (batch_size, points, self.dimension))
        y = _dot(x, w[:, None]) + self.noise * jax.random.normal(noise_key, x.shape[:2])
        asked = jnp.zeros((batch_size, length), bool).at[:, self._places(length)].set(True)
        targets = jnp.where(asked, self._at_each_x(y, length), 0)
        return Examples(self._lay_out(x, y, length), targets, asked)

    def errors(self, predictions: Float[Array, "B L"], batch: Examples) -> Float[Array, " A"]:
        """The mean squared error, over D, at each place asked.

        In an interleaved row the i-th is that after i examples, from 0 on.
        """
        places = self._places(predictions.shape[1])
        wrong = predictions[:, places] - batch.targets[:, places]
        return (wrong**2).mean(axis=0) / self.dimension

    def loss(self, predictions: Float[Array, "B L"], batch: Examples) -> Float[Array, ""]:
        """The mean of `errors`."""
        return self.errors(predictions, batch).mean()

    def least_squares(self, batch: Examples) -> Float[Array, "B L"]:
        """The shortest w of those that fit the examples best; 0 before the first."""
        x, y = self._points(batch)
        before = jnp.tri(x.shape[1], k=-1)[None]
        seen = before[..., None] * x[:, None]
        w = _dot(jnp.linalg.pinv(seen), (before * y[:, None])[:, :, None])
        return self._say(w, x, batch)

    def ridge(self, batch: Examples, *, strength: float | None = None) -> Float[Array, "B L"]:
        """(XᵀX + strength I)⁻¹ Xᵀy; at its default, noise², the best that can be done here.

        It is then the mean of w given the examples.  Raises ValueError for a strength that is not
        positive, so also for the default without noise: the limit is `least_squares`.
        """
        strength = self.noise**2 if strength is None else strength
        if not strength > 0:
            raise ValueError(
                f"strength: expected more than 0, got {strength}; use least_squares for none."
            )
        x, y = self._points(batch)
        gram = _sum_before(x[..., :, None] * x[..., None, :])
        gram = gram + strength * jnp.eye(self.dimension)[None, None]
        w = jnp.linalg.solve(gram, _sum_before(x * y[..., None])[..., None])[..., 0]
        return self._say(w, x, batch)

    def gradient_descent(
        self, batch: Examples, *, rate: float | None = None
    ) -> Float[Array, "B L"]:
        """One step down Σ (w·x_j - y_j)² / 2n from w = 0:  w = rate / n Σ y_j x_j.

        Without `rate` it is the best for n examples, n / (n + D + 1 + noise²), with which the
        error, noise aside, is 1 - rate (von Oswald et al. search for it).
        """
        x, y = self._points(batch)
        count = jnp.arange(x.shape[1], dtype=x.dtype)
        if rate is None:
            factor = 1 / (count + self.dimension + 1 + self.noise**2)
        else:
            factor = rate / jnp.maximum(count, 1)
        w = factor[None, :, None] * _sum_before(x * y[..., None])
        return self._say(w, x, batch)

    def averaging(self, batch: Examples) -> Float[Array, "B L"]:
        """The w that is the mean of y_j x_j, Garg et al.'s averaging: a step of rate 1."""
        return self.gradient_descent(batch, rate=1.0)

    def _places(self, length):
        return slice(0, length, 2) if self.layout == "interleaved" else slice(length - 1, length)

    def _lay_out(self, x, y, length):
        if self.layout == "joined":
            return jnp.concatenate([x, y.at[:, -1].set(0)[..., None]], -1)
        only_x = jnp.pad(x, ((0, 0), (0, 0), (0, 1)))
        only_y = jnp.pad(y[..., None], ((0, 0), (0, 0), (self.dimension, 0)))
        tokens = jnp.stack([only_x, only_y], 2)
        return tokens.reshape(x.shape[0], -1, self.input_width)[:, :length]

    def _at_each_x(self, y, length):
        if self.layout == "joined":
            return y
        return jnp.stack([y, jnp.zeros_like(y)], 2).reshape(y.shape[0], -1)[:, :length]

    def _points(self, batch):
        """The x and y that a model can read; the y of the last question is 0, or not there."""
        if self.layout == "joined":
            return batch.inputs[..., :-1], batch.inputs[..., -1]
        x, y = batch.inputs[:, ::2, :-1], batch.inputs[:, 1::2, -1]
        return x, jnp.pad(y, ((0, 0), (0, x.shape[1] - y.shape[1])))

    def _say(self, w, x, batch):
        return self._at_each_x(_dot(w, x), batch.inputs.shape[1])


def _dot(a, b):
    """The scalar products; no matrix product, which accelerators may round to bfloat16."""
    return (a * b).sum(-1)


def _sum_before(values):
    """The sum over the examples before each one."""
    sums = jnp.cumsum(values[:, :-1], axis=1)
    return jnp.concatenate([jnp.zeros_like(values[:, :1]), sums], axis=1)
