"""The shipped quickstart collection is what the code makes, and is readable the way the notebook reads it."""

from __future__ import annotations

from pathlib import Path

import pypdfium2
import pytest

from vrag_lib.corpus_formats import load_questions
from vrag_lib.minidocs_quickstart import QUICKSTART, write_quickstart

SHIPPED = Path(__file__).parent.parent / "data" / "quickstart"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    write_quickstart(folder)
    return folder


def page_texts(folder: Path) -> dict[str, list[str]]:
    texts = {}
    for path in sorted((folder / "documents").glob("*.pdf")):
        with pypdfium2.PdfDocument(path) as pdf:
            texts[path.name] = [page.get_textpage().get_text_bounded() for page in pdf]
    return texts


def test_regenerated_is_shipped(made):
    assert page_texts(made) == page_texts(SHIPPED)
    assert (made / "questions.json").read_text() == (SHIPPED / "questions.json").read_text()


def test_size_and_mixture():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 1_500_000
    texts = page_texts(SHIPPED)
    assert len(texts) == QUICKSTART.train_documents
    assert all(6 <= len(pages) <= 10 for pages in texts.values())
    without_text = [(name, n) for name, pages in texts.items() for n, text in enumerate(pages, 1) if not text.strip()]
    assert len(without_text) == 1
    questions = load_questions(SHIPPED)
    assert len(questions) == 20
    assert {q.source_type for q in questions if q.reference_pages} == {"Text", "Table", "Chart", "2d_layout"}
    assert {q.query_type for q in questions} == {"Single-Hop", "Multi-Hop"}
    ((name, number),) = without_text
    assert any(q.file_name == name and number in q.reference_pages for q in questions)


def test_answers_stand_on_gold_pages():
    texts = page_texts(SHIPPED)
    for question in load_questions(SHIPPED):
        if question.extra["template"] in ("sum", "difference") or not question.reference_pages:
            continue
        gold = [texts[question.file_name][number - 1] for number in question.reference_pages]
        assert any(question.reference_answer in text or not text.strip() for text in gold), question.uid
