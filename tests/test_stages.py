"""The stages on a handful of documents: what each leaves behind, and the errors of wrong settings."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from vrag_lib.config import ConfigError, load_config
from vrag_lib.judge import rule_judge
from vrag_lib.stages import collection, make_expert_policy, synthesize, training_questions
from vrag_lib.trajectory import read_trajectories


def config_of(results, *overrides):
    settings = ["smoke=true", "retrieval.kind=bm25", f"results={results}", *overrides]
    return load_config("laptop", settings, experiment=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VRAG_CACHE", str(folder / "cache"))
        config = config_of(folder / "results")
        train = collection(config, "train")
        return config, train, synthesize(config, train)


def test_synthesis_leaves_what_the_cold_start_needs(made):
    folder = made[-1]
    chosen = read_trajectories(folder / "trajectories.parquet")
    funnel = pd.read_csv(folder / "funnel.csv")
    assert funnel["stage"].iloc[0] == "sampled" and funnel["stage"].iloc[-1] == "balance"
    assert funnel["kept"].iloc[-1] == len(chosen) > 8
    right = [rule_judge(t.question, t.reference_answer, t.answer) for t in chosen]
    assert sum(right) / len(right) > 0.9  # the scripted judge lets a wrong one pass now and then
    assert {t.policy for t in chosen} == {"scripted-planner + scripted-grounder"} and {t.preset for t in chosen} == {
        "laptop"
    }
    assert len(json.loads((folder / "llamafactory" / "vrag_sft.json").read_text())) == len(chosen)
    assert (folder / "dataset").is_dir() and "scripted" in (folder / "README.md").read_text()


def test_cold_start_and_reinforcement_learning_share_no_document(made):
    config, train, folder = made
    cold_start, for_rl = training_questions(config, train.questions)
    assert cold_start and for_rl and not {q.file_name for q in cold_start} & {q.file_name for q in for_rl}
    stored = json.loads((folder / "rl_questions.json").read_text())
    uids = {q["uid"] for q in (stored if isinstance(stored, list) else stored["examples"])}
    assert uids == {q.uid for q in for_rl}
    assert {t.question_id for t in read_trajectories(folder / "trajectories.parquet")} <= {q.uid for q in cold_start}


def test_again_changes_nothing(made):
    config, train, folder = made
    before = read_trajectories(folder / "trajectories.parquet")
    assert read_trajectories(synthesize(config, train) / "trajectories.parquet") == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("synthesis.experts=oracle", "scripted, openai"),
        ("synthesis.experts=openai", "policy.base_url="),
        ("synthesis.variant=both", "relocate"),
    ],
)
def test_wrong_settings_are_named(made, tmp_path, override, message):
    _, train, _ = made
    with pytest.raises(ConfigError, match=message):
        make_expert_policy(config_of(tmp_path, override), train.questions, train.corpus)
