"""One MiniDocs document from its number: what it is about, which pages it has, and those pages drawn.

A document depends on the configuration, the split and its index only, never on what was generated before it, so any
process can draw any document at any time and get the same one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from PIL import Image

from vrag_lib.geometry import Box, Size
from vrag_lib.minidocs_canvas import Canvas
from vrag_lib.minidocs_content import (
    BOARDS,
    FLOWS,
    MEASURES,
    MONTHS,
    ORGANISATIONS,
    Board,
    Dimension,
    Entity,
    Measure,
    Sampler,
    Table,
    entities,
)
from vrag_lib.minidocs_pages import (
    Fact,
    draw_bars,
    draw_board,
    draw_cover,
    draw_flow,
    draw_header,
    draw_line,
    draw_notes,
    draw_pie,
    draw_table,
    draw_text,
)
from vrag_lib.minidocs_styles import Style, families, fitted, palettes
from vrag_lib.settings import setting

PAGE_TOKENS = 96
"""Vision tokens (28 x 28 pixels each) at which pages of the default size are meant to be shown."""

LEAST_TOKENS = 80
"""Least vision tokens of a crop of one; the most are `PAGE_TOKENS`. An exact number would leave few shapes to choose
from: a crop of 96 and no other number is shown 13 % wider or narrower than it is on average and up to 55 %, one of 80
to 96 by 7 % and up to 24 %."""

REQUIRED_PAGES = ("table", "bars", "text", "pie or line", "board or flow")
"""Every document has a cover and one page of each of these kinds; the rest are drawn from `EXTRA_PAGES`."""

MOST_PAGES = 10
"""Beyond this a document could run out of measures and titles, of which no two of its pages share one."""

EXTRA_PAGES = ("table", "bars", "text", "pie", "line", "dashboard", "dashboard")

_HEADLINES = ("Annual review", "Yearly report", "Board briefing", "Facts and figures")
_DASHBOARDS = ("Dashboard", "At a glance", "Key figures", "Scorecard")
_SENTENCES = (
    "{measure} {preposition} {item} came to {value} {unit}.",
    "{measure} {preposition} {item} reached {value} {unit} over the whole year.",
    "At {value} {unit}, {measure_lower} {preposition} {item} met the plan.",
    "The year closed with {measure_lower} {preposition} {item} at {value} {unit}.",
    "{item} stood at {value} {unit} in {measure_lower}.",
)
_FILLERS = (
    "The board takes note of these results.",
    "All figures were checked twice.",
    "A full account is kept on file.",
    "No changes to the rules were made.",
    "The outlook remains steady.",
)


@dataclass(frozen=True)
class MiniDocsConfig:
    """Everything a MiniDocs collection depends on. Sizes are raw page pixels; font sizes are em heights.

    With the defaults a page of 1176 x 784 is shown whole at 336 x 224 (`PAGE_TOKENS`): labels and text come out at 11
    pixels, figures at 6. A crop of a table row or a bar shows its figure at 18 pixels or more. With `text_px` at 60
    the sentences of pages of text are shown at 17 pixels, two or three on a page.
    """

    seed: int = setting(0, "seed of all contents; names, families and palettes of a split do not depend on it")
    train_documents: int = setting(400, "documents of the training split")
    validation_documents: int = setting(40, "documents of the validation split")
    test_documents: int = setting(80, "documents of the test split")
    min_pages: int = setting(6, "fewest pages of a document, the cover included")
    max_pages: int = setting(8, "most pages of a document")
    questions_per_document: int = setting(8, "questions asked on a document; their kinds go round")
    long_side: int = setting(1176, "longer side of a page, raw pixels")
    short_side: int = setting(784, "shorter side of a page, raw pixels")
    margin: int = setting(48, "blank border, raw pixels")
    title_px: int = setting(48, "em height of titles, raw pixels")
    label_px: int = setting(38, "em height of labels and running text, raw pixels")
    value_px: int = setting(22, "em height of figures and small print, raw pixels")
    text_px: int | None = setting(None, "em height of the sentences on pages of text, raw pixels; null: as labels")

    def __post_init__(self) -> None:
        if not len(REQUIRED_PAGES) < self.min_pages <= self.max_pages <= MOST_PAGES:
            raise ValueError(
                f"a document has a cover and at least {len(REQUIRED_PAGES)} pages, at most {MOST_PAGES} in all; "
                f"min_pages={self.min_pages}, max_pages={self.max_pages} cannot be"
            )
        if not 8 <= self.value_px <= self.label_px <= self.title_px <= self.short_side / 16:
            raise ValueError("font sizes must rise from value_px (at least 8) to title_px (at most short_side / 16)")
        if not 0 <= self.margin <= self.short_side / 10:
            raise ValueError(f"margin={self.margin} lies between 0 and short_side / 10, or pages have no room for more")
        if not self.label_px <= self.sentence_px <= self.short_side / 12:
            raise ValueError("text_px must lie between label_px and short_side / 12")
        if not self.short_side <= self.long_side <= 2 * self.short_side or self.label_px > self.short_side / 20:
            raise ValueError("pages need short_side <= long_side <= 2 * short_side and label_px <= short_side / 20")
        for split, count in self.documents.items():
            if not 0 <= count <= len(document_entities(split)):
                raise ValueError(f"{split} has names for {len(document_entities(split))} documents, not for {count}")

    @property
    def sentence_px(self) -> int:
        """Em height of the sentences on pages of text, raw pixels."""
        return self.label_px if self.text_px is None else self.text_px

    @property
    def documents(self) -> dict[str, int]:
        """Documents per split."""
        return {
            "train": self.train_documents,
            "validation": self.validation_documents,
            "test": self.test_documents,
        }


def document_entities(split: str) -> tuple[Entity, ...]:
    """The entities of a split that documents are about. The last twentieth never gets a document: questions about
    those have no answer."""
    pool = entities(split)
    return pool[: len(pool) - len(pool) // 20]


def absent_entities(split: str) -> tuple[Entity, ...]:
    """The entities of a split that no document is about."""
    return entities(split)[len(document_entities(split)) :]


@dataclass(frozen=True)
class MiniPage:
    """One drawn page; `kind` is cover, text, table, bars, line, pie, board, flow or dashboard, `number` 1-based."""

    number: int
    kind: str
    title: str
    canvas: Canvas
    facts: tuple[Fact, ...]
    tables: tuple[Table, ...] = ()

    @property
    def size(self) -> Size:
        return self.canvas.size

    @property
    def lines(self) -> list[tuple[str, Box]]:
        """Every run of text on the page with the box of its ink, raw page pixels."""
        return [(text.string, text.box) for text in self.canvas.texts]

    def image(self) -> Image.Image:
        """The page painted anew; RGB, raw page size."""
        return self.canvas.image()


@dataclass(frozen=True)
class MiniDocument:
    """A document: whom it is about, how it looks, and its pages, drawn when first asked for."""

    id: str
    split: str
    index: int
    entity: Entity
    organisation: str
    headline: str
    style: Style
    plan: tuple[PagePlan, ...]

    @property
    def name(self) -> str:
        """The name on every page, such as `Norvale Port`."""
        return f"{self.entity.name} {self.organisation}"

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """What the document's measures are broken down by, each once."""
        return tuple(dict.fromkeys(table.measure.dimension for page in self.plan for table in page.tables))

    @cached_property
    def pages(self) -> tuple[MiniPage, ...]:
        return tuple(_draw_page(self, number, plan) for number, plan in enumerate(self.plan, 1))

    def page(self, number: int) -> MiniPage:
        """One page, without drawing the others. Raises IndexError outside 1 to the number of pages."""
        if not 1 <= number <= len(self.plan):
            raise IndexError(f"{self.id} has pages 1 to {len(self.plan)}, not {number}")
        return _draw_page(self, number, self.plan[number - 1])


