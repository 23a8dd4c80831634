"""What the scale policy is asked while it learns to perceive: titles, text, places, values on MiniDocs pages and crops.

Every sample is one shown image with a few questions. Crops are opened as the environment opens them, by a box in the
page's shown pixels through `View.crop`, with and without some slack around the region. No question mentions searching,
cropping or the agent's format.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from vrag_lib.actions import format_box
from vrag_lib.geometry import PATCH, Box, Size, View, render
from vrag_lib.minidocs_canvas import Text, text_width, union
from vrag_lib.minidocs_content import BOARDS, FLOWS, MEASURES, SHORT_MONTHS
from vrag_lib.minidocs_documents import MiniDocsConfig, MiniDocument, MiniPage, build_document
from vrag_lib.minidocs_pages import Fact
from vrag_lib.minidocs_questions import QuestionWriter
from vrag_lib.scale_policy import MAX_PIXELS, MIN_PIXELS

TITLE = "What is the title of this page?"
NAME = "Whose page is this?"
ITEMS = "Which items are listed?"
TEXT = "Read the text."
WHERE = "Where is: "
WHERE_TEXT = "Where is the text: "

BOX_STEP = 4
"""Boxes are written in multiples of this many shown pixels."""

_MEASURES = {measure.name: measure for measure in MEASURES}
_CAPTIONS = {board.title: board.caption for board in (*BOARDS, *FLOWS)}
_FIGURES = {"value": "figure of", "change": "change in", "share": "share of"}


@dataclass(frozen=True)
class Asked:
    """A question on an image, what kind of question it is, its answer and, where one place holds it, that `place`.
    `named` are words of the question that name something on the image, `named_place` is where that stands."""

    kind: str
    question: str
    answer: str
    place: Box | None = None
    named: str = ""
    named_place: Box | None = None


@dataclass(frozen=True)
class Sample:
    """One shown image and what is asked about it, or `words` that stand on it, each with its places; all places in
    shown pixels."""

    image: Image.Image
    turns: tuple[Asked, ...]
    words: tuple[tuple[str, tuple[Box, ...]], ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of 28x28 cells."""
        return self.image.height // 28, self.image.width // 28


class PageQuestions(QuestionWriter):
    """The benchmark's own wording of questions, for the facts of one page."""

    def __init__(self, document: MiniDocument, page: MiniPage, rng: random.Random):
        self.document, self.rng, self.name = document, rng, document.name
        self.cells: dict[str, list[tuple[MiniPage, Fact]]] = {}
        for fact in page.facts:
            self.cells.setdefault("cover" if page.kind == "cover" else fact.element, []).append((page, fact))


def phrase(fact: Fact) -> str:
    """What a fact is called in few words.

    >>> box = Box(0, 0, 1, 1)
    >>> phrase(Fact("table", "Exports", "Iron", "change", "+1.0%", box, box))
    'the change in exports for Iron'
    """
    if fact.column == "emblem":
        return "the emblem"
    if fact.column == "heading":
        return f"the box {fact.item}"
    if fact.column == "entry":
        return f"the {_CAPTIONS[fact.subject]} entry of {fact.item}"
    measure = _MEASURES[fact.subject]
    return f"the {_FIGURES[fact.column]} {measure.name.lower()} {measure.dimension.preposition} {fact.item}"


def shown_box(view: View, box: Box) -> Box:
    """A raw box in the frame of a view, rounded to multiples of `BOX_STEP` and kept inside the image."""
    x1, y1, x2, y2 = (round(v / BOX_STEP) * BOX_STEP for v in view.to_shown(box).as_tuple())
    inside = Box(x1, y1, max(x2, x1 + BOX_STEP), max(y2, y1 + BOX_STEP))
    return inside.intersection(Box(0, 0, view.shown.width, view.shown.height))


def page_view(page: MiniPage) -> View:
    """The whole page at the size the scale policy sees it."""
    return View.of_page(page.size, MIN_PIXELS, MAX_PIXELS)


