"""Which words of a page answer a question: what kind of words are asked for, and which of that kind stand closest to
the question's own words. No model and not in the paper; `policy_extractive` is what uses it.

Closeness is what a reader's eye takes it for: in one sentence, on one row, in one column, below a heading. A question's
words are weighted by how much they tell the lines of a page apart, so that the organisation's name on every page
counts for nothing and the label of one row for much. Everything here is a function of lines, boxes and weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vrag_lib.geometry import Box
from vrag_lib.page_units import MONTHS, WORD, Token, Unit, page_units, tokens

if TYPE_CHECKING:
    from vrag_lib.corpus import Page

MAX_ANSWER_WORDS = 20

STOP_WORDS = frozenset(
    WORD.findall(
        "a about according all among amount an and any are as at be been by can could did do does document "
        "documents each entry figure for from give given had has have how i if in into is it its list many me "
        "much name of on one or out page pages per percent percentage please proportion provide s set shown "
        "show so such than that the their them there these they this those to us was we were what when where "
        "which who whom whose why will with would you your"
    )
)
_MONTH = "(?:" + "|".join(f"{name[:3]}(?:{name[3:]})?" for name in MONTHS.split()) + r"|Sept)\b\.?"
_DATE = re.compile(
    rf"(?:\d{{1,2}}\s+{_MONTH}\s+|{_MONTH}\s+(?:\d{{1,2}}(?:\s?[-–]\s?\d{{1,2}})?,?\s+)?)?\b(?:1[5-9]|20)\d\d\b"
)
_UNITS = r"(?:\s?(?:%|percent\b|thousand\b|million\b|billion\b|bn\b|k\b|m\b))?"
_DIGITS = (
    r"(?:(?:\d{1,3}(?:['’\u00a0\u202f]\d{3}){1,4}(?:[.,]\d+)?|\d{1,3}(?: \d{3}){1,4},\d{1,2}|"
    r"\d{1,3}(?:\.\d{3}){2,4}(?:,\d+)?|\d{1,3}\.\d{3},\d{1,2}|\d+(?:,\d+)*)(?![.,]?\d)|"
    r"\d+(?:,\d+)*\.\d+(?!\.?\d))(?!['’]\d{3})"
)
"""A whole number as people write it, 1,250.5 or 1'250.5 or 1.250,5, and never a part of one."""
_NUMBER = re.compile(rf"(?:(?<![\w.,)])[-+−–])?[$€£¥]?\s?(?<![\w.,])(?<!\d['’]){_DIGITS}{_UNITS}", re.I)
_PERCENT = re.compile(r"%|percent", re.I)
_YEAR = re.compile(r"(?:1[5-9]|20)\d\d")
_CAPITALISED = rf"(?!{_MONTH})[A-Z][\w.'’-]*"
_NAME = re.compile(rf"\b{_CAPITALISED}(?:\s+(?:(?:de|der|la|van|von|of|al)\s+){{0,2}}{_CAPITALISED}){{1,4}}")
_NUMBERED = re.compile(
    r"\b(?:table|fig(?:ure)?|section|appendix|chapter|slide|pages?|pp?|step|no)\.?\s*$|\bn\s?=\s?$", re.I
)
_ENUMERATED = re.compile(r"\s*\(?\d{1,2}[.)]\s+\D")

_AGES = re.compile(r"\s*(?:\+|(?:and|or) (?:older|over|younger|under)\b)", re.I)

