"""Train the scale policy from nothing (`vrag scale-model`): it learns to perceive, and nothing of the agent's task.

Not part of the paper, whose models come trained. Five stages, each resumable, each a function of seed and settings:

1. dense: the vision tower learns to tell, cell by cell, characters on pages of random text and, on MiniDocs training
   pages and parts of them, characters, words and the boxes of what words name (`scale_cells`);
2. reading: the language model, beginning with what the tower tells of words and boxes (`scale_matching`), learns to
   read, find and name things on MiniDocs training pages, crops and cut-outs through the fixed tower, some of its heads
   shown where to look (`gaze_losses`);
3. joint: everything together at a falling rate, naming characters, words and boxes going on beside it;
4. copying: the language model learns what every other one can, to write words of a question again, while it goes on
   reading through the fixed tower;
5. conversing: the same in conversations, where texts are asked about before images, and images follow one another.

Where pages of text can be read whole (`MiniDocsConfig.text_px`), two more:

6. sharpening: the tower alone, as in the first stage, with many more cells in each step;
7. finishing: everything together on everything, text quoted from pages among it.

Trained on documents of the training split only, which are drawn on the spot and never repeat; the validation split
draws the curves; the test split is used by `scale_evaluate` alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.minidocs_documents import MiniDocsConfig
from vrag_lib.scale_cells import Cells, cell_batch, cell_heads, cell_loss, slot_loss
from vrag_lib.scale_characters import BINS, CHARACTERS, GRIDS, SLOTS, draw_character_page
from vrag_lib.scale_loop import Counts, Schedule, Tally, process_rank, train, wait_for_all
from vrag_lib.scale_matching import begin_with_codes, begin_with_copying
from vrag_lib.scale_policy import build_model, build_processor
from vrag_lib.scale_reading import Batch, float32_attention, make_batch, naming_loss, reading_loss
from vrag_lib.scale_tasks import MIX, Sample, draw_samples
from vrag_lib.scale_vision import Images, OnDevice, arrange, encode_images, patchify
from vrag_lib.torch_setup import ensure_torchvision, keep_freed_memory

if TYPE_CHECKING:
    import torch

READING_MIX = {"whole": 1.0, "several": 0.7, "crop": 2.5, "close": 2.0}
JOINT_MIX = {"whole": 1.0, "several": 0.7, "crop": 2.5, "close": 0.5}
COPYING_MIX = {"whole": 0.7, "several": 0.5, "crop": 1.5, "close": 0.5, "language": 3.0}
CONVERSING_MIX = {"whole": 0.4, "several": 0.2, "crop": 0.7, "close": 0.2, "language": 1.5, "conversation": 1.8}
FINISHING_MIX = {
    "whole": 1.5, "several": 0.3, "crop": 2.5, "close": 0.3, "language": 0.4, "quoted": 0.6, "conversation": 0.6,
}  # fmt: skip
MIXES = {
    "reading": READING_MIX, "joint": JOINT_MIX, "copying": COPYING_MIX, "conversing": CONVERSING_MIX,
    "finishing": FINISHING_MIX,
}  # fmt: skip
"""Samples per page while the language model learns to read, while all is trained, while it learns to copy and to
converse, and in the end."""

KINDS = {"sharpening": (0.5, 0.3, 0.2), "finishing": (0.5, 0.3, 0.2)}
"""How often stages draw pages of any kind, of text and of cards; the others draw any."""

WIDER = {
    "sharpening": {"cells_per_step": 2.5, "cell_pages_per_step": 2},
    "finishing": {"pages_per_step": 1.5, "parts_per_step": 1.5},
}
"""Sizes of steps that are larger in a stage than the recipe says, and how many times."""

NAMING_PAGES = 4
"""Pages whose words are looked for in each step of reading."""

GUIDANCE, NAMING_WEIGHT, DENSE_WEIGHT = 0.2, 0.2, 0.3
"""Weights, beside the loss proper, of showing heads where to look, of looking for words and, in the last stage, of the
dense losses."""

EM_RANGE = (10, 44)
"""Em heights of the pages of random text, shown pixels: from labels on whole pages to sentences in crops."""

SHARPENING_EMS = (11, 30)
"""The same in the last two stages."""

EASY_EM = 20
"""Least em height at the start of the dense stage; it falls to `EM_RANGE[0]` in the first half."""

RANDOM_SHARE = 0.3
"""Share of the dense stage that sees random text alone, and half as much again of it."""

HELD_OUT_CELLS = 1150
"""Cells of each of the three batches of random text that the dense stage is measured on at each size."""

HELD_OUT_BATCHES = 10
"""Batches that draw the validation curves."""

HELD_OUT_EMS = ((10, 13), (14, 20), (20, 32))
"""Em heights at which the dense stage is measured: labels on pages, figures in crops, titles in crops."""


def character_head(width: int) -> torch.nn.Linear:
    """Predicts, from one cell's feature, a class for each slot and each bin."""
    import torch

    return torch.nn.Linear(width, (SLOTS + BINS[0] * BINS[1]) * (len(CHARACTERS) + 1))


