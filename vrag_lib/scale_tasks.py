"""What the scale policy is asked while it learns to perceive: titles, text, places, values on MiniDocs pages and crops.

A sample is one shown image with a few questions, or a conversation in which texts are asked about and images follow one
another. Crops are opened as the environment opens them, by a box in the
page's shown pixels through `View.crop`, with and without some slack around the region. No question mentions searching,
cropping or the agent's format.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from vrag_lib.actions import format_box, quote_page
from vrag_lib.geometry import PATCH, Box, Size, View, render
from vrag_lib.minidocs_canvas import text_width, union
from vrag_lib.minidocs_content import BOARDS, FIGURE_NAMES, FLOWS, MEASURES, SHORT_MONTHS
from vrag_lib.minidocs_documents import MiniDocsConfig, MiniDocument, MiniPage, build_document
from vrag_lib.minidocs_pages import Fact
from vrag_lib.minidocs_questions import QuestionWriter, known_by
from vrag_lib.scale_policy import BOX_STEP, MAX_PIXELS, MIN_PIXELS

TITLE = "What is the title of this page?"
NAME = "Whose page is this?"
ITEMS = "Which items are listed?"
TEXT = "Read the text."
WHERE = "Where is: "
REPEAT = "Repeat: "
WHO, WHICH, WHAT = "Whose page is asked for: ", "Which item is asked for: ", "Which measure is asked for: "
ABOUT, COLUMN = "What is asked for: ", "Figure, change or share: "
IT_WHERE, IT_WHAT = ("Where is it?", "Where does the page say it?"), ("What is it?", "Read it.")
SAY_WHERE = ("{} is here: ", "{} is in this box: ", "{}, here: ")
SAY_WHAT = ("{} is ", "{}: ", "The page says: {} is ")

LEGIBLE_EM = 14
"""Em height in shown pixels from which all values of a whole page of text are asked for."""

QUOTED_CHARS = 2048
"""Most characters of a page that is quoted."""

PAGE_KINDS = ((), ("text",), ("board", "flow"))
"""Kinds of pages that samples may be drawn from: any, those of text, those of cards."""

_MEASURES = {measure.name: measure for measure in MEASURES}
_CAPTIONS = {board.title: board.caption for board in (*BOARDS, *FLOWS)}
_FIGURES = {"value": "figure of", "change": "change in", "share": "share of"}
_COLUMNS = {"value": "figure", "change": "change", "share": "share"}


@dataclass(frozen=True)
class Asked:
    """A question on an image, what kind of question it is and its answer.

    `places` are where the answer is read, for a box the label of its region; `printed` says that there it is printed in
    one line. `named` ends the part of the question that names something on the image,
    `named_places` are where that stands, and `card` says that it is named by its place among others. `echoes` are parts
    of the reply and the words of this question, or of an earlier one, that say them. `saying` is written before the
    answer; then it is there that something is named.
    """

    kind: str
    question: str
    answer: str
    places: tuple[Box, ...] = ()
    printed: bool = False
    named: str = ""
    named_places: tuple[Box, ...] = ()
    card: bool = False
    echoes: tuple[tuple[str, str], ...] = ()
    saying: str = ""


@dataclass(frozen=True)
class Sample:
    """One shown image and what is asked about it, or `words` that stand on it, each with its places; all places in
    shown pixels of the newest image.

    `later`: images that are shown with a later question, by its number; without a first `image` texts are asked about.
    """

    image: Image.Image | None
    turns: tuple[Asked, ...]
    words: tuple[tuple[str, tuple[Box, ...]], ...] = ()
    later: tuple[tuple[int, Image.Image], ...] = ()

    @property
    def images(self) -> dict[int, Image.Image]:
        """The images by the number of the question that each is shown with."""
        return dict(self.later) if self.image is None else {0: self.image} | dict(self.later)

    @property
    def size(self) -> int:
        """About how many tokens it is."""
        return sum(image.height * image.width // PATCH**2 for image in self.images.values()) + 30 * len(self.turns)


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


def shown_em(px: float, view: View) -> float:
    """The em height in shown pixels of print that is `px` raw pixels high."""
    return px * view.shown.height / view.box.height


def visible_text(page: MiniPage, view: View, least_em: float) -> str:
    """The runs of text that lie inside a view and are shown at `least_em` pixels or more: lines from top to bottom,
    runs of one line from left to right."""
    found = [t for t in page.canvas.texts if shown_em(t.font.px, view) >= least_em and _inside(t.box, view.box)]
    lines: list[list] = []
    for text in sorted(found, key=lambda t: (t.baseline, t.x)):
        if lines and abs(lines[-1][0].baseline - text.baseline) <= 0.5 * min(text.font.px, lines[-1][0].font.px):
            lines[-1].append(text)
        else:
            lines.append([text])
    return "\n".join(" ".join(t.string for t in sorted(line, key=lambda t: t.x)) for line in lines)


def words(page: MiniPage, view: View, least_em: float = 9) -> dict[str, list[Box]]:
    """Words without digits that a view shows whole and at `least_em` pixels or more, and where (shown pixels)."""
    found: dict[str, list[Box]] = {}
    for text in page.canvas.texts:
        if shown_em(text.font.px, view) < least_em:
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


def label_of(fact: Fact) -> str:
    """The word that a page shows for the item of a fact."""
    return SHORT_MONTHS[fact.item] if fact.element == "chart" and fact.item in SHORT_MONTHS else fact.item


def label_boxes(view: View, fact: Fact, found: Mapping[str, list[Box]]) -> list[Box]:
    """Where the label of a fact stands inside its region; `found` are the `words` of the view, boxes in its frame."""
    region = view.to_shown(fact.region_box)
    inside = []
    for box in found.get(label_of(fact), found.get(fact.item, [])):
        x, y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
        if region.x1 - 2 <= x <= region.x2 + 2 and region.y1 - 2 <= y <= region.y2 + 2:
            inside.append(box)
    return inside


class PageSamples:
    """Samples of one page of a document."""

    def __init__(self, document: MiniDocument, page: MiniPage, rng: random.Random):
        self.document, self.page, self.rng = document, page, rng
        self.writer = PageQuestions(document, page, rng)
        self.image = page.image()
        self._words: dict[View, dict[str, list[Box]]] = {}

    def question(self, fact: Fact) -> str:
        """The question as the benchmark asks it, or in few words."""
        short = f"What is {phrase(fact)}?"
        if fact.column in _FIGURES and self.rng.random() < 0.6:
            return self.writer.ask(self.document.name, fact)[1]
        return short

    def layout_question(self) -> tuple[str, Fact]:
        question = self.writer.layout()
        return question.query, question.facts[0][1]

    def any_question(self) -> tuple[str, Fact]:
        """A question of the benchmark on this page and the fact that answers it."""
        if "layout" in self.writer.cells and self.rng.random() < 0.6:
            return self.layout_question()
        fact = self.rng.choice(self.page.facts)
        return self.question(fact), fact

    def labels(self, view: View, fact: Fact) -> tuple[Box, ...]:
        """Where a view shows the label of a fact."""
        if view not in self._words:
            self._words[view] = words(self.page, view)
        return tuple(label_boxes(view, fact, self._words[view]))

    def _asked(self, kind: str, view: View, question: str, fact: Fact, answer: str, places: tuple[Box, ...]) -> Asked:
        """A question and what it names: an item by its word, or a card by where it is among others."""
        card = fact.item not in question
        named = question.rstrip("?") if card else fact.item
        names = fact.element == "layout" or not card
        places_of_name = self.labels(view, fact) if names else ()
        return Asked(kind, question, answer, places, kind != "region", named if names else "", places_of_name, card)

    def place_question(self, view: View, fact: Fact | None = None) -> Asked:
        """Where a fact, or any fact, is said, in the frame of a view."""
        if fact is None:
            question, fact = self.any_question()
        else:
            question = self.question(fact)
        if self.rng.random() < 0.2:
            question = phrase(fact)
        box = format_box(shown_box(view, fact.region_box))
        return self._asked("region", view, WHERE + question, fact, box, self.labels(view, fact))

    def value_question(self, shown: str, view: View, fact: Fact, question: str = "") -> Asked:
        place = (view.to_shown(fact.answer_box),)
        return self._asked(f"{shown} {fact.element}", view, question or self.question(fact), fact, fact.value, place)

    def printed(self, kind: str, view: View, question: str, string: str) -> Asked:
        """A question whose answer stands by itself on the page."""
        places = [view.to_shown(text.box) for text in self.page.canvas.texts if text.string == string]
        return Asked(kind, question, string, tuple(places[:1]), bool(places))

    def whole(self) -> Sample:
        """The page at its standard size."""
        rng, page, view = self.rng, self.page, page_view(self.page)
        turns: list[Asked] = []
        if page.title and rng.random() < 0.4:
            turns.append(self.printed("title", view, TITLE, page.title))
        if rng.random() < 0.2:
            turns.append(self.printed("name", view, NAME, self.document.name))
        if page.kind != "cover" and rng.random() < 0.15:
            turns.append(Asked("items", ITEMS, ", ".join(dict.fromkeys(label_of(fact) for fact in page.facts))))
        asked = [self.place_question(view) for _ in range(6)]
        turns += {turn.answer: turn for turn in asked}.values()
        if page.kind == "text" and shown_em(self.document.style.text_px, view) >= LEGIBLE_EM:
            turns += [self.value_question("page", view, fact) for fact in page.facts]
        elif rng.random() < (0.7 if page.kind in ("text", "cover") else 0.05):
            turns.append(self.value_question("page", view, rng.choice(page.facts)))
        return self._sample(view, turns)

    def crop(self) -> Sample:
        """The region of one fact, opened as a crop."""
        rng = self.rng
        question, target = self.any_question()
        view = region_view(self.page, target.region_box, rng, target.answer_box)
        turns = [self.value_question("crop", view, target, question)]
        others = [f for f in self.page.facts if _inside(f.answer_box, view.box) and f is not target]
        turns += [self.value_question("crop", view, fact) for fact in rng.sample(others, min(2, len(others)))]
        return self._sample(view, turns)

    def several_view(self) -> tuple[View, list[Fact]]:
        """A crop around two to four facts that stand together, and these facts."""
        target = self.rng.choice(self.page.facts)
        near = sorted(self.page.facts, key=lambda fact: _distance(fact.region_box, target.region_box))
        chosen = near[: self.rng.randint(2, 4)]
        around = union([fact.region_box for fact in chosen])
        return region_view(self.page, around, self.rng, target.region_box), chosen

    def several(self) -> Sample:
        """Facts that stand together, opened as one crop: which is which has to be told by its label. Where its print is
        too small for figures, the crop of one fact."""
        rng, page = self.rng, self.page
        view, chosen = self.several_view()
        least_em = shown_em(min(t.font.px for t in page.canvas.texts), view)
        turns = []
        for fact in rng.sample(chosen, min(len(chosen), 3)):
            if least_em >= 9 and _inside(fact.region_box, view.box, slack=4):
                turns.append(self.value_question("several", view, fact))
        return self._sample(view, turns) if turns else self.crop()

    def naming(self) -> Sample:
        """The words that the page, or a crop of it, shows whole and large enough, and where each stands."""
        view = page_view(self.page) if self.rng.random() < 2 / 3 else self.several_view()[0]
        found = list(words(self.page, view).items())
        self.rng.shuffle(found)
        return Sample(render(self.image, view), (), tuple((word, tuple(boxes)) for word, boxes in found))

    def close_view(self) -> tuple[View, Fact]:
        """A small cut-out around one figure at a size that is easy to read, or the crop of its region, and the fact."""
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
            return region_view(page, target.region_box, rng, target.answer_box), target
        x = min(max(0, rng.uniform(box.x2 - width, box.x1)), page.size.width - width)
        y = min(max(0, rng.uniform(box.y2 - height, box.y1)), page.size.height - height)
        whole = Box(
            int(x), int(y), min(page.size.width, math.ceil(x + width)), min(page.size.height, math.ceil(y + height))
        )
        return View(page.size, whole, Size(columns * PATCH, rows * PATCH)), target

    def close(self) -> Sample:
        """Few tokens for much reading: a question and the text of a small cut-out."""
        view, target = self.close_view()
        touched = [f for f in self.page.facts if f.answer_box.intersection(view.box).area > 0]
        alone = len(touched) == 1 and _inside(target.answer_box, view.box)
        turns = [self.value_question("crop", view, target)] if alone else []
        text = visible_text(self.page, view, 8)
        if text and (not turns or self.rng.random() < 0.5):
            turns.append(Asked("text", TEXT, text))
        return self._sample(view, turns) if turns else self.crop()

    def language(self) -> Sample:
        """What is asked about texts instead of the image, a small cut-out: to write them, or a part of them, again, as
        every language model can."""
        return self._sample(self.close_view()[0], [self.text_question() for _ in range(6)])

    def who(self) -> tuple[str, str]:
        """Whom a question names, its words for them, and what there is to copy: the document's name, or its emblem."""
        if self.rng.random() < 0.7:
            return self.document.name, self.document.name
        emblem = self.document.entity.emblem
        return known_by(emblem), emblem

    def text_question(self) -> Asked:
        """To write a text again, or whom, which item, which measure or which column a question of the benchmark asks
        for."""
        rng = self.rng
        measure = rng.choice(MEASURES)
        item, (who, name) = rng.choice(measure.dimension.items), self.who()
        nowhere = Box(0, 0, 1, 1)
        fact = Fact("table", measure.name, item, rng.choice(tuple(_FIGURES)), "", nowhere, nowhere)
        kind = rng.choice((REPEAT, WHO, WHICH, WHAT, ABOUT, COLUMN))
        if kind != REPEAT:
            wording, question = self.writer.ask(who, fact)
            if kind == COLUMN:
                return Asked("column", kind + question, _COLUMNS[fact.column])
            parts = {WHO: (name,), WHICH: (item,), WHAT: (measure.name,), ABOUT: (name, measure.name, item)}[kind]
            return self.echo(kind, question, parts, fact, wording)
        parts = [name, item, measure.name, rng.choice(rng.choice(MEASURES).dimension.items)]
        rng.shuffle(parts)
        text = " ".join(parts[: rng.randint(2, len(parts))])
        return Asked("copy", REPEAT + text, text, echoes=((text, text),))

    def echo(self, kind: str, question: str, parts: tuple[str, ...], fact: Fact, wording: str) -> Asked:
        """What a question asks for: `parts` are the answer, the fact's measure among them in the page's words."""
        measure = _MEASURES[fact.subject]
        said = measure.name.lower() if wording == "formal" else measure.everyday
        echoes = tuple((part, said if part == measure.name else part) for part in parts)
        name = {WHAT: "measure", ABOUT: "about"}.get(kind, "copy")
        return Asked(name, kind + question, " ".join(parts), echoes=echoes)

    def quoted(self) -> Sample:
        """The page as text, quoted as the environment does it, and a value on it asked for; no image."""
        fact = self.rng.choice([fact for fact in self.page.facts if fact.column != "heading"])
        text = quote_page("\n".join(line for line, _ in self.page.lines), QUOTED_CHARS)
        asked = f"{text}\n{self.question(fact)}"
        return Sample(None, (Asked("quoted " + fact.element, asked, fact.value, echoes=((fact.value, fact.value),)),))

    def told(self, asked: Asked, fact: Fact) -> Asked:
        """The same asked without naming it, after the question was put before: the reply names it, by its column and
        its item."""
        is_box = asked.kind == "region"
        called = FIGURE_NAMES[fact.column].format(fact.item)
        saying = self.rng.choice(SAY_WHERE if is_box else SAY_WHAT).format(called)
        return replace(
            asked, kind=asked.kind if is_box else "told " + asked.kind.split()[-1],
            question=self.rng.choice(IT_WHERE if is_box else IT_WHAT), named=fact.item, card=False,
            echoes=((fact.item, fact.item),), saying=saying,
        )  # fmt: skip

    def conversation(self) -> Sample:
        """Questions about texts; then, more often than not, where something stands on a page of the document, and what
        a crop of it says; then the same on this page. What is asked for may have been said before the images came."""
        rng = self.rng
        turns = [self.text_question() for _ in range(rng.randint(2, 6))]
        later: list[tuple[int, Image.Image]] = []
        makers = [self]
        if rng.random() < 0.6:
            number = rng.randint(1, len(self.document.plan))
            makers.insert(0, PageSamples(self.document, self.document.page(number), rng))
        for maker in makers:
            question, fact = maker.any_question()
            tells = fact.column in _FIGURES and rng.random() < 0.7
            if tells:
                who, name = self.who()
                wording, question = maker.writer.ask(who, fact)
                parts = (name, fact.subject, fact.item)
                turns.append(self.echo(ABOUT, question, parts, fact, wording))
            view = page_view(maker.page)
            if rng.random() < 0.9:
                later.append((len(turns), render(maker.image, view)))
                place = maker.place_question(view, fact)
                turns.append(self.told(place, fact) if tells else place)
            if rng.random() < 0.8:
                crop = region_view(maker.page, fact.region_box, rng, fact.answer_box)
                later.append((len(turns), render(maker.image, crop)))
                value = maker.value_question("later", crop, fact, question)
                turns.append(self.told(value, fact) if tells else value)
        return Sample(None, tuple(turns), (), tuple(later)) if later else self.language()

    def _sample(self, view: View, turns: list[Asked]) -> Sample:
        """The questions in random order."""
        self.rng.shuffle(turns)
        return Sample(render(self.image, view), tuple(turns))


