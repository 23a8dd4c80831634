"""Train the scale policy from nothing (`vrag scale-model`): it learns to perceive, and nothing of the agent's task.

Not part of the paper, whose models come trained. Four stages, each resumable, each a function of seed and settings:

1. dense: the vision tower alone names the characters of every 28x28 cell of pages of random text, large print first;
2. naming: embeddings and the language model's first layers learn which cells show which word, on MiniDocs training
   pages: without it a question's words are not found on a page for hundreds of thousands of samples;
3. reading: the language model learns to read, find and name things on MiniDocs training pages through the fixed tower,
   first on small cut-outs, then on whole pages and crops, some of its heads shown where to look (`gaze_losses`);
4. joint: everything together on MiniDocs at a falling rate, naming characters and words going on beside it.

Trained on documents of the training split only, which are drawn on the spot and never repeat; the validation split
draws the curves; the test split is used by `scale_evaluate` alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.minidocs_documents import MiniDocsConfig
from vrag_lib.scale_characters import BINS, CHARACTERS, GRIDS, SLOTS, draw_character_page
from vrag_lib.scale_loop import Counts, Schedule, Tally, process_rank, train, wait_for_all
from vrag_lib.scale_optim import keep_freed_memory
from vrag_lib.scale_policy import build_model, build_processor
from vrag_lib.scale_reading import NAME_TO_CELLS, Batch, make_batch, naming_loss, place_probe, reading_loss
from vrag_lib.scale_tasks import draw_samples
from vrag_lib.scale_vision import Images, OnDevice, arrange, encode_images, patchify
from vrag_lib.torch_setup import ensure_torchvision

if TYPE_CHECKING:
    import torch

CLOSE_MIX = {"whole": 0.4, "several": 0.5, "crop": 0.15, "close": 8}
PAGE_MIX = {"whole": 1.5, "several": 1.0, "crop": 0.6, "part": 0.1, "close": 1.5}
JOINT_MIX = {"whole": 2.0, "several": 1.0, "crop": 1.5, "part": 0.2, "close": 0.3}
"""Samples per page while the language model learns to read at all, from then on, and in the last stage."""

CLOSE_SHARE = 0.2
"""Share of the reading stage that is spent on `CLOSE_MIX`."""

NAMING_PAGES = 8
"""Pages whose words are looked for in each step from the second stage on."""

GUIDANCE = 0.1
NAMING_WEIGHT = 0.1
CHARACTER_WEIGHT = 0.5
"""Weights of showing heads where to look, of looking for words and of naming characters, beside the loss proper."""

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
    """Cross-entropy of slots and bins; the places behind the last character of a cell count little."""
    import torch
    from torch.nn import functional as F

    slots, cover = batch.slots, batch.cover
    features = encode_images(visual, batch.images)
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
    # Totals are tensors too: waiting for them would hold up an accelerator.
    counts = {"characters": (right.sum(), filled.sum()), "digits": ((right & digits).sum(), digits.sum())}
    return slot_loss + 0.5 * cover_loss, counts


def dense_stage(
    visual: Any, head: Any, recipe: PolicyTraining, folder: Path, curve: Path, device: str, workers: int
) -> None:
    """Stage 1: the vision tower learns, through a linear head, to name the characters of every cell."""
    import torch

    schedule, seed = recipe.dense, recipe.seed
    held_out = {
        em: [
            character_batch(random.Random(f"{seed}/held out/{em[0]}/{i}"), em, HELD_OUT_CELLS).to(device)
            for i in range(3)
        ]
        for em in HELD_OUT_EMS
    }

    def batch_of_step(number: int) -> Characters:
        rng = random.Random(f"{seed}/dense/{number}")
        return character_batch(rng, em_range(number / schedule.steps), recipe.cells_per_step)

    def loss_of_batch(batch: Characters) -> tuple[torch.Tensor, Counts]:
        return character_loss(visual, head, batch.to(device))

    def evaluate() -> dict[str, float]:
        tally = Tally()
        with torch.no_grad():
            for (low, high), batches in held_out.items():
                for batch in batches:
                    counts = character_loss(visual, head, batch)[1]
                    tally.add({f"chars_em{low}-{high}_{metric}": count for metric, count in counts.items()})
        return tally.rates()

    modules = {"visual": visual, "head": head}
    train("dense", modules, batch_of_step, loss_of_batch, schedule, folder, curve, evaluate, 500, workers)


def naming_stage(
    model: Any, tokenizer: Any, recipe: PolicyTraining, folder: Path, curve: Path, device: str, workers: int
) -> None:
    """Stage 2: words and the cells that show them. The tower stays as it is: when it moved it forgot digits."""
    import torch

    config, seed = MiniDocsConfig(), recipe.seed
    held_out = [
        naming_batch(random.Random(f"{seed}/held out words/{i}"), tokenizer, config, "validation").to(device)
        for i in range(HELD_OUT_BATCHES)
    ]
    model.requires_grad_(False)
    deepest = max(layer for layer, _ in NAME_TO_CELLS)
    layers = model.model.language_model.layers
    last = layers[deepest]
    for module in (model.get_input_embeddings(), *layers[:deepest], last.input_layernorm):
        module.requires_grad_(True)
    for module in (last.self_attn.q_proj, last.self_attn.k_proj):
        module.requires_grad_(True)

    def batch_of_step(number: int) -> Batch:
        return naming_batch(random.Random(f"{seed}/naming/{number}"), tokenizer, config)

    def loss_of_batch(batch: Batch) -> tuple[torch.Tensor, Counts]:
        with recipe.autocast(device):
            return naming_loss(model, batch.to(device))

    def evaluate() -> dict[str, float]:
        tally = Tally()
        with torch.no_grad():
            for batch in held_out:
                tally.add(naming_loss(model, batch)[1])
        return {f"validation {kind}": rate for kind, rate in sorted(tally.rates().items())}

    modules = {"model": model}
    train("naming", modules, batch_of_step, loss_of_batch, recipe.naming, folder, curve, evaluate, 100, workers)
    model.requires_grad_(True)


def naming_batch(rng: random.Random, tokenizer: Any, config: MiniDocsConfig, split: str = "train") -> Batch:
    """The words of `NAMING_PAGES` pages."""
    return make_batch(tokenizer, draw_samples(rng, split, NAMING_PAGES, config, {"naming": 1}))


def reading_stage(
    name: str,
    model: Any,
    head: Any,
    tokenizer: Any,
    recipe: PolicyTraining,
    folder: Path,
    curve: Path,
    device: str,
    workers: int,
) -> None:
    """Stages 3 and 4, `reading` and `joint`: titles, text, places and values on MiniDocs training pages. In the first
    of them the tower stays as it is; in the second everything is trained, and naming characters goes on beside it.
    Each stage has a probe of its own that reads places off the language model, and makes it keep them."""
    import torch

    config = MiniDocsConfig()
    schedule, seed, joint = getattr(recipe, name), recipe.seed, name == "joint"
    held_out = [
        make_batch(tokenizer, draw_samples(random.Random(f"{seed}/held out/{i}"), "validation", 3, config)).to(device)
        for i in range(HELD_OUT_BATCHES)
    ]
    model.model.visual.requires_grad_(joint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = place_probe(model.config.text_config.hidden_size).to(device)

    def batch_of_step(number: int) -> tuple[list[Batch], Batch, Characters | None]:
        rng = random.Random(f"{seed}/{name}/{number}")
        mix = JOINT_MIX if joint else CLOSE_MIX if number < CLOSE_SHARE * schedule.steps else PAGE_MIX
        samples = draw_samples(rng, "train", recipe.pages_per_step, config, mix)
        samples.sort(key=lambda s: s.grid[0] * s.grid[1] + 20 * len(s.turns))  # similar lengths together: less padding
        cuts = [len(samples) * i // recipe.parts_per_step for i in range(recipe.parts_per_step + 1)]
        parts = [make_batch(tokenizer, samples[start:end]) for start, end in pairwise(cuts) if start < end]
        characters = character_batch(rng, EM_RANGE, recipe.cells_per_step) if joint else None
        return parts, naming_batch(rng, tokenizer, config), characters

    def loss_of_batch(batch: tuple[list[Batch], Batch, Characters | None]) -> tuple[torch.Tensor, Counts]:
        parts, words, characters = batch
        losses, tally = [], Tally()
        with recipe.autocast(device):
            for part in parts:
                loss, counts = reading_loss(model, part.to(device), joint, GUIDANCE, probe)
                losses.append(loss / len(parts))
                tally.add(counts)
            loss, counts = naming_loss(model, words.to(device))
            losses.append(NAMING_WEIGHT * loss)
            tally.add(counts)
        if characters is not None:
            loss, counts = character_loss(model.model.visual, head, characters.to(device))
            losses.append(CHARACTER_WEIGHT * loss)
            tally.add(counts)
        return torch.stack(losses).sum(), tally.counts()

    def evaluate() -> dict[str, float]:
        tally = Tally()
        with torch.no_grad():
            for batch in held_out:
                loss, counts = reading_loss(model, batch, train_tower=False)
                tally.add({**counts, "loss": (loss, 1.0)})
        return {f"validation {kind}": rate for kind, rate in sorted(tally.rates().items())}

    modules = {"model": model, "probe": probe} | ({"head": head} if joint else {})
    train(name, modules, batch_of_step, loss_of_batch, schedule, folder, curve, evaluate, 200, workers)


STAGES = ("dense", "naming", "reading", "joint")

SECONDS_PER_STEP = {"dense": 0.19, "naming": 0.25, "reading": 1.05, "joint": 1.6}
"""Seconds of one step of every stage of the small recipe on one core of a 2024 server, the other core as busy; that of
`joint` is an estimate."""


DENSE = Schedule(steps=7000, muon=4e-3, adamw=3e-3)
NAMING = Schedule(steps=1500, muon=0, adamw=2e-3)
READING = Schedule(steps=6000, muon=0, adamw=1.5e-3, decay=0.3)
JOINT = Schedule(steps=2000, muon=5e-4, adamw=1e-3, decay=0.9)


@dataclass(frozen=True)
class PolicyTraining:
    """The recipe: optimizer steps and learning rates of the stages, cells of random text per step of naming
    characters, MiniDocs pages per step of reading (each gives several samples), how many batches, one after the other,
    a step's samples are divided into, and whether matrix products run in bfloat16 where the processor can."""

    seed: int = 0
    dense: Schedule = DENSE
    naming: Schedule = NAMING
    reading: Schedule = READING
    joint: Schedule = JOINT
    cells_per_step: int = 240
    pages_per_step: int = 2
    parts_per_step: int = 2
    bfloat16: bool = True

    @classmethod
    def of_hours(cls, hours: float, seed: int = 0) -> PolicyTraining:
        """The small recipe cut to about `hours` on one free core of a 2024 server (`SECONDS_PER_STEP`); every stage
        keeps its share. The number of steps depends on `hours` alone.

        >>> PolicyTraining.of_hours(3).naming.steps
        1446
        """
        whole = cls(seed=seed)
        stages = {name: getattr(whole, name) for name in SECONDS_PER_STEP}
        factor = hours * 3600 / sum(stage.steps * SECONDS_PER_STEP[name] for name, stage in stages.items())
        return replace(
            whole, **{name: replace(stage, steps=max(1, round(stage.steps * factor))) for name, stage in stages.items()}
        )

    @classmethod
    def large(cls, seed: int = 0) -> PolicyTraining:
        """The recipe with steps eight times as wide, for an accelerator. Not run to its end yet."""
        small = cls(seed=seed)
        return replace(
            small,
            dense=replace(small.dense, steps=5000),
            reading=replace(small.reading, steps=3000),
            joint=replace(small.joint, steps=4000, muon=1e-3),
            cells_per_step=1920,
            pages_per_step=12,
            parts_per_step=1,
        )

    def autocast(self, device: str) -> Any:
        """The context in which the language model's losses are computed."""
        import torch

        able = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.autocast(device, torch.bfloat16, enabled=self.bfloat16 and able)


