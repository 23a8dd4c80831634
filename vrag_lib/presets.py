"""Presets: the settings of one scale by name.

    config = load_config("laptop", ["environment.max_turns=4", "seed=1"])

`PRESETS` are for one's own documents, `EXPERIMENTS` the same for the stages of the paper's experiment.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vrag_lib.config import (
    Config,
    ConfigError,
    EnvironmentConfig,
    GRPOConfig,
    PolicyConfig,
    RetrievalConfig,
    RolloutConfig,
    SFTConfig,
    SynthesisConfig,
    override,
)
from vrag_lib.minidocs_documents import LEAST_TOKENS, PAGE_TOKENS, MiniDocsConfig


def _gpu(preset: str, model: str, **policy: Any) -> Config:
    """One card: LoRA instead of full weights, at the ten times higher rate that LoRA takes."""
    return Config(
        preset=preset,
        retrieval=RetrievalConfig(kind="visual", model="vidore/colqwen2-v1.0"),
        policy=PolicyConfig(kind="transformers", model=model, device="cuda", dtype="bfloat16", **policy),
        rollout=RolloutConfig(engine="vllm"),
        synthesis=SynthesisConfig(experts="openai"),
        sft=SFTConfig(lora_rank=64, learning_rate=1e-4, gradient_checkpointing=True),
        grpo=GRPOConfig(learning_rate=1e-5, gradient_checkpointing=True),
    )


def _paper() -> Config:
    one_card = _gpu("paper", "Qwen/Qwen2.5-VL-7B-Instruct", batch_size=32)
    full = {"lora_rank": 0, "gradient_checkpointing": True}
    # All weights, gathered in float32 on every card for a rollout, leave an engine of vLLM's no room on 80 GB.
    rollout = RolloutConfig(engine="transformers")
    environment = dataclasses.replace(one_card.environment, max_invalid_streak=0)  # the released code has no such end
    return dataclasses.replace(
        one_card, environment=environment, rollout=rollout, sft=SFTConfig(**full), grpo=GRPOConfig(**full)
    )


def _gpu_3b() -> Config:
    """Cut to 24 GB (`memory.expected_memory`)."""
    whole = _gpu("gpu_3b", "Qwen/Qwen2.5-VL-3B-Instruct")
    return dataclasses.replace(
        whole,
        rollout=dataclasses.replace(whole.rollout, gpu_memory_utilization=0.36),
        sft=dataclasses.replace(whole.sft, max_tokens=12288),
        grpo=dataclasses.replace(whole.grpo, max_context_tokens=8192),
    )


def _legible(laptop: Config) -> Config:
    """The same with larger sentences on pages of text, which the policy can then read without a crop."""
    return dataclasses.replace(laptop, preset="laptop_legible", minidocs=MiniDocsConfig(text_px=60))


PRESETS: dict[str, Config] = {
    "laptop": Config(),
    "laptop_legible": _legible(Config()),
    "gpu_3b": _gpu_3b(),
    "gpu_7b": _gpu("gpu_7b", "Qwen/Qwen2.5-VL-7B-Instruct"),
    "paper": _paper(),
}
"""`laptop` needs no GPU and no model hub, nor does `laptop_legible`; `gpu_*` one card; `paper` the published 8xA100
settings."""

_LAPTOP_EXPERIMENT = Config(
    retrieval=RetrievalConfig(kind="visual", engine="native", dtype="float32", device="cpu"),
    environment=EnvironmentConfig(min_pixels=LEAST_TOKENS * 28 * 28, max_pixels=PAGE_TOKENS * 28 * 28),
    policy=PolicyConfig(kind="transformers", max_reply_tokens=96, max_context_tokens=2048, batch_size=32, device="cpu"),
    rollout=RolloutConfig(merge_adapter=True),
    sft=SFTConfig(
        epochs=2, batch_size=4, micro_batch_size=4, learning_rate=5e-4, max_tokens=2048, save_steps=240,
        warmup_ratio=0.05,
    ),
    grpo=GRPOConfig(
        steps=40, questions_per_step=16, micro_batch_size=8, max_reply_tokens=96, max_context_tokens=2048,
        rollout_batch_size=80, lora_rank=16, lora_alpha=32, learning_rate=1.5e-3, warmup_steps=3,
        schedule="linear", temperature=0.8,
    ),
)  # fmt: skip

# At the laptop's rate RL loses for a while what this policy can do (results/laptop_legible/grpo).
_LEGIBLE_RL = dataclasses.replace(_LAPTOP_EXPERIMENT.grpo, learning_rate=7.5e-4)

EXPERIMENTS: dict[str, Config] = PRESETS | {
    "laptop": _LAPTOP_EXPERIMENT,
    "laptop_legible": dataclasses.replace(_legible(_LAPTOP_EXPERIMENT), grpo=_LEGIBLE_RL),
}
"""The same presets for the stages of the paper's experiment. On the laptop's these run on MiniDocs with the scale
models; one's own documents, which `vrag ask` reads, are shown larger and need no model."""


def load_config(
    preset: str = "laptop", overrides: list[str] | tuple[str, ...] = (), experiment: bool = False
) -> Config:
    """The preset with `key=value` overrides applied, dotted keys for stages; with `experiment` the preset as the stages
    of the paper's experiment use it (`EXPERIMENTS`).

    >>> load_config("laptop", ["environment.max_turns=4"]).environment.max_turns
    4

    Raises ConfigError for an unknown preset or key (with the nearest known one) or a value of the wrong kind.
    """
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; presets are {', '.join(PRESETS)}")
    return override((EXPERIMENTS if experiment else PRESETS)[preset], overrides)
