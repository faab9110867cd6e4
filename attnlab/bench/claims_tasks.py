"""Claims on synthetic tasks: contextual positions, momentum, dual attention, stars."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnlab.bench.train import count_parameters
from attnlab.bench.trial_sizes import Finding, Size, spread
from attnlab.bench.trials import Lesson, Trial, answers, matching_width, score
from attnlab.core.masks import Causal, Mask
from attnlab.distributed.star_attention import StarMask, live_pairs
from attnlab.models import CausalLM
from attnlab.models.language_model import MechanismSource
from attnlab.positional.cope import CoPE
from attnlab.positional.momentum_attention import MomentumAttention, momentum_for_depth
from attnlab.tasks import (
    AssociativeRecall,
    Counting,
    FlipFlop,
    Passkey,
    SameDifferent,
    SelectiveCopying,
)

POSITIONS = 64  # of CoPE
GAMMAS, DEPTHS = (0.0, 0.5, 1.0, 2.0, 4.0), (1, 2, 4)
SOLVED = 0.9  # of the answers
KEPT = 0.95  # of full attention's accuracy, as Star Attention promises
Place = tuple[Any, int]  # a task, and the length of its rows
Stages = tuple[tuple[int, int, int], ...]  # of training: length, steps, batch


def task_trial(mechanism: MechanismSource, task: Any, size: Size) -> Trial:
    """A model that learns a task's answers in rows as long as the size's context."""
    build = partial(size.model, mechanism, task.vocab_size)
    return Trial(build, answers(task, size.batch, size.context), size.training)


def contextual(size: Size, task: Any, outside: Mapping[str, Place]) -> Finding:
    """Wrong answers of CoPE, RoPE and waves where they learned, and outside of it."""
    arms: dict[str, MechanismSource] = {
        "CoPE": lambda rngs: CoPE(size.width // size.heads, POSITIONS),
        "RoPE": "rope",
        "waves": "sinusoidal",
    }
    places = {"as trained": (task, size.context), **outside}
    wrong: dict[str, dict[str, list[float]]] = {place: {} for place in places}
    for name, mechanism in arms.items():
        trial = task_trial(mechanism, task, size)
        models = [trial.train(seed) for seed in size.seeds]
        for place, (other, length) in places.items():
            share = [score(model, other, length, rows=256)[1] for model in models]
            wrong[place][name] = [100 * (1 - x) for x in share]
    ours = "; ".join(
        f"{place}: " + ", ".join(f"{name} {spread(x, '.1f')} %" for name, x in found.items())
        for place, found in wrong.items()
    )
    agrees = [
        all(wrong[place]["CoPE"][n] < min(wrong[place]["RoPE"][n], wrong[place]["waves"][n])
            for place in outside)
        for n in range(len(size.seeds))
    ]  # fmt: skip
    return Finding(ours, agrees, {"wrong": wrong})


def cope_flip_flop(size: Size) -> Finding:
    """Learned where 80 % of the bits are to be ignored, asked where 98 % are, or 10 %."""
    outside = {f"ignoring {100 * p:g} %": (FlipFlop(p), size.context) for p in (0.98, 0.1)}
    return contextual(size, FlipFlop(0.8), outside)


def cope_copy(size: Size) -> Finding:
    """Learned with so many blanks, asked with half and with twice as many."""
    task = SelectiveCopying(num_tokens=8, alphabet=8)
    blanks = size.context - task.shortest
    outside = {
        "half the blanks": (task, task.shortest + blanks // 2),
        "twice the blanks": (task, task.shortest + 2 * blanks),
    }
    return contextual(size, task, outside)


def cope_counting(size: Size) -> Finding:
    """Three variables; asked where twice as many steps are dull, in rows twice as long."""
    task, duller = Counting(variables=3), Counting(variables=3, dull=100.0)
    return contextual(size, task, {"duller, twice as long": (duller, 2 * size.context)})


@functools.cache
def momentum_sweep(size: Size, layers: int) -> dict[float, list[tuple[float, float]]]:
    """Loss and share of answers of each seed on associative recall, by gamma."""
    task = AssociativeRecall(vocab_size=32, num_kv_pairs=4)
    found = {}
    for gamma in GAMMAS:
        deep = dataclasses.replace(size, layers=layers)
        trial = task_trial(lambda rngs, gamma=gamma: MomentumAttention(gamma), task, deep)
        trained = (trial.train(seed) for seed in size.seeds)
        found[gamma] = [score(model, task, size.context) for model in trained]
    return found


def momentum_induction(size: Size) -> Finding:
    """Associative recall by one layer, without momentum and with as much as helps most."""
    found = momentum_sweep(size, 1)
    share = {gamma: [right for _, right in rows] for gamma, rows in found.items()}
    best = max(GAMMAS[1:], key=lambda gamma: float(np.mean(share[gamma])))
    percent = {gamma: [100 * x for x in rows] for gamma, rows in share.items()}
    ours = (
        f"one layer answers {spread(percent[0.0], '.0f')} % with γ 0, "
        f"{spread(percent[best], '.0f')} % with γ {best:g}"
    )
    agrees = [a < SOLVED <= b for a, b in zip(share[0.0], share[best], strict=True)]
    return Finding(ours, agrees, {"right": {str(k): v for k, v in share.items()}})


def momentum_depth(size: Size) -> Finding:
    """The gamma of lowest loss at each depth, beside the paper's law."""
    loss = {
        layers: {
            gamma: [x for x, _ in rows] for gamma, rows in momentum_sweep(size, layers).items()
        }
        for layers in DEPTHS
    }

    def best(layers: int, seed: int) -> float:
        return min(GAMMAS, key=lambda gamma: loss[layers][gamma][seed])

    seeds = range(len(size.seeds))
    bests = {layers: [best(layers, seed) for seed in seeds] for layers in DEPTHS}
    ours = "best γ " + "; ".join(
        f"{'/'.join(f'{x:g}' for x in found)} at L = {layers}, by the law "
        f"{momentum_for_depth(layers):.2f}"
        for layers, found in bests.items()
    )
    agrees = [
        bests[DEPTHS[0]][seed] > bests[DEPTHS[-1]][seed]
        and all(bests[a][seed] >= bests[b][seed] for a, b in itertools.pairwise(DEPTHS))
        for seed in seeds
    ]
    plain = {str(layers): {str(g): x for g, x in rows.items()} for layers, rows in loss.items()}
    return Finding(ours, agrees, {"loss": plain, "best": {str(k): v for k, v in bests.items()}})