_KINDS = (
    ("date", r"\bwhen\b|\b(?:what|which) (?:year|date|month|day)\b|\byear (?:was|did|is)\b"),
    ("change", r"\b(?:change|growth|increase|decrease)\b|\b(?:against|compared (?:to|with)) the (?:previous )?year\b"),
    ("percent", r"\bpercent|%|\b(?:share|proportion|fraction|part of the whole)\b"),
    ("number", r"\bhow (?:many|much|long|old|large|big|far|high|tall|often)\b|"
               r"\b(?:figure|number|amount|total|price|costs?|rate|sum|quantity|value|score|rank|average|accuracy)\b|"
               r"\bwhat (?:is|was|are|were) the (?:[\w’'-]+ ){0,2}"
               r"(?:budget|income|revenue|profit|sales|salary|fee|spending)s?\b"),
    ("name", r"\b(?:who|whom|whose|authors?)\b"),
)  # fmt: skip
_COUNTED = re.compile(r"\b(?:how many|number of)((?:\s+[\w-]+){1,3})", re.I)
_ASIDE = re.compile(r"^(?:leaving aside|apart from|other than|not counting|regardless of|besides)\b[^:?]*[:]\s*", re.I)
_RELATION = re.compile(
    r"\b(?:(right) of|(left) of|(below|under|beneath)|(above)|(after|following)|(before))\s+(?:the )?(.+?)\W*$", re.I
)
_DIRECTIONS = ("right", "left", "below", "above", "after", "before")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "last")
_FRACTIONS = {"left": 0.0, "right": 1.0, "upper": 0.0, "top": 0.0, "lower": 1.0, "bottom": 1.0}
_PLACED = re.compile(
    rf"\b(?:(?P<ordinal>{'|'.join(_ORDINALS)})|(?P<down>upper|top|middle|cent(?:er|re)|lower|bottom)[ -]"
    r"(?P<across>left|middle|cent(?:er|re)|right))\b",
    re.I,
)


def content_words(question: str) -> list[str]:
    """The words of a question that say what it is about, without stop words and without what it leaves aside.

    >>> content_words("Leaving aside the exports: how many tons of salt?")
    ['tons', 'salt']
    """
    words = [match.group() for match in WORD.finditer(_ASIDE.sub("", question))]
    return [word for word in words if word.lower() not in STOP_WORDS] or words


def answer_kind(question: str) -> str:
    """`date`, `change`, `percent`, `number`, `name`, or `text` when the wording does not tell.

    >>> [answer_kind(q) for q in ("What share of bread?", "How many cats?", "Who?", "Which colour?")]
    ['percent', 'number', 'name', 'text']
    """
    clause = re.split(r"[:;,]\s+(?=(?:what|which|who|how|when)\b)", _ASIDE.sub("", question), flags=re.I)[-1]
    return next((kind for kind, asked in _KINDS if re.search(asked, clause, re.I)), "text")


@dataclass(frozen=True)
class Span:
    """A possible answer: characters of a unit and how well words of its kind suit the question (1 is best)."""

    unit: int
    start: int
    end: int
    suits: float


@dataclass(frozen=True)
class Found:
    """An answer, the lines it stands on with its label, their hull in raw pixels, and its score in [0, 1]."""

    text: str
    lines: tuple[int, ...]
    box: Box
    score: float


def find_answer(
    page: Page, question: str, weights: Mapping[str, float], skipped: frozenset[int] = frozenset()
) -> Found | None:
    """The answer that a page gives to a question; None when none of its words counts here.

    weights: of stems, by how much they tell pages apart; how much they tell lines of this page apart is added here.
    skipped: lines that say nothing of the page (running headers, page numbers).
    """
    units = page_units(page.lines, skipped)
    words = [tokens(unit.text) for unit in units]
    telling = _line_weights([{token.stem for token in unit} for unit in words], weights)
    if not telling:
        return None
    asked = {token.stem for token in tokens(question)}
    related = _neighbour(page, question, units)
    if related is not None:
        return related
    kind = answer_kind(question)
    spans = _spans(kind, question, asked, units, words) or _spans("text", question, asked, units, words)
    if not spans:
        return None
    # Labels stand in columns themselves, so that what is below one is as likely another label as its value.
    places = _Places(page, units, column=0.8 if kind == "text" else 1.0)
    boxes = np.array([places.box(span.unit, span.start, span.end) for span in spans])  # (M, 4)
    score = np.zeros(len(spans))
    label: list[tuple[float, int]] = [(0.0, -1)] * len(spans)  # the strongest word beside each: its part, its unit
    for stem, weight in telling.items():
        occurrences = [(u, token) for u in range(len(units)) for token in words[u] if token.stem == stem]
        closeness = places.closeness(spans, boxes, occurrences, _precision(words, asked))  # (M, K)
        nearest = closeness.argmax(axis=1)
        for m, k in enumerate(nearest):
            part = weight * closeness[m, k]
            score[m] += part
            unit = occurrences[k][0]
            if units[unit].is_cell and unit != spans[m].unit and closeness[m, k] >= BESIDE and part > label[m][0]:
                label[m] = part, unit
    score *= [span.suits for span in spans]
    chosen = _placed(question, score, boxes, [(part, units[u].text if part else "") for part, u in label])
    span, beside = spans[chosen], label[chosen][1]
    text = units[span.unit].text[span.start : span.end].strip()
    if kind == "text" or span.end - span.start == len(units[span.unit].text):
        text = _trimmed(text, telling)
    elif kind == "name":
        text = text.rstrip(".")
    lines = sorted({i for u in {span.unit, beside} - {-1} for i, _ in units[u].lines})
    return Found(text, tuple(lines), _hull(page, lines), float(score[chosen]))


