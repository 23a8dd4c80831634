"""The experiment matrix: cells as data, what the paper's comparisons differ in, runs that are killed and that fail."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
from tiny_agent import random_checkpoint

import vrag_lib.matrix as matrix
from vrag_lib.actions import ActionKind
from vrag_lib.agents import VANILLA_PAGES
from vrag_lib.claims import ClaimError, alone_in, claim, depends_on, model_fingerprint
from vrag_lib.cli import main
from vrag_lib.config import ConfigError, read_config, to_dict
from vrag_lib.judge import rule_judge
from vrag_lib.matrix import KEPT, Outcome, cell_folder, read_curves, read_records, read_rows, run_matrix, states
from vrag_lib.matrix_cells import CELLS, CHAINS, FAMILIES, Cell, cell_config, find_cells
from vrag_lib.matrix_training import FORMS, MatrixError, Workbench
from vrag_lib.paper_numbers import ABLATIONS, EFFECTS
from vrag_lib.presets import load_config
from vrag_lib.rewards import RECIPES
from vrag_lib.stages import training_questions
from vrag_lib.trajectory import read_trajectories

CONFIG = load_config("laptop", experiment=True)
THREE = ["vanilla_rag_1", "react", "vrag_prompted"]


def small(results, *overrides):
    """Four documents a split, searched by words, read by the offline policy."""
    settings = ["smoke=true", "retrieval.kind=bm25", "policy.kind=extractive", f"results={results}"]
    return load_config("laptop", [*settings, *overrides], experiment=True)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def flat(value, name: str = "") -> dict:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}".lstrip(".")).items()}


def differing(a: str, b: str) -> set[str]:
    """Settings, and fields of the cell, in which two cells differ."""

    def described(name: str) -> dict:
        cell = CELLS[name]
        own = {field: getattr(cell, field) for field in ("chain", "data", "trajectories", "formatted")}
        return own | flat(to_dict(cell_config(cell, CONFIG)))

    one, other = described(a), described(b)
    return {key for key in one if one[key] != other[key]}


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_is_valid(name):
    cell = CELLS[name]
    assert cell.name == name and cell.chain in CHAINS
    assert cell.data in (("crop", "search", "gold") if cell.chain == "none" else ("crop", "search"))
    config = cell_config(cell, CONFIG)
    assert config.grpo.recipe in RECIPES and config.grpo.rows == CONFIG.grpo.rows  # the budget of RL
    assert config.grpo.steps == CONFIG.grpo.steps and config.synthesis == CONFIG.synthesis and config.sft == CONFIG.sft
    config.grpo.validate()
    without_crop = {"sft_search", "search_r1", "sft_rl_search", "search_answer_only", "search_r1_text"}
    assert (cell.data == "search") == (name in without_crop)
    assert list(cell.seeds(5)) == ([0] if cell.chain == "none" else [0, 1, 2, 3, 4])


def test_every_run_of_rl_is_drawn_in_one_family():
    shown = [name for names in FAMILIES.values() for name in names if name != "vrag_rl"]
    assert sorted([*shown, "vrag_rl"]) == sorted(name for name, cell in CELLS.items() if "grpo" in cell.chain)
    assert all("vrag_rl" in names for names in FAMILIES.values())


def test_the_papers_comparisons_differ_in_what_they_compare():
    crop = {"environment.allow_crop", "data"}  # experts without crop write other trajectories on the same questions
    reward = {"grpo.recipe"}
    assert differing("vrag_rl", "sft_rl_search") == crop == differing("vrag_answer_only", "search_answer_only")
    assert differing("vrag_rl", "vrag_answer_only") == reward == differing("sft_rl_search", "search_answer_only")
    assert differing("vrag_rl", "sft") == {"chain"} == differing("sft_rl_search", "search_r1")
    assert differing("vrag_rl", "cold_start") == {"chain"} == differing("react", "search_r1") - {"data"}
    assert (
        differing("vrag_rl", "search_r1") == {"chain"} | crop
    )  # the confound of Table 1, taken apart by the two above
    assert differing("cold_start", "search_r1") == crop
    assert differing("vrag_prompted", "cold_start") == {"chain"}
    assert differing("vrag_rl", "no_crop_same_sft") == {"environment.allow_crop"}
    assert differing("released_code", "no_gate") == reward == differing("vrag_rl", "released_code")
    assert RECIPES["released_code"] == dataclasses.replace(RECIPES["paper_cold_start"], gate=True)
    assert differing("vrag_rl", "retrieval_only") == reward
    assert differing("cold_start", "cold_start_paper") == reward | {"grpo.kl_coefficient"}
    assert differing("vrag_rl", "group_2") == {"grpo.group_size", "grpo.questions_per_step"}
    assert differing("vrag_rl", "group_10") == {"grpo.group_size", "grpo.questions_per_step"}
    assert differing("vrag_rl", "no_kl") == {"grpo.kl_coefficient"}
    assert differing("vrag_rl", "invalid_penalised") == {"grpo.invalid_advantage"}
    assert differing("vrag_rl", "padding_8") == {"environment.crop_padding"}
    assert differing("vrag_rl", "horizon_3") == {"environment.max_turns"} == differing("vrag_rl", "horizon_8")
    assert differing("vrag_rl", "rl_300") == {"trajectories"} == differing("sft", "sft_300")
    assert differing("vrag_rl", "rl_1000") == {"trajectories"} == differing("sft", "sft_1000")
    assert differing("rl_1000", "sft_1000") == {"chain"} == differing("rl_300", "sft_300")
    pages = {"environment.given_pages"}
    assert differing("vanilla_rag_1", "vanilla_rag_5") == pages == differing("vanilla_rag_5", "vanilla_rag_6")
    text = {"environment.observation"}
    assert differing("vanilla_rag_5", "vanilla_rag_5_text") == text == differing("react", "react_text")
    assert differing("search_r1", "search_r1_text") == text
    assert {f"vanilla_rag_{k}" for k in VANILLA_PAGES} <= set(CELLS)


def test_what_is_compared_is_in_the_matrix_and_all_that_is_trained_is_compared():
    compared = {name for effect in (*EFFECTS, *ABLATIONS) for name in (effect.a, effect.b)}
    assert {name for name, cell in CELLS.items() if cell.trained} <= compared


def test_cells_are_found_by_name_and_group_sizes_divide_the_budget():
    assert [cell.name for cell in find_cells(["vrag_rl", "react"])] == ["react", "vrag_rl"]
    with pytest.raises(ConfigError, match="no cell 'vrag'"):
        find_cells(["vrag"])
    odd = load_config("laptop", ["grpo.questions_per_step=7"], experiment=True)
    with pytest.raises(ConfigError, match="no whole number of groups of 2"):
        cell_config(CELLS["group_2"], odd)


@pytest.mark.parametrize("preset", ["laptop", "laptop_legible"])
def test_the_shipped_trajectories_are_those_that_the_matrix_asks_for(preset):
    shipped = read_config(Path(__file__).parent.parent / "results" / preset / "synthesis")
    assert depends_on(shipped, "synthesis") == depends_on(load_config(preset, experiment=True), "synthesis")


RECORDED = sorted((Path(__file__).parent.parent / "results").glob("laptop*/matrix/*/seed_*/settings.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: "-".join([path.parts[-5], *path.parts[-3:-1]]))
def test_finished_cells_are_those_of_the_settings_of_today(path):
    """A setting that came to be after a cell was run is recorded as None there, which has to be its default."""
    recorded = json.loads(path.read_text())
    preset = load_config(path.parts[-5], experiment=True)
    config = cell_config(CELLS[recorded["cell"]["name"]], preset)
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, temperature=0.0))
    stages = [stage for stage in recorded["config"] if stage not in ("minidocs", "data_seed", "smoke")]
    assert recorded["config"].get("synthesis", {}).get("dataset") is None
    claim(path.parent, recorded | {"config": depends_on(config, *stages)})
    if "synthesis" in stages:
        other = dataclasses.replace(config, synthesis=dataclasses.replace(config.synthesis, dataset="unified"))
        with pytest.raises(ClaimError, match=r"synthesis\.dataset=None not 'unified'"):
            claim(path.parent, recorded | {"config": depends_on(other, *stages)})


@pytest.mark.parametrize(
    "preset, name", [("laptop", "scale_cold_start"), ("laptop_legible", "scale_cold_start_legible")]
)
def test_the_shipped_cold_start_is_that_of_the_settings_of_today(preset, name, tmp_path, monkeypatch):
    path = Path(__file__).parent.parent / "data" / name
    recorded = json.loads((path / "settings.json").read_text())
    bench = Workbench(load_config(preset, [f"results={tmp_path}"], experiment=True), 400)
    assert recorded["start"] == model_fingerprint(bench.raw())
    today = recorded | {"config": depends_on(bench.config, "sft", "synthesis")}
    monkeypatch.setattr(bench, "sft_settings", lambda *_: today)
    monkeypatch.setattr(bench, "_made", lambda name, *_: name)
    assert bench._fine_tuned("start", CELLS["sft"], 0) == str(path)


def test_what_another_process_is_training_is_waited_for_and_not_trained_again(tmp_path):
    bench = Workbench(dataclasses.replace(CONFIG, results=str(tmp_path)), 400)
    folder = bench.folder / "checkpoints" / "shared"

    folder.mkdir(parents=True)
    held, released = threading.Event(), threading.Event()

    def another() -> None:
        with alone_in(folder):
            held.set()
            released.wait(10)
            (folder / "done.json").write_text('{"model": "final"}')

    thread = threading.Thread(target=another)
    thread.start()
    held.wait()
    threading.Timer(0.5, released.set).start()
    made = bench._made("shared", {"seed": 0}, lambda folder: pytest.fail("trained twice"))
    thread.join()
    assert made == str(folder / "final")


def test_a_matrix_on_other_documents_is_refused(tmp_path):
    config = load_config("laptop", [f"results={tmp_path}", "synthesis.dataset=vidoseek"], experiment=True)
    with pytest.raises(ConfigError, match="the matrix trains and measures on MiniDocs"):
        run_matrix(config)


def test_a_killed_matrix_goes_on_and_a_failing_cell_stops_no_other(tmp_path, monkeypatch):
    whole, killed = small(tmp_path / "whole"), small(tmp_path / "killed")
    assert [o.state for o in run_matrix(whole, THREE, seeds=2)] == ["finished"] * 3
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import vrag_lib.matrix as matrix, vrag_lib.synthesis as synthesis
from test_matrix import THREE, small
synthesis.SAVE_SECONDS = 0
class Dying:
    def __init__(self, policy):
        self.policy, self.name, self.calls = policy, policy.name, 0
    def generate(self, conversations, **settings):
        self.calls += 1
        if self.calls == 12 and self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.policy.generate(conversations, **settings)
make = matrix.make_policy
def dying(corpus, config):
    policy = Dying(make(corpus, config))
    policy.dies = config.environment.allow_search  # in the second cell
    return policy
matrix.make_policy = dying
matrix.run_matrix(small({str(tmp_path / "killed")!r}, "policy.batch_size=2"), THREE, seeds=2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [o.state for o in states(killed, THREE)] == ["finished", "begun", "missing"]
    kept = sum(
        len(read_trajectories(p)) for p in (cell_folder(killed, "react", 0) / "evaluation").glob("samples/*/*.parquet")
    )
    asked = []
    make, cells = matrix.make_policy, iter(["react", "vrag_prompted"])

    def counting(corpus, config):
        policy = make(corpus, config)
        generate, cell = policy.generate, next(cells)
        if cell == "vrag_prompted":
            raise OSError("the disk is full")

        def counted(conversations, **settings):
            asked.extend(c[0].text for c in conversations if len(c) == 1)
            return generate(conversations, **settings)

        monkeypatch.setattr(policy, "generate", counted)
        return policy

    monkeypatch.setattr(matrix, "make_policy", counting)
    outcomes = run_matrix(killed, [*THREE, "sft"], seeds=1)
    assert [o.state for o in outcomes] == ["skipped", "finished", "failed", "failed"]
    assert outcomes[2].error == "OSError: the disk is full" and "extractive cannot be" in outcomes[3].error
    questions = len(read_rows(whole)["react"])
    assert 0 < kept < questions and len(asked) == questions - kept  # nothing twice, nothing left out
    assert states(killed, ["vrag_prompted"]) == [Outcome("vrag_prompted", 0, "failed", "OSError: the disk is full")]
    monkeypatch.setattr(matrix, "make_policy", make)
    assert [o.state for o in run_matrix(killed, THREE, seeds=1)] == ["skipped", "skipped", "finished"]
    assert not (cell_folder(killed, "vrag_prompted", 0) / "error.txt").exists()
    timed = ["seconds_generate", "seconds_retrieve"]
    for name, rows in read_rows(whole).items():
        pd.testing.assert_frame_equal(read_rows(killed)[name].drop(columns=timed), rows.drop(columns=timed))


def test_rows_of_a_cell(tmp_path):
    config = small(tmp_path)
    run_matrix(config, ["vanilla_rag_2", "vrag_prompted"], seeds=1)
    rows = read_rows(config)
    assert list(rows["vanilla_rag_2"].columns) == [*KEPT, "seed", "cold_start"] and set(
        rows["vanilla_rag_2"]["pages"]
    ) == {2}
    acting = rows["vrag_prompted"]
    assert acting["uid"].is_unique and set(acting["first_gold"]) == {0.0, 1.0} and acting["judge"].mean() > 0.3
    assert (acting["gold_page_seen"] >= acting["first_gold"]).all()
    record = read_records(config)["vrag_prompted", 0]
    assert record["provenance"]["commit"] and record["seconds_evaluation"] > 0
    with pytest.raises(MatrixError, match=r"environment\.max_turns=5 not 4"):
        matrix.run_cell(Workbench(small(tmp_path, "environment.max_turns=4")), CELLS["vrag_prompted"], 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The whole chain on a tiny random model: it learns nothing, and goes through every stage."""
    overrides = [
        "policy.kind=transformers", f"policy.model={random_checkpoint()}", "policy.max_reply_tokens=8",
        "sft.epochs=1", "sft.batch_size=8", "sft.micro_batch_size=8", "grpo.steps=1", "grpo.questions_per_step=2",
        "grpo.group_size=2", "grpo.micro_batch_size=4", "grpo.max_reply_tokens=8", "grpo.lora_rank=4",
        "environment.max_turns=2",
    ]  # fmt: skip
    return small(tmp_path_factory.mktemp("tiny"), *overrides)


