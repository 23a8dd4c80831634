"""The retrieval benchmark: metrics by hand, dynamic k, intervals, resuming; the reference on real documents."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pdf_files import PdfPage, write_pdf

from vrag_lib import evaluate_retrieval as benchmark
from vrag_lib.corpus import Question
from vrag_lib.corpus_formats import answerable, load_questions, write_unified
from vrag_lib.document_files import CorpusError
from vrag_lib.evaluate_retrieval import (
    METRICS,
    default_folder,
    evaluate_retrieval,
    run_eval_retrieval,
    score_rankings,
    summarise,
)
from vrag_lib.presets import load_config
from vrag_lib.retrieval import Hit
from vrag_lib.text_retrieval import BM25Retriever

SHARED = Path(__file__).parents[2] / "shared" / "data" / "mmlongbench_doc"


def question(uid, *pages, query="why?"):
    return Question(uid, query, "because", "d.pdf", pages)


def ranking(*numbers):
    return [Hit(f"d_{number}", 1.0) for number in numbers]  # equal scores: the order alone counts


def test_metrics_worked_by_hand():
    questions = [question("a", 1, 2), question("b", 7), question("c", 5)]
    table = score_rankings(questions, [ranking(1, 9, 8, 7, 6, 2), ranking(9, 8, 7), []])
    a, b, c = (table.iloc[i] for i in range(3))
    assert [a["R@1"], a["R@5"], a["R@10"]] == [0.5, 0.5, 1.0]
    assert [a["Hit@1"], a["MRR@5"]] == [1.0, 1.0]
    assert a["nDCG@5"] == pytest.approx(1 / (1 + 1 / np.log2(3)))
    assert [b["R@1"], b["R@5"], b["Hit@1"], b["Hit@5"]] == [0.0, 1.0, 0.0, 1.0]
    assert b["MRR@5"] == pytest.approx(1 / 3) and b["nDCG@5"] == pytest.approx(0.5)
    assert not c[list(METRICS)].any()
    assert table["pages"].tolist() == [6, 3, 0]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_metrics_equal_their_definitions(data):
    """ir-measures against the definitions written out; lengths differ by query, as a dynamic k makes them."""
    numbers = st.lists(st.integers(1, 15), unique=True, max_size=15)
    gold = data.draw(st.lists(numbers.filter(len), min_size=1, max_size=4))
    runs = [data.draw(numbers) for _ in gold]
    table = score_rankings([question(str(i), *g) for i, g in enumerate(gold)], [ranking(*run) for run in runs])
    for row, (relevant, run) in zip(table.itertuples(index=False), zip(gold, runs, strict=True), strict=True):
        values = dict(zip(table.columns, row, strict=True))
        hits = [number in relevant for number in run]
        for k in (1, 5, 10):
            assert values[f"R@{k}"] == pytest.approx(sum(hits[:k]) / len(relevant))
            assert values[f"Hit@{k}"] == float(any(hits[:k]))
        assert values["MRR@5"] == pytest.approx(next((1 / (i + 1) for i, hit in enumerate(hits[:5]) if hit), 0.0))
        gains = sum(1 / np.log2(i + 2) for i, hit in enumerate(hits[:5]) if hit)
        ideal = sum(1 / np.log2(i + 2) for i in range(min(5, len(relevant))))
        assert values["nDCG@5"] == pytest.approx(gains / ideal)


@pytest.mark.parametrize(
    ("questions", "rankings", "message"),
    [
        ([question("a", 1)], [], "1 questions but 0"),
        ([question("a", 1), question("a", 2)], [[], []], "same uid"),
        ([question("a")], [[]], "'a' has no gold page"),
        ([question("a", 1)], [ranking(3, 3)], "'a' holds a page twice"),
    ],
)
def test_what_cannot_be_measured_is_named(questions, rankings, message):
    with pytest.raises(ValueError, match=message):
        score_rankings(questions, rankings)


def test_summary_has_intervals_and_the_paired_gain():
    questions = [question(str(i), i) for i in range(1, 41)]
    good = score_rankings(questions, [ranking(i) for i in range(1, 41)])
    half = score_rankings(questions, [ranking(i if i % 2 else 99) for i in range(1, 41)])
    for table in (good, half):
        table["seconds"], table["cpu_seconds"] = 0.5, 0.25
    summary = summarise({"half": half, "good": good})
    first, second = summary.iloc[0], summary.iloc[1]
    assert first["R@5"] == 50 and 30 < first["R@5_low"] < 40 and 60 < first["R@5_high"] < 70
    assert second["R@5"] == second["R@5_high"] == 100 and second["R@5_low"] == pytest.approx(100 * 0.025 ** (1 / 40))
    assert first["R@5_gain"] == 0 and second["R@5_gain"] == 50 and second["R@5_gain_low"] > 30
    assert second["mean_pages"] == 1 and second["seconds_per_query"] == 0.5


def test_retrievers_in_one_table():
    texts = ["apples and pears", "bread and butter", "cheese"]
    retrievers = [BM25Retriever(("d_1", "d_2", "d_3"), texts, name=name) for name in ("one", "two")]
    questions = [question("a", 1, query="an apple"), question("b", 3, query="butter")]
    table = evaluate_retrieval(retrievers, questions)
    assert table["method"].tolist() == ["one", "two"]
    assert table["R@1"].tolist() == [50, 50] and table["mean_pages"].tolist() == [3, 3]
    with pytest.raises(ValueError, match="same name"):
        evaluate_retrieval([retrievers[0], retrievers[0]], questions)


# --- the whole run ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A benchmark of two documents with text layers and three questions."""
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    documents = tmp_path / "set" / "documents"
    documents.mkdir(parents=True)
    lines = {
        "fruit": [
            "A guide to fruit and its many uses",
            "Apples keep for months in a cellar",
            "Pears ripen after harvest",
        ],
        "bread": ["The bread handbook for home bakers", "Sourdough needs a starter and time"],
    }
    for name, pages in lines.items():
        write_pdf(documents / f"{name}.pdf", [PdfPage(((20, 300, 12, line),)) for line in pages])
    questions = [
        Question("q1", "How long do apples keep?", "months", "fruit.pdf", (2,)),
        Question("q2", "What does sourdough need?", "a starter", "bread.pdf", (2,)),
        Question("q3", "What is on the moon?", "Not answerable", "bread.pdf", ()),
    ]
    write_unified(questions, tmp_path / "set" / "questions.json")
    return tmp_path / "set"


