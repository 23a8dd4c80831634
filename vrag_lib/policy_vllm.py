"""Replies sampled by vLLM instead of Transformers: paged keys and values, continuous batches, the same policy protocol.

The engine runs in this process, beside a trainer if there is one (colocated; `vllm_weights`). Tokens, limits and what
log-probs mean are those of `policy_chat`, so trajectories of both engines are trained alike. In float32 the two agree
within 1e-4; which tokens are drawn from the same seed differs.

What vLLM does in silence, and what is done about it here:

- It expands each <|image_pad|> to the image's vision tokens, also where they are expanded already, and asks for no
  image where pads outnumber images: contexts are sent with one pad per image, counted, and the prompt that comes back
  has to be the context token for token.
- It resizes images by the checkpoint's own limits: switched off, images arrive at their shown size.
- Keys and values of an earlier adapter are found again under its id: every update gets an id of its own. Full weights
  invalidate what was computed with the old ones.
- On a CPU the output head tied to the embedding keeps a packed copy of old weights: it is sent as a weight of its own.
- It takes sampling defaults from the checkpoint: ignored. It replaces `torch.set_num_threads`: put back.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrag_lib.actions import STOP_STRINGS
from vrag_lib.config import ConfigError, RolloutConfig
from vrag_lib.policy import Reply
from vrag_lib.policy_chat import ChatPolicy, CheckpointError, Context
from vrag_lib.torch_setup import ensure_torchvision
from vrag_lib.training import checkpoint_and_adapter, process_count, require_first_card

if TYPE_CHECKING:
    import torch

    from vrag_lib.corpus import Corpus

MAX_IMAGES = 32
"""Images per conversation that the engine is started for; a conversation with more gets an error."""

MAX_BATCHED_TOKENS = 2048
"""Tokens that go through the model at once on a GPU; vLLM's own choice takes memory for four times as many."""

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM's kernels are made for; an adapter runs in the next larger one."""

_BANNED = -100.0
"""Added to the logits of image tokens, the most that vLLM allows: e^-100 of their probability is left."""

REMEDY = (
    "rollout.engine=vllm needs the package vllm: on a CUDA machine pip install 'vrag-lib[gpu]'; without one `make "
    "test-vllm` sets up .venv-vllm with a build for processors; rollout.engine=transformers needs nothing"
)


