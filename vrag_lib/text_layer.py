"""The text layer of a PDF page as lines with boxes in raw page pixels.

pdfium gives characters in content order with breaks where the baseline changes. A line here is what a reader would
call one: pieces that pdfium broke at a superscript are joined again, and a gap as wide as a gutter between columns or
table cells ends a line. Boxes go through pdfium's own page-to-device transform, so rotated and cropped pages come out
right.
"""

from __future__ import annotations

import ctypes
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

MAX_GAP = 2.5
"""A gap of more than so many letter heights ends a line; the gutter of a two-column page is about 3 to 4."""

JOIN_GAP, WORD_GAP = 0.8, 0.2
"""Pieces within `JOIN_GAP` letter heights on one baseline are one line, within `WORD_GAP` one word."""

_DEVICE_SCALE = 1000  # page-to-device gives whole numbers: ask for a device this much larger, then divide
_LINE_END_HYPHENS = "\x02\u00ad"  # what pdfium reports for a hyphen at the end of a line
_LIGATURES = {chr(0xFB00 + i): text for i, text in enumerate(("ff", "fi", "fl", "ffi", "ffl", "st", "st"))}

Rect = tuple[float, float, float, float]


class Piece(NamedTuple):
    """A run of characters on one line: its text, box in pixels, and `letter`, about the height of an x, in pixels."""

    text: str
    box: Rect
    letter: float

    @property
    def is_vertical(self) -> bool:
        return len(self.text) > 2 and _extent(self.box, 1) > 2 * _extent(self.box, 0)


def page_text_lines(page: pdfium.PdfPage, width: int, height: int) -> list[list]:
    """The lines `[text, x1, y1, x2, y2]` of a page whose image is `width` x `height` pixels, in content order.

    A layer without readable characters (only control or private-use ones, as fonts without a mapping give) is none.
    """
    to_pixels = _page_to_pixels(page, width, height)
    pieces: list[Piece] = []
    with closing(page.get_textpage()) as textpage:
        for characters in _broken_lines(textpage, to_pixels):
            pieces += _pieces(characters)
    lines = []
    for text, box, _ in _joined(_in_reading_order(pieces)):
        x1, y1, x2, y2 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
        if x1 < x2 and y1 < y2:  # else it lies off the page
            lines.append([text, round(x1, 1), round(y1, 1), round(x2, 1), round(y2, 1)])
    return lines if is_readable("".join(line[0] for line in lines)) else []


def is_readable(text: str) -> bool:
    """Whether most characters of a text layer stand for something a reader could see.

    >>> is_readable("Total 42"), is_readable("\\ue001\\ue002\\ufffd"), is_readable("")
    (True, False, False)
    """
    visible = [character for character in text if not character.isspace()]
    bad = sum(character == "\ufffd" or unicodedata.category(character) in ("Co", "Cn") for character in visible)
    return 2 * bad < len(visible)


def _broken_lines(
    textpage: pdfium.PdfTextPage, to_pixels: Callable[[Rect], Rect]
) -> Iterator[list[tuple[str, Rect | None]]]:
    """Characters with their boxes in pixels (None for spaces and the like), split at pdfium's line breaks."""
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    line: list[tuple[str, Rect | None]] = []
    for index in range(textpage.count_chars()):
        character = _clean(pdfium_c.FPDFText_GetUnicode(textpage, index))
        if character in ("\n", "\r"):
            yield line
            line = []
        elif character.isspace():
            line.append((" ", None))
        elif character and pdfium_c.FPDFText_GetCharBox(textpage, index, left, right, bottom, top):
            line.append((character, to_pixels((left.value, bottom.value, right.value, top.value))))
    yield line


def _clean(code: int) -> str:
    """The text of a pdfium character code; empty for what no text should hold (NUL, controls, half surrogates)."""
    if code > 0x10FFFF or code & 0xFFFE == 0xFFFE:
        return ""
    character = chr(code)
    if character in _LINE_END_HYPHENS:
        return "-"
    if character in "\n\r\t":
        return character
    if unicodedata.category(character) in ("Cc", "Cf", "Cs"):
        return ""
    return _LIGATURES.get(character, character)


