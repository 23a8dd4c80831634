"""Benchmarks fetched by name, against a local server in the place of the hub: layouts, resumption, refusals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import Hub, running_hub
from pdf_files import words_pdf

from vrag_lib import dataset_hub
from vrag_lib.cli import main
from vrag_lib.corpus_formats import load_dataset, load_questions
from vrag_lib.dataset_hub import HUB_DATASETS, fetch_dataset, find_dataset
from vrag_lib.document_files import CorpusError
from vrag_lib.evaluate_datasets import open_datasets
from vrag_lib.presets import load_config

SECRET = "hf_never_to_be_written"


def question(uid: str, file_name: str) -> dict:
    meta = {"file_name": file_name, "reference_page": [1], "source_type": "Text", "query_type": "Single-Hop"}
    return {"uid": uid, "query": "Which tree?", "reference_answer": "beech", "meta_info": meta}


def archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return packed.getvalue()


@pytest.fixture(scope="module")
def pdfs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("pdfs")
    words = {"deck.v2": "beech", "slides": "oak", "a.b": "fir", "mi_phone": "elm", "unnamed": "ash"}
    return {f"{name}.pdf": words_pdf(folder / f"{name}.pdf", word).read_bytes() for name, word in words.items()}


@pytest.fixture
def hub(pdfs, tmp_path, monkeypatch) -> Iterator[Hub]:
    """The files of all three repositories, and GitHub's, as they lie there."""
    documents = ["a.b.pdf", "mi_phone.pdf"]
    samples = [
        {"doc_id": name, "question": "Which tree?", "answer": "fir", "evidence_pages": "[1]", "answer_format": "Str"}
        for name in documents
    ]
    files = {
        "README.md": b"card",
        "vidoseek.json": json.dumps({"examples": [question("v1", "deck.v2.pdf")]}).encode(),
        "vidoseek_pdf_document.zip": archive(
            {
                "pdf/": b"",
                "pdf/deck.v2.pdf": pdfs["deck.v2.pdf"],
                "__MACOSX/pdf/._deck.v2.pdf": b"resource fork",
                "pdf/notes.txt": b"no document",
                "../../../unnamed.pdf": pdfs["unnamed.pdf"],
            }
        ),
        "slidevqa_refined.json": json.dumps({"examples": [question("s1", "slides.pdf")]}).encode(),
        "slidevqa_pdf_document.zip": archive({"slides.pdf": pdfs["slides.pdf"]}),
        "documents/a.b.pdf": pdfs["a.b.pdf"],
        "documents/unnamed.pdf": pdfs["unnamed.pdf"],
        "documents/mi_phone.pdf": b"another file, as the hub has it",
        "data/train-00000-of-00001.parquet": b"a later edition",
        "raw/samples.json": json.dumps(samples).encode(),
        "raw/mi_phone.pdf": pdfs["mi_phone.pdf"],
    }
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    with running_hub(files) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
        urls = {name: f"{server.url}/raw/{Path(name).name}" for name in HUB_DATASETS["mmlongbench_doc"].urls}
        source = replace(HUB_DATASETS["mmlongbench_doc"], urls=urls)
        monkeypatch.setitem(HUB_DATASETS, "mmlongbench_doc", source)
        yield server


