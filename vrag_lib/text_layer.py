"""The text layer of a PDF page as lines with boxes in raw page pixels.

pdfium gives characters in content order, with line breaks where the baseline changes, and boxes in page space. A line
here is what a reader would call one: broken at pdfium's breaks and at gaps as wide as a gutter between columns or
table cells. Boxes go through pdfium's own page-to-device transform, so rotated and cropped pages come out right.
"""

from __future__ import annotations

import ctypes
import unicodedata
from collections.abc import Iterator
from contextlib import closing
from statistics import median

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

MAX_GAP = 3.0
"""A gap between characters of more than so many character heights ends a line."""

_PROBE = 10_000  # page-to-device gives whole numbers: ask for a device this much larger and divide
_LINE_END_HYPHEN = "\x02"  # what pdfium reports for a hyphen at the end of a line
_LIGATURES = {"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl", "\ufb05": "st", "\ufb06": "st"}

Rect = tuple[float, float, float, float]


def page_text_lines(page: pdfium.PdfPage, width: int, height: int) -> list[list]:
    """The lines `[text, x1, y1, x2, y2]` of a page whose image is `width` x `height` pixels, in content order.

    A layer without readable characters (only control or private-use ones, as fonts without a mapping give) is none.
    """
    to_pixels = _page_to_pixels(page, width, height)
    lines = []
    with closing(page.get_textpage()) as textpage:
        for characters in _raw_lines(textpage):
            for part in _split_at_gaps(characters):
                text = " ".join("".join(character for character, _ in part).split())
                boxes = [box for character, box in part if box and not character.isspace()]
                line = _clip(_union([to_pixels(box) for box in boxes]), width, height) if text and boxes else None
                if line:
                    lines.append([text, *(round(value, 1) for value in line)])
    return lines if is_readable("".join(line[0] for line in lines)) else []


def is_readable(text: str) -> bool:
    """Whether most characters of a text layer stand for something a reader could see.

    >>> is_readable("Total 42"), is_readable("\\ue001\\ue002\\ufffd"), is_readable("")
    (True, False, False)
    """
    visible = [character for character in text if not character.isspace()]
    bad = sum(c == "\ufffd" or unicodedata.category(c) in ("Cc", "Co", "Cn", "Cs") for c in visible)
    return 2 * bad < len(visible)


def _raw_lines(textpage: pdfium.PdfTextPage) -> Iterator[list[tuple[str, Rect | None]]]:
    """Characters with their boxes in page space (None for generated ones), split at pdfium's line breaks."""
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    line: list[tuple[str, Rect | None]] = []
    for index in range(textpage.count_chars()):
        code = pdfium_c.FPDFText_GetUnicode(textpage, index)
        character = _clean(code)
        if character in ("\n", "\r"):
            if line:
                yield line
            line = []
        elif character:
            found = pdfium_c.FPDFText_GetCharBox(textpage, index, left, right, bottom, top)
            box = (left.value, bottom.value, right.value, top.value) if found else None
            line.append((character, box))
    if line:
        yield line


def _clean(code: int) -> str:
    """The character of a pdfium code; empty for what no text should hold (NUL, controls, halves of surrogates)."""
    if code in (0, 0xFFFE, 0xFFFF) or 0xD800 <= code <= 0xDFFF or code > 0x10FFFF:
        return ""
    character = chr(code)
    if character in (_LINE_END_HYPHEN, "\u00ad"):
        return "-"
    if character in "\n\r\t":
        return character
    if unicodedata.category(character) in ("Cc", "Cf"):
        return ""
    return _LIGATURES.get(character, character)


def _split_at_gaps(characters: list[tuple[str, Rect | None]]) -> Iterator[list[tuple[str, Rect | None]]]:
    sizes = [min(max(b[2] - b[0], b[3] - b[1]), 4 * (b[3] - b[1]) or 1e9) for c, b in characters if b and not c.isspace()]
    limit = MAX_GAP * median(sizes) if sizes else 0.0
    part: list[tuple[str, Rect | None]] = []
    last: Rect | None = None
    for character, box in characters:
        if box and not character.isspace():
            if last and _gap(last, box) > limit:
                yield part
                part = []
            last = box
        part.append((character, box))
    yield part


def _gap(a: Rect, b: Rect) -> float:
    return max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])


def _union(boxes: list[Rect]) -> Rect:
    return (min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes))


def _clip(box: Rect, width: int, height: int) -> Rect | None:
    """The part of a box on the page; None for text that lies off it."""
    x1, y1, x2, y2 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _page_to_pixels(page: pdfium.PdfPage, width: int, height: int):
    """The affine map of page space to image pixels, read off pdfium at three points."""
    x, y = ctypes.c_int(), ctypes.c_int()

    def probe(px: float, py: float) -> tuple[float, float]:
        pdfium_c.FPDF_PageToDevice(page, 0, 0, width * _PROBE, height * _PROBE, 0, px, py, x, y)
        return x.value / _PROBE, y.value / _PROBE

    x0, y0 = probe(0, 0)
    (ax, ay), (bx, by) = probe(100, 0), probe(0, 100)
    xx, yx, xy, yy = (ax - x0) / 100, (ay - y0) / 100, (bx - x0) / 100, (by - y0) / 100

    def to_pixels(box: Rect) -> Rect:
        corners = [(x0 + xx * px + xy * py, y0 + yx * px + yy * py) for px in box[0::2] for py in box[1::2]]
        xs, ys = [c[0] for c in corners], [c[1] for c in corners]
        return min(xs), min(ys), max(xs), max(ys)

    return to_pixels
