"""What the tests of SFT and GRPO share: pages, questions, scripted trajectories, and a tiny Qwen2.5-VL that has learnt
to search, crop and answer by heart, so that its rollouts have images in mid-trajectory."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import FakeRetriever
from PIL import Image, ImageDraw

from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Corpus, Document, Page, Question
from vrag_lib.geometry import Size
from vrag_lib.policy import Conversation, Reply, ScriptedPolicy
from vrag_lib.policy_transformers import TransformersPolicy, sampling_logprobs
from vrag_lib.rollout import rollout
from vrag_lib.torch_setup import ensure_torchvision
from vrag_lib.trajectory import StopReason, Trajectory, Turn

if TYPE_CHECKING:
    import torch

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
    """A folder for the whole test run; child processes find their parent's in the environment."""
    if "TINY_AGENT" not in os.environ:
        os.environ["TINY_AGENT"] = tempfile.mkdtemp(prefix="tiny-agent-")
        atexit.register(shutil.rmtree, os.environ["TINY_AGENT"], ignore_errors=True)
    return Path(os.environ["TINY_AGENT"])


@cache
def corpus() -> Corpus:
    folder = scratch() / f"pages-{os.getpid()}"
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
    """The tiny Qwen2.5-VL with two of its four layers: half the time of every test."""
    ensure_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vrag_lib.scale_model import build_tiny_qwen2_5_vl

    whole, path = build_tiny_qwen2_5_vl(scratch() / "whole", seed=0), scratch() / "random"
    model = AutoModelForImageTextToText.from_pretrained(whole)
    model.model.language_model.layers = model.model.language_model.layers[:2]
    settings = model.config.text_config
    settings.num_hidden_layers, settings.layer_types = 2, settings.layer_types[:2]
    model.save_pretrained(path)
    AutoProcessor.from_pretrained(whole).save_pretrained(path)
    return path


@cache
def trained_checkpoint() -> Path:
    """A checkpoint that acts: the random one fine-tuned on the scripts, all weights, with this package's SFT."""
    from vrag_lib.sft import SFTConfig, train_sft

    config = SFTConfig(epochs=30, batch_size=4, micro_batch_size=4, learning_rate=3e-3, save_steps=1000)
    return train_sft(random_checkpoint(), scripted(), corpus(), config, scratch() / "sft", device="cpu")


@cache
def random_policy() -> TransformersPolicy:
    return TransformersPolicy.from_pretrained(random_checkpoint(), corpus(), device="cpu")


class ForcedPolicy(TransformersPolicy):
    """Draws the tokens that `script` (conversation, seed -> reply) spells, one by one, in the real sampling loop: its
    log-probs are the sampler's, whatever the model would rather have said. With `letters` every letter is a token of
    its own, which is not how the tokenizer would encode the reply."""

    def __init__(
        self,
        policy: TransformersPolicy,
        script: Callable[[Conversation, int], str],
        letters: bool = False,
        **settings: Any,
    ):
        super().__init__(policy.model, policy.processor, corpus(), **{"max_reply_tokens": 64} | settings)
        self.script = script
        self.letters = letters

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]:
        replies = [self.script(c, s) for c, s in zip(conversations, seeds, strict=True)]
        self.waiting = {
            s: [t for piece in (r if self.letters else [r]) for t in self.tokenizer.encode(piece)]
            for s, r in zip(seeds, replies, strict=True)
        }
        return super().generate(conversations, seeds=seeds)

    def _draw(self, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        waiting = [self.waiting[g.initial_seed()] for g in generators]
        chosen = torch.tensor([tokens.pop(0) if tokens else self._im_end for tokens in waiting])
        logits[:, list(self.suppressed_token_ids)] = -torch.inf
        return chosen, sampling_logprobs(logits, self.temperature, 1.0).gather(-1, chosen[:, None])[:, 0]


def by_question(conversation: Conversation, seed: int) -> str:
    """The script of the conversation's question; its answer is right for odd seeds only."""
    number = next(i for i, q in enumerate(QUESTIONS) if q.query in conversation[0].text)
    reply = SCRIPTS[number][len(conversation) // 2]
    return reply.replace("</answer>", "0</answer>") if seed % 2 == 0 else reply


def rewarded(name: str, reward: float, turns: tuple[Turn, ...] = (), stop=StopReason.ANSWER) -> Trajectory:
    """A trajectory with one reward, for functions that read no more than that."""
    return Trajectory(name, "q", "?", turns, stop, rewards={"answer": (reward, 1.0)})
