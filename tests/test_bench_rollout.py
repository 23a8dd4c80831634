"""bench_rollout: stock TRL and our loop write the same tokens, greedily, and where they do not it is said."""

from __future__ import annotations

import dataclasses
import json

import pandas as pd
import pytest
from PIL import Image
from tiny_agent import ENVIRONMENT, QUESTIONS, corpus, random_checkpoint, retriever, scripted

torch = pytest.importorskip("torch")

from vrag_lib import bench_agent, bench_rollout, bench_trl  # noqa: E402
from vrag_lib.bench_agent import OURS, STOCK, random_scale_policy  # noqa: E402
from vrag_lib.config import PolicyConfig  # noqa: E402
from vrag_lib.presets import load_config  # noqa: E402
from vrag_lib.sft import SFTConfig, train_sft  # noqa: E402
from vrag_lib.stages import Collection  # noqa: E402

POLICY = PolicyConfig(device="cpu", max_reply_tokens=24, max_context_tokens=2048)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The tiny model after it has learnt by heart to search and answer."""
    recipe = SFTConfig(
        epochs=24, batch_size=1, micro_batch_size=1, learning_rate=3e-3, schedule="constant_with_warmup",
        save_steps=100,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("taught")
    return train_sft(random_checkpoint(), scripted()[1:2], corpus(), recipe, folder, device="cpu")


def bench(checkpoint, out_dir=None, policy=POLICY):
    return bench_rollout.bench_rollout(
        checkpoint, QUESTIONS[:2], corpus(), retriever(), ENVIRONMENT, policy,
        group=2, repeats=1, out_dir=out_dir, name="tiny",
    ).set_index("method")  # fmt: skip


def test_both_write_the_same_tokens_and_the_run_leaves_what_redraws_it(taught, tmp_path):
    table = bench(taught, tmp_path)
    ours, stock = table.loc[OURS], table.loc[STOCK]
    assert ours["identical"] == 1 and ours["first_difference"] == ""
    for name in ("sampled_tokens", "replies", "images", "forward_passes"):
        assert ours[name] == stock[name] > 0
    assert ours["replies"] > 1 and ours["images"] > 0
    columns = [name for name in table.columns if name.startswith("seconds_") and name != "seconds_min"]
    assert len(columns) == len(bench_rollout.PHASES) and (table[columns] > 0).all(axis=None)
    assert table[columns].sum(axis=1).to_numpy() == pytest.approx(table["seconds"].to_numpy())
    assert ours["speedup"] == pytest.approx(stock["seconds"] / ours["seconds"])
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["environment"]["max_invalid_streak"] == 0 and "trl" in record["provenance"]["versions"]
    read = pd.read_csv(tmp_path / "metrics.csv")
    assert list(read["method"]) == [STOCK, OURS] and list(read["policy"]) == ["tiny", "tiny"]
    bench_rollout.draw(read).savefig(tmp_path / "again.png")
    with Image.open(tmp_path / "rollout_speed.png") as figure:
        assert figure.width > 400


def test_replies_without_an_action_go_on_in_both():
    table = bench(random_checkpoint(), policy=dataclasses.replace(POLICY, max_reply_tokens=5))
    assert table.loc[OURS, "identical"] == 1 and (table["replies"] == ENVIRONMENT.max_turns).all()


def test_a_difference_is_counted_and_shown(taught, monkeypatch):
    whole = bench_trl.ToolEnvironment.act

    def act(self, reply: str) -> list:
        """Say more than our environment.

        Args:
            reply: all of it
        """
        return [*whole(self, reply), {"type": "text", "text": "more"}]

    monkeypatch.setattr(bench_trl.ToolEnvironment, "act", act)
    ours = bench(taught).loc[OURS]
    assert ours["identical"] == 0
    assert (
        ours["first_difference"].startswith(f"{QUESTIONS[0].uid}, token ") and "stock 'more" in ours["first_difference"]
    )


def test_without_a_model_the_scale_policy_is_taught_a_script(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(bench_rollout, "scale_cold_start", lambda: None)
    monkeypatch.setattr(bench_agent, "collection", lambda config, split: Collection(QUESTIONS, corpus(), retriever))
    monkeypatch.setattr(bench_rollout, "random_scale_policy", lambda folder, seed: random_checkpoint())
    teach = bench_rollout.taught_policy
    monkeypatch.setattr(bench_rollout, "taught_policy", lambda *arguments: teach(*arguments, steps=2))
    monkeypatch.setattr(
        bench_rollout, "bench_rollout", lambda *arguments, **settings: seen.update(settings) or arguments
    )
    config = load_config("laptop", ["seed=3"], experiment=True)
    checkpoint, questions, *_ = bench_rollout.run_bench_rollout(config, None, 2, 2, 1, tmp_path)
    assert checkpoint.name == "final" and questions == [QUESTIONS[0], QUESTIONS[2]]
    assert "random weights" in seen["name"] and seen["seed"] == 3


def test_the_random_scale_policy_is_a_checkpoint_of_its_seed(tmp_path):
    from safetensors.torch import load_file

    one, two, same = (
        load_file(random_scale_policy(tmp_path / str(i), seed) / "model.safetensors")
        for i, seed in enumerate((0, 1, 0))
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], two[name]) for name in one)
