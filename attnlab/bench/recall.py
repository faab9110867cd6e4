"""Recall against the size of the state: every causal linear mechanism on associative recall.

The same small model with another mechanism each time learns multi-query associative recall
(`attnlab.tasks.AssociativeRecall`).  The number of heads sets the size of the state and nothing
else: F features in N heads make F² / N numbers a layer.  Softmax attention, which keeps all keys
and values, is the ceiling; all have the same short convolution before them, the same learning rate
and as many steps, which suits some better than others: a low figure may be slow learning.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import atlas
from attnlab.bench.harness import Result, Row, finish
from attnlab.models import CausalLM
from attnlab.tasks import AssociativeRecall
from attnlab.training import TrainConfig
from attnlab.training.loop import fit

TASK, LENGTH = AssociativeRecall(vocab_size=64, num_kv_pairs=8), 40
FEATURES, LAYERS, CONV = 32, 2, 4
HEADS = (8, 2, 1)  # states of 128, 512 and 1,024 numbers a layer
CEILING = "rope"
TRAIN = TrainConfig(steps=1500, batch_size=32, context=LENGTH, learning_rate=4e-3, warmup=100)
SEEDS = (0,)
QUICK = 150  # steps
ROWS = 512  # unseen, for the score


def mechanisms() -> list[str]:
    """Causal entries of the linear family that decode from a state, by id."""
    return [
        entry.id
        for entry in atlas.entries().values()
        if entry.family == "linear" and {"state"} <= entry.properties
        and "causal self" in entry.patterns
    ]  # fmt: skip


def model(mechanism: str, num_heads: int, seed: int) -> CausalLM:
    """Two layers with a short convolution before each mechanism, and no MLP to speak of."""
    return CausalLM(
        TASK.vocab_size, LAYERS, FEATURES, num_heads, mechanism=mechanism, mlp_ratio=1.0,
        conv_width=CONV, rngs=nnx.Rngs(seed),
    )  # fmt: skip


def state_size(mechanism: str, num_heads: int) -> int:
    """Numbers that a layer's state holds, of one sequence; of softmax attention, a whole row's."""
    cache = model(mechanism, num_heads, 0).init_cache((), LENGTH)[0]
    memory = getattr(cache, "memory", cache)
    return sum(x.size for x in jax.tree.leaves(memory) if x.ndim)


def train(mechanism: str, num_heads: int, seed: int, steps: int) -> float:
    """The share of answers right on unseen rows after training."""
    made = model(mechanism, num_heads, seed)

    def draw(_: Any, key: Any) -> Any:
        return TASK.rows(key, TRAIN.batch_size, LENGTH)

    def loss(model: CausalLM, batch: Any, dropout_key: Any) -> Any:
        return TASK.loss(model(batch.tokens), batch)

    warmup = min(TRAIN.warmup, steps - 1)
    config = dataclasses.replace(TRAIN, steps=steps, seed=seed, warmup=warmup)
    fit(made, loss, draw, jnp.zeros(()), config)
    unseen = TASK.rows(jax.random.key(1_000_003 + seed), ROWS, LENGTH)
    graph, params = nnx.split(made)
    score = jax.jit(lambda p: TASK.accuracy(nnx.merge(graph, p)(unseen.tokens), unseen)[1])
    return float(score(params))


def measure(mechanism: str, num_heads: int, seeds: tuple[int, ...], steps: int) -> Row:
    """One line: recall of one mechanism at one size of state."""
    found = [train(mechanism, num_heads, seed, steps) for seed in seeds]
    size = state_size(mechanism, num_heads)
    spread = "–".join(f"{100 * x:.0f}" for x in sorted({min(found), max(found)}))
    cells = {
        "mechanism": atlas.get(mechanism).title if mechanism != CEILING else "softmax (RoPE)",
        "heads": num_heads,
        "state": f"{size:,}",
        "recall %": f"{100 * float(np.mean(found)):.0f} ({spread})",
    }
    detail = {"id": mechanism, "state": size, "recall": found}
    return Row(cells, detail=detail)


def run(save: Any = None, quick: bool = False) -> Result:
    """Table of recall by mechanism and size of state, and the ceiling."""
    heads, seeds, steps = (HEADS[1:2], (0,), QUICK) if quick else (HEADS, SEEDS, TRAIN.steps)
    one = partial(measure, seeds=seeds, steps=steps)
    rows = [one(CEILING, heads[len(heads) // 2])]
    rows += [one(name, count) for name in mechanisms() for count in heads]
    title = (
        f"Associative recall, {TASK.num_kv_pairs} pairs in {LENGTH} tokens, against numbers in a "
        f"layer's state; {steps:,} steps"
    )
    notes = (f"A guess among a row's values is right {100 * TASK.chance:.0f} % of the time.",)
    return finish(Result("recall", title, tuple(rows), notes), save)
