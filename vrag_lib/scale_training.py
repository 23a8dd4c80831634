"""Train the scale policy from nothing (`vrag scale-model`): it learns to perceive, and nothing of the agent's task.

Not part of the paper, whose models come trained. Three stages, each resumable, each a function of seed and settings:

1. dense: the vision tower alone names the characters of every 28x28 cell of pages of random text, large print first;
2. reading: the language model learns to read, find and name things on MiniDocs training pages through the fixed tower,
   first on small cut-outs, then on whole pages and crops; a tower that moves holds it up;
3. joint: everything together on MiniDocs at a low rate, naming characters going on beside it.

Trained on documents of the training split only, which are drawn on the spot and never repeat; the validation split
draws the curves; the test split is used by `scale_evaluate` alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.minidocs_documents import MiniDocsConfig
from vrag_lib.scale_characters import BINS, CHARACTERS, GRIDS, SLOTS, draw_character_page
from vrag_lib.scale_loop import Counts, Schedule, Tally, train
from vrag_lib.scale_optim import keep_freed_memory
from vrag_lib.scale_policy import build_model, build_processor
from vrag_lib.scale_reading import make_batch, reading_loss
from vrag_lib.scale_tasks import draw_samples
from vrag_lib.scale_vision import encode_images, patchify
from vrag_lib.torch_setup import ensure_torchvision

if TYPE_CHECKING:
    import torch

CELLS_PER_STEP = 240
"""Cells of the images of one dense step: many small steps at a high rate were seen to learn twice as much per second
as few large ones."""

PAGES_PER_STEP = 2
"""MiniDocs pages of one step of reading."""

CLOSE_MIX = {"whole": 0.4, "crop": 0.15, "part": 0, "close": 9}
PAGE_MIX = {"whole": 1.5, "crop": 1.0, "part": 0.15, "close": 3}
"""Samples per page while the language model learns to read at all, and from then on."""

CLOSE_SHARE = 0.2
"""Share of the reading stage that is spent on `CLOSE_MIX`."""

EM_RANGE = (10, 44)
"""Em heights of the dense pages' text, shown pixels: from labels on whole pages to sentences in crops."""

EASY_EM = 20
"""Least em height at the start of the dense stage; it falls to `EM_RANGE[0]` in the first half."""

HELD_OUT_CELLS = 1150
"""Cells of each of the three batches that the dense stage is measured on at each size."""

HELD_OUT_BATCHES = 10
"""Batches that draw the validation curves."""

HELD_OUT_EMS = ((10, 13), (14, 20), (20, 32))
"""Em heights at which the dense stage is measured: labels on pages, figures in crops, titles in crops."""


def character_head(width: int) -> torch.nn.Linear:
    """Predicts, from one cell's feature, a class for each slot and each bin."""
    import torch

    return torch.nn.Linear(width, (SLOTS + BINS[0] * BINS[1]) * (len(CHARACTERS) + 1))


def em_range(done: float) -> tuple[float, float]:
    """Em heights of dense pages when a share `done` of the stage is over.

    >>> em_range(0), em_range(0.25), em_range(0.8)
    ((20, 44), (15.0, 44), (10, 44))
    """
    least, most = EM_RANGE
    return max(least, EASY_EM - 2 * done * (EASY_EM - least)), most


