"""Question formats: each reader against the form its benchmark publishes, round trips, and what is named as wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import FakeRetriever
from hypothesis import given, settings
from hypothesis import strategies as st
from pdf_files import words_pdf
from PIL import Image

from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Corpus, Document, Page, Question
from vrag_lib.corpus_formats import (
    answerable,
    check_gold,
    load_dataset,
    load_questions,
    write_unified,
)
from vrag_lib.document_files import CorpusError, Problem
from vrag_lib.geometry import Size
from vrag_lib.policy import ScriptedPolicy
from vrag_lib.rewards import retrieval_reward
from vrag_lib.rollout import rollout

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")


def _item(**changes: Any) -> dict[str, Any]:
    item = {
        "uid": "q1",
        "query": "Which year?",
        "reference_answer": "1999",
        "meta_info": {
            "file_name": "2023.acl-long.386.pdf",
            "reference_page": [10, 11],
            "source_type": "2d_layout",
            "query_type": "Multi-Hop",
            "doc_type": "paper",
        },
    }
    meta = changes.pop("meta", {})
    return {**item, **changes, "meta_info": {**item["meta_info"], **meta}}


def _write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_unified(tmp_path: Path) -> None:
    (question,) = load_questions(_write(tmp_path / "vidoseek.json", {"examples": [_item(difficulty=3)]}))
    assert question == Question(
        "q1", "Which year?", "1999", "2023.acl-long.386.pdf", (10, 11), "2d_layout", "Multi-Hop",
        {"difficulty": 3, "doc_type": "paper"},
    )  # fmt: skip
    assert question.gold_page_ids == ("2023.acl-long.386_10", "2023.acl-long.386_11")


def test_unified_items_need_a_query_and_an_answer_only(tmp_path: Path) -> None:
    items = [
        {"query": "Which year?", "reference_answer": 1999},
        {"query": "Who?", "reference_answer": "Ann", "meta_info": {"file_name": "a.pdf", "reference_page": [2]}},
        {"uid": "mine", "query": "How many?", "reference_answer": "4", "meta_info": {"file_name": "a.pdf"}},
        {"query": "And then?", "reference_answer": "5"},
    ]
    questions = load_questions(_write(tmp_path / "questions.json", items), "unified")
    assert [question.uid for question in questions] == ["q1", "q2", "mine", "q4"]
    assert questions[0] == Question("q1", "Which year?", "1999")
    assert [question.gold_page_ids for question in questions] == [(), ("a_2",), (), ()]
    write_unified(questions, tmp_path / "again.json")
    assert load_questions(tmp_path / "again.json") == questions


def test_what_a_table_program_exports_is_read(tmp_path: Path) -> None:
    """Nulls are fields that are not there, whole floats are pages, an own uid keeps its name, halves of surrogate
    pairs, which no file can hold, are replaced; regions of another form are named before anything is asked."""
    items = [
        {"query": "a", "reference_answer": "1", "meta_info": None},
        {"uid": "q1", "query": "b", "reference_answer": 2, "meta_info": {
            "file_name": "d.pdf", "reference_page": [1.0, 2], "source_type": None, "query_type": None}},
        {"uid": "\ud800x", "query": "\udcdc", "reference_answer": "3", "meta_info": {"reference_page": None}},
        {"uid": "r", "query": "c", "reference_answer": "4", "meta_info": {"file_name": "d", "regions": [{"page": 1}]}},
    ]  # fmt: skip
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"examples": items}))
    problems: list[Problem] = []
    first, second, third = load_questions(path, problems=problems)
    assert (first.uid, second.uid, third.uid) == ("q1_", "q1", "?x") and third.query == "?"
    assert second.gold_page_ids == ("d_1", "d_2") and second.source_type == ""
    assert len(problems) == 1 and "regions" in problems[0].reason


def test_slidevqa_annotation(tmp_path: Path) -> None:
    line = {
        "deck_name": "deck.name-150318_95",
        "deck_url": "https://example.org/deck",
        "image_urls": ["https://example.org/a-1-1024.jpg"],
        "qa_id": 17,
        "question": "How many?",
        "answer": "4",
        "arithmetic_expression": "2+2",
        "evidence_pages": [3, 4],
        "reasoning_type": "Multi-hop",
        "answer_type": "Non-span",
    }
    text = json.dumps(line) + "\r\n\n" + json.dumps({**line, "qa_id": 18}) + "\n{ broken\n"
    problems: list[Problem] = []
    questions = load_questions(_write(tmp_path / "annotations/qa/test.jsonl", text), problems=problems)
    assert [question.uid for question in questions] == ["17", "18"]
    assert questions[0].gold_page_ids == ("deck.name-150318_95_3", "deck.name-150318_95_4")
    assert questions[0].query_type == "Multi-hop" and questions[0].extra["arithmetic_expression"] == "2+2"
    assert "line 4 is not JSON" in problems[0].reason
    assert load_questions(tmp_path, "slidevqa") == questions


def test_mmlongbench_doc(tmp_path: Path) -> None:
    def item(answer: str, pages: str) -> dict[str, str]:
        return {
            "doc_id": "a.b.pdf",
            "doc_type": "paper",
            "question": "What?",
            "answer": answer,
            "evidence_pages": pages,
            "evidence_sources": "['Chart', 'Table']",
            "answer_format": "Str",
        }

    items = [item("yes", "[3, 5]"), item("Not answerable", "[]"), item("no", "[]"), item("Not answerable", "[2]")]
    questions = load_questions(_write(tmp_path / "samples.json", items))
    assert [question.uid for question in questions] == [f"a.b.pdf#{n}" for n in (1, 2, 3, 4)]
    assert questions[0].reference_pages == (3, 5) and questions[0].source_type == "Chart, Table"
    assert questions[0].extra == {
        "evidence_sources": ["Chart", "Table"], "doc_type": "paper", "answer_format": "Str"
    }  # fmt: skip
    assert answerable(questions) == questions[:1]


@needs_shared
def test_the_shared_part_of_mmlongbench_doc_has_218_answerable_questions() -> None:
    questions = load_questions(SHARED / "mmlongbench_doc", "mmlongbench_doc")
    assert (len(questions), len(answerable(questions))) == (289, 218)
    stems = {path.stem for path in (SHARED / "mmlongbench_doc" / "documents").iterdir()}
    assert {page_id.rpartition("_")[0] for q in questions for page_id in q.gold_page_ids} <= stems


@needs_shared
def test_the_shared_vidoseek_example_loads_with_its_pages(tmp_path: Path) -> None:
    corpus, questions = load_dataset("vidoseek", SHARED / "vidorag_example", cache_dir=tmp_path)
    assert len(corpus) == 23 and len(questions) == 1
    assert check_gold(corpus, questions) == []
    prefixed, (question,) = load_dataset("vidoseek", SHARED / "vidorag_example", prefix="v-", cache_dir=tmp_path)
    assert question.gold_page_ids[0].startswith("v-") and question.gold_page_ids[0] in prefixed


BAD = [
    (_item(query=""), "field query: missing or empty"),
    ({"query": "x"}, "field reference_answer: missing"),
    ("text", "not an object but str"),
    (_item(meta={"file_name": None}), "field file_name"),
    (_item(meta={"file_name": ""}), "field file_name: missing or empty"),
    (_item(meta={"reference_page": [-1]}), "-1 is no page number"),
    (_item(meta={"reference_page": [True]}), "True is no page number"),
    (_item(meta={"reference_page": ["4"]}), "'4' is no page number"),
    (_item(meta={"reference_page": {"a": 1}}), "not a list but dict"),
    (_item(meta={"reference_page": "__import__('os').abort()"}), "is not a list"),
    (_item(meta={"reference_page": "[" * 5000}), "is not a list"),
    ({**_item(), "meta_info": 3}, "field meta_info: not an object"),
    (_item(uid="good"), "'good' was used before"),
]


def test_malformed_items_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = _write(tmp_path / "q.json", {"examples": [_item(uid="good"), *(item for item, _ in BAD)]})
    problems: list[Problem] = []
    questions = load_questions(file, problems=problems)
    assert [question.uid for question in questions] == ["good"]
    assert len(problems) == len(BAD)
    for index, (problem, (_, words)) in enumerate(zip(problems, BAD, strict=True), start=1):
        assert problem.path == str(file) and f"item {index}: " in problem.reason and words in problem.reason
        assert problem.reason in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{ not json", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "neither a list"),
        ({"examples": {}}, "neither a list"),
        ([], "no known question format"),
        ([{"prompt": "x"}], "no known question format"),
        ({"examples": [_item(query="")]}, "no usable question; the first: item 0: field query"),
    ],
)
def test_unusable_files_are_errors(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        load_questions(_write(tmp_path / "questions.json", content))


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        load_questions(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="holds no question file"):
        load_questions(tmp_path)
    _write(tmp_path / "vidoseek.json", {"examples": [_item(uid="v")]})
    _write(tmp_path / "slidevqa_refined.json", {"examples": [_item(uid="s")]})
    with pytest.raises(CorpusError, match=r"several question files: vidoseek\.json, slidevqa_refined\.json"):
        load_questions(tmp_path)
    assert load_questions(tmp_path, "vidoseek")[0].uid == "v"
    assert load_questions(tmp_path, "slidevqa")[0].uid == "s"
    with pytest.raises(CorpusError, match="in the unified format, not in mmlongbench_doc"):
        load_questions(tmp_path / "vidoseek.json", "mmlongbench_doc")
    with pytest.raises(CorpusError, match="format 'csv' is not one of auto, unified"):
        load_questions(tmp_path, "csv")
    with pytest.raises(CorpusError, match="dataset 'csv' is not one of"):
        load_dataset("csv", tmp_path)


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
questions = st.builds(
    Question,
    uid=words,
    query=words,
    reference_answer=words,
    file_name=words,
    reference_pages=st.lists(st.integers(0, 10_000), unique=True, max_size=5).map(tuple),
    source_type=st.text(max_size=9),
    query_type=st.text(max_size=9),
    extra=st.dictionaries(st.sampled_from(["doc_type", "answer_format", "n"]), st.none() | st.integers() | words),
)


@settings(deadline=None)
@given(st.lists(questions, min_size=1, max_size=4, unique_by=lambda question: question.uid))
def test_writing_and_reading_gives_the_same_questions(tmp_path_factory: pytest.TempPathFactory, items: list) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    write_unified(items, path)
    assert load_questions(path) == tuple(items)


def test_answers_that_are_no_strings_become_text(tmp_path: Path) -> None:
    items = [_item(uid=1, reference_answer=18.5), _item(uid=2, reference_answer=["a", "b"])]
    first, second = load_questions(_write(tmp_path / "q.json", {"examples": items}))
    assert (first.uid, first.reference_answer, second.reference_answer) == ("1", "18.5", '["a", "b"]')


def test_check_gold_names_what_is_missing() -> None:
    pages = tuple(Page(f"a.b_{n}", "a.b", n, Path("x.jpg"), Size(9, 9)) for n in (1, 2))
    corpus = Corpus([Document("a.b", Path("a.b.pdf"), "0", pages)])
    asked = [Question("fine", "?", "!", "a.b.pdf", (1, 2)), Question("off", "?", "!", "a.b.pdf", (0, 3))]
    asked.append(Question("cut at the first dot", "?", "!", "a.pdf", (1,)))
    problems = [str(problem) for problem in check_gold(corpus, asked)]
    assert len(problems) == 3
    assert "off: gold page 'a.b_0': pages are counted from 1" in problems[0]
    assert "off: gold page 'a.b_3' is not in the corpus, which has 2 pages" in problems[1]
    assert "'a_1' is of a document that the corpus does not hold" in problems[2]


def test_datasets_load_from_their_published_layouts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub = tmp_path / "hub"
    words_pdf(hub / "vidoseek_pdf_document" / "v.1.pdf", "One", "Two")
    words_pdf(hub / "slidevqa_pdf_document" / "s.1.pdf", "One")
    _write(hub / "vidoseek.json", {"examples": [_item(meta={"file_name": "v.1.pdf", "reference_page": [2]})]})
    _write(hub / "slidevqa_refined.json", {"examples": [_item(meta={"file_name": "s.1.pdf", "reference_page": [2]})]})
    corpus, (question,) = load_dataset("vidoseek", hub, cache_dir=tmp_path / "cache")
    assert corpus.page_ids == ("v.1_1", "v.1_2") and corpus.page(question.gold_page_ids[0]).text == "Two"
    corpus, _ = load_dataset("slidevqa", hub, cache_dir=tmp_path / "cache")
    assert corpus.page_ids == ("s.1_1",)
    assert "1 gold pages are not in the corpus, the first: q1: gold page 's.1_2'" in caplog.text

    original = tmp_path / "original"
    for number in (1, 2, 10):
        (original / "images/test/deck.x_95").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (number, 0, 0)).save(original / f"images/test/deck.x_95/t-2-{number}-1024.jpg")
    item = {"qa_id": 1, "deck_name": "deck.x_95", "question": "?", "answer": "!", "evidence_pages": [10]}
    _write(original / "annotations/qa/test.jsonl", json.dumps(item))
    corpus, asked = load_dataset("slidevqa", original, cache_dir=tmp_path / "cache")
    assert len(corpus) == 3 and check_gold(corpus, asked) == []

    paper = tmp_path / "paper"
    (paper / "img").mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (64, 48), (0, 0, number)).save(paper / f"img/d.1_{number}.jpg")
    _write(paper / "rag_dataset.json", {"examples": [_item(meta={"file_name": "d.1.pdf", "reference_page": [2]})]})
    corpus, asked = load_dataset("unified", paper, cache_dir=tmp_path / "cache")
    assert corpus.page_ids == ("d.1_1", "d.1_2") and check_gold(corpus, asked) == []


def test_a_question_about_a_duplicate_asks_about_the_document_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`b.png` is `a.png` once more: who shows the page of `a` has found what a question about `b` asks for."""
    (tmp_path / "documents").mkdir()
    for name, colour in {"a": "red", "b": "red", "c": "blue"}.items():
        Image.new("RGB", (64, 48), colour).save(tmp_path / "documents" / f"{name}.png")
    regions = [{"page": 1, "region_box": [0, 0, 9, 9]}]
    items = [_item(uid=name, meta={"file_name": f"{name}.png", "reference_page": [1]}) for name in "abc"]
    items[1]["meta_info"]["regions"] = regions
    _write(tmp_path / "questions.json", {"examples": items})
    corpus, asked = load_dataset("unified", tmp_path, cache_dir=tmp_path / "cache")
    assert [question.file_name for question in asked] == ["a.png", "a.png", "c.png"]
    assert asked[1].gold_regions[0][0] == "a_1" and asked[1].extra["regions"] == regions
    assert check_gold(corpus, asked) == [] and corpus.page_ids == ("a_1", "c_1")
    assert "1 of 3 questions are about duplicates" in caplog.text and "gold pages are not" not in caplog.text
    policy = ScriptedPolicy(["<search>page 1</search>", "<answer>1999</answer>"])
    (trajectory,) = rollout(policy, asked[1:2], corpus, FakeRetriever(corpus.page_ids), EnvironmentConfig(), seeds=[0])
    assert trajectory.shown_pages == ("a_1",) and retrieval_reward(trajectory) == 1

    prefixed, asked = load_dataset("unified", tmp_path, prefix="x-", cache_dir=tmp_path / "cache")
    assert check_gold(prefixed, asked) == [] and asked[1].file_name == "x-a.png"
