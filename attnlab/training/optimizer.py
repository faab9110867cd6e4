"""AdamW with warm-up and cosine decay, and which parameters may decay."""

from typing import Any

import jax
import optax

from attnlab.training.config import TrainConfig


def names(path: tuple) -> list[str]:
    """The keys along a pytree path, as strings."""
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


def is_positional(path: tuple) -> bool:
    """Whether a parameter belongs to a mechanism: a slope, a prior, a table of biases."""
    return "mechanism" in names(path)


def decay_mask(params: Any) -> Any:
    """True for the matrices of the model; norms, biases and mechanisms' parameters never decay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim >= 2 and not is_positional(path), params
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm, AdamW, warm-up and cosine decay; see `TrainConfig`."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup,
        decay_steps=config.steps,
        end_value=config.final_rate * config.learning_rate,
    )

    def faster(updates, state, params=None):
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, u: u * config.positional_rate if is_positional(path) else u, updates
        )
        return scaled, state

    stages = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    ]
    if config.positional_rate != 1.0:
        stages.append(optax.GradientTransformation(lambda params: optax.EmptyState(), faster))
    chain = optax.chain(*stages)

    def update(updates, state, params=None):
        # optax counts steps in integers and raises floats to them: strict promotion forbids that.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)
