"""The environment: `reset(question)` opens a trajectory, `step(reply)` answers one reply. No model is inside.

    environment = Environment(corpus, retriever, config)
    first = environment.reset(question.query, environment.given(question))

Deviations from the released code: one action per reply (trap T5); a crop is cut from the raw page through the view it
was named on, so nested crops are right (T6); a search without a new page says so (T9); the last permitted reply is
announced, in training and demo alike (T23); a retriever that fails ends this trajectory only (T22);
`max_invalid_streak` invalid replies in a row end a trajectory, but in preset `paper`, which goes on. Pages may be given
with the question and shown as text, so that the paper's baselines (`agents`) live in this one environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vrag_lib.actions import (
    LAST_TURN,
    NO_NEW_PAGE,
    Action,
    ActionKind,
    Invalid,
    InvalidReason,
    invalid_message,
    parse_reply,
    question_prompt,
    quote_page,
)
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Corpus, Question
from vrag_lib.geometry import BoxError, View, view_of_raw_box
from vrag_lib.retrieval import Hit, RetrievalIndexError, Retriever, best_unseen
from vrag_lib.trajectory import ImageRef, StopReason


@dataclass(frozen=True)
class Observation:
    """What a step gave back. `text` and `images` form the next user turn, `text_pages` are the pages whose text stands
    in it; when `done` all are empty and `stop_reason` says why. `action` or `invalid` is what the reply was read as."""

    text: str = ""
    images: tuple[ImageRef, ...] = ()
    text_pages: tuple[str, ...] = ()
    action: Action | None = None
    invalid: InvalidReason | None = None
    stop_reason: StopReason | None = None
    error: str = ""

    @property
    def done(self) -> bool:
        return self.stop_reason is not None


class Environment:
    """One trajectory at a time over one corpus. Thin state: what was shown, replies used, invalid streak.

    Raises RetrievalIndexError when the retriever ranks pages that the corpus does not hold, ConfigError as
    `EnvironmentConfig.validate`.
    """

    def __init__(self, corpus: Corpus, retriever: Retriever, config: EnvironmentConfig | None = None):
        unknown = set(retriever.page_ids) - set(corpus.page_ids)
        if unknown:
            raise RetrievalIndexError(
                f"the index {retriever.name!r} holds {len(unknown)} pages that the corpus does not, for example "
                f"{min(unknown)!r}; build the index from this corpus"
            )
        self.corpus = corpus
        self.retriever = retriever
        self.config = config or EnvironmentConfig()
        self.config.validate()
        allowed = {ActionKind.SEARCH: self.config.allow_search, ActionKind.CROP: self.config.allow_crop}
        self._allowed = tuple(kind for kind in ActionKind if allowed.get(kind, True))
        self._start()

    def _start(self) -> None:
        self._seen: set[str] = set()
        self._last: ImageRef | None = None
        self._replies = 0
        self._streak = 0
        self._done = False

    def given(self, question: Question) -> tuple[ImageRef, ...]:
        """What `config.given` shows with a question: the pages found with it as the query, the best first, and fewer
        than `given_pages` where no more are found; or its gold pages or regions, in their order.

        Raises ValueError for gold_regions of a question that has none, CorpusError for a gold page that the corpus
        lacks, and whatever the retriever raises.
        """
        if self.config.given == "none":
            return ()
        if self.config.given == "gold_regions":
            if not question.gold_regions:
                raise ValueError(f"question {question.uid!r} has no gold regions")
            return tuple(
                ImageRef(
                    page_id,
                    view_of_raw_box(
                        self.corpus.page(page_id).size, box, self.config.min_pixels, self.config.max_pixels
                    ),
                )
                for page_id, box in question.gold_regions
            )
        if self.config.given == "gold_pages":
            return tuple(map(self._whole_page, question.gold_page_ids))
        hits = self.retriever.search([question.query], self.config.given_pages)[0]
        distinct = list(dict.fromkeys(hit.page_id for hit in hits))
        return tuple(map(self._whole_page, distinct[: self.config.given_pages]))

    def reset(self, question: str, given: Sequence[ImageRef] = ()) -> Observation:
        """Forget everything and pose the question, with the images of `given` above it (or the text of their pages).
        Whole pages among them count as shown, and the last image is the one that a crop refers to."""
        self._start()
        prompt = question_prompt(
            question,
            self.config.allow_crop,
            search=self.config.allow_search,
            given=None if self.config.given == "none" else len(given),
            text=self.config.observation == "text",
        )
        return self._show(given, prompt)

    def search_query(self, reply: str) -> str | None:
        """The query this reply would search for, None if it would not search: lets a caller search for many
        environments at once and hand the hits to `step`."""
        action = parse_reply(reply)
        wanted = isinstance(action, Action) and action.kind is ActionKind.SEARCH and self.config.allow_search
        return action.argument if wanted and not self._done and not self._is_last_reply() else None

    def step(self, reply: str, hits: Sequence[Hit] | None = None) -> Observation:
        """Carry out one reply; `hits` are the results of its search if the caller has them already.

        Never raises on account of `reply`. After the trajectory has ended it changes nothing.
        """
        if self._done:
            return Observation(stop_reason=StopReason.ERROR, error="the trajectory has already ended; reset first")
        is_last = self._is_last_reply()
        self._replies += 1
        parsed = parse_reply(reply)
        if isinstance(parsed, Invalid):
            return self._invalid(parsed.reason)
        if parsed.kind is ActionKind.ANSWER:
            return self._stop(StopReason.ANSWER, action=parsed)
        if parsed.kind not in self._allowed:
            return self._invalid(InvalidReason.NOT_ALLOWED)
        if parsed.kind is ActionKind.SEARCH:
            return self._stop(StopReason.MAX_TURNS, action=parsed) if is_last else self._search(parsed, hits)
        return self._crop(parsed, is_last)

    def _is_last_reply(self) -> bool:
        return self._replies + 1 >= self.config.max_turns

    def _search(self, action: Action, hits: Sequence[Hit] | None) -> Observation:
        if hits is None:
            try:
                hits = self.retriever.search([action.argument], self.config.search_depth)[0]
            except Exception as error:  # a search engine may fail in any way; that must cost this trajectory only
                return self._stop(StopReason.ERROR, action=action, error=f"search failed: {error}")
        self._streak = 0
        hit = best_unseen(hits, self._seen)
        if hit is None:
            return self._observe(NO_NEW_PAGE, action=action)
        return self._show([self._whole_page(hit.page_id)], action=action)

    def _crop(self, action: Action, is_last: bool) -> Observation:
        """A last reply is judged as any other, but shows nothing more."""
        if self._last is None:
            return self._invalid(InvalidReason.NO_IMAGE)
        try:
            view = self._last.view.crop(
                action.box, self.config.min_pixels, self.config.max_pixels, self.config.crop_padding
            )
        except BoxError as error:
            return self._invalid(InvalidReason(error.reason))
        if is_last:
            return self._stop(StopReason.MAX_TURNS, action=action)
        self._streak = 0
        return self._show([ImageRef(self._last.page_id, view)], action=action)

    def _whole_page(self, page_id: str) -> ImageRef:
        size = self.corpus.page(page_id).size
        return ImageRef(page_id, View.of_page(size, self.config.min_pixels, self.config.max_pixels))

    def _invalid(self, reason: InvalidReason) -> Observation:
        self._streak += 1
        if self._replies >= self.config.max_turns:
            return self._stop(StopReason.MAX_TURNS, invalid=reason)
        if self.config.max_invalid_streak and self._streak >= self.config.max_invalid_streak:
            return self._stop(StopReason.INVALID_STREAK, invalid=reason)
        return self._observe(invalid_message(reason, self._allowed), invalid=reason)

    def _show(self, images: Sequence[ImageRef], text: str = "", action: Action | None = None) -> Observation:
        """Show images above a text, or where pages are shown as text what stands on them."""
        self._seen.update(image.page_id for image in images if not image.is_crop)
        if self.config.observation == "image":
            self._last = images[-1] if images else None
            return self._observe(text, tuple(images), action=action)
        pages = tuple(image.page_id for image in images)
        quoted = [quote_page(self.corpus.page(page_id).text, self.config.page_chars) for page_id in pages]
        return self._observe("\n\n".join([*quoted, text]).strip(), text_pages=pages, action=action)

    def _observe(
        self,
        text: str,
        images: tuple[ImageRef, ...] = (),
        text_pages: tuple[str, ...] = (),
        action: Action | None = None,
        invalid: InvalidReason | None = None,
    ) -> Observation:
        if self._is_last_reply():
            text = f"{text}\n{LAST_TURN}".strip()
        return Observation(text, images, text_pages, action, invalid)

    def _stop(
        self,
        reason: StopReason,
        action: Action | None = None,
        invalid: InvalidReason | None = None,
        error: str = "",
    ) -> Observation:
        self._done = True
        return Observation(action=action, invalid=invalid, stop_reason=reason, error=error)
