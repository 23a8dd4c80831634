"""The scale retriever: the real ColQwen2 class (colpali-engine) at a size that a laptop trains and runs.

Deviations from the paper, which uses a published 2-billion-parameter ColQwen2: 1.3 million parameters, trained
from nothing on MiniDocs (`scale_retriever_training`), a vocabulary of words, syllables and characters instead of
Qwen2's byte pairs, text folded to lower case, and pages shown in at most 220 cells. The class, the file format, the
processor and the late-interaction score are the published ones, so Byaldi and colpali-engine load it from its path
(Byaldi tells the class by `colqwen2` in the path).

`embed_pages` and `embed_queries` are the model's own forward for batches of one page size, fast enough to train on a
CPU; a test holds them to the class's forward.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrag_lib.geometry import PATCH
from vrag_lib.minidocs_content import BOARDS, DIMENSIONS, FLOWS, MEASURES, MONTHS, ORGANISATIONS, entities

if TYPE_CHECKING:
    import torch

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

MAX_CELLS = 220
"""Most 28x28 cells a page is shown in; a MiniDocs page of 1176 x 784 pixels is shown at 504 x 336, in 216."""

WORD_START = "\u2581"
"""What the tokenizer puts before every word, as SentencePiece does."""

_FUNCTION_WORDS = """
a about above after all an and are as at be been below by can come comes did directly do does each entry find
for from get give had has have how i if in into is it its just known left less like list long look made many me
more most much my near new next no not of off often on one only or other our out over page part please right
said see set share she should show so some such take tell than that the their them then there these they this
those through to too two under up us used very was way we well were what when where which who why will with
without word work would year you your change figure group largest highest lowest smallest first second third
fourth against before describe image user
"""
FUNCTION_WORDS = tuple(_FUNCTION_WORDS.split())
"""Words that questions are made of; the retriever has them as tokens and learns that no page shows them."""


def _split_name(name: str, prefixes: Counter[str], suffixes: Counter[str]) -> tuple[str, str]:
    cuts = [(name[:i], name[i:]) for i in range(1, len(name))]
    return max(cuts, key=lambda cut: prefixes[cut[0]] * suffixes[cut[1]])


@functools.cache
def syllables() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """First and second syllables of the training entities' names: the cut of each name whose two parts are the most
    frequent among the names. Lower case."""
    names = [entity.name.lower() for entity in entities("train")]
    prefixes = Counter(name[:i] for name in names for i in range(1, len(name)))
    suffixes = Counter(name[i:] for name in names for i in range(1, len(name)))
    cuts = [_split_name(name, prefixes, suffixes) for name in names]
    firsts, seconds = (Counter(part) for part in zip(*cuts, strict=True))
    frequent = len(names) / 200  # a wrong cut is a rare one
    return tuple(sorted(a for a in firsts if firsts[a] >= frequent)), tuple(
        sorted(b for b in seconds if seconds[b] >= frequent)
    )


@functools.cache
def page_words() -> tuple[str, ...]:
    """The words of MiniDocs' titles, labels, headings and names that a query may contain, as pages write them."""
    words = {word for measure in MEASURES for word in measure.name.split()}
    words |= {item for dimension in (*DIMENSIONS, MONTHS) for item in (*dimension.items, dimension.name)}
    for board in (*BOARDS, *FLOWS):
        words |= {*board.headings, *board.title.split()}
    words |= set(ORGANISATIONS)
    words |= {word for entity in entities("train") for word in entity.emblem.split()}
    return tuple(sorted(words))