def region_view(page: MiniPage, region: Box, rng: random.Random | None = None, keep: Box | None = None) -> View:
    """The crop that naming a region's box opens. With `rng` the box is loosened, more rarely tightened or shifted, but
    never past `keep`."""
    whole = page_view(page)
    box = shown_box(whole, region)
    if rng is not None and rng.random() < 0.65:
        dx, dy = 0.08 * box.width + 8, 0.08 * box.height + 8
        sides = [rng.uniform(-0.35, 1) * d for d in (dx, dy, dx, dy)]
        box = Box(box.x1 - sides[0], box.y1 - sides[1], box.x2 + sides[2], box.y2 + sides[3])
        if keep is not None:
            inner = whole.to_shown(keep)
            box = Box(min(box.x1, inner.x1), min(box.y1, inner.y1), max(box.x2, inner.x2), max(box.y2, inner.y2))
    return whole.crop(box, MIN_PIXELS, MAX_PIXELS)


def _inside(box: Box, outer: Box, slack: float = 1.0) -> bool:
    return (
        box.x1 >= outer.x1 - slack and box.y1 >= outer.y1 - slack
        and box.x2 <= outer.x2 + slack and box.y2 <= outer.y2 + slack
    )  # fmt: skip


def _distance(a: Box, b: Box) -> float:
    """Between the centres of two boxes."""
    return math.hypot(a.x1 + a.x2 - b.x1 - b.x2, a.y1 + a.y2 - b.y1 - b.y2) / 2


def visible_text(page: MiniPage, view: View, least_em: float) -> str:
    """The runs of text that lie inside a view and are shown at `least_em` pixels or more: lines from top to bottom,
    runs of one line from left to right."""
    scale = view.shown.height / view.box.height
    found = [t for t in page.canvas.texts if t.font.px * scale >= least_em and _inside(t.box, view.box)]
    lines: list[list] = []
    for text in sorted(found, key=lambda t: (t.baseline, t.x)):
        if lines and abs(lines[-1][0].baseline - text.baseline) <= 0.5 * min(text.font.px, lines[-1][0].font.px):
            lines[-1].append(text)
        else:
            lines.append([text])
    return "\n".join(" ".join(t.string for t in sorted(line, key=lambda t: t.x)) for line in lines)


def words(page: MiniPage, view: View, least_em: float = 9) -> dict[str, list[Box]]:
    """Words without digits that a view shows whole and at `least_em` pixels or more, and where (shown pixels)."""
    scale = view.shown.height / view.box.height
    found: dict[str, list[Box]] = {}
    for text in page.canvas.texts:
        if text.font.px * scale < least_em:
            continue
        start = 0
        for word in text.string.split(" "):
            end = start + len(word)
            bare = word.strip(".,:;()\"'")
            if bare and not any(c.isdigit() for c in bare):
                left, right = (text.x + text_width(text.string[:i], text.font) for i in (start, end))
                box = Box(left, text.box.y1, right, text.box.y2)
                if _inside(box, view.box, slack=2):
                    found.setdefault(bare, []).append(view.to_shown(box))
            start = end + 1
    return found


