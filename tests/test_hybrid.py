"""Fusions and the dynamic k on worked examples, against the released algorithm written out plainly."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrag_lib.hybrid import (
    PADDED_SIZES,
    GMMRetriever,
    HybridRetriever,
    RerankRetriever,
    RRFRetriever,
    ScoreFusionRetriever,
    fuse_rankings,
    gmm_select,
    scale_scores,
)
from vrag_lib.retrieval import Hit, Retriever, rank_hits


def hits(*scores, prefix="d"):
    return [Hit(f"{prefix}_{i + 1}", score) for i, score in enumerate(scores)]


def ids(ranking):
    return [hit.page_id for hit in ranking]


class Fixed:
    """A retriever that gives the same scores for every query."""

    def __init__(self, name, scores):
        self.name, self._scores = name, scores
        self.page_ids = tuple(scores)

    def search(self, queries, k):
        return [rank_hits(self.page_ids, list(self._scores.values()), k) for _ in queries]


# --- gmm_select -------------------------------------------------------------------------------------------------


def test_two_clear_groups_keep_the_upper_one():
    ranking = hits(0.95, 0.94, 0.93, 0.92, 0.91, 0.90, 0.31, 0.30, 0.29, 0.28)
    assert gmm_select(ranking) == ranking[:6]


def test_a_group_below_the_minimum_is_filled_from_the_other():
    ranking = hits(0.95, 0.94, 0.31, 0.30, 0.29, 0.28, 0.27)
    assert gmm_select(ranking, min_valid=2) == ranking[:2]
    assert gmm_select(ranking, min_valid=5) == ranking[:5]


def test_a_group_above_the_maximum_is_cut():
    ranking = hits(*np.linspace(0.99, 0.90, 14), 0.2, 0.19, 0.18, 0.17, 0.16, 0.15)
    assert gmm_select(ranking) == ranking[:10]
    assert gmm_select(ranking, max_valid=3, min_valid=1) == ranking[:3]


def test_only_the_first_scores_are_fitted():
    """The 21st score is far away; were it fitted, it would be the second component."""
    ranking = hits(*np.linspace(1.0, 0.9, 10), *np.linspace(0.5, 0.4, 10), -1000.0)
    assert gmm_select(ranking) == ranking[:10]
    assert len(gmm_select(ranking, input_length=21, max_valid=21)) == 20


def test_equal_scores_are_one_component():
    ranking = hits(*[0.5] * 12)
    assert gmm_select(ranking) == ranking[:10]
    assert gmm_select(ranking[:3]) == ranking[:3]


def test_order_inside_the_kept_group_is_that_of_the_list_not_of_the_scores():
    ranking = [Hit("a", 0.90), Hit("b", 0.30), Hit("c", 0.95), Hit("d", 0.31), Hit("e", 0.92)]
    assert ids(gmm_select(ranking, min_valid=1)) == ["a", "c", "e"]


def test_fewer_than_two_candidates_come_back():
    assert gmm_select([]) == []
    assert gmm_select(hits(0.4)) == hits(0.4)
    assert gmm_select(hits(0.9, 0.1), input_length=1) == hits(0.9)
    assert gmm_select(hits(0.9, 0.1)) == hits(0.9, 0.1)  # filled up to the minimum as far as there is something


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_named(score):
    with pytest.raises(ValueError, match="'d_2'"):
        gmm_select(hits(0.9, score, 0.1))


@pytest.mark.parametrize(("low", "high"), [(0, 5), (6, 5), (-1, -1)])
def test_limits_are_checked(low, high):
    with pytest.raises(ValueError, match="min_valid"):
        gmm_select(hits(0.9, 0.1), max_valid=high, min_valid=low)


def released_gmm(scores, input_length, max_valid, min_valid):
    """The steps of the released search engine as the paper's appendix and code state them, on positions."""
    from sklearn.mixture import GaussianMixture

    values = np.array(scores[:input_length]).reshape(-1, 1)
    labels = GaussianMixture(n_components=2, n_init=1, random_state=0).fit(values).predict(values)
    groups = [[i for i in range(len(values)) if labels[i] == label] for label in sorted(set(labels))]
    if len(groups) == 1:
        return groups[0][:max_valid]
    groups.sort(key=lambda group: max(scores[i] for i in group), reverse=True)
    kept = groups[0][:max_valid]
    return kept + groups[1][: max(0, min_valid - len(kept))]