def test_each_benchmark_becomes_a_folder_in_the_unified_format(hub, pdfs, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    found = {name: fetch_dataset(name) for name in HUB_DATASETS}
    contents = {name: {file.name for file in (folder / "documents").iterdir()} for name, folder in found.items()}
    assert contents == {
        "slidevqa": {"slides.pdf"},
        "vidoseek": {"deck.v2.pdf", "unnamed.pdf"},  # where the archive says `../../..`, too
        "mmlongbench_doc": {"a.b.pdf", "mi_phone.pdf"},  # those that questions name
    }
    assert (found["mmlongbench_doc"] / "documents" / "mi_phone.pdf").read_bytes() == pdfs["mi_phone.pdf"]
    assert {"README.md", "data/train-00000-of-00001.parquet", "documents/unnamed.pdf"}.isdisjoint(hub.given)
    corpus, questions = load_dataset("unified", found["mmlongbench_doc"], workers=1)
    assert [q.uid for q in questions] == ["a.b.pdf#1", "mi_phone.pdf#1"] and questions[0].extra[
        "answer_format"
    ] == "Str"
    assert all(page in corpus for q in questions for page in q.gold_page_ids)
    assert f"Bearer {SECRET}" in hub.tokens
    files = [file for file in found["slidevqa"].parent.parent.parent.rglob("*") if file.is_file()]
    assert len(files) > 10 and not any(SECRET.encode() in file.read_bytes() for file in files)


def test_what_is_finished_is_used_without_the_hub(hub):
    folder = fetch_dataset("vidoseek")
    before = list(hub.given)
    hub.status = 500
    assert fetch_dataset("vidoseek") == find_dataset("vidoseek") == folder and hub.given == before
    assert find_dataset(folder) == folder and find_dataset("nowhere") == Path("nowhere")


def test_what_was_interrupted_is_gone_on_with(hub, monkeypatch):
    """Killed while it unpacks: the download is not repeated, nor what is unpacked, and half a file is replaced."""
    written: list[str] = []

    def write(path: Path, content: bytes) -> None:
        if len(written) == 1:
            path.write_bytes(content[:10])  # as a crash of the machine would leave it
            raise KeyboardInterrupt
        written.append(path.name)
        path.write_bytes(content)

    with monkeypatch.context() as patched:
        patched.setattr(dataset_hub, "write_atomically", write)
        with pytest.raises(KeyboardInterrupt):
            fetch_dataset("vidoseek")
    before, again = list(hub.given), []
    monkeypatch.setattr(dataset_hub, "write_atomically", lambda path, content: again.append(path.name))
    folder = fetch_dataset("vidoseek")
    assert hub.given == before and again == ["unnamed.pdf"] and written == ["deck.v2.pdf"]
    assert [q.uid for q in load_questions(folder, "unified")] == ["v1"]


def test_the_remedy_is_said_when_the_hub_gives_nothing(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the hub's client
    hub.status = 503
    with pytest.raises(
        CorpusError, match=r"'vidoseek' could not be fetched .*503 .* goes on where .* --path: `hf down"
    ):
        fetch_dataset("vidoseek")
    hub.status, hub.error = 403, "GatedRepo"
    with pytest.raises(
        CorpusError, match=r"terms: do so at https://huggingface.co/datasets/Qiu.*, then `hf auth login`"
    ):
        fetch_dataset("slidevqa")
    hub.status, hub.error = 404, "RepoNotFound"
    with pytest.raises(CorpusError, match=r"'mmlongbench_doc' could not .*404.*samples.json.* --path: `git clone"):
        fetch_dataset("mmlongbench_doc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match=r"HF_HUB_OFFLINE.* --path: `hf download"):
        fetch_dataset("vidoseek")
    with pytest.raises(
        CorpusError, match="no data set 'docvqa' to fetch; there are slidevqa, vidoseek, mmlongbench_doc"
    ):
        fetch_dataset("docvqa")
    hub.status = 200
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert fetch_dataset("vidoseek").is_dir()


def test_files_that_are_not_as_expected_are_named(hub, tmp_path):
    kept = dict(hub.files)
    del hub.files["vidoseek.json"]
    with pytest.raises(CorpusError, match=r"Qiuchen-Wang/ViDoSeek at e91a92ba gave no vidoseek\.json"):
        fetch_dataset("vidoseek", tmp_path / "a")
    hub.files |= {"slidevqa_pdf_document.zip": archive({"readme.txt": b""})}
    with pytest.raises(CorpusError, match=r"slidevqa_pdf_document\.zip of Qiuchen-Wang/ViDoSeek holds no PDF"):
        fetch_dataset("slidevqa", tmp_path / "b")
    hub.files = {name: content for name, content in kept.items() if not name.startswith("documents/")}
    with pytest.raises(CorpusError, match="yubo2333/MMLongBench-Doc at 2ff6aa92 gave no documents"):
        fetch_dataset("mmlongbench_doc", tmp_path / "c")
    assert not list(tmp_path.glob("?/questions.json"))


def test_a_damaged_archive_is_fetched_anew_once_it_is_deleted(hub, tmp_path):
    whole = hub.files["vidoseek_pdf_document.zip"]
    spoilt = bytearray(whole)
    spoilt[60:90] = bytes(30)
    for content in (whole[:-30], bytes(spoilt)):
        hub.files["vidoseek_pdf_document.zip"] = content
        with pytest.raises(
            CorpusError, match=r"vidoseek_pdf_document\.zip is damaged .* delete (\S+), so that"
        ) as caught:
            fetch_dataset("vidoseek")
        hub.files["vidoseek_pdf_document.zip"] = whole
        Path(str(caught.value).split("delete ")[1].split(", so that")[0]).unlink()
        for tree in (tmp_path / "hf").rglob("trees/*.json"):
            tree.unlink()  # the test changes a commit, which the hub cannot
    assert fetch_dataset("vidoseek").is_dir()


def test_a_connection_that_breaks_off_costs_no_finished_file(hub, pdfs, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the hub's client
    hub.broken = {"documents/a.b.pdf"}
    with pytest.raises(CorpusError, match="'mmlongbench_doc' could not be fetched"):
        fetch_dataset("mmlongbench_doc")
    hub.broken, before = set(), len(hub.given)
    folder = fetch_dataset("mmlongbench_doc")
    assert set(hub.given[before:]) == {"documents/a.b.pdf"}
    assert (folder / "documents" / "a.b.pdf").read_bytes() == pdfs["a.b.pdf"]


@pytest.mark.parametrize("name", ["samples.json", "mi_phone.pdf"])
@pytest.mark.parametrize("portal", [b"<html>Log in</html>", b'{"error": "log in"}'])
def test_what_a_network_answers_in_the_place_of_a_file_is_not_kept(hub, pdfs, tmp_path, name, portal):
    whole = hub.files[f"raw/{name}"]
    hub.files[f"raw/{name}"] = portal
    with pytest.raises(CorpusError, match=rf"what {hub.url}/raw/{name} gave for {name} .* was not kept, it begins b'"):
        fetch_dataset("mmlongbench_doc")
    kept = next((tmp_path / "cache" / "datasets").iterdir())
    assert not list(kept.rglob(name))
    (kept / name if name == "samples.json" else kept / "documents" / name).write_bytes(portal)  # by an earlier version
    hub.files[f"raw/{name}"] = whole
    folder = fetch_dataset("mmlongbench_doc")
    assert (folder / "documents" / "mi_phone.pdf").read_bytes() == pdfs["mi_phone.pdf"]
    assert len(load_questions(folder, "unified")) == 2


@pytest.mark.parametrize("name", ["a.b.pdf", "mi_phone.pdf"])
def test_a_document_that_got_lost_is_fetched_again_as_the_message_says(hub, name):
    config = load_config("laptop", ["corpus.ocr=none", "corpus.workers=1"])
    folder = fetch_dataset("mmlongbench_doc")
    (folder / "documents" / name).unlink()
    with pytest.raises(CorpusError, match=r"are missing, .* Delete \S+, so that the next call fetches") as caught:
        open_datasets({"mmlongbench_doc": None}, config)
    marker = Path(str(caught.value).split("Delete ")[1].split(", so that")[0])
    assert marker.parent == folder and f"what {folder} lacks" in str(caught.value)
    marker.unlink()
    corpus, questions = open_datasets({"mmlongbench_doc": None}, config)
    assert len(corpus.documents) == len(questions) == 2


def test_benchmarks_by_name_are_merged_into_one_corpus(hub):
    config = load_config("laptop", ["corpus.ocr=none", "corpus.workers=1"])
    corpus, questions = open_datasets(dict.fromkeys(HUB_DATASETS), config)
    assert [document.id for document in corpus.documents] == ["a.b", "deck.v2", "mi_phone", "slides", "unnamed"]
    assert [q.uid for q in questions][:2] == ["slidevqa:s1", "vidoseek:v1"]
    assert [q.extra["dataset"] for q in questions] == ["slidevqa", "vidoseek", *["mmlongbench_doc"] * 2]


def test_the_retrieval_table_takes_a_benchmark_by_name(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vrag_lib.evaluate_retrieval.METHODS", {"BM25": lambda parts: parts.bm25("layer")})
    monkeypatch.setattr("vrag_lib.evaluate_retrieval.ocr_pages", lambda corpus, **settings: corpus)
    monkeypatch.setattr("vrag_lib.evaluate_retrieval._ocr_seconds", lambda *arguments: {})
    for name in HUB_DATASETS:
        assert main(["eval-retrieval", name, "--out", str(tmp_path / name), "corpus.workers=1"]) == 0
        assert "BM25" in capsys.readouterr().out and (tmp_path / name / "metrics.csv").is_file()


def test_the_command_fetches_answers_and_scores(hub, tmp_path):
    """In a process of its own, so that the hub's address comes from the environment as a user's would."""
    command = [
        sys.executable,
        "-m",
        "vrag_lib.cli",
        "evaluate",
        "--dataset",
        "vidoseek",
        "--out",
        str(tmp_path / "out"),
    ]
    settings = ["corpus.ocr=none", "corpus.workers=1", "retrieval.kind=bm25"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([*command, *settings], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all" in done.stdout and (tmp_path / "out" / "summary.csv").is_file()
    hub.status = 503
    again = subprocess.run([*command, *settings], env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == done.stdout
