"""Training a language model on a corpus, and taking a trained one from its folder."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from attnlab.models.language_model import CausalLM
from attnlab.tasks.text import Corpus, sample_batch, windows
from attnlab.training.checkpoint import CheckpointError, RunFolder
from attnlab.training.config import RunConfig
from attnlab.training.loop import History, Progress, TrainState, fit
from attnlab.training.optimizer import make_optimizer

VALIDATION_BATCHES = 16


def next_token_loss(
    model: CausalLM, tokens: Int[Array, "B L"], dropout_key: Any = None
) -> Float[Array, ""]:
    """The mean cross-entropy, in nats per token, of predicting tokens[1:] from those before."""
    logits = model(tokens[:, :-1], dropout_key=dropout_key).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train_language_model(
    corpus: Corpus,
    config: RunConfig,
    *,
    folder: RunFolder | None = None,
    save_every: int | None = None,
    resume: bool = False,
    step: int | None = None,
    evaluate_every: int | None = 250,
    implementation: str = "auto",
    report: Callable[[Progress], None] = lambda progress: None,
) -> tuple[CausalLM, History]:
    """Trains a model on a corpus; with `folder`, saves it and, on `resume`, goes on from there.

    `resume` starts from the newest checkpoint, or from that of `step`; a folder without any starts
    at step 0.  Raises ValueError where the corpus is not the one in `config`, and CheckpointError
    where the folder's run is another one or its checkpoint cannot be read.
    """
    if corpus.vocabulary != config.data.vocabulary:
        raise ValueError(
            f"corpus: the text of {corpus.name!r} has another vocabulary than the run's data"
            f" ({corpus.vocabulary.size} and {config.data.vocabulary.size} characters)."
        )
    train = config.train
    model = config.model.build(corpus.vocabulary.size, train.seed, implementation=implementation)
    restore = None
    if folder is not None and (differences := config.differences(folder.config)):
        raise CheckpointError(f"{folder.path} holds another run: {'; '.join(differences)}.")
    if resume:
        if folder is None:
            raise ValueError("resume: needs the folder of a run.")
        if folder.steps() or step is not None:
            restore = partial(folder.restore, step=step)
    draw = partial(sample_batch, batch_size=train.batch_size, context=train.context)
    history = fit(
        model,
        next_token_loss,
        draw,
        jnp.asarray(corpus.train),
        train,
        evaluate=_evaluator(corpus, config),
        evaluate_every=evaluate_every,
        save=None if folder is None else folder.save,
        save_every=save_every,
        restore=restore,
        report=report,
    )
    return model, history


def load_run(
    path: str | os.PathLike, *, step: int | None = None, implementation: str = "auto"
) -> tuple[CausalLM, RunConfig, int]:
    """The model of a run's newest checkpoint (or of `step`), its configuration and its step.

    Raises CheckpointError where `path` is no run, has no checkpoint, or has a corrupt one.
    """
    folder = RunFolder.open(path)
    config = folder.config
    model = config.model.build(
        config.data.vocabulary.size, config.train.seed, implementation=implementation
    )
    params = nnx.state(model, nnx.Param)
    like = TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config.train).init(params))
    state, _ = folder.restore(like, step)
    nnx.update(model, state.params)
    return model, config, int(state.step)


def _evaluator(corpus: Corpus, config: RunConfig) -> Callable[[CausalLM], float] | None:
    """The validation loss on the same first windows each time; None for too short a text."""
    size, context = config.train.batch_size, config.train.context
    if len(corpus.validation) <= context:
        return None
    batches = windows(corpus.validation, batch_size=size, context=context, limit=VALIDATION_BATCHES)

    @partial(jax.jit, static_argnames="graph")
    def mean_loss(graph, state, batches):
        losses = jax.lax.map(lambda rows: next_token_loss(nnx.merge(graph, state), rows), batches)
        return losses.mean()

    def evaluate(model: CausalLM) -> float:
        return float(np.asarray(mean_loss(*nnx.split(model), jnp.asarray(batches))))

    return evaluate
