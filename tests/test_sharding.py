"""Weights shared out over processes give the run that one process gives, and rollouts in which no process waits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import training_jobs
from tiny_agent import scratch, trained_checkpoint

from vrag_lib.config import ConfigError
from vrag_lib.trajectory import read_trajectories

torch = pytest.importorskip("torch")

from vrag_lib.sharding import whole_weights  # noqa: E402
from vrag_lib.torch_setup import ensure_torchvision  # noqa: E402
from vrag_lib.training import on_one_card, use_own_card  # noqa: E402

BY_ROUNDING = {"sampler_gap", "sampler_gap_max", "epoch"}


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 0, "learning_rate": 1e-4}], ids=["lora", "all_weights"])
def test_two_processes_that_share_out_the_weights_equal_one(settings):
    name = "-".join(map(str, settings)) or "lora"
    alone, shared = scratch() / f"whole-{name}", scratch() / f"sharded-{name}"
    torch.set_num_threads(1)
    training_jobs.run_grpo(trained_checkpoint(), alone, steps=2, **settings)
    processes = training_jobs.start_together(
        2, training_jobs.run_sharded, training_jobs.run_grpo, trained_checkpoint(), shared, steps=2, **settings
    )
    assert training_jobs.finish(processes) == [0, 0]
    for row, expected in zip(training_jobs.curves(shared), training_jobs.curves(alone), strict=True):
        for column in set(expected) - BY_ROUNDING:
            assert float(row[column]) == pytest.approx(float(expected[column]), rel=2e-3, abs=2e-5), column
        assert float(row["sampler_gap_max"]) < 1e-4
    for step in (1, 2):
        own, theirs = (read_trajectories(f / "trajectories" / f"step_{step:05d}.parquet") for f in (shared, alone))
        assert [t.tokens().token_ids for t in own] == [t.tokens().token_ids for t in theirs]
    made = {path.name for path in (shared / "final").glob("*.safetensors")}
    assert made == {path.name for path in (alone / "final").glob("*.safetensors")} != set()


def test_other_shards_are_refused_with_what_helps():
    model = torch.nn.Linear(2, 2)
    with whole_weights(model, None):
        pass
    model.weight.ds_id = 0
    with pytest.raises(ConfigError, match=r"launch/fsdp\.yaml"), whole_weights(model):
        pass


def test_each_process_loads_its_models_on_its_own_card(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    use_own_card()
    monkeypatch.setenv("LOCAL_RANK", "3")
    use_own_card()
    assert chosen == [3]


def test_without_a_launcher_one_card_is_trained_on(monkeypatch):
    """Transformers counts every card of the machine, and TRL refuses more than one; the trainers take the first."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    arguments = SimpleNamespace(_n_gpu=4, n_gpu=4)
    assert on_one_card(arguments)._n_gpu == 1
    ensure_torchvision()
    from transformers import TrainingArguments

    real = on_one_card(TrainingArguments(output_dir="unused", use_cpu=True, report_to="none"))
    real._n_gpu = 4
    assert on_one_card(real).n_gpu == 1
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1"):
        use_own_card("cuda:1")


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2"])
def test_accelerate_reads_the_launch_files(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = Path(__file__).parent.parent / "launch" / f"{name}.yaml"
    read = load_config_from_file(str(path))
    assert read.mixed_precision == "no"
    assert read.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED"}[name]
