"""bench_update: one update of ours and of stock TRL on the same trajectories has the same loss and gradient."""

from __future__ import annotations

import dataclasses
import json

import pandas as pd
import pytest
from tiny_agent import ENVIRONMENT, QUESTIONS, SCRIPTS, corpus, random_checkpoint, retriever

torch = pytest.importorskip("torch")

from vrag_lib import bench_update  # noqa: E402
from vrag_lib.bench import BenchmarkError  # noqa: E402
from vrag_lib.bench_agent import OURS, STOCK  # noqa: E402
from vrag_lib.config import GRPOConfig  # noqa: E402
from vrag_lib.policy import ScriptedPolicy  # noqa: E402
from vrag_lib.presets import load_config  # noqa: E402
from vrag_lib.rollout import rollout  # noqa: E402
from vrag_lib.stages import Collection  # noqa: E402

ASKED = [question for question in QUESTIONS[:2] for _ in range(2)]
CONFIG = GRPOConfig(
    questions_per_step=2, group_size=2, micro_batch_size=2, lora_rank=4, lora_alpha=8, kl_coefficient=0.1
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trajectories():
    """With no, one, two and three images, of other lengths in each group."""
    return [
        rollout(ScriptedPolicy(script), [question], corpus(), retriever(), ENVIRONMENT, seeds=[i])[0]
        for i, (script, question) in enumerate(zip(SCRIPTS, ASKED, strict=True))
    ]


def bench(trajectories, config=CONFIG, out_dir=None):
    return bench_update.bench_update(
        random_checkpoint(), ASKED, trajectories, corpus(), retriever(), ENVIRONMENT, config,
        repeats=1, out_dir=out_dir, device="cpu", name="tiny",
    ).set_index("method")  # fmt: skip


def test_loss_and_gradient_are_stock_trls_and_the_run_leaves_what_redraws_it(trajectories, tmp_path):
    table = bench(trajectories, out_dir=tmp_path)
    ours = table.loc[OURS]
    assert ours["loss"] > 1e-5 and ours["loss_difference"] < 1e-7
    assert ours["gradient_norm"] > 1e-3 and ours["gradient_difference"] < 1e-5
    columns = [name for name in table.columns if name.startswith("seconds_") and name != "seconds_min"]
    assert len(columns) == len(bench_update.PHASES) and (table.loc[STOCK, columns] > 0).all()
    assert table[columns].sum(axis=1).to_numpy() == pytest.approx(table["seconds"].to_numpy())
    assert ours["seconds_image_processing"] == 0  # the rollout has made them ready
    record = json.loads((tmp_path / "config.json").read_text())["config"]
    assert record["images"] == 1.5 and record["grpo"]["normalisation"] == "sequence"
    assert list(pd.read_csv(tmp_path / "metrics.csv")["method"]) == [STOCK, OURS]
    assert (tmp_path / "update_speed.png").is_file()


def test_another_loss_is_an_error_and_on_record(trajectories, tmp_path, monkeypatch):
    recorded = bench_update._as_generated

    def swapped(agent, trajectories, corpus):
        return recorded(agent, [trajectories[i] for i in (1, 0, 2, 3)], corpus)  # the first two rewards change places

    monkeypatch.setattr(bench_update, "_as_generated", swapped)
    with pytest.raises(BenchmarkError, match="differs from stock TRL's by"):
        bench(trajectories, out_dir=tmp_path)
    assert pd.read_csv(tmp_path / "metrics.csv")["gradient_difference"].max() > bench_update.GRADIENT_TOLERANCE


def test_settings_that_do_not_fit_are_refused(trajectories):
    with pytest.raises(ValueError, match="not a multiple"):
        bench(trajectories, GRPOConfig(questions_per_step=2, group_size=2, micro_batch_size=3))
    with pytest.raises(BenchmarkError, match="1 trajectories have none"):
        bench(trajectories, dataclasses.replace(CONFIG, micro_batch_size=1))


def test_the_command_updates_on_the_experts_trajectories_of_each_group(tmp_path, monkeypatch):
    split = Collection(QUESTIONS, corpus(), retriever)
    monkeypatch.setattr(bench_update, "minidocs_questions", lambda config, *sizes: (split, list(QUESTIONS[:2])))
    monkeypatch.setattr(bench_update, "make_expert_policy", lambda *_: ScriptedPolicy(SCRIPTS[1]))
    monkeypatch.setattr(bench_update, "bench_update", lambda *arguments, **settings: (arguments, settings))
    config = load_config("laptop", ["seed=3"], experiment=True)
    arguments, settings = bench_update.run_bench_update(config, "some/model", 2, 3, 1, tmp_path)
    checkpoint, asked, trajectories, *_, grpo = arguments
    assert checkpoint == settings["name"] == "some/model" and settings["seed"] == 3
    assert asked == [QUESTIONS[0]] * 3 + [QUESTIONS[1]] * 3 and grpo.rows == len(trajectories) == 6
    assert [t.question_id for t in trajectories] == [q.uid for q in asked] and {
        len(t.images) for t in trajectories
    } == {1}
