"""Questions on images as training batches of the scale policy: tokens, labels, loss and hit counts.

A sample is one conversation in the policy's own chat format: the image and the first question, its answer, the next
question, and so on. Only answers and their closing token are learnt. The tower may be left out of the graph, which is
how the language model first learns to read what a fixed tower sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.geometry import PATCH, Box
from vrag_lib.scale_loop import Counts
from vrag_lib.scale_tasks import Sample
from vrag_lib.scale_vision import Grid, Images, OnDevice, arrange, encode_images, patchify

if TYPE_CHECKING:
    import torch

OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASK = "<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "\n<|im_start|>user\n"
END = "<|im_end|>"


Head = tuple[int, int]
"""Layer and head of the language model, counted from 0."""

NAME_TO_CELLS: tuple[Head, ...] = ((1, 1), (2, 0))
ANSWER_TO_NAME: tuple[Head, ...] = ((1, 2), (2, 1))
ANSWER_TO_CELLS: tuple[Head, ...] = ((2, 0), (3, 0))
"""Heads that are shown where to look: the last token of what a question names, at the cells where it stands; an answer
while it is written, at that token and at the cells that hold the answer."""


BOX_KINDS = ("region", "line")
"""Kinds of questions that a box answers."""


@dataclass(frozen=True)
class Gaze(OnDevice):
    """Tokens (N,) `row`, `column` of a batch and the tokens `gold` (N, T) that each should look at."""

    row: torch.Tensor
    column: torch.Tensor
    gold: torch.Tensor


@dataclass(frozen=True)
class Batch(OnDevice):
    """Right-padded conversations of one image each.

    input_ids, is_image (B, T); position_ids (3, B, T), Qwen's multimodal ones. The tokens to learn, answer by answer:
    `row` and `column` (N,) say where they stand, `answer` (N,) to which answer they belong; `kinds` says what kind of
    question each answer answers. `gaze` says, head by head, which tokens should look where; `boxes`
    (N, 4) is the box that the answer of each token to learn names, in cells, NaN for other answers.
    """

    input_ids: torch.Tensor
    is_image: torch.Tensor
    position_ids: torch.Tensor
    images: Images
    row: torch.Tensor
    column: torch.Tensor
    answer: torch.Tensor
    kinds: tuple[str, ...]
    gaze: dict[Head, Gaze]
    boxes: torch.Tensor

    def to(self, device: Any) -> Batch:
        moved = super().to(device)
        return replace(moved, gaze={head: gaze.to(device) for head, gaze in self.gaze.items()})


def prompt_ids(tokenizer: Any, cells: int, question: str) -> list[int]:
    """Tokens from the start to where the answer to a first question begins."""
    return opening_ids(tokenizer, cells) + tokenizer.encode(question + ASK, add_special_tokens=False)


def opening_ids(tokenizer: Any, cells: int) -> list[int]:
    """Tokens up to an image's last."""
    image = "<|vision_start|>" + "<|image_pad|>" * cells + "<|vision_end|>"
    return tokenizer.encode(OPENING + image, add_special_tokens=False)


