"""Combining rankings: reciprocal rank fusion, ViDoRAG's dynamic number of pages, its hybrid of two engines, reranking.

Deviations from ViDoRAG (arXiv 2502.18017; search_engine.py of the released code), all in `HybridRetriever` unless said:

- The released code hands the pages over grouped by document, which destroys the ranking, and without scores. Here they
  stay ranked, by reciprocal rank fusion of both engines' rankings, and carry that score; `order="document"` gives the
  released order.
- A union of more than 20 pages, or more than its largest padding size, is not padded; the released code fails on the
  minimum of an empty list.
- A document is what the page id says it is up to its last underscore; dots in names are kept.
- `gmm_select` keeps the scores of the pages it selects; fewer than two candidates are returned as they are.
- At most the `k` pages asked for are returned; ViDoRAG returns the whole union, up to 2 x topk. To get it, ask for
  2 x topk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from vrag_lib.retrieval import Hit, Retriever, rank_hits

RAW_DEPTH = 100
"""Pages each engine recalls before anything is selected (ViDoRAG: 100)."""

PADDED_SIZES = (1, 2, 4, 6, 9, 12, 16, 20)
"""Sizes that ViDoRAG pads a union to: those that fill a collage of pages."""


def gmm_select(hits: Sequence[Hit], input_length: int = 20, max_valid: int = 10, min_valid: int = 5) -> list[Hit]:
    """The pages that a two-component Gaussian mixture of the scores calls relevant (ViDoRAG §4.1).

    The first `input_length` scores are fitted; the component that holds the highest score is kept, in ranking order,
    cut to `max_valid` pages or filled up from the other component to `min_valid`. If all scores fall into one
    component, the first `max_valid` pages are kept.

    >>> [hit.page_id for hit in gmm_select([Hit("a", 0.9), Hit("b", 0.88), Hit("c", 0.3), Hit("d", 0.29)], min_valid=1)]
    ['a', 'b']

    Raises ValueError for a score that is not finite (naming the page) or limits that are not 1 <= min <= max.
    """
    if not 1 <= min_valid <= max_valid:
        raise ValueError(f"limits must satisfy 1 <= min_valid <= max_valid, not {min_valid} and {max_valid}")
    candidates = list(hits[:input_length])
    bad = next((hit for hit in candidates if not np.isfinite(hit.score)), None)
    if bad is not None:
        raise ValueError(f"the score of page {bad.page_id!r} is {bad.score}; a mixture needs finite scores")
    if len(candidates) < 2:
        return candidates[:max_valid]
    labels = _two_components(np.array([[hit.score] for hit in candidates]))
    best = labels[max(range(len(candidates)), key=lambda i: candidates[i].score)]
    kept = [hit for hit, label in zip(candidates, labels, strict=True) if label == best]
    rest = [hit for hit, label in zip(candidates, labels, strict=True) if label != best]
    if len(kept) < min_valid:
        kept += rest[: min_valid - len(kept)]
    return kept[:max_valid]


def _two_components(scores: np.ndarray) -> np.ndarray:
    """Labels 0 or 1 (n,) of scores (n, 1), fitted as the released code does."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal scores form one cluster, which is an answer too
        return GaussianMixture(n_components=2, n_init=1, random_state=0).fit(scores).predict(scores)


def fuse_rankings(rankings: Sequence[Sequence[Hit]], k: int = 60, weights: Sequence[float] | None = None) -> list[Hit]:
    """Reciprocal rank fusion: score(page) = sum of weight / (k + rank), ranks from 1 (Cormack et al. 2009, k = 60).

    A page that a ranking lacks gets nothing from it; equal sums are ordered by page id.

    >>> [hit.page_id for hit in fuse_rankings([[Hit("a", 9), Hit("b", 8)], [Hit("b", 0.5), Hit("c", 0.4)]])]
    ['b', 'a', 'c']
    """
    sums: dict[str, float] = {}
    for ranking, weight in zip(rankings, [1.0] * len(rankings) if weights is None else weights, strict=True):
        for rank, hit in enumerate(ranking, start=1):
            sums[hit.page_id] = sums.get(hit.page_id, 0.0) + weight / (k + rank)
    return [Hit(page_id, score) for page_id, score in sorted(sums.items(), key=lambda item: (-item[1], item[0]))]


