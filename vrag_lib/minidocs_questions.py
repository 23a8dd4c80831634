"""Questions on MiniDocs with exact truth: answer, gold pages, regions, and the queries that find the pages.

A question is asked in one of these wordings:

* `formal`: with the words the page uses, so the question itself retrieves the page;
* `everyday`: the measure in words that no page uses ("how much was sent abroad" for Exports);
* `aside`: everyday, after a remark that names other measures of the same document, which draws a retriever to them.

`rewritten_query` is what a good searcher types instead, and `hop_queries` has one query per gold page. A question
about an emblem ("the group known as the Silver Heron") needs the cover first, which alone says whose emblem it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vrag_lib.minidocs_content import BOARDS, FLOWS, MEASURES, NOT_ANSWERABLE, Board, Measure
from vrag_lib.minidocs_documents import MiniDocsConfig, MiniDocument, MiniPage, absent_entities
from vrag_lib.minidocs_pages import Fact

_ELEMENTS = ("text", "table", "chart")
_MEASURES = {measure.name: measure for measure in MEASURES}
_BOARDS = {board.title: board for board in BOARDS + FLOWS}
_FIGURES = {"value": "figure of", "change": "change in", "share": "share of"}
_ENDINGS = {"value": "", "change": ", set against the year before", "share": ", as a part of the whole"}
_ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class MiniQuestion:
    """One question and its truth. `facts` holds, hop by hop, the page number and the fact that is needed there."""

    template: str
    wording: str
    query: str
    answer: str
    facts: tuple[tuple[int, Fact], ...]
    hop_queries: tuple[str, ...]

    @property
    def answerable(self) -> bool:
        return self.answer != NOT_ANSWERABLE

    @property
    def multi_hop(self) -> bool:
        return len(self.facts) > 1

    @property
    def element(self) -> str:
        """text, table, chart or layout: of the fact that holds the answer; empty when nothing does."""
        return self.facts[-1][1].element if self.facts else ""

    @property
    def rewritten_query(self) -> str:
        """The query that finds the page with the answer."""
        return self.hop_queries[-1]

    @property
    def pages(self) -> tuple[int, ...]:
        """Gold pages, rising."""
        return tuple(sorted({number for number, _ in self.facts}))


def build_questions(config: MiniDocsConfig, document: MiniDocument) -> list[MiniQuestion]:
    """The questions of a document: text, table, chart and layout look-ups, two-page questions and, for about one in
    twelve, questions that nothing answers. Their kinds go round, so that every number of them is a fair mix."""
    rng = random.Random(f"minidocs questions/{config.seed}/{document.split}/{document.index}")
    writer = QuestionWriter(document, rng)
    kinds: list[Callable[[], MiniQuestion | None]] = [
        lambda: writer.lookup("table"),
        lambda: writer.lookup("chart"),
        writer.layout,
        writer.emblem,
        lambda: writer.lookup("text"),
        writer.bridge,
        lambda: writer.lookup(rng.choice(_ELEMENTS)),
        lambda: rng.choice((writer.arithmetic, writer.absent_item, writer.absent_entity))(),
    ]
    questions: list[MiniQuestion] = []
    asked: set[str] = set()
    attempts = 0
    while len(questions) < config.questions_per_document and attempts < 20 * config.questions_per_document:
        question = kinds[len(questions) % len(kinds)]() or writer.lookup(rng.choice(_ELEMENTS))
        attempts += 1
        if question.query not in asked:
            asked.add(question.query)
            questions.append(question)
    return questions


def known_by(emblem: str) -> str:
    """What a question calls an entity by its emblem.

    >>> known_by("Silver Heron")
    'the group known as the Silver Heron'
    """
    return f"the group known as the {emblem}"


class QuestionWriter:
    """Writes questions on one document."""

    def __init__(self, document: MiniDocument, rng: random.Random):
        self.document = document
        self.rng = rng
        self.name = document.name
        self.cells: dict[str, list[tuple[MiniPage, Fact]]] = {}
        for page in document.pages:
            for fact in page.facts:
                self.cells.setdefault("cover" if page.kind == "cover" else fact.element, []).append((page, fact))

    def figure(self, element: str) -> tuple[MiniPage, Fact]:
        """A value or change on some page, equally often from each page with that element."""
        pages = {page.number: page for page, _ in self.cells[element]}
        page = pages[self.rng.choice(sorted(pages))]
        return page, self.rng.choice([fact for fact in page.facts if fact.element == element])

    def ask(self, who: str, fact: Fact, item: str | None = None) -> tuple[str, str]:
        """Wording and text of a question for a fact's figure, or for that of another item of the same measure."""
        measure = _MEASURES[fact.subject]
        place = f"{measure.dimension.preposition} {item or fact.item}"
        wording = self.rng.choice(("formal", "formal", "everyday", "everyday", "aside"))
        if wording == "formal":
            what = f"the {_FIGURES[fact.column]} {measure.name.lower()} {place}"
            return wording, self.rng.choice((f"What is {what} at {who}?", f"At {who}, what is {what}?"))
        clause = f"{measure.everyday} {place}"
        end = _ENDINGS[fact.column]
        if wording == "everyday":
            return wording, self.rng.choice((f"At {who}, {clause}{end}?", f"{_capital(clause)} at {who}{end}?"))
        others = [m.name.lower() for m in self.measures() if m.name != measure.name]
        remark = " and ".join(self.rng.sample(others, 2))
        return wording, f"Leaving aside {remark}: {clause} at {who}{end}?"

    def measures(self) -> list[Measure]:
        return [table.measure for plan in self.document.plan for table in plan.tables]

    def query(self, fact: Fact, who: str | None = None) -> str:
        """Canonical search words for a fact: entity, title of its page or panel, item."""
        who = who or self.name
        if fact.element == "layout":
            return f"{who} {fact.subject} {fact.item}"
        return f"{who} {fact.subject} by {_MEASURES[fact.subject].dimension.name} {fact.item}"

    def lookup(self, element: str) -> MiniQuestion:
        page, fact = self.figure(element)
        wording, query = self.ask(self.name, fact)
        template = f"{element} {fact.column}"
        return MiniQuestion(template, wording, query, fact.value, ((page.number, fact),), (self.query(fact),))

    def layout(self) -> MiniQuestion:
        page, fact = self.figure("layout")
        cards = [f for f in page.facts if f.column == "heading"]
        if page.kind == "flow":
            return self._flow(page, cards)
        board = _BOARDS[fact.subject]
        wording = self.rng.choice(("formal", "everyday"))
        about = self._about(board, wording)
        pairs = [(a, b, "to the right of") for a, b in beside(cards)] + [(a, b, "below") for a, b in below(cards)]
        if fact.column == "heading" and pairs:
            start, end, relation = self.rng.choice(pairs)
            query = f"{about} which {board.noun} is directly {relation} {start.item}?"
            hop = f"{self.name} {board.title} {start.item}"
            return MiniQuestion("layout neighbour", wording, query, end.item, ((page.number, end),), (hop,))
        fact = next(f for f in page.facts if f.item == fact.item and f.column == "entry")
        query = f"{about} what is the {board.caption} entry of the {fact.position} {board.noun}?"
        hop = f"{self.name} {board.title}"
        return MiniQuestion("layout entry", wording, query, fact.value, ((page.number, fact),), (hop,))

    def _flow(self, page: MiniPage, cards: list[Fact]) -> MiniQuestion:
        board = _BOARDS[cards[0].subject]
        wording = self.rng.choice(("formal", "everyday"))
        about = self._about(board, wording)
        i = self.rng.randrange(1, len(cards))
        if self.rng.random() < 0.5:
            query = f"{about} which {board.noun} comes directly after {cards[i - 1].item}?"
            hop = f"{self.name} {board.title} {cards[i - 1].item}"
            return MiniQuestion("layout next", wording, query, cards[i].item, ((page.number, cards[i]),), (hop,))
        fact = next(f for f in page.facts if f.item == cards[i].item and f.column == "entry")
        query = f"{about} what is the {board.caption} entry of the {_ORDINALS[i]} {board.noun}?"
        hop = f"{self.name} {board.title}"
        return MiniQuestion("layout entry", wording, query, fact.value, ((page.number, fact),), (hop,))

    def _about(self, board: Board, wording: str) -> str:
        if wording == "formal":
            return f"On the {board.title.lower()} page of {self.name},"
        return f"{_capital(board.everyday)} at {self.name}:"

    def emblem(self) -> MiniQuestion:
        """Two pages: the cover says whose emblem it is, another page has the figure."""
        cover, known_as = self.cells["cover"][0]
        page, fact = self.figure(self.rng.choice(_ELEMENTS))
        wording, query = self.ask(known_by(known_as.value), fact)
        hops = (f"known as the {known_as.value}", self.query(fact))
        return MiniQuestion("emblem", wording, query, fact.value, ((cover.number, known_as), (page.number, fact)), hops)

    def bridge(self) -> MiniQuestion | None:
        """Two pages: which item leads on one of them, and what the other says about that item."""
        pairs = list(self._pairs())
        if not pairs:
            return None
        (page, facts), (other, targets) = self.rng.choice(pairs)
        highest = self.rng.random() < 0.7
        chosen = (max if highest else min)(facts, key=lambda f: float(f.value.rstrip("%")))
        target = next(f for f in targets if f.item == chosen.item)
        first, second = _MEASURES[chosen.subject], _MEASURES[target.subject]
        word = self.rng.choice(("highest", "largest")) if highest else self.rng.choice(("lowest", "smallest"))
        query = (
            f"At {self.name}, take the {first.dimension.one} with the {word} {_FIGURES[chosen.column]} "
            f"{first.name.lower()}: what is its {_FIGURES[target.column]} {second.name.lower()}?"
        )
        hops = (f"{self.name} {first.name} by {first.dimension.name}", self.query(target))
        facts_needed = ((page.number, chosen), (other.number, target))
        return MiniQuestion("bridge", "formal", query, target.value, facts_needed, hops)

    def _pairs(self) -> Iterator[tuple[tuple[MiniPage, list[Fact]], tuple[MiniPage, list[Fact]]]]:
        """Pairs of tables on two pages with the same items, without changes; the first is no text page."""
        groups: list[tuple[MiniPage, list[Fact]]] = []
        for page in self.document.pages:
            figures = [fact for fact in page.facts if fact.column in ("value", "share")]
            for subject in dict.fromkeys(fact.subject for fact in figures):
                groups.append((page, [fact for fact in figures if fact.subject == subject]))
        for page, facts in groups:
            for other, targets in groups:
                items = {f.item for f in facts}
                if page.number != other.number and facts[0].element != "text" and items <= {f.item for f in targets}:
                    yield (page, facts), (other, targets)

    def arithmetic(self) -> MiniQuestion | None:
        """Two pages: the sum or the difference of two whole numbers for one item."""
        pairs = [
            (page, a, other, b)
            for (page, facts), (other, targets) in self._pairs()
            for a in facts
            for b in targets
            if a.item == b.item and a.value.isdigit() and b.value.isdigit()
        ]
        if not pairs:
            return None
        page, a, other, b = self.rng.choice(pairs)
        if int(a.value) < int(b.value):
            page, a, other, b = other, b, page, a
        first, second = _MEASURES[a.subject], _MEASURES[b.subject]
        place = f"{first.dimension.preposition} {a.item}"
        if self.rng.random() < 0.5:
            template, answer = "sum", str(int(a.value) + int(b.value))
            query = f"At {self.name}, what do {first.name.lower()} and {second.name.lower()} {place} add up to?"
        else:
            template, answer = "difference", str(int(a.value) - int(b.value))
            larger = f"the figure of {first.name.lower()} {place}"
            query = f"At {self.name}, by how much does {larger} exceed that of {second.name.lower()}?"
        hops = (self.query(a), self.query(b))
        return MiniQuestion(template, "formal", query, answer, ((page.number, a), (other.number, b)), hops)

    def absent_item(self) -> MiniQuestion:
        """A page that exists, an item it does not list."""
        _, fact = self.figure(self.rng.choice(_ELEMENTS))
        measure = _MEASURES[fact.subject]
        named = {f.item for page in self.document.pages for f in page.facts}
        item = self.rng.choice([item for item in measure.dimension.items if item not in named])
        wording, query = self.ask(self.name, fact, item)
        hop = f"{self.name} {measure.name} by {measure.dimension.name} {item}"
        return MiniQuestion("absent item", wording, query, NOT_ANSWERABLE, (), (hop,))

    def absent_entity(self) -> MiniQuestion:
        """An entity that no document is about."""
        _, fact = self.figure(self.rng.choice(_ELEMENTS))
        who = f"{self.rng.choice(absent_entities(self.document.split)).name} {self.document.organisation}"
        wording, query = self.ask(who, fact)
        return MiniQuestion("absent entity", wording, query, NOT_ANSWERABLE, (), (self.query(fact, who),))


def _capital(clause: str) -> str:
    return clause[0].upper() + clause[1:]


def beside(cards: Sequence[Fact]) -> list[tuple[Fact, Fact]]:
    """Cards and their right-hand neighbours."""
    return [(a, b) for a, b in pairwise(cards) if b.region_box.y1 == a.region_box.y1]


def below(cards: Sequence[Fact]) -> list[tuple[Fact, Fact]]:
    """Cards and the ones directly below them."""
    columns: dict[float, list[Fact]] = {}
    for card in cards:
        columns.setdefault(card.region_box.x1, []).append(card)
    return [pair for column in columns.values() for pair in pairwise(column)]
