"""The league table: every causal mechanism of the atlas trained under one budget.

    attnlab bench quality --save FOLDER                    goes on where it was cut off
    attnlab bench quality --save FOLDER --fresh --only bam,rope       measures these two again

The same small language model with another mechanism each time: two layers of width 64, 4 heads, 300
steps of 8 rows of 128 characters of Tiny Shakespeare, three seeds.  A seed decides the parameters
and the batches, which are the same for all.  The MLP is made wider or narrower until the model has
as many parameters as the reference's, within 2 %; an entry that no width brings there has failed.

Time is that of one step, taken in turn with the reference's; memory is what the compiler counts as
temporaries of the step.  Mechanisms are as their atlas entries build them, with one learning rate
and few steps, which suits some better than others: those marked "no positions" are told the order
by the mask alone, where their papers may have added an encoding.  All entries take about half an
hour on two quiet cores.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnlab import atlas
from attnlab.bench.harness import MismatchError, Result, Row, Timing, time_in_turn
from attnlab.bench.kept import Measure, measure_missing
from attnlab.bench.memory import counted
from attnlab.bench.train import count_parameters
from attnlab.bench.trials import (
    TOLERANCE,
    Trial,
    characters,
    matching_width,
    text,
    validation_loss,
)
from attnlab.core.modules import Mechanism
from attnlab.models import CausalLM
from attnlab.models.language_model import CAUSAL_SELF
from attnlab.training import TrainConfig

REFERENCE = "rope"
ROUNDS = (5, 25)  # of one step each
SOME = ("rope", "multi-head-attention", "sigmoid-attention", "moh", "gla", "linformer")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every mechanism is given."""

    corpus: str = "shakespeare"
    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 128
    batch: int = 8
    steps: int = 300
    learning_rate: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float = 2.0  # of timing
    unseen: int = 64  # batches of the validation loss, at most

    @property
    def training(self) -> TrainConfig:
        """The schedule; each seed has the same."""
        return TrainConfig(
            steps=self.steps, batch_size=self.batch, context=self.context,
            learning_rate=self.learning_rate, warmup=self.steps // 10,
        )  # fmt: skip


FULL = Budget()
QUICK = Budget("stdlib", 1, 32, 4, 32, 4, 6, 3e-3, (0,), 0.1, 1)


class LayerAttention(nnx.Module):
    """A layer of the atlas, with projections of its own, in the place of a block's attention."""

    def __init__(self, layer: nnx.Module):
        self.layer, self.mechanism = layer, Mechanism()

    def __call__(self, x: Float[Array, "*B T F"], *, mask: Any, **options: Any) -> Array:
        return self.layer(x, mask=mask)


