"""What the scale retriever learns from: pages whose every word's place is known, and queries with their pages.

Two kinds of pages: `word_page`, dense random text out of MiniDocs' vocabulary and coined names, and the pages of
MiniDocs' training documents. Both carry the same labels, read off the drawing list: which words and syllables stand
in which cells. Names of validation and test entities are never drawn; syllables are also joined in ways that no name
has, so that a syllable is learnt and not a name. Queries are written with the words that pages use; the everyday
wordings of MiniDocs' questions are never seen in training.
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from PIL import Image

from vrag_lib.geometry import PATCH, Box, Size
from vrag_lib.minidocs_canvas import FACES, Canvas, Font, Text, text_width
from vrag_lib.minidocs_content import (
    BOARDS,
    DIMENSIONS,
    FLOWS,
    MEASURES,
    MONTHS,
    ORGANISATIONS,
    SHORT_MONTHS,
    entities,
)
from vrag_lib.minidocs_documents import MiniDocsConfig, MiniDocument, MiniPage, build_document
from vrag_lib.minidocs_styles import palettes
from vrag_lib.scale_characters import CLASS
from vrag_lib.scale_retriever import FUNCTION_WORDS, WORD_START, page_words, shown_grid, syllables
from vrag_lib.scale_vision import patchify

BINS = (2, 4)
"""Rows and columns that a cell is divided into for the covering targets."""

LEAST_EM = 10.0
"""Em height in shown pixels below which a text is not read: figures and small print of a page shown whole."""

_MEASURES = {measure.name: measure for measure in MEASURES}
_BOARDS = {board.title: board for board in (*BOARDS, *FLOWS)}
_LONG_MONTHS = {short: month for month, short in SHORT_MONTHS.items()}


class Vocabulary:
    """The words and syllables that pages show, as classes from 0."""

    def __init__(self, tokenizer: Any):
        starts, ends = syllables()
        pieces = {WORD_START + word.lower() for word in (*page_words(), *starts)} | set(ends)
        self.tokenizer = tokenizer
        self.ends = [tokenizer.convert_tokens_to_ids(end) for end in ends]
        self.starts = [tokenizer.convert_tokens_to_ids(WORD_START + start) for start in starts]
        self.ids = sorted(tokenizer.convert_tokens_to_ids(piece) for piece in pieces)
        self.class_of = {token: i for i, token in enumerate(self.ids)}
        self._spans = functools.lru_cache(1 << 16)(self._find_spans)

    @property
    def classes(self) -> int:
        return len(self.ids)

    def spans(self, string: str) -> tuple[tuple[int, int, int], ...]:
        """`(class, start, end)` of the known words and syllables of a text, in characters."""
        return self._spans(string)

    def _find_spans(self, string: str) -> tuple[tuple[int, int, int], ...]:
        if string in _LONG_MONTHS:  # an axis label; the query spells it out
            token = self.tokenizer.convert_tokens_to_ids(WORD_START + _LONG_MONTHS[string].lower())
            return ((self.class_of[token], 0, len(string)),)
        encoded = self.tokenizer(string, return_offsets_mapping=True)
        found = []
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            if token in self.class_of:
                found.append((self.class_of[token], start + (string[start] == " "), end))
        return tuple(found)


@dataclass(frozen=True)
class LabelledPage:
    """A page, or a window of one, as the model sees it, with what it shows.

    patches (4 * cells, 588) of 0 to 255, cell by cell. words (n,) classes of the n words it shows; near (n, cells) the
    share of the word's box in each cell; characters (cells, 8) the class that covers each eighth of a cell.
    """

    grid: tuple[int, int]
    patches: np.ndarray
    words: np.ndarray
    near: np.ndarray
    characters: np.ndarray

    def window(self, row: int, column: int, grid: tuple[int, int]) -> LabelledPage:
        """The part of `grid` cells whose first cell is at (row, column); words mostly outside it are dropped."""
        rows, columns = slice(row, row + grid[0]), slice(column, column + grid[1])
        cells = grid[0] * grid[1]
        near = self.near.reshape(-1, *self.grid)[:, rows, columns].reshape(-1, cells)
        kept = near.sum(1) > 0.7
        return LabelledPage(
            grid,
            self.patches.reshape(*self.grid, 4, -1)[rows, columns].reshape(cells * 4, -1),
            self.words[kept],
            near[kept],
            self.characters.reshape(*self.grid, -1)[rows, columns].reshape(cells, -1),
        )


def _cover_slice(low: float, high: float) -> slice:
    return slice(max(0, int(low + 0.5)), max(0, int(high + 0.5)))


def label(
    shown: Image.Image, raw: Size, texts: Iterable[Text], vocabulary: Vocabulary, grid: tuple[int, int]
) -> LabelledPage:
    """Labels of a page of `raw` size with these `texts` (raw pixels) that is shown as `shown` in `grid` cells."""
    rows, columns = grid
    sx, sy = raw.width / columns, raw.height / rows  # raw pixels per cell
    cover = np.zeros((rows * BINS[0], columns * BINS[1]), np.int16)
    words, near = [], []
    for text in texts:
        if text.font.px * PATCH / sy < LEAST_EM:
            continue
        string, font, px = text.string, text.font, text.font.px
        top, bottom = (text.baseline - 0.75 * px) / sy, text.baseline / sy
        upright = _cover_slice(top * BINS[0], bottom * BINS[0] + 0.2)
        advances = accumulate((text_width(character, font) for character in string), initial=text.x)
        edges = [x / sx for x in advances]
        for i, character in enumerate(string):
            across = _cover_slice(edges[i] * BINS[1], edges[i + 1] * BINS[1])
            cover[upright, across] = CLASS.get(character, 0)
        for word, start, end in vocabulary.spans(string):
            left, right = edges[start], edges[end]
            over_x = np.clip(np.minimum(right, np.arange(1, columns + 1)) - np.maximum(left, np.arange(columns)), 0, 1)
            over_y = np.clip(np.minimum(bottom, np.arange(1, rows + 1)) - np.maximum(top, np.arange(rows)), 0, 1)
            share = over_y[:, None] * over_x / ((right - left) * (bottom - top))
            if share.sum() > 0.7:  # a word cut off by the edge is not asked for
                words.append(word)
                near.append(share.reshape(-1))
    cover = cover.reshape(rows, BINS[0], columns, BINS[1]).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    shares = np.array(near, np.float32).reshape(-1, rows * columns)
    patches = patchify(shown)
    return LabelledPage(grid, patches, np.array(words, np.int64), shares, cover)


def _coined(rng: random.Random) -> str:
    """A training entity's name, or syllables and words joined as no name joins them."""
    if rng.random() < 0.5:
        return rng.choice(entities("train")).name
    starts, ends = syllables()
    kind = rng.random()
    if kind < 0.35:
        return (rng.choice(ends) + rng.choice(ends)).capitalize()
    if kind < 0.7:
        return (rng.choice(starts) + rng.choice(ends)).capitalize() + rng.choice(ends)
    return rng.choice(page_words()).capitalize() + rng.choice(ends)


