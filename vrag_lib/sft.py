"""Supervised fine-tuning on trajectories (the cold start, paper §2.2, Table 5), on TRL's SFTTrainer.

Deviations from the paper's LLaMA-Factory run: no conversation is written out and tokenised again. A trajectory is
encoded by the very function that rollouts sample from, images come at their shown sizes, and the loss is on the tokens
of replies alone. A reply ends with its closing action tag, because that is where rollouts stop sampling; the
`<|im_end|>` behind it is put there by the environment and is not trained on.
"""

from __future__ import annotations

import html
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.config import SFTConfig
from vrag_lib.corpus import Corpus
from vrag_lib.policy_transformers import TransformersPolicy
from vrag_lib.torch_setup import ensure_torchvision, keep_freed_memory
from vrag_lib.training import RunFolder, freeze_vision, last_checkpoint, lora_config, on_one_card, process_count
from vrag_lib.training_batch import Example, UntrainableError, batched, example_of
from vrag_lib.trajectory import Trajectory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_IMAGE = "<|image_pad|>"
_IMAGE_RUN = re.compile(r"(?:<\|image_pad\|>)+")

IGNORED = -100
"""Label of a token that is not trained on."""


@dataclass(frozen=True)
class SFTData:
    """Trajectories made ready: examples, and how many were left out by reason."""

    examples: tuple[Example, ...]
    left_out: dict[str, int]


def prepare(
    policy: TransformersPolicy, trajectories: Sequence[Trajectory], config: SFTConfig, corpus: Corpus
) -> SFTData:
    """Encode trajectories; those that cannot be trained on are left out and counted: `no_reply`, `image_token`,
    `too_long`, `nothing_trained` (no valid reply), `unknown_page` (an image of a page that the corpus does not hold),
    `other_tokenizer` (recorded ids that do not spell the recorded text)."""
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    known = set(corpus.page_ids)
    for trajectory in trajectories:
        try:
            examples.append(_prepare_one(policy, trajectory, config, known))
        except UntrainableError as error:
            left_out[error.reason] += 1
            logger.info("%s", error)
    return SFTData(tuple(examples), dict(left_out))


def _prepare_one(
    policy: TransformersPolicy, trajectory: Trajectory, config: SFTConfig, known_pages: set[str]
) -> Example:
    for image in trajectory.images:
        if image.page_id not in known_pages:
            raise UntrainableError(
                "unknown_page", f"trajectory {trajectory.id} shows page {image.page_id!r}, unknown here"
            )
    for i, turn in enumerate(trajectory.replies):
        if turn.token_ids is not None and not policy.tokenizer.decode(turn.token_ids).startswith(turn.text):
            raise UntrainableError(
                "other_tokenizer", f"token ids of reply {i} of {trajectory.id} do not spell its text"
            )
    example = example_of(policy, trajectory, valid_only=not config.train_invalid)
    if len(example.trained) > config.max_tokens:
        raise UntrainableError("too_long", f"trajectory {trajectory.id} has {len(example.trained)} tokens")
    if not any(example.trained):
        raise UntrainableError("nothing_trained", f"trajectory {trajectory.id} has no valid reply")
    return example


