"""Questions on images as training batches of the scale policy: tokens, labels, loss and hit counts.

A sample is one conversation in the policy's own chat format: the image and the first question, its answer, the next
question, and so on. Only answers and their closing token are learnt. The tower may be left out of the graph, which is
how the language model first learns to read what a fixed tower sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.scale_loop import Counts, Tally
from vrag_lib.scale_tasks import Sample
from vrag_lib.scale_vision import Grid, encode_images, patchify

if TYPE_CHECKING:
    import torch

OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASK = "<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "\n<|im_start|>user\n"
END = "<|im_end|>"


@dataclass(frozen=True)
class Batch:
    """Right-padded conversations. input_ids, is_image (B, T); patches (4 * cells, 588); `answers` lists, answer by
    answer, its row, the positions [start, end) of its tokens and what kind of question it answers."""

    input_ids: torch.Tensor
    is_image: torch.Tensor
    patches: torch.Tensor
    grids: tuple[Grid, ...]
    answers: tuple[tuple[int, int, int, str], ...]


def prompt_ids(tokenizer: Any, cells: int, question: str) -> list[int]:
    """Tokens from the start to where the answer to a first question begins."""
    image = "<|vision_start|>" + "<|image_pad|>" * cells + "<|vision_end|>"
    return tokenizer.encode(OPENING + image, add_special_tokens=False) + tokenizer.encode(
        question + ASK, add_special_tokens=False
    )


def make_batch(tokenizer: Any, samples: Sequence[Sample]) -> Batch:
    """Encode samples as one batch."""
    import torch

    rows: list[list[int]] = []
    answers = []
    for row, sample in enumerate(samples):
        ids: list[int] = []
        for number, ((question, answer), kind) in enumerate(zip(sample.turns, sample.kinds, strict=True)):
            if number:
                ids += tokenizer.encode(AGAIN + question + ASK, add_special_tokens=False)
            else:
                ids += prompt_ids(tokenizer, sample.grid[0] * sample.grid[1], question)
            said = tokenizer.encode(answer + END, add_special_tokens=False)
            answers.append((row, len(ids), len(ids) + len(said), kind))
            ids += said
        rows.append(ids)
    pad, image = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|image_pad|>")
    input_ids = torch.full((len(rows), max(map(len, rows))), pad)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
    patches = torch.from_numpy(np.concatenate([patchify(sample.image) for sample in samples]))
    return Batch(input_ids, input_ids == image, patches, tuple(s.grid for s in samples), tuple(answers))


def reading_loss(model: Any, batch: Batch, train_tower: bool) -> tuple[torch.Tensor, Counts]:
    """Mean cross-entropy of the answers' tokens, and per kind of question how many answers are right throughout when
    each token is predicted from the true ones before it, which is when greedy decoding would write the same answer."""
    import torch
    from torch.nn import functional as F

    with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
        features = encode_images(model.model.visual, batch.patches, batch.grids)
    embedded = model.get_input_embeddings()(batch.input_ids)
    embedded = embedded.masked_scatter(batch.is_image[..., None], features)
    thw = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in batch.grids])
    positions, _ = model.model.get_rope_index(batch.input_ids, batch.is_image.int(), image_grid_thw=thw)
    # Padding stands behind the last token, where causal attention never looks: no mask is needed.
    hidden = model.model.language_model(
        inputs_embeds=embedded, position_ids=positions, use_cache=False
    ).last_hidden_state
    where = [(row, i) for row, start, end, _ in batch.answers for i in range(start, end)]
    row, column = torch.tensor(where).unbind(1)
    logits = model.lm_head(hidden[row, column - 1])
    target = batch.input_ids[row, column]
    right = (logits.argmax(-1) == target).tolist()
    tally = Tally()
    at = 0
    for _, start, end, kind in batch.answers:
        tally.add({kind: (float(all(right[at : at + end - start])), 1.0)})
        at += end - start
    return F.cross_entropy(logits, target), tally.counts()