def random_phrase(rng: random.Random) -> str:
    """A name, title, label or heading as MiniDocs' pages carry them."""
    kind = rng.random()
    if kind < 0.40:
        return _coined(rng) + (f" {rng.choice(sorted(ORGANISATIONS))}" if rng.random() < 0.5 else "")
    if kind < 0.58:
        measure = rng.choice(MEASURES)
        name = measure.name if rng.random() < 0.7 else measure.name.lower()
        return name + (f" by {measure.dimension.name}" if rng.random() < 0.5 else "")
    if kind < 0.76:
        return rng.choice(rng.choice((*DIMENSIONS, MONTHS)).items)
    if kind < 0.80:
        return rng.choice(sorted(SHORT_MONTHS.values()))
    if kind < 0.90:
        board = rng.choice((*BOARDS, *FLOWS))
        return board.title if rng.random() < 0.3 else rng.choice(board.headings)
    if kind < 0.96:
        return ("known as the " if rng.random() < 0.4 else "") + rng.choice(entities("train")).emblem
    return str(rng.randint(100, 999))


def word_page(rng: random.Random, grid: tuple[int, int], vocabulary: Vocabulary) -> LabelledPage:
    """Dense random text, drawn at one and a half to twice the shown size, in MiniDocs' faces and training colours."""
    rows, columns = grid
    scale = rng.uniform(1.5, 2.3)
    size = Size(round(columns * PATCH * scale), round(rows * PATCH * scale))
    palette = rng.choice(palettes("train"))
    if rng.random() < 0.75:
        ground, ink = rng.choice(
            ((palette.page, palette.text), (palette.page, palette.primary), (palette.primary, palette.on_primary),
             (palette.panel, palette.text))
        )  # fmt: skip
    else:
        ground, ink = _contrasting(rng)
    canvas = Canvas(size, ground)
    em = rng.choice((16.3, 16.3, 20.6, rng.uniform(11, 26))) * scale
    y = rng.uniform(-0.2, 1.0) * em
    while y < size.height:
        px = max(8, round(em * rng.choice((1, 1, 1, 0.85, 1.25))))
        font = Font(rng.choice(tuple(FACES)), px)
        step = px * rng.choice((1.2, 1.42, 1.6, 2.3))
        colour = ink
        if rng.random() < 0.12:
            back, colour = (palette.primary, palette.on_primary) if rng.random() < 0.5 else _contrasting(rng)
            canvas.rectangle(Box(0, y, size.width, y + step), fill=back)
        elif rng.random() < 0.1:
            canvas.rectangle(Box(0, y + step - 2, size.width * rng.uniform(0.2, 1), y + step), fill=palette.hairline)
        x = rng.uniform(-2, 3) * px
        while x < size.width:
            small = rng.random() < 0.1
            string = str(rng.randint(100, 999)) if small else random_phrase(rng)
            face = Font(font.face, max(6, round(px * 0.4))) if small else font
            box = canvas.text(x, y + step * 0.5 + px * 0.36, string, face, colour)
            x = box.x2 + px * rng.choice((0.4, 0.6, 1.5, 3))
        y += step
    shown = canvas.image().resize((columns * PATCH, rows * PATCH), Image.Resampling.BICUBIC)
    return label(shown, size, canvas.texts, vocabulary, grid)


