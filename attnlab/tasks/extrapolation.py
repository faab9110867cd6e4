"""Trained short, read long: what each encoding of position makes of lengths never seen.

A small model learns the passkey task at one length, and is then asked at lengths far beyond, with
nothing changed.  With `noise` in the text a digit is part of the key by its place alone, so that a
model needs both a head that looks right behind itself (which word stood before this one?) and a
head that looks anywhere (where did KEY stand?): one narrow prior and one wide one.

Bianchessi et al. 2025, arXiv:2505.22842, claim for language models with hundreds of millions of
parameters that a learned generalised Gaussian prior (BAM) keeps retrieving far beyond the length of
training, where RoPE and ALiBi fall to chance; this is their claim at a size for two CPU cores, on
the task itself instead of on the web's text.

Axes: B rows, L tokens.
"""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from attnlab.core.modules import Mechanism
from attnlab.core.scores import alibi_slopes
from attnlab.models.language_model import CausalLM, build_mechanism
from attnlab.positional.alibi import ALiBi, alibi_attention
from attnlab.positional.bam import BAM, BAMSSMax
from attnlab.tasks.passkey import Passkey
from attnlab.training.config import ModelConfig, TrainConfig
from attnlab.training.loop import Progress, fit
from attnlab.training.optimizer import is_positional, names

MECHANISMS = ("bam", "bam-ssmax", "alibi", "rope", "nope")


@dataclass(frozen=True)
class Extrapolation:
    """One experiment; equal settings give equal curves.

    Models of `num_layers` layers train for `steps` steps on rows of `train_length` tokens, and are
    read on `eval_rows` rows of each of `lengths`.  `positional_rate` multiplies the learning rate
    of the mechanisms' own parameters, which have few steps to get anywhere.  A slope matters by its
    product with the length: `slope_scale` multiplies those that ALiBi keeps and BAM starts from, so
    that 64 tokens here are to them what 1,024 were in the paper.
    """

    task: Passkey = field(default_factory=lambda: Passkey(digits=1, noise=0.3))
    train_length: int = 64
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    steps: int = 500
    batch_size: int = 32
    num_layers: int = 2
    features: int = 64
    num_heads: int = 4
    mlp_ratio: float = 1.0
    learning_rate: float = 2e-3
    positional_rate: float = 10.0
    slope_scale: float = 16.0
    eval_rows: int = 32
    seed: int = 0

    @property
    def chance_key(self) -> float:
        """How often a guess gets a whole key right."""
        return self.task.base**-self.task.digits

    @property
    def chance_digit(self) -> float:
        """How often a guess gets a digit right."""
        return 1 / self.task.base

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Curve:
    """What became of one mechanism.

    `keys[i]` and `digits[i]` are the shares told right at `lengths[i]`; `losses` are those of the
    training steps; `parameters` the mechanism's own, each (layers, ...); `seconds` what it took.
    """

    mechanism: str
    lengths: tuple[int, ...]
    keys: np.ndarray
    digits: np.ndarray
    losses: np.ndarray
    parameters: dict[str, np.ndarray]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The curve as plain values."""
        values = dataclasses.asdict(self)
        values["parameters"] = {name: x.tolist() for name, x in self.parameters.items()}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Curve":
        """The curve from `to_json`'s values."""
        arrays = {name: np.asarray(values[name]) for name in ("keys", "digits", "losses")}
        parameters = {name: np.asarray(x) for name, x in values["parameters"].items()}
        fixed = {"lengths": tuple(values["lengths"]), "parameters": parameters}
        return cls(**{**values, **arrays, **fixed})


def compare(
    mechanisms: Sequence[str] = MECHANISMS,
    settings: Extrapolation | None = None,
    *,
    cache: str | os.PathLike | None = None,
    report: Callable[[str, Progress], None] | None = None,
) -> dict[str, Curve]:
    """Trains and reads each mechanism, in the order given.

    With `cache`, a folder, curves of the same settings are taken from there, and new ones put
    there; a file that holds something else is an error.  `report(id, progress)` is told how
    training goes.  Raises ValueError for an unknown id, for a mechanism that is not causal, and
    for a cache file that does not fit its settings.
    """
    settings = Extrapolation() if settings is None else settings
    curves = {}
    for mechanism in mechanisms:
        file = None if cache is None else Path(cache) / _file_name(mechanism, settings)
        if file is not None and file.is_file():
            curves[mechanism] = _read(file, mechanism, settings)
            continue
        tell = None if report is None else partial(report, mechanism)
        curves[mechanism] = run(mechanism, settings, report=tell)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {"settings": settings.to_json(), "curve": curves[mechanism].to_json()}
            file.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return curves


