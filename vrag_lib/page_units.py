"""Sentences and cells of a page, made of its text lines, and the words in them.

A text layer and OCR give lines: running text is cut at every line's end, and tables and charts are short lines by
themselves. Lines that continue each other are joined here and cut at full stops; rows of a table are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from vrag_lib.corpus import TextLine

MAX_LINES = 40
"""Lines of a paragraph at most."""

MONTHS = "January February March April May June July August September October November December"
_SHORT_MONTHS = {name[:3].lower() for name in MONTHS.split()}
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: one token per character
WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_VALUE = re.compile(r"\W{0,2}\d[\d.,]*[^\w.]{0,2}")


class Token(NamedTuple):
    """A word's stem and where it stands in its text."""

    stem: str
    start: int
    end: int


@cache
def _stemmer() -> Any:
    import Stemmer

    return Stemmer.Stemmer("english")


@lru_cache(100_000)
def _stem(word: str) -> str:
    """Months are taken by their first three letters, as axes write them."""
    if word[:3] in _SHORT_MONTHS and (word in MONTHS.lower().split() or word == "sept"):
        return word[:3]
    return _stemmer().stemWord(word)


def tokens(text: str) -> list[Token]:
    """The words of a text.

    >>> [token.stem for token in tokens("Sales in January")]
    ['sale', 'in', 'jan']
    """
    return [Token(_stem(match.group().lower()), match.start(), match.end()) for match in WORD.finditer(text)]


@dataclass(frozen=True)
class Unit:
    """A sentence or a cell: its text, the lines it stands on (index, where the line begins in the text), and the
    paragraph it is a part of. A cell is a short line by itself."""

    text: str
    lines: tuple[tuple[int, int], ...]
    paragraph: int
    is_cell: bool


def page_units(lines: Sequence[TextLine], skipped: frozenset[int] = frozenset()) -> list[Unit]:
    """Sentences and cells, in the order of the lines: lines of running text are joined and split at full stops."""
    paragraphs: list[list[int]] = []
    cells = _row_cells(lines)
    for i in range(len(lines)):
        if i in skipped or not lines[i].text.strip():
            continue
        # Lines of other columns and charts may come in between, as OCR lists lines from the top down.
        before = next(
            (p for p in paragraphs[:-9:-1] if len(p) < MAX_LINES and _continues(lines, p[-1], i, cells)), None
        )
        if before is not None:
            before.append(i)
        else:
            paragraphs.append([i])
    units = []
    for number, members in enumerate(paragraphs):
        text, starts = "", []
        for i in members:
            starts.append((i, len(text)))
            text += lines[i].text + " "
        is_cell = len(members) == 1 and len(text.split()) <= 8 and not text.rstrip().endswith((".", "?", "!"))
        cuts = [0, *(match.end() for match in re.finditer(r"(?<=[a-z0-9)%”’\"][.!?;。])\s+", text)), len(text)]
        for start, end in pairwise(cuts):
            if text[start:end].strip():
                ends = [begin for _, begin in starts[1:]] + [len(text)]
                held = [
                    (i, begin - start)
                    for (i, begin), last in zip(starts, ends, strict=True)
                    if begin < end and last > start
                ]
                units.append(Unit(text[start:end], tuple(held), number, is_cell))
    return units


def _row_cells(lines: Sequence[TextLine]) -> list[list[int]]:
    """For each line, the lines of at most three words beside it on its row, nearest first."""
    boxes = np.array([line.box.as_tuple() for line in lines]).reshape(-1, 4)
    is_short = np.array([len(line.text.split()) <= 3 for line in lines], dtype=bool)
    middle = (boxes[:, 1] + boxes[:, 3]) / 2
    found = []
    for x1, y1, x2, y2 in boxes:
        gap = np.maximum(boxes[:, 0] - x2, x1 - boxes[:, 2])
        beside = np.flatnonzero(is_short & (gap > 0) & (abs(middle - (y1 + y2) / 2) < 0.35 * (y2 - y1)))
        found.append(beside[np.argsort(gap[beside], kind="stable")].tolist())
    return found


def _continues(lines: Sequence[TextLine], i: int, j: int, cells: list[list[int]]) -> bool:
    """Whether line `j` goes on with the running text of line `i`; rows of a table, which have cells beside them,
    several or aligned ones, do not."""
    last, line = lines[i], lines[j]
    tall = max(last.box.height, line.box.height)
    gap = line.box.y1 - last.box.y2
    if cells[i] and cells[j]:
        a, b = lines[cells[i][0]].box, lines[cells[j][0]].box
        aligned = min(abs(a.x1 - b.x1), abs(a.x2 - b.x2), abs(a.x1 + a.x2 - b.x1 - b.x2) / 2) < 0.6 * tall
        if aligned or min(len(cells[i]), len(cells[j])) > 1:
            return False
    return (
        len(last.text.split()) >= 3
        and last.box.width > 6 * last.box.height
        and not _VALUE.fullmatch(line.text)
        and -0.3 * tall < gap < 0.9 * tall
        and min(last.box.height, line.box.height) > 0.7 * tall
        and abs(line.box.x1 - last.box.x1) < 3 * tall
        and not re.match(r"\W*[•▪●◦*\uf0a7\uf0b7\uf0d8]|\d{1,2}[.)]\s", line.text)
    )
