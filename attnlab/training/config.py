"""What a run is: model, data and training, as plain values that go to JSON and back."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from attnlab.models.language_model import CausalLM, MechanismSource
from attnlab.tasks.text import Vocabulary

FORMAT = "attnlab language model run, version 1"


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of `CausalLM`, with an atlas id for its mechanism."""

    attention: str = "bam"
    num_layers: int = 4
    features: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    mlp_ratio: float = 4.0
    gated: bool = False
    dropout_rate: float = 0.0
    tie_embeddings: bool = False
    feed_forward_chunk: int | None = None

    def build(
        self,
        vocab_size: int,
        seed: int,
        *,
        mechanism: MechanismSource | None = None,
        implementation: str = "auto",
    ) -> CausalLM:
        """The model with parameters drawn from `seed`; `mechanism` overrides the atlas id."""
        sizes = {k: v for k, v in dataclasses.asdict(self).items() if k != "attention"}
        return CausalLM(
            vocab_size,
            mechanism=self.attention if mechanism is None else mechanism,
            implementation=implementation,
            rngs=nnx.Rngs(seed),
            **sizes,
        )


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, linear warm-up to `learning_rate`, cosine decay to a tenth of it.

    `seed` decides parameters, batches and dropout.  `positional_rate` multiplies the learning rate
    of the mechanisms' own parameters (slopes, priors, tables), which often like a larger one.
    Raises ValueError for numbers that make no schedule.
    """

    steps: int = 2000
    batch_size: int = 12
    context: int = 256
    learning_rate: float = 1e-3
    warmup: int = 100
    final_rate: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    positional_rate: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}.")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup: expected 0 .. steps - 1, got {self.warmup} of {self.steps}.")


@dataclass(frozen=True)
class DataConfig:
    """Which text, and its vocabulary, so that a checkpoint can be read without the text."""

    source: str
    characters: str

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary the run was trained with."""
        return Vocabulary(self.characters)


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, values: Any) -> "RunConfig":
        """The run from `to_json`'s dictionary; raises ValueError saying what is wrong with it."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else None
            raise ValueError(f"expected format {FORMAT!r}, got {found!r}")
        parts = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig}
        try:
            return cls(**{name: part(**values[name]) for name, part in parts.items()})
        except (KeyError, TypeError) as error:
            raise ValueError(f"incomplete or unknown settings ({error})") from error

    def differences(self, other: "RunConfig") -> list[str]:
        """What differs, one line each: "model.features: 64 here, 128 there"."""
        lines = []
        for part in ("data", "model", "train"):
            mine, theirs = (dataclasses.asdict(getattr(run, part)) for run in (self, other))
            lines += [
                f"{part}.{name}: {mine[name]!r} here, {theirs[name]!r} there"
                for name in mine
                if mine[name] != theirs[name]
            ]
        return lines