def character_batch(
    rng: random.Random, em_range: tuple[float, float], cells: int | None = None
) -> tuple[Any, Any, Any, tuple[int, int]]:
    """Patches (images, 4 * cells, 588), slots (images * cells, SLOTS), cover (images * cells, 8) and the grid of as
    many pages as hold `cells` cells (default: `CELLS_PER_STEP`)."""
    import torch

    rows, columns = rng.choice(GRIDS)
    pages = [
        draw_character_page(rng, rows, columns, em_range)
        for _ in range(max(1, (cells or CELLS_PER_STEP) // (rows * columns)))
    ]
    patches = torch.from_numpy(np.stack([patchify(page.image) for page in pages]))
    slots = torch.from_numpy(np.stack([page.slots for page in pages])).view(-1, SLOTS)
    cover = torch.from_numpy(np.stack([page.cover for page in pages])).view(-1, BINS[0] * BINS[1])
    return patches, slots, cover, (rows, columns)


def character_loss(visual: Any, head: Any, batch: Any) -> tuple[torch.Tensor, Counts]:
    """Cross-entropy of slots and bins; the places behind the last character of a cell count little."""
    import torch
    from torch.nn import functional as F

    patches, slots, cover, (rows, columns) = batch
    features = encode_images(visual, patches.flatten(0, 1), [(rows, columns)] * len(patches))
    logits = head(features).view(len(features), -1, len(CHARACTERS) + 1)
    filled = slots > 0
    closing = torch.cat([torch.ones_like(filled[:, :1]), filled[:, :-1]], 1) & ~filled
    weights = torch.where(filled, 1.0, torch.where(closing, 0.5, 0.02))
    losses = F.cross_entropy(logits[:, :SLOTS].transpose(1, 2), slots, reduction="none")
    slot_loss = (losses * weights).sum() / weights.sum()
    cover_weights = torch.where(cover > 0, 1.0, 0.2)
    losses = F.cross_entropy(logits[:, SLOTS:].transpose(1, 2), cover, reduction="none")
    cover_loss = (losses * cover_weights).sum() / cover_weights.sum()
    right = (logits[:, :SLOTS].argmax(-1) == slots) & filled
    digits = filled & (slots <= 10)
    counts = {
        "characters": (float(right.sum()), float(filled.sum())),
        "digits": (float((right & digits).sum()), float(digits.sum())),
    }
    return slot_loss + 0.5 * cover_loss, counts


def dense_stage(visual: Any, head: Any, schedule: Schedule, folder: Path, curve: Path, seed: int) -> None:
    """Stage 1: the vision tower learns, through a linear head, to name the characters of every cell."""
    import torch

    held_out = {
        em: [character_batch(random.Random(f"{seed}/held out/{em[0]}/{i}"), em, HELD_OUT_CELLS) for i in range(3)]
        for em in HELD_OUT_EMS
    }

    def step(number: int) -> tuple[torch.Tensor, Counts]:
        rng = random.Random(f"{seed}/dense/{number}")
        return character_loss(visual, head, character_batch(rng, em_range(number / schedule.steps)))

    def evaluate() -> dict[str, float]:
        tally = Tally()
        with torch.no_grad():
            for (low, high), batches in held_out.items():
                for batch in batches:
                    counts = character_loss(visual, head, batch)[1]
                    tally.add({f"chars_em{low}-{high}_{metric}": count for metric, count in counts.items()})
        return tally.rates()

    train("dense", {"visual": visual, "head": head}, step, schedule, folder, curve, evaluate, eval_every=500)


def reading_stage(
    name: str, model: Any, tokenizer: Any, schedule: Schedule, folder: Path, curve: Path, seed: int, head: Any = None
) -> None:
    """Stages 2 and 3: titles, text, places and values on MiniDocs training pages. Without `head` the tower stays as it
    is; with it everything is trained, and naming characters goes on beside reading."""
    import torch

    config = MiniDocsConfig()
    held_out = [
        make_batch(tokenizer, draw_samples(random.Random(f"{seed}/held out/{i}"), "validation", 3, config))
        for i in range(HELD_OUT_BATCHES)
    ]
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(head is not None)

    def step(number: int) -> tuple[torch.Tensor, Counts]:
        rng = random.Random(f"{seed}/{name}/{number}")
        mix = CLOSE_MIX if head is None and number < CLOSE_SHARE * schedule.steps else PAGE_MIX
        samples = draw_samples(rng, "train", PAGES_PER_STEP, config, mix)
        samples.sort(key=lambda s: s.grid[0] * s.grid[1] + 20 * len(s.turns))
        half = len(samples) // 2  # two batches of similar lengths: less padding
        losses, tally = [], Tally()
        for part in (samples[:half], samples[half:]):
            loss, counts = reading_loss(model, make_batch(tokenizer, part), train_tower=head is not None)
            losses.append(loss / 2)
            tally.add(counts)
        if head is not None:
            loss, counts = character_loss(model.model.visual, head, character_batch(rng, EM_RANGE))
            losses.append(0.3 * loss)
            tally.add(counts)
        return torch.stack(losses).sum(), tally.counts()

    def evaluate() -> dict[str, float]:
        tally = Tally()
        with torch.no_grad():
            for batch in held_out:
                tally.add(reading_loss(model, batch, train_tower=False)[1])
        return {f"validation {kind}": rate for kind, rate in sorted(tally.rates().items())}

    modules = {"model": model} if head is None else {"model": model, "head": head}
    train(name, modules, step, schedule, folder, curve, evaluate)


STAGES = ("dense", "reading", "joint")

SECONDS_PER_STEP = {"dense": 0.28, "reading": 1.2, "joint": 1.633}
"""Seconds of one step of every stage on one core of an AMD EPYC Milan at 2.4 GHz."""


DENSE = Schedule(steps=11311, muon=4e-3, adamw=3e-3)
READING = Schedule(steps=5000, muon=0, adamw=1.5e-3, decay=0.6)
JOINT = Schedule(steps=1000, muon=3e-4, adamw=4e-4, decay=0.9)


@dataclass(frozen=True)
class PolicyTraining:
    """The recipe: optimizer steps and learning rates of the three stages."""

    seed: int = 0
    dense: Schedule = DENSE
    reading: Schedule = READING
    joint: Schedule = JOINT

    @classmethod
    def of_hours(cls, hours: float, seed: int = 0) -> PolicyTraining:
        """The recipe cut to about `hours` on one free core of a 2021 server (`SECONDS_PER_STEP`); every stage keeps
        its share. The number of steps depends on `hours` alone, so the result is the same on any machine.

        >>> PolicyTraining.of_hours(3).dense.steps
        11311
        """
        whole = cls(seed=seed)
        stages = {name: getattr(whole, name) for name in SECONDS_PER_STEP}
        factor = hours * 3600 / sum(stage.steps * SECONDS_PER_STEP[name] for name, stage in stages.items())
        return replace(
            whole, **{name: replace(stage, steps=max(1, round(stage.steps * factor))) for name, stage in stages.items()}
        )


def train_policy(recipe: PolicyTraining, work: Path, results: Path, out: Path) -> Path:
    """Train the policy and save it to `out`; checkpoints go to `work`, curves to `results`. A second call goes on where
    the first was interrupted, and a finished stage is not trained again. Returns `out`."""
    ensure_torchvision()
    import torch
    from transformers import AutoProcessor

    keep_freed_memory()
    # The vocabulary follows MiniDocs' word lists; half-trained weights must never meet another one.
    if not (work / "processor").exists():
        build_processor().save_pretrained(work / "processor")
    processor = AutoProcessor.from_pretrained(work / "processor")
    tokenizer = processor.tokenizer
    model = build_model(tokenizer, recipe.seed).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = character_head(model.config.vision_config.out_hidden_size)
    dense, reading, seed = recipe.dense, recipe.reading, recipe.seed
    dense_stage(model.model.visual, head, dense, work, results / "curve_dense.csv", seed)
    # Later stages start from what the earlier ones ended with: another length of those is another start.
    after = work / f"after_{dense.steps}_dense"
    reading_stage("reading", model, tokenizer, reading, after, results / "curve_reading.csv", seed)
    after = work / f"after_{dense.steps}_dense_{reading.steps}_reading"
    reading_stage("joint", model, tokenizer, recipe.joint, after, results / "curve_joint.csv", seed, head)
    return save_policy(model, processor, out)


def save_policy(model: Any, processor: Any, out: Path) -> Path:
    """Save the policy as a checkpoint folder in float16, which halves it; it loads at any precision."""
    import copy

    import torch

    smaller = copy.deepcopy(model).eval().to(torch.float16)
    for parameter in smaller.parameters():
        parameter.requires_grad_(True)
    out.mkdir(parents=True, exist_ok=True)
    smaller.save_pretrained(out)
    processor.save_pretrained(out)
    return out
