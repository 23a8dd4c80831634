"""Pages of random text whose every character's place is known: what the scale policy's vision tower learns to read on.

Not part of the paper, which starts from a model that reads. Text is set in MiniDocs' faces and colours at raw size
and brought to the size the model sees by the same resampling as every page and crop (`geometry.render`), so blur and
sharpness are those of the real thing. The target is dense: for every 28x28 cell of the shown image the characters
whose centres fall in it, in reading order, and for every eighth of a cell the character that covers its centre.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vrag_lib.geometry import PATCH
from vrag_lib.minidocs_canvas import FACES, font_path
from vrag_lib.minidocs_content import BOARDS, DIMENSIONS, FLOWS, MEASURES, MONTHS, SURNAMES, entities
from vrag_lib.minidocs_styles import Palette, palettes

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ%$.,+-/:()&'\"?!€"
"""Classes of the dense targets; class 0 is nothing, class i + 1 is `CHARACTERS[i]`."""

CLASS = {character: i + 1 for i, character in enumerate(CHARACTERS)}
SLOTS = 8
"""Characters told apart per cell; small print has more, and those beyond the eighth are not asked for."""

BINS = (2, 4)
"""Rows and columns that a cell is divided into for the covering target."""

GRIDS = ((8, 12), (12, 8), (4, 16), (3, 16), (8, 8), (4, 12), (2, 20), (6, 12), (9, 12))
"""Shapes of the shown images in cells (rows, columns): pages, strips as crops of rows are, and boxes."""


_SMALL_WORDS = "by in for the of and was is at to from with change known as year page total report".split()  # noqa: SIM905


@dataclass(frozen=True)
class CharacterPage:
    """`image` RGB at shown size; `slots` (rows, columns, SLOTS) and `cover` (rows, columns, 8) hold classes."""

    image: Image.Image
    slots: np.ndarray
    cover: np.ndarray


@functools.cache
def _words() -> tuple[str, ...]:
    words = {word for measure in MEASURES for word in (*measure.name.split(), measure.unit)}
    words |= {item for dimension in (*DIMENSIONS, MONTHS) for item in dimension.items}
    words |= {dimension.name for dimension in (*DIMENSIONS, MONTHS)} | set(SURNAMES)
    for board in (*BOARDS, *FLOWS):
        words |= {*board.headings, *board.caption.split(), *board.title.split()}
    for entity in entities("train"):
        words |= {entity.name, *entity.emblem.split()}
    words.update(_SMALL_WORDS)
    return tuple(sorted(words))


@functools.lru_cache(4096)
def _font(face: str, px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path(face)), px, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(1 << 17)
def _advance(face: str, px: int, character: str) -> float:
    return _font(face, px).getlength(character)


def random_string(rng: random.Random) -> str:
    """A number as pages print them, a word of MiniDocs' vocabulary, or a string without sense."""
    kind = rng.random()
    if kind < 0.22:
        return str(rng.randint(0, 999))
    if kind < 0.34:
        return f"{rng.randint(0, 999) / 10:.1f}" + rng.choice(("", "%"))
    if kind < 0.42:
        return f"{rng.choice('+-')}{rng.randint(0, 9)}.{rng.randint(0, 9)}%"
    if kind < 0.50:
        return rng.choice((str(rng.randint(1900, 2099)), f"{rng.randint(1, 99)},{rng.randint(0, 999):03d}",
                           f"${rng.randint(1, 999)}", str(rng.randint(0, 99))))  # fmt: skip
    if kind < 0.80:
        word = rng.choice(_words())
        return word.upper() if rng.random() < 0.05 else word
    return "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(1, 7)))


