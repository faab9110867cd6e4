"""Claims on text: energy gates, softplus re-weighting at length, mixtures of heads.

Mechanisms that know no positions are given those that every arm of the same trial has: waves at the
input for energy gates, rotation for the two others.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.bench.trial_sizes import Finding, Size, spread
from attnlab.bench.trials import Trial, characters, text, validation_loss
from attnlab.core.rotary import rotate
from attnlab.dense.energy_gated import EnergyGatedAttention
from attnlab.heads.moh import MoH
from attnlab.models.language_model import MechanismSource
from attnlab.normalization.softplus_reweighting import SoftplusReweighting
from attnlab.positional.sinusoidal import Sinusoidal

LONGER = 16  # times the length of training
FLAT = 0.05  # of the loss, what it may grow by to be nearly constant
SHARED, SHARES = 2, (4, 6, 7)  # of 8 heads: always active, and active in all


class WavedGates(EnergyGatedAttention):
    """Energy gates in a model with sinusoidal positions."""

    def embed(self, x: Float[Array, "*B T F"], *, offset: Any = 0) -> Float[Array, "*B T F"]:
        return Sinusoidal().embed(x, offset=offset)


class Rotary:
    """Put before a mechanism: its queries and keys are rotated by their positions."""

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K D"],
        **options: Any,
    ) -> Any:
        query = rotate(query, offset=options.get("query_offset", 0))
        key = rotate(key, offset=options.get("key_offset", 0))
        call: Callable = super().__call__  # type: ignore[misc]
        return call(query, key, value, **options)


class RotaryReweighting(Rotary, SoftplusReweighting):
    """Softplus re-weighting of rotated queries and keys, as the paper's GPT-2 has it."""


class RotaryMoH(Rotary, MoH):
    """A mixture of heads with rotated queries and keys."""


def language_trial(mechanism: MechanismSource, size: Size) -> Trial:
    """A language model of the size's corpus."""
    vocab_size = text(size.corpus).vocabulary.size
    build = partial(size.model, mechanism, vocab_size)
    return Trial(build, characters(size.corpus, size.batch, size.context), size.training)


def losses(mechanism: MechanismSource, size: Size) -> list[float]:
    """The validation loss of each seed at the length of training."""
    trial = language_trial(mechanism, size)
    return [validation_loss(trial.train(seed), size.corpus, size.context) for seed in size.seeds]


def gated(size: Size, statistics: str) -> MechanismSource:
    """Energy gates with mean and deviation over the keys seen, or over the window as published."""
    options: dict[str, Any] = {"statistics": statistics, "allow_leak": statistics == "window"}
    return lambda rngs: WavedGates(size.width, size.heads, **options, rngs=rngs)


def energy_gain(size: Size) -> Finding:
    """Validation loss without gates, with causal ones, and with the published ones, which leak."""
    found = {"plain": losses("sinusoidal", size)}
    for statistics in ("seen", "window"):
        found[statistics] = losses(gated(size, statistics), size)
    gains = {
        name: [a - b for a, b in zip(found["plain"], found[name], strict=True)]
        for name in ("seen", "window")
    }
    ours = (
        f"{np.mean(found['plain']):.3f} → {np.mean(found['seen']):.3f}, gain "
        f"{spread(gains['seen'])}; with window statistics, which read ahead, "
        f"{spread(gains['window'])}"
    )
    return Finding(ours, [gain > 0 for gain in gains["seen"]], found)


def energy_leak(size: Size) -> Finding:
    """How far earlier logits move when the last token is another one, before any training."""
    moved = {
        statistics: [leak(language_trial(gated(size, statistics), size), seed, size)
                     for seed in size.seeds]
        for statistics in ("seen", "window")
    }  # fmt: skip
    ours = (
        f"earlier logits move by {max(moved['seen']):.2g} with the statistics of keys seen, by "
        f"{spread(moved['window'], '.2g')} with window statistics"
    )
    agrees = [seen == 0 < window for seen, window in zip(*moved.values(), strict=True)]
    return Finding(ours, agrees, moved)


def leak(trial: Trial, seed: int, size: Size) -> float:
    """The largest change of a logit before the last token when that is changed."""
    model = trial.build(seed)
    tokens = jax.random.randint(jax.random.key(seed), (4, size.context), 1, model.vocab_size)
    other = tokens.at[:, -1].set(1 + tokens[:, -1] % (model.vocab_size - 1))
    first, second = model(tokens), model(other)
    return float(jnp.max(jnp.abs(first - second)[:, :-1]))


def softplus_length(size: Size) -> Finding:
    """Validation loss of the same text at the length of training and beyond."""
    arms: dict[str, MechanismSource] = {
        "softmax": "rope",
        "LSSA": lambda rngs: RotaryReweighting(None),
        "LSSAR": lambda rngs: RotaryReweighting(),
    }
    found = {name: at_lengths(mechanism, size) for name, mechanism in arms.items()}
    ours = "; ".join(
        f"{name} {' → '.join(f'{x:.3f}' for x in np.mean(rows, axis=0))}"
        for name, rows in found.items()
    )
    growth = {name: [row[-1] / row[0] - 1 for row in rows] for name, rows in found.items()}
    agrees = [
        sharp <= FLAT and sharp < soft
        for sharp, soft in zip(growth["LSSAR"], growth["softmax"], strict=True)
    ]
    lengths = [size.context * times for times in (1, 4, LONGER)]
    return Finding(f"at {', '.join(map(str, lengths))} characters: {ours}", agrees, found)


def at_lengths(mechanism: MechanismSource, size: Size) -> list[list[float]]:
    """For each seed the loss at 1, 4 and 16 times the length of training."""
    trial = language_trial(mechanism, size)

    def read(model: Any, times: int) -> float:
        rows = {"batch": LONGER // times, "limit": 16}  # so that all lengths read the same text
        return validation_loss(model, size.corpus, size.context * times, **rows)

    trained = (trial.train(seed) for seed in size.seeds)
    return [[read(model, times) for times in (1, 4, LONGER)] for model in trained]


def moh_heads(size: Size) -> Finding:
    """Validation loss of all heads, and of a part of them that a router chooses."""

    def mixture(active: int) -> MechanismSource:
        options: dict[str, Any] = {"num_shared": SHARED, "num_active": active - SHARED}
        return lambda rngs: RotaryMoH(size.width, size.heads, **options, rngs=rngs)

    base = losses("rope", size)
    found = {active: losses(mixture(active), size) for active in SHARES}
    best = min(SHARES, key=lambda active: float(np.mean(found[active])))
    ours = f"all heads {spread(base)}; " + "; ".join(
        f"{100 * active / size.heads:g} % {spread(values)}" for active, values in found.items()
    )
    agrees = [mixed < whole for mixed, whole in zip(found[best], base, strict=True)]
    return Finding(ours, agrees, {"all": base} | {str(k): v for k, v in found.items()})
