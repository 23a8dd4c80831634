"""Scripted experts of the laptop preset: programs that know MiniDocs' truth and make stated, seeded mistakes.

Deviation from the paper, whose experts are Qwen-VL-Max and Qwen2.5-VL-72B: no model is behind these. They are given
the questions with their gold pages and regions and act as such experts do. The planner (`ScriptedPlanner`) reasons
and searches well and points badly; the grounding expert (`ScriptedGrounder`) points well and cannot plan; the judge
(`ScriptedJudge`) errs now and then. What each gets wrong, and how often, is its `Flaws`; all of it follows from seeds.

Whatever is sampled from them is data "by scripted experts", never the work of a model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vrag_lib.actions import LAST_TURN, ActionKind, format_box, format_reply
from vrag_lib.corpus import Question
from vrag_lib.experts import Located, Pointing
from vrag_lib.geometry import Box, iou
from vrag_lib.judge import Judge, rule_judge
from vrag_lib.minidocs_content import FIGURE_NAMES, NOT_ANSWERABLE
from vrag_lib.policy import Conversation, Reply
from vrag_lib.policy_extractive import read_question
from vrag_lib.scale_policy import BOX_STEP
from vrag_lib.settings import setting
from vrag_lib.trajectory import ImageRef

_ITEM = re.compile(r" by \S+ (.+)$")
_READ_AT_ONCE = frozenset({"layout neighbour", "layout next"})
"""Templates whose answer is a heading, legible on the page at its standard size."""


_COLUMNS = FIGURE_NAMES | {"entry": "The entry of {}"}
"""What the planner calls a figure, by its column, for an item."""


@dataclass(frozen=True)
class Flaws:
    """How often a scripted expert does what. Shares are of the occasions, sizes of the box pointed at."""

    raw_query: float = setting(0.15, "planner: a first search with the question itself instead of the page's words")
    short_query: float = setting(0.15, "planner: a first search that leaves the item or the subject out")
    pointing: float = setting(0.22, "planner: spread of its boxes' sides, as a share of the box")
    astray: float = setting(0.35, "planner: boxes that lie somewhere else")
    no_crop: float = setting(0.10, "planner: figures it does not look closer at, and guesses")
    needless_crop: float = setting(0.5, "planner: crops of text that the page shows legibly")
    gives_up: float = setting(0.03, "planner: answers that something is not answerable after a wrong page")
    malformed: float = setting(0.02, "planner: replies without a proper action")
    grounding: float = setting(0.04, "grounding expert: spread of its boxes' sides")
    grounding_astray: float = setting(0.05, "grounding expert: boxes that lie somewhere else")
    misread: float = setting(0.02, "either: figures read with one digit wrong")
    lucky_guess: float = setting(0.10, "planner: right guesses of what it has not seen")
    grounding_lucky_guess: float = setting(0.05, "grounding expert: right guesses of what it has not seen")
    second_search: float = setting(0.40, "planner: second searches for what nothing answers")
    judging: float = setting(0.01, "judge: wrong verdicts")


@dataclass(frozen=True)
class _Hop:
    """One page that the question needs. `box` is the region, `answer` the value's ink, raw pixels; `legible` on the
    page as shown; `sought` what the planner calls what it looks for, `finding` what it says when it has read it."""

    page_id: str
    box: Box
    answer: Box
    query: str
    legible: bool
    sought: str
    finding: str


def _sought(region: Mapping[str, Any], template: str) -> str:
    """What a region holds, by the name that stands on the page beside it; only "It" where the name is the answer."""
    if template in _READ_AT_ONCE or region["column"] not in _COLUMNS:
        return "It"
    return _COLUMNS[region["column"]].format(region["item"])


class _Truth:
    """Questions by their text, with their hops."""

    def __init__(self, questions: Iterable[Question]):
        self._questions: dict[str, Question] = {}
        for question in questions:
            known = self._questions.setdefault(question.query, question)
            if known.uid != question.uid and known.reference_answer != question.reference_answer:
                raise ValueError(f"{known.uid} and {question.uid} ask the same and differ in their answers")

    def question(self, text: str) -> Question:
        if text not in self._questions:
            raise ValueError(f"the scripted experts know nothing of the question {text!r}; give it to them first")
        return self._questions[text]

    def hops(self, question: Question) -> list[_Hop]:
        extra, stem = question.extra, question.file_name.removesuffix(".pdf")
        queries, regions, hops = extra["hop_queries"], extra["regions"], []
        for number, (region, query) in enumerate(zip(regions, queries, strict=False)):
            template, first = extra["template"], number + 1 < len(regions)
            legible = region["element"] == "text" or template in _READ_AT_ONCE or (template == "bridge" and first)
            sought = _sought(region, template)
            finding = f"{sought} is {region['value']}."
            if template == "bridge" and first:
                finding = f"It is {_ITEM.search(queries[1])[1]}."  # type: ignore[index]
            elif template == "emblem" and first:
                finding = f"It is {' '.join(queries[1].split()[:2])}."  # queries begin with name and organisation
            hops.append(
                _Hop(
                    f"{stem}_{region['page']}",
                    Box(*region["region_box"]),
                    Box(*region["answer_box"]),
                    query,
                    legible,
                    sought,
                    finding,
                )
            )
        return hops


class ScriptedPlanner:
    """A policy that plans with the truth in hand: searches hop by hop, looks closer at small figures, answers.

    Deterministic given the conversation and its seed. Raises ValueError for a question it was not given.
    """

    name = "scripted-planner"

    def __init__(self, questions: Iterable[Question], flaws: Flaws | None = None):
        self._truth = _Truth(questions)
        self.flaws = flaws or Flaws()

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]:
        seeds = [0] * len(conversations) if seeds is None else seeds
        return [Reply(self._reply(c, seed)) for c, seed in zip(conversations, seeds, strict=True)]

    def _reply(self, conversation: Conversation, seed: int) -> str:
        question = self._truth.question(read_question(conversation[0].text))
        rng = random.Random(f"{question.uid}/{seed}/{len(conversation)}")
        if rng.random() < self.flaws.malformed:
            return "<think>I need to look closer at this region.</think>"
        images = [image for turn in conversation for image in turn.images]
        hops = _in_order(self._truth.hops(question), question, images)
        if not hops:
            return self._unanswerable(question, conversation, rng)
        is_new = bool(conversation[-1].images)
        read = _read(hops, images)
        found = hops[_read(hops, images[:-1]) : read] if is_new else []
        if found and not images[-1].is_crop and rng.random() < self.flaws.needless_crop:
            return self._crop(f"{found[-1].sought} is in this region.", images[-1], found[-1], rng)
        if read == len(hops):
            return self._answer(question, found, rng)
        if LAST_TURN in conversation[-1].text:
            return self._guess("I cannot find it.", question, rng)
        hop = hops[read]
        if not images:
            return self._search(_opening(question), hop, question, conversation, rng)
        if found:
            return self._search(" ".join(h.finding for h in found), hop, question, conversation, rng)
        if not is_new:
            return self._search("Search again.", hop, question, conversation, rng)
        image = images[-1]
        if image.page_id != hop.page_id:
            if rng.random() < self.flaws.gives_up:
                return format_reply("Nothing answers this.", ActionKind.ANSWER, NOT_ANSWERABLE)
            return self._search("This is not the right page, search again.", hop, question, conversation, rng)
        if image.is_crop:
            return self._guess("The figure is not in this region.", question, rng)
        if rng.random() < self.flaws.no_crop:
            return self._guess("I can read it here.", question, rng)
        return self._crop(f"{hop.sought} is too small to read here.", image, hop, rng)

    def _answer(self, question: Question, found: Sequence[_Hop], rng: random.Random) -> str:
        answer = _misread(question.reference_answer, rng, self.flaws.misread)
        word = {"sum": "The sum of both is", "difference": "The difference of both is"}.get(question.extra["template"])
        said = [hop.finding for hop in found] if word and answer == question.reference_answer else []
        word = word or f"{found[-1].sought if found else 'It'} is"
        return format_reply(" ".join([*said, f"{word} {answer}."]), ActionKind.ANSWER, answer)

    def _crop(self, thought: str, image: ImageRef, hop: _Hop, rng: random.Random) -> str:
        box = point(image, hop.box, rng, self.flaws.pointing, self.flaws.astray)
        return format_reply(thought, ActionKind.CROP, format_box(box))

    def _search(
        self, thought: str, hop: _Hop, question: Question, conversation: Conversation, rng: random.Random
    ) -> str:
        """The hop's words; on a first search for it at times fewer of them, or the question itself."""
        asked = [turn.action.argument for turn in conversation if turn.action and turn.action.kind is ActionKind.SEARCH]
        draw = rng.random()
        query = hop.query
        if not asked and draw < self.flaws.raw_query:
            query = question.query
        elif not asked and draw < self.flaws.raw_query + self.flaws.short_query:
            words = query.split()
            query = " ".join(words[: rng.randint(2, max(2, len(words) - 1))])
        if query in asked:
            words = query.split()
            query = " ".join(words[: max(2, len(words) - asked.count(query))])
        return format_reply(thought, ActionKind.SEARCH, query)

    def _guess(self, thought: str, question: Question, rng: random.Random) -> str:
        return format_reply(
            thought, ActionKind.ANSWER, _misread(question.reference_answer, rng, 1 - self.flaws.lucky_guess)
        )

    def _unanswerable(self, question: Question, conversation: Conversation, rng: random.Random) -> str:
        """Search once or twice in the page's own words, then say that nothing answers it."""
        query = question.extra["hop_queries"][0]
        searches = sum(turn.action is not None and turn.action.kind is ActionKind.SEARCH for turn in conversation)
        if searches == 0:
            return format_reply("I search for the page.", ActionKind.SEARCH, query)
        if searches == 1 and rng.random() < self.flaws.second_search and LAST_TURN not in conversation[-1].text:
            words = query.split()
            thought = "This is not the right page, search again."
            return format_reply(thought, ActionKind.SEARCH, " ".join(words[: max(2, len(words) - 1)]))
        return format_reply("Nothing answers this.", ActionKind.ANSWER, NOT_ANSWERABLE)