@given(st.lists(st.integers(0, 300), min_size=2, max_size=30), st.integers(1, 5), st.integers(0, 8))
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_selection_equals_the_released_steps(values, low, more):
    scores = [value / 10 for value in sorted(values, reverse=True)]
    ranking = hits(*scores)
    expected = released_gmm(scores, 20, low + more, low)
    assert gmm_select(ranking, 20, low + more, low) == [ranking[i] for i in expected]


# --- fusions ----------------------------------------------------------------------------------------------------


def test_reciprocal_ranks_worked_by_hand():
    fused = fuse_rankings([hits(9, 8, 7), [Hit("d_3", 0.2), Hit("x_1", 0.1)]])
    expected = {"d_3": 1 / 63 + 1 / 61, "d_1": 1 / 61, "d_2": 1 / 62, "x_1": 1 / 62}
    assert {hit.page_id: hit.score for hit in fused} == pytest.approx(expected)
    assert ids(fused) == ["d_3", "d_1", "d_2", "x_1"]  # equal sums by page id


def test_a_weight_of_zero_silences_a_ranking():
    assert ids(fuse_rankings([hits(3, 2), hits(9, 8, prefix="x")], weights=[1, 0]))[:2] == ["d_1", "d_2"]


@given(st.permutations(range(8)), st.permutations(range(8)))
def test_fusion_does_not_depend_on_the_order_of_rankings(first, second):
    a, b = ([Hit(f"d_{i}", -rank) for rank, i in enumerate(order)] for order in (first, second))
    assert fuse_rankings([a, b]) == fuse_rankings([b, a])
    assert ids(fuse_rankings([a, a])) == ids(a)


def test_scaled_scores_are_added():
    first = Fixed("a", {"d_1": 10.0, "d_2": 9.0, "d_3": 0.0})
    second = Fixed("b", {"d_1": -4.0, "d_2": -2.0, "d_3": -3.0})
    (ranking,) = ScoreFusionRetriever((first, second)).search(["q"], 3)
    assert {hit.page_id: hit.score for hit in ranking} == pytest.approx({"d_1": 1.0, "d_2": 1.9, "d_3": 0.5})
    assert ids(ranking) == ["d_2", "d_1", "d_3"]
    weighted = ScoreFusionRetriever((first, second), weights=(1.0, 0.0)).search(["q"], 2)
    assert ids(weighted[0]) == ["d_1", "d_2"]


def test_equal_scores_scale_to_zero():
    assert scale_scores(hits(2.0, 2.0)) == {"d_1": 0.0, "d_2": 0.0}
    assert scale_scores([]) == {}


def test_a_retriever_that_says_nothing_leaves_the_other_in_charge():
    silent = Fixed("silent", dict.fromkeys(("d_1", "d_2", "d_3"), 0.0))
    loud = Fixed("loud", {"d_1": 0.1, "d_2": 0.3, "d_3": 0.2})
    assert ids(ScoreFusionRetriever((silent, loud)).search(["q"], 3)[0]) == ["d_2", "d_3", "d_1"]


@pytest.mark.parametrize("make", [RRFRetriever, ScoreFusionRetriever, lambda pair: HybridRetriever(*pair)])
def test_different_pages_are_refused(make):
    with pytest.raises(ValueError, match="such as 'd_2'"):
        make((Fixed("a", {"d_1": 1.0}), Fixed("b", {"d_1": 1.0, "d_2": 1.0})))


def test_nothing_to_fuse_is_refused():
    with pytest.raises(ValueError, match="no retrievers"):
        RRFRetriever([])


# --- hybrid -----------------------------------------------------------------------------------------------------


def scores_of(pages, best):
    """Scores by which gmm_select keeps exactly `best` (when they are 5 to 10), in that order."""
    low = {page: 0.1 - i / 1e4 for i, page in enumerate(page for page in pages if page not in best)}
    return {page: low.get(page, 0.9 - best.index(page) / 1e3 if page in best else 0) for page in pages}


PAGES = [f"a.b_{i}" for i in range(1, 31)] + [f"c_{i}" for i in range(1, 31)]