def test_cells_that_are_trained(tiny, monkeypatch):
    import vrag_lib.matrix_training as training

    fine_tune, tuned = training.fine_tune, []

    def counted(*arguments, **settings):
        tuned.append(settings["folder"].name)
        if tuned[-1] == "sft_search_all_seed_0":
            raise RuntimeError("out of memory")
        return fine_tune(*arguments, **settings)

    monkeypatch.setattr(training, "fine_tune", counted)
    names = ["vrag_prompted", "sft_search", "sft", "vrag_rl", "sft_rl_search"]
    outcomes = {o.cell: o for o in run_matrix(tiny, names, seeds=1, format_trajectories=8)}
    assert [outcomes[name].state for name in names] == ["finished", "failed", "finished", "finished", "failed"]
    # The shared checkpoints are trained once, and the one that failed is not tried again.
    assert tuned == ["format", "sft_crop_all_seed_0", "sft_search_all_seed_0"]
    assert "needs the checkpoint sft_search_all_seed_0, which failed: RuntimeError" in outcomes["sft_rl_search"].error
    made = tiny.folder("matrix") / "checkpoints"
    assert (made / "vrag_rl_seed_0" / "merged" / "model.safetensors").is_file()
    assert not list(made.glob("*/checkpoint-*"))
    kept = tiny.folder("matrix") / "vrag_rl" / "seed_0"
    assert (kept / "metrics.csv").read_bytes() == (made / "vrag_rl_seed_0" / "metrics.csv").read_bytes()
    assert len(read_trajectories(kept / "sample_trajectories.parquet")) == 4  # the only rollout
    curves = read_curves(tiny)
    assert curves[["cell", "seed", "step"]].to_numpy().tolist() == [["vrag_rl", 0, 1]]
    assert read_curves(tiny, ["sft"]).empty
    assert [o.state for o in run_matrix(tiny, ["sft", "vrag_rl"], seeds=1, format_trajectories=8)] == ["skipped"] * 2
    assert run_matrix(tiny, ["raw"], seeds=2, format_trajectories=8, first_seed=1) == []  # it has seed 0 alone
    with pytest.raises(ValueError, match="between 0 and 0, not 1"):
        run_matrix(tiny, ["sft"], seeds=1, format_trajectories=8, first_seed=1)
    assert set(read_rows(tiny)) == {"vrag_prompted", "sft", "vrag_rl"}
    other = dataclasses.replace(tiny, sft=dataclasses.replace(tiny.sft, learning_rate=1.0))
    with pytest.raises(MatrixError, match=r"sft\.learning_rate=0\.0005 not 1\.0"):
        Workbench(other, 8).checkpoint(CELLS["sft"], 0)