class ScriptedGrounder:
    """A grounding expert that knows the region: points well, but only at the page in front of it. As a policy of its
    own it searches with the question as asked, looks closer once, and answers what it sees there."""

    name = "scripted-grounder"

    def __init__(self, questions: Iterable[Question], flaws: Flaws | None = None):
        self._truth = _Truth(questions)
        self.flaws = flaws or Flaws()

    def locate(self, requests: Sequence[Pointing], *, seeds: Sequence[int] | None = None) -> list[Located]:
        """A box for each request, in shown pixels of its image; somewhere on the image when nothing there answers."""
        seeds = [0] * len(requests) if seeds is None else seeds
        return [Located(self._locate(r.question, r.image, seed)) for r, seed in zip(requests, seeds, strict=True)]

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]:
        seeds = [0] * len(conversations) if seeds is None else seeds
        return [Reply(self._reply(c, seed)) for c, seed in zip(conversations, seeds, strict=True)]

    def _locate(self, text: str, image: ImageRef, seed: int) -> Box:
        question = self._truth.question(text)
        rng = random.Random(f"grounding/{question.uid}/{seed}/{image.page_id}")
        here = [hop for hop in self._truth.hops(question) if hop.page_id == image.page_id]
        region = here[-1].box if here else image.view.box
        return point(image, region, rng, self.flaws.grounding, self.flaws.grounding_astray if here else 1.0)

    def _reply(self, conversation: Conversation, seed: int) -> str:
        text = read_question(conversation[0].text)
        question = self._truth.question(text)
        images = [image for turn in conversation for image in turn.images]
        if not images:
            return format_reply("I search for the page.", ActionKind.SEARCH, text)
        image = images[-1]
        if not image.is_crop and LAST_TURN not in conversation[-1].text:
            thought = "I need to look closer at this region."
            return format_reply(thought, ActionKind.CROP, format_box(self._locate(text, image, seed)))
        rng = random.Random(f"reading/{question.uid}/{seed}")
        seen = any(_contains(image, hop) for hop in self._truth.hops(question)[-1:])
        share = self.flaws.misread if seen else 1 - self.flaws.grounding_lucky_guess
        answer = _misread(question.reference_answer, rng, share)
        return format_reply("Now I can read it.", ActionKind.ANSWER, answer)


