"""The extractive policy: search, crop and answer without any model. The offline default for real documents.

This is a lexical baseline and not in the paper. It does what a reader in a hurry would: it trusts the retriever unless
next to nothing of the question stands on the page, looks for the words of the kind asked for (a number for "how many",
a percentage for "what share", a date for "when", a name for "who", else a sentence or a cell) that stand closest to
the question's words, crops them with their label, and answers with them. `extraction` does the looking. It understands
nothing: it cannot compare, count, add, follow a reference to another page, read a chart without labels, or tell that a
question has no answer. It is deterministic, and speaks through the same tags as any model.

It looks at the text of pages that were shown to it and at no others; of the rest of the corpus it knows only how
common each word is, and which lines stand on most pages of a document. It answers from the page shown last, never
from an earlier one, so that the last image of a trajectory is what its answer stands on: a page that it leaves for
another search is given up for good. Of several pages shown together it takes the one that holds most of the question.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vrag_lib.actions import LAST_TURN, Action, ActionKind, format_box, format_reply, parse_reply, without_tags
from vrag_lib.extraction import Found, content_words, find_answer
from vrag_lib.geometry import Box, View
from vrag_lib.page_units import tokens
from vrag_lib.policy import Conversation, Reply

if TYPE_CHECKING:
    from vrag_lib.corpus import Corpus, Page

LEAST_FIT = 0.2
"""A page that holds less than this of the question's telling words, by weight, is left for another search."""

MARGIN = 0.1
"""Running headers and page numbers stand in this part of the page's height, at its top and bottom."""

NO_TEXT = "no readable text was found on the pages shown"
NOT_FOUND = "not found on the pages shown"

_BULLETS = " ,;:•▪●◦*\uf0a7\uf0b7\uf0d8"


class ExtractivePolicy:
    """Answers from the text of shown pages (see the module's docstring for what it cannot do).

    corpus: pages with text lines. max_searches: searches before it makes do with the page it has.
    """

    def __init__(self, corpus: Corpus, max_searches: int = 3):
        self.name = "extractive"
        self.corpus = corpus
        self.max_searches = max_searches
        self._held = {
            page.id: {token.stem for line in page.lines for token in tokens(line.text)} for page in corpus.pages
        }
        self._pages = Counter(stem for held in self._held.values() for stem in held)
        self._pages_of: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._repeated: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._sizes = Counter(page.document_id for page in corpus.pages)
        for page in corpus.pages:
            self._pages_of[page.document_id].update(self._held[page.id])
            self._repeated[page.document_id].update({_wording(line.text) for line in page.lines})

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
        shown = [[*(image.page_id for image in turn.images), *turn.text_pages] for turn in conversation]
        pages = list(dict.fromkeys(page_id for together in shown for page_id in together))
        is_last = conversation[-1].text.endswith(LAST_TURN)
        offered = conversation[0].text.split("\nQuestion: ", 1)[0]
        searches = kinds.count(ActionKind.SEARCH)
        may_search = not is_last and "<search>" in offered
        if not searches and may_search:
            return format_reply("I need a page that answers this.", ActionKind.SEARCH, plain(question))
        looked_closer = bool(kinds) and kinds[-1] is not ActionKind.SEARCH
        together = next((page_ids for page_ids in reversed(shown) if page_ids), [])
        page_id = max(together, key=lambda page_id: self.fit(question, page_id), default=None)
        may_search = may_search and not looked_closer and searches < self.max_searches
        if may_search and (page_id is None or self.fit(question, page_id) < LEAST_FIT):
            thought = "This page holds next to nothing of the question." if pages else "There is no page yet."
            return format_reply(thought, ActionKind.SEARCH, self._other_words(question, pages, searches))
        found = None if page_id is None else self.find(question, page_id)
        if found is None:
            readable = any(self.corpus.page(page_id).lines for page_id in pages)
            thought = "No page I saw holds a word that tells where to look."
            return format_reply(thought, ActionKind.ANSWER, NOT_FOUND if readable else NO_TEXT)
        may_crop = not is_last and not looked_closer and "<bbox>" in offered
        if may_crop and images and images[-1].page_id == page_id:
            view = images[-1].view
            box = shown_box(found.box, view)
            if box.area < 0.6 * view.shown.width * view.shown.height:
                thought = "This part fits the question best; a closer look."
                return format_reply(thought, ActionKind.CROP, format_box(box))
        thought = plain(f"These words on page {page_id} stand closest to the question's.")
        return format_reply(thought, ActionKind.ANSWER, plain(found.text) or NOT_FOUND)

    def find(self, question: str, page_id: str) -> Found | None:
        """What answers a question on a page, and where; None when no word of the question tells."""
        page = self.corpus.page(page_id)
        weights = {}
        for word in content_words(question):
            (stem,) = {token.stem for token in tokens(word)}
            weights[stem] = 0.1 + _rarity(self._pages_of[page.document_id][stem], self._sizes[page.document_id])
        return find_answer(page, question, weights, self._running_lines(page))

    def fit(self, question: str, page_id: str) -> float:
        """How much of the question's telling words stands on a page, in [0, 1], weighted by rarity in the corpus.
        Words that no page holds do not count, nor do those that every page of this document holds."""
        document = self.corpus.page(page_id).document_id
        held, all_weight, here = self._held[page_id], 0.0, 0.0
        stems = {token.stem for word in content_words(question) for token in tokens(word)} & set(self._pages)
        telling = {stem for stem in stems if self._pages_of[document][stem] < self._sizes[document]}
        for stem in telling or stems:
            weight = _rarity(self._pages[stem], len(self.corpus))
            all_weight += weight
            here += weight * (stem in held)
        return here / all_weight if all_weight else 0.0

    def _running_lines(self, page: Page) -> frozenset[int]:
        """Lines at the top or bottom of a page that, numbers aside, most pages of its document have."""
        pages, edge = self._sizes[page.document_id], MARGIN * page.size.height
        return frozenset(
            i
            for i, line in enumerate(page.lines)
            if (line.box.y2 < edge or line.box.y1 > page.size.height - edge)
            and pages > 2
            and 2 * self._repeated[page.document_id][_wording(line.text)] > pages
        )

    def _other_words(self, question: str, pages: list[str], searches: int) -> str:
        """Another query: first the content words that any page holds, then those of them that the pages seen lack,
        if there are two or more: one common word alone finds anything."""
        words = list(dict.fromkeys(content_words(question)))
        known = [word for word in words if tokens(word)[0].stem in self._pages] or words
        if searches > 1:
            seen = set().union(*(self._held[page_id] for page_id in pages))
            missing = [word for word in known if tokens(word)[0].stem not in seen]
            known = missing if len(missing) > 1 else known[::-1]
        return plain(" ".join(known)) or plain(question)


def _rarity(count: int, total: int) -> float:
    """The idf of BM25: next to nothing for a word on every page."""
    return math.log(1 + (total - count + 0.5) / (count + 0.5))


def _wording(text: str) -> str:
    """A line without its numbers."""
    return re.sub(r"\d+", "#", text.strip().lower())


def read_question(prompt: str) -> str:
    """The question inside the opening message.

    >>> read_question("Answer the question.\\nQuestion: How many cats?")
    'How many cats?'
    """
    question = prompt.split("\nQuestion: ", 1)[-1]
    return question.removesuffix(LAST_TURN).strip()


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
    return " ".join(without_tags(text).split()).strip(_BULLETS)
