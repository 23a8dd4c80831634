"""The stages on a handful of documents: what each leaves behind, and the errors of wrong settings."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
from chat_server import running_server, say, send
from pdf_files import words_pdf
from PIL import Image
from tiny_agent import random_checkpoint

from vrag_lib.actions import Action, ActionKind
from vrag_lib.ask import ask
from vrag_lib.claims import ClaimError
from vrag_lib.config import ConfigError, override, read_config
from vrag_lib.corpus import document_stem
from vrag_lib.document_files import CorpusError
from vrag_lib.environment import Environment
from vrag_lib.evaluate_datasets import evaluate_datasets
from vrag_lib.experts import Pointing
from vrag_lib.geometry import View
from vrag_lib.judge import rule_judge
from vrag_lib.matrix_training import Workbench
from vrag_lib.policy import ScriptedPolicy
from vrag_lib.policy_transformers import CheckpointError
from vrag_lib.presets import load_config
from vrag_lib.rewards import RewardRecipe
from vrag_lib.stages import (
    collection,
    find_cold_start,
    fine_tune,
    make_expert_policy,
    make_experts,
    reinforce,
    sft_folder,
    synthesize,
    training_questions,
)
from vrag_lib.synthesis import SynthesisError
from vrag_lib.torch_setup import ensure_torchvision
from vrag_lib.training import lora_config
from vrag_lib.trajectory import ImageRef, Turn, read_trajectories


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


def test_a_search_of_the_synthesis_shows_the_page_that_ranks_first_gold_or_not(made):
    """Trap T20: a gold page that was found further down is not shown first."""
    config, train, folder = made
    assert not config.synthesis.oracle_pages
    passed_over = 0
    for sample in [t for path in folder.glob("samples/*/*.parquet") for t in read_trajectories(path)]:
        shown = [(turn.action, sample.turns[i + 1].images) for i, turn in enumerate(sample.turns[:-1]) if turn.action]
        action, images = next((a, found) for a, found in shown if a.kind == "search" and found)
        hits = train.retriever.search([action.argument], config.environment.search_depth)[0]
        assert images[0].page_id == hits[0].page_id
        passed_over += hits[0].page_id not in sample.gold_page_ids and any(
            hit.page_id in sample.gold_page_ids for hit in hits
        )
    assert passed_over


def test_another_judge_may_choose(made):
    config, train, _ = made
    with pytest.raises(SynthesisError, match="no trajectory is left"):
        synthesize(dataclasses.replace(config, results=config.results + "/judged"), train, judge=lambda *item: False)


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


def test_in_the_released_codes_variant_the_grounding_model_replies_after_a_search(made, tmp_path, monkeypatch):
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path))
    _, train, _ = made
    with running_server() as server:
        server.behaviours = [lambda handler, body: say(f"<answer>{body['model']}</answer>")(handler, body)]
        settings = ["experts=openai", "planner=planner", "grounder=grounder", "variant=next_reply"]
        config = config_of(tmp_path, f"policy.base_url={server.url}", *(f"synthesis.{text}" for text in settings))
        policy = make_expert_policy(config, train.questions, train.corpus)
        first = [Turn("user", "q?")]
        searched = Turn("assistant", "<search>a</search>", action=Action(ActionKind.SEARCH, "a"))
        page = train.corpus.pages[0]
        shown = Turn("user", "", (ImageRef(page.id, View.of_page(page.size, 256 * 784, 512 * 784)),))
        replies = policy.generate([first, [*first, searched, shown]], seeds=[0, 1])
    assert [reply.text for reply in replies] == ["<answer>planner</answer>", "<answer>grounder</answer>"]


@pytest.mark.parametrize("weights", ["0.5,0.5", "a,b,c", "0.5,0.6,0", "1.2,-0.2,0"])
def test_weights_of_a_reward_that_are_none_are_named(made, tmp_path, weights):
    _, train, _ = made
    with pytest.raises(ConfigError, match=r"grpo\.recipe: .*" + re.escape(weights)):
        reinforce(config_of(tmp_path, f"grpo.recipe={weights}"), checkpoint_in(tmp_path), train)


def test_a_reward_of_free_weights(made, tmp_path, monkeypatch):
    _, train, _ = made
    found = []
    monkeypatch.setattr("vrag_lib.grpo.train_grpo", lambda *given, reward, **named: found.append(reward) or given[5])
    folder = reinforce(config_of(tmp_path, "grpo.recipe=0.5,0.4,0.1"), checkpoint_in(tmp_path), train)
    assert found[0].recipe == RewardRecipe(0.5, 0.4, 0.1) and folder.name == "0.5,0.4,0.1_seed_0"


def test_experts_ask_no_more_at_once_than_the_concurrency(made, tmp_path, monkeypatch):
    """In all: planner and grounding expert together, from however many threads."""
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path))
    _, train, _ = made
    with running_server() as server:

        def slowly(handler, body):
            time.sleep(0.1)
            (say("[5, 10, 60, 70]") if body["model"] == "grounder" else say("<answer>1</answer>"))(handler, body)

        server.behaviours = [slowly]
        settings = ["experts=openai", "planner=planner", "grounder=grounder", "concurrency=2"]
        config = config_of(tmp_path, f"policy.base_url={server.url}", *(f"synthesis.{text}" for text in settings))
        planner, grounder = make_experts(config, train.questions, train.corpus)
        page = train.corpus.pages[0]
        box = Pointing("q?", "there", ImageRef(page.id, View.of_page(page.size, 256 * 784, 512 * 784)), None)
        conversations = [[Turn("user", f"{number}?")] for number in range(3)]
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(planner.generate, conversations, seeds=[i, i, i]) for i in range(3)]
            asked += [pool.submit(grounder.locate, [dataclasses.replace(box, question=f"{i}?")]) for i in range(3)]
            assert not any(future.result()[0].error for future in asked)
        assert server.most_at_once == 2 and len(server.requests) == 12
        with pytest.raises(ConfigError, match=r"synthesis\.concurrency is at least 1, not 0"):
            make_experts(override(config, ["synthesis.concurrency=0"]), train.questions, train.corpus)


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


def checkpoint_in(folder, weights=b"weights"):
    path = folder / "start"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_seeds_of_reinforcement_learning_share_questions_and_no_folder(made, tmp_path, monkeypatch):
    config, train, _ = made
    calls = []
    monkeypatch.setattr("vrag_lib.grpo.train_grpo", lambda *given, **named: calls.append((given, named)) or given[5])
    config = config_of(tmp_path)
    folders = [reinforce(config, checkpoint_in(tmp_path), train, seed=seed) for seed in (None, 7)]
    assert folders == [config.folder("grpo") / "paper_seed_0", config.folder("grpo") / "paper_seed_7"]
    assert [named["seed"] for _, named in calls] == [0, 7]
    assert calls[0][0][1] == calls[1][0][1] == tuple(training_questions(config, train.questions)[1])
    corpus = calls[0][0][2]
    assert {d.id for d in corpus.documents} == {document_stem(q.file_name) for q in calls[0][0][1]}
    assert 0 < len(corpus) < len(train.corpus)


def test_a_training_does_not_go_on_with_other_settings_data_or_weights(made, tmp_path, monkeypatch):
    _, train, _ = made
    runs = []
    monkeypatch.setattr("vrag_lib.grpo.train_grpo", lambda *given, **named: runs.append(given) or given[5])
    start = checkpoint_in(tmp_path)
    folder = reinforce(config_of(tmp_path), start, train)
    assert reinforce(config_of(tmp_path, "grpo.save_steps=3"), start, train) == folder  # how often changes nothing
    for other, message in (("grpo.kl_coefficient=0", "kl_coefficient=0.01 not 0.0"), ("seed=1", "seed")):
        with pytest.raises(ClaimError, match=message):
            reinforce(config_of(tmp_path, other), start, train, folder=folder)
    with pytest.raises(ClaimError, match="judge"):
        reinforce(config_of(tmp_path), start, train, judge=lambda *item: True)
    with pytest.raises(ClaimError, match="model="):
        reinforce(config_of(tmp_path), checkpoint_in(tmp_path, b"others"), train)
    unread = train.corpus.with_pages(dataclasses.replace(page, lines=()) for page in train.corpus.pages)
    with pytest.raises(ClaimError, match="page_texts="):
        reinforce(config_of(tmp_path), checkpoint_in(tmp_path), dataclasses.replace(train, corpus=unread))
    monkeypatch.setattr("vrag_lib.stages.retriever_fingerprint", lambda config: "trained anew")
    with pytest.raises(ClaimError, match="retrieval_model="):
        reinforce(config_of(tmp_path), checkpoint_in(tmp_path), train)
    assert len(runs) == 2 and read_config(folder).grpo.kl_coefficient == 0.01


def test_fine_tuning_does_not_go_on_with_other_trajectories(made, tmp_path, monkeypatch):
    _, train, folder = made
    monkeypatch.setattr("vrag_lib.sft.train_sft", lambda *given, **named: given[4])
    data = read_trajectories(folder / "trajectories.parquet")
    settings = {"checkpoint": checkpoint_in(tmp_path), "folder": tmp_path / "run"}
    fine_tune(config_of(tmp_path), train, data=data, **settings)
    with pytest.raises(ClaimError, match="trajectories="):
        fine_tune(config_of(tmp_path), train, data=data[1:], **settings)


def test_what_is_missing_is_named_before_any_page_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("vrag_lib.stages.collection", lambda *_: pytest.fail("drawn too early"))
    config = config_of(tmp_path)
    with pytest.raises(ConfigError, match=r"trajectories\.parquet: `vrag synthesize --preset laptop` makes it"):
        fine_tune(config)
    (tmp_path / "empty").mkdir()
    for path in ("nope", "./nope/final", tmp_path / "gone", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match=r"is not there|holds no model"):
            reinforce(config, path)


def test_reinforcement_learning_starts_from_what_a_cold_start_with_lora_makes(made, tmp_path, monkeypatch):
    """TRL would put a fresh adapter in the place of the one that SFT trained, and start from the model below it."""
    ensure_torchvision()
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText

    _, train, _ = made
    base = AutoModelForImageTextToText.from_pretrained(random_checkpoint())
    adapted = get_peft_model(base, lora_config(4, 8))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    starts = []
    monkeypatch.setattr("vrag_lib.grpo.train_grpo", lambda *given, **named: starts.append(given[0]) or given[5])
    for _ in range(2):
        reinforce(config_of(tmp_path), tmp_path / "adapter", train)
    assert starts[0] == starts[1] == tmp_path / "laptop" / "grpo" / "paper_seed_0" / "start"
    merged = AutoModelForImageTextToText.from_pretrained(starts[0]).state_dict()
    expected = adapted.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], value, atol=1e-5) for name, value in expected.items())
    adapted.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(ClaimError, match="model="):
        reinforce(config_of(tmp_path), tmp_path / "other", train)
    tuned = []
    monkeypatch.setattr("vrag_lib.sft.train_sft", lambda *given, **named: tuned.append(given[0]) or given[4])
    data = read_trajectories(made[2] / "trajectories.parquet")
    fine_tune(config_of(tmp_path), train, checkpoint=tmp_path / "adapter", data=data, folder=tmp_path / "again")
    assert tuned == [tmp_path / "again" / "start"] and (tuned[0] / "config.json").is_file()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="merge it first"):
        reinforce(config_of(tmp_path), tmp_path / "adapter", train, seed=5)


def test_each_stage_finds_what_the_one_before_it_left(made, tmp_path, monkeypatch):
    """Traps S7 and S12: the released script names files that its converter does not write, and the raw model."""
    config, train, folder = made
    learnt = []

    def fake_sft(model, data, corpus, settings, folder, *, validation, **others):
        learnt.extend([*validation, *data])
        (folder / "final").mkdir(parents=True)
        (folder / "final" / "config.json").touch()
        return folder / "final"

    monkeypatch.setattr("vrag_lib.sft.train_sft", fake_sft)
    monkeypatch.setattr("vrag_lib.grpo.train_grpo", lambda checkpoint, *given, **named: checkpoint)
    tuned = fine_tune(config, train, checkpoint=checkpoint_in(tmp_path))
    assert learnt == read_trajectories(folder / "trajectories.parquet")
    assert find_cold_start(config) == tuned
    assert reinforce(config, find_cold_start(config), train, folder=tmp_path) == tuned


class Opened(Exception):
    """Ends a stage at the first environment that it makes."""


def test_synthesis_training_validation_and_demo_share_one_environment(made, tmp_path, monkeypatch):
    """Traps T7, T17 and T23: the released code has a crop margin, a budget and a hint of its own in each."""
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    overrides = ["environment.max_turns=3", "environment.crop_padding=8", "policy.kind=extractive"]
    overrides += ["corpus.ocr=none", "corpus.workers=1", "minidocs.test_documents=1", "grpo.lora_rank=4"]
    overrides += ["grpo.questions_per_step=2", "grpo.group_size=2", "grpo.micro_batch_size=4"]
    config = config_of(tmp_path / "results", *overrides)
    documents = words_pdf(tmp_path / "documents" / "a.pdf", "Ferries: 12").parent
    opened = []

    def spy(self, corpus, retriever, config=None):
        opened.append(config)
        raise Opened

    monkeypatch.setattr(Environment, "__init__", spy)
    for stage in (
        lambda: synthesize(config, made[1]),
        lambda: reinforce(config, random_checkpoint(), made[1]),
        lambda: evaluate_datasets({"minidocs": None}, config),
        lambda: ask(documents, "How many ferries?", config),
    ):
        with pytest.raises(Opened):
            stage()
    assert opened == [config.environment] * 4
    assert (config.environment.max_turns, config.environment.crop_padding) == (3, 8)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """One's own documents, PDFs and pictures, and a question on each; the config that trains on them."""
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "own"
    for name in ("north", "south.v2"):
        words_pdf(folder / "documents" / f"{name}.pdf", "Contents", f"The tree of the {name} is the birch")
    for name in ("red", "red_too", "blue"):
        Image.new("RGB", (64, 48), name.removesuffix("_too")).save(folder / "documents" / f"{name}.png")
    asked = [("north.pdf", [2], "birch"), ("South.pdf", [1], "Not answerable"), ("north", [1], "a list")]
    asked += [("red_too.png", [1], "red"), ("blue.png", [1], "blue"), ("south.v2.pdf", [2], "birch")]
    asked += [("red.png", [1], "reddish"), ("south.v2.pdf", [7], "no such page")]
    examples: list[dict] = [
        {
            "uid": f"q{number}",
            "query": f"What is in {name}?",
            "reference_answer": answer,
            "meta_info": {"file_name": name, "reference_page": pages},
        }
        for number, (name, pages, answer) in enumerate(asked, 1)
    ]
    examples.append({"uid": "q9", "query": "What is nowhere?", "reference_answer": "birch"})
    (folder / "questions.json").write_text(json.dumps({"examples": examples}))
    settings = ["retrieval.kind=bm25", "corpus.ocr=none", "corpus.workers=1", "synthesis.rl_questions=2"]
    settings += [f"results={tmp_path / 'results'}", "synthesis.dataset=unified", f"synthesis.dataset_path={folder}"]
    return load_config("laptop", settings, experiment=True)


