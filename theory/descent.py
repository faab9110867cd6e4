"""Small models trained to the end in one compiled loop, to see what theorems say is learnt."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from theory.theorem import Key


def adam(
    loss: Callable[[Any, Key], jax.Array],
    params: Any,
    key: Key,
    *,
    steps: int,
    rate: float,
) -> tuple[Any, jax.Array]:
    """Minimise `loss(params, key)`, a fresh key each step; "steps" losses come with the result.

    The rate is constant, and falls to zero in a straight line over the last quarter.

    Raises:
      ValueError: there are fewer than four steps.
    """
    if steps < 4:
        raise ValueError(f"steps: expected 4 or more, got {steps}.")
    optimizer = optax.adam(lambda step: rate * jnp.minimum(1.0, 4 * (1 - step / steps)))

    def step(carry: tuple[Any, Any], at: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        value, slope = jax.value_and_grad(loss)(params, jax.random.fold_in(key, at))
        updates, state = optimizer.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(steps)))
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of a count
        (params, _), losses = run((params, optimizer.init(params)))
    return params, losses
