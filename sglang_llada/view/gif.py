"""Traces as an animated GIF, in light colours, with Pillow, which the host brings."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from sglang_llada.errors import ConfigError
from sglang_llada.view.ask import Trace
from sglang_llada.view.draw import HOLD, PACE, TEXTS, Shape, picture

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

SCALE = 2  # pixels of the file by those of the picture
INK, DIM, SOFT = "#1b1c22", "#5b5f6b", "#ecedf1"
FONTS = {True: "DejaVuSans-Bold.ttf", False: "DejaVuSans.ttf", None: "DejaVuSansMono.ttf"}  # bold, plain, positions


def gif(traces: list[Trace]) -> bytes:
    """The picture of traces as a GIF that plays for ever; ConfigError if there is no Pillow."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ConfigError(
            "a .gif is drawn with Pillow, which is not installed; use .svg, or `pip install pillow`"
        ) from error
    drawn = picture(traces)
    images = []
    for shapes in drawn.frames:
        image = Image.new("RGB", (round(drawn.width * SCALE), round(drawn.height * SCALE)), "white")
        pen = ImageDraw.Draw(image)
        for shape in shapes:
            draw(pen, shape)
        images.append(image)
    out = io.BytesIO()
    lasts = [round(PACE * 1000)] * (len(images) - 1) + [round(HOLD * 1000)]
    images[0].save(out, "GIF", save_all=True, append_images=images[1:], duration=lasts, loop=0)
    return out.getvalue()


def draw(pen: ImageDraw, shape: Shape) -> None:
    """One shape."""
    x, y, right, end = (SCALE * each for each in (shape.x, shape.y, shape.x + shape.width, shape.y + shape.height))
    box, radius = (x, y, right, end), 5 * SCALE
    if shape.kind in TEXTS:
        size, bold = TEXTS[shape.kind]
        pen.text((x, y), shape.text, INK if bold else DIM, font(bold, size))
    elif shape.kind == "ring":
        pen.rounded_rectangle(box, radius, outline=INK, width=2 * SCALE)
    elif shape.kind == "open":
        pen.rounded_rectangle(box, radius, outline=DIM)
    else:
        ink = shape.ink if shape.colour else DIM
        pen.rounded_rectangle(box, radius, fill=shape.colour or SOFT)
        size, label = shape.letters
        pen.text(((x + right) / 2, y + 11 * SCALE), label, ink, font(None, size), anchor="mm")
        if shape.confidence is not None:
            bar = (shape.width - 8) * shape.confidence * SCALE
            pen.rectangle((x + 4 * SCALE, y + 20 * SCALE, x + 4 * SCALE + bar, y + 23 * SCALE - 1), fill=ink)
    mark(pen, shape, x, y, right)


def mark(pen: ImageDraw, shape: Shape, x: float, y: float, right: float) -> None:
    """A corner where something was edited, a plus where something was inserted."""
    ink = shape.ink if shape.colour else DIM
    if shape.edited:
        pen.polygon(
            [
                (right - 11 * SCALE, y + 3 * SCALE),
                (right - 3 * SCALE, y + 3 * SCALE),
                (right - 3 * SCALE, y + 11 * SCALE),
            ],
            fill=ink,
        )
    if shape.inserted:
        pen.text((x + 3 * SCALE, y), "+", ink, font(True, 10))


def font(bold: bool | None, size: int) -> Any:
    """DejaVu's where it is installed, else what Pillow has."""
    from PIL import ImageFont

    try:
        return ImageFont.truetype(FONTS[bold], size * SCALE)
    except OSError:
        return ImageFont.load_default(size * SCALE)
