"""Benchmarks by name, from start to end with the offline policy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from chat_server import SECRET, running_server, say
from pdf_files import words_pdf

from vrag_lib.cli import main
from vrag_lib.config import ConfigError, override, read_config
from vrag_lib.corpus_formats import write_unified
from vrag_lib.document_files import CorpusError
from vrag_lib.evaluate_datasets import evaluate_datasets, open_datasets
from vrag_lib.minidocs import MiniDocs
from vrag_lib.policy import ScriptedPolicy
from vrag_lib.presets import load_config
from vrag_lib.synthesis import SynthesisError

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "mmlongbench_doc"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    overrides = ["minidocs.test_documents=1", "retrieval.kind=bm25", "corpus.ocr=none", "corpus.workers=1", "seed=2"]
    return load_config("laptop", [*overrides, f"results={tmp_path / 'results'}"])


def test_minidocs_from_start_to_end(config):
    frame = evaluate_datasets({"minidocs": None}, config, limit=6)
    folder = config.folder("evaluate_minidocs")
    assert len(frame) == 6 and frame["uid"].is_unique and set(frame["dataset"]) == {"minidocs"}
    assert frame["answerable"].all() and set(frame["policy"]) == {"extractive"}
    assert read_config(folder) == config
    assert list(pd.read_csv(folder / "questions.csv")["uid"]) == list(frame["uid"])
    settings = json.loads((folder / "provenance.json").read_text())["settings"]
    assert (settings["datasets"], settings["split"], settings["seeds"]) == (["minidocs"], "test", [2])
    asked = [question.uid for question in open_datasets({"minidocs": None}, config)[1]]
    assert (frame["uid"].iloc[0], frame["uid"].iloc[-1]) == (asked[0], asked[-1])  # spread over the whole set


def test_datasets_that_call_different_documents_alike_are_told_apart(config, tmp_path, caplog):
    for name, word in (("a", "heron"), ("b", "finch")):
        words_pdf(tmp_path / name / "documents" / "report.pdf", f"The bird is the {word}")
        (tmp_path / name / "questions.json").write_text(
            json.dumps({"examples": [{"uid": "q", "query": "bird?", "reference_answer": word,
                                      "meta_info": {"file_name": "report.pdf", "reference_page": [1]}}]})
        )  # fmt: skip
    (tmp_path / "b" / "questions.json").rename(tmp_path / "b" / "vidoseek.json")
    corpus, questions = open_datasets({"unified": tmp_path / "a", "vidoseek": tmp_path / "b"}, config)
    assert corpus.page_ids == ("report_1", "vidoseek-report_1")
    assert [(q.uid, q.gold_page_ids) for q in questions] == [
        ("unified:q", ("report_1",)), ("vidoseek:q", ("vidoseek-report_1",))
    ]  # fmt: skip
    assert "1 documents of vidoseek are called as others" in caplog.text
    twice = ["evaluate", "--dataset", "unified", "--path", str(tmp_path / "a"), "--dataset", "unified", "--path", "x"]
    assert main(twice) == 2


def test_own_questions_need_no_uid_and_no_page(config, tmp_path, caplog):
    """What the README shows: a folder with documents and a list of questions and answers."""
    words_pdf(tmp_path / "own" / "documents" / "report.pdf", "Cover", "Revenue in 2021 was 3.2 million")
    known = {"meta_info": {"file_name": "report.pdf", "reference_page": [2]}}
    items = [
        {"query": "What was the revenue in 2021?", "reference_answer": "3.2 million", **known},
        {"query": "Who chairs the board?", "reference_answer": "Ann Lee"},
        {"query": "Who founded it?", "reference_answer": "Not answerable"},
    ]
    (tmp_path / "own" / "questions.json").write_text(json.dumps(items))
    policy = ScriptedPolicy(["<search>revenue</search>", "<answer>3.2 million</answer>"])
    frame = evaluate_datasets({"unified": tmp_path / "own"}, config, tmp_path / "out", policy=policy)
    assert list(frame["uid"]) == ["q1", "q2"] and list(frame["judge"]) == [1, 0]
    assert "left out: 1 of 3 questions are marked as not answerable (--unanswerable asks them)" in caplog.text
    every = evaluate_datasets(
        {"unified": tmp_path / "own"}, config, tmp_path / "all", policy=policy, answerable_only=False
    )
    assert list(every["uid"]) == ["q1", "q2", "q3"] and list(every["judge"]) == [1, 0, 0]
    assert frame["ndcg"].iloc[0] == 1 and frame["ndcg"].isna().iloc[1]
    (tmp_path / "own" / "questions.json").write_text(json.dumps(items[1:2]))
    frame = evaluate_datasets({"unified": tmp_path / "own"}, config, tmp_path / "plain", policy=policy)
    assert list(frame["uid"]) == ["q1"] and frame["ndcg"].isna().all()


def test_known_regions_are_not_laid_on_pages_of_another_size(config, tmp_path):
    """In PDFs their boxes are pixels at one resolution; page images have their own."""
    docs = MiniDocs(config.minidocs)
    for form, fits in (("pdf", False), ("images", True)):
        folder = docs.write(tmp_path / form, form=form, splits=["test"]) / "test"
        corpus, questions = open_datasets({"unified": folder}, config)
        sizes = {page.id: page.size for page in corpus.pages}
        assert all(
            box.x2 <= sizes[i].width and box.y2 <= sizes[i].height for q in questions for i, box in q.gold_regions
        )
        coarse = override(config, ["corpus.dpi=100"])
        if fits:
            assert {p.id: p.size for p in open_datasets({"unified": folder}, coarse)[0].pages} == sizes
        else:
            with pytest.raises(ConfigError, match=r"pixels at 150 dpi, so they lie elsewhere at corpus\.dpi=100"):
                open_datasets({"unified": folder}, coarse)


def test_datasets_are_merged_into_one_corpus_with_their_own_metrics(config, tmp_path):
    """The same documents under another name, as the paper's page images."""
    docs = MiniDocs(config.minidocs)
    folder = docs.write(tmp_path / "decks", form="images", splits=["test"]) / "test"
    for image in (folder / "img").iterdir():
        image.rename(image.with_name(f"copy-{image.name}"))
    questions = docs.questions("test")
    copies = [type(q)(q.uid, q.query, q.reference_answer, f"copy-{q.file_name}", q.reference_pages) for q in questions]
    (folder / "questions.json").unlink()
    write_unified(copies, folder / "slidevqa_refined.json")
    datasets = {"minidocs": None, "slidevqa": folder}
    corpus, merged = open_datasets(datasets, config)
    assert len(corpus.documents) == 2
    assert {uid.partition(":")[0] for uid in (q.uid for q in merged)} == {"minidocs", "slidevqa"}
    assert all(page in corpus for question in merged for page in question.gold_page_ids)
    policy = ScriptedPolicy(["<search>total</search>", "<answer>12</answer>"])
    frame = evaluate_datasets(datasets, config, tmp_path / "out", policy=policy, limit=4)
    assert {"slidevqa_em", "slidevqa_f1", "exact"} <= set(frame.columns)
    assert list(pd.read_csv(tmp_path / "out" / "summary.csv")["by"][:3]) == ["all", "dataset", "dataset"]


