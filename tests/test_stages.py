"""The stages on a handful of documents: what each leaves behind, and the errors of wrong settings."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pandas as pd
import pytest
from chat_server import running_server, say, send

from vrag_lib.config import ConfigError, load_config, override
from vrag_lib.corpus import document_stem
from vrag_lib.judge import rule_judge
from vrag_lib.matrix_training import Workbench
from vrag_lib.stages import (
    collection,
    find_cold_start,
    make_expert_policy,
    reinforce,
    sft_folder,
    synthesize,
    training_questions,
)
from vrag_lib.synthesis import SynthesisError
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


@pytest.fixture
def sampled(made, tmp_path, monkeypatch):
    """A config whose samples are there and nothing else."""
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    config = config_of(tmp_path / "results")
    shutil.copytree(made[-1] / "samples", config.folder("synthesis") / "samples")
    return config


def test_trajectories_are_there_once_all_else_is(made, sampled, monkeypatch):
    train, folder = made[1], sampled.folder("synthesis")
    done = folder / "trajectories.parquet"
    shutil.copy(made[-1] / "trajectories.parquet", done)  # of an earlier run with other settings
    with monkeypatch.context() as patch:
        patch.setattr("vrag_lib.synthesis_export.write_card", lambda *given, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            synthesize(sampled, train)
    assert not done.exists()
    called = []

    def again(*given):
        called.append(given)
        return synthesize(*given)

    monkeypatch.setattr("vrag_lib.matrix_training.synthesize", again)
    bench = Workbench(sampled)
    bench.train = train
    assert bench.trajectories("crop") == read_trajectories(made[-1] / "trajectories.parquet")
    (folder / "config.json").unlink()  # as a version left it that wrote the trajectories first
    assert bench.trajectories("crop") and len(called) == 2
    assert bench.trajectories("crop") and len(called) == 2


def test_samples_are_gone_on_with_whatever_is_done_with_them_later(made, sampled, monkeypatch):
    claimed = sampled.folder("synthesis") / "samples" / "relocate" / "settings.json"
    settings = json.loads(claimed.read_text())
    assert not {"concurrency", "trajectories", "rl_questions"} & set(settings["more"]["synthesis"])
    settings["more"]["synthesis"] |= {"concurrency": 3, "trajectories": 7, "rl_questions": 9}  # as earlier versions did
    claimed.write_text(json.dumps(settings))
    monkeypatch.setattr("vrag_lib.synthesis.rollout", None)  # nothing is sampled
    overrides = ["synthesis.concurrency=1", "synthesis.trajectories=5", "synthesis.rl_questions=4"]
    assert len(read_trajectories(synthesize(override(sampled, overrides), made[1]) / "trajectories.parquet")) == 5
    with pytest.raises(SynthesisError, match=r"more\.synthesis\.temperature=1\.0 not 0\.5"):
        synthesize(override(sampled, ["synthesis.temperature=0.5"]), made[1])


def test_a_set_without_a_trajectory_is_refused_with_what_became_of_the_samples(made, sampled, monkeypatch):
    monkeypatch.setattr("vrag_lib.stages.make_judge", lambda config: lambda *item: False)
    expected = r"no trajectory is left .*sampled \d+, .*wrong_answer 0, .*synthesis\.samples_per_question="
    with pytest.raises(SynthesisError, match=expected):
        synthesize(sampled, made[1])
    folder = sampled.folder("synthesis")
    assert pd.read_csv(folder / "funnel.csv")["kept"].iloc[-1] == 0
    assert not (folder / "trajectories.parquet").exists()


@pytest.fixture
def endpoint(made, tmp_path, monkeypatch):
    """Config, documents and server of two experts behind an endpoint: a planner that searches, crops and answers
    rightly the two questions of the cold start, and a grounding expert that the endpoint does not know."""
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    _, train, _ = made
    documents = sorted({question.file_name for question in train.questions})[:2]
    questions = [q for name in documents for q in [q for q in train.questions if q.file_name == name][:2]]
    answers = {question.query: question.reference_answer for question in questions}

    def plan(handler, body):
        said = [message for message in body["messages"] if message["role"] == "assistant"]
        question = body["messages"][1]["content"].rsplit("Question: ", 1)[1]
        actions = [f"<search>{question}", "<bbox>[1, 2, 50, 60]", f"<answer>{answers[question]}"]
        say(f"<think>step by step</think>{actions[len(said)]}")(handler, body)

    with running_server() as server:
        grounders = [send('{"error": "no model grounder"}', 404)]

        def reply(handler, body):
            is_planner = body["model"] == "planner"
            (plan if is_planner else grounders[0] if len(grounders) == 1 else grounders.pop(0))(handler, body)

        server.behaviours = [reply]
        overrides = [
            "experts=openai",
            "planner=planner",
            "grounder=grounder",
            "samples_per_question=1",
            "concurrency=1",
        ]
        settings = [f"policy.base_url={server.url}", *(f"synthesis.{text}" for text in overrides)]
        few = dataclasses.replace(train, questions=tuple(questions))
        yield config_of(tmp_path / "results", *settings), few, server, grounders


def test_a_grounding_expert_that_is_not_there_is_named_and_nothing_is_passed_off_as_its_work(endpoint, caplog):
    config, few, server, grounders = endpoint
    with pytest.raises(SynthesisError, match=r"located 0 of 2 boxes.*'bad_request': 2.*synthesis\.grounder=") as caught:
        synthesize(config, few)
    assert server.url in str(caught.value)
    folder = config.folder("synthesis")
    assert not (folder / "trajectories.parquet").exists()
    assert json.loads((folder / "experts.json").read_text())["counts"] == {"kept_box_failed": 2}
    with pytest.raises(SynthesisError, match="located 0 of 2 boxes"):  # nor the next time, when nothing is sampled
        synthesize(config, few)
    shutil.rmtree(folder / "samples")
    grounders.append(say("[5, 10, 60, 70]"))
    synthesize(config, few)
    assert "located 1 of 2 boxes" in caplog.text
    record = json.loads((folder / "experts.json").read_text())
    assert record["counts"] == {"relocated": 1, "kept_box_failed": 1}
    assert record["experts"]["grounder"]["given_up"] == {"bad_request": 1}
    card = (folder / "README.md").read_text()
    assert "| relocated | 1 |" in card and "| box failed: bad_request | 1 |" in card
    assert "| grounder | openai:grounder | 2 |" in card and "| bad_request: 1 | bad_request: 1 |" in card


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


def test_the_cold_start_found_is_finished_of_this_seed_and_on_the_most_trajectories(tmp_path):
    config = config_of(tmp_path, "seed=1")
    assert find_cold_start(config) is None
    for count in (90, 300):
        (sft_folder(config, count) / "final").mkdir(parents=True)
        (sft_folder(config, count) / "final" / "config.json").touch()
    (sft_folder(config, 3000) / "checkpoint-5").mkdir(parents=True)
    (sft_folder(config_of(tmp_path), 1000) / "final").mkdir(parents=True)
    assert find_cold_start(config) == sft_folder(config, 300) / "final"
    assert find_cold_start(config_of(tmp_path)) is None
    (sft_folder(config, 3000) / "final").mkdir()
    (sft_folder(config, 3000) / "final" / "adapter_config.json").touch()
    assert find_cold_start(config) == sft_folder(config, 3000) / "final"


def test_seeds_of_reinforcement_learning_share_questions_and_no_folder(made, tmp_path, monkeypatch):
    config, train, _ = made
    calls = []
    monkeypatch.setattr("vrag_lib.grpo.train_grpo", lambda *given, **named: calls.append((given, named)) or given[5])
    config = config_of(tmp_path)
    folders = [reinforce(config, "start", train, seed=seed) for seed in (None, 7)]
    assert folders == [config.folder("grpo") / "paper_seed_0", config.folder("grpo") / "paper_seed_7"]
    assert [named["seed"] for _, named in calls] == [0, 7]
    assert calls[0][0][1] == calls[1][0][1] == tuple(training_questions(config, train.questions)[1])
    corpus = calls[0][0][2]
    assert {d.id for d in corpus.documents} == {document_stem(q.file_name) for q in calls[0][0][1]}
    assert 0 < len(corpus) < len(train.corpus)