def run(
    mechanism: str,
    settings: Extrapolation,
    *,
    report: Callable[[Progress], None] | None = None,
) -> Curve:
    """Trains one mechanism and reads it at every length."""
    began = time.perf_counter()
    model, losses = train(mechanism, settings, report=report)
    shares = np.array([read(model, settings, length) for length in settings.lengths])
    return Curve(
        mechanism,
        settings.lengths,
        shares[:, 0],
        shares[:, 1],
        np.asarray(losses),
        positional_parameters(model),
        time.perf_counter() - began,
    )


def train(
    mechanism: str,
    settings: Extrapolation,
    *,
    report: Callable[[Progress], None] | None = None,
) -> tuple[CausalLM, list[float]]:
    """A model trained at `train_length`, and the loss of each step."""
    task = settings.task
    model = ModelConfig(
        attention=mechanism,
        num_layers=settings.num_layers,
        features=settings.features,
        num_heads=settings.num_heads,
        mlp_ratio=settings.mlp_ratio,
    ).build(task.vocab_size, settings.seed, mechanism=partial(_mechanism, mechanism, settings))
    config = TrainConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        context=settings.train_length,
        learning_rate=settings.learning_rate,
        warmup=settings.steps // 10,
        positional_rate=settings.positional_rate,
        seed=settings.seed,
    )
    history = fit(
        model,
        lambda model, rows, key: task.loss(model(rows), rows),
        lambda data, key: task.rows(key, settings.batch_size, settings.train_length),
        None,
        config,
        report=(lambda progress: None) if report is None else report,
    )
    return model, history.losses


class _SteepALiBi(ALiBi):
    """ALiBi whose slopes are multiplied by a number."""

    def __init__(self, num_heads: int, factor: float):
        self.num_heads, self.factor = num_heads, factor

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Any:
        slopes = self.factor * alibi_slopes(self.num_heads)
        return alibi_attention(query, key, value, slopes=slopes, **options)


def _mechanism(id: str, settings: Extrapolation, rngs: nnx.Rngs) -> Mechanism:
    """The mechanism, started so as to suit the length of training."""
    if id == "alibi":
        return _SteepALiBi(settings.num_heads, settings.slope_scale)
    width = settings.features // settings.num_heads
    mechanism = build_mechanism(id, settings.num_heads, width, rngs=rngs)
    if isinstance(mechanism, BAM):
        mechanism.scale[...] += math.log(settings.slope_scale)
    if isinstance(mechanism, BAMSSMax):  # ordinary softmax at the training length
        mechanism.length_scale[...] /= math.log(settings.train_length)
    return mechanism


def read(model: CausalLM, settings: Extrapolation, length: int) -> tuple[float, float]:
    """The shares of keys and of digits told right at one length."""
    key = jax.random.fold_in(jax.random.key(settings.seed + 1), length)
    graph, state = nnx.split(model)
    shares = _read_rows(
        graph,
        state,
        jax.random.split(key, settings.eval_rows),
        task=settings.task,
        length=length,
    )
    return float(shares[0]), float(shares[1])


@partial(jax.jit, static_argnames=("graph", "task", "length"))
def _read_rows(
    graph: nnx.GraphDef, state: Any, keys: Key[Array, " B"], *, task: Passkey, length: int
) -> Float[Array, " 2"]:
    def one(key):
        row = task.rows(key, 1, length)
        return jnp.stack(task.accuracy(nnx.merge(graph, state)(row), row))

    return jax.lax.map(one, keys).mean(axis=0)


def positional_parameters(model: CausalLM) -> dict[str, np.ndarray]:
    """The mechanisms' own parameters by name, stacked over layers."""
    found: dict[str, list[np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param)):
        if is_positional(path):
            name = [part for part in names(path) if part != "value"][-1]
            found.setdefault(name, []).append(np.asarray(leaf))
    return {name: np.stack(leaves) for name, leaves in found.items()}


def _file_name(mechanism: str, settings: Extrapolation) -> str:
    text = json.dumps(settings.to_json(), sort_keys=True)
    return f"{mechanism}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def _read(file: Path, mechanism: str, settings: Extrapolation) -> Curve:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["settings"] != settings.to_json():
            raise ValueError("other settings")
        curve = Curve.from_json(content["curve"])
        if curve.mechanism != mechanism:
            raise ValueError(f"the mechanism {curve.mechanism!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cache: {file} does not fit ({error}); delete it.") from error
    return curve
