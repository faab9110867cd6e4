"""The chapters' house style: a palette, a card for figures, Plotly's `show`.

The colours are Okabe and Ito's, told apart by readers with any colour vision.
Figures sit on a card of their own, so that they read the same on a light page
and on a dark one.
"""

import os
import sys

import matplotlib as mpl
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap

CARD, INK, FAINT = "#fbfaf7", "#2b2b2b", "#d9d6cf"
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, GREY = "#e69f00", "#56b4e9", "#6f6f6f"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)

# Weights: nothing is the card itself, everything is deep blue.
WEIGHTS = LinearSegmentedColormap.from_list(
    "weights", [CARD, "#9ecae1", BLUE, "#08306b"]
)
PLOTLY_WEIGHTS = [
    [0.0, CARD],
    [0.33, "#9ecae1"],
    [0.67, BLUE],
    [1.0, "#08306b"],
]

STYLE = {
    "axes.edgecolor": GREY,
    "axes.facecolor": CARD,
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.dpi": 170,
    "figure.facecolor": CARD,
    "figure.figsize": (8.6, 3.4),
    "font.size": 10,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "image.cmap": "weights",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.0,
    "savefig.facecolor": CARD,
    "text.color": INK,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
}


def use_style() -> None:
    """Set the house style; call once at the top of a chapter."""
    if "weights" not in mpl.colormaps:
        mpl.colormaps.register(WEIGHTS)
    mpl.rcParams.update(STYLE)


def picture(axes, image, **options):
    """An image without ticks or frame."""
    drawn = axes.imshow(image, interpolation="nearest", **options)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return drawn


def dress(figure, *, height: int = 420) -> None:
    """Plotly in the house style."""
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor=CARD,
        plot_bgcolor=CARD,
        colorway=list(PALETTE),
        font={"color": INK, "size": 13},
        margin={"l": 70, "r": 20, "t": 50, "b": 55},
    )


def slider(prefix: str, labels, *, active: int = 0) -> dict:
    """A Plotly slider that shows one group of traces per label.

    `labels` maps the text of each stop to the booleans that say which traces
    are visible there.
    """
    steps = [
        {
            "label": label,
            "method": "restyle",
            "args": ["visible", list(visible)],
        }
        for label, visible in labels.items()
    ]
    return {
        "active": active,
        "currentvalue": {"prefix": prefix, "font": {"size": 14}},
        "pad": {"t": 45},
        "bgcolor": FAINT,
        "bordercolor": FAINT,
        "steps": steps,
    }


def show(figure) -> None:
    """Display a Plotly figure: in the book, in JupyterLab, on Colab.

    Where a person is at the other end, Plotly knows best. Where the book is
    being built, the page loads plotly.min.js from the book itself, so that it
    moves without a network.
    """
    if "google.colab" in sys.modules or "JPY_SESSION_NAME" in os.environ:
        figure.show()
        return
    from IPython.display import HTML, display

    page = figure.to_html(
        full_html=False,
        include_plotlyjs="../_static/plotly.min.js",
        config={"displayModeBar": False, "responsive": True},
    )
    display(HTML(page))