class ScriptedJudge:
    """The rule judge with a share of its verdicts turned round, the same ones for the same answers and seed."""

    def __init__(self, flaws: Flaws | None = None, seed: int = 0, judge: Judge = rule_judge):
        self.flaws, self.seed, self._judge = flaws or Flaws(), seed, judge

    def __call__(self, question: str, reference: str, answer: str) -> bool:
        verdict = self._judge(question, reference, answer)
        errs = random.Random(f"{self.seed}/{question}/{reference}/{answer}").random() < self.flaws.judging
        return verdict != errs


def point(image: ImageRef, region: Box, rng: random.Random, spread: float, astray: float) -> Box:
    """A box for a region (raw pixels) in the shown pixels of an image: its sides moved outwards by `spread` of its
    size, with a normal error as large, for whoever points leaves some room; with probability `astray` a box of that
    size somewhere else. Always a valid box of the image, in the steps in which the scale policy writes boxes."""
    view = image.view
    target = view.to_shown(region)
    width, height = view.shown.width, view.shown.height
    if rng.random() < astray:
        w, h = min(width, max(28.0, target.width)), min(height, max(28.0, target.height))
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        moved = Box(x, y, x + w, y + h)
    else:
        dx, dy = spread * target.width, spread * target.height
        moved = Box(*(v + rng.gauss(d, abs(d)) for v, d in zip(target.as_tuple(), (-dx, -dy, dx, dy), strict=True)))
    moved = Box(*(round(v / BOX_STEP) * BOX_STEP for v in moved.as_tuple()))
    x1, x2 = sorted((min(max(0, moved.x1), width - 8), min(max(8, moved.x2), width)))
    y1, y2 = sorted((min(max(0, moved.y1), height - 8), min(max(8, moved.y2), height)))
    return Box(x1, y1, max(x2, x1 + 8), max(y2, y1 + 8))