def test_the_bounds_start_from_experts_who_were_given_the_gold_pages(tiny, monkeypatch):
    bench = Workbench(tiny, 8)
    monkeypatch.setattr(bench, "_made", lambda name, settings, train: name)
    started = {name: bench.checkpoint(cell, 0) for name, cell in CELLS.items() if cell.chain == "none"}
    assert {name for name, start in started.items() if start == "gold"} == {name for name in CELLS if "gold" in name}
    assert set(started.values()) == {bench.raw(), "format", "gold"}
    assert Workbench(tiny, 0).checkpoint(CELLS["gold_regions"], 0) == bench.raw()  # an instruct model needs no stage


def test_seeds_of_reinforcement_learning_take_turns_with_cold_starts(tiny, monkeypatch):
    def asked(cold_starts: int, cell: str) -> list[tuple[int, int]]:
        """Seeds of SFT and of RL that are asked for, by a bench that trains nothing."""
        bench, seeds = Workbench(tiny, 0, cold_starts), []
        monkeypatch.setattr(bench, "_fine_tuned", lambda model, cell, seed: seeds.append(("sft", seed)) or model)
        monkeypatch.setattr(bench, "_reinforced", lambda model, cell, seed: seeds.append(("rl", seed)) or model)
        for seed in range(3):
            bench.checkpoint(CELLS[cell], seed)
        return seeds

    assert asked(1, "vrag_rl") == [("sft", 0), ("rl", 0), ("sft", 0), ("rl", 1), ("sft", 0), ("rl", 2)]
    assert [seed for stage, seed in asked(2, "vrag_rl") if stage == "sft"] == [0, 1, 0]
    assert asked(1, "sft") == [("sft", 0), ("sft", 1), ("sft", 2)]
    with pytest.raises(ValueError, match="at least one cold start"):
        Workbench(tiny, 0, 0)


