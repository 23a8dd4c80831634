"""Times one GRPO update: our trainer and stock TRL's on the same trajectories, from the same weights, in one run, and
compares the loss and the gradient.

Both run `train()` for one step; only the rollout is replaced, by recorded trajectories. An update is what lies between
the rollout and the next: log-probs under the reference, forward and backward passes, the optimizer's step. The
trajectories are those of the scripted experts, of other lengths and with other images inside a group, so any model
will do. The rewards are made up: evenly spread over each group. Policy and reference differ, as in mid-training,
because the adapter starts from noise instead of zeros.

Ours begins with images and their features remembered, as it does in training, where the rollout has just shown them;
stock TRL remembers nothing. The loss is the paper's (`grpo.normalisation=sequence`, no division by the deviation) in
both. Elsewhere ours gives image placeholders no probability, in the loss as in sampling, and stock TRL does in the
loss; here ours does, too, so that the same numbers must come out but for rounding.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from vrag_lib import grpo_trainer, training_batch
from vrag_lib.bench import BenchmarkError, write_results
from vrag_lib.bench_agent import (
    IMAGES,
    OTHER,
    OURS,
    STOCK,
    UNCOUNTED,
    VISION,
    Place,
    Stopwatch,
    image_places,
    minidocs_questions,
    phase_figure,
    random_scale_policy,
    summarise,
)
from vrag_lib.bench_trl import stock_model, stock_trainer
from vrag_lib.config import Config, EnvironmentConfig, GRPOConfig
from vrag_lib.corpus import Corpus, Question
from vrag_lib.factory import scale_cold_start
from vrag_lib.policy_transformers import TransformersPolicy
from vrag_lib.retrieval import Retriever
from vrag_lib.rollout import rollout
from vrag_lib.stages import make_expert_policy
from vrag_lib.torch_setup import ensure_torchvision
from vrag_lib.training import freeze_vision, lora_config
from vrag_lib.trajectory import Trajectory

ensure_torchvision()

import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

PHASES = ("reference", "forward", "backward", "optimizer", VISION, IMAGES, OTHER)

LOSS_TOLERANCE = 1e-6
"""How far the loss may lie from stock TRL's. Its terms, of up to 0.5, cancel; what is left is the KL and rounding."""

GRADIENT_TOLERANCE = 1e-3
"""How far the gradient may lie from stock TRL's, as a share of its norm: room for the rounding of float32."""


@dataclass
class Updated:
    """One update of a method: its loss, the norm of its gradient, the gradient as the optimizer got it (parameters,),
    float32 on the processor, and its clock."""

    loss: float
    norm: float
    gradient: torch.Tensor
    watch: Stopwatch


def run_bench_update(
    config: Config, model: str | None, questions: int, group: int, repeats: int, out_dir: str | Path
) -> pd.DataFrame:
    """`bench_update` on the scripted experts' trajectories of MiniDocs' test split. model: a checkpoint; without one
    the scale policy that is shipped, and where there is none one with random weights."""
    test, chosen = minidocs_questions(config, questions, group, repeats)
    asked = [question for question in chosen for _ in range(group)]
    experts = make_expert_policy(config, asked, test.corpus)
    trajectories = rollout(experts, asked, test.corpus, test.retriever, config.environment, seeds=range(len(asked)))
    with tempfile.TemporaryDirectory(prefix="vrag-bench-") as folder:
        checkpoint = model or scale_cold_start() or random_scale_policy(folder, config.seed)
        name = model or ("the shipped cold start" if scale_cold_start() else "scale policy, random weights")
        return bench_update(
            checkpoint,
            asked,
            trajectories,
            test.corpus,
            test.retriever,
            config.environment,
            dataclasses.replace(config.grpo, group_size=group, questions_per_step=questions),
            repeats=repeats,
            out_dir=out_dir,
            seed=config.seed,
            device=config.policy.device,
            name=name,
        )