def position_ids(first_image: int, grid: Grid, length: int) -> np.ndarray:
    """Qwen2.5-VL's three position ids (3, length) of a conversation with one image whose first token stands at
    `first_image`: text counts on, cells carry row and column.

    >>> position_ids(1, (1, 2), 5).tolist()
    [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]
    """
    rows, columns = grid
    cells = np.arange(rows * columns)
    image = np.stack([np.zeros_like(cells), cells // columns, cells % columns]) + first_image
    after = np.arange(length - first_image - len(cells)) + first_image + max(rows, columns)
    return np.concatenate([np.tile(np.arange(first_image), (3, 1)), image, np.tile(after, (3, 1))], 1)


def cells_of(place: Box, grid: Grid) -> np.ndarray:
    """The cells (rows * columns,), true or false, that a box in shown pixels covers: those it covers at least a third
    as much as the one it covers most.

    >>> cells_of(Box(20, 0, 56, 28), (1, 3)).tolist()
    [False, True, False]
    """
    down, right = np.arange(grid[0]) * PATCH, np.arange(grid[1]) * PATCH
    over_y = np.clip(np.minimum(place.y2, down + PATCH) - np.maximum(place.y1, down), 0, None)
    over_x = np.clip(np.minimum(place.x2, right + PATCH) - np.maximum(place.x1, right), 0, None)
    covered = (over_y[:, None] * over_x).reshape(-1)
    return covered * 3 >= max(covered.max(), 1e-6)


def make_batch(tokenizer: Any, samples: Sequence[Sample]) -> Batch:
    """Encode samples as one batch."""
    import torch

    rows: list[list[int]] = []
    where: list[tuple[int, int, int]] = []
    kinds: list[str] = []
    written: list[tuple[float, ...]] = []
    looks: list[tuple[Head, int, int, tuple[Box, ...] | int]] = []  # head, row, column, places or another column
    for row, sample in enumerate(samples):
        ids = opening_ids(tokenizer, sample.grid[0] * sample.grid[1])
        for word, boxes in sample.words:
            ids += tokenizer.encode(" " + word, add_special_tokens=False)
            looks += [(head, row, len(ids) - 1, boxes) for head in NAME_TO_CELLS]
        for number, turn in enumerate(sample.turns):
            before = tokenizer.encode(AGAIN, add_special_tokens=False) if number else []
            named_at = None
            end = turn.question.rfind(turn.named) + len(turn.named)
            if turn.named_place is not None and turn.named and end >= len(turn.named):
                named = len(tokenizer.encode(turn.question[:end], add_special_tokens=False))
                named_at = len(ids) + len(before) + named - 1
                looks += [(head, row, named_at, (turn.named_place,)) for head in NAME_TO_CELLS]
            ids += before + tokenizer.encode(turn.question + ASK, add_special_tokens=False)
            said = tokenizer.encode(turn.answer + END, add_special_tokens=False)
            for i in range(len(said)):
                where.append((row, len(ids) + i, len(kinds)))
                written.append(_in_cells(turn.place) if turn.kind in BOX_KINDS else (math.nan,) * 4)
                if turn.place is not None:
                    looks += [(head, row, len(ids) + i - 1, (turn.place,)) for head in ANSWER_TO_CELLS]
                if named_at is not None:
                    looks += [(head, row, len(ids) + i - 1, named_at) for head in ANSWER_TO_NAME]
            kinds.append(turn.kind)
            ids += said
        rows.append(ids)
    pad, image = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|image_pad|>")
    longest = max(map(len, rows))
    input_ids = np.full((len(rows), longest), pad)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = ids
    starts = [ids.index(image) for ids in rows]
    positions = [position_ids(start, sample.grid, longest) for start, sample in zip(starts, samples, strict=True)]
    images = arrange(np.concatenate([patchify(sample.image) for sample in samples]), [s.grid for s in samples])
    gaze = {}
    for head in sorted({look[0] for look in looks}):
        of_head = [look[1:] for look in looks if look[0] == head]
        gold = np.zeros((len(of_head), longest), bool)
        for i, (row, _, target) in enumerate(of_head):
            if isinstance(target, int):
                gold[i, target] = True
                continue
            for place in target:
                cells = cells_of(place, samples[row].grid)
                gold[i, starts[row] : starts[row] + len(cells)] |= cells
        at = torch.tensor([look[:2] for look in of_head])
        gaze[head] = Gaze(at[:, 0], at[:, 1], torch.from_numpy(gold))
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(input_ids == image),
        torch.from_numpy(np.stack(positions, 1)),
        images,
        *torch.tensor(where).reshape(-1, 3).unbind(1),
        tuple(kinds),
        gaze,
        torch.tensor(written, dtype=torch.float32).reshape(-1, 4),
    )


def _in_cells(box: Box) -> tuple[float, ...]:
    return tuple(v / PATCH for v in box.as_tuple())


def embed(model: Any, batch: Batch, train_tower: bool) -> torch.Tensor:
    """What the language model's first layer reads (B, T, width)."""
    import torch

    with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
        features = encode_images(model.model.visual, batch.images)
    embedded = model.get_input_embeddings()(batch.input_ids)
    return embedded.masked_scatter(batch.is_image[..., None], features.to(embedded.dtype))


def naming_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, Counts]:
    """Sum of the `gaze_losses` of words at the cells where they stand, which takes the tower, the embeddings and the
    first layers of the language model; and how often the most attended token is one of those cells."""
    text = model.model.language_model
    hidden = [embed(model, batch, train_tower=next(model.model.visual.parameters()).requires_grad)]
    places = text.rotary_emb(hidden[0], batch.position_ids)
    for layer in text.layers[: max(layer for layer, _ in batch.gaze)]:
        hidden.append(layer(hidden[-1], position_embeddings=places))
    found: dict[str, tuple[Any, Any]] = {}
    losses = gaze_losses(text, batch, hidden, found)
    return sum(losses.values()), found


def place_probe(width: int) -> Any:
    """Reads places, in cells, off the residual stream: an image token's own, and the box that an answer names."""
    import torch

    return torch.nn.ModuleDict({"own": torch.nn.Linear(width, 2), "box": torch.nn.Linear(width, 4)})


