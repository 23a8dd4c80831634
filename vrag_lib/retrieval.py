"""What every retriever is: a `Retriever` maps queries to ranked pages. Implementations live in `visual_retrieval`
(ColPali family through Byaldi, exact MaxSim), `text_retrieval` (BM25, dense) and `hybrid` (fusions, GMM dynamic k).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


class RetrievalIndexError(RuntimeError):
    """An index that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class Hit:
    """One retrieved page and the score its retriever gave it; higher is better, scales differ by retriever."""

    page_id: str
    score: float


@runtime_checkable
class Retriever(Protocol):
    """Ranks the pages of one corpus. Rankings are deterministic: equal scores are ordered by page id."""

    name: str
    page_ids: tuple[str, ...]

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query the best `k` pages, best first; fewer when the corpus (or a dynamic k) gives fewer."""
        ...


def rank_hits(page_ids: Sequence[str], scores: Sequence[float] | np.ndarray, k: int) -> list[Hit]:
    """The `k` best of parallel `page_ids` and `scores`: by falling score, ties by rising page id.

    >>> [hit.page_id for hit in rank_hits(["b", "a", "c"], [1.0, 1.0, 2.0], 2)]
    ['c', 'a']
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(page_ids) != len(values):
        raise ValueError(f"{len(page_ids)} page ids but {len(values)} scores")
    if not np.isfinite(values).all():
        bad = page_ids[int(np.flatnonzero(~np.isfinite(values))[0])]
        raise ValueError(f"the score of page {bad!r} is not finite; is the index or the model broken?")
    order = sorted(range(len(values)), key=lambda i: (-values[i], page_ids[i]))
    return [Hit(page_ids[i], float(values[i])) for i in order[: max(0, k)]]


def best_unseen(hits: Iterable[Hit], seen: set[str] | frozenset[str]) -> Hit | None:
    """The best-ranked page not in `seen`; None when every hit was seen (paper code: one new page per search)."""
    return next((hit for hit in hits if hit.page_id not in seen), None)