@dataclass(frozen=True)
class PagePlan:
    """What a page will hold, before it is drawn. `panels` names how each of `tables` is shown."""

    kind: str
    title: str
    tables: tuple[Table, ...] = ()
    panels: tuple[str, ...] = ()
    sentences: tuple[tuple[str, str, str, str], ...] = ()
    board: Board | None = None
    headings: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    with_changes: bool = False
    notes: tuple[str, ...] = ()


def build_document(config: MiniDocsConfig, split: str, index: int) -> MiniDocument:
    """Document `index` (0, 1, ...) of a split. Indices beyond the split's names reuse them with new contents, which
    serves training on ever new pages; a corpus never goes that far.

    Raises ValueError for an unknown split or a negative index.
    """
    if index < 0:
        raise ValueError(f"document indices start at 0, not {index}")
    names = document_entities(split)
    rng = random.Random(f"minidocs/{config.seed}/{split}/{index}")
    family = rng.choice(families(split))
    sides = (config.long_side, config.short_side)
    size = Size(*sides) if family.format == "slide" else Size(*reversed(sides))
    style = Style(
        family, rng.choice(palettes(split)), size, config.margin,
        config.title_px, config.label_px, config.value_px, config.sentence_px,
    )  # fmt: skip
    count = rng.randint(config.min_pages, config.max_pages)
    organisation = rng.choice(sorted(ORGANISATIONS))
    return MiniDocument(
        id=f"minidocs-{split}-{index:05d}",
        split=split,
        index=index,
        entity=names[index % len(names)],
        organisation=organisation,
        headline=f"{rng.choice(_HEADLINES)} {rng.randint(2008, 2025)}",
        style=style,
        plan=tuple(_Planner(rng, style, ORGANISATIONS[organisation]).pages(count)),
    )