def test_agents_are_evaluated_side_by_side(config):
    frames = {
        agent: evaluate_datasets({"minidocs": None}, config, agent=agent, limit=4)
        for agent in ("no_retrieval", "vanilla_rag_3_text", "gold_regions")
    }
    assert len({tuple(frame["uid"]) for frame in frames.values()}) == 1
    assert list(frames["vanilla_rag_3_text"]["pages"]) == [3] * 4 and not frames["no_retrieval"]["pages"].any()
    assert frames["gold_regions"]["crop_iou"].min() > 0.9
    assert all(frame["answered"].all() and not frame["invalid"].any() for frame in frames.values())
    folder = config.folder("evaluate_minidocs_vanilla_rag_3_text")
    assert read_config(folder).environment.given_pages == 3
    settings = json.loads((folder / "provenance.json").read_text())["settings"]
    assert (settings["agent"], settings["environment"]["observation"]) == ("vanilla_rag_3_text", "text")


def test_the_address_of_a_model_is_nothing_that_trajectories_depend_on(config, tmp_path):
    def evaluate(*overrides):
        policy = ScriptedPolicy(["<search>total</search>", "<answer>12</answer>"])
        settings = override(config, ["policy.base_url=http://a/v1", *overrides])
        return evaluate_datasets({"minidocs": None}, settings, tmp_path / "out", policy=policy, limit=2)

    first = evaluate()
    claimed = tmp_path / "out" / "samples" / "seed-2" / "settings.json"
    settings = json.loads(claimed.read_text())
    assert list(evaluate("policy.base_url=http://b/v1")["id"]) == list(first["id"])
    settings["more"]["policy_settings"]["base_url"] = "http://c/v1"  # as earlier versions wrote it
    claimed.write_text(json.dumps(settings))
    assert list(evaluate()["id"]) == list(first["id"])
    with pytest.raises(SynthesisError, match=r"policy_settings\.temperature=1\.0 not 0\.5"):
        evaluate("policy.temperature=0.5")