MIX = {"whole": 1, "crop": 2, "several": 1, "close": 0, "language": 0.5, "conversation": 1}
"""Samples per page that draw the curves: the page, crops of facts, of several facts, cut-outs around a figure, words of
questions, conversations about several images."""


def draw_page(
    rng: random.Random, split: str, config: MiniDocsConfig, shares: Sequence[float] = ()
) -> tuple[MiniDocument, MiniPage]:
    """A page of an ever new document; `shares` say how often it is of each of `PAGE_KINDS`; without them, of any."""
    document = build_document(config, split, rng.randrange(1_000_000))
    kinds = rng.choices(PAGE_KINDS, shares)[0] if shares else ()
    numbers = [number for number, plan in enumerate(document.plan, 1) if not kinds or plan.kind in kinds]
    return document, document.page(numbers[rng.randint(1, len(numbers)) - 1])


def draw_samples(
    rng: random.Random,
    split: str,
    pages: int,
    config: MiniDocsConfig,
    mix: Mapping[str, float] = MIX,
    shares: Sequence[float] = (),
) -> list[Sample]:
    """Samples from each of `pages` pages (`draw_page`), of every kind `mix` on average."""
    samples = []
    for _ in range(pages):
        document, page = draw_page(rng, split, config, shares)
        maker = PageSamples(document, page, rng)
        for kind, wanted in mix.items():
            samples += [getattr(maker, kind)() for _ in range(int(wanted + rng.random()))]
    return samples