def _colours(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Background and ink: a pair that a palette uses, or a random pair that contrasts."""
    if rng.random() < 0.8:
        p: Palette = rng.choice(palettes("train"))
        return rng.choice(
            ((p.page, p.text), (p.page, p.small), (p.page, p.primary), (p.primary, p.on_primary), (p.panel, p.text),
             (p.panel, p.small))
        )  # fmt: skip
    while True:
        a, b = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        if abs(sum(a) - sum(b)) > 270:
            return a, b


def draw_character_page(rng: random.Random, rows: int, columns: int, em_range: tuple[float, float]) -> CharacterPage:
    """A page of `rows` x `columns` cells full of text whose em heights in the shown image lie in `em_range`."""
    shown_em = em_range[0] * (em_range[1] / em_range[0]) ** rng.random()
    raw_em = max(14, min(64, round(shown_em * rng.uniform(0.75, 3.2))))
    scale = raw_em / shown_em  # raw pixels per shown pixel, before the slight distortion below
    sx, sy = scale * rng.uniform(0.95, 1.05), scale * rng.uniform(0.95, 1.05)
    width, height = max(1, round(columns * PATCH * sx)), max(1, round(rows * PATCH * sy))
    sx, sy = width / (columns * PATCH), height / (rows * PATCH)
    ground, ink = _colours(rng)
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    slots = np.zeros((rows, columns, SLOTS), np.int64)
    cover = np.zeros((rows * BINS[0], columns * BINS[1]), np.int64)
    cells: dict[tuple[int, int], list[tuple[int, float, int]]] = {}
    bin_height, bin_width = PATCH / BINS[0] * sy, PATCH / BINS[1] * sx
    y = rng.uniform(-0.3, 1.2) * raw_em
    line = 0
    while y < height:
        px = max(12, round(raw_em * rng.choice((1, 1, 1, 0.8, 1.25))))
        face = rng.choice(tuple(FACES))
        step = px * rng.choice((1.15, 1.42, 1.42, 1.8, 2.3))
        baseline = round(y + step * 0.5 + px * 0.36)
        line_ink = ink
        if rng.random() < 0.15:
            band, line_ink = _colours(rng)
            draw.rectangle((0, round(y), width, round(y + step)), fill=band)
        elif rng.random() < 0.15:
            left = rng.uniform(-0.3, 0.8) * width
            right, top = left + rng.uniform(0.2, 1) * width, baseline + 0.3 * px
            draw.rectangle((left, top, right, top + rng.randint(0, 3)), fill=ink)
        x = rng.uniform(-1, 3) * px
        gap = rng.choice((0.3, 0.3, 0.6, 1.5, 4))
        while x < width:
            string = random_string(rng)
            left = round(x)
            draw.text((left, baseline), string, font=_font(face, px), fill=line_ink, anchor="ls")
            x = float(left)
            for character in string:
                advance = _advance(face, px, character)
                cell = (int((baseline - 0.36 * px) / sy // PATCH), int((x + advance / 2) / sx // PATCH))
                if 0 <= cell[0] < rows and 0 <= cell[1] < columns and x + advance / 2 >= 0:
                    cells.setdefault(cell, []).append((line, x, CLASS[character]))
                    top, bottom = (baseline - 0.8 * px) / bin_height, (baseline + 0.1 * px) / bin_height
                    first, last = x / bin_width, (x + advance) / bin_width
                    cover[
                        max(0, int(top + 0.5)) : max(0, int(bottom + 0.5)),
                        max(0, int(first + 0.5)) : max(0, int(last + 0.5)),
                    ] = CLASS[character]
                x += advance
            x += px * gap * rng.uniform(0.8, 1.6)
        y += step
        line += 1
    for cell, found in cells.items():
        for k, (_, _, character_class) in enumerate(sorted(found)[:SLOTS]):
            slots[*cell, k] = character_class
    shown = image.resize((columns * PATCH, rows * PATCH), Image.Resampling.BICUBIC, reducing_gap=3.0)
    cover = cover.reshape(rows, BINS[0], columns, BINS[1]).transpose(0, 2, 1, 3).reshape(rows, columns, -1)
    return CharacterPage(shown, slots, cover)