def place_loss(probe: Any, batch: Batch, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean absolute error, in cells, of what `place_probe` reads: rows and columns of image tokens behind the first
    layer, boxes of answers while they are written behind the third. What can be read there can be written down."""
    from torch.nn import functional as F

    start = batch.position_ids[0][batch.is_image]
    own = batch.position_ids[1:, batch.is_image].T - start[:, None]  # (cells, 2): row, column
    seen = F.layer_norm(hidden_states[1][batch.is_image], hidden_states[1].shape[-1:])
    loss = (probe["own"](seen) - own).abs().mean()
    named = batch.boxes.isfinite().all(1)
    if named.any():
        written = hidden_states[3][batch.row[named], batch.column[named] - 1]
        loss = loss + (probe["box"](F.layer_norm(written, written.shape[-1:])) - batch.boxes[named]).abs().mean()
    return loss


def reading_loss(
    model: Any, batch: Batch, train_tower: bool, guidance: float = 0.0, probe: Any = None
) -> tuple[torch.Tensor, Counts]:
    """Mean cross-entropy of the answers' tokens, and per kind of question how many answers are right throughout when
    each token is predicted from the true ones before it, which is when greedy decoding would write the same answer.
    `guidance` is the weight of the `gaze_losses` beside it and, with `probe`, of `place_loss`."""
    import torch
    from torch.nn import functional as F

    embedded = embed(model, batch, train_tower)
    # Padding stands behind the last token, where causal attention never looks: no mask is needed.
    out = model.model.language_model(
        inputs_embeds=embedded, position_ids=batch.position_ids, use_cache=False, output_hidden_states=guidance > 0
    )
    logits = model.lm_head(out.last_hidden_state[batch.row, batch.column - 1])
    target = batch.input_ids[batch.row, batch.column]
    with torch.no_grad():
        wrong = torch.zeros(len(batch.kinds), device=target.device)
        wrong.index_add_(0, batch.answer, (logits.argmax(-1) != target).float())
        names = sorted(set(batch.kinds))
        member = torch.tensor([[kind == name for kind in batch.kinds] for name in names], device=target.device)
        hits = ((wrong == 0) & member).sum(1)
    counts = {name: (hits[i], float(batch.kinds.count(name))) for i, name in enumerate(names)}
    loss = F.cross_entropy(logits, target)
    if guidance and probe is not None:
        places = place_loss(probe, batch, out.hidden_states)
        counts["place_loss"] = (places.detach(), 1.0)
        loss = loss + guidance * places
    if guidance:
        gaze = gaze_losses(model.model.language_model, batch, out.hidden_states)
        counts |= {f"gaze_loss_{layer}.{head}": (value.detach(), 1.0) for (layer, head), value in gaze.items()}
        loss = loss + guidance * sum(gaze.values())
    return loss, counts


def of_head(language_model: Any, head: Head, name: str, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Queries or keys (B, T, head dim) of one head, rotary positions in; `name` is q_proj or k_proj, `x` (B, T, width)
    what its layer reads, `places` (3, B, T) position ids."""
    import torch
    from torch.nn import functional as F

    block = language_model.layers[head[0]]
    projection, width = getattr(block.self_attn, name), block.self_attn.head_dim
    own = slice(head[1] * width, (head[1] + 1) * width)
    cos, sin = language_model.rotary_emb(x, places)
    out = F.linear(block.input_layernorm(x), projection.weight[own], projection.bias[own])
    return out * cos + torch.cat([-out[..., width // 2 :], out[..., : width // 2]], -1) * sin


def gaze_losses(
    language_model: Any,
    batch: Batch,
    hidden_states: Sequence[torch.Tensor],
    found: dict[str, tuple[Any, Any]] | None = None,
) -> dict[Head, torch.Tensor]:
    """For each guided head minus the log of the attention that it pays to the tokens it should look at, averaged over
    the tokens that look. `hidden_states[i]` is what layer i reads; `found` takes, head by head, how many tokens look
    at a right one most."""
    import torch

    losses = {}
    for head, gaze in batch.gaze.items():
        x, scaling = hidden_states[head[0]], language_model.layers[head[0]].self_attn.scaling
        q, k = (of_head(language_model, head, name, x, batch.position_ids) for name in ("q_proj", "k_proj"))
        scores = torch.einsum("ntd,nd->nt", k[gaze.row], q[gaze.row, gaze.column]) * scaling
        later = torch.arange(scores.shape[1], device=scores.device) > gaze.column[:, None]
        paid = scores.masked_fill(later, -torch.inf).log_softmax(-1)
        losses[head] = -paid.masked_fill(~gaze.gold, -torch.inf).logsumexp(-1).mean()
        if found is not None:
            best = gaze.gold.gather(1, paid.argmax(-1)[:, None])
            found[f"found_{head[0]}.{head[1]}"] = (best.sum(), float(len(best)))
    return losses