def bench_update(
    checkpoint: str | Path,
    asked: Sequence[Question],
    trajectories: Sequence[Trajectory],
    corpus: Corpus,
    retriever: Retriever,
    environment: EnvironmentConfig,
    config: GRPOConfig,
    *,
    repeats: int = 3,
    out_dir: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    name: str = "",
) -> pd.DataFrame:
    """Update with each method in turn, `repeats` times after one that is not counted, and write `metrics.csv`,
    `config.json` and `update_speed.png` to `out_dir`.

    trajectories: `config.rows` of them, one per entry of `asked`, groups together. config: LoRA, KL, micro-batches,
    clipping and learning rate of both. name: what the table calls the checkpoint.

    Returns a row per method: seconds and `speedup` as `summarise`, loss, norm of the gradient, how far the loss lies
    from stock TRL's, and how far the whole gradient, as a share of its norm. Raises BenchmarkError before anything is
    run where stock TRL would fail (`bench_trl`), and, after writing, when loss or gradient is further than the
    tolerances; ValueError as `GRPOConfig.validate`.
    """
    config = dataclasses.replace(
        config,
        steps=1,
        updates_per_step=1,
        iterations=1,
        warmup_steps=0,
        normalisation="sequence",
        advantage="group",
        advantage_std=False,
        kl_clamp=1e9,  # stock TRL clamps nothing
        old_logprobs="trainer",
        resample_rounds=0,
        mask_broken=False,
        temperature=1.0,
        schedule="constant_with_warmup",
    )
    config.validate()
    blind = sum(not t.images for t in trajectories)
    if config.micro_batch_size <= blind < len(trajectories):
        raise BenchmarkError(
            f"stock TRL fails on a micro-batch without images beside others, and {blind} trajectories have none; "
            f"set grpo.micro_batch_size above that, it is {config.micro_batch_size}"
        )
    group = config.group_size
    rewards = [(i % group) / (group - 1) for i in range(len(trajectories))]
    rewarded = [t.with_rewards({"made_up": (r, 1.0)}) for t, r in zip(trajectories, rewards, strict=True)]
    turns: dict[str, list[Stopwatch]] = {STOCK: [], OURS: []}
    for turn in tqdm(range(repeats + 1), desc="updates", unit="turn", file=sys.stderr):
        settings = {"device": device, "dtype": "auto" if config.lora_rank else "float32"}
        agent = TransformersPolicy.from_pretrained(checkpoint, corpus, **settings)
        agent.suppressed_token_ids = ()
        model, processor = stock_model(checkpoint, agent)
        with tempfile.TemporaryDirectory(prefix="vrag-bench-") as folder:
            done = {
                STOCK: _update_stock(
                    model, processor, agent, asked, rewarded, corpus, retriever, environment, config, folder, seed
                ),
                OURS: _update_ours(agent, asked, rewarded, corpus, retriever, environment, config, folder, seed),
            }
        if turn:
            for method, one in done.items():
                turns[method].append(one.watch)
    rows = summarise(turns, PHASES)
    for row in rows:
        one, stock = done[row["method"]], done[STOCK]
        row |= {
            "loss": one.loss,
            "gradient_norm": one.norm,
            "loss_difference": abs(one.loss - stock.loss),
            "gradient_difference": float((one.gradient - stock.gradient).norm() / stock.gradient.norm()),
            "policy": name,
        }
    table = pd.DataFrame(rows)
    if out_dir is not None:
        about = {
            "grpo": dataclasses.asdict(config),
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "replies": sum(len(t.replies) for t in trajectories) / len(trajectories),
            "images": sum(len(t.images) for t in trajectories) / len(trajectories),
        }
        write_results(table, about, out_dir, seed, "update_speed.png", draw)
    loss, gradient = (float(table[f"{name}_difference"].max()) for name in ("loss", "gradient"))
    if not (loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE):
        raise BenchmarkError(f"the loss differs from stock TRL's by {loss:.2g}, the gradient by {gradient:.2%}")
    return table


def draw(table: pd.DataFrame) -> Figure:
    """The figure of a table of `bench_update`."""
    return phase_figure(table, PHASES)


class Replaying(grpo_trainer.AgentGRPOTrainer):
    """Our trainer on given trajectories in place of a rollout's."""

    given: list[Trajectory]

    def _sample(self, question_indices: list[int], step: int) -> tuple[list[Trajectory], list[Trajectory]]:
        with torch.no_grad():  # as a rollout would have: every image has been shown to the model
            for trajectory in self.given:
                example = training_batch.example_of(self.agent, trajectory)
                training_batch.token_logprobs(self.model, self.agent, [example])
        return self.given, self.given

    def _save_checkpoint(self, *_: Any, **__: Any) -> None:
        """Nothing is kept of an update that is only timed."""


