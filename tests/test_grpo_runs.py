"""What is left of a run to look at: whole groups from its first rollout to its last, and curves of all its seeds."""

import pandas as pd
import pytest

from vrag_lib.grpo_runs import SAMPLED_GROUPS, SAMPLED_STEPS, draw_runs, keep_sample
from vrag_lib.trajectory import StopReason, Trajectory, Turn, read_trajectories, write_trajectories


def rollout(step: int, count: int) -> list[Trajectory]:
    turns = (Turn("user", "How many?"), Turn("assistant", "<answer>1</answer>"))
    return [Trajectory(f"{step}/{i}", "q", "How many?", turns, StopReason.ANSWER) for i in range(count)]


def test_a_sample_holds_whole_groups_from_the_first_to_the_last_rollout(tmp_path):
    for step in range(1, 13):
        write_trajectories(rollout(step, 12), tmp_path / "trajectories" / f"step_{step:05d}.parquet")
    kept = [t.id for t in read_trajectories(keep_sample(tmp_path, group_size=3))]
    assert len(kept) == SAMPLED_STEPS * SAMPLED_GROUPS * 3
    assert kept[:6] == [f"1/{i}" for i in range(6)] and kept[-6:] == [f"12/{i}" for i in range(6)]


def test_a_short_run_is_kept_once_and_an_empty_one_is_named(tmp_path):
    write_trajectories(rollout(1, 4), tmp_path / "run" / "trajectories" / "step_00001.parquet")
    assert len(read_trajectories(keep_sample(tmp_path / "run", group_size=2))) == 4
    with pytest.raises(FileNotFoundError, match="holds no rollout"):
        keep_sample(tmp_path / "none", group_size=2)


def test_runs_of_one_recipe_are_drawn_together(tmp_path):
    assert draw_runs(tmp_path, "paper") is None
    for name in ("paper_seed_0", "paper_seed_1", "released_code_seed_0"):
        (tmp_path / name).mkdir()
        table = {"step": [1, 2], "reward": [0.1, 0.2], "finish_rate": [0.5, 0.6], "turns": [2.0, 3.0], "kl": [0.0, 0.1]}
        pd.DataFrame(table).to_csv(tmp_path / name / "metrics.csv", index=False)
    assert draw_runs(tmp_path, "paper") == tmp_path / "paper.png" and (tmp_path / "paper.png").stat().st_size > 5000
    assert draw_runs(tmp_path, "answer_only") is None