def test_weights_trained_anew_in_the_same_folder_are_another_model(config, tmp_path):
    (tmp_path / "model").mkdir()

    def evaluate():
        policy = ScriptedPolicy(["<search>total</search>", "<answer>12</answer>"])
        settings = override(config, ["policy.kind=transformers", f"policy.model={tmp_path / 'model'}"])
        return evaluate_datasets({"minidocs": None}, settings, tmp_path / "out", policy=policy, limit=2)

    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"1")
    first = evaluate()
    assert list(evaluate()["id"]) == list(first["id"])
    weights.write_bytes(b"22")
    with pytest.raises(SynthesisError, match=r"policy_settings\.model="):
        evaluate()


def test_text_that_was_read_another_way_is_another_corpus(config, tmp_path, monkeypatch):
    def evaluate(ocr):
        policy = ScriptedPolicy(["<search>total</search>", "<answer>12</answer>"])
        settings = override(config, [f"corpus.ocr={ocr}"])
        return evaluate_datasets({"minidocs": None}, settings, tmp_path / "out", policy=policy, limit=2)

    def read(corpus, workers, pages):
        return corpus.with_pages(replace(page, lines=page.lines[:1], text_source="ocr") for page in corpus.pages)

    evaluate("none")
    monkeypatch.setattr("vrag_lib.ocr.ocr_pages", read)
    with pytest.raises(SynthesisError, match="page_texts="):
        evaluate("all")


def test_wrong_names_and_missing_folders_are_named(config):
    with pytest.raises(ValueError, match="no dataset 'docvqa'; datasets are slidevqa, mmlongbench_doc, vidoseek"):
        open_datasets({"docvqa": "x"}, config)
    with pytest.raises(ValueError, match="dataset 'unified' needs the folder"):
        open_datasets({"unified": None}, config)
    with pytest.raises(ValueError, match="no question to ask in no dataset"):
        open_datasets({}, config)
    with pytest.raises(ValueError, match="no agent 'rag'; agents are no_retrieval, "):
        evaluate_datasets({"minidocs": None}, config, agent="rag")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        evaluate_datasets({"minidocs": None}, config, limit=0)


@pytest.fixture
def trees(tmp_path):
    """A small benchmark in the format of MMLongBench-Doc: three documents, a question on each."""
    folder = tmp_path / "trees"
    items = []
    for name, word in (("north.v2", "birch"), ("south", "olive"), ("west", "redwood")):
        words_pdf(folder / "documents" / f"{name}.pdf", "contents", f"The tree of the {name} is the {word}")
        items.append(
            {
                "doc_id": f"{name}.pdf", "doc_type": "report", "question": f"What is the tree of the {name}?",
                "answer": word, "evidence_pages": "[2]", "evidence_sources": "['Chart']", "answer_format": "Str",
            }
        )  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(items))
    return folder


def test_a_wrong_or_partial_folder_is_named_with_what_to_do(config, trees, tmp_path, caplog):
    with pytest.raises(CorpusError, match="nowhere does not exist"):
        open_datasets({"mmlongbench_doc": tmp_path / "nowhere"}, config)
    with pytest.raises(ValueError, match=r"samples\.json is a file; dataset 'mmlongbench_doc' needs the folder"):
        open_datasets({"mmlongbench_doc": trees / "samples.json"}, config)
    with pytest.raises(CorpusError, match=r"documents holds no question file \(samples\.json or data/samples\.json\)"):
        open_datasets({"mmlongbench_doc": trees / "documents"}, config)
    (trees / "documents" / "south.pdf").unlink()
    (trees / "documents" / "west.pdf").write_bytes(b"%PDF-1.4 broken")
    with pytest.raises(
        CorpusError, match=r"1 documents .* the first: south\.pdf; 1 of 3 questions .* with --partial"
    ) as caught:
        open_datasets({"mmlongbench_doc": trees}, config)
    assert f"Add the documents to their folder in {trees}, or" in str(caught.value)
    _, questions = open_datasets({"mmlongbench_doc": trees}, config, partial=True)
    assert [q.file_name for q in questions] == ["north.v2.pdf", "west.pdf"]  # unreadable is not missing
    assert "left out: 1 documents" in caplog.text
    for file in (trees / "documents").iterdir():
        file.unlink()
    with pytest.raises(CorpusError, match="documents holds no document; put PDFs"):
        open_datasets({"mmlongbench_doc": trees}, config)