def model(id: str, budget: Budget, hidden: int, seed: int = 0) -> CausalLM:
    """The language model with an MLP of width `hidden`."""
    entry, heads = atlas.get(id), (budget.heads, budget.width // budget.heads)
    made = CausalLM(
        text(budget.corpus).vocabulary.size, budget.layers, budget.width, budget.heads,
        mechanism=id if entry.kind == "mechanism" else REFERENCE,
        mlp_ratio=(hidden + 0.5) / budget.width, rngs=nnx.Rngs(seed),
    )  # fmt: skip
    if entry.kind == "layer":
        rngs = nnx.Rngs(1000 + seed)
        for block in made.blocks:
            attention: Any = LayerAttention(entry.build(*heads, rngs=rngs))
            block.attention = attention
    return made


def target(budget: Budget) -> int:
    """Parameters of the reference, whose MLP is four times as wide as the model."""
    return count_parameters(model(REFERENCE, budget, 4 * budget.width))


class Subject:
    """One mechanism's model, of the reference's size, ready to be timed and trained."""

    def __init__(self, id: str, budget: Budget):
        self.id, self.budget, wanted = id, budget, target(budget)
        self.hidden = matching_width(partial(model, id, budget), wanted)
        lesson = characters(budget.corpus, budget.batch, budget.context)
        build = partial(model, id, budget, self.hidden)
        self.trial = Trial(build, lesson, budget.training)
        self.graph, *self.arguments = self.trial.start(budget.seeds[0])
        self.program = self.trial.compiled(self.graph, *self.arguments)
        self.parameters = count_parameters(build(budget.seeds[0]))
        if abs(self.parameters - wanted) > TOLERANCE * wanted:
            raise MismatchError(f"{self.parameters:,} parameters, not {wanted:,}.")

    def step(self) -> Float[Array, ""]:
        """The loss of the first step, whose state is not kept: what is timed."""
        return self.program(*self.arguments, self.trial.lesson.data)[1]

    def losses(self) -> list[float]:
        """The validation loss of each seed."""
        budget, size = self.budget, {"batch": self.budget.batch, "limit": self.budget.unseen}
        return [
            validation_loss(self.trial.train(seed), budget.corpus, budget.context, **size)
            for seed in budget.seeds
        ]


@functools.cache
def reference(budget: Budget) -> Subject:
    """The reference, ready to be timed beside others."""
    return Subject(REFERENCE, budget)


def time_step(subject: Subject, budget: Budget) -> Timing:
    """Seconds of single steps, in turn with the reference's."""
    steps: dict[str, Callable] = {subject.id: subject.step, REFERENCE: reference(budget).step}
    return time_in_turn(steps, seconds=budget.seconds, rounds=ROUNDS, warmup=2)


def measure(id: str, budget: Budget) -> Row:
    """The line of one entry; where it cannot be trained, with the reason."""
    entry = atlas.get(id)
    cells: dict[str, Any] = {"mechanism": entry.title, "family": entry.family}
    if CAUSAL_SELF not in entry.patterns:
        return _refused(id, cells, f"not causal: {', '.join(entry.patterns)}")
    try:
        subject = Subject(id, budget)
        timing = time_step(subject, budget)
        losses = subject.losses()
    except MismatchError as mismatch:
        return dataclasses.replace(_refused(id, cells, str(mismatch)), passed=False)
    except (ValueError, TypeError, NotImplementedError, FloatingPointError) as error:
        return _refused(id, cells, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    ratio, memory = timing.ratio(id, REFERENCE), counted(subject.program)
    mean, spread = float(np.mean(losses)), f"{min(losses):.3f}–{max(losses):.3f}"
    cells |= {
        "loss": f"{mean:.3f} ({spread})",
        "ms/step": f"{1e3 * timing.median(id):.3g}",
        f"time ÷ {REFERENCE}": str(ratio),
        "MB": f"{memory / 1e6:.1f}",
        "parameters": f"{subject.parameters:,}",
        "MLP": subject.hidden,
    }
    if "position-free" in entry.properties:
        cells["note"] = "no positions"
    detail = {
        "losses": losses, "seconds": timing.seconds[id], "ratio": dataclasses.asdict(ratio),
        "bytes": memory, "parameters": subject.parameters, "hidden": subject.hidden,
    }  # fmt: skip
    return Row(cells, detail=detail)


def _refused(id: str, cells: dict[str, Any], reason: str) -> Row:
    return Row({**cells, "note": reason[:200]}, detail={"reason": reason})


def arrange(rows: list[Row], budget: Budget) -> Result:
    """The league: the lowest loss first, and last what could not be trained."""

    def rank(row: Row) -> float:
        return float(np.mean(row.detail["losses"])) if "losses" in row.detail else np.inf

    title = (
        f"Validation loss of mechanisms under one budget: {budget.steps} steps of {budget.batch} × "
        f"{budget.context} characters of {budget.corpus}, {budget.layers} layers of {budget.width}"
    )
    notes = (
        f"Loss in nats per character, mean of {len(budget.seeds)} seeds (least–most); memory is "
        "that of a training step's temporaries, as its compiler counts.",
        f"All models have the parameters of {REFERENCE}'s within {100 * TOLERANCE:g} %, by the "
        "width of the MLP; one learning rate, few steps: close figures are no ranking.",
    )
    return Result("quality", title, tuple(sorted(rows, key=rank)), notes)


def mechanisms() -> list[str]:
    """All entries of the atlas by id, the reference first."""
    return sorted(atlas.entries(), key=lambda id: (id != REFERENCE, id))


def run(
    save: Any = None, quick: bool = False, fresh: bool = False, only: tuple[str, ...] | None = None
) -> Result:
    """The league table; rows that the record in `save` has are kept unless `fresh`."""
    budget = QUICK if quick else FULL
    text(budget.corpus)  # what is wrong with it is no entry's fault
    names = [id for id in mechanisms() if not quick or id in SOME or id in (only or ())]
    settings = {"reference": REFERENCE, **dataclasses.asdict(budget)}
    measures = {id: Measure(partial(measure, id, budget), settings) for id in names}
    show = partial(arrange, budget=budget)
    return measure_missing("quality", measures, show, save=save, fresh=fresh, only=only)
