"""Draw the book's logo, favicon and front figure from real numbers: `python book/tools/draw.py`.

The figure is one head of causal attention with a distance prior, eight tokens long, as the four
choices see it.  Colours are CSS variables, so that it follows the page into the dark.
"""

import pathlib

import numpy as np

STATIC = pathlib.Path(__file__).parents[1] / "_static"
SIZE, WIDTH, CELL, GAP = 8, 6, 18, 2
PANEL = SIZE * (CELL + GAP) - GAP
NAMES = (
    ("score", "how alike are they?", "q·k / √H"),
    ("structure", "who may meet, how likely?", "causal, − m |i − j|"),
    ("normalise", "scores become weights", "softmax"),
    ("mix", "what is read out", "Σ w · v"),
)


def steps() -> list[np.ndarray]:
    """Scores, scores with mask and prior, weights, outputs: each as it is drawn, in [-1, 1]."""
    rng = np.random.default_rng(11)
    query, key, value = rng.normal(size=(3, SIZE, WIDTH))
    scores = query @ (key + 0.5 * query).T / np.sqrt(WIDTH)
    distance = np.arange(SIZE)[:, None] - np.arange(SIZE)[None, :]
    prior = np.where(distance >= 0, scores - 0.35 * distance, -np.inf)
    weights = np.exp(prior - prior.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    mixed = weights @ value
    finite = np.where(np.isfinite(prior), prior, np.nan)
    seen = np.where(distance >= 0, weights, np.nan)
    return [scores / np.abs(scores).max(), finite / np.nanmax(np.abs(finite)), seen,
            mixed / np.abs(mixed).max()]  # fmt: skip


def square(x: float, y: float, value: float, size: float, radius: float) -> str:
    """One cell: warm above zero, cool below, a dot where nothing may be seen."""
    if np.isnan(value):
        middle = size / 2
        return f'<circle cx="{x + middle:g}" cy="{y + middle:g}" r="1.6" class="void"/>'
    kind = "warm" if value >= 0 else "cool"
    opacity = 0.07 + 0.93 * abs(value) ** 0.8
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" rx="{radius:g}" '
        f'class="{kind}" opacity="{opacity:.2f}"/>'
    )


def panel(values: np.ndarray, left: float, top: float) -> str:
    """A matrix of cells, centred in a panel's width."""
    rows, columns = values.shape
    left += (PANEL - columns * (CELL + GAP) + GAP) / 2
    return "".join(
        square(left + j * (CELL + GAP), top + i * (CELL + GAP), values[i, j], CELL, 4)
        for i in range(rows)
        for j in range(columns)
    )


def hero() -> str:
    """The front figure: four drawings that stand in a row, or two by two where it is narrow."""
    steps_drawn = zip(NAMES, steps(), strict=True)
    label = "Attention as four choices: score, structure, normalise, mix"
    body = "\n".join(choice(*names, values) for names, values in steps_drawn)
    return f'<div class="hero" role="img" aria-label="{label}">\n{body}\n</div>\n'


def choice(name: str, question: str, formula: str, values: np.ndarray) -> str:
    """One of the four choices: its name, the question it answers, a matrix, a formula."""
    middle, margin = PANEL / 2, 16
    lines = [
        f'<text x="{middle:g}" y="16" class="name">{name}</text>',
        f'<text x="{middle:g}" y="34" class="question">{question}</text>',
        panel(values, 0, 48),
        f'<text x="{middle:g}" y="{PANEL + 72}" class="formula">{formula}</text>',
    ]
    box = f"{-margin} 0 {PANEL + 2 * margin} {PANEL + 82}"
    drawn = "\n".join(lines)
    return f'<svg viewBox="{box}" xmlns="http://www.w3.org/2000/svg">\n{drawn}\n</svg>'


def mark(background: str) -> str:
    """The logo: a causal triangle whose weights fade with distance."""
    size, cell, step = 4, 12, 14
    cells = []
    for i in range(size):
        for j in range(i + 1):
            colour = "#e8833a" if i == j else "#4f6bed"
            opacity = 1 if i == j else 0.92 * 0.62 ** (i - j - 1)
            cells.append(
                f'<rect x="{5 + j * step}" y="{5 + i * step}" width="{cell}" height="{cell}" '
                f'rx="3" fill="{colour}" opacity="{opacity:.2f}"/>'
            )
    body = "\n".join(cells)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" width="64" height="64">\n'
        f"{background}{body}\n</svg>\n"
    )


def main() -> None:
    """Write the three drawings."""
    STATIC.mkdir(exist_ok=True)
    plate = '<rect width="64" height="64" rx="12" fill="#10162b"/>\n'
    (STATIC / "hero.svg").write_text(hero(), "utf-8")
    (STATIC / "logo.svg").write_text(mark(""), "utf-8")
    (STATIC / "favicon.svg").write_text(mark(plate), "utf-8")


if __name__ == "__main__":
    main()