def train_policy(
    recipe: PolicyTraining, work: Path, results: Path, out: Path, device: str = "cpu", workers: int = 0
) -> Path:
    """Train the policy on `device` and save it to `out`; checkpoints go to `work`, curves to `results`, `workers`
    processes make the data. A second call goes on where the first was interrupted, and a finished stage is not trained
    again. Returns `out`."""
    ensure_torchvision()
    import torch
    from transformers import AutoProcessor

    keep_freed_memory()
    # The vocabulary follows MiniDocs' word lists; half-trained weights must never meet another one.
    if process_rank()[0] == 0 and not (work / "processor").exists():
        build_processor().save_pretrained(work / "processor.partial")
        (work / "processor.partial").rename(work / "processor")
    wait_for_all()
    processor = AutoProcessor.from_pretrained(work / "processor")
    tokenizer = processor.tokenizer
    model = build_model(tokenizer, recipe.seed).train().to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = character_head(model.config.vision_config.out_hidden_size).to(device)
    folder = work
    for stage in STAGES:
        curve = results / f"curve_{stage}.csv"
        if stage == "dense":
            dense_stage(model.model.visual, head, recipe, folder, curve, device, workers)
        elif stage == "naming":
            naming_stage(model, tokenizer, recipe, folder, curve, device, workers)
        else:
            reading_stage(stage, model, head, tokenizer, recipe, folder, curve, device, workers)
        # Later stages start from what the earlier ones ended with: another length of those is another start.
        folder = folder / f"after_{getattr(recipe, stage).steps}_{stage}"
    if process_rank()[0] == 0:
        save_policy(model, processor, out)
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
