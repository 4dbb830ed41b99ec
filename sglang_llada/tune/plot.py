"""Figures as an SVG: quality against answers a second, one panel for each number at once, in light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from sglang_llada.tune.figures import Figures, unbeaten
from sglang_llada.view.draw import EDGE, STYLE, colour, fitting

WIDE, HIGH, LEFT, BELOW = 420, 260, 56, 44  # pixels: of a panel, and what its axes' labels take
GRID = ".grid { fill: none; stroke: #5b5f6b; stroke-opacity: .25; }"
LINE, RADIUS = 20, 9  # pixels: of a line of the key, of a point


def svg(rows: Sequence[Figures], title: str) -> str:
    """The picture. A point is numbered as its setting in the key; a line joins those that nothing beats."""
    settings = list(dict.fromkeys(row.name for row in rows))
    panels = list(dict.fromkeys(row.at_once for row in rows))
    width = EDGE + len(panels) * (LEFT + WIDE + EDGE)
    top = 2 * EDGE + 26
    key = top + HIGH + BELOW + EDGE
    height = key + math.ceil(len(settings) / 2) * LINE + EDGE
    body = [
        f'<text x="{EDGE}" y="{EDGE + 14}" font-size="16" font-weight="600">{escape(fitting(title, width, 16))}</text>'
    ]
    for i, at_once in enumerate(panels):
        here = [row for row in rows if row.at_once == at_once]
        body += panel(here, EDGE + LEFT + i * (LEFT + WIDE + EDGE), top + LINE, settings)
    for i, name in enumerate(settings):
        x, y = EDGE + i % 2 * (width - EDGE) / 2, key + i // 2 * LINE
        body += point(x + RADIUS, y + RADIUS, i, len(settings))
        text = escape(fitting(name, width / 2 - 3 * RADIUS - EDGE, 13))
        body.append(f'<text x="{x + 3 * RADIUS:g}" y="{y + RADIUS + 4:g}" font-size="13">{text}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:g}" viewBox="0 0 {width} {height:g}"'
        f' role="img"><title>{escape(title)}</title>\n<style>{STYLE}{GRID}</style>\n'
        f'<rect class="back" width="100%" height="100%" rx="12"/>\n{chr(10).join(body)}\n</svg>\n'
    )


def panel(rows: Sequence[Figures], left: float, top: float, settings: Sequence[str]) -> Iterator[str]:
    """One panel: axes, the line of what nothing beats, points."""
    across, up = ticks([row.answers for row in rows]), ticks([100 * row.quality for row in rows])

    def place(row: Figures) -> tuple[float, float]:
        x = left + WIDE * (row.answers - across[0]) / (across[-1] - across[0])
        y = top + HIGH - HIGH * (100 * row.quality - up[0]) / (up[-1] - up[0])
        return x, y

    yield text(left, top - 14, f"{rows[0].at_once} at once", "start")
    for at in across:
        x = left + WIDE * (at - across[0]) / (across[-1] - across[0])
        yield f'<path class="grid" d="M{x:g} {top:g}v{HIGH}"/>' + text(x, top + HIGH + 16, f"{at:g}", "middle")
    for at in up:
        y = top + HIGH - HIGH * (at - up[0]) / (up[-1] - up[0])
        yield f'<path class="grid" d="M{left:g} {y:g}h{WIDE}"/>' + text(left - 6, y + 4, f"{at:g}", "end")
    yield text(left + WIDE, top + HIGH + 34, "answers a second", "end")
    what = "right answers, %" if rows[0].right is not None else "tokens of the most careful setting's answers, %"
    yield text(left + WIDE, top - 14, what, "end")
    best = sorted(unbeaten(rows), key=lambda row: row.answers)
    line = " ".join(f"{x:g},{y:g}" for x, y in map(place, best))
    yield f'<polyline class="ring" points="{line}"/>'
    for row in rows:
        yield from point(*place(row), settings.index(row.name), len(settings))


def point(x: float, y: float, index: int, count: int) -> Iterator[str]:
    """A numbered point, in the colour of its setting."""
    red, green, blue = colour(0.75 * index / max(count - 1, 1))
    ink = "#000" if green > 140 else "#fff"
    yield f'<circle cx="{x:g}" cy="{y:g}" r="{RADIUS}" fill="rgb({red} {green} {blue})"/>'
    yield f'<text class="t" x="{x:g}" y="{y + 4:g}" font-size="11" style="fill:{ink}">{index + 1}</text>'


def text(x: float, y: float, what: str, anchor: str) -> str:
    """A label of an axis."""
    return f'<text class="dim" x="{x:g}" y="{y:g}" font-size="12" text-anchor="{anchor}">{escape(what)}</text>'


def ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, evenly apart, with all values between the first and the last."""
    high = max(values)
    low = min(*values, 0.95 * high)  # what is equal is not drawn as if it differed
    rough = (high - low or 1) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * each for each in (1, 2, 5, 10) if unit * each >= rough)
    first, last = math.floor(low / step), math.ceil(round(high / step, 9))
    return [step * at for at in range(first, max(last, first + 1) + 1)]
