"""Question formats: each reader against the form its benchmark publishes, round trips, and what is named as wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import FakeRetriever
from hypothesis import given, settings
from hypothesis import strategies as st
from pdf_files import words_pdf
from PIL import Image

from vrag_lib.answer_metrics import METRICS
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
from vrag_lib.judge import rule_judge
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


def test_halves_of_surrogate_pairs_are_harmless_in_every_field(tmp_path: Path) -> None:
    item = {
        "query": "q",
        "reference_answer": "\ud800 a",
        "own \udc00": "\udc01",
        "meta_info": {
            "file_name": "b\udc02.pdf",
            "reference_page": ["1"],
            "source_type": "\udc03",
            "key \udc04": ["\udc05"],
        },
    }
    questions = load_questions(_write(tmp_path / "questions.json", [item, {"que\ud800ry": "x"}]))
    assert questions == (
        Question("q1", "q", "? a", "b?.pdf", (1,), "?", "", {"own ?": "?", "key ?": ["?"]}),
    )  # fmt: skip
    write_unified(questions, tmp_path / "again.json")
    assert load_questions(tmp_path / "again.json") == questions
    pd.DataFrame([vars(question) for question in questions]).to_parquet(tmp_path / "questions.parquet")


def test_fields_of_meta_info_may_stand_beside_it(tmp_path: Path) -> None:
    flat = {"query": "a", "reference_answer": "1", "file_name": "d.pdf", "reference_page": [2], "source_type": "text",
            "query_type": "easy", "own": 3}  # fmt: skip
    both = {**flat, "meta_info": {"file_name": "e.pdf", "reference_page": None}}
    first, second = load_questions(_write(tmp_path / "questions.json", [flat, both]))
    assert first == Question("q1", "a", "1", "d.pdf", (2,), "text", "easy", {"own": 3})
    assert second == Question("q2", "a", "1", "e.pdf", (2,), "text", "easy", {"own": 3})


def test_a_misspelt_field_is_named_once_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    item = {"query": "a", "reference_answer": "1"}
    meta = {"filename": "d.pdf", "reference_pages": [2], "doc_type": "paper", "answer_type": "Span"}
    right = {"file_name": "d.pdf", "reference_page": [1], "page": 7}  # an own field, beside the right one
    items = [
        {**item, "meta_info": meta},
        {**item, "meta_info": meta},
        {**item, "page": 3},
        {**item, "meta_info": right},
    ]
    file = _write(tmp_path / "questions.json", items)
    assert len(load_questions(file)) == 4
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"{file}: 1 items have a field 'page', which is not read; is 'reference_page' meant?",
        f"{file}: 2 items have a field 'filename', which is not read; is 'file_name' meant?",
        f"{file}: 2 items have a field 'reference_pages', which is not read; is 'reference_page' meant?",
    ]


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
    (_item(meta={"reference_page": ["iv"]}), "'iv' is no page number"),
    (_item(meta={"reference_page": ["9" * 5000]}), "is no page number"),
    (_item(reference_answer={"a": 1}), "field reference_answer: \"{'a': 1}\" is neither text, a number nor a list"),
    (_item(reference_answer=[["a"], "b"]), "field reference_answer: \"['a']\" is neither"),
    (_item(reference_answer=[]), "field reference_answer: '[]' is neither"),
    (_item(reference_answer=["a", None]), "field reference_answer: missing or empty"),
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
        ("", r"questions\.json is not JSON .*it should hold one list"),
        ("{ not json", "is not JSON"),
        ('{"query": "a"}\n{"query": "b"}', r"questions\.json is not JSON .*one a line belong in a \.jsonl file"),
        ("[" * 100_000, "is not JSON"),
        ("3", "neither a list"),
        ({"examples": {}}, "neither a list"),
        ([], r"questions\.json holds no question: it is empty; an item needs a query and a reference_answer"),
        ({"examples": []}, r"questions\.json holds no question: it is empty"),
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


def test_a_broken_or_empty_jsonl_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"q\.jsonl holds no question: line 1 is not JSON"):
        load_questions(_write(tmp_path / "q.jsonl", "{ broken\n"))
    with pytest.raises(CorpusError, match=r"q\.jsonl holds no question: it is empty"):
        load_questions(_write(tmp_path / "q.jsonl", "\n"))


def test_several_question_files_of_one_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing tells which of two of the unified form is meant; a benchmark's own name comes before the others."""
    for name in ("questions", "rag_dataset", "vidoseek"):
        _write(tmp_path / f"{name}.json", [_item(uid=name)])
    with pytest.raises(
        CorpusError, match=r"files: questions\.json, rag_dataset\.json; leave only the one to read there$"
    ):
        load_questions(tmp_path, "unified")
    assert load_questions(tmp_path, "vidoseek")[0].uid == "vidoseek"
    assert "vidoseek.json, not from" in caplog.text and "rag_dataset.json" in caplog.text

    other = tmp_path / "other"
    for name in ("first", "second"):
        _write(other / f"{name}.json", [_item(uid=name)])
    with pytest.raises(CorpusError, match=r"files: first\.json, second\.json; .* there, or call it questions\.json"):
        load_questions(other, "unified")
    (other / "second.json").rename(other / "questions.json")
    assert load_questions(other, "unified")[0].uid == "second"


