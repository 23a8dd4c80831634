"""The scale policy: a real Qwen2.5-VL of 3.7 M parameters, small enough to be trained to read on a laptop.

The paper starts from Qwen2.5-VL-7B and -3B, which read. The laptop preset cannot run those, so it has its own start:
the same class, processor, chat template and tags, a vocabulary of the words of MiniDocs and of the agent's prompt over
bytes (so that every string can be written), digits one by one, and a shown size at which a page's labels can be read
and its figures cannot. `build_model` makes it with random weights, `scale_training` teaches it to perceive.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from vrag_lib import actions, minidocs_documents, minidocs_questions, scale_model
from vrag_lib.geometry import PATCH
from vrag_lib.minidocs_content import (
    BOARDS,
    DIMENSIONS,
    FLOWS,
    MEASURES,
    MONTHS,
    NOT_ANSWERABLE,
    ORGANISATIONS,
    SHORT_MONTHS,
    SURNAMES,
    entities,
)
from vrag_lib.minidocs_documents import LEAST_TOKENS, PAGE_TOKENS
from vrag_lib.scale_model import CHAT_TEMPLATE
from vrag_lib.torch_setup import ensure_torchvision

MIN_PIXELS = LEAST_TOKENS * PATCH * PATCH
MAX_PIXELS = PAGE_TOKENS * PATCH * PATCH
"""Least and largest area of an image shown to the scale policy: as many cells as MiniDocs lays its pages out for
(12 x 8), and for crops, which have other shapes, up to a sixth less.
Goes into `EnvironmentConfig.min_pixels` and `max_pixels` wherever this policy acts."""

BOX_STEP, MOST_COORDINATE = 4, 672
"""The policy writes boxes in multiples of `BOX_STEP` shown pixels, up to 24 cells. Any other box is written, and read,
digit by digit."""

MAX_TOKENS = 4096
"""Longest context in tokens: five images of 96 tokens and the replies fit many times over."""

WEIGHTS = Path(__file__).resolve().parent.parent / "data" / "scale_policy"
"""Where the trained policy lies in the repository."""

COLD_START = WEIGHTS.with_name("scale_cold_start")
"""Where the same policy lies after SFT, as `vrag sft` leaves it: what reinforcement learning starts from."""

AGENT = WEIGHTS.with_name("scale_vrag_rl")
"""Where it lies after reinforcement learning: the agent that the laptop's experiment ends with."""


def legible(folder: Path) -> Path:
    """Where the same lies for MiniDocs' large print (`minidocs.text_px=60`), whose pages of text it reads whole."""
    return folder.with_name(f"{folder.name}_legible")


_VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_heads": 4,
    "out_hidden_size": 192,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
}
_LANGUAGE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,  # of 64: a size that vLLM's CPU kernels take, and room for a word's code
    "max_position_embeddings": MAX_TOKENS,
    "rms_norm_eps": 1e-6,
    # Of 32 frequencies most go to columns, middle ones among them: with Qwen's own shares neighbouring columns of a
    # page would lie 0.006 radians apart. Qwen's base leaves half of them all but still, for looking up words.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [1, 3, 28]},
}

_COMMON = """
system user assistant You are a helpful assistant.
Where is the text: known as the. Leaving aside. Yearly Annual internal Floor Scorecard File no.
What is where is the title of this page? Whose page is this? Read the text. Read the box. Which items are listed? Where
does the page say it? Question: answer: the value, the change, the share, the entry, the heading, the name, the emblem.
I need to look closer at this region. The page shows the row of the table. The figure is too small to read here. Now I
can read it. This is not the right page, search again. First find out who is known by that emblem, then search for the
figure. Nothing answers this. The sum of both is, the difference of both is. I know both figures now. The highest is.
The lowest is. I search for the page of the measure by name. The bar, the point, the legend entry, the sentence, the
box. on at of in by for from and or not no yes than more less most least above below left right upper middle lower row
column chart table text layout bar line pie dashboard cover board flow number page title item entity measure year month
total
"""


@functools.cache
def vocabulary_text() -> tuple[str, ...]:
    """Lines whose words become tokens: the agent's prompts and what MiniDocs' pages and questions say."""
    lines = _COMMON.strip().splitlines()
    lines += [actions.question_prompt(""), actions.NO_NEW_PAGE, actions.LAST_TURN, NOT_ANSWERABLE]
    lines += [actions.invalid_message(reason) for reason in actions.InvalidReason]
    for module in (minidocs_documents, minidocs_questions):  # their templates: sentences, headlines, question forms
        lines += [s for value in vars(module).values() if isinstance(value, tuple | dict) for s in _strings(value)]
    for measure in MEASURES:
        lines += [f"{measure.name} {measure.name.lower()} x {measure.name}", f"x {measure.everyday} {measure.unit}"]
        lines.append(measure.everyday[0].upper() + measure.everyday[1:])
    for dimension in (*DIMENSIONS, MONTHS):
        lines.append(f"{dimension.name} x {dimension.name} {dimension.one} {dimension.preposition}")
        lines += [f"{item} x {item}" for item in dimension.items]
    for board in (*BOARDS, *FLOWS):
        lines += [f"{t} x {t.lower()}" for t in (board.title, board.everyday, board.noun, board.caption)]
        lines += [board.everyday[0].upper() + board.everyday[1:]]
        lines += [f"{heading} x {heading}" for heading in board.headings]
    lines += [f"{word} x {word}" for word in (*SURNAMES, *ORGANISATIONS, *SHORT_MONTHS.values())]
    lines += sorted({f"{word} x {word}" for e in entities("train") for word in e.emblem.split()})
    return tuple(lines)


def _strings(value: Any) -> list[str]:
    parts = value.values() if isinstance(value, dict) else value
    return [part.replace("{", " ").replace("}", " ") for part in parts if isinstance(part, str)]


def _name_parts() -> list[str]:
    """First and second halves of the coined entity names, so that an unseen name is two or three tokens."""
    from vrag_lib import minidocs_content

    return [f"x {start} {start}" for start in minidocs_content.NAME_STARTS] + list(minidocs_content.NAME_ENDS)


def coordinate_tokens(value: int) -> tuple[str, str]:
    """The tokens that write a coordinate: as the first of a box, and as one of those behind it.

    >>> coordinate_tokens(28)
    ('[28', ', 28')
    """
    return f"[{value}", f", {value}"


def build_tokenizer() -> Any:
    """A Qwen2Tokenizer: bytes, whole words of `vocabulary_text`, digits one by one, Qwen's special tokens, the tags,
    and one token for each coordinate of a box (`coordinate_tokens`), up to `MOST_COORDINATE` by `BOX_STEP`."""
    from tokenizers import AddedToken

    tokenizer = scale_model.build_tokenizer([*vocabulary_text(), *_name_parts()], vocab_size=6000)
    for kind in zip(*map(coordinate_tokens, range(0, MOST_COORDINATE + 1, BOX_STEP)), strict=True):
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in kind])
    return tokenizer


def build_processor() -> Any:
    """The policy's Qwen2_5_VLProcessor: images have `MIN_PIXELS` to `MAX_PIXELS`, pixels are scaled to [-1, 1]."""
    ensure_torchvision()
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    scaling = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, **scaling),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**scaling),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any, seed: int = 0) -> Any:
    """The policy with random weights for a tokenizer: a Qwen2_5_VLForConditionalGeneration in float32. The same seed
    gives the same weights; the caller's random numbers stay as they were."""
    ensure_torchvision()
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    vocabulary = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    config = Qwen2_5_VLConfig(
        text_config=_LANGUAGE | vocabulary,
        vision_config=_VISION,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    return model
