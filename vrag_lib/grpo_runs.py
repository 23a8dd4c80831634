"""What runs of GRPO leave to look at: curves with bands over seeds, and a sample of trajectories through training.

keep_sample(run)                   run/sample_trajectories.parquet, small enough to be kept for good
draw_runs(folder, "paper")         folder/paper.png, of all runs `paper_seed_<n>` there
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vrag_lib.plots import curves_figure, save_figure
from vrag_lib.training import read_runs
from vrag_lib.trajectory import read_trajectories, write_trajectories

SAMPLED_STEPS, SAMPLED_GROUPS = 5, 2
"""Rollouts, evenly spread from the first to the last, and groups of each, that a sample holds."""

PANELS = {
    "reward and its parts": ["reward", "reward_retrieval", "reward_answer"],
    "replies": ["finish_rate", "invalid_rate"],
    "per trajectory": ["turns", "searches", "crops"],
    "KL to the cold start": ["kl"],
}
"""What is drawn of a run: titles and columns of its `metrics.csv`."""


def keep_sample(run: str | Path, group_size: int) -> Path:
    """Keep the first groups of a few rollouts of a run, whole; returns the file.

    Raises FileNotFoundError when the run's folder holds no trajectories.
    """
    run = Path(run)
    steps = sorted((run / "trajectories").glob("step_*.parquet"))
    if not steps:
        raise FileNotFoundError(f"{run / 'trajectories'} holds no rollout; `vrag grpo` writes one at every step")
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(SAMPLED_STEPS, len(steps))).round().astype(int))
    kept = [t for i in chosen for t in read_trajectories(steps[i])[: SAMPLED_GROUPS * group_size]]
    return write_trajectories(kept, run / "sample_trajectories.parquet")


def draw_runs(folder: str | Path, recipe: str) -> Path | None:
    """Curves of all runs of a recipe below `folder`, means with bands over seeds; None where there is no run."""
    runs = read_runs(folder)
    if runs.empty or not (runs["run"] == recipe).any():
        return None
    figure = curves_figure(runs[runs["run"] == recipe], PANELS, over="seed", width=14)
    return save_figure(figure, Path(folder) / f"{recipe}.png")