def test_reinforcement_learning_starts_from_what_fine_tuning_left(tiny, tmp_path, monkeypatch):
    """Trap S12: the released script starts from the raw instruct model; here a chain without SFT does, and no other."""
    import vrag_lib.matrix_training as training

    bench = Workbench(dataclasses.replace(tiny, results=str(tmp_path)), 0, cold_starts=2)
    reinforced, asked, loaded = bench._reinforced, [], []

    def fake_reinforce(config, checkpoint, train, *, folder, seed):
        loaded.append(checkpoint)
        return folder / "final"

    monkeypatch.setattr(Workbench, "train", None)
    monkeypatch.setattr(training, "reinforce", fake_reinforce)
    monkeypatch.setattr(bench, "_fine_tuned", lambda start, cell, seed: f"{start} tuned with seed {seed}")
    monkeypatch.setattr(
        bench, "_reinforced", lambda start, cell, seed: asked.append(start) or reinforced(start, cell, seed)
    )
    for cell in ("vrag_rl", "cold_start"):
        for seed in (0, 1):
            bench.checkpoint(CELLS[cell], seed)
    assert {CELLS[name].chain for name in ("vrag_rl", "cold_start")} == {"sft+grpo", "grpo"}
    tuned = [f"{bench.raw()} tuned with seed {seed}" for seed in (0, 1)]
    assert asked == loaded == [*tuned, bench.raw(), bench.raw()]