def test_hybrid_pads_the_union_from_what_both_found():
    """5 + 5 pages with 3 in common make 7; the next collage size is 9: two more of the first engine's ranking."""
    first = ["c_9", "c_2", "a.b_10", "a.b_2", "c_1"]
    second = ["a.b_2", "c_9", "c_1", "a.b_30", "a.b_29"]
    engines = Fixed("v", scores_of(PAGES, first)), Fixed("t", scores_of(PAGES, second))
    (ranking,) = HybridRetriever(*engines).search(["q"], 20)
    assert set(ids(ranking)) == {*first, *second, "a.b_1", "a.b_3"}
    assert ids(ranking) == [
        i for i in ids(fuse_rankings([e.search(["q"], 100)[0] for e in engines])) if i in ids(ranking)
    ]
    assert ids(ranking)[0] == "c_9"


def test_document_order_is_the_released_one():
    first = ["c_9", "c_2", "a.b_10", "a.b_2", "c_1"]
    engines = Fixed("v", scores_of(PAGES, first)), Fixed("t", scores_of(PAGES, first))
    (ranking,) = HybridRetriever(*engines, order="document").search(["q"], 20)
    assert ids(ranking) == ["c_1", "c_2", "c_9", "a.b_1", "a.b_2", "a.b_10"]  # 5, padded to 6; numbers, not strings


def test_a_union_beyond_the_largest_size_is_kept_whole():
    first, second = PAGES[:12], PAGES[30:42]
    engines = Fixed("v", scores_of(PAGES, first)), Fixed("t", scores_of(PAGES, second))
    (ranking,) = HybridRetriever(*engines, topk=12).search(["q"], 100)
    assert len(ranking) == 24 > max(PADDED_SIZES)
    assert set(ids(ranking)) == {*first, *second}


def test_hybrid_gives_at_most_k_and_copes_with_tiny_corpora():
    one = Fixed("v", {"d_1": 1.0})
    assert ids(HybridRetriever(one, one).search(["q"], 5)[0]) == ["d_1"]
    engines = Fixed("v", scores_of(PAGES, PAGES[:6])), Fixed("t", scores_of(PAGES, PAGES[3:9]))
    assert [len(HybridRetriever(*engines).search(["q"], k)[0]) for k in (1, 4, 50)] == [1, 4, 9]
    with pytest.raises(ValueError, match="order"):
        HybridRetriever(one, one, order="page")


def test_gmm_retriever_varies_the_number_of_pages():
    base = Fixed("v", scores_of(PAGES, PAGES[:7]))
    dynamic = GMMRetriever(base)
    assert ids(dynamic.search(["q"], 20)[0]) == PAGES[:7]
    assert ids(dynamic.search(["q"], 3)[0]) == PAGES[:3]
    assert dynamic.name == "v+gmm" and isinstance(dynamic, Retriever)


# --- reranking --------------------------------------------------------------------------------------------------


def test_reranking_adds_scaled_scores_of_the_first_pages_only():
    base = Fixed("base", {"d_1": 10.0, "d_2": 8.0, "d_3": 6.0, "d_4": 5.0, "d_5": 4.0})
    asked = []

    def score(query, page_ids):
        asked.append((query, list(page_ids)))
        return [{"d_1": -3.0, "d_2": -3.0, "d_3": 5.0}[page_id] for page_id in page_ids]

    (ranking,) = RerankRetriever(base, score, depth=3).search(["why?"], 5)
    assert asked == [("why?", ["d_1", "d_2", "d_3"])]
    # first: 1, 0.5, 0; second: 0, 0, 1: d_1 and d_3 tie at 1 and go by page id
    assert ids(ranking) == ["d_1", "d_3", "d_2", "d_4", "d_5"]
    assert all(a.score >= b.score for a, b in itertools.pairwise(ranking))


def test_a_smaller_k_does_not_change_the_top():
    base = Fixed("base", {f"d_{i}": -float(i) for i in range(1, 30)})
    rerank = RerankRetriever(base, lambda _, page_ids: [int(p[2:]) % 7 for p in page_ids], depth=10)
    assert ids(rerank.search(["q"], 2)[0]) == ids(rerank.search(["q"], 29)[0])[:2]


def test_reranking_nothing():
    class Empty(Fixed):
        def search(self, queries, k):
            return [[] for _ in queries]

    assert RerankRetriever(Empty("none", {}), lambda _, page_ids: []).search(["q"], 5) == [[]]
