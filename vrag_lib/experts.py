"""Experts that write trajectories together (paper §2.2, eq. 3-6): a planner drives, and where it wants to look closer a
grounding expert says where, guided by the planner's thought. Which models they are is up to the caller; those behind
an endpoint are in `experts_openai`.

Deviations from the released code, which does not do what the paper says: there the grounding expert never re-locates a
box but writes the whole reply after each search (`NextReplyPolicy` here), and pages that hold the answer are shown
first if the engine found them at all, so that searches of the training data look better than any policy's (trap T20,
`GoldFirstRetriever` here). Both are options and nothing uses them unasked. Whether a reply follows a search is read
from the parsed action, not from the word "search" somewhere in its text (T21). An expert that fails costs one box, not
the run (S9).
"""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vrag_lib.actions import Action, ActionKind, cut_reply, format_box, parse_reply
from vrag_lib.geometry import Box, Size
from vrag_lib.policy import Conversation, Policy, Reply
from vrag_lib.policy_extractive import read_question
from vrag_lib.retrieval import Hit, Retriever
from vrag_lib.trajectory import ImageRef

_CLOSED_ACTION = re.compile(r"</(search|bbox|answer)>$")

CROP_ORDER = (
    "Crop this page first: reason about what on it bears on the question, then give the box of that part. The box may "
    "be larger than needed."
)
"""What the released code tells the second expert about every page (own wording)."""


@dataclass(frozen=True)
class Pointing:
    """What a grounding expert is asked: the question, the planner's thought ('' if it had none), the image looked at,
    and the planner's own box in shown pixels of that image, None if it named none."""

    question: str
    thought: str
    image: ImageRef
    proposed: Box | None


@dataclass(frozen=True)
class Located:
    """A grounding expert's answer: a box in shown pixels of the image, or None and why."""

    box: Box | None
    error: str | None = None


@runtime_checkable
class GroundingExpert(Protocol):
    """Points at what a thought is about, one answer per request, in order. One that fails gets a Located without a box
    and does not affect the others. With `seeds` (one per request) an answer depends on its own request and seed."""

    name: str

    def locate(self, requests: Sequence[Pointing], *, seeds: Sequence[int] | None = None) -> list[Located]: ...


@dataclass(frozen=True)
class Relocation:
    """One box that a planner named: `proposed` is its own, `located` the one written in its place; None and why if its
    own stayed. Both in shown pixels of the image."""

    question: str
    thought: str
    image: ImageRef
    proposed: Box
    located: Box | None
    error: str | None = None


class MultiExpertPolicy:
    """The paper's division of labour: the planner writes every reply, the grounding expert its boxes (eq. 3-6).

    A reply that crops an image gets the located box in place of the planner's; its thought stays as it is. If the
    grounding expert has none, the planner's own box stays. All other replies pass unchanged.

    `counts`: `relocated`; `kept_box_failed` (the expert failed) and `kept_box_invalid` (its box is not on the image);
    `no_image` (a crop before the first page, which the environment refuses). `relocations` holds every box asked for.

    Replies have no tokens: a reply with another box is not what the planner sampled.
    """

    def __init__(self, planner: Policy, grounder: GroundingExpert, name: str = "multi-expert"):
        self.name = name
        self.planner, self.grounder = planner, grounder
        self.counts: Counter[str] = Counter()
        self.relocations: list[Relocation] = []
        self._lock = threading.Lock()

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]:
        """One reply per conversation; the boxes of all of them are located in one call."""
        replies = [_without_tokens(reply) for reply in self.planner.generate(conversations, seeds=seeds)]
        wanted: dict[int, Pointing] = {}
        for i, (conversation, reply) in enumerate(zip(conversations, replies, strict=True)):
            pointing = self._pointing(conversation, reply)
            if pointing is not None:
                wanted[i] = pointing
        if not wanted:
            return replies
        answers = self.grounder.locate(
            list(wanted.values()), seeds=None if seeds is None else [seeds[i] for i in wanted]
        )
        for (i, pointing), located in zip(wanted.items(), answers, strict=True):
            replies[i] = self._relocated(replies[i], pointing, located)
        return replies

    def _pointing(self, conversation: Conversation, reply: Reply) -> Pointing | None:
        """What to ask about a reply; None if it is no crop of an image."""
        action = parse_reply(reply.text)
        if reply.error is not None or not isinstance(action, Action) or action.kind is not ActionKind.CROP:
            return None
        images = [image for turn in conversation for image in turn.images]
        if not images:
            self._count("no_image")
            return None
        return Pointing(read_question(conversation[0].text), thought_of(reply.text), images[-1], action.box)

    def _relocated(self, reply: Reply, pointing: Pointing, located: Located) -> Reply:
        box = None if located.box is None else box_on_image(located.box, pointing.image.view.shown)
        error = located.error
        if box is not None:
            self._count("relocated")
            reply = dataclasses.replace(reply, text=replace_box(reply.text, box))
        elif located.box is not None:
            self._count("kept_box_invalid")
            error = f"bad_box: {located.box} is not on the image"
        else:
            self._count("kept_box_failed")
        asked = (pointing.question, pointing.thought, pointing.image, pointing.proposed)
        self.relocations.append(Relocation(*asked, box, None if box is not None else error or "no box, no reason"))
        return reply

    def _count(self, what: str) -> None:
        """From whichever thread."""
        with self._lock:
            self.counts[what] += 1


