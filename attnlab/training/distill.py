"""Distillation: a module learns what a function, such as a layer that was trained before, does.

    loss = mean over tokens that are real of |student(x) - teacher(x)|^2 / F

Adam without schedule, weight decay or clipping, as Bozic et al. 2023, arXiv:2311.10642 replace
layers of attention one by one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key


def squared_error(
    found: Float[Array, "*B F"], target: Float[Array, "*B F"], real: Any = None
) -> Float[Array, ""]:
    """Mean squared error over entries of real tokens; `real` booleans "*B", None for all."""
    error = jnp.mean(jnp.square(found - target), axis=-1)
    if real is None:
        return jnp.mean(error)
    count = jnp.maximum(jnp.sum(real), 1).astype(error.dtype)
    return jnp.sum(jnp.where(real, error, 0)) / count


def distill(
    student: nnx.Module,
    teacher: Callable[[Any], Array],
    draw: Callable[[Key[Array, ""]], Any],
    steps: int,
    *,
    apply: Callable[[Any, Any], Array] = lambda student, batch: student(batch),
    real: Callable[[Any], Array] = lambda batch: None,  # type: ignore[assignment, return-value]
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    seed: int = 0,
) -> np.ndarray:
    """Trains `student` in place to do what `teacher` does; returns the loss of every step.

    Args:
      teacher: from a batch to targets "*B F"; it has no gradient.
      draw: a batch from a random key, traced; batches are never drawn twice.
      apply: the student's output for a batch, `student(batch)` by default.
      real: which tokens of a batch count, "*B"; all by default.
      learning_rate, betas: of Adam.

    Raises:
      ValueError: steps or a learning rate that are not positive.
      FloatingPointError: a loss that is not finite.
    """
    if steps < 1 or learning_rate <= 0:
        raise ValueError(f"steps: expected positive numbers, got {steps=}, {learning_rate=}.")
    graph, params, rest = nnx.split(student, nnx.Param, ...)
    adam = optax.adam(learning_rate, b1=betas[0], b2=betas[1])

    def loss(params: Any, batch: Any) -> Array:
        found = apply(nnx.merge(graph, params, rest), batch)
        target = jax.lax.stop_gradient(teacher(batch))
        return squared_error(found, target, real(batch))

    def step(carry: Any, key: Array) -> tuple[Any, Array]:
        params, state = carry
        value, slope = jax.value_and_grad(loss)(params, draw(key))
        # optax counts steps in integers and raises floats to them: strict promotion forbids that.
        with jax.numpy_dtype_promotion("standard"):
            change, state = adam.update(slope, state, params)
        return (optax.apply_updates(params, change), state), value

    keys = jax.random.split(jax.random.key(seed), steps)
    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    (params, _), losses = run((params, adam.init(params)), keys)
    losses = np.asarray(losses)
    if not np.isfinite(losses).all():
        bad = int(np.argmin(np.isfinite(losses)))
        raise FloatingPointError(
            f"the loss of step {bad} is {losses[bad]}; try a smaller learning rate."
        )
    nnx.update(student, params)
    return losses