class _Planner:
    """Draws the contents of one document's pages."""

    def __init__(self, rng: random.Random, style: Style, topics: tuple[Dimension, ...]):
        self.rng = rng
        self.slide = style.family.format == "slide"
        self.sampler = Sampler(rng)
        self.dimensions = rng.sample(topics, 2)
        # All pages of one dimension list the same items: that is what makes questions over two pages possible.
        self.items = {d: rng.sample(d.items, rng.randint(4, 6)) for d in self.dimensions}
        self.measures: dict[Dimension, Iterator[Measure]] = {}
        for dimension in (*self.dimensions, MONTHS):
            pool = [measure for measure in MEASURES if measure.dimension == dimension]
            self.measures[dimension] = iter(rng.sample(pool, len(pool)))
        self.boards = iter(rng.sample(BOARDS + FLOWS, len(BOARDS + FLOWS)))
        self.dashboards = iter(rng.sample(_DASHBOARDS, len(_DASHBOARDS)))

    def pages(self, count: int) -> Iterator[PagePlan]:
        first, second = self.dimensions
        chart = self.rng.choice(("pie", "line"))
        kinds: list[tuple[str, Dimension]] = [
            ("table", first), ("bars", first), ("text", second), (chart, second), ("board", second),
        ]  # fmt: skip
        while len(kinds) < count - 1:
            kinds.append((self.rng.choice(EXTRA_PAGES), self.rng.choice(self.dimensions)))
        self.rng.shuffle(kinds)
        yield PagePlan("cover", "", small=("For internal use only", f"File no. {self.rng.randint(10000, 99999)}"))
        for kind, dimension in kinds:
            yield self.page(kind, dimension)

    def page(self, kind: str, dimension: Dimension) -> PagePlan:
        if kind == "board":
            return self.board()
        if kind == "dashboard":
            shown = self.rng.sample(("table", "bars", "pie", "line"), 2)
            about = self.rng.sample(self.dimensions, 2)
            tables = tuple(self.table(panel, d, 5) for panel, d in zip(shown, about, strict=True))
            return PagePlan("dashboard", next(self.dashboards), tables, tuple(shown))
        table = self.table(kind, dimension, 7 if self.slide else 5)
        if kind == "text":
            return PagePlan(kind, table.title, (table,), sentences=tuple(self.sentences(table)))
        with_changes = kind == "table" and self.rng.random() < 0.6
        notes = tuple(self.rng.sample(_FILLERS, self.rng.randint(0, 2)))
        return PagePlan(kind, table.title, (table,), (kind,), with_changes=with_changes, notes=notes)

    def table(self, kind: str, dimension: Dimension, months: int) -> Table:
        if kind == "line":
            start = self.rng.randint(0, len(MONTHS.items) - months)
            return self.sampler.table(next(self.measures[MONTHS]), MONTHS.items[start : start + months])
        items = self.items[dimension]
        table = self.sampler.table(next(self.measures[dimension]), tuple(self.rng.sample(items, len(items))))
        if kind == "pie":
            unit = replace(table.measure, unit="percent", decimals=1)
            return replace(table, measure=unit, values=self.sampler.shares(len(items)))
        return table

    def sentences(self, table: Table) -> Iterator[tuple[str, str, str, str]]:
        measure = table.measure
        fillers = iter(self.rng.sample(_FILLERS, len(_FILLERS)))
        for item, value in list(zip(table.items, table.values, strict=True))[:5]:
            text = self.rng.choice(_SENTENCES).format(
                measure=measure.name,
                measure_lower=measure.name.lower(),
                preposition=measure.dimension.preposition,
                item=item,
                value=value,
                unit="" if measure.unit == "number" else measure.unit,
            )
            yield " ".join(text.split()).replace(" ,", ",").replace(" .", "."), measure.name, item, value
            if self.rng.random() < 0.3:
                yield next(fillers), "", "", ""

    def board(self) -> PagePlan:
        board = next(self.boards)
        count = 4 if board in FLOWS else self.rng.choice((4, 6))
        headings = tuple(self.rng.sample(board.headings, count))
        draw = self.sampler.value if board.entries == "number" else self.sampler.surname
        entries = tuple(draw() for _ in headings)
        kind = "flow" if board in FLOWS else "board"
        return PagePlan(kind, board.title, board=board, headings=headings, entries=entries)