def test_a_broken_document_called_as_another_keeps_its_questions(config, tmp_path):
    for year in ("2019", "2020"):
        words_pdf(tmp_path / "documents" / year / "report.pdf", f"The bird of {year} is the heron")
    (tmp_path / "documents" / "2019" / "report.pdf").write_bytes(b"%PDF-1.4 broken")
    items = [
        {"query": "bird?", "reference_answer": "heron", "file_name": f"{year}/report.pdf", "reference_page": [1]}
        for year in ("2019", "2020")
    ]
    (tmp_path / "questions.json").write_text(json.dumps(items))
    corpus, questions = open_datasets({"unified": tmp_path}, config)
    assert corpus.page_ids == ("report_1",)
    assert [q.gold_page_ids for q in questions] == [("2019_report_1",), ("report_1",)]


def test_the_command_asks_an_endpoint_and_lets_another_judge(trees, tmp_path, monkeypatch, capsys):
    """Start to end against a real local server that speaks OpenAI's chat completions: policy and judge."""
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    out = tmp_path / "out"
    with running_server() as server:

        def reply(handler, body):
            text = json.dumps(body["messages"])
            if body["model"] == "judge":
                assert "birch" in text or "olive" in text or "redwood" in text
                say(f"<judge>{'redwood' not in text}</judge>")(handler, body)
            elif "image_url" not in text:
                direction = next(word for word in ("north.v2", "south", "west") if f"of the {word}?" in text)
                say(f"<think>look</think><search>tree of the {direction} is</search>")(handler, body)
            else:
                answer = next(
                    w for d, w in (("north", "birch"), ("south", "Olive"), ("", "pine")) if f"the {d}" in text
                )
                say(f"<think>seen</think><answer>{answer}</answer>")(handler, body)

        server.behaviours = [reply]
        command = ["evaluate", "--dataset", "mmlongbench_doc", "--path", str(trees), "--policy", "openai"]
        command += ["--model", "reader", "--base-url", server.url, "--judge-model", "judge", "--out", str(out)]
        command += ["retrieval.kind=bm25", "corpus.ocr=none", "corpus.workers=1"]
        assert main(command) == 0
        requests = len(server.requests)
        assert main(command) == 0 and len(server.requests) == requests  # nothing is asked or judged twice
        assert {body["model"] for body in server.requests} == {"reader", "judge"}
    frame = pd.read_csv(out / "questions.csv").set_index("uid")
    assert list(frame["answer"]) == ["birch", "Olive", "pine"] and list(frame["searches"]) == [1, 1, 1]
    assert list(frame["mmlongbench"]) == [1, 1, 0] and list(frame["judge"]) == [1, 1, 0]
    assert frame["gold_page_seen"].all() and set(frame["policy"]) == {"openai:reader"}
    assert json.loads((out / "provenance.json").read_text())["settings"]["judge"] == "openai:judge"
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(SECRET.encode() in file.read_bytes() for file in written)
    assert "mmlongbench" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "docvqa"], "no dataset 'docvqa'; datasets are slidevqa, "),
        (["--dataset", "unified"], "dataset 'unified' needs the folder"),
        (["--dataset", "vidoseek", "--dataset", "slidevqa", "--path", "x"], "--path is given once for each --dataset"),
        (["--judge-model", "m"], "--judge-model needs --judge-url"),
    ],
)
def test_wrong_arguments_of_the_command_are_named(arguments, message, capsys):
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_the_shared_part_of_mmlongbench_doc_is_whole(config, tmp_path):
    """Every document that a question names is there; two of them are asked about, start to end."""
    folder = tmp_path / "part"
    (folder / "documents").mkdir(parents=True)
    named = ["b3m5kaeqm2w8n4bwcesw-140602121350-phpapp02_95.pdf", "2310.07609v1.pdf"]
    for name in named:
        (folder / "documents" / name).symlink_to(SHARED / "documents" / name)
    items = json.loads((SHARED / "samples.json").read_text())
    assert {item["doc_id"] for item in items} <= {file.name for file in (SHARED / "documents").iterdir()}
    (folder / "samples.json").write_text(json.dumps([item for item in items if item["doc_id"] in named]))
    frame = evaluate_datasets({"mmlongbench_doc": folder}, config, limit=6)
    assert len(frame) == 6 and frame["answered"].all() and frame["mmlongbench"].between(0, 1).all()
