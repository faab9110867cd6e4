r"""The partial-softmax monoid: attention is a fold, and every order of folding agrees.

A part of the keys is summarised by its greatest score m, its sum s = Σ e^(x - m) and its values a
= Σ e^(x - m) v. Two summaries merge by moving both to the greater m. Blockwise attention, flash
kernels, split-K decoding and ring attention are this fold in different orders (Milakov &
Gimelshein, 2018; Rabe & Staats, 2021).

In floating point the orders differ by rounding, and the bound says by how much. With unit roundoff
u, the item j of the sum meets one exponential of x_j - m, then one rescaling per merge on the way
up; the exponents' roundings telescope to Δ_j = max x - x_j. Its relative error is at most e^(ε_j)
- 1 with

    ε_j = u · (Δ_j + (b + c + 2) + (c + 2) · depth_j)

for leaves of b items and an exponential good to c·u. The numerator and the denominator are sums of
such items.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from attnlab.core.entry import Paper
from attnlab.core.partial import Partial, merge
from theory.theorem import Cell, Evidence, Key, Theorem, worst

VALUES = 4
MOST = 512  # parts in the longest fold
EXP_ERROR = 4.0  # the exponential's error in units of u: two units in the last place
COLUMNS = ("dtype", "order", "parts", "error", "bound", "share")


def check(key: Key | None = None) -> Evidence:
    """Any bracketing and order, extremes included, and how the error grows with the parts."""
    rng = _generator(key)
    rows = [*_bracketings(rng), *_growth(rng, jnp.float32), *_growth(rng, jnp.bfloat16)]
    return Evidence(
        quantity="worst error as a share of the rounding bound",
        measured=worst(rows),
        bound=1.0,
        columns=COLUMNS,
        rows=tuple(rows),
        note="late values: equal scores, and the second half of the values is 1, the first 0",
    )


def counter_check(key: Key | None = None) -> Evidence:
    """Three shortcuts, each fatal: no maximum, no rescaling, averaging finished outputs."""
    scores, values = _inputs(_generator(key), parts=3, size=4, spread=120.0)
    exact = _oracle(scores, values)
    bound = float(np.max(_error_bound(scores, values, 4, np.full(3, 2.0), jnp.float32)))

    def error(out: jax.Array) -> float:
        distance = float(np.max(np.abs(np.asarray(out, np.float64) - exact)))
        return distance if math.isfinite(distance) else math.inf

    x, v = jnp.asarray(scores, jnp.float32), jnp.asarray(values, jnp.float32)
    raw = jnp.exp(x)
    shifted = jnp.exp(x - x.max(1, keepdims=True))
    outs = jnp.einsum("pb,pbd->pd", shifted, v) / shifted.sum(1, keepdims=True)
    attempts = {
        "no maximum": jnp.einsum("pb,pbd->d", raw, v) / raw.sum(),
        "no rescaling": jnp.einsum("pb,pbd->d", shifted, v) / shifted.sum(),
        "outputs averaged, (1 2) 3": ((outs[0] + outs[1]) / 2 + outs[2]) / 2,
        "outputs averaged, 1 (2 3)": (outs[0] + (outs[1] + outs[2]) / 2) / 2,
    }
    rows = tuple(
        ("float32", name, 3, error(out), bound, error(out) / bound)
        for name, out in attempts.items()
    )
    return Evidence(
        quantity="worst error as a share of the rounding bound",
        measured=worst(rows),
        bound=1.0,
        columns=COLUMNS,
        rows=rows,
        note="an infinite error is an overflow; the two averages also disagree with each other",
    )


def _bracketings(
    rng: np.random.Generator, trials: int = 12, parts: int = 9, size: int = 5
) -> list[tuple[Cell, ...]]:
    """Random bracketings and orders of extreme parts, in float64, against NumPy."""
    rows: list[tuple[Cell, ...]] = []
    for name, spread in (("scores near 1", 1.0), ("scores near 1e4", 1e4)):
        scores, values = _inputs(rng, parts, size, spread)
        scores[2] = -np.inf  # a part that may not be seen: the identity, in disguise
        scores[5, 1:] = -np.inf
        exact, error = _oracle(scores, values), 0.0
        depth = np.full(parts, float(parts))
        with jax.enable_x64(True):
            combine, stacked = jax.jit(merge), _summaries(scores, values, jnp.float64)
            leaves = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(parts)]
            leaves.append(Partial.identity((1,), VALUES, jnp.dtype(jnp.float64)))
            for _ in range(trials):
                out = _read(_random_fold(leaves, combine, rng))
                error = float(np.maximum(error, np.max(np.abs(out - exact))))  # keeps a NaN
            bound = float(np.max(_error_bound(scores, values, size, depth, jnp.float64)))
        rows.append(("float64", f"random, {name}", parts, error, bound, error / bound))
    return rows


def _random_fold(parts: Sequence[Partial], combine: Callable, rng: np.random.Generator) -> Partial:
    parts = list(parts)
    while len(parts) > 1:
        first, second = rng.choice(len(parts), 2, replace=False)
        merged = combine(parts[first], parts[second])
        parts = [part for i, part in enumerate(parts) if i not in (first, second)] + [merged]
    return parts[0]


def _growth(rng: np.random.Generator, dtype: DTypeLike, size: int = 8) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    cases = [("", parts, _inputs(rng, parts, size, 2.0)) for parts in (8, 64, MOST)]
    late = np.repeat(np.arange(MOST) >= MOST // 2, size * VALUES)
    stalling = np.zeros((MOST, size)), late.reshape(MOST, size, VALUES).astype(np.float64)
    cases.append((", late values", MOST, stalling))
    for case, parts, (scores, values) in cases:
        exact = _oracle(scores, values)
        # Identities change nothing, and one length for all cases is one compilation.
        unseen = MOST - parts
        stacked = _summaries(
            np.pad(scores, ((0, unseen), (0, 0)), constant_values=-np.inf),
            np.pad(values, ((0, unseen), (0, 0), (0, 0))),
            dtype,
        )
        orders = {
            "left fold": (_left_fold, np.minimum(parts - np.arange(parts), parts - 1.0)),
            "tree": (_tree, np.full(parts, float(parts.bit_length() - 1))),
        }
        for name, (fold, depth) in orders.items():
            error = float(np.max(np.abs(_read(fold(stacked)) - exact)))
            bound = float(np.max(_error_bound(scores, values, size, depth, dtype)))
            rows.append((jnp.dtype(dtype).name, name + case, parts, error, bound, error / bound))
    return rows


@jax.jit
def _left_fold(stacked: Partial) -> Partial:
    first = jax.tree.map(lambda leaf: leaf[0], stacked)
    rest = jax.tree.map(lambda leaf: leaf[1:], stacked)
    return jax.lax.scan(lambda left, right: (merge(left, right), None), first, rest)[0]


@jax.jit
def _tree(stacked: Partial) -> Partial:
    while stacked.sum.shape[0] > 1:
        left, right = (jax.tree.map(lambda leaf, i=i: leaf[i::2], stacked) for i in (0, 1))
        stacked = merge(left, right)
    return jax.tree.map(lambda leaf: leaf[0], stacked)


def _inputs(
    rng: np.random.Generator, parts: int, size: int, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and values that bfloat16 holds exactly, so every error measured is the fold's own."""
    scores = spread * rng.normal(size=(parts, size))
    values = rng.normal(size=(parts, size, VALUES))
    return _held(scores), _held(values)


