"""BM25 and dense retrieval over small collections; the cache; what happens to pages without text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrag_lib import text_retrieval
from vrag_lib.corpus import Corpus, Document, Page, TextLine
from vrag_lib.geometry import Box, Size
from vrag_lib.retrieval import Retriever
from vrag_lib.text_retrieval import (
    BM25Retriever,
    CrossEncoderScorer,
    DenseRetriever,
    default_text_retriever,
    document_leads,
    split_passages,
)

TEXTS = {
    "fridge_1": "Use and care guide of your refrigerator",
    "fridge_2": "Pull the meat drawer out to the stop, lift the front slightly and slide it out.",
    "fridge_3": "The water dispenser holds 1.5 litres of chilled water.",
    "survey_1": "Older adults and technology use, a national survey",
    "survey_2": "Four in ten seniors own a smartphone; the share falls with age.",
    "survey_3": "",
}
IDS, PAGES = tuple(TEXTS), tuple(TEXTS.values())


def ids(ranking):
    return [hit.page_id for hit in ranking]


def corpus(texts=TEXTS):
    documents = {}
    for page_id, text in texts.items():
        name, _, number = page_id.rpartition("_")
        lines = tuple(TextLine(line, Box(0, 0, 9, 9)) for line in text.split("\n")) if text else ()
        page = Page(page_id, name, int(number), None, Size(10, 10), lines, "layer" if text else "none")
        documents.setdefault(name, []).append(page)
    return Corpus([Document(name, None, name, tuple(pages)) for name, pages in documents.items()])


# --- pure parts -------------------------------------------------------------------------------------------------


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=60), st.integers(1, 12), st.integers(0, 11))
def test_passages_cover_every_word_in_order(words, size, overlap):
    overlap = min(overlap, size - 1)
    passages = [passage.split() for passage in split_passages(" ".join(words), size, overlap)]
    joined = [word for i, passage in enumerate(passages) for word in passage[overlap if i else 0 :]]
    assert joined == words
    assert all(len(passage) == size for passage in passages[:-1])
    assert all(len(passage) > overlap for passage in passages[1:])  # none lies within its neighbour


def test_an_overlap_as_long_as_the_window_is_refused():
    with pytest.raises(ValueError, match="overlap"):
        split_passages("a b c", words=3, overlap=3)


def test_lead_comes_from_the_first_page_with_words():
    leads = document_leads(["a", "a", "a", "b"], ["", "page 7", "The whole  annual report", "x"], words=3)
    assert leads == ["The whole annual"] * 3 + [""]


# --- BM25 -------------------------------------------------------------------------------------------------------


def test_bm25_finds_by_stems_and_ranks_every_page():
    retriever = BM25Retriever(IDS, PAGES)
    assert isinstance(retriever, Retriever)
    (ranking,) = retriever.search(["sliding drawers"], 10)
    assert ids(ranking)[0] == "fridge_2" and len(ranking) == 6
    assert [hit.score for hit in ranking[1:]] == [0.0] * 5
    assert ids(ranking[1:]) == sorted(set(IDS) - {"fridge_2"})
    assert BM25Retriever(IDS, PAGES, stem=False).search(["sliding drawers"], 1)[0][0].score == 0.0


def test_bm25_scores_are_the_formula():
    """Lucene's variant: idf ln(1 + (N - n + .5) / (n + .5)), tf / (tf + k1 (1 - b + b length / mean length))."""
    texts = ["apple apple pear", "apple plum", "kiwi fig fig fig"]
    (ranking,) = BM25Retriever(("a_1", "a_2", "a_3"), texts).search(["apple"], 3)
    idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    expected = [idf * tf / (tf + 1.5 * (0.25 + 0.75 * length / 3)) for tf, length in ((2, 3), (1, 2))]
    assert [hit.score for hit in ranking] == pytest.approx([*expected, 0.0], rel=1e-5)


def test_the_lead_makes_a_page_findable_by_its_document():
    query = ["In the guide of the refrigerator, what does the dispenser do with seniors?"]
    leads = document_leads([page_id.split("_")[0] for page_id in IDS], PAGES)
    assert ids(BM25Retriever(IDS, PAGES, leads).search(query, 1)[0]) == ["fridge_3"]


@pytest.mark.parametrize("texts", [[""], ["the of and"], ["!?"]])
def test_collections_without_words_rank_by_id(texts):
    retriever = BM25Retriever(("d_2", "d_1"), texts * 2)
    assert ids(retriever.search(["the"], 5)[0]) == ["d_1", "d_2"]
    assert BM25Retriever((), ()).search(["x"], 5) == [[]]


@given(st.text(st.characters(), max_size=80))  # lone surrogates too
@settings(max_examples=60, deadline=None)
def test_any_query_ranks_all_pages(query):
    (ranking,) = BM25Retriever(IDS, PAGES).search([query], 10)
    assert sorted(ids(ranking)) == sorted(IDS)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 page ids, 1 texts"):
        BM25Retriever(("a_1", "a_2"), ["x"])
    with pytest.raises(ValueError, match="1 leads"):
        BM25Retriever(("a_1", "a_2"), ["x", "y"], ["z"])


# --- dense ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return DenseRetriever(IDS, PAGES, cache_dir=tmp_path_factory.mktemp("cache"))