LEXICAL = {
    "BM25, text layer": benchmark.METHODS["BM25, text layer"],
    "BM25 + document lead": benchmark.METHODS["BM25 + document lead"],
}


def test_run_writes_everything_and_resumes(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    table = run_eval_retrieval(folder, out, workers=1, methods=LEXICAL, ocr_sample=0)
    assert table["R@1"].tolist() == [100, 100] and (table["index_seconds_per_page"] > 0).all()
    record = json.loads((out / "config.json").read_text())
    assert record["settings"]["questions"] == 2 and record["settings"]["pages"] == 5
    assert record["settings"]["pages_without_text"] == {"layer": 0, "ocr": 0, "all": 0}
    assert record["provenance"]["versions"]["bm25s"]
    assert (out / "recall.png").read_bytes()[:4] == b"\x89PNG"
    assert pd.read_csv(out / "metrics.csv")["method"].tolist() == list(LEXICAL)
    rows = pd.read_parquet(out / "questions" / "bm25_text_layer.parquet")
    assert rows["uid"].tolist() == ["q1", "q2"] and rows["ranking"][0][0] == "fruit_2"

    monkeypatch.setattr(benchmark, "evaluate_retriever", None)  # any use of it fails
    again = run_eval_retrieval(folder, out, workers=1, methods=LEXICAL, ocr_sample=0)
    pd.testing.assert_frame_equal(again, table)


def test_other_questions_are_measured_anew(folder, tmp_path):
    out = tmp_path / "out"
    run_eval_retrieval(folder, out, workers=1, methods=LEXICAL, ocr_sample=0)
    write_unified([Question("q1", "When do pears ripen?", "later", "fruit.pdf", (1,))], folder / "questions.json")
    table = run_eval_retrieval(folder, out, workers=1, methods=LEXICAL, ocr_sample=0)
    assert table["R@1"].tolist() == [0, 0]
    file = out / "questions" / "bm25_text_layer.parquet"
    file.write_bytes(b"damaged")
    run_eval_retrieval(folder, out, workers=1, methods=LEXICAL, ocr_sample=0)
    assert len(pd.read_parquet(file)) == 1


def test_every_dataset_has_a_folder_and_another_ones_results_are_not_replaced(folder, tmp_path):
    config = load_config("laptop", [f"results={tmp_path}"])
    names = {default_folder(config, dataset).name for dataset in ("vidoseek", "slidevqa", folder, f"{folder}/../set/")}
    assert names == {"retrieval_vidoseek", "retrieval_slidevqa", "retrieval_set"}
    out = default_folder(config, folder)
    run_eval_retrieval(folder, out, workers=1, methods=LEXICAL, ocr_sample=0)
    before = (out / "metrics.csv").read_bytes()
    write_pdf(folder / "documents" / "more.pdf", [PdfPage(((20, 300, 12, "Cheese"),))])
    with pytest.raises(CorpusError, match=r"retrieval_set holds results on other documents; .*--out"):
        run_eval_retrieval(folder, out, workers=1, methods=LEXICAL, ocr_sample=0)
    assert (out / "metrics.csv").read_bytes() == before


def test_several_question_files_are_refused_unless_they_ask_the_same(folder):
    (folder / "vidoseek.json").write_bytes((folder / "questions.json").read_bytes())
    assert len(benchmark._open_benchmark(folder, 1)[1]) == 2
    write_unified(
        [Question("q1", "When do pears ripen?", "later", "fruit.pdf", (1,))], folder / "slidevqa_refined.json"
    )
    with pytest.raises(CorpusError, match=r"several question files: questions\.json, vidoseek\.json, slidevqa_refined"):
        benchmark._open_benchmark(folder, 1)


def test_vidoseek_is_read_with_its_own_documents(folder):
    """As it is published: the folder of another benchmark's documents may lie beside."""
    (folder / "questions.json").rename(folder / "vidoseek.json")
    (folder / "documents").rename(folder / "vidoseek_pdf_document")
    write_pdf(folder / "slidevqa_pdf_document" / "other.pdf", [PdfPage(((20, 300, 12, "Cheese"),))])
    corpus, questions = benchmark._open_benchmark(folder, 1)
    assert {document.id for document in corpus.documents} == {"fruit", "bread"} and len(questions) == 2


def test_every_method_runs(folder, tmp_path):
    table = run_eval_retrieval(folder, tmp_path / "out", workers=1, ocr_sample=1)
    assert table["method"].tolist() == list(benchmark.METHODS)
    assert (table["R@5"] == 100).all()
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(record["settings"]["ocr_wall_and_cpu_seconds_per_page"]) == ["with_layer"]


@pytest.mark.parametrize("content", [None, "[]", '{"examples": []}'])
def test_a_folder_without_a_benchmark_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "questions.json").write_text(content)
    with pytest.raises(CorpusError, match=str(tmp_path)):
        run_eval_retrieval(tmp_path, tmp_path / "out")


@pytest.mark.skipif(not SHARED.exists(), reason="the shared benchmark documents are not here")
def test_bm25_on_the_text_layer_gives_the_reference(tmp_path):
    """Published for these 839 pages and 218 questions: R@1 21.5, R@5 38.2, R@10 43.5, MRR@5 36.2."""
    import pypdfium2

    ids, texts = [], []
    for file in sorted((SHARED / "documents").glob("*.pdf")):
        document = pypdfium2.PdfDocument(file)
        for number in range(len(document)):
            ids.append(f"{file.stem}_{number + 1}")
            texts.append(document[number].get_textpage().get_text_range())
    questions = answerable(load_questions(SHARED / "samples.json"))
    row = evaluate_retrieval([BM25Retriever(ids, texts, stem=False)], questions).iloc[0]
    assert len(ids) == 839 and len(questions) == 218
    assert [row[m] for m in ("R@1", "R@5", "R@10", "MRR@5")] == pytest.approx(
        [21.5, 38.2, 43.5, 36.2], abs=0.5
    )  # a question weighs 0.46


def test_corpus_of_the_run_is_named_when_unreadable(folder, tmp_path):
    for file in (folder / "documents").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(CorpusError, match="could be read"):
        run_eval_retrieval(folder, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