def _held(array: np.ndarray) -> np.ndarray:
    return array.astype(jnp.bfloat16).astype(np.float64)


def _generator(key: Key | None) -> np.random.Generator:
    key = jax.random.key(0) if key is None else key
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _summaries(scores: np.ndarray, values: np.ndarray, dtype: DTypeLike) -> Partial:
    """One Partial per part, stacked: made in high precision, then rounded to `dtype`."""
    wide = np.float64 if dtype is jnp.float64 else np.float32
    stacked = jax.jit(Partial.of)(scores[:, None].astype(wide), values.astype(wide))
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), stacked)


def _read(part: Partial) -> np.ndarray:
    """The weighted mean a summary stands for, divided out in float64."""
    total = np.asarray(part.sum, np.float64)
    return np.asarray(part.acc, np.float64).reshape(VALUES) / total.reshape(())


def _oracle(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return np.einsum("pb,pbd->d", weights, values) / weights.sum()


def _error_bound(
    scores: np.ndarray, values: np.ndarray, size: int, depth: np.ndarray, dtype: DTypeLike
) -> np.ndarray:
    """The bound of the module docstring, entry by entry of the output."""
    unit = float(jnp.finfo(dtype).eps) / 2
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    seen = np.where(weights > 0, scores.max() - scores, 0.0)
    steps = size + EXP_ERROR + 2 + (EXP_ERROR + 2) * depth[:, None]
    error = np.minimum(unit * (seen + steps), 300.0)
    grown, least = np.expm1(error), np.sum(weights * np.exp(-error))
    spread = grown + np.sum(weights * grown)
    return np.einsum("pb,pb,pbd->d", weights, spread, np.abs(values)) / least + unit


THEOREM = Theorem(
    id="partial-softmax",
    title="the partial-softmax monoid",
    statement=(
        r"On summaries $(a, m, s)$ the merge $(a, m, s) \oplus (a', m', s') = (e^{m-M}a + "
        r"e^{m'-M}a',\; M,\; e^{m-M}s + e^{m'-M}s')$ with $M = \max(m, m')$ is associative and "
        r"commutative, $(0, -\infty, 0)$ is its identity, and $a/s$ of the merged parts is "
        r"softmax attention over all keys, for every bracketing and every order. In arithmetic "
        r"with unit roundoff $u$ a fold of depth $d$ over leaves of $b$ keys has relative error "
        r"at most $e^{\varepsilon}-1$ per term, $\varepsilon_j = u\,(\Delta_j + b + c + 2 + "
        r"(c+2)\,d)$, where $\Delta_j = \max_k x_k - x_j$ and the exponential is good to $c\,u$."
    ),
    assumptions=(
        "the parts cover the keys, each key once",
        r"both summaries are moved to the common maximum $M$ before they are added",
        r"sums and maxima are carried along: finished outputs $a/s$ alone do not suffice",
    ),
    source=Paper(
        "Online normalizer calculation for softmax", "Milakov & Gimelshein", 2018, "1805.02867"
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"$(a, m, s)$ stands for the pair $(e^m a, e^m s) = \sum_j e^{x_j}(v_j, 1)$. The merge "
        r"adds these pairs, and addition is associative and commutative. The maximum is a choice "
        r"of unit for the pair, made so that no exponential exceeds one."
    ),
)