def _pieces(characters: list[tuple[str, Rect | None]]) -> Iterator[Piece]:
    """The parts of one of pdfium's lines between wide gaps, white space normalised."""
    letter = max((min(box[2] - box[0], box[3] - box[1]) for _, box in characters if box), default=0.0)
    start, last = 0, None
    for index, (_, box) in enumerate(characters):
        if box and last and max(_gap(last, box, 0), _gap(last, box, 1)) > MAX_GAP * letter:
            yield from _piece(characters[start:index], letter)
            start = index
        last = box or last
    yield from _piece(characters[start:], letter)


def _piece(characters: list[tuple[str, Rect | None]], letter: float) -> Iterator[Piece]:
    text = " ".join("".join(character for character, _ in characters).split())
    boxes = [box for _, box in characters if box]
    if text and boxes:
        yield Piece(text, _union(boxes), letter)


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Pieces that follow each other closely on one baseline, joined; such breaks are sub- and superscripts."""
    lines: list[Piece] = []
    for piece in pieces:
        last = lines[-1] if lines else None
        if last and (gap := _baseline_gap(last, piece)) is not None:
            letter = max(last.letter, piece.letter)
            if -letter <= gap <= JOIN_GAP * letter:
                space = " " if gap > WORD_GAP * letter else ""
                lines[-1] = Piece(last.text + space + piece.text, _union([last.box, piece.box]), letter)
                continue
        lines.append(piece)
    return lines


def _in_reading_order(pieces: list[Piece]) -> list[Piece]:
    """Pieces with each that pdfium lists just after the one right below it moved before it (it does so at formulas)."""
    ordered: list[Piece] = []
    for piece in pieces:
        below = ordered[-1] if ordered else None
        if below and not (piece.is_vertical or below.is_vertical):
            rise = below.box[3] - piece.box[3]
            overlap = -_gap(piece.box, below.box, 0)
            if (
                0.8 * below.letter < rise < 4 * below.letter
                and -_gap(piece.box, below.box, 1) < 0.4 * min(_extent(piece.box, 1), _extent(below.box, 1))
                and overlap > 0.5 * min(_extent(piece.box, 0), _extent(below.box, 0))
            ):
                ordered.insert(-1, piece)
                continue
        ordered.append(piece)
    return ordered


def _baseline_gap(a: Piece, b: Piece) -> float | None:
    """The gap from `a` to `b` along the text's direction; None when they do not share a baseline."""
    along = 1 if a.is_vertical or b.is_vertical else 0
    across = 1 - along
    overlap = -_gap(a.box, b.box, across)
    if overlap < 0.4 * min(_extent(a.box, across), _extent(b.box, across)):
        return None
    return _gap(a.box, b.box, along)


def _gap(a: Rect, b: Rect, axis: int) -> float:
    """The distance between two boxes along x (0) or y (1); negative where they overlap."""
    return max(b[axis] - a[axis + 2], a[axis] - b[axis + 2])


def _extent(box: Rect, axis: int) -> float:
    return box[axis + 2] - box[axis]


def _union(boxes: list[Rect]) -> Rect:
    return (min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes))


def _page_to_pixels(page: pdfium.PdfPage, width: int, height: int) -> Callable[[Rect], Rect]:
    """The map of boxes in page space to image pixels: affine, read off pdfium at three points."""
    x, y = ctypes.c_int(), ctypes.c_int()

    def probe(page_x: float, page_y: float) -> tuple[float, float]:
        pdfium_c.FPDF_PageToDevice(page, 0, 0, width * _DEVICE_SCALE, height * _DEVICE_SCALE, 0, page_x, page_y, x, y)
        return x.value / _DEVICE_SCALE, y.value / _DEVICE_SCALE

    (x0, y0), (ax, ay), (bx, by) = probe(0, 0), probe(100, 0), probe(0, 100)
    xx, yx, xy, yy = (ax - x0) / 100, (ay - y0) / 100, (bx - x0) / 100, (by - y0) / 100

    def to_pixels(box: Rect) -> Rect:
        (u1, v1), (u2, v2) = (
            (x0 + xx * page_x + xy * page_y, y0 + yx * page_x + yy * page_y) for page_x, page_y in (box[:2], box[2:])
        )
        return min(u1, u2), min(v1, v2), max(u1, u2), max(v1, v2)

    return to_pixels
