"""What `attnlab bench flash` measures: named cases, each with the work that it is worth.

A case is counted by its live pairs, those that the mask allows, whatever an implementation makes of
the others: forward two products (q k and w v), 2 (H + D) operations a pair; backward five (the
scores again, and the gradients of weights, values, queries and keys), 2 (3 H + 2 D).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnlab.core.masks import ArrayMask, Blocks, Causal, Full, Mask, Segments, SlidingWindow
from attnlab.core.normalizers import Normalizer, Sigmoid, Softmax
from attnlab.core.scores import AlibiSlopes, Bias, ScoreModifier, SoftCap, alibi_slopes
from attnlab.positional.bam import GeneralizedGaussianPrior

SHARES = (100, 50, 25, 10, 5)  # percent of tiles that live, in the sparse cases
TILE, WINDOW, CAP = 128, 1024, 30.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one measurement: batch, length of queries and keys, heads, width."""

    batch: int
    length: int
    heads: int
    width: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One structure of attention, in attnlab's words and, where they have any, in those of peers.

    `pairs`: how many pairs live, per head and batch entry.  `plain`: the case without what makes
    this one special, timed beside it.
    """

    name: str
    shape: Shape
    pairs: int
    mask: Mask = dataclasses.field(default_factory=Full)
    modifiers: tuple[ScoreModifier, ...] = ()
    normalizer: Normalizer = dataclasses.field(default_factory=Softmax)
    causal: bool = False
    window: tuple[int, int] | None = None
    segments: np.ndarray | None = None
    cap: float | None = None
    plain: "Case | None" = None
    allowance: float | None = None  # what its time may be, as a multiple of the plain one's

    def flops(self, passes: str) -> float:
        """Operations of a pass, "forward" or "backward"."""
        products = {"forward": 2, "backward": 5}[passes]
        shape = self.shape
        return 2.0 * products * shape.width * self.pairs * shape.heads * shape.batch


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _dense(shape: Shape) -> Case:
    return Case("dense", shape, shape.length**2)


def _causal(shape: Shape) -> Case:
    return Case("causal", shape, _triangle(shape.length), Causal(), causal=True)


def _array(shape: Shape) -> Case:
    """A causal mask handed over as an array: JAX's pull request 35114 times this."""
    allowed = np.tri(shape.length, dtype=bool)
    return Case("array", shape, int(allowed.sum()), ArrayMask(jnp.asarray(allowed)))


def _random(shape: Shape) -> Case:
    """Half of the pairs, at random, the diagonal always: no tile is empty, and none is full."""
    allowed = np.random.default_rng(0).random((shape.length, shape.length)) < 0.5
    np.fill_diagonal(allowed, True)
    return Case("random", shape, int(allowed.sum()), ArrayMask(jnp.asarray(allowed)))


def _window(shape: Shape) -> Case:
    left = min(WINDOW, shape.length // 4) - 1
    pairs = int(np.minimum(np.arange(shape.length), left).sum()) + shape.length
    return Case("window", shape, pairs, SlidingWindow(left), window=(left, 0))


def _packed(shape: Shape) -> Case:
    """Causal within documents of uneven lengths, the mean one an eighth of the row."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, shape.length), 7, replace=False))
    lengths = np.diff(np.concatenate([[0], cuts, [shape.length]]))
    ids = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    rows = np.broadcast_to(ids, (shape.batch, shape.length)).copy()
    pairs = sum(_triangle(int(n)) for n in lengths)
    mask = Causal() & Segments(jnp.asarray(rows))
    return Case("packed", shape, pairs, mask, causal=True, segments=rows)


def _modified(name: str, **what: Any) -> Callable[[Shape], Case]:
    def make(shape: Shape) -> Case:
        plain = _causal(shape)
        made = {key: value(shape) for key, value in what.items()}
        return dataclasses.replace(plain, name=name, plain=plain, **made)

    return make


def _slopes(shape: Shape) -> tuple[ScoreModifier, ...]:
    return (AlibiSlopes(alibi_slopes(shape.heads)),)


def _prior(shape: Shape) -> tuple[ScoreModifier, ...]:
    def per_head(low: float, high: float) -> Any:
        return jnp.linspace(low, high, shape.heads, dtype=jnp.float32)

    return (
        GeneralizedGaussianPrior(per_head(-4.0, -1.0), per_head(0.5, 1.5), per_head(-1.0, 1.0)),
    )


def _shift(shape: Shape) -> tuple[ScoreModifier, ...]:
    return (Bias(jnp.full((1, 1, 1), -math.log(shape.length), jnp.float32)),)


def _sparse(share: int) -> Callable[[Shape], Case]:
    def make(shape: Shape) -> Case:
        """Every row of tiles keeps its share of them, at random, and the one on the diagonal."""
        tile = min(TILE, max(shape.length // 32, 1))
        count = -(-shape.length // tile)
        keep = max(round(count * share / 100), 1)
        order = np.random.default_rng(0).random((count, count))
        np.fill_diagonal(order, -1)
        live = order.argsort(-1).argsort(-1) < keep
        edge = np.minimum(tile, shape.length - tile * np.arange(count))
        pairs = int(edge @ live @ edge)
        return Case(
            f"sparse {share}%",
            shape,
            pairs,
            Blocks(jnp.asarray(live), (tile, tile)),
            plain=_dense(shape),
            allowance=pairs / shape.length**2 + 0.05,
        )

    return make


CASES: dict[str, Callable[[Shape], Case]] = {
    "dense": _dense,
    "causal": _causal,
    "array": _array,
    "random": _random,
    "window": _window,
    "packed": _packed,
    "alibi": _modified("alibi", modifiers=_slopes, allowance=lambda _: 1.1),
    "bam": _modified("bam", modifiers=_prior, allowance=lambda _: 1.1),
    "soft cap": _modified(
        "soft cap",
        modifiers=lambda _: (SoftCap(CAP),),
        cap=lambda _: CAP,
        allowance=lambda _: 1.1,
    ),
    "sigmoid": _modified(
        "sigmoid", normalizer=lambda _: Sigmoid(), modifiers=_shift, allowance=lambda _: 1.0
    ),
    **{f"sparse {share}%": _sparse(share) for share in SHARES},
}


def chosen(name: str) -> list[str]:
    """The cases that a name stands for: itself, or all that begin with it ("sparse").

    Raises:
      ValueError: no case has that name.
    """
    found = [name] if name in CASES else [each for each in CASES if each.split()[0] == name]
    if not found:
        raise ValueError(f"case: {name!r} is none of {', '.join(CASES)}.")
    return found
