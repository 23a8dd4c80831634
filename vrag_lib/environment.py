"""The environment: `reset(question)` opens a trajectory, `step(reply)` answers one reply. No model is inside.

Deviations from the released code: one action per reply (trap T5); a crop is cut from the raw page through the view it
was named on, so nested crops are right (T6); a search without a new page says so (T9); the last permitted reply is
announced, in training and demo alike (T23); a retriever that fails ends this trajectory only (T22).
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
)
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Corpus
from vrag_lib.geometry import BoxError, View
from vrag_lib.retrieval import Hit, RetrievalIndexError, Retriever, best_unseen
from vrag_lib.trajectory import ImageRef, StopReason


@dataclass(frozen=True)
class Observation:
    """What a step gave back. `text` and `images` form the next user turn; when `done` both are empty and
    `stop_reason` says why. `action` or `invalid` is what the reply was read as."""

    text: str = ""
    images: tuple[ImageRef, ...] = ()
    action: Action | None = None
    invalid: InvalidReason | None = None
    stop_reason: StopReason | None = None
    error: str = ""

    @property
    def done(self) -> bool:
        return self.stop_reason is not None


class Environment:
    """One trajectory at a time over one corpus. Thin state: what was shown, replies used, invalid streak.

    Raises RetrievalIndexError when the retriever ranks pages that the corpus does not hold.
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
        self._start()

    def _start(self) -> None:
        self._seen: set[str] = set()
        self._last: ImageRef | None = None
        self._replies = 0
        self._streak = 0
        self._done = False

    def reset(self, question: str) -> Observation:
        """Forget everything and pose the question."""
        self._start()
        return self._observe(question_prompt(question, crop=self.config.allow_crop))

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
        if is_last:
            return self._stop(StopReason.MAX_TURNS, action=parsed)
        if parsed.kind is ActionKind.SEARCH:
            return self._search(parsed, hits)
        return self._crop(parsed)

    def _is_last_reply(self) -> bool:
        return self._replies + 1 >= self.config.max_turns

    def _search(self, action: Action, hits: Sequence[Hit] | None) -> Observation:
        if not self.config.allow_search:
            return self._invalid(InvalidReason.NOT_ALLOWED)
        if hits is None:
            try:
                hits = self.retriever.search([action.argument], self.config.search_depth)[0]
            except Exception as error:  # a search engine may fail in any way; that must cost this trajectory only
                return self._stop(StopReason.ERROR, action=action, error=f"search failed: {error}")
        self._streak = 0
        hit = best_unseen(hits, self._seen)
        if hit is None:
            return self._observe(NO_NEW_PAGE, action=action)
        self._seen.add(hit.page_id)
        size = self.corpus.page(hit.page_id).size
        view = View.of_page(size, self.config.min_pixels, self.config.max_pixels)
        return self._observe("", ImageRef(hit.page_id, view), action)

    def _crop(self, action: Action) -> Observation:
        if not self.config.allow_crop:
            return self._invalid(InvalidReason.NOT_ALLOWED)
        if self._last is None:
            return self._invalid(InvalidReason.NO_IMAGE)
        try:
            view = self._last.view.crop(
                action.box, self.config.min_pixels, self.config.max_pixels, self.config.crop_padding
            )
        except BoxError as error:
            return self._invalid(InvalidReason(error.reason))
        self._streak = 0
        return self._observe("", ImageRef(self._last.page_id, view), action)

    def _invalid(self, reason: InvalidReason) -> Observation:
        self._streak += 1
        if self._replies >= self.config.max_turns:
            return self._stop(StopReason.MAX_TURNS, invalid=reason)
        if self.config.max_invalid_streak and self._streak >= self.config.max_invalid_streak:
            return self._stop(StopReason.INVALID_STREAK, invalid=reason)
        return self._observe(invalid_message(reason), invalid=reason)

    def _observe(
        self,
        text: str,
        image: ImageRef | None = None,
        action: Action | None = None,
        invalid: InvalidReason | None = None,
    ) -> Observation:
        if image is not None:
            self._last = image
        if self._is_last_reply():
            text = f"{text}\n{LAST_TURN}".strip()
        return Observation(text, () if image is None else (image,), action, invalid)

    def _stop(
        self,
        reason: StopReason,
        action: Action | None = None,
        invalid: InvalidReason | None = None,
        error: str = "",
    ) -> Observation:
        self._done = True
        return Observation(action=action, invalid=invalid, stop_reason=reason, error=error)