def _update_ours(
    agent: TransformersPolicy,
    asked: Sequence[Question],
    trajectories: list[Trajectory],
    corpus: Corpus,
    retriever: Retriever,
    environment: EnvironmentConfig,
    config: GRPOConfig,
    folder: str | Path,
    seed: int,
) -> Updated:
    trainer = Replaying(
        agent,
        asked[:: config.group_size],
        corpus,
        retriever,
        config,
        Path(folder) / "ours",
        environment=environment,
        reward=lambda trajectory: trajectory,
        seed=seed,
    )
    trainer.given = trajectories
    trainer.start_run(trainer.folder, None, "update")
    watched = [
        (trainer, "_sample", UNCOUNTED),
        (grpo_trainer, "token_logprobs", _by_gradient),
        *image_places(trainer.model, agent.processor),
    ]
    return _train(trainer, watched, seed)


def _update_stock(
    model: Any,
    processor: Any,
    agent: TransformersPolicy,
    asked: Sequence[Question],
    trajectories: list[Trajectory],
    corpus: Corpus,
    retriever: Retriever,
    environment: EnvironmentConfig,
    config: GRPOConfig,
    folder: str | Path,
    seed: int,
) -> Updated:
    if config.freeze_vision:
        freeze_vision(model)
    trainer = stock_trainer(
        model,
        processor,
        asked[:: config.group_size],
        [t.total_reward for t in trajectories],
        corpus,
        retriever,
        environment,
        Path(folder) / "stock",
        peft_config=lora_config(config.lora_rank, config.lora_alpha, config.lora_targets),
        num_generations=config.group_size,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=len(asked) // config.micro_batch_size,
        loss_type="grpo",
        scale_rewards="none",
        beta=config.kl_coefficient,
        epsilon=config.clip_low,
        epsilon_high=config.clip_high,
        use_bias_correction_kl=False,  # TRL's default multiplies the KL by the ratio, which the paper does not
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.max_grad_norm,
        seed=seed,
    )
    recorded = _as_generated(agent, trajectories, corpus)
    trainer._generate = lambda prompts: recorded
    watched = [
        (trainer, "_get_per_token_logps_and_entropies", _by_gradient),
        *image_places(model, processor),
    ]
    return _train(trainer, watched, seed)


def _as_generated(agent: TransformersPolicy, trajectories: Sequence[Trajectory], corpus: Corpus) -> tuple[Any, ...]:
    """What TRL's `_generate` returns: ids of prompts and completions, which of the latter were sampled, messages,
    log-probs and further columns (none), all images and those of tools; each a list over the trajectories."""
    prompts, completions, sampled, messages, images = [], [], [], [], []
    for trajectory in trajectories:
        example = training_batch.example_of(agent, trajectory)
        first = example.turn_index.index(1)
        prompts.append(list(example.context.token_ids[:first]))
        completions.append(list(example.context.token_ids[first:]))
        sampled.append([int(trained) for trained in example.trained[first:]])
        messages.append([{"role": "assistant", "content": reply.text} for reply in trajectory.replies])
        images.append([image.render(corpus) for image in example.context.images])
    return prompts, completions, sampled, messages, None, {}, images, images


def _by_gradient(*_: Any, **__: Any) -> str:
    """The phase of log-probs: those of the reference are computed without gradient."""
    return "forward" if torch.is_grad_enabled() else "reference"


class _OptimizerClock(TrainerCallback):
    """Counts an optimizer's step, for which the Trainer has hooks and no function of its own; keeps its gradient."""

    gradient: torch.Tensor

    def __init__(self, watch: Stopwatch):
        self._watch, self._step = watch, ExitStack()

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        parts = [p.grad.detach().flatten().float().cpu() for p in model.parameters() if p.grad is not None]
        self.gradient = torch.cat(parts)
        self._step.enter_context(self._watch.phase("optimizer"))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._step.close()


def _train(trainer: Any, places: Sequence[Place], seed: int) -> Updated:
    """Run a trainer for its one step, from an adapter of noise."""
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise).to(parameter)
    watch = Stopwatch()
    clock = _OptimizerClock(watch)
    trainer.add_callback(clock)
    accelerator = trainer.accelerator
    with (
        watch.watching(
            (trainer, "training_step", OTHER), (accelerator, "clip_grad_norm_", "optimizer"), outermost=True
        ),
        watch.watching((trainer, "compute_loss", "forward"), (accelerator, "backward", "backward"), *places),
    ):
        trainer.train()
    row = next(row for row in trainer.state.log_history if "grad_norm" in row)
    return Updated(row["loss"], row["grad_norm"], clock.gradient, watch)
