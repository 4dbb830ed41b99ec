"""Traces as pictures: shapes of each frame, and from them an SVG that plays by itself, in the reader's light or dark.

An SVG holds each shape once, with the frames in which it is seen; who wants no motion sees the last frame. Two traces
stand side by side and keep step, as on the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from sglang_llada.view.ask import Trace

COLUMNS = 16  # positions in a row of a picture
CELL, HIGH, GAP, EDGE = 46, 26, 4, 16  # pixels: a position's width, its height, between two, around all
PACE, HOLD = 0.6, 3.0  # seconds of a frame, and of the last one
TEXTS = {"title": (16, True), "counts": (14, True), "label": (12, False)}  # a line's size in pixels; whether it is bold
# Viridis without its darkest end, as on the page: the order in which tokens came, in growing lightness.
VIRIDIS = [(72, 36, 117), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)]
VISIBLE = {ord(" "): "␣", ord("\n"): "↵", ord("\t"): "⇥"} | {c: "�" for c in range(32) if c not in (9, 10)}


@dataclass(frozen=True, slots=True)
class Shape:
    """Something with a place in a picture.

    Attributes:
        kind: a position as it stands ("open", "given", "decided"), "ring" around what a step wrote, "block" around one,
            or a line of text ("title", "counts", "label").
        x, y, width, height: its box; of a text, where it begins and how wide it may be.
        text: what is written in it.
        colour: of what is decided.
        confidence: of what is decided, 0 to 1.
        edited, inserted: marks.
    """

    kind: str
    x: float
    y: float
    width: float
    height: float = HIGH
    text: str = ""
    colour: tuple[int, int, int] | None = None
    confidence: float | None = None
    edited: bool = False
    inserted: bool = False

    @property
    def letters(self) -> tuple[int, str]:
        """Size in pixels, and as much of the text as fits in a position."""
        size = 12 if len(self.text) <= 5 else 9
        return size, fitting(self.text, self.width - 4, size)

    @property
    def ink(self) -> str:
        """Black or white, whatever contrasts more with its colour."""
        assert self.colour is not None
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in self.colour]
        light = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
        return "#000" if (light + 0.05) ** 2 > 0.0525 else "#fff"


@dataclass(frozen=True, slots=True)
class Picture:
    """A size in pixels, and the shapes of each frame."""

    width: float
    height: float
    frames: list[list[Shape]]


def picture(traces: list[Trace]) -> Picture:
    """The picture of one trace, or of several side by side."""
    columns = max(COLUMNS // len(traces), 4)
    width = columns * (CELL + GAP) + 2 * EDGE - GAP
    longest = max([4, *(steps for trace in traces for frame in trace["frames"] for _, steps in frame["steps"])])
    drawings = [Drawing(trace, i * width, columns, longest) for i, trace in enumerate(traces)]
    count = max(len(trace["frames"]) for trace in traces)
    frames = [[shape for drawing in drawings for shape in drawing.shapes(at)] for at in range(count)]
    height = max(shape.y + shape.height for shapes in frames for shape in shapes)
    key = list(scale(longest, height + EDGE))
    return Picture(width * len(traces), height + EDGE + HIGH + EDGE, [[*shapes, *key] for shapes in frames])


def scale(longest: int, y: float) -> Iterator[Shape]:
    """What the colours mean."""
    yield Shape("label", EDGE, y + 5, 210, 16, "decided in step of its block")
    stride = math.ceil(longest / 8)
    x: float = EDGE + 180
    for step in range(1, longest + 1, stride):
        yield Shape("decided", x, y, CELL, HIGH, str(step), colour((step - 1) / (longest - 1)))
        x += CELL + GAP
    yield Shape("decided", x + EDGE, y, CELL + EDGE, HIGH, "edited", colour(0), edited=True)
    yield Shape("decided", x + CELL + 2 * EDGE + GAP, y, CELL + EDGE, HIGH, "inserted", colour(0), inserted=True)


class Drawing:
    """The shapes of one trace, from a place on."""

    def __init__(self, trace: Trace, x: float, columns: int, longest: int) -> None:
        self.trace, self.x, self.columns, self.longest = trace, x + EDGE, columns, longest
        self.size, self.given = trace["block_size"], len(trace["given"])
        self.wide = columns * (CELL + GAP) - GAP
        self.cells: list[list[dict[str, Any]]] = []  # of each frame, those of the whole answer
        for frame in trace["frames"]:
            self.cells.append([*(self.cells[-1][: frame["first"]] if self.cells else []), *frame["cells"]])

    def shapes(self, at: int) -> Iterator[Shape]:
        """Those of a frame; behind the last one it stays as it is."""
        frame, cells = self.trace["frames"][min(at, len(self.cells) - 1)], self.cells[min(at, len(self.cells) - 1)]
        tokens = sum("token" in cell for cell in cells)
        settings = [
            self.trace["algorithm"],
            *(f"{k} {v}" for k, v in self.trace["custom_params"].items() if k != "algorithm"),
        ]
        yield Shape("title", self.x, EDGE, self.wide, 20, self.trace["messages"][-1]["content"])
        yield Shape("label", self.x, EDGE + 22, self.wide, 16, ", ".join(settings))
        counts = f"step {frame['step']} of {self.trace['steps']}, {frame['forwards']} forwards, {tokens} tokens"
        yield Shape("counts", self.x, EDGE + 44, self.wide, 18, counts)
        steps = dict(frame["steps"])
        for block in range(math.ceil((len(cells) + self.given) / self.size)):
            y = EDGE + 76 + block * (math.ceil(self.size / self.columns) * (HIGH + GAP) + 26)
            yield Shape("label", self.x, y, self.wide, 16, f"block {block + 1}")
            for k in range(self.size):
                position = block * self.size + k - self.given
                if position < len(cells):
                    yield from self.position(position, k, y + 18, cells, steps.get(block))

    def position(
        self, position: int, k: int, y: float, cells: list[dict[str, Any]], step: int | None
    ) -> Iterator[Shape]:
        """Those of one position, the k-th of its block, whose step was the `step`-th of the block."""
        x = self.x + k % self.columns * (CELL + GAP)
        y += k // self.columns * (HIGH + GAP)
        if position < 0:
            yield Shape("given", x, y, CELL, text=self.text(self.trace["given"][position]))
            return
        cell = cells[position]
        marks = {"edited": bool(cell.get("was")), "inserted": cell.get("inserted", False)}
        if "token" not in cell:
            yield Shape("open", x, y, CELL, **marks)
            return
        fill = colour((cell["step"] - 1) / (self.longest - 1))
        sure = None if cell.get("confidence") is None else round(cell["confidence"], 2)
        yield Shape("decided", x, y, CELL, HIGH, self.text(cell["token"]), fill, sure, **marks)
        if cell["step"] == step:
            yield Shape("ring", x, y, CELL)

    def text(self, token: int) -> str:
        """A token's, spaces at its ends and control characters made visible."""
        text: str = self.trace["texts"].get(str(token), f"#{token}")
        inner = text.strip(" ")
        before = len(text) - len(text.lstrip(" ")) if inner else len(text)
        after = len(text) - len(inner) - before
        return "␣" * before + inner.translate({c: to for c, to in VISIBLE.items() if c != ord(" ")}) + "␣" * after


