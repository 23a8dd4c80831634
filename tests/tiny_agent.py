"""What the tests of SFT and GRPO share: pages, questions, scripted trajectories, and a tiny Qwen2.5-VL that has learnt
to search, crop and answer by heart, so that its rollouts have images in mid-trajectory."""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from helpers import FakeRetriever
from PIL import Image, ImageDraw

from vrag_lib.actions import ActionKind
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Corpus, Document, Page, Question
from vrag_lib.geometry import Size
from vrag_lib.policy import ScriptedPolicy
from vrag_lib.rollout import rollout
from vrag_lib.trajectory import Trajectory

ENVIRONMENT = EnvironmentConfig(max_turns=4, min_pixels=4 * 28 * 28, max_pixels=12 * 28 * 28)
"""Images of 4 to 12 vision tokens."""

QUESTIONS = tuple(
    Question(f"q{i}", f"what is on page {i}?", f"{i}", "a.pdf", (i,), "text", "single") for i in (1, 2, 3, 4)
)

SCRIPTS = (
    ["<answer>1</answer>"],
    ["<search>page 2</search>", "<answer>2</answer>"],
    ["<search>page 3</search>", "<bbox>[0, 0, 60, 60]</bbox>", "<answer>3</answer>"],
    ["<search>page 4</search>", "<search>page 1</search>", "<bbox>[0, 0, 60, 60]</bbox>", "<answer>4</answer>"],
)
"""Trajectories without, with one, two and three images."""


@cache
def scratch() -> Path:
    """A folder for the whole test run."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-agent-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def corpus() -> Corpus:
    folder = scratch() / "pages"
    folder.mkdir()
    pages = []
    for number, size in enumerate([(150, 100), (100, 150), (120, 120), (200, 90)], 1):
        image = Image.new("RGB", size, "white")
        for i in range(8):
            seed = hashlib.sha256(f"{number}{i}".encode()).digest()
            x, y = seed[0] * size[0] // 256, seed[1] * size[1] // 256
            ImageDraw.Draw(image).rectangle([x, y, x + 40, y + 25], fill=tuple(seed[2:5]))
        image.save(folder / f"a_{number}.png")
        pages.append(Page(f"a_{number}", "a", number, folder / f"a_{number}.png", Size(*size)))
    return Corpus([Document("a", folder / "a.pdf", "0" * 64, tuple(pages))])


def retriever() -> FakeRetriever:
    return FakeRetriever(corpus().page_ids)


def scripted(scripts: Sequence[Sequence[str]] = SCRIPTS) -> list[Trajectory]:
    """One trajectory per script, without token ids: what experts give."""
    return [
        rollout(ScriptedPolicy(script), [question], corpus(), retriever(), ENVIRONMENT, seeds=[i])[0]
        for i, (script, question) in enumerate(zip(scripts, QUESTIONS, strict=True))
    ]


@cache
def random_checkpoint() -> Path:
    from vrag_lib.scale_model import build_tiny_qwen2_5_vl

    return build_tiny_qwen2_5_vl(scratch() / "random", seed=0)


@cache
def trained_checkpoint() -> Path:
    """A checkpoint that acts: the random one fine-tuned on the scripts, all weights, with this package's SFT."""
    from vrag_lib.sft import SFTConfig, train_sft

    config = SFTConfig(epochs=40, batch_size=4, micro_batch_size=4, learning_rate=3e-3, save_steps=1000)
    return train_sft(random_checkpoint(), scripted(), corpus(), config, scratch() / "sft", device="cpu")


def actions(trajectory: Trajectory) -> list[ActionKind | None]:
    return [reply.action and reply.action.kind for reply in trajectory.replies]
