r"""Gates find the r-th last token of a kind wherever it stands; no head that measures distance can.

A head counts as CoPE does (arXiv:2405.18719). Of n keys it sees, M are marked; a gate's logit is c
at a marked key and at most -c at another, and p_j is the sum of the gates from key j to the end.
Then the m-th last marked key has |p_j - m| ≤ ε = n σ(-c). With position vectors whose products are
z[m] = -b |m - r| and reach beyond r, and the gates' logits as scores,

    weight of the r-th last marked key  ≥  1 / (1 + (M-1) e^(-b(1-2ε)) + (n-M) e^(-2c+bε))

however far away it is, for n up to about e^c / 2. If a score depends on contents and distance
alone, as with RoPE, ALiBi or a learned bias, the ratio of two alike marked keys' weights depends on
their distances alone, f(d) - f(d') its logarithm. Let marks stand at d_1 < ... < d_{r+1} in one
text and at d_2 < ... < d_{r+2} in another: the first asks f(d_r) > f(d_{r+1}), the second the
opposite. For r ≥ 2 the right key gets more than half the weight in one of the two at most. (For
r = 1, recency will do.)
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.core.entry import Paper
from attnlab.positional.cope import cope_attention
from attnlab.positional.rope import rope_attention
from theory.conditioning import generator
from theory.shares import at_least, at_most
from theory.theorem import Cell, Evidence, Key, Theorem

PRICE = 12.0  # b, of being one off the count
LENGTHS, SHARP = (64, 1024), (4.0, 8.0, 12.0)
ROUNDING = 1e-3  # what float32 counts and weights may lose
FEWEST = 5  # positions in a table, so that one program serves the r that are checked
HEADS, WIDTH = 200, 16  # that measure distance
COLUMNS = ("what", "n", "marked", "r", "c", "measured", "promised", "share")


def check(key: Key | None = None) -> Evidence:
    """The least weight of the right key over ten texts; the best of many heads with RoPE."""
    rng = generator(key)
    rows = [_counted(rng, n, r, c) for n in LENGTHS for r in (1, 2, 3) for c in SHARP]
    rows += [_by_distance(rng, r, 0.5) for r in (2, 3)]
    return _evidence(rows, "by distance: the lesser weight in two texts, of the best head")


def counter_check(key: Key | None = None) -> Evidence:
    """Gates of c = 1 promised what sharp ones keep, distance what counting keeps."""
    rng = generator(key)
    blunt = [_counted(rng, n, 2, 1.0, sharp=12.0) for n in LENGTHS]
    rows = [*blunt, *(_by_distance(rng, r, weight_bound(64, 8, 12.0), True) for r in (2, 3))]
    return _evidence(rows, "promised: the weight that gates of c = 12 keep")


def weight_bound(length: int, marked: int, sharpness: float, price: float = PRICE) -> float:
    """The least weight of the r-th last marked key, whatever r.

    Raises:
      ValueError: more keys are marked than there are, or none.
    """
    if not 0 < marked <= length:
        raise ValueError(f"marked: expected 1 to {length}, got {marked}.")
    off = length / (1 + math.exp(sharpness))
    others = _log(marked - 1) - price * (1 - 2 * off)
    dull = _log(length - marked) - 2 * sharpness + price * off
    return float(np.exp(-np.logaddexp.reduce([0.0, others, dull])))


def counting_weights(
    marked: np.ndarray, r: int, sharpness: float, price: float = PRICE
) -> np.ndarray:
    """The weights "n" of attnlab's CoPE, whose vectors want the r-th last of the `marked` keys.

    Raises:
      ValueError: r is not positive.
    """
    if r < 1:
        raise ValueError(f"r: expected a positive int, got {r}.")
    far = np.abs(np.arange(max(r + 2, FEWEST)) - r)
    places = np.stack([0.0 * far, -price * far], axis=-1)
    query = np.array([[[math.sqrt(2) * sharpness, 1.0]]])
    keys = np.stack([np.where(marked, 1.0, -1.0), np.zeros(len(marked))], axis=-1)[:, None]
    values = np.eye(len(marked))[:, None]
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, keys, values, places))
    return np.asarray(_cope(*arrays), np.float64)[0, 0]


@jax.jit
def _cope(
    query: Float[Array, "1 1 2"],
    keys: Float[Array, "n 1 2"],
    values: Float[Array, "n 1 n"],
    table: Float[Array, "P 2"],
) -> Float[Array, "1 1 n"]:
    return cope_attention(query, keys, values, table=table)


def _counted(
    rng: np.random.Generator, n: int, r: int, c: float, sharp: float | None = None
) -> tuple[Cell, ...]:
    """`sharp`: the c that the promise is made for, if not that of the head."""
    count, found = n // 8, []
    for _ in range(10):
        places = np.sort(rng.choice(n, count, replace=False))
        weights = counting_weights(np.isin(np.arange(n), places), r, c)
        found.append(float(weights[places[-r]]))
    promised = weight_bound(n, count, c if sharp is None else sharp)
    share = at_least(min(found) + ROUNDING, promised)
    return ("counted", n, count, r, c, min(found), promised, share)


def _by_distance(
    rng: np.random.Generator, r: int, promised: float, more: bool = False
) -> tuple[Cell, ...]:
    """The greatest, over heads with RoPE, of the lesser weight that the right key has in two texts.

    `more`: as what is promised at least, not at most.
    """
    n = 8 * (r + 2)
    marks = np.sort(rng.choice(n - 1, r + 2, replace=False))[::-1]  # from near to far
    query, key = rng.normal(size=(2, 1, HEADS, WIDTH)) * 2
    lesser = np.minimum(*(_share(query, key, text, n)[r - 1] for text in (marks[:-1], marks[1:])))
    best = float(lesser.max())
    share = at_least(best, promised) if more else at_most(best, promised + ROUNDING)
    return ("by distance", n, r + 1, r, "", best, promised, share)


def _share(query: np.ndarray, key: np.ndarray, places: np.ndarray, n: int) -> np.ndarray:
    """Weights "marks heads" among marked keys of one content, for a query behind the text."""
    count = len(places)
    keys = np.zeros((n, *key.shape[1:]))
    keys[places] = key
    values = np.zeros((n, key.shape[1], count))
    values[places, :, np.arange(count)] = 1
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, keys, values))
    mask = jnp.asarray(np.isin(np.arange(n), places))[None]
    out = rope_attention(*arrays, mask=mask, query_offset=n)
    return np.asarray(out, np.float64)[0].T


def _log(count: int) -> float:
    return math.log(count) if count else -math.inf


_evidence = partial(Evidence.of_ratios, "what is measured, as a share of what is promised", COLUMNS)


THEOREM = Theorem(
    id="counting-gates",
    title="what gates count and distances cannot",
    statement=(
        r"Of $n$ keys, $M$ are marked. Let gates have the logit $c$ at marked keys and at most "
        r"$-c$ at others, and let $p_j$ be the sum of the gates from key $j$ to the end. (a) The "
        r"$m$-th last marked key has $|p_j - m| \le \epsilon = n\, \sigma(-c)$. (b) A head whose "
        r"scores are these logits plus $-b\, |p_j - r|$, with positions up to $r + 1$ at least, "
        r"gives the $r$-th last marked key a weight of at least $1 / (1 + (M-1) e^{-b(1 - "
        r"2\epsilon)} + (n-M) e^{-2c + b\epsilon})$, wherever it stands. (c) If scores depend on "
        r"contents and distance alone and marked keys are alike, then for $r \ge 2$ and any $d_1 < "
        r"\dots < d_{r+2}$ the $r$-th last marked key has more than half the weight either where "
        r"marks stand at distances $d_1, \dots, d_{r+1}$ or where they stand at $d_2, \dots, "
        r"d_{r+2}$, not in both."
    ),
    assumptions=(
        r"gates are sharp: $n\, \sigma(-c)$ is below one half",
        "for (a) and (b), marked keys have the same logit",
        r"for (c), one head of one layer, and $r \ge 2$",
    ),
    source=Paper(
        "Contextual Position Encoding: Learning to Count What's Important",
        "Golovneva, Wang, Weston & Sukhbaatar",
        2024,
        "2405.18719",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"Each of at most $n$ gates is off by at most $\sigma(-c)$ from 1 or 0, which gives (a). "
        r"So the wanted key scores at least $c - b\epsilon$, another marked one at most $c - b(1 - "
        r"\epsilon)$, and one that is not marked at most $-c$. For (c), the weights of two marked "
        r"keys have the ratio $e^{f(d_r) - f(d_{r+1})}$ in both texts; the first text asks for "
        r"more than 1, the second for less."
    ),
)
