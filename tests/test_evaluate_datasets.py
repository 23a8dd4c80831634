"""Benchmarks by name, from start to end with the offline policy."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from vrag_lib.config import load_config, read_config
from vrag_lib.corpus_formats import write_unified
from vrag_lib.evaluate_datasets import evaluate_datasets, open_datasets
from vrag_lib.minidocs import MiniDocs
from vrag_lib.policy import ScriptedPolicy


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


def test_wrong_names_and_missing_folders_are_named(config):
    with pytest.raises(ValueError, match="no dataset 'docvqa'; datasets are slidevqa, mmlongbench_doc, vidoseek"):
        open_datasets({"docvqa": "x"}, config)
    with pytest.raises(ValueError, match="dataset 'vidoseek' needs the folder"):
        open_datasets({"vidoseek": None}, config)
    with pytest.raises(ValueError, match="no question to ask in no dataset"):
        open_datasets({}, config)
    with pytest.raises(ValueError, match="no agent 'rag'; agents are no_retrieval, "):
        evaluate_datasets({"minidocs": None}, config, agent="rag")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        evaluate_datasets({"minidocs": None}, config, limit=0)
