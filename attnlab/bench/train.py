"""Training cost: attnlab's language model against the same model in plain Flax.

Four layers, width 128, context 256, on the standard library's source, character by character.
Both models start from the same numbers, see the same batches and take the same optax steps in the
same loop, in alternating chunks; their losses must stay together, else no time is reported.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from attnlab.bench.harness import MismatchError, Result, Row, check_same, finish, time_in_turn
from attnlab.models import CausalLM
from attnlab.tasks.text import load_corpus

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 4, 128, 4, 256, 8
STEPS, CHUNK = 200, 10
TARGET = 1.1
FIRST, ALONG = 1e-4, 2e-2  # relative tolerance of losses: first chunk, and ever after


class PlainBlock(nnx.Module):
    """A pre-norm transformer block from Flax's own parts."""

    def __init__(self, features: int, heads: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(features, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, features, use_bias=False, decode=False, rngs=rngs
        )
        self.mlp_norm = nnx.RMSNorm(features, rngs=rngs)
        self.expand = nnx.Linear(features, 4 * features, use_bias=False, rngs=rngs)
        self.contract = nnx.Linear(4 * features, features, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """The same shape as `x`."""
        x = x + self.attention(self.attention_norm(x), is_causal=True)
        return x + self.contract(jax.nn.gelu(self.expand(self.mlp_norm(x))))


class PlainLM(nnx.Module):
    """The language model as one would write it in Flax alone."""

    def __init__(self, vocab_size: int, layers: int, features: int, heads: int, rngs: nnx.Rngs):
        self.features = features
        self.embedding = nnx.Embed(vocab_size, features, rngs=rngs)
        self.blocks = nnx.List(PlainBlock(features, heads, rngs) for _ in range(layers))
        self.norm = nnx.RMSNorm(features, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """The logits of the next token after each token."""
        x = self.embedding(tokens) * math.sqrt(self.features)
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(self.norm(x))


def copy_parameters(source: CausalLM, target: PlainLM) -> None:
    """Give the plain model the numbers of attnlab's."""

    def put(to: Any, value: Any) -> None:
        to[...] = jnp.copy(value[...].reshape(to.shape))

    put(target.embedding.embedding, source.embedding.embedding)
    put(target.norm.scale, source.norm.scale)
    for ours, plain in zip(source.blocks, target.blocks, strict=True):
        for name in ("attention_norm", "mlp_norm"):
            put(getattr(plain, name).scale, getattr(ours, name).scale)
        for name in ("query", "key", "value", "out"):
            put(getattr(plain.attention, name).kernel, getattr(ours.attention, name).kernel)
        for name in ("expand", "contract"):
            put(getattr(plain, name).kernel, getattr(ours.mlp, name).kernel)


def count_parameters(model: nnx.Module) -> int:
    """How many numbers the model learns."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


class Trainer:
    """One model's training: `advance()` runs the next chunk of steps and returns its losses."""

    def __init__(self, model: nnx.Module, batches: Int[Array, "steps B L"], chunk: int):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        optimizer = optax.adamw(1e-3)

        @jax.jit
        def step(params: Any, state: Any, batch: Array) -> tuple[Any, Any, Array]:
            def loss(params: Any) -> Array:
                logits = nnx.merge(graph, params, rest)(batch[:, :-1])
                each = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
                return jnp.mean(each)

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        self._step, self._params, self._state = step, params, optimizer.init(params)
        self._batches, self._chunk, self._next = batches, chunk, 0
        self.losses: list[float] = []
        jax.block_until_ready(step(params, self._state, batches[0]))  # compile; nothing is kept

    def advance(self) -> Float[Array, " chunk"]:
        """The losses of the next `chunk` steps."""
        values = []
        for batch in self._batches[self._next : self._next + self._chunk]:
            self._params, self._state, value = self._step(self._params, self._state, batch)
            values.append(value)
        self._next += self._chunk
        losses = jax.block_until_ready(jnp.stack(values))
        self.losses += [float(x) for x in losses]
        return losses


def make(sizes: dict[str, int], steps: int, chunk: int) -> dict[str, Trainer]:
    """Both models at the same starting point, with the same batches before them."""
    corpus = load_corpus("stdlib")
    tokens = np.asarray(corpus.train)
    vocab = int(tokens.max()) + 1
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(tokens) - sizes["context"] - 1, (steps, sizes["batch"]))
    batches = jnp.asarray(tokens[starts[..., None] + np.arange(sizes["context"] + 1)], jnp.int32)
    layers, width, heads = sizes["layers"], sizes["width"], sizes["heads"]
    ours = CausalLM(vocab, layers, width, heads, tie_embeddings=True, rngs=nnx.Rngs(0))
    plain = PlainLM(vocab, layers, width, heads, nnx.Rngs(0))
    if count_parameters(ours) != count_parameters(plain):
        raise MismatchError(
            f"attnlab's model has {count_parameters(ours):,} parameters, the plain one "
            f"{count_parameters(plain):,}."
        )
    copy_parameters(ours, plain)
    return {name: Trainer(m, batches, chunk) for name, m in (("attnlab", ours), ("flax", plain))}


def check_losses(trainers: dict[str, Trainer], chunk: int) -> None:
    """The first losses agree closely, later ones roughly (rounding grows); else MismatchError."""
    ours, plain = (np.asarray(trainers[name].losses) for name in ("attnlab", "flax"))
    check_same({"attnlab": ours[:2]}, plain[:2], FIRST)
    means = (x.reshape(-1, chunk).mean(axis=1) for x in (ours, plain))
    check_same({"attnlab": next(means)}, next(means), ALONG)


def run(save: Any = None, quick: bool = False) -> Result:
    """Table of the time of the training steps of both models."""
    sizes = {
        "layers": LAYERS, "width": WIDTH, "heads": HEADS, "context": CONTEXT, "batch": BATCH,
    }  # fmt: skip
    steps, chunk = STEPS, CHUNK
    if quick:
        sizes |= {"layers": 1, "width": 32, "heads": 2, "context": 64, "batch": 2}
        steps, chunk = 8, 2
    trainers = make(sizes, steps, chunk)
    advance: dict[str, Callable] = {name: t.advance for name, t in trainers.items()}
    rounds = steps // chunk - 1  # the first chunk warms up
    timing = time_in_turn(advance, rounds=(rounds, rounds))
    cells = {
        "model": "{layers} layers of {width}, {batch} × {context} tokens".format(**sizes),
        "steps": steps,
    }
    target = "" if quick else f"≤ {TARGET}"
    try:
        check_losses(trainers, chunk)
        ratio = timing.ratio("attnlab", "flax")
        for name in ("attnlab", "flax"):
            cells[f"{name} ms/step"] = f"{1e3 * timing.median(name) / chunk:.4g}"
        last = {name: np.mean(t.losses[-chunk:]) for name, t in trainers.items()}
        cells |= {
            "attnlab ÷ flax": str(ratio),
            "last losses": f"{last['attnlab']:.4f} {last['flax']:.4f}",
        }
        passed = None if quick else ratio.median <= TARGET
    except MismatchError as mismatch:
        cells["attnlab ms/step"] = f"not timed: {mismatch}"
        passed = False
    losses = {name: t.losses for name, t in trainers.items()}
    row = Row(cells, target, passed, {"seconds": timing.seconds, "losses": losses})
    title = "Training: attnlab's causal language model and the same model in plain Flax"
    return finish(Result("train", title, (row,)), save)