class PageSamples:
    """Samples of one page of a document."""

    def __init__(self, document: MiniDocument, page: MiniPage, rng: random.Random):
        self.document, self.page, self.rng = document, page, rng
        self.writer = PageQuestions(document, page, rng)
        self.image = page.image()

    def question(self, fact: Fact) -> str:
        """The question as the benchmark asks it, or in few words."""
        short = f"What is {phrase(fact)}?"
        if fact.column in _FIGURES and self.rng.random() < 0.6:
            return self.writer.ask(self.document.name, fact)[1]
        return short

    def layout_question(self) -> tuple[str, Fact]:
        question = self.writer.layout()
        return question.query, question.facts[0][1]

    def place_question(self, view: View, fact: Fact | None = None) -> Asked:
        """Where a fact, or any fact, is said, in the frame of a view."""
        if fact is None and "layout" in self.writer.cells and self.rng.random() < 0.6:
            question, fact = self.layout_question()
        else:
            fact = fact or self.rng.choice(self.page.facts)
            question = self.question(fact) if self.rng.random() < 0.7 else phrase(fact)
        box = format_box(shown_box(view, fact.region_box))
        return Asked("region", WHERE + question, box, fact.region_box, fact.item, fact.region_box)

    def value_question(self, shown: str, fact: Fact) -> Asked:
        kind = f"{shown} {fact.element}"
        return Asked(kind, self.question(fact), fact.value, fact.answer_box, fact.item, fact.region_box)

    def line_question(self, view: View, text: Text) -> Asked:
        box = format_box(shown_box(view, text.box))
        return Asked("line", WHERE_TEXT + text.string, box, text.box, text.string, text.box)

    def place_of(self, string: str) -> Box | None:
        """Where a string stands by itself on the page."""
        return next((text.box for text in self.page.canvas.texts if text.string == string), None)

    def whole(self) -> Sample:
        """The page at its standard size."""
        rng, page, view = self.rng, self.page, page_view(self.page)
        turns: list[Asked] = []
        if page.title and rng.random() < 0.4:
            turns.append(Asked("title", TITLE, page.title, self.place_of(page.title)))
        if rng.random() < 0.3:
            turns.append(Asked("name", NAME, self.document.name, self.place_of(self.document.name)))
        if page.kind != "cover" and rng.random() < 0.3:
            items = dict.fromkeys(
                SHORT_MONTHS.get(f.item, f.item) if page.kind == "line" else f.item for f in page.facts
            )
            turns.append(Asked("items", ITEMS, ", ".join(items)))
        turns += [self.place_question(view) for _ in range(4)]
        large = [t for t in page.canvas.texts if t.font.px * view.shown.height / view.box.height >= 9]
        if large and rng.random() < 0.5:
            text = rng.choice(large)
            if sum(t.string == text.string for t in page.canvas.texts) == 1:
                turns.append(self.line_question(view, text))
        if rng.random() < (0.7 if page.kind in ("text", "cover") else 0.05):
            turns.append(self.value_question("page", rng.choice(page.facts)))
        return self._sample(view, turns)

    def crop(self) -> Sample:
        """The region of one fact, opened as a crop."""
        rng = self.rng
        if "layout" in self.writer.cells and rng.random() < 0.5:
            question, target = self.layout_question()
        else:
            target = rng.choice(self.page.facts)
            question = self.question(target)
        view = region_view(self.page, target.region_box, rng, target.answer_box)
        turns = [Asked(f"crop {target.element}", question, target.value, target.answer_box)]
        others = [f for f in self.page.facts if _inside(f.answer_box, view.box) and f is not target]
        turns += [self.value_question("crop", fact) for fact in rng.sample(others, min(2, len(others)))]
        text = visible_text(self.page, view, 8)
        if text and rng.random() < 0.4:
            turns.append(Asked("text", TEXT, text))
        return self._sample(view, turns)

    def several_view(self) -> tuple[View, list[Fact]]:
        """A crop around two to four facts that stand together, and these facts."""
        target = self.rng.choice(self.page.facts)
        near = sorted(self.page.facts, key=lambda fact: _distance(fact.region_box, target.region_box))
        chosen = near[: self.rng.randint(2, 4)]
        around = union([fact.region_box for fact in chosen])
        return region_view(self.page, around, self.rng, target.region_box), chosen

    def several(self) -> Sample:
        """Facts that stand together, opened as one crop: which is which has to be told by its label."""
        rng, page = self.rng, self.page
        view, chosen = self.several_view()
        least_em = min(t.font.px for t in page.canvas.texts) * view.shown.height / view.box.height
        turns = []
        for fact in rng.sample(chosen, min(len(chosen), 3)):
            if not _inside(fact.region_box, view.box, slack=4):
                continue
            if rng.random() < 0.5:
                turns.append(self.place_question(view, fact))
            elif least_em >= 9:
                turns.append(self.value_question("several", fact))
        return self._sample(view, turns) if turns else self.crop()

    def naming(self) -> Sample:
        """The words that the page, or a crop of it, shows whole and large enough, and where each stands."""
        view = page_view(self.page) if self.rng.random() < 2 / 3 else self.several_view()[0]
        found = list(words(self.page, view).items())
        self.rng.shuffle(found)
        return Sample(render(self.image, view), (), tuple((word, tuple(boxes)) for word, boxes in found))

    def part(self) -> Sample:
        """Any part of the page: its text and the place of some of it."""
        rng, page = self.rng, self.page
        while True:
            anchor = rng.choice(page.canvas.texts).box
            width = anchor.width * rng.uniform(1.0, 1.6) + rng.uniform(10, 160)
            height = anchor.height + rng.uniform(8, 150)
            x = anchor.x1 - rng.uniform(0, 1) * (width - anchor.width)
            y = anchor.y1 - rng.uniform(0, 1) * (height - anchor.height)
            box = page_view(page).to_shown(Box(x, y, x + width, y + height))
            view = page_view(page).crop(box, MIN_PIXELS, MAX_PIXELS)
            text = visible_text(page, view, 8)
            if text:
                break
        turns = [Asked("text", TEXT, text)] if len(text) < 160 else []
        lines = [t for t in page.canvas.texts if _inside(t.box, view.box) and len(t.string) < 40]
        turns += [self.line_question(view, line) for line in rng.sample(lines, min(len(lines), 1 if turns else 2))]
        return self._sample(view, turns) if turns else self.part()

    def close(self) -> Sample:
        """A small cut-out around one figure at a size that is easy to read: few tokens for much reading."""
        rng, page = self.rng, self.page
        target = rng.choice(page.facts)
        box = target.answer_box
        run = min(
            page.canvas.texts, key=lambda t: abs(t.box.y1 - box.y1) + abs(t.box.x1 - box.x1) + abs(t.box.x2 - box.x2)
        )
        scale = rng.uniform(14, 36) / run.font.px
        rows = max(rng.choice((1, 2, 2, 3)), math.ceil(box.height * scale / PATCH))
        columns = max(math.ceil(box.width * scale / PATCH) + 1, rng.randint(3, 16))
        width, height = columns * PATCH / scale, rows * PATCH / scale
        if columns * rows > 48 or width > page.size.width:
            return self.crop()
        x = min(max(0, rng.uniform(box.x2 - width, box.x1)), page.size.width - width)
        y = min(max(0, rng.uniform(box.y2 - height, box.y1)), page.size.height - height)
        whole = Box(
            int(x), int(y), min(page.size.width, math.ceil(x + width)), min(page.size.height, math.ceil(y + height))
        )
        view = View(page.size, whole, Size(columns * PATCH, rows * PATCH))
        touched = [f for f in page.facts if f.answer_box.intersection(whole).area > 0]
        turns = [self.value_question("crop", target)] if len(touched) == 1 and _inside(box, whole) else []
        text = visible_text(page, view, 8)
        if text and (not turns or rng.random() < 0.5):
            turns.append(Asked("text", TEXT, text))
        return self._sample(view, turns) if turns else self.crop()

    def _sample(self, view: View, turns: list[Asked]) -> Sample:
        """The questions in random order, their places in the frame of the view."""
        self.rng.shuffle(turns)

        def shown(box: Box | None) -> Box | None:
            return None if box is None else view.to_shown(box)

        asked = (replace(turn, place=shown(turn.place), named_place=shown(turn.named_place)) for turn in turns)
        return Sample(render(self.image, view), tuple(asked))


MIX = {"whole": 1, "crop": 2, "several": 1, "part": 1, "close": 0}
"""Samples per page of the final stage: the page, crops of facts, of several facts, any part, cut-outs around a figure.
"""


def draw_samples(
    rng: random.Random, split: str, pages: int, config: MiniDocsConfig, mix: Mapping[str, float] = MIX
) -> list[Sample]:
    """Samples from each of `pages` pages of ever new documents, of every kind `mix` on average."""
    samples = []
    for _ in range(pages):
        document = build_document(config, split, rng.randrange(1_000_000))
        page = document.page(rng.randint(1, len(document.plan)))
        maker = PageSamples(document, page, rng)
        for kind, wanted in mix.items():
            samples += [getattr(maker, kind)() for _ in range(int(wanted + rng.random()))]
    return samples
