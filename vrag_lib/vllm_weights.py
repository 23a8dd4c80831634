"""The weights' way from GRPO's trainer to a vLLM engine in the same process.

Before each rollout the engine gets the LoRA adapter, as a folder of its own per update, or all weights, in memory; with
`rollout.merge_adapter` the adapter's share is added to them on the way. On a GPU its memory is the trainer's between
rollouts. Under `accelerate launch` each process has an engine; weights have to be whole in each, which under FSDP 2
`sharding.whole_weights` sees to.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrag_lib.config import ConfigError, RolloutConfig
from vrag_lib.policy_vllm import VLLMPolicy, require_vllm
from vrag_lib.vision_cache import weights_state

if TYPE_CHECKING:
    import torch

    from vrag_lib.corpus import Corpus
    from vrag_lib.policy_transformers import TransformersPolicy

_LIMITS = ("temperature", "top_p", "max_reply_tokens", "max_context_tokens", "batch_size")


def merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of a model's weights as in its checkpoint, a LoRA adapter's share added; the model keeps its."""
    for name, value in _weights(model).items():
        if ".lora_" in name:
            continue
        layer, is_adapted, _ = name.rpartition(".base_layer.weight")
        if is_adapted:
            adapted = model.get_submodule(layer)
            value = value + adapted.get_delta_weight(adapted.active_adapters[0]).detach()
        yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), value


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """As `state_dict`, which under FSDP would give shards even while the weights are whole."""
    return {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}


class VLLMSampler:
    """Called before each rollout of GRPO with the policy under training (`grpo.Sampler`); returns a VLLMPolicy with its
    weights. The engine starts with the first call, from `checkpoint`, which training started from.

    Raises ConfigError without vLLM, for weights that are spread over several processes, and for an adapter of the
    vision tower that is not merged: vLLM would leave it out.
    """

    def __init__(self, checkpoint: str | Path, corpus: Corpus, settings: RolloutConfig):
        require_vllm()
        self.checkpoint, self.corpus, self.settings = checkpoint, corpus, settings
        self.policy: VLLMPolicy | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="vrag-adapters-")
        self._updates = 0
        self._state: Any = None
        self._asleep = False

    def __call__(self, agent: TransformersPolicy) -> VLLMPolicy:
        if self.policy is None:
            self.policy = self._start(agent)
        if self._asleep:
            import torch

            torch.cuda.empty_cache()  # what the trainer has freed
            self.policy.engine.wake_up()
            self._asleep = False
        state = weights_state(agent.model.parameters())
        if state != self._state:
            self._update(agent.model)
            self._state = state
        return self.policy

    def rest(self) -> None:
        """Called after each rollout: leave the GPU's memory to the trainer."""
        if self.policy is not None and self._on_gpu and self.settings.sleep:
            self.policy.engine.sleep(level=1)
            self._asleep = True

    def _adapters(self, model: Any) -> list[Any]:
        """Settings of the adapters that vLLM is to apply itself."""
        return [] if self.settings.merge_adapter else list(getattr(model, "peft_config", {}).values())

    def _start(self, agent: TransformersPolicy) -> VLLMPolicy:
        weight = next(agent.model.parameters())
        if hasattr(weight, "ds_id") or hasattr(weight, "placements"):
            raise ConfigError("rollout.engine=vllm needs whole weights in each process, not shards")
        adapters = self._adapters(agent.model)
        if adapters and any("visual." in name and ".lora_" in name for name, _ in agent.model.named_parameters()):
            raise ConfigError("vLLM cannot adapt the vision tower: change grpo.lora_targets or rollout.merge_adapter")
        self._on_gpu = weight.device.type == "cuda"
        return VLLMPolicy.from_pretrained(
            self.checkpoint,
            self.corpus,
            self.settings,
            device=weight.device.type,
            dtype=str(weight.dtype).removeprefix("torch."),
            lora_rank=max((adapter.r for adapter in adapters), default=0),
            **{name: getattr(agent, name) for name in _LIMITS},
        )

    def _update(self, model: Any) -> None:
        if not self._adapters(model):
            return self.policy.use_weights(merged_weights(model))
        old = Path(self._folder.name, f"update_{self._updates}")
        self._updates += 1
        new = Path(self._folder.name, f"update_{self._updates}")
        model.save_pretrained(new, state_dict=_weights(model), save_embedding_layers=False)
        self.policy.use_adapter(new, self._updates)
        shutil.rmtree(old, ignore_errors=True)
        return None
