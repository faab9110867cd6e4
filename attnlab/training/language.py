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
from attnlab.training.mesh import MeshConfig, Placement
from attnlab.training.optimizer import make_optimizer

VALIDATION_BATCHES = 16


def next_token_loss(
    model: CausalLM,
    tokens: Int[Array, "B L"],
    dropout_key: Any = None,
    *,
    place: Callable[[Array], Array] = lambda tokens: tokens,
) -> Float[Array, ""]:
    """The mean cross-entropy, in nats per token, of predicting tokens[1:] from those before.

    `place` says where on a mesh inputs and targets lie.
    """
    inputs, targets = place(tokens[:, :-1]), place(tokens[:, 1:])
    logits = model(inputs, dropout_key=dropout_key).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


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
    mesh: MeshConfig | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> tuple[CausalLM, History]:
    """Trains a model on a corpus; with `folder`, saves it and, on `resume`, goes on from there.

    `resume` starts from the newest checkpoint, or from that of `step`; a folder without any starts
    at step 0.  `mesh` spreads the run over devices, of this process or of several
    (`attnlab.distributed.processes`), each of which makes the same call; a run may go on over
    another mesh than the one it began on, or over none.

    Raises ValueError where the corpus is not the one in `config` or the mesh cannot cut the run's
    batches, and CheckpointError where the folder's run is another one or its checkpoint cannot be
    read.
    """
    if corpus.vocabulary != config.data.vocabulary:
        raise ValueError(
            f"corpus: the text of {corpus.name!r} has another vocabulary than the run's data"
            f" ({corpus.vocabulary.size} and {config.data.vocabulary.size} characters)."
        )
    train, placement = config.train, None
    if mesh is None and jax.process_count() > 1:
        raise ValueError(f"mesh: needed by a run of {jax.process_count()} processes, got None.")
    if mesh is not None:
        mesh.check(config)
        placement = mesh.place()
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
        next_token_loss if placement is None else partial(next_token_loss, place=placement.tokens),
        draw,
        jnp.asarray(corpus.train),
        train,
        evaluate=_evaluator(corpus, config, placement),
        evaluate_every=evaluate_every,
        save=None if folder is None else folder.save,
        save_every=save_every,
        restore=restore,
        report=report,
        placement=placement,
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


def _evaluator(
    corpus: Corpus, config: RunConfig, placement: Placement | None
) -> Callable[[CausalLM], float] | None:
    """The validation loss on the same first windows each time; None for too short a text."""
    size, context = config.train.batch_size, config.train.context
    if len(corpus.validation) <= context:
        return None
    batches = windows(corpus.validation, batch_size=size, context=context, limit=VALIDATION_BATCHES)
    loss = next_token_loss
    if placement is not None:
        loss = partial(next_token_loss, place=placement.tokens)

    @partial(jax.jit, static_argnames="graph")
    def mean_loss(graph, state, batches):
        losses = jax.lax.map(lambda rows: loss(nnx.merge(graph, state), rows), batches)
        return losses.mean()

    def evaluate(model: CausalLM) -> float:
        graph, state = nnx.split(model)
        if placement is None:
            return float(np.asarray(mean_loss(graph, state, jnp.asarray(batches))))
        with placement.attention(batches.shape[1]):
            found = mean_loss(graph, placement.put(state), placement.put(batches))
        return float(np.asarray(found))

    return evaluate