def _line_weights(held: list[set[str]], weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of the stems that stand on the page, adding up to 1; those that next to every line holds are left out."""
    found = {}
    for stem, weight in weights.items():
        count = sum(stem in unit for unit in held)
        if count:
            found[stem] = weight * float(np.log(1 + (len(held) - count + 0.5) / (count + 0.5)))
    most = max(found.values(), default=0.0)
    kept = {stem: weight for stem, weight in found.items() if weight > 0.03 * most}
    total = sum(kept.values())
    return {stem: weight / total for stem, weight in kept.items()}


def _precision(words: list[list[Token]], asked: set[str]) -> np.ndarray:
    """How much of each unit the question says: a row's label that says no more than the question is the row meant."""
    counted = [[token.stem for token in unit if token.stem not in STOP_WORDS] for unit in words]
    return np.array([sum(stem in asked for stem in unit) / max(1, len(unit)) for unit in counted])


def _spans(kind: str, question: str, asked: set[str], units: list[Unit], words: list[list[Token]]) -> list[Span]:
    """Everything on the page that is of the kind asked for and not said by the question."""
    counted = {t.stem for match in _COUNTED.findall(question) for t in tokens(match)} - STOP_WORDS
    spans = []
    for u, unit in enumerate(units):
        if kind == "text":
            found = [(0, len(unit.text), 1.0)]
        elif kind == "date":
            found = [(m.start(), m.end(), 0.9 if m.group().isdigit() else 1.0) for m in _DATE.finditer(unit.text)]
        elif kind == "name":
            found = [(m.start(), m.end(), 1.0) for m in _NAME.finditer(unit.text)]
            if not found and unit.is_cell and re.fullmatch(rf"{_CAPITALISED}\s*", unit.text):
                found = [(0, len(unit.text), 0.9)]
        else:
            found = [(m.start(), m.end(), s) for m in _NUMBER.finditer(unit.text) if (s := _suits(kind, m, counted))]
        for start, end, suits in found:
            said = {token.stem for token in words[u] if start <= token.start < end}
            if said and not said <= asked:
                spans.append(Span(u, start, end, suits))
    return spans


def _suits(kind: str, match: re.Match[str], counted: set[str]) -> float:
    """How well a number suits: 0 for numbers of tables, figures and list items, little for bare years."""
    text, before, after = match.group().strip(), match.string[: match.start()], match.string[match.end() :]
    if _NUMBERED.search(before) or (not before.strip() and _ENUMERATED.match(match.string)):
        return 0.0
    if _YEAR.fullmatch(text) or _AGES.match(after):
        return 0.3
    is_percent = bool(_PERCENT.search(text))
    if kind == "change":
        return 1.0 if is_percent and text[0] in "+-−–" else 0.97 if is_percent else 0.5
    if kind == "percent":
        return 1.0 if is_percent else 0.3 if text[0] in "$€£¥" else 0.8
    if {token.stem for token in tokens(after)[:2]} & counted:
        return 1.2
    return 0.85 if is_percent else 1.0


BESIDE = 0.55
"""Closeness from which a word counts as the label of what it stands beside."""


class _Places:
    """Where units and words stand on a page; `column` is how much standing in one column counts."""

    def __init__(self, page: Page, units: list[Unit], column: float):
        self.column = column
        self.lines = page.lines
        self.units = units
        self.size = page.size
        self.paragraph = np.array([unit.paragraph for unit in units])
        self.is_cell = np.array([unit.is_cell for unit in units])
        self.tall = max(1.0, float(np.median([line.box.height for line in page.lines])))

    def box(self, unit: int, start: int, end: int) -> tuple[float, float, float, float]:
        """About where characters of a unit stand, all taken to be equally wide; those on the first line they touch."""
        line, begin = next(
            ((i, b) for i, b in reversed(self.units[unit].lines) if b <= start), self.units[unit].lines[0]
        )
        box, length = self.lines[line].box, max(1, len(self.lines[line].text))
        left, right = (min(max(0, offset - begin), length) / length for offset in (start, end))
        return box.x1 + box.width * left, box.y1, box.x1 + box.width * right, box.y2

    def closeness(
        self, spans: list[Span], boxes: np.ndarray, words: list[tuple[int, Token]], precision: np.ndarray
    ) -> np.ndarray:
        """How close each span is to each occurrence of a word, in [0, 1]: (M, K)."""
        a = boxes[:, None, :]  # (M, 1, 4)
        b = np.array([self.box(u, token.start, token.end) for u, token in words])[None]  # (1, K, 4)
        units_a, units_b = np.array([s.unit for s in spans])[:, None], np.array([u for u, _ in words])[None]
        gap = np.maximum(a[..., :2] - b[..., 2:], b[..., :2] - a[..., 2:])  # (M, K, 2): across and down
        across, down = np.maximum(gap[..., 0], 0.0), np.maximum(gap[..., 1], 0.0)
        extent = np.minimum(a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2])
        on_row, in_column = -gap[..., 1] > 0.3 * extent[..., 1], -gap[..., 0] > 0.2 * extent[..., 0]
        is_above = b[..., 1] < a[..., 1]

        nearby = np.exp(-across / (0.1 * self.size.width)) * (1 + np.exp(-down / (0.3 * self.size.height))) / 2
        result = 0.05 + np.where(is_above, 0.35, 0.2) * nearby
        exact = 0.75 + 0.25 * precision[units_b]
        row = np.where(b[..., 0] < a[..., 0], 0.95, 0.8) - 0.2 * across / (across + 0.5 * self.size.width)
        column = 0.9 - 0.4 * down / (down + 20 * self.tall)
        # A word in a taller line that is not aligned with the column, such as a title's, stands above it by chance.
        line = np.array([self.lines[self.units[u].lines[0][0]].box.as_tuple() for u, _ in words])[None]
        aligned = np.stack(
            [
                a[..., 0] - line[..., 0],
                a[..., 2] - line[..., 2],
                (a[..., 0] + a[..., 2] - line[..., 0] - line[..., 2]) / 2,
            ]
        )
        is_heading = b[..., 3] - b[..., 1] > 1.3 * (a[..., 3] - a[..., 1])
        column = np.where(is_heading & (np.abs(aligned).min(axis=0) > 0.6 * self.tall), 0.6 * column, column)
        cells = self.is_cell[units_a] & self.is_cell[units_b]
        result = np.where(cells & in_column, np.maximum(result, self.column * column * exact), result)
        result = np.where(cells & on_row, np.maximum(result, row * exact), result)
        result = np.where(self.paragraph[units_a] == self.paragraph[units_b], np.maximum(result, 0.45), result)
        return np.where(units_a == units_b, self._within(spans, words), result)

    def _within(self, spans: list[Span], words: list[tuple[int, Token]]) -> np.ndarray:
        """Closeness inside a sentence: falls with the characters between; what is in brackets belongs to what is
        before. A cell that says the question's words is rarely the answer itself."""
        start, end = (np.array([[s.start, s.end] for s in spans])[:, i, None] for i in (0, 1))
        first, last = (np.array([[t.start, t.end] for _, t in words])[None, :, i] for i in (0, 1))
        apart = np.maximum(np.maximum(start - last, first - end), 0)
        bracketed = np.array([self.units[s.unit].text[: s.start].rstrip().endswith("(") for s in spans])[:, None]
        apart = np.where(bracketed & (first >= end), 3 * apart, apart)
        inside = (start <= first) & (last <= end)
        cell = self.is_cell[[s.unit for s in spans]][:, None]
        return np.where(inside & cell, 0.6, 1 - 0.35 * apart / (apart + 60))


