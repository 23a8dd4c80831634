"""Train the scale policy from nothing (`vrag scale-model`): it learns to perceive, and nothing of the agent's task.

Not part of the paper, whose models come trained. Three stages, each resumable, each a function of seed and settings:

1. dense: the vision tower alone names the characters of every 28x28 cell of pages of random text;
2. reading: the language model learns to read, find and name things on MiniDocs training pages through the fixed tower;
3. joint: everything together on MiniDocs, the tower at a low rate, naming characters going on beside it.

Trained on documents of the training split only, which are drawn on the spot and never repeat; the validation split
draws the curves; the test split is used by `scale_evaluate` alone.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.scale_characters import BINS, CHARACTERS, GRIDS, SLOTS, draw_character_page
from vrag_lib.minidocs_documents import MiniDocsConfig
from vrag_lib.scale_loop import Schedule, train
from vrag_lib.scale_optim import keep_freed_memory
from vrag_lib.scale_policy import build_policy
from vrag_lib.scale_reading import make_batch, reading_loss
from vrag_lib.scale_tasks import draw_samples
from vrag_lib.scale_vision import encode_images, patchify

if TYPE_CHECKING:
    import torch

CELLS_PER_STEP = 1150
"""Cells of the images of one dense step."""

PAGES_PER_STEP = 4
"""MiniDocs pages of one step of reading."""

READING_MIX = {"whole": 0.5, "crop": 0.5, "part": 0.1, "close": 6}
JOINT_MIX = {"whole": 0.7, "crop": 1, "part": 0.1, "close": 3}
"""Samples per page while the language model learns to read, and when everything is trained together."""

EM_RANGE = (10, 36)
"""Em heights of the dense pages' text, shown pixels."""


def character_head(width: int) -> torch.nn.Linear:
    """Predicts, from one cell's feature, a class for each slot and each bin."""
    import torch

    return torch.nn.Linear(width, (SLOTS + BINS[0] * BINS[1]) * (len(CHARACTERS) + 1))