def dual_same_different(size: Size) -> Finding:
    """Same or different at equal parameters, for objects of training and for new ones."""
    task, new = SameDifferent(), SameDifferent(unseen=True)
    wanted = count_parameters(size.model("multi-head-attention", task.vocab_size, 0))
    right: dict[str, list[tuple[float, float]]] = {}
    for id in ("dual-attention-transformer", "multi-head-attention", "rope"):
        fitted = _fitted(size, id, task.vocab_size, wanted)
        trial = task_trial(id, task, fitted)
        trained = (trial.train(seed) for seed in size.seeds)
        right[id] = [
            (score(model, task, task.length)[1], score(model, new, task.length)[1])
            for model in trained
        ]
    names = ("dual", "multi-head", "RoPE")
    ours = "; ".join(
        f"{name} {spread([100 * a for a, _ in rows], '.0f')} % right, new objects "
        f"{spread([100 * b for _, b in rows], '.0f')} %"
        for name, rows in zip(names, right.values(), strict=True)
    )
    dual, *others = ([new for _, new in rows] for rows in right.values())
    agrees = [all(dual[n] > other[n] for other in others) for n in range(len(size.seeds))]
    return Finding(ours, agrees, {"right": right})


def _fitted(size: Size, id: str, vocab_size: int, wanted: int) -> Size:
    """The size with an MLP that gives a mechanism as many parameters as wanted."""

    def at(hidden: int) -> Size:
        return dataclasses.replace(size, mlp_ratio=(hidden + 0.5) / size.width)

    return at(matching_width(lambda hidden: at(hidden).model(id, vocab_size, 0), wanted))


