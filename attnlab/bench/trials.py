"""Trials: the same model trained from several seeds by one compiled step.

A seed decides parameters, batches and dropout, so two mechanisms with the same seed see the same
batches.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from attnlab.bench.harness import MismatchError
from attnlab.bench.train import count_parameters
from attnlab.models import CausalLM
from attnlab.tasks.text import Corpus, load_corpus, sample_batch, windows
from attnlab.training import TrainConfig, make_optimizer
from attnlab.training.language import next_token_loss
from attnlab.training.loop import TrainState

LOOK = 50  # steps between looks at the loss
TOLERANCE = 0.02  # of parameters, between models of one size


@functools.cache
def text(name: str) -> Corpus:
    """A corpus, read once."""
    return load_corpus(name)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What is learned: batches and their loss, both traced, and arrays that batches are cut from.

    `draw(data, key)` makes a batch and `loss(model, batch, dropout_key)` its loss.
    """

    draw: Callable[[Any, Key[Array, ""]], Any]
    loss: Callable[[Any, Any, Key[Array, ""]], Float[Array, ""]]
    data: Any = None


def characters(corpus: str, batch: int, context: int) -> Lesson:
    """The next character of a text."""
    draw = partial(sample_batch, batch_size=batch, context=context)
    return Lesson(draw, next_token_loss, jnp.asarray(text(corpus).train))


def answers(task: Any, batch: int, length: int) -> Lesson:
    """A synthetic task's answers, in rows of one length."""
    return Lesson(
        lambda data, key: task.rows(key, batch, length),
        lambda model, rows, key: task.loss(model(rows.tokens), rows),
    )


def matching_width(build: Callable[[int], CausalLM], wanted: int) -> int:
    """The width of the MLP with which `build(width)` has as many parameters as wanted.

    Raises MismatchError where no width comes within the tolerance.
    """
    one, two = (count_parameters(build(width)) for width in (1, 2))
    width = max(1, 1 + round((wanted - one) / (two - one)))
    found = one + (width - 1) * (two - one)
    if abs(found - wanted) > TOLERANCE * wanted:
        raise MismatchError(
            f"{found:,} parameters with an MLP of width {width}, {wanted:,} are wanted; no width "
            f"brings them within {100 * TOLERANCE:g} %."
        )
    return width


class Trial:
    """A model in training.

    Args:
      build: makes the model of a seed.
      lesson: what it learns.
      config: steps, schedule and decay; its seed is not used.
    """

    def __init__(self, build: Callable[[int], CausalLM], lesson: Lesson, config: TrainConfig):
        self.build, self.lesson, self.config = build, lesson, config
        self.optimizer = make_optimizer(config)
        self._compiled: dict[nnx.GraphDef, Any] = {}

    def start(self, seed: int) -> tuple[nnx.GraphDef, TrainState, Any, Key[Array, ""]]:
        """The model of a seed before its first step, in parts, and the key of its batches."""
        graph, params, rest = nnx.split(self.build(seed), nnx.Param, ...)
        state = TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))
        return graph, state, rest, jax.random.key(1000 + seed)

    def compiled(self, graph: nnx.GraphDef, *arguments: Any) -> Any:
        """The training step; one program serves all seeds whose models differ in numbers alone."""
        if graph not in self._compiled:
            step = jax.jit(partial(_step, graph, self.optimizer, self.lesson))
            self._compiled[graph] = step.lower(*arguments, self.lesson.data).compile()
        return self._compiled[graph]

    def train(self, seed: int) -> CausalLM:
        """The model of a seed after training.

        Raises FloatingPointError for a loss that is not finite.
        """
        graph, state, rest, key = self.start(seed)
        advance = self.compiled(graph, state, rest, key)
        for step in range(self.config.steps):
            state, loss = advance(state, rest, key, self.lesson.data)
            looked_at = step % LOOK == 0 or step == self.config.steps - 1
            if looked_at and not np.isfinite(float(loss)):
                raise FloatingPointError(f"the loss of step {step} is {loss}, with seed {seed}")
        return nnx.merge(graph, state.params, rest)


def _step(
    graph: nnx.GraphDef, optimizer: Any, lesson: Lesson, state: TrainState, rest: Any,
    key: Key[Array, ""], data: Any,
) -> tuple[TrainState, Float[Array, ""]]:  # fmt: skip
    batch_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    batch = lesson.draw(data, batch_key)

    def objective(params: Any) -> Float[Array, ""]:
        return lesson.loss(nnx.merge(graph, params, rest), batch, dropout_key)

    value, grads = jax.value_and_grad(objective)(state.params)
    updates, memory = optimizer.update(grads, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.params, updates)
    return TrainState(state.step + 1, params, memory), value


def validation_loss(
    model: CausalLM, corpus: str, context: int, *, batch: int = 16, limit: int = 64
) -> float:
    """The mean loss of windows of the corpus's validation part, in nats per character."""
    tokens = text(corpus).validation
    batches = windows(tokens, batch_size=batch, context=context, limit=limit)
    return float(_mean_loss(*nnx.split(model), jnp.asarray(batches)))


@partial(jax.jit, static_argnames="graph")
def _mean_loss(graph: nnx.GraphDef, state: Any, batches: Array) -> Float[Array, ""]:
    losses = jax.lax.map(lambda rows: next_token_loss(nnx.merge(graph, state), rows), batches)
    return losses.mean()


def score(model: CausalLM, task: Any, length: int, *, rows: int = 512) -> tuple[float, float]:
    """The mean loss and the share of answers right on unseen rows of one length."""
    found = _score(*nnx.split(model), task=task, length=length, rows=rows)
    return float(found[0]), float(found[1])


@partial(jax.jit, static_argnames=("graph", "task", "length", "rows"))
def _score(
    graph: nnx.GraphDef, state: Any, *, task: Any, length: int, rows: int
) -> tuple[Array, Array]:
    unseen = task.rows(jax.random.key(1_000_003), rows, length)
    logits = nnx.merge(graph, state)(unseen.tokens)
    return task.loss(logits, unseen), task.accuracy(logits, unseen)[1]