def em_range(done: float) -> tuple[float, float]:
    """Em heights of pages of random text when a share `done` of the dense stage is over.

    >>> em_range(0), em_range(0.25), em_range(0.8)
    ((20, 44), (15.0, 44), (10, 44))
    """
    least, most = EM_RANGE
    return max(least, EASY_EM - 2 * done * (EASY_EM - least)), most


@dataclass(frozen=True)
class Characters(OnDevice):
    """Pages of random text as one batch: slots (cells, SLOTS) and cover (cells, 8) are their targets."""

    images: Images
    slots: torch.Tensor
    cover: torch.Tensor


def character_batch(rng: random.Random, em_range: tuple[float, float], cells: int) -> Characters:
    """As many pages of one shape as hold `cells` cells."""
    import torch

    rows, columns = rng.choice(GRIDS)
    count = max(1, cells // (rows * columns))
    pages = [draw_character_page(rng, rows, columns, em_range) for _ in range(count)]
    images = arrange(np.concatenate([patchify(page.image) for page in pages]), [(rows, columns)] * count)
    slots = torch.from_numpy(np.stack([page.slots for page in pages])).view(-1, SLOTS)
    cover = torch.from_numpy(np.stack([page.cover for page in pages])).view(-1, BINS[0] * BINS[1])
    return Characters(images, slots, cover)


def character_loss(visual: Any, head: Any, batch: Characters) -> tuple[torch.Tensor, Counts]:
    """Cross-entropy of slots and bins."""
    import torch
    from torch.nn import functional as F

    features = encode_images(visual, batch.images).float()
    logits = head(features).view(len(features), -1, len(CHARACTERS) + 1)
    slots, counts = slot_loss(logits[:, :SLOTS], batch.slots)
    cover_weights = torch.where(batch.cover > 0, 1.0, 0.2)
    losses = F.cross_entropy(logits[:, SLOTS:].transpose(1, 2), batch.cover, reduction="none")
    return slots + 0.5 * (losses * cover_weights).sum() / cover_weights.sum(), counts


DenseBatch = tuple[Characters, Cells | None]


@dataclass(frozen=True)
class Trained:
    """What the stages train: the policy, its tokenizer, and the linear readings of cells that only training needs."""

    model: Any
    tokenizer: Any
    characters: Any
    cells: Any

    @classmethod
    def new(cls, tokenizer: Any, seed: int, device: str) -> Trained:
        """Everything with random weights."""
        import torch

        model = build_model(tokenizer, seed).train().to(device)
        width = model.config.vision_config.out_hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = character_head(width), cell_heads(width, len(tokenizer))
        return cls(model, tokenizer, *(head.to(device) for head in heads))

    def dense_batch(self, rng: random.Random, done: float, recipe: PolicyTraining, stage: str = "dense") -> DenseBatch:
        """Data for when a share `done` of the dense stage is over: random text alone, then MiniDocs pages too; in the
        last two stages always both."""
        last = stage in KINDS
        if done < RANDOM_SHARE and not last:
            return character_batch(rng, em_range(done), recipe.cells_per_step * 3 // 2), None
        cells = cell_batch(
            rng, self.tokenizer, recipe.minidocs, recipe.cell_pages_per_step, shares=KINDS.get(stage, ())
        )
        return character_batch(rng, SHARPENING_EMS if last else em_range(done), recipe.cells_per_step), cells

    def dense_loss(self, batch: DenseBatch, device: str) -> tuple[torch.Tensor, Counts]:
        """Of characters on random pages and of everything on MiniDocs pages."""
        visual = self.model.model.visual
        loss, counts = character_loss(visual, self.characters, batch[0].to(device))
        counts = {f"random {kind}": count for kind, count in counts.items()}
        if batch[1] is None:
            return loss, counts
        of_cells, more = cell_loss(visual, self.cells, batch[1].to(device))
        return loss + of_cells, {**counts, **more}


def dense_stage(
    name: str, trained: Trained, recipe: PolicyTraining, folder: Path, curve: Path, device: str, workers: int
) -> None:
    """Stages 1 and 6, `dense` and `sharpening`: the vision tower learns to tell what every cell shows."""
    import torch

    schedule, seed, visual = getattr(recipe, name), recipe.seed, trained.model.model.visual
    random_pages = {
        em: [
            character_batch(random.Random(f"{seed}/held out/{em[0]}/{i}"), em, HELD_OUT_CELLS).to(device)
            for i in range(3)
        ]
        for em in HELD_OUT_EMS
    }
    pages = [
        cell_batch(random.Random(f"{seed}/held out cells/{i}"), trained.tokenizer, recipe.minidocs, 4, "validation").to(
            device
        )
        for i in range(HELD_OUT_BATCHES)
    ]

    def batch_of_step(number: int) -> DenseBatch:
        rng = random.Random(f"{seed}/{name}/{number}")
        return trained.dense_batch(rng, number / process_rank()[1] / schedule.steps, recipe, name)

    def loss_of_batch(batch: DenseBatch) -> tuple[torch.Tensor, Counts]:
        with recipe.autocast(device) if name == "sharpening" else nullcontext():
            return trained.dense_loss(batch, device)

    def evaluate() -> dict[str, float]:
        tally = Tally()
        with torch.no_grad():
            for (low, high), batches in random_pages.items():
                for batch in batches:
                    counts = character_loss(visual, trained.characters, batch)[1]
                    tally.add({f"held out em {low}-{high} {metric}": count for metric, count in counts.items()})
            for page in pages:
                counts = cell_loss(visual, trained.cells, page)[1]
                tally.add({f"validation {kind}": count for kind, count in counts.items()})
        return tally.rates()

    modules = {"visual": visual, "characters": trained.characters, "cells": trained.cells}
    train(name, modules, batch_of_step, loss_of_batch, schedule, folder, curve, evaluate, 400, workers)


def reading_stage(
    name: str, trained: Trained, recipe: PolicyTraining, folder: Path, curve: Path, device: str, workers: int
) -> None:
    """Stages 2 to 5, `reading`, `joint`, `copying`, `conversing`, and 7, `finishing`: titles, text, places and values
    on MiniDocs training pages, and from `copying` on words of the questions. In `joint` and `finishing` everything is
    trained, and the dense stage's losses go on beside; in the others the tower stays as it is."""
    import torch

    config, model, tokenizer = recipe.minidocs, trained.model, trained.tokenizer
    schedule, seed, joint = getattr(recipe, name), recipe.seed, name in ("joint", "finishing")
    mix, kinds = MIXES[name], KINDS.get(name, ())
    seen = MIX | ({"quoted": 1} if "quoted" in mix else {})
    held_out = [
        make_batch(tokenizer, draw_samples(random.Random(f"{seed}/held out/{i}"), "validation", 3, config, seen, kinds))
        for i in range(HELD_OUT_BATCHES)
    ]
    held_out = [batch.to(device) for batch in held_out]
    model.model.visual.requires_grad_(joint)
    if name == "reading":
        begin_with_codes(model, tokenizer, trained.cells)
    if name == "copying":
        begin_with_copying(model)

    def batch_of_step(number: int) -> tuple[list[Batch], Batch, DenseBatch | None]:
        rng = random.Random(f"{seed}/{name}/{number}")
        samples = draw_samples(rng, "train", recipe.pages_per_step, config, mix, kinds)
        parts = [make_batch(tokenizer, part) for part in parts_of(samples, recipe.parts_per_step)]
        words = make_batch(tokenizer, draw_samples(rng, "train", NAMING_PAGES, config, {"naming": 1}))
        return parts, words, trained.dense_batch(rng, 1.0, recipe, name) if joint else None

    def loss_of_batch(batch: tuple[list[Batch], Batch, DenseBatch | None]) -> tuple[torch.Tensor, Counts]:
        parts, words, dense = batch
        losses, tally = [], Tally()
        with recipe.autocast(device):
            for part in parts:
                loss, counts = reading_loss(model, part.to(device), joint, GUIDANCE)
                losses.append(loss / len(parts))
                tally.add(counts)
            loss, counts = naming_loss(model, words.to(device))
            losses.append(NAMING_WEIGHT * loss)
            tally.add(counts)
            if dense is not None:
                loss, counts = trained.dense_loss(dense, device)
                losses.append(DENSE_WEIGHT * loss)
                tally.add(counts)
        return torch.stack(losses).sum(), tally.counts()

    def evaluate() -> dict[str, float]:
        tally = Tally()
        with torch.no_grad():
            for batch in held_out:
                loss, counts = reading_loss(model, batch, train_tower=False)
                tally.add({**counts, "loss": (loss, 1.0)})
        return {f"validation {kind}": rate for kind, rate in sorted(tally.rates().items())}

    modules = {"model": model} | ({"characters": trained.characters, "cells": trained.cells} if joint else {})
    with float32_attention(model.model.language_model) if device == "cpu" else nullcontext():
        train(name, modules, batch_of_step, loss_of_batch, schedule, folder, curve, evaluate, 200, workers)


def parts_of(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """The samples of a step in at most `count` parts of equal numbers. Similar lengths stand together, which pads
    less; those without images stand last, beside long ones that have some, for every part needs an image."""
    ordered = sorted(samples, key=lambda sample: (not sample.images, sample.size))
    cuts = [len(ordered) * i // count for i in range(count + 1)]
    return [ordered[start:end] for start, end in pairwise(cuts) if start < end]


STAGES = ("dense", "reading", "joint", "copying", "conversing")
LEGIBLE_STAGES = (*STAGES, "sharpening", "finishing")
"""What the policy goes through, and where pages of text can be read whole."""

SECONDS_PER_STEP = {
    "dense": 0.33, "reading": 0.65, "joint": 1.4, "copying": 0.65, "conversing": 2.2, "sharpening": 1.0,
    "finishing": 3.6,
}  # fmt: skip
"""Seconds of one step of every stage of the small recipe on one core of a 2024 server with bfloat16 instructions, the
other core as busy. (An EPYC of 2017 takes some three times as long.) `conversing` was timed on one of two hardware
threads of such a core, the other busy, the last two on a Zen 4 core."""


DENSE = Schedule(steps=5600, muon=4e-3, adamw=3e-3)
READING = Schedule(steps=3900, muon=0, adamw=1.5e-3, decay=0.3)
JOINT = Schedule(steps=800, muon=5e-4, adamw=1e-3, decay=0.9)
COPYING = Schedule(steps=1000, muon=0, adamw=7e-4, decay=0.6)
CONVERSING = Schedule(steps=900, muon=0, adamw=7e-4, decay=0.6)
SHARPENING = Schedule(steps=2400, muon=2.5e-3, adamw=2e-3, warmup=100, decay=0.8)
FINISHING = Schedule(steps=800, muon=4e-4, adamw=5e-4, decay=0.95)


@dataclass(frozen=True)
class PolicyTraining:
    """The recipe: optimizer steps and learning rates of the stages, the collection whose pages are drawn, cells of
    random text and MiniDocs pages per step of the dense stage, MiniDocs pages per step of reading (each gives several
    samples), how many batches, one after the other, a step's samples are divided into, and whether the language model's
    matrix products run in bfloat16 where the processor can."""

    seed: int = 0
    dense: Schedule = DENSE
    reading: Schedule = READING
    joint: Schedule = JOINT
    copying: Schedule = COPYING
    conversing: Schedule = CONVERSING
    sharpening: Schedule = SHARPENING
    finishing: Schedule = FINISHING
    minidocs: MiniDocsConfig = field(default_factory=MiniDocsConfig)
    cells_per_step: int = 200
    cell_pages_per_step: int = 2
    pages_per_step: int = 2
    parts_per_step: int = 2
    bfloat16: bool = True

    @property
    def name(self) -> str:
        """What it makes: `policy`, or `policy_legible` where pages of text can be read whole."""
        return "policy" if self.minidocs.text_px is None else "policy_legible"

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of its stages, in order."""
        return STAGES if self.name == "policy" else LEGIBLE_STAGES

    def in_stage(self, name: str) -> PolicyTraining:
        """The recipe with the sizes of a stage's steps (`WIDER`).

        >>> PolicyTraining().in_stage("sharpening").cells_per_step, PolicyTraining().in_stage("joint").cells_per_step
        (500, 200)
        """
        return replace(self, **{size: int(getattr(self, size) * times) for size, times in WIDER.get(name, {}).items()})

    def of_hours(self, hours: float) -> PolicyTraining:
        """The recipe cut, or stretched, to about `hours` on a 2024 server (`SECONDS_PER_STEP`); every stage keeps its
        share. The number of steps depends on `hours` alone.

        >>> PolicyTraining().of_hours(3).reading.steps
        5179
        """
        stages = {name: getattr(self, name) for name in self.stages}
        factor = hours * 3600 / sum(stage.steps * SECONDS_PER_STEP[name] for name, stage in stages.items())
        return replace(
            self, **{name: replace(stage, steps=max(1, round(stage.steps * factor))) for name, stage in stages.items()}
        )

    def large(self) -> PolicyTraining:
        """The recipe with steps eight times as wide, for an accelerator. Not run to its end yet."""
        return replace(
            self,
            dense=replace(self.dense, steps=4000),
            reading=replace(self.reading, steps=1500),
            joint=replace(self.joint, steps=3000, muon=1e-3),
            copying=replace(self.copying, steps=500),
            conversing=replace(self.conversing, steps=500),
            sharpening=replace(self.sharpening, steps=1000),
            finishing=replace(self.finishing, steps=400),
            cells_per_step=1920,
            pages_per_step=12,
            cell_pages_per_step=12,
            parts_per_step=1,
        )

    def autocast(self, device: str) -> Any:
        """The context in which the language model's losses are computed."""
        import torch

        able = device != "cpu" or torch.cpu._is_avx512_bf16_supported()  # emulated, they are slower than float32's
        return torch.autocast(device, torch.bfloat16, enabled=self.bfloat16 and able)


def train_policy(
    recipe: PolicyTraining, work: Path, results: Path, out: Path, device: str = "cpu", workers: int = 0
) -> Path:
    """Train the policy on `device` and save it to `out`; checkpoints go to `work`, curves to `results`, `workers`
    processes make the data. A second call goes on where the first was interrupted, and a finished stage is not trained
    again. Returns `out`."""
    ensure_torchvision()
    from transformers import AutoProcessor

    keep_freed_memory()
    # The vocabulary follows MiniDocs' word lists; half-trained weights must never meet another one.
    if process_rank()[0] == 0 and not (work / "processor").exists():
        build_processor().save_pretrained(work / "processor.partial")
        (work / "processor.partial").rename(work / "processor")
    wait_for_all()
    processor = AutoProcessor.from_pretrained(work / "processor")
    tokenizer = processor.tokenizer
    trained = Trained.new(tokenizer, recipe.seed, device)
    folder = work
    for stage in recipe.stages:
        train_stage = dense_stage if stage in ("dense", "sharpening") else reading_stage
        train_stage(stage, trained, recipe.in_stage(stage), folder, results / f"curve_{stage}.csv", device, workers)
        # Later stages start from what the earlier ones ended with: another length of those is another start.
        folder = folder / f"after_{getattr(recipe, stage).steps}_{stage}"
    if process_rank()[0] == 0:
        save_policy(trained.model, processor, out)
    return out


def save_policy(model: Any, processor: Any, out: Path) -> Path:
    """Save the policy as a checkpoint folder in float16, which halves it; it loads at any precision."""
    import copy

    import torch

    smaller = copy.deepcopy(model).eval().to("cpu", torch.float16)
    for parameter in smaller.parameters():
        parameter.requires_grad_(True)
    out.mkdir(parents=True, exist_ok=True)
    smaller.save_pretrained(out)
    processor.save_pretrained(out)
    return out