def read_passkeys(task: Passkey, size: Size, stages: Stages) -> dict[int, CausalLM]:
    """A model for each seed that has learned to tell passkeys, with full attention.

    `stages` are rows' lengths, steps and batches, one after the other, each with a schedule of its
    own: short rows teach what a key is, and long ones how far away it may be.
    """
    models = {
        seed: CausalLM(
            task.vocab_size, size.layers, size.width, size.heads, mechanism="rope",
            mlp_ratio=size.mlp_ratio, rngs=nnx.Rngs(seed),
        )
        for seed in size.seeds
    }  # fmt: skip
    for length, steps, batch in stages:
        there = dataclasses.replace(size, context=length, steps=steps, batch=batch)
        trial = Trial(models.__getitem__, _passkeys(task, there), there.training)
        models = {seed: trial.train(seed) for seed in size.seeds}
    return models


def _passkeys(task: Passkey, size: Size) -> Lesson:
    return Lesson(
        lambda data, key: task.rows(key, size.batch, size.context),
        lambda model, rows, key: task.loss(model(rows), rows),
    )


@jax.jit
def _logits(model: CausalLM, rows: Int[Array, "B L"], mask: Mask) -> Float[Array, "B L V"]:
    return model(rows, mask=mask)


def cut_by_a_border(task: Passkey, rows: Int[Array, "B L"], block: int) -> Bool[np.ndarray, " B"]:
    """Which rows' keys lie on both sides of a border of blocks that no anchor bridges.

    The second block has the first before it, whole, so that the border between them cuts nothing.
    """
    start = np.argmax(np.asarray(rows) == task.base, axis=1)
    last = (start + task.digits) // block
    return (start // block != last) & (last > 1)


def star_passkey(size: Size) -> Finding:
    """Passkeys told by stars of a quarter, an eighth and a sixteenth of the context."""
    task = Passkey(noise=0.3)
    rows = task.rows(jax.random.key(1_000_003), 1024, size.context)
    asked = size.context - task.digits - 1
    blocks = {"a quarter": size.context // 4, "an eighth": size.context // 8,
              "a sixteenth": size.context // 16}  # fmt: skip
    kinds: dict[str, Mask] = {"full": Causal()}
    for name, block in blocks.items():
        kinds[name] = StarMask(block, block, asked)
        kinds[f"{name}, no anchor"] = StarMask(block, 0, asked)
    few = max(size.steps // 4, 1)
    stages = (
        (min(24, size.context), size.steps, size.batch),
        (min(64, size.context), few, size.batch),
        (size.context, few, max(size.batch // 4, 1)),
    )
    quarter = blocks["a quarter"]
    borders = cut_by_a_border(task, rows, quarter)
    told: dict[str, list[float]] = {name: [] for name in (*kinds, "whole", "cut")}
    for model in read_passkeys(task, size, stages).values():
        for name, mask in kinds.items():
            logits = _logits(model, rows, mask)
            told[name].append(float(task.accuracy(logits, rows)[0]))
            if name == "a quarter":
                for part, these in (("whole", ~borders), ("cut", borders)):
                    share = task.accuracy(logits[these], rows[these])[0]
                    told[part].append(float(share))

    def percent(name: str) -> str:
        return spread([100 * x for x in told[name]], ".1f") + " %"

    pairs = live_pairs(asked, size.context - asked, block_size=quarter)
    met = (pairs["context"] + pairs["query"]) / pairs["causal"]
    ours = (
        f"keys told with full attention {percent('full')}; by a star with blocks of "
        + ", ".join(f"{name} {percent(name)}" for name in blocks)
        + f"; of a quarter without anchor {percent('a quarter, no anchor')}; with a quarter, keys "
        f"in one block {percent('whole')}, keys cut by a border ({100 * borders.mean():.1f} % of "
        f"rows) {percent('cut')}; with a quarter, {100 * met:.0f} % of the pairs of full attention"
    )
    agrees = [
        full >= SOLVED and star >= KEPT * full
        for star, full in zip(told["a quarter"], told["full"], strict=True)
    ]
    return Finding(ours, agrees, {"told": told, "cut": float(borders.mean()), "pairs": pairs})
