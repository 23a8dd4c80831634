"""The `vrag` command: help of every sub-command, overrides, errors without tracebacks, one real question."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from chat_server import running_server, say
from matplotlib.figure import Figure

from vrag_lib.cli import build_parser, main
from vrag_lib.cli_options import check_retriever, interval_table, parse, read_policy_config, retriever_settings
from vrag_lib.config import ConfigError
from vrag_lib.evaluate_retrieval import METRICS
from vrag_lib.factory import scale_agent
from vrag_lib.trajectory import read_trajectories


def commands(parser: argparse.ArgumentParser, prefix: tuple[str, ...] = ()):
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not nested:
        yield prefix
    for action in nested:
        for name, inner in action.choices.items():
            yield from commands(inner, (*prefix, name))


@pytest.mark.parametrize("command", list(commands(build_parser())), ids=" ".join)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.startswith(f"usage: vrag {' '.join(command)} ") and "--preset" in text and len(text.splitlines()) > 6
    assert "%%" not in text


def test_the_installed_command_runs_and_starts_fast():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "vrag_lib.cli", "--version"], capture_output=True)
    assert done.stdout.startswith(b"vrag 0.")
    assert b" torch\n" not in done.stderr and b" transformers\n" not in done.stderr


def test_settings_may_stand_anywhere_after_the_command(capsys):
    assert main(["config", "seed=4", "--preset", "gpu_3b", "environment.max_turns=2"]) == 0
    out = capsys.readouterr().out
    assert "seed=4 " in out and "environment.max_turns=2 " in out and "preset=gpu_3b" in out


def test_config_says_whose_settings_it_shows(capsys):
    shown = {}
    for options in ((), ("--experiment",), ("--preset", "gpu_3b")):
        assert main(["config", *options]) == 0
        head, _, shown[options] = capsys.readouterr().out.partition("\npreset=")
        assert all(line.startswith("# ") for line in head.splitlines())
        assert ("--preset gpu_3b" in head) == ("gpu_3b" in options)
        assert ("others, those of synthesize" in head) == (options == ())
    assert "policy.kind=extractive" in shown[()] and "policy.kind=transformers" in shown[("--experiment",)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["config", "sed=4"], "did you mean 'seed'"),
        (["config", "--preset", "nope"], "presets are laptop"),
        (["ask", "missing-folder", "why?"], "missing-folder"),
        (["ask", "missing-folder", "why?", "--policy", "oracle"], "policy.kind is one of"),
        (
            ["ask", "folder", "why?", "--retriever", "remote", "retrieval.url=http://a:b@host"],
            "retrieval.url holds a user",
        ),
        (["ask", "folder", "why?", "--base-url", "localhost:8000/v1", "--model", "m"], "policy.base_url is no address"),
        (["view", "missing.parquet", "missing-folder"], "missing.parquet"),
        (["index", "missing-folder", "--model", "m"], "--retriever-model has no use with --retriever text: leave it"),
        (["index", "missing-folder", "--retriever", "visual", "--model", "./gone"], "./gone is not a folder"),
        (["serve", "missing-folder", "--retriever", "remote"], "retrieval.kind=remote needs retrieval.url="),
        (["eval-retrieval", "missing-folder"], "missing-folder does not exist; give the folder of a benchmark"),
        (["eval-retrieval", ".", "corpus.dpi=72"], "corpus.dpi changes nothing here: the table compares methods"),
        (
            ["evaluate", "--path", "own"],
            "--path own of which --dataset? Documents and questions of one's own are unified",
        ),
        (["evaluate", "--judge-url", "http://host/v1"], "--judge-url has no use without --judge-model"),
        (["evaluate", "--judge-protocol", "paper"], "--judge-protocol has no use without --judge-model"),
        (["synthesize", "--judge-protocol", "vidorag"], "--judge-protocol has no use without --judge-model"),
        (["grpo", "model", "--judge-key-env", "MY_KEY"], "--judge-key-env has no use without --judge-model"),
        (["grpo", "model", "--judge-url", "http://host/v1"], "--judge-url has no use without --judge-model"),
        (["evaluate", "--judge-model", "m", "--judge-url", "http://a:b@host/v1"], "--judge-url holds a user name"),
        (["evaluate", "--judge-model", "m", "--judge-url", "host:8000/v1"], "--judge-url is no address"),
        (["evaluate", "--policy", "openai"], "policy.kind=openai needs policy.base_url="),
        (["evaluate", "--agent", "rag"], "no agent 'rag'; agents are no_retrieval, vanilla_rag_1"),
        (["evaluate", "--agent", "react", "environment.given_pages=2"], "contradicts the agent 'react'"),
    ],
)
def test_wrong_input_ends_with_one_line_that_names_it(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.startswith(f"vrag {arguments[0]}: ")
    assert error.count(message) == 1 and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        "sft", "grpo model", "bench rollout", "bench update", "reproduce-paper", "evaluate",
        "index folder retrieval.kind=visual", "serve folder retrieval.kind=visual", "evaluate policy.kind=extractive",
    ],
)  # fmt: skip
def test_a_card_that_is_not_there_is_named_before_anything_is_done(command, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("vrag_lib.stages.collection", None)
    name = "retrieval.device" if "kind" in command else "policy.device"
    assert main([*command.split(), f"{name}=cuda"]) == 2
    assert f"{name}=cuda, but " in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, name, values",
    [
        (["evaluate", "--seeds", "1", "2"], "seeds", [1, 2]),
        (["minidocs", "out", "--splits", "train", "test"], "splits", ["train", "test"]),
        (["bench", "search", "--pages", "10"], "pages", [10]),
        (["reproduce-paper", "--cells", "a", "b"], "cells", ["a", "b"]),
    ],
)
def test_settings_may_stand_behind_the_values_of_an_option(command, name, values, capsys):
    given = [command[0], *command[1:-1], command[-1], "seed=3", "policy.top_p=0.9", "--preset", "laptop", "seed=4"]
    arguments = parse(build_parser(), given)
    assert getattr(arguments, name) == values
    assert arguments.overrides == ["seed=3", "policy.top_p=0.9", "seed=4"]
    assert parse(build_parser(), command).overrides == []
    with pytest.raises(SystemExit):
        parse(build_parser(), [*command[: -len(values)], "seed=3"])
    assert f"argument --{name}: expected at least one argument" in capsys.readouterr().err


def test_settings_may_stand_before_an_argument():
    arguments = parse(build_parser(), ["ask", "seed=3", "documents", "policy.top_p=0.9", "x=2?", "--traceback"])
    assert (arguments.path, arguments.question, arguments.traceback) == ("documents", "x=2?", True)
    assert arguments.overrides == ["seed=3", "policy.top_p=0.9"]
    assert parse(build_parser(), ["ask", "--policy=openai", "seed=1", "documents", "q"]).overrides == ["seed=1"]
    assert parse(build_parser(), ["ask", "documents", "seed=", "--out", "seed=1"]).question == "seed="
    with pytest.raises(SystemExit):
        parse(build_parser(), ["evaluate", "seed=1", "--out"])


def test_a_job_that_a_scheduler_ends_keeps_what_is_finished(monkeypatch, capsys):
    def ask(*given):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            print("kept")

    monkeypatch.setattr("vrag_lib.ask.ask", ask)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["ask", "documents", "who?"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr()
    assert said.out == "kept\n" and "the same command goes on" in said.err


def test_what_servers_and_files_are_called_cannot_steer_the_terminal(monkeypatch, capsys):
    code = "import logging; from vrag_lib import ask; from vrag_lib.cli import main\n"
    code += "ask.ask = lambda *given: logging.getLogger('x').warning('left out: \\x1b[2Jb.pdf')\n"
    code += "main(['ask', 'documents', 'who?'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "WARNING: left out: ⟨U+001B⟩[2Jb.pdf" in done.stderr and "\x1b" not in done.stderr


def test_an_unknown_argument_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["config", "--colour", "red"])
    assert end.value.code == 2 and "'--colour'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    texts = {
        "harbour": ["Harbour report 2023", "Containers handled in 2023: 4170", "Ferries: 12"],
        "bakery": ["Bakery survey", "Most loved bread: rye", "Loaves sold per day: 350"],
    }
    for name, lines in texts.items():
        figure = Figure(figsize=(6, 4))
        for i, line in enumerate(lines):
            figure.text(0.1, 0.8 - 0.15 * i, line, fontsize=16)
        figure.savefig(folder / f"{name}.pdf")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing more")
    return folder


def test_ask_answers_with_page_and_region_and_shows_how(documents, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    question = "How many containers were handled in 2023?"
    command = ["ask", str(documents), question, "--out", str(tmp_path / "out")]
    assert main([*command, "seed=3"]) == 0
    out = capsys.readouterr().out
    assert "4170" in out.split("answer", 1)[1].splitlines()[0]
    assert "harbour.pdf" in out and "page      1" in out and "region    [" in out and "stop    answer" in out
    folder = Path(re.search(r"^viewer  (.*)/trajectory.html$", out, re.M)[1])
    assert folder.parent == tmp_path / "out" / "laptop" / "ask" and "how-many-containers" in folder.name
    record = read_trajectories(folder / "trajectories.parquet")[0]
    assert record.question == question and record.evidence.page_id == "harbour_1" and record.seed == 3
    assert json.loads((folder / "config.json").read_text())["config"]["seed"] == 3
    assert question in (folder / "trajectory.html").read_text()
    assert main(["view", str(folder / "trajectories.parquet"), str(documents), "--out", str(tmp_path / "v.html")]) == 0
    assert "4170" in (tmp_path / "v.html").read_text() and not capsys.readouterr().err
    (tmp_path / "bakery").mkdir()
    shutil.copy(documents / "bakery.pdf", tmp_path / "bakery")
    for wrong, said in [
        ([str(documents), "corpus.dpi=75"], "1 of the 1 pages that the trajectories show are of another size here"),
        ([str(tmp_path / "bakery")], "1 of the 1 pages that the trajectories show are not among these documents"),
    ]:
        view = ["view", str(folder / "trajectories.parquet"), *wrong, "--out", str(tmp_path / "wrong.html")]
        assert main(view) == 0
        assert f"WARNING: {said}, the first: harbour_1; give" in capsys.readouterr().err
    for seed in (4, 5):  # within a second, as a rule
        assert main([*command, "--retriever", "bm25", f"seed={seed}"]) == 0
    assert len(list(folder.parent.iterdir())) == 3 and read_trajectories(folder / "trajectories.parquet")[0].seed == 3


def test_ask_ends_with_status_1_when_the_endpoint_is_dead(documents, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vrag_lib.endpoint.random.uniform", lambda low, high: 0.0)  # no wait between the tries
    with running_server() as server:
        server.behaviours = [say("<answer>rye</answer>")]
        command = ["ask", str(documents), "Which bread?", "--retriever", "bm25", "--out", str(tmp_path)]
        command += ["--base-url", server.url, "--model", "reader"]
        assert main(command) == 0 and "answer    rye" in capsys.readouterr().out
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "answer    none (error: connection" in shown.out and "viewer  " in shown.out
    assert "--base-url is given without --policy, which therefore is openai, not extractive" in shown.err


def parsed(*options: str, command: str = "ask") -> argparse.Namespace:
    words = ["folder", "why?"] if command == "ask" else []
    return parse(build_parser(), [command, *words, *options])


@pytest.mark.parametrize(
    "options, kind, said",
    [
        ([], "extractive", ""),
        (["--model", "owner/model-3B"], "transformers", "--model is given without --policy"),
        (["--base-url", "http://localhost:8000/v1", "--model", "m"], "openai", "--base-url is given"),
        (["--policy", "openai", "--base-url", "http://localhost:8000/v1", "--model", "m"], "openai", ""),
        (["--model", "m", "policy.kind=openai"], "openai", ""),
        (["--preset", "gpu_3b", "--model", "owner/model"], "transformers", ""),
        (["--preset", "gpu_3b", "--base-url", "http://localhost:8000/v1"], "openai", "is openai, not transformers"),
    ],
)
def test_the_policys_options_say_which_policy(options, kind, said, monkeypatch, capsys):
    monkeypatch.setattr("vrag_lib.factory.image_pixels", lambda model: None)
    config = read_policy_config(parsed(*options))
    assert config.policy.kind == kind
    error = capsys.readouterr().err
    assert said in error if said else not error


def test_policy_and_retriever_have_a_model_each(monkeypatch):
    monkeypatch.setattr("vrag_lib.factory.image_pixels", lambda model: None)
    arguments = parsed("--retriever", "visual", "--retriever-model", "o/colqwen2", "--model", "o/qwen")
    config = check_retriever(arguments, read_policy_config(arguments, retriever_settings(arguments)))
    assert (config.policy.model, config.retrieval.model, config.retrieval.kind) == ("o/qwen", "o/colqwen2", "visual")
    for command in ("index", "serve"):
        for option in ("--model", "--retriever-model"):
            assert build_parser().parse_args([command, "folder", option, "m"]).retriever_model == "m"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--policy", "extractive", "--model", "m"],
            "--model has no use with --policy extractive: leave it out, or add",
        ),
        (["--policy", "transformers", "--base-url", "http://x/v1"], "or add --policy openai"),
        (["--model", "reader"], "--model reader is neither a folder nor a hub id"),
        (["--model", "tests/missing"], "--model tests/missing is neither a folder"),
    ],
)
def test_options_that_the_policy_does_not_use_are_refused(options, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_policy_config(parsed(*options))


def test_a_judges_endpoint_is_not_the_policys():
    options = ["--policy", "transformers", "--base-url", "http://x/v1", "--judge-model", "j"]
    with pytest.raises(ConfigError, match="a judge's is --judge-url"):
        read_policy_config(parsed(*options, command="evaluate"), experiment=True)


def test_pages_are_shown_at_the_size_that_the_checkpoint_reads(capsys):
    options = ["--policy", "transformers", "--model", str(scale_agent())]
    shown = read_policy_config(parsed(*options)).environment
    assert (shown.min_pixels, shown.max_pixels) == (80 * 28 * 28, 96 * 28 * 28)
    assert "reads images of 80 to 96 vision tokens" in capsys.readouterr().err
    own = read_policy_config(parsed(*options, "environment.max_pixels=313600")).environment
    assert (own.min_pixels, own.max_pixels) == (256 * 28 * 28, 313600)
    read_policy_config(parsed(*options, command="evaluate"), experiment=True)  # the experiment's size is the agent's
    assert not capsys.readouterr().err


def test_tables_fit_a_terminal():
    table = pd.read_csv(Path(__file__).parent.parent / "results/laptop/retrieval_mmlongbench/metrics.csv")
    lines = interval_table(table, ["method"], list(METRICS)).splitlines()
    assert max(map(len, lines)) <= 120 and len(lines) == len(table) + 1
    assert "39.7 [34.3, 45.4]" in next(line for line in lines if line.split()[0] == "Default")
    narrow = interval_table(table, ["method"], list(METRICS), width=60).splitlines()
    assert "R@1" in narrow[0] and "R@5" not in narrow[0]
    empty = pd.DataFrame({"by": ["x" * 50], "a": [float("nan")], "a_low": [float("nan")], "a_high": [float("nan")]})
    assert interval_table(empty, ["by"], ["a"]).split() == ["by", "a", "x" * 31 + "…"]


def test_index_prepares_and_names_what_it_left_out(documents, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    assert main(["index", str(documents), "--retriever", "bm25"]) == 0
    assert "2 documents, 2 pages, 1 left out" in capsys.readouterr().out
    assert any("broken.pdf" in record.getMessage() for record in caplog.records)


def test_an_empty_question_is_refused(documents, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    out = ["--out", str(tmp_path)]
    assert main(["ask", str(documents), "  ", *out]) == 2 and "question is empty" in capsys.readouterr().err
