"""The training loop: one compiled program that runs many steps, and what happens between calls.

A step is a pure function of (state, seed, step number): the batch and the dropout come from
`fold_in(key(seed), step)`.  The compiled program takes how many steps to run as an argument, so
that a run cut into pieces in another way executes the very same code and gives the same bits.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.training.config import TrainConfig
from attnlab.training.mesh import Placement
from attnlab.training.optimizer import make_optimizer

LONGEST_CALL = 50  # steps
SECONDS_PER_CALL = 1.0  # aim: the progress bar moves about once a second


class TrainState(NamedTuple):
    """All that changes while training."""

    step: Any
    params: Any
    optimizer: Any


@dataclass
class History:
    """What happened: the loss of every step (nats per token) and the evaluations."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """What a reporter is told after each call of the compiled program."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    evaluation: float | None = None


def fit(
    model: nnx.Module,
    loss: Callable[[Any, Any, Any], Any],
    draw: Callable[[Any, Any], Any],
    data: Any,
    config: TrainConfig,
    *,
    evaluate: Callable[[Any], float] | None = None,
    evaluate_every: int | None = None,
    save: Callable[[TrainState, History], Any] | None = None,
    save_every: int | None = None,
    restore: Callable[[TrainState], tuple[TrainState, History]] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    placement: Placement | None = None,
) -> History:
    """Trains `model` in place for `config.steps` steps and returns what happened.

    `draw(data, key)` makes a batch and `loss(model, batch, dropout_key)` its scalar loss; both are
    traced.  `evaluate(model)` is called every `evaluate_every` steps and at the end, `save(state,
    history)` every `save_every` steps and at the end; `restore(state)` returns the state to start
    from.  With `placement` the state and the data lie on its mesh and attention goes across it;
    the model ends with arrays of this process alone.  Raises FloatingPointError as soon as a loss
    is not finite.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(config)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    history = History()
    if placement is not None:
        state = placement.put(state, placement.state(state))
        data, rest = placement.put(data), jax.tree.map(np.asarray, rest)
    if restore is not None:
        state, history = restore(state)
    # The compiled program gives its input's memory away: it must own it, also the model's.
    state = jax.tree.map(jnp.copy, state)
    advance = _compile(graph, rest, optimizer, loss, draw, config, placement, state)
    step, pace = int(state.step), 1  # the first call also compiles
    while step < config.steps:
        count = _steps_until_stop(step, pace, config.steps, evaluate_every, save_every)
        began = time.perf_counter()
        state, losses = advance(state, data, count)
        losses = np.asarray(losses)[:count]
        seconds = time.perf_counter() - began
        pace = int(np.clip(count * SECONDS_PER_CALL / max(seconds, 1e-6), 1, LONGEST_CALL))
        step += count
        history.losses += [float(value) for value in losses]
        if not np.isfinite(losses).all():
            bad = step - count + int(np.argmin(np.isfinite(losses)))
            raise FloatingPointError(
                f"the loss of step {bad} is {losses[~np.isfinite(losses)][0]}; try a smaller"
                " learning rate or a longer warm-up."
            )
        evaluation = None
        if evaluate is not None and _is_due(step, config.steps, evaluate_every):
            nnx.update(model, jax.tree.map(jnp.copy, state.params))
            evaluation = evaluate(model)
            history.evaluations.append((step, evaluation))
        if save is not None and _is_due(step, config.steps, save_every):
            save(state, history)
        tokens = count * config.batch_size * config.context
        report(Progress(step, config.steps, history.losses[-1], tokens / seconds, evaluation))
    nnx.update(model, state.params if placement is None else placement.gathered(state.params))
    return history


def _compile(graph, rest, optimizer, loss, draw, config, placement, state):
    options = {}
    if placement is not None:
        options["out_shardings"] = (placement.state(state), placement.whole(0))

    @partial(jax.jit, donate_argnums=0, **options)
    def advance(state, data, count):
        root = jax.random.key(config.seed)

        def one(i, carry):
            state, losses = carry
            batch_key, dropout_key = jax.random.split(jax.random.fold_in(root, state.step))
            batch = draw(data, batch_key)

            def objective(params):
                fixed = jax.tree.map(jnp.asarray, rest)
                return loss(nnx.merge(graph, params, fixed), batch, dropout_key)

            value, grads = jax.value_and_grad(objective)(state.params)
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
            params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.params, updates)
            losses = losses.at[i].set(value.astype(jnp.float32))
            return TrainState(state.step + 1, params, optimizer_state), losses

        empty = jnp.zeros((LONGEST_CALL,), jnp.float32)
        return jax.lax.fori_loop(0, count, one, (state, empty))

    def across(*args):
        with placement.attention(config.batch_size):
            return advance(*args)

    return advance if placement is None else across


def _is_due(step: int, steps: int, every: int | None) -> bool:
    return step == steps or (every is not None and step % every == 0)


def _steps_until_stop(step: int, pace: int, steps: int, *every: int | None) -> int:
    stops = [steps, *(step + e - step % e for e in every if e is not None)]
    return min(pace, min(stops) - step)
