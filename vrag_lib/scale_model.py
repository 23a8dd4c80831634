"""Tiny models of the real classes, so that everything that takes a Qwen2.5-VL or a ColQwen2 runs without a model hub.

`build_tiny_qwen2_5_vl` makes an agent that AutoModelForImageTextToText loads, `build_tiny_colqwen2` a page encoder
that byaldi and colpali-engine load. Both have random weights and have learnt nothing: they exercise code, not skill.
Their tokenizer is byte-level BPE as Qwen's, trained on the few hundred words below, with Qwen's special tokens and
each action tag as one ordinary token.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vrag_lib.torch_setup import ensure_torchvision

VERSION = 1
"""Raised when a build changes, so that an older folder is not taken for the same model."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2-VL's own; `<|endoftext|>` pads and `<|im_end|>` ends a turn, as there."""

ACTION_TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "bbox", "answer") for slash in ("", "/"))
"""Single tokens, but not special ones: they are part of a reply's text and survive decoding."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message.role != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{%- set parts = [{'type': 'text', 'text': message.content}] -%}"
    "{%- else -%}{%- set parts = message.content -%}{%- endif -%}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{%- for part in parts -%}{{ part.text }}{%- endfor -%}{{ '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}"
    "{%- for part in parts -%}"
    "{%- if part.type == 'text' -%}{{ part.text }}"
    "{%- else -%}{{ '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}{%- endif -%}"
    "{%- endfor -%}{{ '<|im_end|>' }}"
    "{%- endif -%}"
    "{{ '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
"""Qwen2.5-VL's conversation format for text, images and videos; assistant turns are marked for assistant-only loss."""

_TEXT = """
system user assistant You are a helpful assistant. Describe the image. Answer the given question.
Question: what is the value shown in the chart on this page? Which year had the highest number? How many are there?
Reason first, then search for a page, look closer at a region of the image, or give the answer. I do not know yet.
The page shows a table of figures by year and by region, and the bar for the third quarter is the tallest of all.
The search returned a page with a title, a figure, a caption and two columns of text. Let me look at the legend.
revenue profit cost sales share growth rate total average percent million billion thousand units staff energy water
north south east west europe asia africa america germany france china india japan brazil
january february march april may june july august september october november december
page document report section figure table chart map photo diagram slide list row column cell label axis title footer
left right top bottom upper lower first second third last next before after between above below more less most least
0 1 2 3 4 5 6 7 8 9 10 20 50 100 1990 2000 2010 2015 2018 2019 2020 2021 2022 2023 2024 2025
[100, 200, 300, 400] 12.5% $3.4 (7) "yes" 'no' a/b c-d e_f g:h i;j k,l. m! n? o
"""


_generator = threading.Lock()  # two builds in threads would draw from the one global generator in turns