def _contrasting(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    while True:
        a, b = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        if abs(sum(a) - sum(b)) > 250:
            return a, b  # type: ignore[return-value]


def document_page(page: MiniPage, vocabulary: Vocabulary) -> LabelledPage:
    """A page of a MiniDocs document, shown as the processor shows it."""
    grid = shown_grid(page.size.width, page.size.height)
    shown = page.image().resize((grid[1] * PATCH, grid[0] * PATCH), Image.Resampling.BICUBIC)
    return label(shown, page.size, page.canvas.texts, vocabulary, grid)


def page_query(rng: random.Random, document: MiniDocument, page: MiniPage) -> str:
    """A query that finds `page` among all pages, in the words that pages use: mostly whose, title and item, at times
    a question, with parts left out, turned round or drowned in words that say nothing."""
    fact = rng.choice(page.facts)
    name = document.name if rng.random() < 0.85 else document.entity.name
    if page.kind == "cover":
        parts = [f"known as the {fact.value}"] if rng.random() < 0.7 else [name, f"known as the {fact.value}"]
    elif fact.subject in _BOARDS:
        board = _BOARDS[fact.subject]
        parts = [name, board.title, fact.item]
        if rng.random() < 0.3:
            end = f"is directly below {fact.item}?" if rng.random() < 0.5 else f"comes directly after {fact.item}?"
            return f"On the {board.title.lower()} page of {name}, which {board.noun} {end}"
        if rng.random() < 0.2:
            return f"On the {board.title.lower()} page of {name}, what is the {board.caption} entry of the first?"
    else:
        measure = _MEASURES[fact.subject]
        place = f"{measure.dimension.preposition} {fact.item}"
        if rng.random() < 0.35:
            figure = {"change": "change in", "share": "share of"}.get(fact.column, "figure of")
            what = f"the {figure} {measure.name.lower()} {place}"
            return rng.choice((f"What is {what} at {name}?", f"At {name}, what is {what}?"))
        title = f"{measure.name} by {measure.dimension.name}"
        parts = [name, title if rng.random() < 0.8 else measure.name, fact.item if rng.random() < 0.85 else ""]
    if rng.random() < 0.2:
        rng.shuffle(parts)
    query = " ".join(part for part in parts if part)
    if rng.random() < 0.3:
        noise = " ".join(rng.choice(FUNCTION_WORDS) for _ in range(rng.randint(2, 6)))
        query = f"{noise} {query}" if rng.random() < 0.5 else f"{query} {noise}"
    return query


class PagePool:
    """Training documents and, for any page, pages that are easily taken for it.

    Pages are drawn when first asked for and kept, about 0.5 MB each.
    """

    def __init__(self, config: MiniDocsConfig, vocabulary: Vocabulary, documents: int | None = None):
        count = config.train_documents if documents is None else documents
        self.vocabulary = vocabulary
        self.documents = [build_document(config, "train", index) for index in range(count)]
        self.places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.titles: dict[tuple[int, int], list[str]] = {}
        for d, document in enumerate(self.documents):
            for number, plan in enumerate(document.plan, 1):
                self.titles[d, number] = [table.title for table in plan.tables] or [plan.title or "cover"]
                for title in self.titles[d, number]:
                    self.places[title].append((d, number))
        self.all_places = sorted(self.titles)
        self._drawn: dict[tuple[int, int], tuple[MiniPage, LabelledPage]] = {}

    def page(self, place: tuple[int, int]) -> tuple[MiniPage, LabelledPage]:
        """The page with this document number and page number, and its labels."""
        if place not in self._drawn:
            page = self.documents[place[0]].page(place[1])
            self._drawn[place] = page, document_page(page, self.vocabulary)
        return self._drawn[place]

    def batch(self, rng: random.Random, groups: int) -> list[tuple[int, int]]:
        """`groups` triples of different pages: one, the page of the same title in a document whose name is alike, and
        another page of the first one's document."""
        chosen: list[tuple[int, int]] = []
        while len(chosen) < 3 * groups:
            d = rng.randrange(len(self.documents))
            numbers = rng.sample(range(1, len(self.documents[d].plan) + 1), 2)
            title = rng.choice(self.titles[d, numbers[0]])
            others = [place for place in self.places[title] if place[0] != d]
            twins = rng.sample(others, min(12, len(others)))
            twin = max(twins, key=lambda place: (self._likeness(d, place[0]), place), default=None)
            triple = [(d, numbers[0]), *([twin] if twin else []), (d, numbers[1])]
            if not set(triple) & set(chosen):
                chosen += triple
        return chosen[: 3 * groups]

    def _likeness(self, a: int, b: int) -> int:
        """How much the names of two documents have in common."""
        first, second = self.documents[a], self.documents[b]
        first_words, second_words = ({word for word, _, _ in self.vocabulary.spans(d.name)} for d in (first, second))
        return len(first_words & second_words)

    def queries(self, rng: random.Random, places: Sequence[tuple[int, int]]) -> list[str]:
        """One query per page."""
        return [page_query(rng, self.documents[place[0]], self.page(place)[0]) for place in places]