def _placed(question: str, score: np.ndarray, boxes: np.ndarray, labels: list[tuple[float, str]]) -> int:
    """The best span, or where the question says which of several (`second`, `upper left`), that one of the spans that
    stand equally close to the same label (its part of the score, its text)."""
    best = int(score.argmax())
    match = _PLACED.search(question)
    if match is None:
        return best
    best = max(range(len(labels)), key=lambda i: (labels[i][0], score[i]))
    part, text = labels[best]
    near = [i for i in range(len(labels)) if labels[i][1] == text and labels[i][0] >= 0.95 * part]
    if not text:
        near = np.flatnonzero(score >= 0.85 * score[best]).tolist()
    if match["ordinal"]:
        tall = float(np.median(boxes[near, 3] - boxes[near, 1]))
        ordered = sorted(near, key=lambda i: (round(boxes[i, 1] / (3 * tall)), boxes[i, 0]))
        index = _ORDINALS.index(match["ordinal"].lower())
        return int(ordered[-1] if index == 6 else ordered[min(index, len(ordered) - 1)])
    target = [_FRACTIONS.get(match[group].lower(), 0.5) for group in ("across", "down")]
    middles = (boxes[near, :2] + boxes[near, 2:]) / 2
    spread = np.maximum(np.ptp(middles, axis=0), 1e-9)
    distance = np.abs((middles - middles.min(axis=0)) / spread - target).sum(axis=1)
    return int(near[int(distance.argmin())])