def require_vllm() -> None:
    """Raises ConfigError, with what to install, when vLLM is not there."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(REMEDY)


def start_engine(
    checkpoint: str | Path,
    settings: RolloutConfig,
    *,
    on_gpu: bool,
    dtype: str,
    max_context_tokens: int,
    batch_size: int,
    lora_rank: int = 0,
) -> Any:
    """A `vllm.LLM` in this process. dtype: float32 or bfloat16. max_context_tokens: longest context with its reply.
    batch_size: conversations sampled at once, the others wait. lora_rank: largest adapter; 0 for none.

    Raises ConfigError when vLLM is not installed.
    """
    require_vllm()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are handed over in memory
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads are in this process, too
        "VLLM_NO_USAGE_STATS": "1",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not on_gpu:  # its sampler would be compiled at the first call: half a minute, and a compiler needed
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    ensure_torchvision()
    import torch
    import vllm.triton_utils.dispatcher
    from vllm import LLM, ModelRegistry
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

    # vLLM would look at the model's class in a process of its own, where `ensure_torchvision` has not been called.
    for model in (Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration):
        ModelRegistry.register_model(model.__name__, model)
    vllm.triton_utils.dispatcher.sys = _OwnModules()
    _forget_callers()
    options: dict[str, Any] = {}
    if process_count() > 1:  # each has a whole engine, within the group that the trainer has opened
        options["distributed_executor_backend"] = "external_launcher"
    if lora_rank:
        rank = next((rank for rank in _LORA_RANKS if rank >= lora_rank), None)
        if rank is None:
            raise ConfigError(f"vLLM takes LoRA adapters up to rank {_LORA_RANKS[-1]}, not {lora_rank}")
        options |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
    if on_gpu:
        torch.cuda.empty_cache()  # what the trainer has freed
        options |= {
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enforce_eager": settings.enforce_eager,
            "max_num_batched_tokens": MAX_BATCHED_TOKENS,
            "enable_sleep_mode": settings.sleep,
        }
    else:
        options |= {
            "kv_cache_memory_bytes": settings.cpu_cache_mib * 2**20,
            "block_size": 32,
            "enforce_eager": True,
            "enable_chunked_prefill": False,  # a seed and a prompt read in pieces stop the processor build
            "max_num_batched_tokens": max(16384, max_context_tokens),
        }
    set_num_threads = torch.set_num_threads
    try:
        return LLM(
            model=str(checkpoint),
            dtype=dtype,
            max_model_len=max_context_tokens,
            max_num_seqs=batch_size,
            limit_mm_per_prompt={"image": MAX_IMAGES, "video": 0},
            mm_processor_kwargs={"do_resize": False},
            mm_processor_cache_gb=1,
            skip_mm_profiling=True,  # it would make room for the largest image that the checkpoint can read
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        )
    finally:
        torch.set_num_threads = set_num_threads


def _forget_callers() -> None:
    """Let go of what a failed import of vLLM's holds: with its traceback every caller of this one and what they made,
    the first engine among it, which would never be freed."""
    from vllm.multimodal.media import audio

    if (kept := getattr(audio, "_torchcodec_import_exc", None)) is not None:
        kept.with_traceback(None)


class _OwnModules:
    """For vLLM's `sys.modules`: on a CPU it looks for its kernels in everything imported, and stops at some of it."""

    @property
    def modules(self) -> dict[str, Any]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}