@pytest.mark.parametrize("format", ["auto", "unified"])
def test_a_table_of_questions_is_named_where_no_question_file_lies(tmp_path: Path, format: str) -> None:
    (tmp_path / "questions.csv").write_text("query,reference_answer\n")
    (tmp_path / "more.XLSX").touch()
    with pytest.raises(
        CorpusError, match=r"holds no question file .*from JSON or JSON lines, not from more\.XLSX, quest"
    ):
        load_questions(tmp_path, format)


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
    assert (first.uid, first.reference_answer, second.reference_answer) == ("1", "18.5", "a; b")


def test_an_answer_that_is_a_list_is_judged_as_one(tmp_path: Path) -> None:
    """All its entries are asked for, in any order, numbers by value; the List of MMLongBench-Doc stays a literal."""
    answers = [["1,250", "$300"], ['say "hi"', "Smith, John"], ["12 barns"], [3, 4.5]]
    items = [_item(uid=str(i), reference_answer=answer) for i, answer in enumerate(answers)]
    items.append(_item(uid="form", reference_answer=["rye", "oats"], meta={"answer_format": "List"}))
    numbers, texts, one, plain, form = load_questions(_write(tmp_path / "q.json", items))
    assert rule_judge("?", numbers.reference_answer, "300 dollars and 1250")
    assert not rule_judge("?", numbers.reference_answer, "1250")
    assert not rule_judge("?", numbers.reference_answer, "300, 1250, 7")
    assert rule_judge("?", texts.reference_answer, 'Smith, John; say "hi"')
    assert rule_judge("?", one.reference_answer, "12") and rule_judge("?", plain.reference_answer, "4.50, 3")
    assert METRICS["mmlongbench"](form, "oats and rye") == 1 and rule_judge("?", form.reference_answer, "oats, rye")


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


def _reports(root: Path, *names: str) -> None:
    """Pages of one colour each: that of their place in the list of names."""
    for shade, name in enumerate(names):
        (root / "documents" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (8 * shade, 0, 0)).save(root / "documents" / name)


def _ask(root: Path, *file_names: str, **options: Any) -> tuple[Corpus, list[tuple[str, ...]]]:
    """The corpus, and the gold pages of a question about page 1 of each file name."""
    items = [_item(uid=str(i), meta={"file_name": n, "reference_page": [1]}) for i, n in enumerate(file_names)]
    _write(root / "questions.json", items)
    corpus, asked = load_dataset("unified", root, cache_dir=root / "cache", workers=1, **options)
    return corpus, [question.gold_page_ids[0] for question in asked]


def test_a_question_names_one_of_several_files_by_its_folder(tmp_path: Path) -> None:
    _reports(tmp_path, "a/report.png", "b/report.png", "c/2020/report.png", "only.png", "d/only_here.png")
    names = ["a/report.png", "b\\report.png", "2020/report.png", "elsewhere/only.PNG", "documents/a/report.png",
             "b_report", "x/only_here.pdf"]  # fmt: skip
    pages = ["a_report_1", "b_report_1", "c_2020_report_1", "only_1", "a_report_1", "b_report_1", "only_here_1"]
    corpus, gold = _ask(tmp_path, *names)
    assert gold == pages and set(gold) <= set(corpus.page_ids)
    corpus, gold = _ask(tmp_path, *names, prefix="x-")
    assert gold == [f"x-{page}" for page in pages] and set(gold) <= set(corpus.page_ids)


def test_a_question_about_a_file_in_a_folder_is_not_about_its_namesake_above(tmp_path: Path) -> None:
    _reports(tmp_path, "report.png", "a/report.png", "b/report.png")
    assert _ask(tmp_path, "a/report.png", "report.png")[1] == ["a_report_1", "report_1"]
    (tmp_path / "documents/b/report.png").write_bytes(b"broken")
    (tmp_path / "documents/report.png").unlink()
    corpus, gold = _ask(
        tmp_path, "b/report.png"
    )  # what could not be read leaves its name to the other, not its questions
    assert "report_1" in corpus and gold == ["b_report_1"]


def test_a_file_name_that_may_mean_several_documents_is_refused(tmp_path: Path) -> None:
    _reports(tmp_path, "a/report.png", "b/report.png", "c.png", "c.bmp")
    with pytest.raises(
        CorpusError, match=r"'report\.png', which is ambiguous: .*a/report\.png, b/report\.png; .*below the"
    ):
        _ask(tmp_path, "report.png")
    with pytest.raises(CorpusError, match=r"such as 'c\.bmp'"):
        _ask(tmp_path, "c")
    assert _ask(tmp_path, "c.png", "c.bmp")[1] == ["c_png_1", "c_bmp_1"]
    (tmp_path / "documents/b/report.png").write_bytes(b"broken")  # the one that can be read is meant then
    corpus, gold = _ask(tmp_path, "report.png")
    assert gold[0] in corpus


def test_a_duplicate_among_files_of_one_name_is_found_by_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _reports(tmp_path, "m/d.png", "n/d.png", "o/other.png")
    (tmp_path / "documents/o/d.png").write_bytes((tmp_path / "documents/n/d.png").read_bytes())
    (tmp_path / "documents/p").mkdir()
    (tmp_path / "documents/p/other.png").write_bytes((tmp_path / "documents/o/other.png").read_bytes())
    assert _ask(tmp_path, "o/d.png", "n/d.png", "other.png")[1] == ["n_d_1", "n_d_1", "other_1"]
    assert "1 of 3 questions are about duplicates" in caplog.text and "gold pages are not" not in caplog.text
