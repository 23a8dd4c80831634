"""Group-relative policy optimisation of the agent (paper §2.3, eq. 13, App. C), on TRL's GRPOTrainer with PEFT LoRA.

The trainer (`grpo_trainer`) samples through the one rollout loop, so images enter in mid-trajectory, and trains exactly
the tokens that were sampled. This module holds what needs no torch: settings, data order, advantages of a step's
trajectories, the row of metrics of a step, and `train_grpo`, which runs it all.

Deviations from the released code: LoRA, and the reference of the KL is the model with its adapter switched off; a
group is never split over optimizer steps (trap T15); trajectories that broke off by no fault of the policy count in
their group's statistics but are not trained on; questions come in a new order each epoch, none is dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vrag_lib.actions import ActionKind, InvalidReason
from vrag_lib.advantages import group_deviation, group_relative, has_signal, leave_one_out, token_advantages
from vrag_lib.config import EnvironmentConfig, GRPOConfig
from vrag_lib.corpus import Corpus, Question
from vrag_lib.policy import Policy
from vrag_lib.retrieval import Retriever
from vrag_lib.torch_setup import keep_freed_memory
from vrag_lib.training import last_checkpoint, process_count
from vrag_lib.trajectory import StopReason, Trajectory

if TYPE_CHECKING:
    from vrag_lib.policy_transformers import TransformersPolicy

Reward = Callable[[Trajectory], Trajectory]
"""Returns the trajectory with its named rewards, each (score, weight), NaN for one that is unknown. One with `many`, as
`rewards.Scorer`, gets all trajectories of a rollout at once."""

Credit = Callable[[Trajectory], Mapping[str, Sequence[float]]]
"""For some rewards of a trajectory, a weight for each of its turns: which turns the reward is credited to."""

Sampler = Callable[["TransformersPolicy"], Policy]
"""Called before each rollout with the policy under training; returns who samples (an engine given the new weights).
Where it has a method `rest`, that is called after each rollout."""


def question_order(count: int, needed: int, seed: int) -> list[int]:
    """Indices of the first `needed` questions trained on: `count` questions, shuffled anew each epoch, none dropped.

    >>> order = question_order(3, 7, seed=0)
    >>> sorted(order[:3]), sorted(order[3:6]), len(order)
    ([0, 1, 2], [0, 1, 2], 7)
    """
    epochs = range(math.ceil(needed / count))
    order = [int(i) for epoch in epochs for i in np.random.default_rng([seed, epoch]).permutation(count)]
    return order[:needed]


def row_seed(seed: int, step: int, row: int, attempt: int = 0) -> int:
    """The seed of one trajectory, from the run's seed, the rollout's number and its row in the rollout: the same
    however rows are spread over processes, and after a resume."""
    return int(np.random.SeedSequence([seed, step, row, attempt]).generate_state(1)[0])


def step_advantages(
    trajectories: Sequence[Trajectory], config: GRPOConfig, credit: Credit | None = None
) -> list[Callable[[Sequence[int]], np.ndarray]]:
    """For each trajectory a function from the turns of its trained tokens (n,) to their advantages (n,).

    Without `credit` all tokens of a trajectory share the advantage of its total reward. With it, each reward gets an
    advantage of its own within the group, credited to the turns that `credit` names for it. With
    `config.invalid_advantage` an invalid reply has that instead, however its trajectory ended: else what a success was
    in spite of is learnt with it.
    """

    def estimate(rewards: Sequence[float]) -> np.ndarray:
        if config.advantage == "leave_one_out":
            return leave_one_out(rewards, config.group_size)
        return group_relative(rewards, config.group_size, std=config.advantage_std)

    if credit is None:
        terms = {"outcome": estimate(group_rewards(trajectories))}
        scopes: list[Mapping[str, Sequence[float]]] = [{} for _ in trajectories]
    else:
        names = dict.fromkeys(name for t in trajectories for name in t.rewards)
        # Dividing by the deviation of one reward takes its weight away, which is put back.
        is_scaled = config.advantage == "group" and config.advantage_std
        weights = {name: max(abs(t.rewards.get(name, (0, 0))[1]) for t in trajectories) for name in names}
        terms = {
            name: estimate(group_rewards(trajectories, name)) * (weights[name] if is_scaled else 1.0) for name in names
        }
        scopes = [credit(t) for t in trajectories]

    def of(i: int) -> Callable[[Sequence[int]], np.ndarray]:
        own = {name: float(values[i]) for name, values in terms.items()}
        invalid = [turn.invalid is not None for turn in trajectories[i].turns]

        def advantages(turn_index: Sequence[int]) -> np.ndarray:
            values = token_advantages(own, turn_index, scopes[i])
            if config.invalid_advantage is not None:
                values[np.take(invalid, np.asarray(turn_index, dtype=int))] = config.invalid_advantage
            return values

        return advantages

    return [of(i) for i in range(len(trajectories))]


def _weighted(trajectory: Trajectory, name: str) -> float:
    score, weight = trajectory.rewards.get(name, (0.0, 0.0))
    return score * weight if weight else 0.0


def group_rewards(trajectories: Sequence[Trajectory], name: str = "") -> list[float]:
    """Total rewards, or of each the named one times its weight, as they are compared within groups: NaN where an error
    of the world around the policy cut a trajectory short, which would make its neighbours look better than they are."""
    return [
        math.nan if t.stop_reason is StopReason.ERROR else _weighted(t, name) if name else t.total_reward
        for t in trajectories
    ]


def is_broken(trajectory: Trajectory) -> bool:
    """Whether the trajectory broke off by no fault of its last reply: an error, or a context that was full."""
    return trajectory.stop_reason in (StopReason.ERROR, StopReason.CONTEXT_OVERFLOW)


def rollout_metrics(trajectories: Sequence[Trajectory], group_size: int) -> dict[str, float]:
    """What one rollout's trajectories tell: means per trajectory of rewards and actions, shares of ends and of invalid
    replies by reason, spread of the rewards inside the groups, groups without signal (a count)."""
    n = len(trajectories)
    rewards = [t.total_reward for t in trajectories]
    replies = [reply for t in trajectories for reply in t.replies]
    invalid = Counter(reply.invalid for reply in replies if reply.invalid is not None)
    stops = Counter(t.stop_reason for t in trajectories)
    names = dict.fromkeys(name for t in trajectories for name in t.rewards)
    terms = {name: [t.rewards[name][0] for t in trajectories if name in t.rewards] for name in names}
    return {
        "reward": float(np.nanmean(rewards)),
        "reward_deviation": group_deviation(group_rewards(trajectories), group_size),
        "groups_without_signal": float((~has_signal(group_rewards(trajectories), group_size)).sum()),
        "rewards_unknown": float(np.isnan(rewards).sum()),
        **{f"reward_{name}": float(np.nanmean(values)) for name, values in terms.items()},
        "turns": len(replies) / n,
        "searches": sum(t.count(ActionKind.SEARCH) for t in trajectories) / n,
        "crops": sum(t.count(ActionKind.CROP) for t in trajectories) / n,
        "images": sum(len(t.images) for t in trajectories) / n,
        "finish_rate": stops[StopReason.ANSWER] / n,
        **{f"stop_{reason.value}": stops[reason] / n for reason in StopReason},
        "invalid_rate": sum(invalid.values()) / max(len(replies), 1),
        **{f"invalid_{reason.value}": invalid[reason] / max(len(replies), 1) for reason in InvalidReason},
        "sampled_tokens": sum(len(reply.token_ids or ()) for reply in replies) / n,
    }


def train_grpo(
    checkpoint: str | Path,
    questions: Sequence[Question],
    corpus: Corpus,
    retriever: Retriever,
    config: GRPOConfig,
    folder: str | Path,
    *,
    environment: EnvironmentConfig | None = None,
    reward: Reward | None = None,
    credit: Credit | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    device: str = "auto",
    preset: str = "",
    run_id: str = "grpo",
) -> Path:
    """Train a checkpoint on questions; returns `folder/final`, a LoRA adapter (see `vrag merge`) or, with
    `lora_rank=0`, a checkpoint.

    Every optimizer step adds a row to `folder/metrics.csv`, every rollout a file to `folder/trajectories/`. A run that
    was killed goes on from its last complete checkpoint when called again, and ends as if it had never stopped.

    reward: default the recipe `paper` with the rule judge. sampler: default the policy under training itself.
    Under `accelerate launch` every process calls this with the same arguments.

    Raises ValueError for settings that do not fit each other, or without questions.
    """
    from vrag_lib.grpo_trainer import AgentGRPOTrainer
    from vrag_lib.policy_transformers import TransformersPolicy
    from vrag_lib.rewards import Scorer

    config.validate(process_count())
    if not questions:
        raise ValueError("there are no questions to train on")
    policy = TransformersPolicy.from_pretrained(
        checkpoint,
        corpus,
        device=device,
        dtype="auto" if config.lora_rank else "float32",  # in bfloat16 small updates would be rounded away
        temperature=config.temperature,
        max_reply_tokens=config.max_reply_tokens,
        max_context_tokens=config.max_context_tokens,
        batch_size=config.rollout_batch_size,
    )
    trainer = AgentGRPOTrainer(
        policy,
        questions,
        corpus,
        retriever,
        config,
        folder,
        environment=environment or EnvironmentConfig(),
        reward=reward or Scorer(),
        credit=credit,
        sampler=sampler,
        seed=seed,
        preset=preset,
        run_id=run_id,
    )
    keep_freed_memory()
    resume = last_checkpoint(folder)
    trainer.start_run(folder, resume, "reinforcement learning")
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    final = Path(folder) / "final"
    trainer.save_model(str(final))
    return final