class RRFRetriever:
    """Reciprocal rank fusion of several retrievers over the same pages; each recalls `depth` pages.

    Raises ValueError when there are no retrievers or their pages differ.
    """

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        depth: int = RAW_DEPTH,
        weights: Sequence[float] | None = None,
        name: str | None = None,
    ) -> None:
        self.page_ids = _common_pages(retrievers)
        self.name = name or "rrf(" + "+".join(retriever.name for retriever in retrievers) + ")"
        self._retrievers, self._depth, self._weights = tuple(retrievers), depth, weights

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query the best `k` pages."""
        depth = max(self._depth, k)
        results = [retriever.search(queries, depth) for retriever in self._retrievers]
        return [fuse_rankings(rankings, weights=self._weights)[:k] for rankings in zip(*results, strict=True)]


class ScoreFusionRetriever:
    """Weighted sum of scores, each scaled to 0..1 per query over all pages (equal weights by default).

    A convex combination keeps how sure each retriever is, which ranks alone lose (Bruch, Gai & Ingber, ACM TOIS 2023).
    A page that a retriever does not return counts as its worst. Raises ValueError as `RRFRetriever` does.
    """

    def __init__(
        self, retrievers: Sequence[Retriever], weights: Sequence[float] | None = None, name: str | None = None
    ) -> None:
        self.page_ids = _common_pages(retrievers)
        self.name = name or "sum(" + "+".join(retriever.name for retriever in retrievers) + ")"
        self._retrievers, self._weights = tuple(retrievers), [1.0] * len(retrievers) if weights is None else weights

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query the best `k` pages; every retriever ranks all pages for it."""
        results = [retriever.search(queries, len(self.page_ids)) for retriever in self._retrievers]
        return [rank_hits(self.page_ids, self._sum(rankings), k) for rankings in zip(*results, strict=True)]

    def _sum(self, rankings: Sequence[Sequence[Hit]]) -> list[float]:
        scaled = [scale_scores(ranking) for ranking in rankings]
        return [
            sum(weight * scores.get(page_id, 0.0) for weight, scores in zip(self._weights, scaled, strict=True))
            for page_id in self.page_ids
        ]


def scale_scores(hits: Sequence[Hit]) -> dict[str, float]:
    """Scores moved to 0..1 by their own minimum and maximum; all 0 when they are equal.

    >>> scale_scores([Hit("a", 6.0), Hit("b", 3.0), Hit("c", 2.0)])
    {'a': 1.0, 'b': 0.25, 'c': 0.0}
    """
    low, high = min((hit.score for hit in hits), default=0.0), max((hit.score for hit in hits), default=0.0)
    return {hit.page_id: (hit.score - low) / (high - low) if high > low else 0.0 for hit in hits}


class GMMRetriever:
    """A retriever cut to a dynamic number of pages by `gmm_select`; limits as in ViDoRAG, `topk` pages at most."""

    def __init__(self, base: Retriever, topk: int = 10, min_valid: int = 5) -> None:
        self.page_ids = base.page_ids
        self.name = f"{base.name}+gmm"
        self._base, self._topk, self._min_valid = base, topk, min_valid

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query at most min(k, topk) pages."""
        results = self._base.search(queries, 2 * self._topk)
        return [_gmm(hits, self._topk, self._min_valid)[:k] for hits in results]


class HybridRetriever:
    """ViDoRAG's hybrid (spec of its search engine): both engines cut by the mixture, union, padding.

    Each of `first` (ViDoRAG: visual) and `second` (text) recalls 100 pages and keeps gmm_select(2 x topk, topk, 5) of
    them. The union is padded to the next of PADDED_SIZES: pages that both recalled, in the order of `first`, then the
    rest of `first`. Ranked by reciprocal rank fusion of the raw rankings, or with `order="document"` grouped by
    document in order of their best page, pages ascending.

    Raises ValueError when the pages of both differ or `order` is neither `ranked` nor `document`.
    """

    def __init__(
        self, first: Retriever, second: Retriever, topk: int = 10, min_valid: int = 5, order: str = "ranked"
    ) -> None:
        if order not in ("ranked", "document"):
            raise ValueError(f"order is 'ranked' or 'document', not {order!r}")
        self.page_ids = _common_pages((first, second))
        self.name = f"hybrid-gmm({first.name}+{second.name})"
        self._first, self._second = first, second
        self._topk, self._min_valid, self._order = topk, min_valid, order

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query at most `k` pages of the padded union, which holds up to 2 x topk."""
        first = self._first.search(queries, RAW_DEPTH)
        second = self._second.search(queries, RAW_DEPTH)
        return [self._combine(a, b)[:k] for a, b in zip(first, second, strict=True)]

    def _combine(self, first: list[Hit], second: list[Hit]) -> list[Hit]:
        selected = [_gmm(hits, self._topk, self._min_valid) for hits in (first, second)]
        union = {hit.page_id for hits in selected for hit in hits}
        in_second = {hit.page_id for hit in second}
        padding = [hit.page_id for hit in first if hit.page_id in in_second]
        padding += [hit.page_id for hit in first if hit.page_id not in in_second]
        size = next((size for size in PADDED_SIZES if size >= len(union)), len(union))
        for page_id in padding:
            if len(union) >= size:
                break
            union.add(page_id)
        ranked = [hit for hit in fuse_rankings([first, second]) if hit.page_id in union]
        return _by_document(ranked) if self._order == "document" else ranked


