"""Chapter 12's film: which device computes which tile, and who waits.

One SVG that moves by CSS alone. It stands still, finished, for readers who
ask for less motion, and stops while one points at it.
"""

import numpy as np

from plotting import BLUE, CARD, FAINT, GREEN, GREY, INK, ORANGE, VERMILLION

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE)
DEVICES, HALVES, CELL = 4, 8, 27
CLOCK, PAUSE = 14, 3  # units of time on the screen, then the end for a while
UNIT = 208 / CLOCK


def parts_of(layout: str, device: int) -> tuple[int, int]:
    """The two half-parts, of eight, that a device holds."""
    if layout == "contiguous":
        return 2 * device, 2 * device + 1
    return device, HALVES - 1 - device


def schedule(layout: str) -> list[tuple]:
    """(device, hop, row, column, start, end) of each live tile."""
    found, clock = [], 0.0
    for hop in range(DEVICES):
        ends = []
        for device in range(DEVICES):
            now = clock
            visitor = (device - hop) % DEVICES
            for row in parts_of(layout, device):
                for column in parts_of(layout, visitor):
                    if column <= row:
                        end = now + (0.5 if column == row else 1.0)
                        found.append((device, hop, row, column, now, end))
                        now = end
            ends.append(now)
        clock = max(ends)
    return found


def film() -> str:
    """The two layouts side by side, as HTML."""
    body, names = [], {}
    for x, layout, title in (
        (58, "contiguous", "contiguous"),
        (380, "zigzag", "zig-zag"),
    ):
        body += _panel(x, title, layout, schedule(layout), names)
    whole = CLOCK + PAUSE
    frames = [
        f"@keyframes {name}{{0%,{100 * start / whole:.2f}%{{opacity:0}}"
        f"{100 * end / whole:.2f}%,99.5%{{opacity:1}}100%{{opacity:0}}}}"
        f".{name}{{animation:{name} {whole}s linear infinite}}"
        for (start, end), name in names.items()
    ]
    frames.append(
        f"@keyframes ring-now{{0%{{transform:none}}{100 * CLOCK / whole:.2f}%,"
        f"100%{{transform:translateX({CLOCK * UNIT:.1f}px)}}}}"
        f".ring-now{{animation:ring-now {whole}s linear infinite}}"
    )
    style = (
        f".ring-film{{background:{CARD};font:12px sans-serif}}"
        f".ring-film text{{fill:{INK}}}.ring-film .light{{fill:#fff}}"
        + ".ring-film:hover *{animation-play-state:paused!important}"
        + "@media (prefers-reduced-motion:reduce)"
        + "{.ring-film *{animation:none!important}}"
        + "".join(frames)
    )
    label = "Two rings of four devices computing causal attention tile by tile"
    return (
        f'<svg class="ring-film" viewBox="0 0 640 416" width="100%" '
        f'role="img" aria-label="{label}"><style>{style}</style>'
        + _hatching()
        + "".join(body)
        + "</svg>"
    )


def _hatching() -> str:
    return (
        '<defs><pattern id="ring-wait" width="5" height="5" '
        'patternTransform="rotate(45)" patternUnits="userSpaceOnUse">'
        f'<path d="M0 0V5" stroke="{GREY}" stroke-width="1.4"/>'
        "</pattern></defs>"
    )


def _panel(x, title, layout, tiles, names) -> list[str]:
    top, side = 54, HALVES * CELL
    held = {p: d for d in range(DEVICES) for p in parts_of(layout, d)}
    out = [
        f'<text x="{x}" y="20" font-size="15" font-weight="600">{title}'
        "</text>",
        f'<text x="{x + side}" y="36" text-anchor="end" font-size="11">'
        "keys, early to late</text>",
        f'<text transform="translate({x - 22},{top + side})rotate(-90)" '
        'font-size="11">queries, late to early</text>',
    ]
    for part, device in held.items():
        at, fill = part * CELL, f'fill="{COLOURS[device]}"'
        out.append(
            f'<rect x="{x + at + 1}" y="{top - 11}" width="{CELL - 2}" '
            f'height="7" {fill}/><rect x="{x - 14}" y="{top + at + 1}" '
            f'width="7" height="{CELL - 2}" {fill}/>'
        )
    for device, hop, row, column, start, end in tiles:
        left, upper = x + column * CELL, top + row * CELL
        size, shape = CELL - 1, "M{0} {1}h{2}v{2}h-{2}z"
        if row == column:
            shape = "M{0} {1}l{2} {2}h-{2}z"
        path = shape.format(left, upper, size)
        name = names.setdefault((start, end), f"ring-{len(names)}")
        shift = (0.5, 0.66) if row != column else (0.28, 0.86)
        out.append(
            f'<path d="{path}" fill="{FAINT}"/><g class="{name}">'
            f'<path d="{path}" fill="{COLOURS[device]}"/>'
            + _number(left + shift[0] * size, upper + shift[1] * size, hop)
            + "</g>"
        )
    return out + _times(x, top + side + 24, tiles, names)


def _times(x, y, tiles, names) -> list[str]:
    """Below: each device's time, hop by hop; hatched where it waits."""
    out, row = [], 24
    hops = np.zeros((DEVICES, DEVICES, 2))  # device, hop: start and end
    begins = [min(t[4] for t in tiles if t[1] == h) for h in range(DEVICES)]
    ends = [max(t[5] for t in tiles if t[1] == h) for h in range(DEVICES)]
    for device in range(DEVICES):
        for hop in range(DEVICES):
            mine = [t[5] for t in tiles if t[:2] == (device, hop)]
            hops[device, hop] = begins[hop], max(mine, default=begins[hop])
    for device, spans in enumerate(hops):
        low = y + device * row
        out.append(
            f'<text x="{x - 8}" y="{low + 14}" text-anchor="end" '
            f'font-size="11">{device}</text>'
        )
        for hop, (start, end) in enumerate(spans):
            if end > start:
                name = names.setdefault((start, end), f"ring-{len(names)}")
                out.append(
                    f'<g class="{name}">'
                    + _bar(x, low, start, end, COLOURS[device])
                    + _number(x + (start + end) / 2 * UNIT, low + 14, hop)
                    + "</g>"
                )
            if ends[hop] > end:
                wait = names.setdefault((end, ends[hop]), f"ring-{len(names)}")
                fill = _bar(x, low, end, ends[hop], "url(#ring-wait)")
                out.append(f'<g class="{wait}">{fill}</g>')
    done, bottom = ends[-1], y + DEVICES * row
    name = names.setdefault((done - 0.01, done), f"ring-{len(names)}")
    out.append(
        f'<path d="M{x} {bottom + 2}h{CLOCK * UNIT:.0f}" stroke="{GREY}"/>'
        f'<path class="ring-now" d="M{x} {y - 6}V{bottom + 2}" '
        f'stroke="{INK}"/>'
        f'<text class="{name}" x="{x + done * UNIT:.1f}" y="{bottom + 18}" '
        f'text-anchor="end" font-size="11">done after {done:g}</text>'
    )
    return out


def _bar(x, y, start, end, fill) -> str:
    return (
        f'<rect x="{x + start * UNIT + 0.5:.1f}" y="{y}" '
        f'width="{(end - start) * UNIT - 1:.1f}" height="19" fill="{fill}"/>'
    )


def _number(x, y, hop) -> str:
    return (
        f'<text class="light" x="{x:.1f}" y="{y:.1f}" text-anchor="middle" '
        f'font-size="11">{hop}</text>'
    )
