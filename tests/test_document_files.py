"""Which files are documents, and which of several files of one name a question means."""

from __future__ import annotations

from pathlib import Path

import pytest

from vrag_lib.document_files import CorpusError, files_meant, find_documents


def test_files_of_other_kinds_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.pdf", "x.docx", "deck/y.PPTX", "deck/page.odp", "z.heic", ".hidden.docx", "~$x.docx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.odp").mkdir()
    assert find_documents(tmp_path) == [tmp_path / "a.pdf"]
    (record,) = caplog.records
    message = record.getMessage()
    assert "page.odp, x.docx, y.PPTX (4 in all); convert to PDF" in message
    assert str(tmp_path) in message and ".png" in message

    (tmp_path / "a.pdf").unlink()
    with pytest.raises(CorpusError, match=r"holds no document; put PDFs or images .*; not read are .*x\.docx.*\(4 in"):
        find_documents(tmp_path)


def test_what_usually_lies_beside_documents_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (
        "a.pdf",
        "questions.json",
        "test.jsonl",
        "README.md",
        "table.csv",
        "notes.txt",
        "Makefile",
        "trajectory.html",
    ):
        (tmp_path / name).touch()
    assert find_documents(tmp_path) == [tmp_path / "a.pdf"] and not caplog.records


@pytest.mark.parametrize(
    ("name", "paths", "meant"),
    [
        ("r.pdf", ["a/r.pdf", "b/r.pdf"], ["a/r.pdf", "b/r.pdf"]),
        ("b/r.pdf", ["a/r.pdf", "b/r.pdf"], ["b/r.pdf"]),
        ("b\\r.pdf", ["a/r.pdf", "b/r.pdf"], ["b/r.pdf"]),
        ("./b/r", ["a/r.pdf", "b/r.pdf"], ["b/r.pdf"]),
        ("/disk/me/b/r.pdf", ["a/r.pdf", "b/r.pdf"], ["b/r.pdf"]),
        ("b/r.pdf", ["r.pdf", "2020/b/r.pdf"], ["2020/b/r.pdf"]),
        ("b/r.pdf", ["b/r.pdf", "2020/b/r.pdf"], ["b/r.pdf"]),
        ("r.pdf", ["r.pdf", "b/r.pdf"], ["r.pdf"]),
        ("elsewhere/r.pdf", ["r.pdf", "b/r.pdf"], ["r.pdf"]),
        ("elsewhere/r.pdf", ["a/r.pdf", "b/r.pdf"], ["a/r.pdf", "b/r.pdf"]),
        ("elsewhere/r.PDF", ["a/r.pdf"], ["a/r.pdf"]),
        ("r.pdf", ["r.pdf", "r.png"], ["r.pdf"]),
        ("r", ["r.pdf", "r.png"], ["r.pdf", "r.png"]),
        ("r.pdf", ["r.png", "a/r.pdf"], ["a/r.pdf"]),
        ("e\u0301/r.pdf", ["\u00e9/r.pdf", "b/r.pdf"], ["\u00e9/r.pdf"]),
        ("r.pdf", [], []),
    ],
)
def test_which_file_a_question_means(name: str, paths: list[str], meant: list[str]) -> None:
    assert files_meant(name, paths) == meant
