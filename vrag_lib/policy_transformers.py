"""The Transformers policy: any Qwen2-VL or Qwen2.5-VL checkpoint, from a folder or the hub.

Tokens, limits and what log-probs mean: `policy_chat`. Deviation from the released code: positions are multimodal (3-D)
in sampling, as they must be in training (trap T1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrag_lib.context_cache import ContextCache, batch_cache, row_states
from vrag_lib.policy import Reply
from vrag_lib.policy_chat import ChatPolicy, CheckpointError, Context
from vrag_lib.torch_setup import ensure_torchvision
from vrag_lib.training import checkpoint_and_adapter
from vrag_lib.trajectory import ImageRef
from vrag_lib.vision_cache import remember_features

if TYPE_CHECKING:
    import torch

    from vrag_lib.corpus import Corpus

_PREPARED_IMAGES = 192
"""Images kept as patches between calls, at most about 10 MB each at 512 vision tokens: a conversation shows them every
turn."""


class TransformersPolicy(ChatPolicy):
    """Samples replies from a Qwen2-VL-type model in left-padded batches with a key-value cache, which the next turn of
    a conversation goes on from.

    With seeds, a reply depends on its conversation and seed alone: every row draws from a generator of its own. In
    float32 the rest of the batch moves log-probs by rounding only (1e-6); in bfloat16 rounding can change a token.

    corpus, limits: those of `ChatPolicy`; on a full GPU a batch is halved
    and tried again.

    Raises CheckpointError when the processor's chat template or image patches are not Qwen2-VL's.
    """

    def __init__(self, model: Any, processor: Any, corpus: Corpus, *, name: str = "transformers", **limits: Any):
        super().__init__(processor, model.config, model.generation_config, corpus, name=name, **limits)
        self.model = model
        self._rope = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)
        if self._rope is None:
            raise CheckpointError(f"{name}: {type(model).__name__} has no multimodal positions; use Qwen2(.5)-VL")
        self.vision_cache = remember_features(model)
        self.context_cache = ContextCache(model)
        self._patches = lru_cache(_PREPARED_IMAGES)(lambda ref: self._prepare_image(self._render(ref)))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, corpus: Corpus, *, device: str = "auto", dtype: str = "auto", **settings: Any
    ) -> TransformersPolicy:
        """Load a checkpoint folder, hub id, or the folder of a LoRA adapter, which stays one: beside weights in
        bfloat16 it is exact, added to them much of it is rounded away. `device`: auto (cuda if there is one), cpu,
        cuda; `dtype`: auto (float32 on the CPU, else bfloat16), float32, bfloat16. `settings` are those of the class.

        Raises CheckpointError when it cannot be loaded, or when a weight of the model is not in it, ConfigError for an
        adapter whose checkpoint is not there.
        """
        ensure_torchvision()
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        checkpoint, adapter = checkpoint_and_adapter(path)
        local = Path(checkpoint).is_dir()
        if local:  # an adapter trained on it names it, and is to find it from any working directory
            checkpoint = Path(checkpoint).resolve()
        try:
            processor = AutoProcessor.from_pretrained(checkpoint, local_files_only=local)
            model, info = AutoModelForImageTextToText.from_pretrained(
                checkpoint,
                dtype=getattr(torch, dtype),
                local_files_only=local,
                output_loading_info=True,
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be loaded as a Qwen2-VL-type checkpoint: {error}") from error
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise CheckpointError(f"{path} lacks {len(missing)} weights of its model, for example {missing[0]}")
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        settings.setdefault("name", f"transformers:{Path(path).name}")
        return cls(model.to(device), processor, corpus, **settings)

    def _prepare_images(self, context: Context) -> None:
        for image in context.images:
            self._patches(image)

    def _sample_contexts(self, contexts: list[Context], seeds: list[int]) -> list[Reply]:
        replies: dict[int, Reply] = {}
        order = sorted(range(len(contexts)), key=lambda i: (len(contexts[i].token_ids), i))
        for start in range(0, len(order), self.batch_size):  # similar lengths share a batch
            chosen = order[start : start + self.batch_size]
            sampled = self._sample_halving([contexts[i] for i in chosen], [seeds[i] for i in chosen])
            replies |= zip(chosen, sampled, strict=True)
        return [replies[i] for i in range(len(contexts))]

    def _sample_halving(self, contexts: list[Context], seeds: Sequence[int]) -> list[Reply]:
        """`_sample`, in halves when the accelerator's memory does not hold the batch, not even with nothing kept."""
        import torch

        was_training = self.model.training
        self.model.eval()  # a trainer may hand over its model between two steps: no dropout while it samples
        kept = len(self.context_cache)
        try:
            return self._sample(contexts, seeds)
        except torch.cuda.OutOfMemoryError as error:
            if len(contexts) == 1 and not kept:
                return [Reply("", finish_reason="error", error=f"the context does not fit in memory: {error}")]
        finally:
            self.model.train(was_training)
        self.context_cache.clear()
        torch.cuda.empty_cache()
        if kept:
            return self._sample_halving(contexts, seeds)
        half = len(contexts) // 2
        first = self._sample_halving(contexts[:half], seeds[:half])
        return first + self._sample_halving(contexts[half:], seeds[half:])

    def _prepare_image(self, image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches (patches, 1176) and grid (1, 3) of one image at its shown size."""
        pixels = self.processor.image_processor(images=[image], do_resize=False, return_tensors="pt")
        return pixels["pixel_values"], pixels["image_grid_thw"]

    def model_inputs(self, contexts: Sequence[Context], read: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """Left-padded inputs of one forward pass: input_ids, attention_mask (B, T), position_ids (3, B, T) and, if
        there are images, pixel_values (patches, 1176) and image_grid_thw (images, 3). `read`: tokens at the start of
        each context, whole images among them, that are left out.

        Raises ValueError when the image processor makes another number of vision tokens than the context holds.
        """
        import torch

        read = read or [0] * len(contexts)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._im_end
        ids, mask = _left_padded([context.token_ids for context in contexts], pad)
        is_image = (ids == self._id("<|image_pad|>")).int() * mask.int()
        grids = [self._grid(image) for context in contexts for image in context.images]
        positions, _ = self._rope.get_rope_index(
            ids, is_image, image_grid_thw=torch.cat(grids) if grids else None, attention_mask=mask
        )
        longest = max(len(context.token_ids) - start for context, start in zip(contexts, read, strict=True))
        inputs = {"position_ids": positions[..., -longest:]}
        new = [context.token_ids[start:] for context, start in zip(contexts, read, strict=True)]
        inputs["input_ids"], inputs["attention_mask"] = _left_padded(new, pad)
        images = [image for c, start in zip(contexts, read, strict=True) for image in c.images[self._shown(c, start) :]]
        if images:
            dtype = next(self.model.parameters()).dtype
            inputs["pixel_values"] = torch.cat([self._patches(image)[0] for image in images]).to(dtype)
            inputs["image_grid_thw"] = torch.cat([self._grid(image) for image in images])
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def _grid(self, image: ImageRef) -> torch.Tensor:
        """Grid (1, 3) of an image: its patches over time, height and width."""
        grid = self._patches(image)[1]
        (_, height, width), shown = grid[0].tolist(), image.view.shown
        patch = self.processor.image_processor.patch_size
        if (width * patch, height * patch) != (shown.width, shown.height):
            raise ValueError(f"an image of {shown} became {width} x {height} patches of {patch} pixels")
        return grid

    def _shown(self, context: Context, length: int) -> int:
        """How many images the first `length` tokens of a context show."""
        return context.token_ids[:length].count(self._id("<|vision_start|>"))

    def _read(self, contexts: list[Context]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """The model's output after every context, with its cache; the attention mask (B, T) and the position (B,) of
        the next token. What was read in an earlier turn, or for another row, is not read again."""
        import torch

        unique = list(dict.fromkeys(contexts))
        image_start = self._id("<|vision_start|>")
        self.context_cache.forget_if_changed()
        reads = [self.context_cache.take(context.token_ids, context.images, image_start) for context in unique]
        inputs = self.model_inputs(unique, [0 if read is None else read.length for read in reads])
        position = inputs["position_ids"].amax((0, 2)) + 1
        if known := batch_cache(reads):
            inputs["past_key_values"], before = known
            inputs["attention_mask"] = torch.cat([before, inputs["attention_mask"]], dim=1)
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        mask = inputs["attention_mask"]
        if len(unique) < len(contexts):
            rows = torch.tensor([unique.index(context) for context in contexts], device=mask.device)
            output.past_key_values.batch_select_indices(rows)
            output.logits, mask, position = output.logits[rows], mask[rows], position[rows]
        return output, mask, position

    def _sample(self, contexts: list[Context], seeds: Sequence[int]) -> list[Reply]:
        """Sample one batch, token by token; a row leaves the batch and the cache as it finishes."""
        import torch

        ids: list[list[int]] = [[] for _ in contexts]
        logprobs: list[list[float]] = [[] for _ in contexts]
        reasons = [""] * len(contexts)
        limits = [self.reply_limit(context) for context in contexts]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = list(range(len(contexts)))
        with torch.inference_mode():
            output, mask, position = self._read(contexts)
            while True:
                chosen, chosen_logprobs = self._draw(output.logits[:, -1].float(), [generators[r] for r in rows])
                for r, token, logprob in zip(rows, chosen.tolist(), chosen_logprobs.tolist(), strict=True):
                    ids[r].append(token)
                    logprobs[r].append(logprob)
                    reasons[r] = self._finish_reason(ids[r], limits[r])
                for i, r in enumerate(rows):
                    if reasons[r]:  # the last token was chosen and not read
                        tokens = contexts[r].token_ids + tuple(ids[r][:-1])
                        states = row_states(output.past_key_values, i, mask[i])
                        self.context_cache.put(tokens, contexts[r].images, states)
                kept = [i for i, r in enumerate(rows) if not reasons[r]]
                if not kept:
                    break
                if len(kept) < len(rows):
                    keep = torch.tensor(kept, device=mask.device)
                    output.past_key_values.batch_select_indices(keep)
                    chosen, mask, position = chosen[keep], mask[keep], position[keep]
                    rows = [rows[i] for i in kept]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                output = self.model(
                    input_ids=chosen[:, None],
                    attention_mask=mask,
                    position_ids=position[None, :, None].expand(3, -1, -1),
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
                position = position + 1
        return [
            Reply(self._text(i), tuple(i), tuple(lp), context.token_ids, reason)
            for i, lp, context, reason in zip(ids, logprobs, contexts, reasons, strict=True)
        ]

    def _draw(self, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        """One token per row of `logits` (B, V), and its log-prob."""
        import torch

        logits[:, list(self.suppressed_token_ids)] = -torch.inf
        logprobs = sampling_logprobs(logits, self.temperature, self.top_p)
        if self.temperature == 0:
            chosen = logprobs.argmax(-1)
        else:
            # Inverse of the cumulative distribution: one number per row and step, whatever the batch. It stays below
            # 1 by more than float64's rounding, so that the search ends on a token that has probability.
            uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
            cumulative = logprobs.double().exp().cumsum(-1)
            target = uniform.clamp(max=1 - 2**-40).to(logits.device)[:, None] * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, target, right=True)[:, 0]
        return chosen, logprobs.gather(-1, chosen[:, None])[:, 0]


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, longest) and mask."""
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, longest - len(row) :] = torch.tensor(row)
        mask[at, longest - len(row) :] = 1
    return ids, mask


def sampling_logprobs(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Log-probs (B, V) of the distribution sampled from: `logits` (B, V) over temperature (1 where it is 0: greedy),
    cut to the smallest set of tokens whose probability reaches `top_p`, the likeliest always in it."""
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    if top_p >= 1:
        return logprobs
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    probs = ordered.exp()
    outside = probs.cumsum(-1) - probs >= top_p  # what comes before a token already reaches top_p
    return logprobs.masked_fill(outside.gather(-1, order.argsort(-1)), float("-inf")).log_softmax(-1)
