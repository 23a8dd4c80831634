"""The `vrag` command: help of every sub-command, overrides, errors without tracebacks, one real question."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from vrag_lib.cli import build_parser, main
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


def test_the_installed_command_runs_and_starts_fast():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "vrag_lib.cli", "--version"], capture_output=True)
    assert done.stdout.startswith(b"vrag 0.")
    assert b" torch\n" not in done.stderr and b" transformers\n" not in done.stderr


def test_settings_may_stand_anywhere_after_the_command(capsys):
    assert main(["config", "seed=4", "--preset", "gpu_3b", "environment.max_turns=2"]) == 0
    out = capsys.readouterr().out
    assert "seed=4 " in out and "environment.max_turns=2 " in out and "preset=gpu_3b" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["config", "sed=4"], "did you mean 'seed'"),
        (["config", "--preset", "nope"], "presets are laptop"),
        (["ask", "missing-folder", "why?"], "missing-folder"),
        (["ask", "missing-folder", "why?", "--policy", "oracle"], "missing-folder"),
        (["view", "missing.parquet", "missing-folder"], "missing.parquet"),
        (["evaluate", "--agent", "rag"], "no agent 'rag'; agents are no_retrieval, vanilla_rag_1"),
        (["evaluate", "--agent", "react", "environment.given_pages=2"], "contradicts the agent 'react'"),
    ],
)
def test_wrong_input_ends_with_one_line_that_names_it(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.startswith(f"vrag {arguments[0]}: ")


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
    assert main(["ask", str(documents), question, "--out", str(tmp_path / "out"), "seed=3"]) == 0
    out = capsys.readouterr().out
    assert "4170" in out.split("answer", 1)[1].splitlines()[0]
    assert "harbour.pdf" in out and "page      1" in out and "region    [" in out and "stop    answer" in out
    folder = tmp_path / "out" / "laptop" / "ask"
    record = read_trajectories(folder / "trajectories.parquet")[0]
    assert record.question == question and record.evidence.page_id == "harbour_1" and record.seed == 3
    assert json.loads((folder / "config.json").read_text())["config"]["seed"] == 3
    assert question in (folder / "trajectory.html").read_text()
    assert main(["view", str(folder / "trajectories.parquet"), str(documents), "--out", str(tmp_path / "v.html")]) == 0
    assert "4170" in (tmp_path / "v.html").read_text()


def test_index_prepares_and_names_what_it_left_out(documents, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    assert main(["index", str(documents), "--retriever", "bm25"]) == 0
    assert "2 documents, 2 pages, 1 left out" in capsys.readouterr().out
    assert any("broken.pdf" in record.getMessage() for record in caplog.records)


def test_an_empty_question_and_missing_settings_are_refused(documents, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path / "cache"))
    out = ["--out", str(tmp_path)]
    assert main(["ask", str(documents), "  ", *out]) == 2 and "question is empty" in capsys.readouterr().err
    for options, message in [
        (["--policy", "openai"], "policy.base_url="),
        (["--policy", "transformers"], "policy.model="),
        (["--policy", "oracle"], "policy.kind is one of"),
        (["--retriever", "remote"], "retrieval.url="),
        (["--retriever", "magic"], "retrieval.kind is one of"),
        (["corpus.ocr=maybe"], "corpus.ocr is"),
    ]:
        assert main(["ask", str(documents), "why?", *out, "--retriever", "bm25", *options]) == 2
        assert message in capsys.readouterr().err
