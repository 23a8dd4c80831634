"""TRL's GRPOTrainer with this package's rollouts, advantages and log-probs. `grpo.train_grpo` runs it.

TRL 1.16 keeps: model, LoRA and reference set-up, processes (accelerate, FSDP, DeepSpeed), data loading, optimizer,
schedule, logging, checkpoints. Replaced are three hooks of the Hugging Face Trainer below it: `_prepare_inputs` (where
TRL generates), `compute_loss`, and the sampler of questions. TRL's own rollouts lose images that enter in
mid-trajectory, and stop a batch on a sampled image token.

One optimizer step, for a rollout of N trajectories in groups of G:

    rows of this process -> rollout -> trajectories -> reward -> all processes' trajectories -> advantages, loss weights
      -> log-probs under reference (and old policy) -> micro-batches -> loss = sum of weight x token loss -> step

The weights are those of the whole batch, so micro-batches can be sorted by length, and tokens that no gradient comes
from are left out of the forward pass.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vrag_lib.advantages import clip_objective, has_signal, is_clipped, k3_divergence, loss_weights
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Corpus, Question
from vrag_lib.grpo import (
    Credit,
    GRPOConfig,
    Reward,
    Sampler,
    group_rewards,
    is_broken,
    question_order,
    rollout_metrics,
    row_seed,
    step_advantages,
)
from vrag_lib.policy import Conversation, Policy, Reply
from vrag_lib.policy_transformers import TransformersPolicy
from vrag_lib.retrieval import Retriever
from vrag_lib.rollout import rollout
from vrag_lib.sharding import whole_weights
from vrag_lib.torch_setup import ensure_torchvision
from vrag_lib.training import RunFolder, freeze_vision, lora_config, on_one_card, process_count
from vrag_lib.training_batch import Example, UntrainableError, batched, empty_example, example_of, token_logprobs
from vrag_lib.trajectory import Trajectory, write_trajectories

ensure_torchvision()

import torch  # noqa: E402
import trl  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.autograd.graph import increment_version  # noqa: E402
from trl.trainer.utils import use_adapter  # noqa: E402


@dataclass
class Item:
    """One trajectory ready for the loss: n trained tokens with advantages (n,), their weight in the loss, and log-probs
    (n,) when sampled, under the old policy and the reference (None: not needed)."""

    example: Example
    advantages: torch.Tensor
    weight: float
    sampled: torch.Tensor
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None


class GuardedSampler:
    """A sampler whose replies with image placeholders become errors: in a context they would stand for an image that
    is not there, and the next forward pass over the batch would fail or, worse, mix up the images."""

    def __init__(self, sampler: Policy, forbidden: Sequence[int]):
        self.name, self.sampler, self.forbidden = sampler.name, sampler, frozenset(forbidden)

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]:
        replies = self.sampler.generate(conversations, seeds=seeds)
        error = Reply("", finish_reason="error", error="the sampler let image placeholders through; suppress them")
        return [error if self.forbidden.intersection(reply.token_ids or ()) else reply for reply in replies]


class QuestionSampler(torch.utils.data.Sampler):
    """Rows of the data loader for the whole run: for each rollout the rows of its questions, G of each, given out as
    often as TRL asks for the same rollout. The run is one epoch, so a resume only has to skip."""

    def __init__(self, order: Sequence[int], config: GRPOConfig, repeats: int):
        self.order, self.config, self.repeats = order, config, repeats

    def __len__(self) -> int:
        return len(self.order) * self.config.group_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        for questions in batched(self.order, self.config.questions_per_step):
            for _ in range(self.repeats):
                yield from (question for question in questions for _ in range(self.config.group_size))


class AgentGRPOTrainer(RunFolder, trl.GRPOTrainer):
    """GRPO of `policy`'s model; after construction the policy samples from the model under training."""

    def __init__(
        self,
        policy: TransformersPolicy,
        questions: Sequence[Question],
        corpus: Corpus,
        retriever: Retriever,
        config: GRPOConfig,
        folder: str | Path,
        *,
        environment: EnvironmentConfig,
        reward: Reward,
        credit: Credit | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
        preset: str = "",
        run_id: str = "grpo",
    ):
        if config.freeze_vision:
            freeze_vision(policy.model)
        self.agent, self.questions, self.corpus, self.retriever = policy, questions, corpus, retriever
        self.config, self.environment, self.folder = config, environment, Path(folder)
        self.reward, self.credit, self.sampler = reward, credit, sampler
        self.run = {"preset": preset, "run_id": run_id}
        rows = [{"prompt": question.query, "question": i} for i, question in enumerate(questions)]
        super().__init__(
            model=policy.model,
            reward_funcs=_unused_reward,
            args=on_one_card(_arguments(config, self.folder, seed, on_gpu=policy.model.device.type == "cuda")),
            train_dataset=Dataset.from_list(rows),
            processing_class=policy.processor,
            peft_config=lora_config(config.lora_rank, config.lora_alpha, config.lora_targets),
        )
        policy.model = self.accelerator.unwrap_model(self.model)
        self._micro_batches: list[list[Item]] = []
        self._row: dict[str, float] = {}
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._largest_gap = 0.0
        self._waited = 0.0

    def _get_train_sampler(self, dataset: Any = None) -> QuestionSampler:
        needed = self.config.steps * self.config.questions_per_step
        order = question_order(len(self.questions), needed, self.args.seed)
        return QuestionSampler(order, self.config, self.args.steps_per_generation * self.num_iterations)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        start, self._waited = time.perf_counter(), 0.0
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._sums["seconds_update"] += time.perf_counter() - start - self._waited
        return loss

    def _prepare_inputs(self, rows: list[dict[str, Any]]) -> dict[str, list[Item]]:
        """The micro-batch of this pass, after a rollout where one is due."""
        start = time.perf_counter()
        passes = self.args.steps_per_generation
        if self._step % (passes * self.num_iterations) == 0:
            self._micro_batches = self._collect([row["question"] for row in rows])
        self._waited = time.perf_counter() - start
        return {"items": self._micro_batches[self._step % passes]}

    def _collect(self, question_indices: list[int]) -> list[list[Item]]:
        """Rollout, rewards, advantages and fixed log-probs of this process's rows, cut into micro-batches."""
        step = self.state.global_step // (self.config.updates_per_step * self.config.iterations)
        if self.is_deepspeed_enabled:  # its optimizer changes weights unseen: what was made with the last ones is void
            increment_version(list(self.model.parameters()))
        with whole_weights(self.model):
            own, everyone = self._sample(question_indices, step)
        self.agent.context_cache.clear()  # its memory is the update's
        items, reasons = self._items(own, everyone)
        start = time.perf_counter()
        self._fix_logprobs(items)
        self._row["seconds_logprobs"] = time.perf_counter() - start
        self._row |= {"rollout": step + 1, **rollout_metrics(everyone, self.config.group_size)}
        self._row |= {f"untrained_{name}": float(count) for name, count in reasons.items()}
        if self.is_world_process_zero():
            write_trajectories(everyone, self.folder / "trajectories" / f"step_{step + 1:05d}.parquet")
        per_update = len(items) // self.config.updates_per_step
        size = self.args.per_device_train_batch_size
        return [batch for update in batched(items, per_update) for batch in _micro_batches(update, size)]

    def _sample(self, question_indices: list[int], step: int) -> tuple[list[Trajectory], list[Trajectory]]:
        """Trajectories with rewards: of this process's rows, and of all processes' in order of their rows."""
        chosen = list(question_indices)
        first = self.accelerator.process_index * len(chosen)
        trajectories = self._roll(chosen, list(range(first, first + len(chosen))), step, attempt=0)
        everyone = gather_object(trajectories)
        for attempt in range(1, self.config.resample_rounds + 1):
            dull = ~has_signal(group_rewards(everyone), self.config.group_size)
            if not dull.any():
                break
            order = np.random.default_rng([self.args.seed, step, attempt]).integers(len(self.questions), size=len(dull))
            again = [i for i in range(len(chosen)) if dull[(first + i) // self.config.group_size]]
            for i in again:
                chosen[i] = int(order[(first + i) // self.config.group_size])
            fresh = self._roll([chosen[i] for i in again], [first + i for i in again], step, attempt)
            for i, trajectory in zip(again, fresh, strict=True):
                trajectories[i] = trajectory
            everyone = gather_object(trajectories)
            self._row["groups_resampled"] = self._row.get("groups_resampled", 0.0) + float(dull.sum())
        return trajectories, everyone

    def _roll(self, question_indices: list[int], rows: list[int], step: int, attempt: int) -> list[Trajectory]:
        start = time.perf_counter()
        sampler = self.agent if self.sampler is None else self.sampler(self.agent)
        self._sums["seconds_synchronise"] += time.perf_counter() - start
        trajectories = rollout(
            GuardedSampler(sampler, self.agent.suppressed_token_ids),
            [self.questions[i] for i in question_indices],
            self.corpus,
            self.retriever,
            self.environment,
            seeds=[row_seed(self.args.seed, step, row, attempt) for row in rows],
            batch_size=self.config.rollout_batch_size,
            max_sampled_tokens=self.config.max_sampled_tokens,
            **self.run,
        )
        if rest := getattr(self.sampler, "rest", None):
            rest()
        for phase in ("generate", "retrieve"):
            self._sums[f"seconds_{phase}"] += sum(t.timings[phase] for t in trajectories)
        start = time.perf_counter()
        many = getattr(self.reward, "many", None)  # a model judge answers many questions at once
        rewarded = many(trajectories) if many else [self.reward(trajectory) for trajectory in trajectories]
        self._sums["seconds_judge"] += time.perf_counter() - start
        return rewarded

    def _items(self, own: list[Trajectory], everyone: list[Trajectory]) -> tuple[list[Item], Counter[str]]:
        """Items of this process's trajectories, and why trajectories of any process are not trained on."""
        examples = [self._example(trajectory) for trajectory in own]
        lengths = gather_object([0 if isinstance(e, str) else len(e.positions) for e in examples])
        reasons = Counter(gather_object([e if isinstance(e, str) else "" for e in examples]))
        weights = loss_weights(lengths, self.config.normalisation, self.config.constant_length)
        advantages = step_advantages(everyone, self.config, self.credit)
        first = self.accelerator.process_index * len(own)
        items = []
        for i, example in enumerate(examples, start=first):
            if isinstance(example, str):
                example = empty_example(self.agent)
            positions = example.positions
            values = advantages[i]([example.turn_index[p] for p in positions])
            sampled = torch.tensor([example.logprobs[p] for p in positions], dtype=torch.float32)
            tensor = torch.tensor(values, dtype=torch.float32)
            items.append(Item(example, tensor, float(weights[i]) * self.config.updates_per_step, sampled))
        del reasons[""]
        return items, reasons

    def _example(self, trajectory: Trajectory) -> Example | str:
        """The trajectory's tokens, or why it is not trained on."""
        if self.config.mask_broken and is_broken(trajectory):
            return "broken"
        try:
            return example_of(self.agent, trajectory)
        except UntrainableError as error:
            return error.reason

    def _fix_logprobs(self, items: list[Item]) -> None:
        """Log-probs that stay fixed while a rollout is trained on: under the reference and, where the policy changes
        before all of it is used, under the policy that began."""
        off_policy = self.config.updates_per_step * self.config.iterations > 1
        wanted = sorted(filter(self._has_gradient, items), key=lambda item: len(item.example.trained))
        batches = batched(wanted, self.args.per_device_train_batch_size)
        if self.config.old_logprobs == "sampler":
            for item in wanted:
                item.old = item.sampled
        elif off_policy:
            with whole_weights(self.model):
                for batch in batches:
                    for item, logprobs in zip(batch, self._logprobs(self.model, batch), strict=True):
                        item.old = logprobs
        if self.config.kl_coefficient:
            with whole_weights(self.ref_model or self.model):  # of one model at a time: both would be twice the memory
                for batch in batches:
                    for item, logprobs in zip(batch, self._reference_logprobs(batch), strict=True):
                        item.reference = logprobs

    def _reference_logprobs(self, items: list[Item]) -> list[torch.Tensor]:
        if self.ref_model is not None:
            return self._logprobs(self.ref_model, items)
        with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
            return self._logprobs(self.model, items)

    def _logprobs(self, model: Any, items: list[Item]) -> list[torch.Tensor]:
        with torch.no_grad(), self.compute_loss_context_manager():
            logprobs, _ = token_logprobs(model, self.agent, [item.example for item in items])
        return list(logprobs.cpu().split([len(item.advantages) for item in items]))

    def _has_gradient(self, item: Item) -> bool:
        return item.weight > 0 and (self.config.kl_coefficient > 0 or bool(item.advantages.any()))

    def compute_loss(
        self, model: Any, inputs: dict[str, list[Item]], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Sum over the micro-batch's tokens of weight x (- clipped objective + KL coefficient x KL); equations in
        `advantages`. Times the number of processes, because gradients are averaged over them."""
        items = [item for item in inputs["items"] if self._has_gradient(item)]
        config = self.config
        examples = [item.example for item in items] or [empty_example(self.agent)]
        logprobs, entropy = token_logprobs(model, self.agent, examples)  # (n,), (n,)
        if not items:
            return logprobs.sum()
        device = logprobs.device
        now = logprobs.detach()
        advantages = torch.cat([item.advantages for item in items]).to(device)
        weights = torch.cat([torch.full_like(item.advantages, item.weight) for item in items]).to(device)
        sampled = torch.cat([item.sampled for item in items]).to(device)
        old = now if items[0].old is None else torch.cat([item.old for item in items]).to(device)
        ratio = (logprobs - old).clip(-20.0, 20.0).exp()
        loss = -clip_objective(ratio, advantages, config.clip_low, config.clip_high)
        if config.kl_coefficient:
            divergence = k3_divergence(logprobs, torch.cat([i.reference for i in items]).to(device), config.kl_clamp)
            loss = loss + config.kl_coefficient * divergence
            self._sums["kl"] += float(divergence.detach().sum())
        clipped = is_clipped(ratio.detach(), advantages, config.clip_low, config.clip_high)
        gap = (now - sampled).abs()
        self._sums["tokens"] += len(now)
        for name, values in {
            "entropy": entropy,
            "clip_fraction": clipped,
            "advantage": advantages,
            "advantage_squared": advantages.square(),
            "sampler_gap": gap,
        }.items():
            self._sums[name] += float(values.sum())
        self._largest_gap = max(self._largest_gap, float(gap.max()))
        return (weights * loss).sum() * self.accelerator.num_processes

    def step_metrics(self) -> dict[str, float]:
        """The row of an optimizer step: rollout metrics where it began with one, means over the trained tokens of all
        processes, seconds of the slowest process per phase."""
        everyone = gather_object([(dict(self._sums), self._largest_gap)])
        if not self._sums and not self._row:
            return {}  # the summary at the end of a run

        def over_processes(function: Callable[[list[float]], float], name: str) -> float:
            return function([sums.get(name, 0.0) for sums, _ in everyone])

        tokens = max(over_processes(sum, "tokens"), 1)
        means = ("kl", "entropy", "clip_fraction", "sampler_gap", "advantage", "advantage_squared")
        row = self._row | {name: over_processes(sum, name) / tokens for name in means}
        row["advantage_deviation"] = max(row.pop("advantage_squared") - row.pop("advantage") ** 2, 0.0) ** 0.5
        row["sampler_gap_max"] = max(gap for _, gap in everyone)
        row["trained_tokens"] = over_processes(sum, "tokens")
        for phase in ("generate", "retrieve", "judge", "synchronise", "update"):
            row[f"seconds_{phase}"] = over_processes(max, f"seconds_{phase}")
        if "sampled_tokens" in row and row["seconds_generate"] > 0:
            row["tokens_per_second"] = row["sampled_tokens"] * self.config.rows / row["seconds_generate"]
        self._row, self._sums, self._largest_gap = {}, defaultdict(float), 0.0
        return row


def _micro_batches(items: list[Item], size: int) -> list[list[Item]]:
    """Micro-batches of one optimizer step, similar lengths together."""
    return batched(sorted(items, key=lambda item: len(item.example.trained)), size)


def _unused_reward(**_: Any) -> list[float]:
    raise RuntimeError("TRL's reward path is not in use: rewards are read off the trajectory record")


def _arguments(config: GRPOConfig, folder: Path, seed: int, on_gpu: bool) -> trl.GRPOConfig:
    """The settings as TRL's. Sampling, rewards, advantages and loss have none there: they are not TRL's."""
    passes = config.rows // (config.micro_batch_size * process_count())
    updates = config.updates_per_step * config.iterations
    return trl.GRPOConfig(
        output_dir=str(folder),
        max_steps=config.steps * updates,
        num_generations=config.group_size,
        num_iterations=config.iterations,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=passes // config.updates_per_step,
        steps_per_generation=passes,
        beta=config.kl_coefficient,  # only whether TRL loads a reference when there is no adapter to switch off
        temperature=config.temperature,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=False,  # the trainer's forward pass is the sampler's: weights as loaded, no autocast
        use_cpu=not on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps * updates,  # between two rollouts, where nothing but the state is carried over
        save_total_limit=config.keep_checkpoints,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