def test_dense_finds_by_meaning(dense):
    rankings = dense.search(["How much cold water can it keep?", "What share of the elderly has a mobile phone?"], 6)
    assert [ids(ranking)[0] for ranking in rankings] == ["fridge_3", "survey_2"]
    assert all(len(ranking) == 6 and all(-1.001 < hit.score < 1.001 for hit in ranking) for ranking in rankings)
    assert all(ranking[-1].page_id == "survey_3" or ranking[-2].score == ranking[-1].score for ranking in rankings)


def test_a_page_scores_as_its_best_passage(tmp_path):
    filler = "The committee met on several days and heard many members. " * 40
    texts = [filler + PAGES[1], filler]
    retriever = DenseRetriever(("d_1", "d_2"), texts, cache_dir=tmp_path)
    query = "How is the meat drawer removed?"
    assert ids(retriever.search([query], 1)[0]) == ["d_1"]
    (passage, other) = retriever.best_passages(query, ["d_1", "d_2"])
    assert "meat drawer" in passage and passage in split_passages(texts[0])
    assert other in split_passages(filler)


def test_vectors_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    first = DenseRetriever(IDS, PAGES, cache_dir=tmp_path)
    assert first.encoded == 5
    monkeypatch.setattr(text_retrieval.SentenceEncoder, "encode", None)  # any use of it fails
    again = DenseRetriever(IDS, PAGES, cache_dir=tmp_path)
    assert again.encoded == 0 and np.array_equal(again._vectors, first._vectors)


def test_a_changed_document_costs_only_itself(tmp_path):
    DenseRetriever(IDS, PAGES, cache_dir=tmp_path)
    changed = ("New guide", *PAGES[1:])
    assert DenseRetriever(IDS, changed, cache_dir=tmp_path).encoded == 3  # the fridge's passages, not the survey's


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    encode = text_retrieval.SentenceEncoder.encode
    calls = []

    def dying(self, text):
        calls.append(text)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(text_retrieval.SentenceEncoder, "encode", dying)
    with pytest.raises(KeyboardInterrupt):
        DenseRetriever(IDS, PAGES, cache_dir=tmp_path)
    monkeypatch.setattr(text_retrieval.SentenceEncoder, "encode", encode)
    assert DenseRetriever(IDS, PAGES, cache_dir=tmp_path).encoded == 2  # the first document was kept


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage, caplog):
    first = DenseRetriever(IDS, PAGES, cache_dir=tmp_path)
    files = list((tmp_path / "text").glob("*.safetensors"))
    assert len(files) == 2
    files[0].write_bytes(damage)
    again = DenseRetriever(IDS, PAGES, cache_dir=tmp_path)
    assert again.encoded > 0 and np.array_equal(again._vectors, first._vectors)
    assert files[0].name in caplog.text


def test_pages_without_any_text(tmp_path):
    retriever = DenseRetriever(("d_1", "d_2"), ["", " "], cache_dir=tmp_path)
    assert ids(retriever.search(["anything"], 5)[0]) == ["d_1", "d_2"]
    assert retriever.best_passages("anything", ["d_2"]) == [""]


# --- together ---------------------------------------------------------------------------------------------------


def test_cross_encoder_reads_the_best_passage(dense):
    scores = CrossEncoderScorer(dense)("How is the meat drawer removed?", ["survey_3", "fridge_2", "survey_2"])
    assert int(np.argmax(scores)) == 1


def test_default_retriever_over_a_corpus(tmp_path):
    retriever = default_text_retriever(corpus(), tmp_path)
    assert isinstance(retriever, Retriever) and retriever.name == "text"
    queries = ["How do I take out the meat drawer?", "Which part of seniors has a smartphone?", ""]
    rankings = retriever.search(queries, 4)
    assert [ranking[0].page_id for ranking in rankings[:2]] == ["fridge_2", "survey_2"]
    assert [len(ranking) for ranking in rankings] == [4, 4, 4]
    assert rankings == retriever.search(queries, 4)


def test_words_without_spaces_are_found():
    """Chinese, Japanese, and accents written as signs of their own."""
    texts = [
        "公司员工人数为一百四十七人",
        "昨天的天气很好",
        "売上高は三百万円です",
        "Sto\u0308rche gezählt",
        "Herons counted",
    ]
    retriever = BM25Retriever([f"d_{i}" for i in range(1, 6)], texts)
    found = retriever.search(["员工人数是多少", "天气怎么样", "売上高", "Störche", "weather"], 1)
    assert [hits[0].page_id for hits in found[:4]] == ["d_1", "d_2", "d_3", "d_4"]
    assert all(hits[0].score > 0 for hits in found[:4]) and found[4][0].score == 0
    months = BM25Retriever(["d_1", "d_2", "d_3"], ["1月 2月", "3月 売上 2021年度", "第3回 会議・その他"])
    assert [hits[0].page_id for hits in months.search(["3月", "第3回", "2021年"], 1)] == ["d_2", "d_3", "d_2"]
    assert document_leads(["d"], ["公司年度报告二零二一年"], words=4) == ["公 司 年 度"]
    assert len(split_passages("员工人数为一百四十七人。" * 20, words=100, overlap=0)) == 3
