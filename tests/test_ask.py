"""`vrag ask` refuses what cannot work before it renders a page, and leaves no folder behind where it fails."""

from __future__ import annotations

import pytest
from pdf_files import words_pdf

from vrag_lib.ask import ask, describe_turns
from vrag_lib.cli import main
from vrag_lib.document_files import CorpusError
from vrag_lib.presets import load_config
from vrag_lib.trajectory import StopReason, Trajectory, Turn


@pytest.fixture
def documents(tmp_path, monkeypatch):
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    words_pdf(tmp_path / "documents" / "report.pdf", "Ferries 12")
    return tmp_path / "documents"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--policy", "oracle"], "policy.kind is one of extractive, transformers, openai, not 'oracle'"),
        (["--policy", "openai"], "policy.kind=openai needs policy.base_url="),
        (["--policy", "openai", "--model", "m"], "policy.kind=openai needs policy.base_url="),
        (["--policy", "transformers"], "policy.kind=transformers needs policy.model="),
        (["--retriever", "magic"], "retrieval.kind is one of text, bm25, dense, visual, remote, not 'magic'"),
        (["--retriever", "remote"], "retrieval.kind=remote needs retrieval.url="),
        (["--retriever", "visual", "--retriever-model", "./gone"], "./gone is not a folder"),
        (["--retriever", "visual", "retrieval.device=cuda"], "retrieval.device=cuda, but"),
        (["policy.kind=transformers", "policy.model=owner/m", "policy.device=cuda"], "policy.device=cuda, but"),
        (["environment.given=retrieved"], "environment.given_pages=0 exclude each other"),
        (["policy.top_p=7"], "policy.top_p is more than 0"),
        (["corpus.ocr=maybe"], "corpus.ocr is one of"),
    ],
)
def test_settings_are_refused_before_anything_is_rendered(documents, tmp_path, options, message, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("vrag_lib.factory.image_pixels", lambda model: None)
    assert main(["ask", str(documents), "How many ferries?", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


def test_what_a_model_said_without_an_action_is_shown():
    said = "The answer is 3.2 million, " + "as far as I can see " * 40
    turns = [Turn("user", "?"), Turn("assistant", said, invalid="no_action")]
    shown = describe_turns(Trajectory("t", "q", "?", turns, StopReason.INVALID_STREAK))
    assert "agent > The answer is 3.2 million, as far" in shown and "… [invalid: no_action]" in shown.replace("\n", " ")
    assert len(shown) < 700


def test_a_results_folder_that_cannot_be_made_is_refused_before_anything_is_rendered(documents, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for out in ("file", "dangling"):
        assert main(["ask", str(documents), "How many ferries?", "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert f"no folder can be made in {tmp_path / out}/laptop/ask (" in error and "--out" in error
    assert not (tmp_path / "cache").exists()


def test_a_failure_leaves_no_empty_folder(documents, tmp_path):
    config = load_config("laptop", [f"results={tmp_path / 'out'}", "retrieval.kind=bm25"])
    with pytest.raises(CorpusError, match="does not exist"):
        ask(tmp_path / "nowhere", "How many ferries?", config)
    assert not (tmp_path / "out").exists()
    (documents / "report.pdf").write_bytes(b"%PDF-1.4 nothing more")
    with pytest.raises(CorpusError):
        ask(documents, "How many ferries?", config)
    assert not list((tmp_path / "out" / "laptop" / "ask").iterdir())