def _draw_page(document: MiniDocument, number: int, plan: PagePlan) -> MiniPage:
    style = document.style
    canvas = Canvas(style.size, style.palette.page)
    if plan.kind == "cover":
        emblem = document.entity.emblem
        fact = draw_cover(canvas, style, document.name, emblem, document.headline, plan.small)
        return MiniPage(number, plan.kind, document.name, canvas, (fact,))
    box = draw_header(canvas, style, document.name, plan.title, document.headline, number)
    if plan.board:
        draw = draw_flow if plan.kind == "flow" else draw_board
        facts = draw(canvas, box, style, plan.board, plan.headings, plan.entries)
    elif plan.kind == "text":
        facts = draw_text(canvas, box, style, plan.sentences)
    elif plan.kind == "dashboard":
        facts = _draw_dashboard(canvas, box, style, plan)
    else:
        before = len(canvas.items)
        facts = _draw_table(canvas, box, style, plan.kind, plan.tables[0], plan.with_changes)
        free = Box(box.x1, canvas.bottom(before) + style.label_px, box.x2, box.y2)
        draw_notes(canvas, free, style, plan.notes)
    return MiniPage(number, plan.kind, plan.title, canvas, tuple(facts), plan.tables)


def _draw_dashboard(canvas: Canvas, box: Box, style: Style, plan: PagePlan) -> list[Fact]:
    gap = style.label_px * 0.8
    if style.family.format == "slide":
        middle = (box.x1 + box.x2) / 2
        panels = (Box(box.x1, box.y1, middle - gap / 2, box.y2), Box(middle + gap / 2, box.y1, box.x2, box.y2))
    else:
        middle = (box.y1 + box.y2) / 2
        panels = (Box(box.x1, box.y1, box.x2, middle - gap / 2), Box(box.x1, middle + gap / 2, box.x2, box.y2))
    inset = style.label_px * 0.5
    facts = []
    for panel, table, kind in zip(panels, plan.tables, plan.panels, strict=True):
        radius = style.label_px * 0.4 if style.family.rounded else 0
        canvas.rectangle(panel, outline=style.palette.hairline, line_width=2, radius=radius)
        font = fitted(table.title, style.heading, panel.width - 2 * inset)
        canvas.text(panel.x1 + inset, panel.y1 + style.label_px * 1.3, table.title, font, style.palette.text)
        inner = Box(panel.x1 + inset, panel.y1 + style.label_px * 2.1, panel.x2 - inset, panel.y2 - inset)
        facts += _draw_table(canvas, inner, style, kind, table, with_changes=False)
    return facts


def _draw_table(canvas: Canvas, box: Box, style: Style, kind: str, table: Table, with_changes: bool) -> list[Fact]:
    if kind == "table":
        return draw_table(canvas, box, style, table, with_changes)
    return {"bars": draw_bars, "line": draw_line, "pie": draw_pie}[kind](canvas, box, style, table)
