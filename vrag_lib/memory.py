"""How much memory of a card a training is expected to take: arithmetic on shapes, not a measurement.

    print(expected_memory(load_config("gpu_3b"), "grpo"))       # bytes by part, and the peak

Counted is what grows with the model or the context; the CUDA context (about 0.5 GiB), fragments and the features of
images come on top, so leave a tenth of the card free. Shapes are those of the published checkpoints; the number of
parameters comes from the model itself, built without memory.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from vrag_lib.config import Config, ConfigError
from vrag_lib.context_cache import MAX_BYTES as CONTEXT_BYTES
from vrag_lib.torch_setup import ensure_torchvision

GIB = 2**30

RETRIEVER_PARAMETERS = 2_210_000_000
"""Of ColQwen2, a Qwen2-VL-2B; in bfloat16, on every card that samples."""

ENGINE = int(0.7 * GIB)
"""What vLLM takes beside weights and keys and values: positions, buffers for MAX_BATCHED_TOKENS, graphs. Reckoned."""

_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
           "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "spatial_merge_size": 2}  # fmt: skip

SHAPES = {
    "Qwen2.5-VL-3B": {
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen2.5-VL-7B": {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Language models of the published checkpoints; the vision tower is the same but for the width of its output."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each card: held all the time, and what is added in each phase."""

    held: dict[str, int]
    rollout: dict[str, int]
    logprobs: dict[str, int]
    update: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes in the largest phase."""
        phases = (self.rollout, self.logprobs, self.update)
        return sum(self.held.values()) + max(sum(phase.values()) for phase in phases)

    def __str__(self) -> str:
        phases = (("all the time", self.held), ("in rollouts", self.rollout),
                  ("in fixed log-probs", self.logprobs), ("in updates", self.update))  # fmt: skip
        lines = [f"{v / GIB:8.1f} GiB  {phase}: {part}" for phase, parts in phases for part, v in parts.items() if v]
        return "\n".join([*lines, f"{self.peak / GIB:8.1f} GiB  expected at the peak, on each card; not measured"])


def expected_memory(config: Config, stage: str = "grpo", shards: int = 1, card: float | None = None) -> Memory:
    """What `vrag sft` or `vrag grpo` (`stage`) is expected to take on each of the `shards` cards that share out the
    weights (launch/fsdp.yaml).

    An update holds one micro-batch of the longest context that the settings allow. card: size of each in GiB; vLLM's
    share of it in rollouts (`rollout.gpu_memory_utilization`) is counted only where it is given.

    Raises ConfigError for a model whose shape is not in SHAPES, ValueError for an unknown stage or no card.
    """
    if stage not in ("sft", "grpo"):
        raise ValueError(f"memory is expected for sft or grpo, not {stage!r}")
    if shards < 1:
        raise ValueError(f"weights lie on one card at least, not on {shards}")
    settings = config.sft if stage == "sft" else config.grpo
    shape = _shape(config.policy.model)
    everything, adapted = _parameters(_name(config.policy.model), settings.lora_rank, settings.lora_targets)
    lora = settings.lora_rank > 0
    size = 2 if lora else 4  # bytes of a weight: bfloat16 below an adapter, else float32
    held = {"weights": everything * size // shards}
    if lora:
        held["adapter with its gradients and AdamW"] = 16 * adapted // shards
    else:
        held["gradients and AdamW"] = 12 * everything // shards
    if stage == "grpo" and not lora and config.grpo.kl_coefficient:
        held["reference"] = held["weights"]
    tokens = settings.max_tokens if stage == "sft" else settings.max_context_tokens
    logits = tokens * settings.micro_batch_size // 2 * shape["vocab_size"] * size
    rollout: dict[str, int] = {}
    logprobs: dict[str, int] = {}
    if stage == "grpo":
        if config.retrieval.kind == "visual" and config.retrieval.device != "cpu":
            held["retriever"] = 2 * RETRIEVER_PARAMETERS
        if shards > 1:
            rollout["weights gathered"] = logprobs["weights gathered"] = everything * size - held["weights"]
        if config.rollout.engine == "transformers":
            rollout["keys and values"] = tokens * config.grpo.rollout_batch_size * _cache_bytes(shape, size)
            rollout["contexts read before"] = CONTEXT_BYTES
        elif card is not None:
            rollout["vLLM"] = int(config.rollout.gpu_memory_utilization * card * GIB)
            _check_engine(rollout["vLLM"], 2 * everything, 2 * adapted, tokens * _cache_bytes(shape, 2))
        logprobs["logits"] = 2 * logits
    update = _update(shape, tokens * settings.micro_batch_size, size, settings.gradient_checkpointing, logits, lora)
    return Memory(held, rollout, logprobs, update)


def _check_engine(share: int, weights: int, adapter: int, one_context: int) -> None:
    """Raises ConfigError where vLLM's share of the card does not hold its weights in bfloat16, an adapter, keys and
    values of the longest context, and ENGINE: it would not start."""
    if share < (least := weights + adapter + one_context + ENGINE):
        raise ConfigError(
            f"rollout.gpu_memory_utilization gives vLLM {share / GIB:.1f} GiB of this card, and it takes at least "
            f"{least / GIB:.1f} to start: raise it, or sample with rollout.engine=transformers"
        )


def _update(shape: dict, tokens: int, size: int, checkpointing: bool, logits: int, lora: bool) -> dict[str, int]:
    width, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    # Kept of one layer for its backward pass, per token: norms, queries, attention, projections (about 8 times the
    # width), and gate, up and their product.
    layer = tokens * (8 * width + 3 * inner) * size
    if lora:  # and what goes into each of the seven matrices once more in float32, the adapter's own
        layer += tokens * (6 * width + inner) * 4
    kept = tokens * width * size * layers + layer if checkpointing else layer * layers
    # Half of a context's tokens are replies at most, the rest images and the question. Logits are there twice, as they
    # come and of the trained tokens, and so are their gradients.
    return {"activations": kept, "logits": 4 * logits}


def _cache_bytes(shape: dict, size: int) -> int:
    head = shape["hidden_size"] // shape["num_attention_heads"]
    return 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * size


def _name(model: str) -> str:
    name = next((name for name in SHAPES if name.lower() in model.lower()), None)
    if name is None:
        raise ConfigError(f"no shape is known of policy.model={model!r}; known are {', '.join(SHAPES)}")
    return name


def _shape(model: str) -> dict:
    return SHAPES[_name(model)]


@functools.cache
def _parameters(name: str, rank: int, targets: str) -> tuple[int, int]:
    """Parameters of the model, and of an adapter of this rank."""
    ensure_torchvision()
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(SHAPES[name])
    tied = text.pop("tie_word_embeddings")
    vision = _VISION | {"out_hidden_size": text["hidden_size"]}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
        )
    wanted = re.compile(targets)
    adapted = sum(
        rank * (module.in_features + module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and wanted.fullmatch(path)
    )
    return sum(parameter.numel() for parameter in model.parameters()), adapted
