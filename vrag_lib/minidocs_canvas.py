"""The drawing surface of MiniDocs: a page is a list of shapes and texts that can be painted or printed.

A page is laid out once, in raw page pixels, with the metrics of the fonts that come with matplotlib. `Canvas.image`
paints the list with Pillow (fast enough to draw training pages while training), `minidocs_pdf` prints the same list
as a vector PDF with a real text layer. Every text keeps the box of its ink, so the truth about where something
stands is a by-product of drawing it, not a guess made afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vrag_lib.geometry import Box, Size

Colour = tuple[int, int, int]
Point = tuple[float, float]

FACES = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-bold": "DejaVuSerif-Bold.ttf",
}
"""Typefaces of MiniDocs; all come with matplotlib under a free licence."""

_SMOOTH = 3
"""Polygons and lines are painted this much larger and reduced, which smooths their edges."""


@dataclass(frozen=True)
class Font:
    """A face of `FACES` at a size: its em height in raw page pixels."""

    face: str
    px: int


@dataclass(frozen=True)
class Text:
    """A run of text: `x` is its left edge, `baseline` the y its letters stand on, `box` encloses its ink."""

    string: str
    x: float
    baseline: float
    font: Font
    colour: Colour
    box: Box
    width: float


@dataclass(frozen=True)
class Rectangle:
    """A box with a fill, an outline, or both; `radius` rounds its corners."""

    box: Box
    fill: Colour | None
    outline: Colour | None
    line_width: int
    radius: float


@dataclass(frozen=True)
class Polygon:
    """A filled polygon."""

    points: tuple[Point, ...]
    fill: Colour


@dataclass(frozen=True)
class Polyline:
    """A stroke through points."""

    points: tuple[Point, ...]
    colour: Colour
    width: float


Item = Text | Rectangle | Polygon | Polyline


@functools.cache
def font_path(face: str) -> Path:
    """The TrueType file of a face."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FACES[face]


@functools.cache
def _pillow_font(font: Font) -> ImageFont.FreeTypeFont:
    # The basic layout engine exists in every Pillow build and gives the same advances in all of them.
    return ImageFont.truetype(str(font_path(font.face)), font.px, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=1 << 15)
def _metrics(string: str, font: Font) -> tuple[float, tuple[float, float, float, float]]:
    pillow = _pillow_font(font)
    return pillow.getlength(string), pillow.getbbox(string, anchor="ls")


@functools.lru_cache(maxsize=1 << 13)
def _ink(string: str, font: Font) -> tuple[Image.Image, int, int]:
    """The grey image of a text's ink and the offset of its top left corner from the start of the baseline."""
    x1, y1, x2, y2 = (round(v) for v in _metrics(string, font)[1])
    ink = Image.new("L", (max(1, x2 - x1), max(1, y2 - y1)))
    ImageDraw.Draw(ink).text((-x1, -y1), string, fill=255, font=_pillow_font(font), anchor="ls")
    return ink, x1, y1


def text_width(string: str, font: Font) -> float:
    """How far a text advances, in raw pixels."""
    return _metrics(string, font)[0]


def cap_height(font: Font) -> float:
    """Height of a capital letter above the baseline, in raw pixels."""
    return -_metrics("H", font)[1][1]