def collate(policy: TransformersPolicy, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """One left-padded batch: `model_inputs` and labels (B, T), the token itself where trained, else IGNORED."""
    import torch

    inputs = policy.model_inputs([example.context for example in examples])
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for row, example in enumerate(examples):
        trained = torch.tensor(example.trained, device=labels.device)
        tail = slice(labels.shape[1] - len(trained), None)
        labels[row, tail] = inputs["input_ids"][row, tail].where(trained, IGNORED)
    return inputs | {"labels": labels}


class ShuffledBatches:
    """Indices of the examples, shuffled anew each epoch; those of one optimizer step from short to long, so that
    micro-batches hold little padding and the step learns from what it would have learnt from anyway.

    >>> order = list(ShuffledBatches([5, 1, 4, 2], batch_size=2, seed=0))
    >>> sorted(order), order
    ([0, 1, 2, 3], [2, 0, 1, 3])
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before an epoch, also before one that it resumes in."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths)).tolist()
        for batch in batched(order, self.batch_size):
            yield from sorted(batch, key=lambda i: self.lengths[i])


def loss_mask_html(policy: TransformersPolicy, example: Example) -> str:
    """The tokens of an example as HTML, those that are trained on coloured, runs of image tokens counted. Every text is
    escaped: a document or a model wrote it."""
    parts: list[str] = []
    spans = groupby(zip(example.context.token_ids, example.trained, strict=True), key=lambda pair: pair[1])
    for trained, pairs in spans:
        text = policy.tokenizer.decode([token for token, _ in pairs])
        text = _IMAGE_RUN.sub(lambda run: f"[{len(run[0]) // len(_IMAGE)} image tokens]", text)
        text = html.escape(text).replace("\n", "↵<br>")
        parts.append(f'<mark style="background:#c6f6d5">{text}</mark>' if trained else f"<span>{text}</span>")
    return f'<div style="font-family:monospace;line-height:1.6;overflow-wrap:anywhere">{"".join(parts)}</div>'


def train_sft(
    checkpoint: str | Path,
    trajectories: Sequence[Trajectory],
    corpus: Corpus,
    config: SFTConfig,
    folder: str | Path,
    *,
    validation: Sequence[Trajectory] = (),
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Fine-tune a checkpoint and return `folder/final`: a checkpoint in the precision of the first (by several
    processes: as trained), or with LoRA an adapter (see `vrag merge`).

    `folder/metrics.csv` gets a row per step: loss, mean_token_accuracy, entropy, grad_norm, learning_rate and, if there
    is validation data, eval_loss and eval_mean_token_accuracy every `save_steps`. A run that was killed goes on from
    its last complete checkpoint when called again, and ends with the same weights as if it had never stopped.

    Raises ValueError when no trajectory can be trained on, or a batch is no whole number of micro-batches.
    """
    ensure_torchvision()
    from transformers import set_seed

    set_seed(seed)
    dtype = "auto" if config.lora_rank else "float32"  # in bfloat16 small updates of full weights would be rounded away
    policy = TransformersPolicy.from_pretrained(checkpoint, corpus, device=device, dtype=dtype)
    data = prepare(policy, trajectories, config, corpus)
    held_out = prepare(policy, validation, config, corpus)
    if not data.examples:
        raise ValueError(f"none of {len(trajectories)} trajectories can be trained on: {data.left_out}")
    if data.left_out:
        logger.warning(
            "%d of %d trajectories left out: %s", sum(data.left_out.values()), len(trajectories), data.left_out
        )
    if config.freeze_vision:
        freeze_vision(policy.model)
    keep_freed_memory()
    trainer = _trainer(policy, data.examples, held_out.examples, config, Path(folder), seed)
    resume = last_checkpoint(folder)
    trainer.start_run(folder, resume, "fine-tuning")
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    final = Path(folder) / "final"
    if not config.lora_rank and process_count() == 1:
        from transformers import AutoConfig

        # Trained in float32, kept in the precision it came in, as the runs that start from it would load it anyway.
        policy.model.to(AutoConfig.from_pretrained(checkpoint).dtype or policy.model.dtype)
    trainer.save_model(str(final))
    return final


def _trainer(
    policy: TransformersPolicy,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    config: SFTConfig,
    folder: Path,
    seed: int,
) -> Any:
    import trl
    from datasets import Dataset

    class Trainer(RunFolder, trl.SFTTrainer):
        """TRL's trainer with this package's checkpoints, curves and order of examples."""

        def _get_train_sampler(self, dataset: Any = None) -> ShuffledBatches:
            return ShuffledBatches([len(example.trained) for example in examples], config.batch_size, seed)

    per_pass = config.micro_batch_size * process_count()
    if config.batch_size % per_pass:
        raise ValueError(f"batch_size={config.batch_size} is not a multiple of the {per_pass} of one pass")
    on_gpu = policy.model.device.type == "cuda"
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // per_pass,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=on_gpu and not config.lora_rank,
        use_cpu=not on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if held_out else "no",
        eval_steps=config.save_steps,
        save_steps=config.save_steps,
        save_total_limit=config.keep_checkpoints,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    everything = [*examples, *held_out]
    trainer = Trainer(
        model=policy.model,
        args=on_one_card(arguments),
        train_dataset=Dataset.from_dict({"example": range(len(examples))}),
        eval_dataset=Dataset.from_dict({"example": range(len(examples), len(everything))}) if held_out else None,
        data_collator=lambda rows: collate(policy, [everything[row["example"]] for row in rows]),
        processing_class=policy.processor,
        peft_config=lora_config(config.lora_rank, config.lora_alpha, config.lora_targets),
    )
    # Lets TRL divide by the trained tokens of the whole batch. Qwen2.5-VL says it cannot, which is about a loss of its
    # own that TRL does not use; each micro-batch would be averaged by itself, and short ones would count for more.
    trainer.model_accepts_loss_kwargs = True
    return trainer
