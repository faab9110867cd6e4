"""The size of a trial of a claim, and what comes of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from attnlab.models import CausalLM
from attnlab.models.language_model import MechanismSource
from attnlab.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model and its training; a seed decides parameters and batches."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    mlp_ratio: float = 4.0
    context: int = 128
    batch: int = 8
    steps: int = 300
    warmup: int | None = None
    learning_rate: float = 3e-3
    dropout: float = 0.0
    tied: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    corpus: str = "shakespeare"

    def small(self) -> "Size":
        """What runs in seconds and says nothing."""
        few: dict[str, Any] = {
            "width": 4 * self.heads,
            "batch": 4,
            "steps": min(self.steps, 4),
            "seeds": (0,),
        }
        context = min(self.context, 24)
        return dataclasses.replace(
            self, **few, layers=min(self.layers, 2), context=context, warmup=None, corpus="stdlib"
        )

    @property
    def training(self) -> TrainConfig:
        """The schedule."""
        warmup = self.steps // 10 if self.warmup is None else self.warmup
        return TrainConfig(
            steps=self.steps, batch_size=self.batch, context=self.context, warmup=warmup,
            learning_rate=self.learning_rate,
        )  # fmt: skip

    def model(self, mechanism: MechanismSource, vocab_size: int, seed: int) -> CausalLM:
        """A language model of this size."""
        return CausalLM(
            vocab_size, self.layers, self.width, self.heads, mechanism=mechanism,
            mlp_ratio=self.mlp_ratio, dropout_rate=self.dropout, tie_embeddings=self.tied,
            rngs=nnx.Rngs(seed),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of a claim: in words, whether each seed agrees, and plain numbers."""

    ours: str
    agrees: Sequence[bool]
    numbers: Mapping[str, Any]


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """The mean of the seeds' values and, of several, their range."""
    mean = format(float(np.mean(values)), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"