def _neighbour(page: Page, question: str, units: list[Unit]) -> Found | None:
    """What stands right of, left of, below, above, after or before something that the question names; None if it does
    not ask so, or nothing of about the same size stands there."""
    match = _RELATION.search(question)
    if match is None or answer_kind(question) != "text":
        return None
    direction = _DIRECTIONS[next(i for i in range(6) if match[i + 1])]
    named = [token.stem for token in tokens(match[7])]
    cells = [unit.lines[0][0] for unit in units if unit.is_cell]
    anchors = [i for i in cells if [token.stem for token in tokens(page.lines[i].text)] == named]
    if not anchors:
        return None
    anchor = page.lines[anchors[0]].box
    found: list[tuple[float, float, int]] = []
    for i in cells:
        box = page.lines[i].box
        same_sort = any(c.isdigit() for c in page.lines[i].text) == any(c.isdigit() for c in match[7])
        if i == anchors[0] or not same_sort or not 0.6 < box.height / anchor.height < 1.7:
            continue
        on_row = min(box.y2, anchor.y2) - max(box.y1, anchor.y1) > 0
        in_column = min(box.x2, anchor.x2) - max(box.x1, anchor.x1) > 0
        right, down = box.x1 - anchor.x1, box.y1 - anchor.y1
        sign = -1 if direction in ("left", "above", "before") else 1
        if direction in ("right", "left") and on_row and sign * right > 0:
            found.append((0.0, sign * right, i))
        elif direction in ("below", "above") and in_column and not on_row and sign * down > 0:
            found.append((0.0, sign * down, i))
        elif direction in ("after", "before") and (sign * right > 0 if on_row else sign * down > 0):
            found.append((0.0, sign * right, i) if on_row else (sign * down, sign * right, i))
    if not found:
        return None
    i = min(found)[2]
    return Found(page.lines[i].text, (i,), page.lines[i].box, 1.0)


def _trimmed(sentence: str, weights: Mapping[str, float]) -> str:
    """Of "label: value" the value, if the label is what was asked for; then the `MAX_ANSWER_WORDS` that say most."""

    def weight(part: str) -> float:
        return sum(weights.get(stem, 0.0) for stem in {token.stem for token in tokens(part)})

    label, colon, value = sentence.partition(": ")
    if colon and value.strip() and weight(label) > weight(value):
        sentence = value
    words = sentence.split()
    starts = range(max(1, len(words) - MAX_ANSWER_WORDS + 1))
    start = max(starts, key=lambda s: (weight(" ".join(words[s : s + MAX_ANSWER_WORDS])), -s))
    return " ".join(words[start : start + MAX_ANSWER_WORDS])


def _hull(page: Page, lines: Sequence[int]) -> Box:
    """The box about lines, with a margin, inside the page."""
    boxes = [page.lines[i].box for i in lines]
    margin = 0.5 * max(box.height for box in boxes)
    return Box(
        max(0.0, min(box.x1 for box in boxes) - margin),
        max(0.0, min(box.y1 for box in boxes) - margin),
        min(float(page.size.width), max(box.x2 for box in boxes) + margin),
        min(float(page.size.height), max(box.y2 for box in boxes) + margin),
    )
