"""Pictures of what was checked.  matplotlib is imported where it is needed."""

from typing import Any

import numpy as np

from attnlab.core.masks import TilePlan

_EMPTY, _FULL, _PARTIAL = "#eceff1", "#1b5e20", "#f9a825"


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.8), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, count)))


def draw_mask(title: str, allowed: np.ndarray, plan: TilePlan) -> Any:
    """Pairs of the first head "T S", and the map of tiles over all heads."""
    figure, (pairs, tiles) = _panels(2)
    pairs.imshow(_background(allowed), interpolation="nearest")
    pairs.set(title=f"{title}: who sees whom", xlabel="key", ylabel="query")
    _lines(pairs, allowed.shape, plan.block_sizes)
    draw_tiles(tiles, plan)
    return figure


def _background(allowed: np.ndarray) -> np.ndarray:
    shades = np.where(allowed[..., None], (0.10, 0.37, 0.13), (0.93, 0.94, 0.95))
    return np.asarray(shades)


def _lines(axes: Any, shape: tuple[int, ...], block_sizes: tuple[int, int]) -> None:
    rows, cols = block_sizes
    axes.hlines(np.arange(rows, shape[0], rows) - 0.5, -0.5, shape[1] - 0.5, "white", lw=0.5)
    axes.vlines(np.arange(cols, shape[1], cols) - 0.5, -0.5, shape[0] - 0.5, "white", lw=0.5)


def draw_tiles(axes: Any, plan: TilePlan) -> None:
    """The map of empty, full and partial tiles."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    kinds = np.where(plan.empty, 0, np.where(plan.full, 1, 2))
    colors = ListedColormap([_EMPTY, _FULL, _PARTIAL])
    axes.imshow(kinds, cmap=colors, vmin=0, vmax=2, interpolation="nearest")
    _lines(axes, kinds.shape, (1, 1))
    counts = plan.counts()
    axes.legend(
        handles=[
            Patch(facecolor=c, edgecolor="gray", label=f"{counts[name]} {name}")
            for name, c in (("empty", _EMPTY), ("full", _FULL), ("partial", _PARTIAL))
        ],
        loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False, fontsize=8,
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    rows, cols = plan.block_sizes
    axes.set(title=f"tiles of {rows} x {cols}", xlabel="key block", ylabel="query block")


def draw_modifier(
    title: str, effect: np.ndarray, allowed: np.ndarray, curves: dict[str, np.ndarray],
    given: np.ndarray, plan: TilePlan | None,
) -> Any:  # fmt: skip
    """`effect` "N T S": of a score of 0; `curves`: of `given` scores, at some pairs."""
    heads = [0] if len(effect) == 1 else [0, len(effect) - 1]
    figure, panels = _panels(len(heads) + 1 + (plan is not None))
    shown = np.where(allowed & np.isfinite(effect), effect, np.nan)
    largest = float(np.nanmax(np.abs(shown))) if np.isfinite(shown).any() else 1.0
    for head, axes in zip(heads, panels, strict=False):
        image = axes.imshow(
            shown[head], cmap="RdBu_r", vmin=-largest or -1, vmax=largest or 1,
            interpolation="nearest",
        )  # fmt: skip
        axes.set(title=f"{title} of a score of 0, head {head}", xlabel="key", ylabel="query")
        figure.colorbar(image, ax=axes, shrink=0.8)
    axes = panels[len(heads)]
    axes.plot(given, given, color="gray", lw=0.8, ls=":")
    for label, curve in curves.items():
        axes.plot(given, curve, label=label)
    axes.set(title="score in, score out", xlabel="score", ylabel="after the modifier")
    axes.legend(fontsize=8, frameon=False)
    if plan is not None:
        draw_tiles(panels[-1], plan)
    return figure


def draw_normalizer(title: str, given: np.ndarray, curve: np.ndarray, words: str) -> Any:
    """`curve`: what becomes of one pair's score as it runs through `given`, the others at zero."""
    figure, (axes,) = _panels(1)
    axes.plot(given, curve, color=_FULL)
    axes.set(title=f"{title}: weight of one key", xlabel=words, ylabel="weight")
    axes.set_ylim(bottom=min(0.0, float(np.nanmin(curve))))
    return figure
