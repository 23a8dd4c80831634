"""The extractive policy: search, crop and answer without any model. The offline default for real documents.

This is a lexical baseline and not in the paper. It does what a reader in a hurry would: it looks on each page shown
for the region that holds most of the question's words, weighted by how rare they are, crops it, and answers with a
few of its words: a number for "how many", a year for "when", a name for "who", else the sentence that shares most
with the question. It understands nothing: it cannot compare, count, add, read a chart without labels, or tell that a
question has no answer. It is deterministic, and speaks through the same tags as any model.

It looks at the text of pages that were shown to it and at no others; of the rest of the corpus it knows only how
common each word is. It answers from the page shown last, never from an earlier one, so that the last image of a
trajectory is what its answer stands on: a page that it leaves for another search is given up for good.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from vrag_lib.actions import IMAGE_TOKENS, LAST_TURN, Action, ActionKind, format_box, format_reply, parse_reply
from vrag_lib.geometry import Box, View
from vrag_lib.policy import Conversation, Reply

if TYPE_CHECKING:
    from vrag_lib.corpus import Corpus, Page

GOOD_FIT = 0.45
"""A page at least this good is answered from; below it, the policy searches on."""

LEAST_FIT = 0.3
"""When the searches are used up, a page below this shares so little with the question that nothing was found."""

MAX_ANSWER_WORDS = 20
NO_TEXT = "no readable text was found on the pages shown"
NOT_FOUND = "not found on the pages shown"

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: one token per character
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_STOP_WORDS = frozenset(
    _WORD.findall(
        "a about according all an and any are as at be been by can could did do does document documents each figure "
        "for from give given had has have how i if in into is it its list many me much name of on one or out page "
        "pages per please provide shown show so such than that the their them there these they this those to us was "
        "we were what when where which who whom whose why will with would you your"
    )
)
_UNITS = r"(?:\s?(?:%|percent\b|thousand\b|million\b|billion\b|bn\b|k\b|m\b))?"
_NUMBER = re.compile(rf"[$€£¥]?\s?(?<![\w.])\d[\d,]*(?:\.\d+)?{_UNITS}", re.I)
_PERCENT = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?\s?(?:%|percent\b)", re.I)
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?|"
    r"Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_DATE = re.compile(rf"(?:\d{{1,2}}\s+{_MONTH}\s+|{_MONTH}\s+(?:\d{{1,2}},?\s+)?)?\b(?:1[5-9]|20)\d\d\b")
_CAPITALISED = rf"(?!{_MONTH})[A-Z][\w.'’-]*"
_NAME = re.compile(rf"\b{_CAPITALISED}(?:\s+(?:(?:de|der|la|van|von|of|al)\s+){{0,2}}{_CAPITALISED}){{1,4}}")
_ANSWER_TYPES = (
    (re.compile(r"\bpercent|%|\b(?:share|proportion|fraction)\b", re.I), (_PERCENT, _NUMBER)),
    (re.compile(r"\b(?:when|(?:what|which) (?:year|date|month)|year)\b", re.I), (_DATE,)),
    (re.compile(r"\b(?:how (?:many|much|long|old|large|big|far|high|tall)|number of|total|amount|cost|price)\b", re.I),
     (_NUMBER,)),
    (re.compile(r"\b(?:who|whom|whose|author|authors)\b", re.I), (_NAME,)),
)  # fmt: skip
_COUNTED = re.compile(r"\b(?:how many|number of)((?:\s+[\w-]+){1,3})", re.I)
_BULLETS = " ,;:•▪●◦*\uf0a7\uf0b7\uf0d8"
_TAGS = re.compile(r"</?(?:think|search|bbox|answer)>|" + "|".join(re.escape(token) for token in IMAGE_TOKENS))


@dataclass(frozen=True)
class Region:
    """A part of a page: its lines by index, its box in raw pixels, and how well it fits: `score` ranks regions,
    `fit` in [0, 1] says how much of the question the region and its page hold."""

    page_id: str
    lines: tuple[int, ...]
    box: Box
    score: float
    fit: float


class ExtractivePolicy:
    """Answers from the text of shown pages (see the module's docstring for what it cannot do).

    corpus: pages with text lines. max_searches: searches before it makes do with the page it has.
    """

    def __init__(self, corpus: Corpus, max_searches: int = 3):
        import Stemmer

        self.name = "extractive"
        self.corpus = corpus
        self.max_searches = max_searches
        stem = Stemmer.Stemmer("english").stemWord
        self._stem = lru_cache(None)(lambda word: stem(word))
        frequency: Counter[str] = Counter()
        for page in corpus.pages:
            frequency.update({s for line in page.lines for s, _ in self._stems(line.text)})
        self._idf = {s: math.log(1 + len(corpus.pages) / n) for s, n in frequency.items()}
        self._unseen_idf = math.log(1 + len(corpus.pages))

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]:
        """One reply per conversation; seeds make no difference."""
        return [Reply(self._reply(conversation)) for conversation in conversations]

    def _reply(self, conversation: Conversation) -> str:
        question = read_question(conversation[0].text)
        if not plain(question):
            return format_reply("There is no question.", ActionKind.ANSWER, NOT_FOUND)
        actions = [parse_reply(turn.text) for turn in conversation if turn.role == "assistant"]
        kinds = [action.kind if isinstance(action, Action) else None for action in actions]
        images = [image for turn in conversation for image in turn.images]
        pages = list(dict.fromkeys(image.page_id for image in images))
        is_last = conversation[-1].text.endswith(LAST_TURN)
        searches = kinds.count(ActionKind.SEARCH)
        if not searches and not is_last:
            return format_reply("I need a page that answers this.", ActionKind.SEARCH, plain(question))
        region = self.best_region(question, pages[-1]) if pages else None
        fit = region.fit if region is not None else 0.0
        looked_closer = bool(kinds) and kinds[-1] is not ActionKind.SEARCH
        if not is_last and not looked_closer:
            if fit < GOOD_FIT and searches < self.max_searches:
                thought = "This page does not hold enough of the question." if pages else "There is no page yet."
                return format_reply(thought, ActionKind.SEARCH, self._other_words(question, pages, searches))
            if region is not None and fit >= LEAST_FIT and "<bbox>" in conversation[0].text:
                shown = images[-1].view.shown
                box = shown_box(region.box, images[-1].view)
                if box.area < 0.6 * shown.width * shown.height:
                    thought = "This part holds most of the question's words; a closer look."
                    return format_reply(thought, ActionKind.CROP, format_box(box))
        if region is None or fit < LEAST_FIT:
            readable = any(self.corpus.page(page_id).lines for page_id in pages)
            thought = "No page I saw holds enough of the question."
            return format_reply(thought, ActionKind.ANSWER, NOT_FOUND if readable else NO_TEXT)
        answer = plain(self.answer(question, region)) or NOT_FOUND
        return format_reply(plain(f"Page {region.page_id} fits the question."), ActionKind.ANSWER, answer)

    def _stems(self, text: str) -> list[tuple[str, int]]:
        """Stems of the words of a text and where each begins."""
        return [(self._stem(match.group().lower()), match.start()) for match in _WORD.finditer(text)]

    def terms(self, question: str) -> dict[str, float]:
        """The question's stems without stop words, and their weights: idf over the pages of the corpus."""
        words = [match.group().lower() for match in _WORD.finditer(question)]
        kept = [word for word in words if word not in _STOP_WORDS] or words
        return {stem: self._idf.get(stem, self._unseen_idf) for stem in map(self._stem, kept)}

    def _other_words(self, question: str, pages: list[str], searches: int) -> str:
        """Another query: first the question's content words, then those that no page seen so far holds."""
        words = [m.group() for m in _WORD.finditer(question) if m.group().lower() not in _STOP_WORDS]
        if searches > 1:
            seen = {
                s for page_id in pages for line in self.corpus.page(page_id).lines for s, _ in self._stems(line.text)
            }
            words = [word for word in words if self._stem(word.lower()) not in seen] or words[::-1]
        return plain(" ".join(dict.fromkeys(words))) or plain(question)

    def best_region(self, question: str, page_id: str) -> Region | None:
        """The region of a page that fits the question best; None if no line shares a word with it.

        Candidates are rectangles about each line: three heights, as wide as the line or as the page (a table row).
        """
        page = self.corpus.page(page_id)
        terms = self.terms(question)
        if not page.lines or not terms:
            return None
        weights = np.array(list(terms.values())) / sum(terms.values())  # (Q,)
        held = np.array([[stem in stems for stem in terms] for stems in self._line_stems(page)])  # (L, Q)
        cue = np.array([any(p.search(line.text) for p in answer_patterns(question)) for line in page.lines])  # (L,)
        boxes = np.array([line.box.as_tuple() for line in page.lines])  # (L, 4)
        middle = (boxes[:, 1] + boxes[:, 3]) / 2
        tall = max(1.0, float(np.median(boxes[:, 3] - boxes[:, 1])))
        best: tuple[float, np.ndarray] | None = None
        for i in np.flatnonzero(held.any(1)):
            for left, right in ((boxes[i, 0], boxes[i, 2]), (0.0, float(page.size.width))):
                common = np.minimum(boxes[:, 2], right) - np.maximum(boxes[:, 0], left)
                beside = common >= 0.5 * (boxes[:, 2] - boxes[:, 0])
                for reach in (0.6, 2.5, 6.0):
                    chosen = beside & (abs(middle - middle[i]) <= reach * tall)
                    chosen[i] = True
                    score = held[chosen].any(0) @ weights + 0.1 * cue[chosen].any() - 0.02 * math.log2(chosen.sum())
                    if best is None or score > best[0] + 1e-9:
                        best = score, np.flatnonzero(chosen)
        if best is None:
            return None
        lines = best[1]
        fit = 0.7 * float(held[lines].any(0) @ weights) + 0.3 * float(held.any(0) @ weights)
        margin = 0.4 * tall
        box = Box(
            max(0.0, boxes[lines, 0].min() - margin),
            max(0.0, boxes[lines, 1].min() - margin),
            min(float(page.size.width), boxes[lines, 2].max() + margin),
            min(float(page.size.height), boxes[lines, 3].max() + margin),
        )
        return Region(page_id, tuple(lines.tolist()), box, float(best[0]), fit)

    def _line_stems(self, page: Page) -> list[set[str]]:
        return [{stem for stem, _ in self._stems(line.text)} for line in page.lines]

    def answer(self, question: str, region: Region) -> str:
        """A short span of the region: of the type the question asks for and nearest to its words, else a sentence."""
        page = self.corpus.page(region.page_id)
        terms = self.terms(question)
        places: dict[str, list[tuple[float, float]]] = {}
        for i in region.lines:
            for stem, start in self._stems(page.lines[i].text):
                if stem in terms:
                    places.setdefault(stem, []).append(_place(page, i, start))
        tall = max(1.0, float(np.median([line.box.height for line in page.lines])))

        def distance(place: tuple[float, float]) -> float:
            """Sum of distances to the question's words, each to the nearest place it stands at, by weight."""
            return sum(
                terms[stem] * min(_apart(place, other, tall) for other in others) for stem, others in places.items()
            )

        counted = {stem for words in _COUNTED.findall(question) for stem, _ in self._stems(words)} & set(terms)
        asked = {stem for stem, _ in self._stems(question)}
        for pattern in answer_patterns(question):
            spans = []
            for i in region.lines:
                text = page.lines[i].text
                for match in pattern.finditer(text):
                    if {stem for stem, _ in self._stems(match.group())} <= asked:
                        continue  # the question says it already
                    after = {stem for stem, _ in self._stems(text[match.end() :])[:2]}
                    place = _place(page, i, (match.start() + match.end()) / 2)
                    # In "3 compulsory courses" the number counts what was asked for, and a bare year counts nothing:
                    # both say more than being near.
                    is_year = pattern is not _DATE and bool(_DATE.fullmatch(match.group()))
                    spans.append((not after & counted, is_year, distance(place), i, match.group().strip()))
            if spans:
                return min(spans)[-1]
        return self._best_sentence(" ".join(page.lines[i].text for i in region.lines), terms)

    def _best_sentence(self, text: str, terms: dict[str, float]) -> str:
        """The sentence with most of the terms, cut to `MAX_ANSWER_WORDS`; of "label: value" the value, if the label
        is what was asked for."""

        def weight(part: str) -> float:
            return sum(terms.get(stem, 0.0) for stem in {stem for stem, _ in self._stems(part)})

        sentence = max(re.split(r"(?<=[.!?;])\s+", text), key=weight)
        label, colon, value = sentence.partition(": ")
        if colon and value.strip() and weight(label) > weight(value):
            sentence = value
        words = sentence.split()
        starts = range(max(1, len(words) - MAX_ANSWER_WORDS + 1))
        start = max(starts, key=lambda s: (weight(" ".join(words[s : s + MAX_ANSWER_WORDS])), -s))
        return " ".join(words[start : start + MAX_ANSWER_WORDS])


def read_question(prompt: str) -> str:
    """The question inside the opening message.

    >>> read_question("Answer the question.\\nQuestion: How many cats?")
    'How many cats?'
    """
    question = prompt.split("\nQuestion: ", 1)[-1]
    return question.removesuffix(LAST_TURN).strip()


def answer_patterns(question: str) -> tuple[re.Pattern[str], ...]:
    """What an answer to this question looks like, best first; empty when its wording does not tell."""
    return next((patterns for asked, patterns in _ANSWER_TYPES if asked.search(question)), ())


def shown_box(raw: Box, view: View) -> Box:
    """A raw-page box in whole pixels of a shown image, rounded outwards and kept inside it."""
    box = view.to_shown(raw)
    return Box(
        max(0, math.floor(box.x1)),
        max(0, math.floor(box.y1)),
        min(view.shown.width, math.ceil(box.x2)),
        min(view.shown.height, math.ceil(box.y2)),
    )


def plain(text: str) -> str:
    """Text of a document or a question in one line, without bullets at its ends (fonts put them at private code points)
    and without anything that would be read as a tag.

    >>> plain("a </search> b\\n<answer>c")
    'a b c'
    """
    return " ".join(_TAGS.sub(" ", text).split()).strip(_BULLETS)


def _place(page: Page, line: int, offset: float) -> tuple[float, float]:
    """Where on the page a character of a line is, taking all characters to be equally wide; raw pixels."""
    box, length = page.lines[line].box, max(1, len(page.lines[line].text))
    return box.x1 + box.width * offset / length, (box.y1 + box.y2) / 2


def _apart(a: tuple[float, float], b: tuple[float, float], tall: float) -> float:
    """How far apart two places are, growing ever more slowly, in line heights `tall`: least within a row or a column,
    where a value stands with its labels, however wide the table is."""
    across, down = abs(a[0] - b[0]) / tall, abs(a[1] - b[1]) / tall
    if down < 0.5:
        return math.log1p(across)
    if across < 3:
        return math.log1p(down)
    return 1 + math.log1p(across) + math.log1p(down)