class RerankRetriever:
    """The first `depth` pages of a retriever, ordered anew by `score(query, page_ids)`; the rest stay behind them.

    Both scores, each scaled to 0..1 over these pages, are added, so that a page which the first stage is sure of is not
    lost to one bad second opinion. Pages behind them keep their order; scores are comparable within a query only.
    """

    def __init__(
        self,
        base: Retriever,
        score: Callable[[str, Sequence[str]], Sequence[float] | np.ndarray],
        depth: int = 10,
        name: str | None = None,
    ) -> None:
        self.page_ids = base.page_ids
        self.name = name or f"{base.name}+rerank"
        self._base, self._score, self._depth = base, score, depth

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query the best `k` pages."""
        results = self._base.search(queries, max(k, self._depth))
        return [self._rerank(query, hits)[:k] for query, hits in zip(queries, results, strict=True)]

    def _rerank(self, query: str, hits: list[Hit]) -> list[Hit]:
        head, tail = hits[: self._depth], hits[self._depth :]
        scores = self._score(query, [hit.page_id for hit in head])
        second = [Hit(hit.page_id, float(score)) for hit, score in zip(head, scores, strict=True)]
        first_scaled, second_scaled = scale_scores(head), scale_scores(second)
        sums = [first_scaled[hit.page_id] + second_scaled[hit.page_id] for hit in head]
        ranked = rank_hits([hit.page_id for hit in head], sums, len(head))
        return ranked + [Hit(hit.page_id, -float(rank)) for rank, hit in enumerate(tail, start=1)]


def _gmm(hits: Sequence[Hit], topk: int, min_valid: int) -> list[Hit]:
    return gmm_select(hits, input_length=2 * topk, max_valid=topk, min_valid=min(min_valid, topk))


def _common_pages(retrievers: Sequence[Retriever]) -> tuple[str, ...]:
    if not retrievers:
        raise ValueError("there is nothing to fuse: no retrievers were given")
    first = retrievers[0]
    for other in retrievers[1:]:
        apart = set(first.page_ids) ^ set(other.page_ids)
        if apart:
            raise ValueError(
                f"{first.name} and {other.name} index different pages ({len(apart)} of them, such as {min(apart)!r}); "
                "build both over the same corpus"
            )
    return first.page_ids


def _by_document(hits: Sequence[Hit]) -> list[Hit]:
    """Documents in order of their first page in `hits`, the pages of each ascending."""
    documents: dict[str, list[Hit]] = {}
    for hit in hits:
        documents.setdefault(hit.page_id.rpartition("_")[0], []).append(hit)
    return [hit for group in documents.values() for hit in sorted(group, key=_page_number)]


def _page_number(hit: Hit) -> tuple[int, str]:
    number = hit.page_id.rpartition("_")[2]
    return (int(number) if number.isdigit() else 0, hit.page_id)
