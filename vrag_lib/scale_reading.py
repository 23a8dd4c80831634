"""Questions on images as training batches of the scale policy: tokens, labels, loss and hit counts.

A sample is one conversation in the policy's own chat format: an image, if one is shown, and the first question, its
answer, the next question, and so on. Only answers and their closing token are learnt. The tower may be left out of the
graph, which is how the language model first learns to read what a fixed tower sees.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.geometry import PATCH, Box
from vrag_lib.scale_cells import halves_of, overlap
from vrag_lib.scale_loop import Counts
from vrag_lib.scale_policy import BOX_STEP, MOST_COORDINATE, coordinate_tokens
from vrag_lib.scale_tasks import Asked, Sample
from vrag_lib.scale_vision import Grid, Images, OnDevice, arrange, encode_images, patchify

if TYPE_CHECKING:
    import torch

OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASK = "<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "\n<|im_start|>user\n"
END = "<|im_end|>"


Head = tuple[int, int]
"""Layer and head of the language model, counted from 0."""

NAME_TO_HALF: tuple[Head, Head] = ((1, 0), (1, 1))
NAME_TO_CARD: Head = (1, 2)
ANSWER_TO_NAME: Head = (2, 1)
BOX_TO_NAME: Head = (2, 2)
ANSWER_TO_CELLS: tuple[Head, ...] = ((2, 0), (3, 0))
TO_BEFORE: Head = (0, 0)
COPY_TO_NEXT: Head = (3, 1)
"""Heads that are shown where to look. The last token of what a question names: at the cells that show it in their upper
half, in their lower half, or as a card named by its place; at the first token of all where there are none.
An answer while it is written: at that last token, a box with two heads, the second of which looks at the first token of
all in other answers; and at the cells where the next of it is to be read. Where a question holds its answer: its tokens
at those before them, and the answer at what comes next in the question; where it says it in other words, at those."""


@dataclass(frozen=True)
class Gaze(OnDevice):
    """Tokens (N,) `row`, `column` of a batch and the tokens `gold` (N, T) that each should look at."""

    row: torch.Tensor
    column: torch.Tensor
    gold: torch.Tensor


@dataclass(frozen=True)
class Batch(OnDevice):
    """Right-padded conversations.

    input_ids, is_image (B, T); position_ids (3, B, T), Qwen's multimodal ones. The tokens to learn, answer by answer:
    `row` and `column` (N,) say where they stand, `answer` (N,) to which answer they belong; `kinds` says what kind of
    question each answer answers. `gaze` says, head by head, which tokens should look where. `coordinates` (vocabulary,)
    is what each token writes of a box, -1 for none.
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
    coordinates: torch.Tensor

    def to(self, device: Any) -> Batch:
        moved = super().to(device)
        return replace(moved, gaze={head: gaze.to(device) for head, gaze in self.gaze.items()})


def prompt_ids(tokenizer: Any, cells: int, question: str) -> list[int]:
    """Tokens from the start to where the answer to a first question begins."""
    opening, asked = (tokenizer.encode(text, add_special_tokens=False) for text in (OPENING, question + ASK))
    return opening + image_ids(tokenizer, cells) + asked


def image_ids(tokenizer: Any, cells: int) -> list[int]:
    """Tokens of an image."""
    return tokenizer.encode("<|vision_start|>" + "<|image_pad|>" * cells + "<|vision_end|>", add_special_tokens=False)


