r"""Who waits in a ring: the causal pairs of each device and hop, for three ways to deal out tokens.

In every hop a device meets the keys of one other, and the ring turns when the slowest is done. With
P devices of L tokens each, T = P L, and the pairs of a causal mask, the time in units of the mean
work is

    contiguous   ((2 P - 1) L + 1) / (T + 1)      about 2 - 1/P
    striped      (T + P) / (T + 1)                about 1 + 1/L
    zigzag       1

Striped: Brandon et al. 2023, arXiv:2311.09431, who write of the imbalance of the contiguous ring
and of the speed-up of two that it leaves to be had.  The pairs are counted one by one from the
mask of `attnlab.core.masks` and the places of `attnlab.distributed.layouts`.
"""

import jax
import numpy as np

from attnlab.core.entry import Paper
from attnlab.core.masks import Causal, Mask, Segments, SlidingWindow
from attnlab.distributed.balance import imbalance, work
from attnlab.distributed.layouts import LAYOUTS
from theory.theorem import Cell, Evidence, Key, Theorem

LENGTH, DEVICES = 512, (2, 4, 8, 16)
COLUMNS = ("mask", "layout", "devices", "time, counted", "time, by formula", "ratio")


def waiting(layout: str, devices: int, length: int) -> float:
    """The time of a causal ring, in units of the mean work, by the theorem.

    Raises:
      ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}.")
    part = length / devices
    slowest = {
        "contiguous": (2 * devices - 1) * part + 1,
        "striped": length + devices,
        "zigzag": length + 1,
    }
    return slowest[layout] / (length + 1)


def other_masks(rng: np.random.Generator) -> dict[str, Mask]:
    """A causal window and causal documents, whose ends are drawn."""
    ends = np.sort(rng.choice(np.arange(1, LENGTH), 4, replace=False))
    ids = np.searchsorted(ends, np.arange(LENGTH), side="right").astype(np.int32)
    return {"window of 48": SlidingWindow(47), "five documents": Causal() & Segments(ids)}


def check(key: Key | None = None) -> Evidence:
    """Three layouts on two to sixteen devices."""
    return _evidence([_row("causal", Causal(), layout, p) for layout in LAYOUTS for p in DEVICES])


def counter_check(key: Key | None = None) -> Evidence:
    """A window, or several documents in a row: nothing is promised, and zigzag waits too."""
    key = jax.random.key(0) if key is None else key
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    rows = [
        _row(name, mask, layout, 8) for name, mask in other_masks(rng).items() for layout in LAYOUTS
    ]
    return _evidence(
        rows, "the formula is the causal one; dealt out one by one, tokens hardly notice"
    )


def _row(name: str, mask: Mask, layout: str, devices: int) -> tuple[Cell, ...]:
    counted = imbalance(work(mask, layout, devices, LENGTH))
    formula = waiting(layout, devices, LENGTH)
    ratio = max(counted / formula, formula / counted)
    return (name, layout, devices, counted, formula, ratio)


def _evidence(rows: list[tuple[Cell, ...]], note: str = "") -> Evidence:
    # Both sides are quotients of integers, of which the last bit may differ.
    rows = [(*row[:-1], round(float(row[-1]), 12)) for row in rows]
    quantity = "worst ratio of count and formula, either way up"
    return Evidence.of_ratios(quantity, COLUMNS, rows, note)


THEOREM = Theorem(
    id="ring-balance",
    title="who waits in a ring",
    statement=(
        r"Let $T = P L$ tokens lie on $P$ devices, $L$ on each, and let a ring turn when the "
        r"device with most pairs is done. Under a causal mask it takes, in units of the mean "
        r"work $T(T+1)/2P$, exactly $\frac{(2P-1)L + 1}{T + 1}$ where tokens lie in order, "
        r"$\frac{T + P}{T + 1}$ where they are dealt out one by one, and $1$ where device $d$ "
        r"has the $d$-th and the $(2P-1-d)$-th of $2P$ equal parts: there every device has "
        r"$L(L+1)/2$ pairs in the first hop and $L^2/2$ in every other."
    ),
    assumptions=(
        "the mask is causal, and nothing else: one document, no window",
        "every pair takes the same time, and devices wait for each other after each hop",
        r"$L$ is even for the parts of a zigzag",
    ),
    source=Paper(
        "Striped Attention: Faster Ring Attention for Causal Transformers",
        "Brandon et al.",
        2023,
        "2311.09431",
    ),
    check=check,
    counter_check=counter_check,
    proof=(
        r"In order: hop $0$ is a triangle of $L(L+1)/2$ pairs; in hop $n > 0$ device $P-1$ meets "
        r"$L$ keys of its past with each of its $L$ queries, $L^2$. Dealt out: query $iP + d$ "
        r"sees key $jP + e$ if $j \le i$ for $e \le d$, else if $j < i$; in every hop device "
        r"$P-1$ is of the first kind and has $L(L+1)/2$. Zigzag, with $h = L/2$: in hop $0$ two "
        r"triangles and a square, $h(h+1) + h^2$. Else let the keys be those of $e$. If $e < d$ "
        r"both parts of the queries see the early keys and neither the late ones; if $e > d$ the "
        r"late queries see both parts and the early ones neither. That is $2 h^2$ either way."
    ),
)