def test_a_shipped_cold_start_stands_in_only_where_nothing_differs(tiny, tmp_path, monkeypatch):
    import vrag_lib.matrix_training as training

    bench, cell = Workbench(tiny, 0), CELLS["sft"]
    made = json.dumps(bench.sft_settings(bench.raw(), cell, 0))
    (tmp_path / "settings.json").write_text(made)
    monkeypatch.setattr(training, "scale_cold_start", lambda config: tmp_path)
    monkeypatch.setattr(bench, "_made", lambda name, *_: name)
    assert bench.checkpoint(cell, 0) == str(tmp_path)
    assert bench.checkpoint(cell, 1) == "sft_crop_all_seed_1"
    assert bench.checkpoint(CELLS["sft_300"], 0) == "sft_crop_300_seed_0"
    (tmp_path / "settings.json").write_text(made.replace('"replies": "', '"replies": "0'))
    assert bench.checkpoint(cell, 0) == "sft_crop_all_seed_0"


def test_what_cells_without_crop_and_the_format_learn_from(tiny):
    bench = Workbench(tiny, 8)
    search = bench.trajectories("search")
    questions = {q.uid for q in training_questions(tiny, bench.train.questions)[0]}
    assert search and all(t.count(ActionKind.CROP) == 0 and not any(r.invalid for r in t.replies) for t in search)
    assert len(search) <= len(bench.trajectories("crop")) and {t.question_id for t in search} <= questions
    fresh = Workbench(dataclasses.replace(tiny, results=f"{tiny.results}/more"), 8)
    learnt = fresh.trajectories("format")
    assert len(learnt) == 8 and {t.question_id for t in learnt} <= questions
    assert all(rule_judge(t.question, t.reference_answer, t.answer) for t in learnt)
    assert [len(t.turns[0].images) for t in learnt[: len(FORMS["format"])]] == [1, 3, 0, 0]
    gold = fresh.trajectories("gold")
    assert gold and all(rule_judge(t.question, t.reference_answer, t.answer) for t in gold)
    assert all(t.turns[0].images and not t.count(ActionKind.SEARCH) for t in gold)
    assert [t.turns[0].images[0].is_crop for t in gold[: len(FORMS["gold"])]] == [False, False, True]
    with pytest.raises(MatrixError, match="count=8 not 4"):
        Workbench(fresh.config, 4).trajectories("format")