def position_ids(images: Sequence[tuple[int, Grid]], length: int) -> np.ndarray:
    """Qwen2.5-VL's three position ids (3, length) of a conversation with images of these grids, whose first cells stand
    in these columns: text counts on, cells carry row and column.

    >>> position_ids([(1, (1, 2))], 5).tolist()
    [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]
    """
    parts: list[np.ndarray] = []
    column = place = 0
    for first, (rows, columns) in images:
        parts.append(np.tile(np.arange(first - column), (3, 1)) + place)
        place += first - column
        cells = np.arange(rows * columns)
        parts.append(np.stack([np.zeros_like(cells), cells // columns, cells % columns]) + place)
        place += max(rows, columns)
        column = first + len(cells)
    return np.concatenate([*parts, np.tile(np.arange(length - column), (3, 1)) + place], 1)


def part_of(place: Box, answer: str, start: int, end: int) -> Box:
    """Where characters `start` to `end` of an answer stand that is printed in a box in one line, letters taken as
    equally wide.

    >>> part_of(Box(10, 0, 50, 9), "1,234", 1, 2)
    Box(x1=18.0, y1=0, x2=26.0, y2=9)
    """
    step = place.width / len(answer)
    return Box(place.x1 + start * step, place.y1, place.x1 + end * step, place.y2)


Span = tuple[int, int, int]
"""Column of a token of an answer, first character that it writes and the one behind its last."""

Look = tuple[Head, int, int, list[int]]
"""A head, row and column of the token that looks, columns of those it should look at."""


def looks_of_name(
    places: Sequence[Box], card: bool, row: int, first_cell: int, grid: Grid, named_at: int
) -> list[Look]:
    """Where the heads of names should look for a name whose last token stands in column `named_at`."""
    at = [(first_cell + cell, half) for box in places for cell, half in halves_of(box, grid)]
    looks: list[Look] = []
    for number, head in enumerate(NAME_TO_HALF):
        looks.append((head, row, named_at, [cell for cell, half in at if half == number and not card] or [0]))
    return [*looks, (NAME_TO_CARD, row, named_at, [cell for cell, _ in at if card] or [0])]


def looks_of(turn: Asked, row: int, first_cell: int, grid: Grid, named_at: int, spans: Sequence[Span]) -> list[Look]:
    """Where heads should look for one question: `named_at` is the column of the last token of what it names, `spans`
    has one entry for each token of the answer."""
    found: list[Look] = []
    if turn.named_places:
        found += looks_of_name(turn.named_places, turn.card, row, first_cell, grid, named_at)
    for column, start, end in spans:
        # What predicts a token is the token before it.
        if turn.named_places:
            found.append((ANSWER_TO_NAME, row, column - 1, [named_at]))
            found.append((BOX_TO_NAME, row, column - 1, [0 if turn.printed else named_at]))
        if not turn.places or (turn.printed and end <= start):
            continue
        boxes = [part_of(turn.places[0], turn.answer, start, end)] if turn.printed else turn.places
        cells = [first_cell + cell for box in boxes for cell, _ in halves_of(box, grid)]
        found += [(head, row, column - 1, cells) for head in ANSWER_TO_CELLS]
    return found


@dataclass(frozen=True)
class Told:
    """A text of a conversation: its characters, those of each token (start, end), and the column of its first token."""

    text: str
    tokens: Sequence[tuple[int, int]]
    first: int

    def columns(self, words: str) -> tuple[int, list[int]]:
        """The first character of the last mention of `words`, and the columns of its tokens; -1 and none without."""
        start = self.text.lower().rfind(words.lower())
        touched = [n for n, (a, b) in enumerate(self.tokens) if b > start and a < start + len(words)]
        return start, [self.first + n for n in touched] if start >= 0 else []


def looks_of_echo(written: str, words: str, row: int, reply: Told, before: Sequence[Told]) -> list[Look]:
    """Where heads should look to write a part of a reply that a text before it says in `words`: to copy it token by
    token, or, where it is `written` otherwise, all of it at once. The newest text that says it is looked at."""
    start, columns = reply.columns(written)
    told = next((text for text in reversed(before) if text.columns(words)[1]), None)
    if told is None:
        return []
    said, places = told.columns(words)
    if written != words:
        return [(ANSWER_TO_NAME, row, column - 1, places) for column in columns]
    looks: list[Look] = [(TO_BEFORE, row, place, [place - 1]) for place in places]
    for column in columns:
        begin, end = (min(max(0, c - start), len(written)) for c in reply.tokens[column - reply.first])
        at = [
            p
            for p in places
            if told.tokens[p - told.first][0] < said + end and told.tokens[p - told.first][1] > said + begin
        ]
        if at and end > begin:
            looks.append((COPY_TO_NEXT, row, column - 1, at))
    return looks


def make_batch(tokenizer: Any, samples: Sequence[Sample]) -> Batch:
    """Encode samples as one batch."""
    import torch

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    rows: list[list[int]] = []
    where: list[tuple[int, int, int]] = []
    kinds: list[str] = []
    looks: list[Look] = []
    placed: list[list[tuple[int, Grid]]] = []
    shown: list[Any] = []
    for row, sample in enumerate(samples):
        ids = encode(OPENING)
        placed.append([])
        first_cell, grid = 0, (0, 0)
        told: list[Told] = []
        for number in range(max(1, len(sample.turns))):
            ids += encode(AGAIN) if number else []
            if (picture := sample.images.get(number)) is not None:
                first_cell, grid = len(ids) + 1, (picture.height // PATCH, picture.width // PATCH)
                ids += image_ids(tokenizer, grid[0] * grid[1])
                placed[-1].append((first_cell, grid))
                shown.append(picture)
            if not sample.turns:
                break
            turn = sample.turns[number]
            asked = tokenizer(turn.question + ASK, add_special_tokens=False, return_offsets_mapping=True)
            told.append(Told(turn.question, asked["offset_mapping"], len(ids)))
            ids += asked["input_ids"]
            reply = turn.saying + turn.answer
            said = tokenizer(reply + END, add_special_tokens=False, return_offsets_mapping=True)
            replied = Told(reply, said["offset_mapping"], len(ids))
            spans = [
                (len(ids) + i, max(0, start - len(turn.saying)), min(end, len(reply)) - len(turn.saying))
                for i, (start, end) in enumerate(said["offset_mapping"])
            ]
            named_at = (replied if turn.saying else told[-1]).columns(turn.named)[1] or [len(ids) - 1]
            answer = [span for span in spans if span[2] > 0 or not turn.saying]
            looks += looks_of(turn, row, first_cell, grid, named_at[-1], answer)
            for written, words in turn.echoes:
                looks += looks_of_echo(written, words, row, replied, told)
            where += [(row, column, len(kinds)) for column, _, _ in spans]
            kinds.append(turn.kind)
            ids += said["input_ids"]
        for word, boxes in sample.words:
            ids += encode(" " + word)
            looks += looks_of_name(boxes, False, row, first_cell, grid, len(ids) - 1)
        rows.append(ids)
    longest = max(map(len, rows))
    input_ids = np.full((len(rows), longest), tokenizer.pad_token_id)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = ids
    positions = [position_ids(images, longest) for images in placed]
    images = arrange(np.concatenate([patchify(p) for p in shown]), [grid for row in placed for _, grid in row])
    gaze = {}
    for head in sorted({look[0] for look in looks}):
        of_head = [look[1:] for look in looks if look[0] == head]
        gold = np.zeros((len(of_head), longest), bool)
        for i, (_, _, columns) in enumerate(of_head):
            gold[i, columns] = True
        at = torch.tensor([look[:2] for look in of_head])
        gaze[head] = Gaze(at[:, 0], at[:, 1], torch.from_numpy(gold))
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(input_ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")),
        torch.from_numpy(np.stack(positions, 1)),
        images,
        *torch.tensor(where).reshape(-1, 3).unbind(1),
        tuple(kinds),
        gaze,
        coordinates_of_tokens(tokenizer),
    )


@functools.lru_cache(4)
def coordinates_of_tokens(tokenizer: Any) -> torch.Tensor:
    """What each token writes of a box (vocabulary,), -1 for none."""
    import torch

    table = torch.full((len(tokenizer),), -1)
    for value in range(0, MOST_COORDINATE + 1, BOX_STEP):
        table[tokenizer.convert_tokens_to_ids(list(coordinate_tokens(value)))] = value
    return table


def embed(model: Any, batch: Batch, train_tower: bool) -> torch.Tensor:
    """What the language model's first layer reads (B, T, width)."""
    import torch

    with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
        features = encode_images(model.model.visual, batch.images)
    embedded = model.get_input_embeddings()(batch.input_ids)
    return embedded.masked_scatter(batch.is_image[..., None], features.to(embedded.dtype))


def naming_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, Counts]:
    """Sum of the `gaze_losses` of words at the cells where they stand, which takes the tower, the embeddings and the
    first layers of the language model."""
    text = model.model.language_model
    hidden = [embed(model, batch, train_tower=next(model.model.visual.parameters()).requires_grad)]
    places = text.rotary_emb(hidden[0], batch.position_ids)
    for layer in text.layers[: max(layer for layer, _ in batch.gaze)]:
        hidden.append(layer(hidden[-1], position_embeddings=places))
    loss, counts = gaze_losses(text, batch, hidden)
    return loss, {f"naming_{head}": count for head, count in counts.items()}


def reading_loss(model: Any, batch: Batch, train_tower: bool, guidance: float = 0.0) -> tuple[torch.Tensor, Counts]:
    """Mean cross-entropy of the answers' tokens, and per kind of question how many answers are right throughout when
    each token is predicted from the true ones before it, which is when greedy decoding would write the same answer.
    Of boxes it is also counted how many `overlap` the true one by half. `guidance` is the weight of the `gaze_losses`
    beside it."""
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
        is_box = torch.tensor([kind == "region" for kind in batch.kinds], device=target.device)[batch.answer]
        boxed = (batch.coordinates[target] >= 0) & is_box
        truth, told = (batch.coordinates[ids[boxed]].view(-1, 4) for ids in (target, logits.argmax(-1)))
    counts: Counts = {name: (hits[i], float(batch.kinds.count(name))) for i, name in enumerate(names)}
    counts["overlap"] = (overlap(told, truth) >= 0.5).sum(), float(len(truth))
    loss = F.cross_entropy(logits, target)
    if guidance:
        gaze, found = gaze_losses(model.model.language_model, batch, out.hidden_states)
        counts |= found
        loss = loss + guidance * gaze
    return loss, counts


@contextmanager
def float32_attention(language_model: Any) -> Iterator[None]:
    """Inside, attention leaves an autocast: on processors its backward pass is several times slower in bfloat16."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config, attention = language_model.config, ALL_ATTENTION_FUNCTIONS["sdpa"]

    def in_float32(module: Any, *states: torch.Tensor, **settings: Any) -> Any:
        with torch.autocast(states[0].device.type, enabled=False):
            q, k, v, mask = (s.float() if s is not None and s.is_floating_point() else s for s in states)
            return attention(module, q, k, v, mask, **settings)

    ALL_ATTENTION_FUNCTIONS.register("sdpa_float32", in_float32)
    before, config._attn_implementation = config._attn_implementation, "sdpa_float32"
    try:
        yield
    finally:
        config._attn_implementation = before


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
    language_model: Any, batch: Batch, hidden_states: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, Counts]:
    """Sum over the guided heads of minus the log of the attention that each pays to the tokens it should look at,
    averaged over the tokens that look, 0 where none does; and how often the token most attended is one of them, where
    there is more to see than the first token of all.
    `hidden_states[i]` is what layer i reads."""
    import torch

    losses, counts = [hidden_states[0].new_zeros(())], {}
    for head, gaze in batch.gaze.items():
        x, scaling = hidden_states[head[0]], language_model.layers[head[0]].self_attn.scaling
        q, k = (of_head(language_model, head, name, x, batch.position_ids) for name in ("q_proj", "k_proj"))
        scores = (q @ k.mT)[gaze.row, gaze.column] * scaling  # of all tokens: cheaper than gathering keys
        later = torch.arange(scores.shape[1], device=scores.device) > gaze.column[:, None]
        paid = scores.masked_fill(later, -torch.inf).log_softmax(-1)
        losses.append(-paid.masked_fill(~gaze.gold, -torch.inf).logsumexp(-1).mean())
        best, somewhere = gaze.gold.gather(1, paid.argmax(-1)[:, None])[:, 0], ~gaze.gold[:, 0]
        counts[f"gaze_{head[0]}.{head[1]}"] = ((best & somewhere).sum(), somewhere.sum())
    return torch.stack(losses).sum(), counts