def _contains(image: ImageRef, hop: _Hop) -> bool:
    """Whether an image shows the value whole."""
    if image.page_id != hop.page_id:
        return False
    box = image.view.box.intersection(hop.answer)
    return iou(box, hop.answer) > 0.95


def _read(hops: Sequence[_Hop], images: Sequence[ImageRef]) -> int:
    """How many of the hops, from the first on, the images so far have answered, in this order."""
    done = 0
    for image in images:
        while done < len(hops) and _contains(image, hops[done]) and (image.is_crop or hops[done].legible):
            done += 1
    return done


def _in_order(hops: list[_Hop], question: Question, images: Sequence[ImageRef]) -> list[_Hop]:
    """The hops of a sum or difference in the order in which their pages turned up; others need the given order."""
    if question.extra["template"] not in ("sum", "difference"):
        return hops
    seen = [image.page_id for image in images]
    return sorted(hops, key=lambda hop: seen.index(hop.page_id) if hop.page_id in seen else len(seen))


def _opening(question: Question) -> str:
    """The first thought on a question."""
    if question.extra["template"] == "emblem":
        return "First find out who is known by that emblem."
    return "I search for the page."


def _misread(answer: str, rng: random.Random, share: float) -> str:
    """An answer, or with probability `share` one that differs in a digit (or, without digits, in a word)."""
    if rng.random() >= share:
        return answer
    digits = [i for i, character in enumerate(answer) if character.isdigit()]
    if not digits:
        return "Not known" if answer != "Not known" else "Nothing"
    i = rng.choice(digits)
    return answer[:i] + rng.choice([d for d in "123456789" if d != answer[i]]) + answer[i + 1 :]