class NextReplyPolicy:
    """The released code's division of labour, not the paper's: after every search that showed a page the second expert
    writes the whole next reply, all others are the planner's.

    instruction: said to the second expert before the page's text, and not part of the record; '' for none.

    `counts`: replies by `planner` and `second`. Replies have no tokens: the tokens of two models do not mix.
    """

    def __init__(self, planner: Policy, second: Policy, name: str = "next-reply", instruction: str = CROP_ORDER):
        self.name = name
        self.planner, self.second = planner, second
        self._instruction = instruction
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]:
        """One reply per conversation, each from the expert whose turn it is."""
        after_search = [_shows_found_page(conversation) for conversation in conversations]
        replies: dict[int, Reply] = {}
        for expert, is_second in ((self.planner, False), (self.second, True)):
            mine = [i for i, found in enumerate(after_search) if found is is_second]
            if not mine:
                continue
            asked = [self._instructed(conversations[i]) if is_second else conversations[i] for i in mine]
            written = expert.generate(asked, seeds=None if seeds is None else [seeds[i] for i in mine])
            replies.update(zip(mine, map(_without_tokens, written), strict=True))
            with self._lock:
                self.counts["second" if is_second else "planner"] += len(mine)
        return [replies[i] for i in range(len(conversations))]

    def _instructed(self, conversation: Conversation) -> Conversation:
        last = conversation[-1]
        text = f"{self._instruction}\n{last.text}".strip()
        return [*conversation[:-1], dataclasses.replace(last, text=text)]


class GoldFirstRetriever:
    """The released code's choice of page, biased by the answer key (trap T20): of the pages that a search finds, those
    of the question's gold pages come first, both parts in their own order. For one question; for measuring the bias.

    Scores stay those of the retriever and so no longer fall with the rank.
    """

    def __init__(self, retriever: Retriever, gold_page_ids: Collection[str]):
        self.name = f"gold-first({retriever.name})"
        self.page_ids = retriever.page_ids
        self._retriever, self._gold = retriever, frozenset(gold_page_ids)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query the retriever's best `k` pages, gold ones first."""
        found = self._retriever.search(queries, k)
        return [sorted(hits, key=lambda hit: hit.page_id not in self._gold) for hits in found]


def _shows_found_page(conversation: Conversation) -> bool:
    """Whether the last turn shows a page that the reply before it searched for."""
    if len(conversation) < 2 or not conversation[-1].images:
        return False
    action = parse_reply(conversation[-2].text)
    return isinstance(action, Action) and action.kind is ActionKind.SEARCH


def _without_tokens(reply: Reply) -> Reply:
    return dataclasses.replace(reply, token_ids=None, logprobs=None, prompt_token_ids=None)


def thought_of(reply: str) -> str:
    """The thought of a reply: what stands between its think tags, else all that stands before its action.

    >>> thought_of("<think>the small table</think> <bbox>[0, 0, 9, 9]</bbox>")
    'the small table'
    >>> thought_of("Let me see. <bbox>[0, 0, 9, 9]</bbox>"), thought_of("<bbox>[0, 0, 9, 9]</bbox>")
    ('Let me see.', '')
    """
    text = cut_reply(reply)
    action = _CLOSED_ACTION.search(text)
    before = text.rpartition(f"<{action[1]}>")[0] if action else text
    thoughts, end = [], 0
    while (start := before.find("<think>", end)) >= 0 and (end := before.find("</think>", start)) >= 0:
        thoughts.append(before[start + len("<think>") : end])
    return " ".join(thoughts).strip() if thoughts else before.replace("<think>", "").strip()


def replace_box(reply: str, box: Box) -> str:
    """A reply that crops, with another box; the rest stays as it was written.

    >>> replace_box("<think>closer</think>\\n<bbox>[1, 2, 3, 4]</bbox> and so on", Box(10, 20, 30, 40))
    '<think>closer</think>\\n<bbox>[10, 20, 30, 40]</bbox>'
    """
    text = cut_reply(reply)
    return f"{text[: text.rindex('<bbox>')]}<bbox>{format_box(box)}</bbox>"


def box_on_image(box: Box, shown: Size) -> Box | None:
    """A box in whole pixels inside an image of size `shown`, corners in any order; None if nothing of it is left.

    >>> box_on_image(Box(50, 10.4, -5, 30), Size(56, 56))
    Box(x1=0, y1=10, x2=50, y2=30)
    >>> box_on_image(Box(60, 10, 90, 30), Size(56, 56)), box_on_image(Box(1, 1, 1.2, 30), Size(56, 56))
    (None, None)
    """
    if not all(math.isfinite(value) for value in box.as_tuple()):
        return None
    x1, x2 = sorted(min(max(round(x), 0), shown.width) for x in (box.x1, box.x2))
    y1, y2 = sorted(min(max(round(y), 0), shown.height) for y in (box.y1, box.y2))
    return Box(x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None