def token_pieces() -> list[tuple[str, float]]:
    """The tokenizer's pieces with their scores: a word or syllable costs 4, a character 12, so that known words stay
    whole, coined names fall into syllables and anything else into characters."""
    starts, ends = syllables()
    whole = {WORD_START + word.lower() for word in (*page_words(), *FUNCTION_WORDS, *starts)} | set(ends)
    pieces = [(piece, -4.0) for piece in sorted(whole)]
    characters = sorted({chr(code) for code in range(33, 127)} - set("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    characters += ["\n", "€", "\ufffd", WORD_START]
    return pieces + [(c, -8.0 if c in ".,:;?!'\"()-\n" else -12.0) for c in characters if c not in whole]


def build_tokenizer() -> Any:
    """The tokenizer as a `PreTrainedTokenizerFast`: Unigram over `token_pieces`, left padding as ColQwen2 wants."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    pieces = token_pieces()
    unknown = [piece for piece, _ in pieces].index("\ufffd")
    tokenizer = Tokenizer(Unigram(pieces, unk_id=unknown))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=WORD_START, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=WORD_START, prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="\ufffd",
        pad_token=SPECIALS[0],
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIALS[1:]),
        padding_side="left",
    )


def build_processor() -> Any:
    """colpali-engine's `ColQwen2Processor` with this tokenizer, pages shown in at most `MAX_CELLS` cells."""
    from vrag_lib.torch_setup import ensure_torchvision

    ensure_torchvision()
    from colpali_engine.models import ColQwen2Processor
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    half = [0.5, 0.5, 0.5]
    pixels = {"min_pixels": 16 * PATCH * PATCH, "max_pixels": MAX_CELLS * PATCH * PATCH}
    return ColQwen2Processor(
        image_processor=Qwen2VLImageProcessor(**pixels, image_mean=half, image_std=half),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(image_mean=half, image_std=half),
    )


def build_retriever(tokenizer: Any, seed: int = 0, width: int = 128, depth: int = 3) -> Any:
    """An untrained `ColQwen2`: vision tower of `depth` blocks of `width`, language model of 2 layers of 128."""
    from vrag_lib.torch_setup import ensure_torchvision

    ensure_torchvision()
    import torch
    from colpali_engine.models import ColQwen2
    from transformers import Qwen2VLConfig

    ids = tokenizer.convert_tokens_to_ids
    hidden = 128
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "initializer_range": 0.05,
            "bos_token_id": None, "eos_token_id": ids("<|im_end|>"),
            # The padding token is the one queries are lengthened with: as padding_idx it would never be trained.
            "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": depth, "embed_dim": width, "hidden_size": hidden, "num_heads": width // 32, "mlp_ratio": 3,
            "hidden_act": "relu",  # ten times faster than quick_gelu on a CPU
            "initializer_range": 0.05, "patch_size": PATCH // 2, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = ColQwen2(config)
    torch.nn.init.normal_(model.custom_text_proj.bias, std=0.02)  # a zero bias makes 0/0 of masked rows
    torch.random.set_rng_state(state)
    return model


def save_retriever(model: Any, processor: Any, folder: str | Path) -> Path:
    """Write weights (safetensors), config, tokenizer and processor so that colpali-engine and Byaldi load the folder.

    Raises ValueError when the path does not contain `colqwen2`, by which Byaldi chooses the class.
    """
    folder = Path(folder)
    if not re.search("colqwen2", str(folder), re.IGNORECASE):
        raise ValueError(f"Byaldi needs 'colqwen2' in the path of this model; {folder} does not have it")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def load_retriever(folder: str | Path) -> tuple[Any, Any]:
    """`(ColQwen2, ColQwen2Processor)` in fp32 from a folder that `save_retriever` wrote. Raises OSError without one."""
    from vrag_lib.torch_setup import ensure_torchvision

    ensure_torchvision()
    import torch
    from colpali_engine.models import ColQwen2, ColQwen2Processor

    model = ColQwen2.from_pretrained(str(folder), dtype=torch.float32).eval()
    return model, ColQwen2Processor.from_pretrained(str(folder))


@functools.lru_cache(64)
def _patch_places(rows: int, columns: int) -> Any:
    """Row and column of every patch (4 * cells, 2), cell by cell."""
    import torch

    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    inner = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    return (torch.stack([r, c], -1)[:, :, None] * 2 + inner).view(-1, 2)


def encode_cells(visual: Any, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Qwen2-VL's vision tower on images of one size: (images, cells, width of the language model) from `patches`
    (images, 4 * cells, 588) as `scale_vision.patchify` cuts them. All images are one batched attention."""
    import torch
    from torch.nn import functional as F

    config = visual.config
    count, length, _ = patches.shape
    heads, dim = config.num_heads, config.embed_dim // config.num_heads
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2))
    angles = (_patch_places(rows, columns)[:, :, None].float() * frequencies).reshape(length, -1)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)  # (patches, dim)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        half = dim // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # both frames of a still image are the same
    x = F.linear(patches, weight)
    for block in visual.blocks:
        qkv = block.attn.qkv(block.norm1(x)).view(count, length, 3, heads, dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(qkv[0]), rotate(qkv[1]), qkv[2]).transpose(1, 2)
        x = x + block.attn.proj(mixed.reshape(count, length, -1))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x.reshape(count * length, -1)).view(count, length // 4, -1)


@functools.lru_cache(64)
def _page_positions(before: int, after: int, rows: int, columns: int) -> Any:
    """Qwen2-VL's three position ids (3, 1, tokens) of a page's prompt: text counts on, cells carry row and column."""
    import torch

    cells = rows * columns
    start = torch.arange(before)
    image = torch.stack(
        [torch.zeros(cells, dtype=torch.long), torch.arange(cells) // columns, torch.arange(cells) % columns]
    ) + before  # fmt: skip
    end = torch.arange(after) + before + max(rows, columns)
    return torch.cat([start.expand(3, -1), image, end.expand(3, -1)], 1)[:, None]


def embed_pages(model: Any, prompt: tuple[Any, Any], features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Token embeddings (pages, tokens, 128), of length one, from the tower's features (pages, cells, width).

    `prompt` holds the token ids before and after the image (`page_prompt`). Cells are the tokens from
    `len(prompt[0])` on.
    """
    import torch

    embed = model.language_model.embed_tokens
    count = len(features)
    before, after = (embed(ids)[None].expand(count, -1, -1) for ids in prompt)
    positions = _page_positions(before.shape[1], after.shape[1], rows, columns).expand(-1, count, -1)
    inputs = torch.cat([before, features, after], 1)
    hidden = model.language_model(inputs_embeds=inputs, position_ids=positions, use_cache=False).last_hidden_state
    return torch.nn.functional.normalize(model.custom_text_proj(hidden), dim=-1)


def page_prompt(processor: Any) -> tuple[Any, Any]:
    """Token ids of the class's page prompt before and after the image."""
    import torch

    parts = processor.visual_prompt_prefix.split(processor.image_token)
    return tuple(torch.tensor(processor.tokenizer(part).input_ids) for part in parts)  # type: ignore[return-value]


def embed_queries(model: Any, rows: Sequence[Sequence[int]], pad: int) -> tuple[Any, Any]:
    """Embeddings (queries, tokens, 128) of token id rows, padded on the left, and the mask (queries, tokens)."""
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    positions = torch.arange(longest).expand(3, len(rows), -1)
    hidden = model.language_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return torch.nn.functional.normalize(model.custom_text_proj(hidden), dim=-1), mask


def query_ids(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of queries with the ten tokens that the class appends."""
    suffix = processor.query_augmentation_token * 10
    return [processor.tokenizer(text + suffix).input_ids for text in texts]


def shown_grid(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of cells in which the processor shows a page of `width` x `height` pixels."""
    from vrag_lib.torch_setup import ensure_torchvision

    ensure_torchvision()
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    shown = smart_resize(height, width, PATCH, 16 * PATCH * PATCH, MAX_CELLS * PATCH * PATCH)
    return shown[0] // PATCH, shown[1] // PATCH