def character_batch(rng: random.Random, em_range: tuple[int, int], cells: int = CELLS_PER_STEP) -> tuple[Any, Any, Any, tuple[int, int]]:
    """Patches (images, 4 * cells, 588), slots (images * cells, SLOTS), cover (images * cells, 8) and the grid."""
    import torch

    rows, columns = rng.choice(GRIDS)
    pages = [draw_character_page(rng, rows, columns, em_range) for _ in range(max(1, cells // (rows * columns)))]
    patches = torch.from_numpy(np.stack([patchify(page.image) for page in pages]))
    slots = torch.from_numpy(np.stack([page.slots for page in pages])).view(-1, SLOTS)
    cover = torch.from_numpy(np.stack([page.cover for page in pages])).view(-1, BINS[0] * BINS[1])
    return patches, slots, cover, (rows, columns)


def character_loss(visual: Any, head: Any, batch: Any) -> tuple[torch.Tensor, dict[str, tuple[float, float]]]:
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
        f"{name}_em{low}-{high}": [character_batch(random.Random(f"{seed}/held out/{low}/{i}"), (low, high)) for i in range(3)]
        for name, low, high in (("chars", 10, 13), ("chars", 14, 20), ("chars", 20, 32))
    }

    def step(number: int) -> tuple[torch.Tensor, dict[str, tuple[float, float]]]:
        return character_loss(visual, head, character_batch(random.Random(f"{seed}/dense/{number}"), EM_RANGE))

    def evaluate() -> dict[str, float]:
        found = {}
        with torch.no_grad():
            for key, batches in held_out.items():
                sums: dict[str, list[float]] = {}
                for batch in batches:
                    for metric, (hit, total) in character_loss(visual, head, batch)[1].items():
                        entry = sums.setdefault(metric, [0.0, 0.0])
                        entry[0] += hit
                        entry[1] += total
                for metric, (hit, total) in sums.items():
                    found[f"{key}_{metric}"] = hit / max(1.0, total)
        return found

    train("dense", {"visual": visual, "head": head}, step, schedule, folder, curve, evaluate, 200)


def reading_stage(
    name: str, model: Any, tokenizer: Any, schedule: Schedule, folder: Path, curve: Path, seed: int, head: Any = None
) -> None:
    """Stages 2 and 3: titles, text, places and values on MiniDocs training pages. Without `head` the tower stays as it
    is; with it everything is trained, and naming characters goes on beside reading."""
    import torch

    config = MiniDocsConfig()
    mix = READING_MIX if head is None else JOINT_MIX
    held_out = [
        make_batch(tokenizer, draw_samples(random.Random(f"{seed}/held out/{i}"), "validation", 3, config))
        for i in range(10)
    ]
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(head is not None)

    def step(number: int) -> tuple[torch.Tensor, dict[str, tuple[float, float]]]:
        rng = random.Random(f"{seed}/{name}/{number}")
        samples = draw_samples(rng, "train", PAGES_PER_STEP, config, mix)
        samples.sort(key=lambda s: s.grid[0] * s.grid[1] + 20 * len(s.turns))
        half = len(samples) // 2  # two batches of similar lengths: less padding
        losses, counts = [], Counter[str]()
        totals = Counter[str]()
        for part in (samples[:half], samples[half:]):
            batch = make_batch(tokenizer, part)
            loss, found = reading_loss(model, batch, train_tower=head is not None)
            losses.append(loss)
            for kind, (hit, total) in found.items():
                counts[kind] += hit
                totals[kind] += total
        loss = sum(losses) / 2
        result = {kind: (float(counts[kind]), float(totals[kind])) for kind in sorted(totals)}
        if head is None:
            return loss, result
        dense, characters = character_loss(model.model.visual, head, character_batch(rng, EM_RANGE, CELLS_PER_STEP // 4))
        return loss + 0.3 * dense, result | characters

    def evaluate() -> dict[str, float]:
        sums: dict[str, list[float]] = {}
        with torch.no_grad():
            for batch in held_out:
                for kind, (hit, total) in reading_loss(model, batch, False)[1].items():
                    entry = sums.setdefault(f"validation {kind}", [0.0, 0.0])
                    entry[0] += hit
                    entry[1] += total
        return {kind: hit / total for kind, (hit, total) in sorted(sums.items())}

    modules = {"model": model} if head is None else {"model": model, "head": head}
    train(name, modules, step, schedule, folder, curve, evaluate, 200)


@dataclass(frozen=True)
class PolicyTraining:
    """The recipe: optimizer steps and learning rates of the three stages."""

    seed: int = 0
    dense: Schedule = Schedule(steps=6000, muon=2e-3, adamw=1.5e-3)
    reading: Schedule = Schedule(steps=5000, muon=0, adamw=1e-3)
    joint: Schedule = Schedule(steps=3000, muon=7e-4, adamw=8e-4, decay=0.7)


def train_policy(recipe: PolicyTraining, work: Path, results: Path, out: Path) -> Path:
    """Train the policy and save it to `out`; checkpoints go to `work`, curves to `results`. A second call goes on where
    the first was interrupted, and a finished stage is not trained again. Returns `out`."""
    import torch

    keep_freed_memory()
    model, processor = build_policy(recipe.seed)
    tokenizer = processor.tokenizer
    torch.manual_seed(recipe.seed)
    head = character_head(model.config.vision_config.out_hidden_size)
    model.train()
    dense_stage(model.model.visual, head, recipe.dense, work, results / "curve_dense.csv", recipe.seed)
    reading_stage("reading", model, tokenizer, recipe.reading, work, results / "curve_reading.csv", recipe.seed)
    reading_stage("joint", model, tokenizer, recipe.joint, work, results / "curve_joint.csv", recipe.seed, head)
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