def test_the_command(tmp_path, capsys):
    settings = ["smoke=true", "retrieval.kind=bm25", "policy.kind=extractive", f"results={tmp_path}"]
    command = ["reproduce-paper", "--seeds", "1", "--cells", "react", "vrag_rl"]
    assert main([*command, "--list", *settings]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["react", "seed", "0", "missing"]
    assert main([*command, *settings]) == 1  # one failed, the other is reported
    captured = capsys.readouterr()
    assert "failed: vrag_rl, seed 0: MatrixError" in captured.err and "REPORT.md" in captured.out
    text = (tmp_path / "REPORT.md").read_text()
    assert "**Failed:** `vrag_rl` seed 0" in text
    assert main(["reproduce-paper", "--cells", "nope", *settings]) == 2 and "no cell 'nope'" in capsys.readouterr().err
    assert main(["reproduce-paper", "--seeds", "0", *settings]) == 2 and "one seed" in capsys.readouterr().err


def test_a_matrix_without_a_policy_says_what_makes_one(tmp_path, monkeypatch):
    import vrag_lib.matrix_training as training

    monkeypatch.setattr(training, "scale_policy", lambda config: None)
    with pytest.raises(ConfigError, match="vrag scale-model policy"):
        run_matrix(load_config("laptop", [f"results={tmp_path}"], experiment=True))
    assert Cell("x", "").find_agent().name == "vrag_rl"
