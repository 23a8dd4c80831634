"""The report on what makes MiniDocs hard: rows, targets, missing inputs. The model is a random one of the real size."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict

import pytest

from vrag_lib.minidocs import MiniDocs, MiniDocsConfig
from vrag_lib.minidocs_report import answerable, report
from vrag_lib.scale_evaluate import page_and_crop
from vrag_lib.scale_policy import build_model, build_processor
from vrag_lib.scale_training import save_policy

DOCS = MiniDocs(MiniDocsConfig(train_documents=5, test_documents=1))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    processor = build_processor()
    return save_policy(build_model(processor.tokenizer), processor, tmp_path_factory.mktemp("policy"))


def write_inputs(folder, crop: float, page: float):
    recall = {"mean": 0.5, "low": 0.4, "high": 0.6}
    (folder / "test.json").write_text(
        json.dumps({"questions": 7, "asked_recall@1": recall, "rewritten_recall@1": recall})
    )
    with (folder / "probes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["task", "element", "score"])
        writer.writeheader()
        for element in ("table", "chart", "text", "layout"):
            writer.writerow({"task": "crop", "element": element, "score": crop})
            writer.writerow({"task": "page", "element": element, "score": page})


def test_rows_say_what_was_measured_and_whether_it_is_met(policy, tmp_path):
    write_inputs(tmp_path, crop=1.0, page=0.0)
    rows = report(policy, tmp_path / "test.json", tmp_path / "probes.csv", tmp_path / "out", docs=DOCS)
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["config"]["minidocs"] == asdict(DOCS.config) and made["provenance"]["versions"]["torch"]
    by_name = {row["measure"]: row for row in rows}
    assert by_name["value read from its gold region (tables and charts)"]["met"] == "yes"
    assert by_name["question as asked finds a gold page at rank 1"]["met"] == "yes"
    assert by_name["rewritten query finds a gold page at rank 1"]["met"] == "no"  # 50 % is not 85 %
    n = len(answerable(DOCS, "test", 1))
    bound = by_name["every hop read from its gold region (upper bound)"]
    assert bound["n"] == n > 4 and bound["share"] == 0.0  # random weights read nothing
    assert by_name["scale policy, question alone (lower bound)"]["share"] == 0.0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| rewritten query finds a gold page at rank 1 | 7 | 50.0% |" in text
    assert len((tmp_path / "out" / "hardness.csv").read_text().splitlines()) == len(rows) + 1


def test_page_and_crop_pairs(policy):
    looks = page_and_crop(policy, DOCS, "test", 0)
    assert len(looks) == 6
    for page, crop in zip(looks[::2], looks[1::2], strict=True):
        assert (page.question, page.expected) == (crop.question, crop.expected)
        assert page.shown.startswith("whole page") and crop.shown.startswith("gold region")


def test_missing_measurements_are_named(policy, tmp_path):
    with pytest.raises(FileNotFoundError, match="vrag scale-model"):
        report(policy, tmp_path / "test.json", tmp_path / "probes.csv", tmp_path, docs=DOCS)