def test_training_on_own_documents(own, tmp_path, monkeypatch, caplog):
    train = collection(own, "train")
    assert [d.id for d in train.corpus.documents] == ["blue", "north", "red", "south.v2"]
    assert [q.uid for q in train.questions] == [
        "q1",
        "q3",
        "q4",
        "q5",
        "q6",
        "q7",
    ]  # q2 has no answer, q8 and q9 no page
    assert "left out: 2 of 8 questions lack gold pages" in caplog.text and "test set" not in caplog.text
    assert train.retriever.search(["tree of the north"], 1)[0][0].page_id == "north_2"

    def documents(questions):
        return {document_stem(q.file_name) for q in questions}

    for seed in range(8):  # a document under two spellings, or under two names, is one
        config = override(own, [f"seed={seed}"])
        parts = [documents(part) for part in training_questions(config, train.questions)]
        assert all(parts) and not parts[0] & parts[1]
    calls = []
    monkeypatch.setattr("vrag_lib.grpo.train_grpo", lambda *given, **named: calls.append(given) or given[5])
    assert reinforce(own, checkpoint_in(tmp_path)) == own.folder("grpo") / "paper_seed_0"
    (_, questions, corpus, retriever, *_), wanted = calls[0], training_questions(own, train.questions)[1]
    assert questions == tuple(wanted) and {d.id for d in corpus.documents} == documents(wanted)
    assert {hit.page_id for hit in retriever.search(["tree"], 9)[0]} <= set(corpus.page_ids)
    monkeypatch.setattr("vrag_lib.stages.SMOKE_DOCUMENTS", 2)
    smoke = collection(override(own, ["smoke=true"]), "train")
    assert [d.id for d in smoke.corpus.documents] == ["north", "red"] and documents(smoke.questions) == {"north", "red"}