def colour(share: float) -> tuple[int, int, int]:
    """The colour at a place of the scale, 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(VIRIDIS[low], VIRIDIS[low + 1], strict=True))
    return red, green, blue


def fitting(text: str, width: float, size: float) -> str:
    """As much of a text as fits in a width, in letters of a size that are 0.6 of it wide."""
    most = int(width / (0.6 * size))
    return text if len(text) <= most else text[: most - 1] + "…"


# --- SVG --------------------------------------------------------------------------------------------------------------

STYLE = """
text { font-family: system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif; fill: #1b1c22; }
.t { font-family: ui-monospace, Menlo, 'DejaVu Sans Mono', monospace; text-anchor: middle; }
.dim, .dim .t { fill: #5b5f6b; } .back { fill: #fff; } .given { fill: #ecedf1; }
.open { fill: none; stroke: #5b5f6b; stroke-dasharray: 3 3; } .ring { fill: none; stroke: #1b1c22; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
text, .ring { fill: #e9eaef; } .ring { fill: none; stroke: #e9eaef; } .dim, .dim .t { fill: #a2a7b4; }
.back { fill: #1a1c22; } .given { fill: #24272f; } .open { stroke: #a2a7b4; }
}
@media (prefers-reduced-motion: reduce) { g { animation: none !important; } }
"""


def svg(traces: list[Trace]) -> str:
    """The picture of traces as an SVG that plays for ever."""
    drawn = picture(traces)
    count = len(drawn.frames)
    seen: dict[Shape, list[int]] = {}
    for at, shapes in enumerate(drawn.frames):
        for shape in shapes:
            seen.setdefault(shape, []).append(at)
    styles, body = list[str](), list[str]()
    for when, group in groupby(sorted(seen, key=lambda shape: seen[shape]), key=lambda shape: seen[shape]):
        drawing = "".join(map(svg_of, group))
        if len(when) < count:
            styles.append(keyframes(f"f{len(styles)}", when, count))
            drawing = f'<g class="f{len(styles) - 1}">{drawing}</g>'
        body.append(drawing)
    asked = escape("; ".join(trace["messages"][-1]["content"] for trace in traces))
    size = f'width="{drawn.width:g}" height="{drawn.height:g}" viewBox="0 0 {drawn.width:g} {drawn.height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>How an answer is decided: {asked}</title>\n'
        f"<style>{STYLE}{chr(10).join(styles)}</style>\n"
        f'<rect class="back" width="100%" height="100%" rx="12"/>\n{chr(10).join(body)}\n</svg>\n'
    )


def keyframes(name: str, when: list[int], count: int) -> str:
    """The animation of what is seen in some of the frames."""
    whole, shown = (count - 1) * PACE + HOLD, set(when)
    seen = [at in shown for at in range(count)]
    changes = [at for at in range(count) if at == 0 or seen[at] != seen[at - 1]]
    lines = (f"{at * PACE / whole * 100:.4g}%{{opacity:{seen[at]:d}}}" for at in changes)
    rule = f".{name}{{opacity:{seen[-1]:d};animation:{name} {whole:g}s step-end infinite}}"
    return f"{rule}@keyframes {name}{{{''.join(lines)}}}"


def svg_of(shape: Shape) -> str:
    """One shape."""
    x, y, wide, high = shape.x, shape.y, shape.width, shape.height
    box = f'x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}" rx="5"'
    if shape.kind in TEXTS:
        size, bold = TEXTS[shape.kind]
        how = f'font-size="{size}" ' + ('font-weight="600"' if bold else 'class="dim"')
        return f'<text x="{x:g}" y="{y + size:g}" {how}>{escape(fitting(shape.text, wide, size))}</text>'
    if shape.kind == "ring":
        return f'<rect class="ring" {box}/>'
    size, label = shape.letters
    text = f'<text class="t" x="{x + wide / 2:g}" y="{y + 15:g}" font-size="{size}"'
    marks = ""
    ink = shape.ink if shape.colour else "#888"
    if shape.edited:
        marks += f'<path fill="{ink}" d="M{x + wide - 11:g} {y + 3:g}h8v8z"/>'
    if shape.inserted:
        marks += f'<path stroke="{ink}" stroke-width="2" d="M{x + 4:g} {y + 6:g}h6m-3-3v6"/>'
    if shape.kind == "open":
        return f'<rect class="open" {box}/>{marks}'
    if shape.kind == "given":
        return f'<g class="dim"><rect class="given" {box}/>{text}>{escape(label)}</text></g>'
    if shape.confidence is not None:
        bar = f'x="{x + 4:g}" y="{y + 20:g}" width="{(wide - 8) * shape.confidence:g}" height="3" rx="1.5"'
        marks += f'<rect fill="{ink}" opacity=".6" {bar}/>'
    rgb = "#%02x%02x%02x" % (shape.colour or (0, 0, 0))
    return f'<rect fill="{rgb}" {box}/>{text} style="fill:{ink}">{escape(label)}</text>{marks}'