def build_tiny_qwen2_5_vl(path: str | Path, seed: int = 0) -> Path:
    """Write a random Qwen2.5-VL of 0.9 M parameters with tokenizer, chat template and processor; return `path`.

    The same seed gives the same weights. Image sides are multiples of 28 and images of 4 to 16,384 vision tokens are
    taken as they are, as with the published checkpoints. A folder that holds this very model is left as it is.

    Raises FileExistsError when `path` holds anything else.
    """

    def make() -> tuple[Any, Any]:
        from transformers import (
            GenerationConfig,
            Qwen2_5_VLConfig,
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLProcessor,
        )

        tokenizer = build_tokenizer()
        vision = {
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [2],
        }
        config = Qwen2_5_VLConfig(
            text_config=_language_config(tokenizer, layers=4),
            vision_config=vision,
            tie_word_embeddings=True,
            **_token_ids(tokenizer),
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
        ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
        return model, _processor(Qwen2_5_VLProcessor, tokenizer, 4, 16384)

    return _build(path, "tiny-qwen2.5-vl", seed, make)


def build_tiny_colqwen2(path: str | Path, seed: int = 0, max_vision_tokens: int = 64) -> Path:
    """Write a random ColQwen2 of 0.6 M parameters with tokenizer and processor; return `path`.

    Pages are shown at up to `max_vision_tokens` tokens of 28 x 28 pixels; the published models use 768. The same
    seed gives the same weights. A folder that holds this very model is left as it is.

    Raises ValueError when the path has no "colqwen2" in it, which byaldi goes by, and FileExistsError when it holds
    anything else.
    """
    if "colqwen2" not in str(path).lower() or "colpali" in str(path).lower():
        raise ValueError(f"byaldi tells the model class by the path: {path} needs colqwen2, and no colpali, in it")

    def make() -> tuple[Any, Any]:
        import torch
        from colpali_engine.models import ColQwen2, ColQwen2Processor
        from transformers import Qwen2VLConfig

        tokenizer = build_tokenizer()
        vision = {
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 128,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        }
        config = Qwen2VLConfig(
            text_config=_language_config(tokenizer, layers=2), vision_config=vision, **_token_ids(tokenizer)
        )
        model = ColQwen2(config)
        # The padding token's embedding is zero. With a zero bias it would be projected to a vector of length 0,
        # and dividing by that length gives NaN.
        torch.nn.init.normal_(model.custom_text_proj.bias, std=0.02)
        return model, _processor(ColQwen2Processor, tokenizer, 1, max_vision_tokens)

    return _build(path, f"tiny-colqwen2-{max_vision_tokens}", seed, make)


def build_tokenizer(lines: Sequence[str] | None = None, vocab_size: int = 4096) -> Any:
    """A Qwen2Tokenizer over bytes and what byte-pair merges find in `lines` (default: the built-in text, about 700
    tokens), with Qwen's special tokens and the action tags; the same lines give the same tokenizer."""
    ensure_torchvision()
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(_TEXT.splitlines() if lines is None else lines, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ACTION_TAGS])
    return tokenizer


def _language_config(tokenizer: Any, layers: int) -> dict[str, Any]:
    """A Qwen2 language model 128 wide: 4 heads of 32, over 2 key-value heads; 32 is a size vLLM's CPU kernels take."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def _token_ids(tokenizer: Any) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def _processor(processor_class: type, tokenizer: Any, min_tokens: int, max_tokens: int) -> Any:
    """A processor that shows images at `min_tokens` to `max_tokens` vision tokens."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    images = Qwen2VLImageProcessor(min_pixels=min_tokens * 28 * 28, max_pixels=max_tokens * 28 * 28)
    return processor_class(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def _build(path: str | Path, name: str, seed: int, make: Callable[[], tuple[Any, Any]]) -> Path:
    """Save what `make` returns to `path`, whole or not at all, with a card that says what it is."""
    path = Path(path)
    ensure_torchvision()
    card = {
        "name": name,
        "weights": "random",
        "seed": seed,
        "version": VERSION,
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }
    if path.exists() and any(path.iterdir()):
        if (path / "card.json").is_file() and json.loads((path / "card.json").read_text()) == card:
            return path
        raise FileExistsError(f"{path} holds something other than {name} of seed {seed}; delete it or name another")
    import torch

    with _generator, torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        model, processor = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        model.eval().save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / "README.md").write_text(_model_card(name, seed, model))
        (temporary / "card.json").write_text(json.dumps(card, indent=1) + "\n")
        temporary.chmod(0o755)
        try:
            os.replace(temporary, path)
        except OSError:
            # Another process finished first: the folder is no longer empty and holds the same model.
            if not (path / "card.json").is_file() or json.loads((path / "card.json").read_text()) != card:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _model_card(name: str, seed: int, model: Any) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"---\nlicense: apache-2.0\n---\n# {name}\n\n"
        f"A {type(model).__name__} of {parameters:,} parameters with **random weights** (seed {seed}). It was never "
        "trained and knows nothing; it exists so that code for the real class can run without a model hub.\n"
    )