def test_own_documents_are_synthesised_by_experts_behind_an_endpoint(own, monkeypatch):
    """The scripted policy stands in for the experts."""
    policy = ScriptedPolicy(["<think>look</think><search>tree</search>", "<think>seen</think><answer>birch</answer>"])
    monkeypatch.setattr("vrag_lib.stages.make_expert_policy", lambda *_: policy)
    with pytest.raises(ConfigError, match=r"scripted experts know MiniDocs alone, not unified: .*experts=openai"):
        synthesize(own)
    config = override(own, ["synthesis.experts=openai", "policy.base_url=http://x/v1", "synthesis.planner=p"])
    with pytest.raises(ConfigError, match=r"synthesis\.grounder="):
        synthesize(config)
    folder = synthesize(
        override(config, ["synthesis.grounder=g", "synthesis.concurrency=1", "synthesis.rl_questions=1"])
    )
    chosen = read_trajectories(folder / "trajectories.parquet")
    assert chosen and {t.reference_answer for t in chosen} == {"birch"}
    assert "Both are scripted experts" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "split", "message"),
    [
        (["synthesis.dataset=docvqa"], "train", "one of slidevqa, .*, or none: MiniDocs.* not 'docvqa'"),
        (["synthesis.dataset=none"], "train", "without a dataset_path; it is not None"),
        (["synthesis.dataset_path=none"], "train", "unified needs synthesis.dataset_path="),
        ([], "test", "has no split 'test': measure with `vrag evaluate"),
    ],
)
def test_wrong_datasets_are_named(own, settings, split, message):
    with pytest.raises(ConfigError, match=message):
        collection(override(own, settings), split)


def test_a_public_benchmark_gives_its_training_questions_or_a_warning(own, tmp_path, caplog):
    folder = tmp_path / "slidevqa"
    for split, colour in {"train": "red", "test": "blue"}.items():
        deck = f"deck.{split}_95"
        (folder / "images" / deck).mkdir(parents=True)
        Image.new("RGB", (64, 48), colour).save(folder / "images" / deck / "t-1-1024.jpg")
        item = {"qa_id": split, "deck_name": deck, "question": "?", "answer": "!", "evidence_pages": [1]}
        (folder / f"{split}.jsonl").write_text(json.dumps(item))
    config = override(own, ["synthesis.dataset=slidevqa", f"synthesis.dataset_path={folder}"])
    assert [q.uid for q in collection(config, "train").questions] == ["train"] and "test set" not in caplog.text
    (folder / "train.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"no question file \(annotations/qa/train\.jsonl or train\.jsonl\)"):
        collection(config, "train")
    vidoseek = tmp_path / "own"
    (vidoseek / "questions.json").rename(vidoseek / "vidoseek.json")
    assert collection(override(own, ["synthesis.dataset=vidoseek"]), "train").questions
    assert "the questions of vidoseek are a test set" in caplog.text