class VLLMPolicy(ChatPolicy):
    """Samples replies with a vLLM engine.

    With seeds, a reply depends on its conversation and seed alone, up to rounding. engine: a `vllm.LLM` of the same
    checkpoint as `processor`, `config` and `generation_config`. corpus, limits: those of `ChatPolicy`.
    """

    def __init__(
        self,
        engine: Any,
        processor: Any,
        config: Any,
        generation_config: Any,
        corpus: Corpus,
        *,
        name: str = "vllm",
        **limits: Any,
    ):
        super().__init__(processor, config, generation_config, corpus, name=name, **limits)
        self.engine = engine
        self._adapter: Any = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        corpus: Corpus,
        settings: RolloutConfig | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        lora_rank: int = 0,
        **limits: Any,
    ) -> VLLMPolicy:
        """Load a checkpoint folder, hub id, or the folder of a LoRA adapter. `device`: auto (cuda if there is one),
        cpu, cuda; `dtype`: auto (float32 on the CPU, else bfloat16), float32, bfloat16. lora_rank: largest adapter that
        `use_adapter` will be given.

        Raises ConfigError without vLLM, for another card than the first, and for an adapter whose checkpoint is not
        there, CheckpointError when the checkpoint cannot be loaded.
        """
        require_vllm()
        require_first_card("vLLM", device)
        checkpoint, adapter = checkpoint_and_adapter(path)
        if adapter is not None:
            lora_rank = max(lora_rank, json.loads((adapter / "adapter_config.json").read_text())["r"])
        ensure_torchvision()
        import torch
        from transformers import AutoConfig, AutoProcessor, GenerationConfig

        on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if dtype == "auto":
            dtype = "bfloat16" if on_gpu else "float32"
        local = {"local_files_only": Path(checkpoint).is_dir()}
        try:
            config = AutoConfig.from_pretrained(checkpoint, **local)
            processor = AutoProcessor.from_pretrained(checkpoint, **local)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be loaded as a Qwen2-VL-type checkpoint: {error}") from error
        try:
            generation_config = GenerationConfig.from_pretrained(checkpoint, **local)
        except OSError:  # a checkpoint may do without
            generation_config = None
        limits.setdefault("name", f"vllm:{Path(path).name}")
        policy = cls(None, processor, config, generation_config, corpus, **limits)
        policy.engine = start_engine(
            checkpoint,
            settings or RolloutConfig(),
            on_gpu=on_gpu,
            dtype=dtype,
            max_context_tokens=policy.max_context_tokens,
            batch_size=policy.batch_size,
            lora_rank=lora_rank,
        )
        if adapter is not None:
            policy.use_adapter(adapter, 1)
        return policy

    def use_adapter(self, folder: str | Path, number: int) -> None:
        """Sample with the LoRA adapter in `folder` from now on. `number`, 1 or more, and the folder's name must be new
        with each: what was computed under an old number is used again."""
        from vllm.lora.request import LoRARequest

        self._adapter = LoRARequest(Path(folder).name, number, str(folder))

    def use_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Sample with these weights, all of the model's by their names in the checkpoint, from now on."""
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.engine.llm_engine.reset_encoder_cache()
        self.engine.reset_prefix_cache()

    def prompt_of(self, context: Context) -> dict[str, Any]:
        """The context as vLLM takes it: token ids with one placeholder per image, and the images.

        Raises ValueError when placeholders and images are not equally many.
        """
        pad = self._id("<|image_pad|>")
        ids = context.token_ids
        short = [token for i, token in enumerate(ids) if token != pad or i == 0 or ids[i - 1] != pad]
        if (pads := short.count(pad)) != len(context.images):
            raise ValueError(f"the context has places for {pads} images and {len(context.images)} images")
        prompt: dict[str, Any] = {"prompt_token_ids": short}
        if context.images:
            prompt["multi_modal_data"] = {"image": [self._render(image) for image in context.images]}
            prompt["multi_modal_uuids"] = {"image": [repr(image) for image in context.images]}  # same name, same pixels
        return prompt

    def _prepare_images(self, context: Context) -> None:
        if len(context.images) > MAX_IMAGES:
            raise ValueError(f"vLLM was started for {MAX_IMAGES} images, the conversation shows {len(context.images)}")
        self.prompt_of(context)

    def _sample_contexts(self, contexts: list[Context], seeds: list[int]) -> list[Reply]:
        if not contexts:
            return []
        outputs = self.engine.generate(
            [self.prompt_of(context) for context in contexts],
            [self._sampling(context, seed) for context, seed in zip(contexts, seeds, strict=True)],
            use_tqdm=False,
            lora_request=self._adapter,
        )
        return [self._reply(context, output) for context, output in zip(contexts, outputs, strict=True)]

    def _sampling(self, context: Context, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            max_tokens=self.reply_limit(context),
            logprobs=0,  # of the sampled token alone
            logit_bias=dict.fromkeys(self.suppressed_token_ids, _BANNED),
            stop=list(STOP_STRINGS),
            include_stop_str_in_output=True,
            stop_token_ids=sorted(self._ends),
            ignore_eos=True,  # the tokens that end a reply are those above
            skip_special_tokens=False,
        )

    def _reply(self, context: Context, output: Any) -> Reply:
        """What vLLM sampled, as a Reply. Raises RuntimeError when it sampled from another context, or ended a reply
        where the rules of `policy_chat` do not."""
        if tuple(output.prompt_token_ids) != context.token_ids:
            raise RuntimeError(
                f"{self.name} read {len(output.prompt_token_ids)} tokens where the context has "
                f"{len(context.token_ids)}: it prepared an image in another way"
            )
        sampled = output.outputs[0]
        ids = list(sampled.token_ids)
        logprobs = tuple(entry[token].logprob for entry, token in zip(sampled.logprobs, ids, strict=True))
        reason = self._finish_reason(ids, self.reply_limit(context))
        if not reason:
            raise RuntimeError(f"{self.name} ended a reply for {sampled.finish_reason} ({sampled.stop_reason!r})")
        return Reply(self._text(ids), tuple(ids), logprobs, context.token_ids, reason)