def wrap(string: str, font: Font, width: float) -> list[str]:
    """The words of `string` in lines no wider than `width`; a single word wider than that gets its own line."""
    lines: list[str] = []
    for word in string.split():
        if lines and text_width(f"{lines[-1]} {word}", font) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def arc(centre: Point, radius: float, start: float, end: float) -> list[Point]:
    """Points of a circle's arc from angle `start` to `end`, radians clockwise from the top, 4 degrees apart."""
    steps = max(2, math.ceil(abs(end - start) / math.radians(4)))
    angles = [start + (end - start) * i / steps for i in range(steps + 1)]
    return [(centre[0] + radius * math.sin(a), centre[1] - radius * math.cos(a)) for a in angles]


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box around boxes of one frame.

    >>> union([Box(0, 0, 1, 1), Box(2, 1, 3, 4)])
    Box(x1=0, y1=0, x2=3, y2=4)
    """
    return Box(min(b.x1 for b in boxes), min(b.y1 for b in boxes), max(b.x2 for b in boxes), max(b.y2 for b in boxes))


class Canvas:
    """A page being laid out. Coordinates are raw page pixels, origin top left."""

    def __init__(self, size: Size, background: Colour):
        self.size = size
        self.background = background
        self.items: list[Item] = []

    @property
    def texts(self) -> list[Text]:
        """Every run of text, in the order it was set."""
        return [item for item in self.items if isinstance(item, Text)]

    def rectangle(
        self,
        box: Box,
        fill: Colour | None = None,
        outline: Colour | None = None,
        line_width: int = 1,
        radius: float = 0,
    ) -> None:
        whole = Box(round(box.x1), round(box.y1), round(box.x2), round(box.y2))
        self.items.append(Rectangle(whole, fill, outline, line_width, radius))

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        self.items.append(Polygon(tuple(points), fill))

    def polyline(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        self.items.append(Polyline(tuple(points), colour, width))

    def text(self, x: float, baseline: float, string: str, font: Font, colour: Colour, align: str = "left") -> Box:
        """Set one run of text; `x` is its left edge, centre or right edge by `align`. Returns the box of its ink."""
        width, bbox = _metrics(string, font)
        left = round(x - width * {"left": 0.0, "centre": 0.5, "right": 1.0}[align])
        baseline = round(baseline)
        box = Box(left + bbox[0], baseline + bbox[1], left + bbox[2], baseline + bbox[3])
        self.items.append(Text(string, left, baseline, font, colour, box, width))
        return box

    def bottom(self, start: int) -> float:
        """The lowest y that the items from index `start` on reach."""
        lows = []
        for item in self.items[start:]:
            lows.append(max(y for _, y in item.points) if isinstance(item, Polygon | Polyline) else item.box.y2)
        return max(lows)

    def image(self) -> Image.Image:
        """Paint the page; RGB, of `size`."""
        page = Image.new("RGB", (self.size.width, self.size.height), self.background)
        draw = ImageDraw.Draw(page)
        for item in self.items:
            if isinstance(item, Text):
                ink, dx, dy = _ink(item.string, item.font)
                draw.bitmap((item.x + dx, item.baseline + dy), ink, fill=item.colour)
            elif isinstance(item, Rectangle):
                _paint_rectangle(draw, item)
            else:
                _paint_smooth(page, item)
        return page


def _paint_rectangle(draw: ImageDraw.ImageDraw, item: Rectangle) -> None:
    corners = (item.box.x1, item.box.y1, item.box.x2 - 1, item.box.y2 - 1)
    width = item.line_width if item.outline else 0
    if item.radius:
        draw.rounded_rectangle(corners, item.radius, item.fill, item.outline, width)
    else:
        draw.rectangle(corners, item.fill, item.outline, width)


def _paint_smooth(page: Image.Image, item: Polygon | Polyline) -> None:
    margin = 1 + (item.width if isinstance(item, Polyline) else 0)
    left = math.floor(min(x for x, _ in item.points) - margin)
    top = math.floor(min(y for _, y in item.points) - margin)
    right = math.ceil(max(x for x, _ in item.points) + margin)
    bottom = math.ceil(max(y for _, y in item.points) + margin)
    mask = Image.new("L", ((right - left) * _SMOOTH, (bottom - top) * _SMOOTH))
    points = [((x - left) * _SMOOTH, (y - top) * _SMOOTH) for x, y in item.points]
    if isinstance(item, Polygon):
        ImageDraw.Draw(mask).polygon(points, fill=255)
        colour = item.fill
    else:
        ImageDraw.Draw(mask).line(points, fill=255, width=round(item.width * _SMOOTH), joint="curve")
        colour = item.colour
    page.paste(colour, (left, top), mask.reduce(_SMOOTH))
