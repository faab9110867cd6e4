"""What papers claim of trained models, tried small: each claim beside what came out here.

    attnlab bench claims --save FOLDER                     goes on where it was cut off
    attnlab bench claims --save FOLDER --only cope-copy    one claim
    attnlab bench claims --save FOLDER --full              also at the papers' own sizes

A claim is tried with several seeds and holds here if each of them agrees.  Models of two layers
that learn for a minute can refute nothing that was said of large ones, and confirm little: what is
told is whether the effect shows at this size.  The claims on text are in `claims_text`, those on
synthetic tasks in `claims_tasks`; all together take about half an hour on two quiet cores, with
`--full` days, or an accelerator.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from attnlab.bench import claims_tasks, claims_text
from attnlab.bench.harness import Result, Row
from attnlab.bench.kept import Measure, measure_missing
from attnlab.bench.trial_sizes import Finding, Size


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim: in words, the paper's figure, and the function that tries it at a size."""

    mechanism: str
    words: str
    paper: str
    attempt: Callable[[Size], Finding]
    size: Size


LENGTHS = Size(steps=500, batch=16, context=64)
CLAIMS = {
    "energy-gain": Claim(
        "energy-gated",
        "lower validation loss on Tiny Shakespeare",
        "1.474 → 1.371, one seed, window statistics",
        claims_text.energy_gain,
        Size(),
    ),
    "energy-leak": Claim(
        "energy-gated",
        "(ours) statistics of the window read ahead, those of keys seen do not",
        "a causal model",
        claims_text.energy_leak,
        Size(steps=1),
    ),
    "softplus-length": Claim(
        "softplus-reweighting",
        "loss nearly constant at 16 times the length of training",
        "8 ×: 3.19 → 3.32; softmax 3.19 → 6.28",
        claims_text.softplus_length,
        Size(),
    ),
    "moh-heads": Claim(
        "moh",
        "better than multi-head attention with 50–90 % of the heads",
        "better on ViT, DiT and LLaMA with 50–90 %",
        claims_text.moh_heads,
        Size(heads=8),
    ),
    "cope-flip-flop": Claim(
        "cope",
        "solves Flip-Flop out of distribution where others fail",
        "wrong: CoPE 4.9 %, RoPE 20.3 %",
        claims_tasks.cope_flip_flop,
        LENGTHS,
    ),
    "cope-copy": Claim(
        "cope",
        "solves selective copying at other densities",
        "wrong: CoPE 0 %, RoPE 100 %",
        claims_tasks.cope_copy,
        LENGTHS,
    ),
    "cope-counting": Claim(
        "cope",
        "counts variables, also out of distribution",
        "wrong: CoPE 1.2 %, RoPE 17.8 %; outside 4.0 % and 34.1 %",
        claims_tasks.cope_counting,
        LENGTHS,
    ),
    "momentum-induction": Claim(
        "momentum-attention",
        "one layer does induction, for which plain attention needs two",
        "one layer with γ > 0, none without",
        claims_tasks.momentum_induction,
        Size(width=32, heads=2, steps=600, batch=32, context=24, seeds=(0, 1)),
    ),
    "momentum-depth": Claim(
        "momentum-attention",
        "the best γ falls with the number of layers L",
        "4.17 L^-0.74",
        claims_tasks.momentum_depth,
        Size(width=32, heads=2, steps=600, batch=32, context=24, seeds=(0, 1)),
    ),
    "dual-same-different": Claim(
        "dual-attention-transformer",
        "relations are learned from fewer examples, for new objects too",
        "fewer examples on relational games",
        claims_tasks.dual_same_different,
        Size(width=32, steps=1000, batch=32, context=9),
    ),
    "star-passkey": Claim(
        "star-attention",
        "nearly as accurate as the full attention that the model was trained with",
        "95–100 % of its accuracy kept, with blocks of a quarter of the context",
        claims_tasks.star_passkey,
        Size(mlp_ratio=1.0, context=256, batch=64, steps=600),
    ),
}
FULL = {
    "energy-gain-full": dataclasses.replace(
        CLAIMS["energy-gain"],
        size=Size(
            layers=6, width=256, heads=8, context=256, batch=64, steps=5000, warmup=300,
            learning_rate=3e-4, dropout=0.1, tied=True,
        ),
    ),
}  # fmt: skip


def verdict(finding: Finding) -> str:
    """In words: whether all seeds agree with the claim, none, or some."""
    agrees, seeds = sum(finding.agrees), len(finding.agrees)
    if agrees == seeds:
        return "holds here"
    return "does not hold here" if not agrees else f"{agrees} of {seeds} seeds"


def measure(claim: Claim, size: Size) -> Row:
    """The line of one claim."""
    finding = claim.attempt(size)
    cells: dict[str, Any] = {
        "mechanism": claim.mechanism,
        "claim": claim.words,
        "paper": claim.paper,
        "ours": finding.ours,
        "seeds": len(finding.agrees),
        "verdict": verdict(finding),
    }
    return Row(cells, detail={"agrees": finding.agrees, **finding.numbers})


def arrange(rows: list[Row]) -> Result:
    """The table of claims."""
    notes = (
        "Small models and few steps: what holds here shows at this size, what does not may need "
        "another. A range is that of the seeds.",
        "Losses are validation losses in nats per character; wrong is the share of answers.",
    )
    return Result("claims", "What papers claim, tried small", tuple(rows), notes)


def run(
    save: Any = None,
    quick: bool = False,
    fresh: bool = False,
    only: tuple[str, ...] | None = None,
    full: bool = False,
) -> Result:
    """The table of claims; rows that the record in `save` has are kept unless `fresh`."""
    measures = {}
    for key, claim in {**CLAIMS, **FULL}.items():
        size = claim.size.small() if quick else claim.size
        measures[key] = Measure(partial(measure, claim, size), dataclasses.asdict(size))
    if only is None:
        only = tuple(measures) if full else tuple(CLAIMS)
    return measure_missing("claims", measures, arrange, save=save, fresh=fresh, only=only)
