"""What MiniDocs look like: layout families and palettes, and which of them belong to which split.

A layout family is a combination of page format, header, table ruling, fonts and chart habits. Families and palettes
of validation and test are unseen in training, but every single habit is seen there in another combination: what is
tested is a new layout, not a thing never met.
"""

from __future__ import annotations

import colorsys
import functools
from dataclasses import dataclass

from vrag_lib.geometry import Box, Size
from vrag_lib.minidocs_canvas import Colour, Font, text_width
from vrag_lib.minidocs_content import SPLITS

FORMATS = ("slide", "report")
HEADERS = ("band", "rule", "side", "foot")
RULINGS = ("grid", "lines", "zebra", "boxed")
_FONTS = (("sans", "sans-bold"), ("serif", "serif-bold"), ("sans", "serif-bold"))
_DARK = (5, 12)  # palettes with light text on a dark page; both are training palettes


@dataclass(frozen=True)
class Family:
    """One way of laying out pages."""

    name: str
    format: str
    header: str
    ruling: str
    body_face: str
    heading_face: str
    centred: bool
    rounded: bool
    donut: bool
    horizontal_bars: bool


@dataclass(frozen=True)
class Palette:
    """Colours of one design: page, text, small print, hairlines, header, panels and the series of charts."""

    name: str
    page: Colour
    text: Colour
    small: Colour
    hairline: Colour
    primary: Colour
    on_primary: Colour
    panel: Colour
    series: tuple[Colour, ...]


@functools.cache
def families(split: str) -> tuple[Family, ...]:
    """The layout families of a split: 24 in train, 2 in validation, 6 in test."""
    found = []
    for f, format_ in enumerate(FORMATS):
        for h, header in enumerate(HEADERS):
            for r, ruling in enumerate(RULINGS):
                held_out = (h + r) % len(HEADERS) == 3
                owner = "train" if not held_out else "validation" if h == 0 else "test"
                if owner == split:
                    body, heading = _FONTS[(f + h + 2 * r) % len(_FONTS)]
                    found.append(
                        Family(
                            name=f"{format_}-{header}-{ruling}",
                            format=format_,
                            header=header,
                            ruling=ruling,
                            body_face=body,
                            heading_face=heading,
                            centred=(h + r + f) % 2 == 1,
                            rounded=(h + r // 2) % 2 == 1,
                            donut=(r + f) % 2 == 1,
                            horizontal_bars=(h + f) % 2 == 1,
                        )
                    )
    return tuple(found)


@functools.cache
def palettes(split: str) -> tuple[Palette, ...]:
    """The palettes of a split: 10 in train, 2 in validation, 4 in test; hues interleave."""
    owners = ["train", "test", "train", "train", "validation", "train", "test", "train"] * 2
    return tuple(_palette(i) for i, owner in enumerate(owners) if owner == split)


def _palette(index: int) -> Palette:
    hue = index / 16

    def hsv(turn: float, saturation: float, value: float) -> Colour:
        red, green, blue = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        return (round(red * 255), round(green * 255), round(blue * 255))

    # Steps of the golden angle keep neighbouring series apart; brightness alternates for those who see few hues.
    series = tuple(hsv(0.382 * i, 0.62 if i % 2 else 0.55, 0.62 if i % 2 else 0.82) for i in range(8))
    if index in _DARK:
        return Palette(
            f"dark-{index:02d}", hsv(0, 0.45, 0.18), (240, 240, 236), (214, 214, 210), hsv(0, 0.25, 0.45),
            hsv(0, 0.6, 0.42), (255, 255, 255), hsv(0, 0.4, 0.26), series,
        )  # fmt: skip
    page = ((255, 255, 255), (252, 250, 244), (247, 249, 252))[index % 3]
    return Palette(
        f"light-{index:02d}", page, (24, 26, 32), (58, 60, 68), (176, 180, 188),
        hsv(0, 0.72, 0.48), (255, 255, 255), hsv(0, 0.09, 0.95), series,
    )  # fmt: skip


assert all(families(split) and palettes(split) for split in SPLITS)


@dataclass(frozen=True)
class Style:
    """A family in a palette at given sizes: what the drawing code asks for fonts and colours.

    `title_px`, `label_px`, `value_px` and, of sentences, `text_px` are em heights in raw pixels.
    """

    family: Family
    palette: Palette
    size: Size
    margin: int
    title_px: int
    label_px: int
    value_px: int
    text_px: int

    @property
    def title(self) -> Font:
        return Font(self.family.heading_face, self.title_px)

    @property
    def heading(self) -> Font:
        return Font(self.family.heading_face, self.label_px)

    @property
    def label(self) -> Font:
        return Font(self.family.body_face, self.label_px)

    @property
    def text(self) -> Font:
        return Font(self.family.body_face, self.text_px)

    @property
    def value(self) -> Font:
        return Font(self.family.body_face, self.value_px)

    @property
    def page_box(self) -> Box:
        return Box(0, 0, self.size.width, self.size.height)


def fitted(string: str, font: Font, width: float) -> Font:
    """`font`, made smaller where `string` would be wider than `width`."""
    while text_width(string, font) > width and font.px > 8:
        font = Font(font.face, font.px - 1)
    return font
