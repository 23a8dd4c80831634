"""What each cell of a MiniDocs page shows, and what follows from it: the dense targets that the scale policy's vision
tower learns beside single characters.

A cell is two patches high, and lines of print are often closer than that: words are told for its upper and its lower
half. For each half the word whose middle line runs through it; where that word is the label of a fact, the box of the
fact's region as it would be written; where it heads a card of a board or a flow, which card stands
above and before it, and which one it is. All of it is read off one cell's feature by a linear layer, so that what a
question asks for can be found by looking at one cell, in whatever context the image stands.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vrag_lib.geometry import PATCH, Box, View, render
from vrag_lib.minidocs_canvas import Font, text_width
from vrag_lib.minidocs_documents import MiniDocsConfig, MiniPage
from vrag_lib.minidocs_pages import Fact
from vrag_lib.minidocs_questions import below, beside
from vrag_lib.scale_characters import CHARACTERS, CLASS, SLOTS
from vrag_lib.scale_loop import Counts
from vrag_lib.scale_policy import BOX_STEP, MOST_COORDINATE
from vrag_lib.scale_tasks import PageSamples, draw_page, label_boxes, page_view, region_view, shown_box, words
from vrag_lib.scale_vision import Grid, Images, OnDevice, arrange, encode_images, patchify

if TYPE_CHECKING:
    import torch

HALVES = 2
COORDINATES = MOST_COORDINATE // BOX_STEP + 1
"""Values a written coordinate can have."""

BOX_CODE = 16
"""Width of the space in which coordinates are told apart."""

POSITIONS = (
    *(f"{row}{column}" for row in ("upper ", "middle ", "lower ") for column in ("left", "middle", "right")),
    *"12345",
)
"""Names of the places of cards, as facts have them."""

LEAST_EM = 12
"""Em height in shown pixels from which characters are told: labels on pages, figures in crops."""

WORD_CODE = 64
"""Width of the space in which words are told apart."""

BLANK_SHARE = 0.1
"""Share of the halves without a word that are asked for, too: they show nothing."""


@dataclass(frozen=True)
class CellPage:
    """One shown image; with `cells` as rows times columns, targets, -1 where nothing is asked.

    characters (cells, SLOTS): classes in reading order, as in `scale_characters`. words (cells, HALVES): token ids,
    that of padding for nothing. neighbours (cells, 2): token ids of the headings above and before, that of padding for
    none. position (cells,): index into `POSITIONS`. boxes (cells, HALVES, 4): `coordinates_of`.
    """

    image: Image.Image
    characters: np.ndarray
    words: np.ndarray
    neighbours: np.ndarray
    position: np.ndarray
    boxes: np.ndarray


def halves_of(place: Box, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """The halves of cells (cell, half) that a word in a box of shown pixels belongs to: on its middle line, those it
    covers at least a third as much as the one it covers most.

    >>> halves_of(Box(20, 15, 56, 25), (1, 3)), halves_of(Box(20, 0, 30, 10), (1, 3))
    ([(1, 1)], [(0, 0)])
    """
    row = min(max(int((place.y1 + place.y2) // PATCH), 0), grid[0] * 2 - 1)
    near = range(max(0, int(place.x1 // PATCH)), min(grid[1], int(place.x2 // PATCH) + 1))
    covered = [min(place.x2, (x + 1) * PATCH) - max(place.x1, x * PATCH) for x in near]
    columns = [x for x, of in zip(near, covered, strict=True) if of > 0 and of * 3 >= max(covered)]
    return [(row // 2 * grid[1] + column, row % 2) for column in columns]


def coordinates_of(box: Box) -> np.ndarray:
    """The coordinates (4,) of a box of multiples of `BOX_STEP`, counted in these steps.

    >>> coordinates_of(Box(4, 36, 112, 300)).tolist()
    [1, 9, 28, 75]
    """
    return np.array(box.as_tuple(), np.int64) // BOX_STEP


def neighbours_of(cards: Sequence[Fact]) -> dict[str, tuple[str, str]]:
    """For each card, by its heading, the headings of the cards directly above and before (to the left of) it, empty
    where there is none."""
    above = {lower.item: upper.item for upper, lower in below(cards)}
    before = {right.item: left.item for left, right in beside(cards)}
    return {card.item: (above.get(card.item, ""), before.get(card.item, "")) for card in cards}


def words_of(
    tokenizer: Any, placed: Iterable[tuple[str, Box]], grid: tuple[int, int], rng: random.Random
) -> np.ndarray:
    """Token ids (cells, HALVES) of words placed in shown pixels; of the halves without one some show padding, for
    nothing, and the others are not asked for."""
    found = np.full((grid[0] * grid[1], HALVES), -1)
    for word, box in placed:
        for cell, half in halves_of(box, grid):
            found[cell, half] = word_token(tokenizer, word)
    asked = np.array([rng.random() < BLANK_SHARE for _ in range(found.size)]).reshape(found.shape)
    found[(found < 0) & asked] = tokenizer.pad_token_id
    return found


def cell_page(tokenizer: Any, page: MiniPage, view: View, image: Image.Image, rng: random.Random) -> CellPage:
    """The targets of a view of a page; boxes are asked for on whole pages only, where regions are named."""
    grid = view.shown.height // PATCH, view.shown.width // PATCH
    cells = grid[0] * grid[1]
    found = words(page, view)
    placed = [(word, box) for word, boxes in found.items() for box in boxes]
    targets = {
        "words": words_of(tokenizer, placed, grid, rng),
        "neighbours": np.full((cells, 2), -1),
        "position": np.full(cells, -1),
        "boxes": np.full((cells, HALVES, 4), -1),
    }
    if view.box.area >= page.size.width * page.size.height:
        neighbours = neighbours_of([fact for fact in page.facts if fact.column == "heading"])
        for fact in page.facts:
            places = [at for box in label_boxes(view, fact, found) for at in halves_of(box, grid)]
            for cell, half in places:
                targets["boxes"][cell, half] = coordinates_of(shown_box(view, fact.region_box))
                if fact.column == "heading":
                    targets["position"][cell] = POSITIONS.index(fact.position)
                    for k, name in enumerate(neighbours[fact.item]):
                        targets["neighbours"][cell, k] = word_token(tokenizer, name) if name else tokenizer.pad_token_id
    return CellPage(render(image, view), characters_of(page, view), **targets)


@functools.lru_cache(1 << 14)
def _advance(character: str, font: Font) -> float:
    return text_width(character, font)


def characters_of(page: MiniPage, view: View) -> np.ndarray:
    """Classes (cells, SLOTS) of the characters whose centres fall in each cell of a view, line by line, 0 behind the
    last; -1 for all of a cell that shows print smaller than `LEAST_EM` shown pixels, which is not to be told."""
    rows, columns = view.shown.height // PATCH, view.shown.width // PATCH
    # A crop's sides are whole cells, so it may be shown wider or narrower than it is.
    across, scale = view.shown.width / view.box.width, view.shown.height / view.box.height
    found: dict[int, list[tuple[float, float, int]]] = {}
    small = set()
    for text in page.canvas.texts:
        y = (text.baseline - 0.36 * text.font.px - view.box.y1) * scale / PATCH
        if not 0 <= y < rows:
            continue
        x = (text.x - view.box.x1) * across / PATCH
        for character in text.string:
            width = _advance(character, text.font) * across / PATCH
            column = math.floor(x + width / 2)
            if 0 <= column < columns:
                cell = int(y) * columns + column
                if text.font.px * scale < LEAST_EM:
                    small.add(cell)
                elif character in CLASS:
                    found.setdefault(cell, []).append((text.baseline, x, CLASS[character]))
            x += width
    classes = np.zeros((rows * columns, SLOTS), np.int64)
    for cell, inside in found.items():
        for slot, (_, _, character_class) in enumerate(sorted(inside)[:SLOTS]):
            classes[cell, slot] = character_class
    classes[list(small)] = -1
    return classes


@functools.lru_cache(1 << 14)
def word_token(tokenizer: Any, word: str) -> int:
    """The token that stands for a word: its last, as it is written inside a sentence."""
    return tokenizer.encode(" " + word, add_special_tokens=False)[-1]


@dataclass(frozen=True)
class Cells(OnDevice):
    """Pages as one batch of `grids`; targets as in `CellPage`, one image after the other; `nothing` is the id of
    padding."""

    images: Images
    grids: tuple[Grid, ...]
    characters: torch.Tensor
    words: torch.Tensor
    neighbours: torch.Tensor
    position: torch.Tensor
    boxes: torch.Tensor
    nothing: int


def cell_batch(
    rng: random.Random,
    tokenizer: Any,
    config: MiniDocsConfig,
    pages: int,
    split: str = "train",
    shares: Sequence[float] = (),
) -> Cells:
    """Whole pages (`draw_page`), and of each a crop of a fact, of several, or a small cut-out."""
    import torch

    drawn = []
    for _ in range(pages):
        document, page = draw_page(rng, split, config, shares)
        samples = PageSamples(document, page, rng)
        views = [page_view(page)]
        kind = rng.random()
        if kind < 0.25:
            views.append(samples.close_view()[0])
        elif kind < 0.5:
            views.append(samples.several_view()[0])
        else:
            fact = rng.choice(page.facts)
            views.append(region_view(page, fact.region_box, rng, fact.answer_box))
        drawn += [cell_page(tokenizer, page, view, samples.image, rng) for view in views]
    grids = [(page.image.height // PATCH, page.image.width // PATCH) for page in drawn]
    images = arrange(np.concatenate([patchify(page.image) for page in drawn]), grids)
    names = ("characters", "words", "neighbours", "position", "boxes")
    targets = (torch.from_numpy(np.concatenate([getattr(page, name) for page in drawn])) for name in names)
    return Cells(images, tuple(grids), *targets, tokenizer.pad_token_id)


def cell_heads(width: int, vocabulary: int) -> torch.nn.ModuleDict:
    """Linear readings of a cell's feature: characters, words and neighbours as codes that are compared with those of
    every token, places of cards, boxes as four codes that are compared with those of every coordinate, which begin so
    that near ones are alike."""
    import torch
    from torch import nn

    coordinates = nn.Linear(BOX_CODE, COORDINATES)
    with torch.no_grad():
        coordinates.weight.copy_(torch.from_numpy(coordinate_codes()))
    return nn.ModuleDict(
        {
            "characters": nn.Linear(width, SLOTS * (len(CHARACTERS) + 1)),
            "words": nn.Linear(width, (HALVES + 2) * WORD_CODE),
            "codes": nn.Linear(WORD_CODE, vocabulary),
            "position": nn.Linear(width, len(POSITIONS)),
            "boxes": nn.Linear(width, HALVES * 4 * BOX_CODE),
            "coordinates": coordinates,
        }
    )


def coordinate_codes() -> np.ndarray:
    """Sines and cosines (COORDINATES, BOX_CODE) of wavelengths from 5 steps to four times the largest coordinate."""
    waves = np.geomspace(5, 4 * COORDINATES, BOX_CODE // 2)
    angles = 2 * np.pi * np.arange(COORDINATES)[:, None] / waves
    return np.concatenate([np.cos(angles), np.sin(angles)], 1)


def cell_loss(visual: Any, heads: Any, batch: Cells) -> tuple[torch.Tensor, Counts]:
    """Weighted sum of the mean cross-entropies of characters, words, neighbours, positions and coordinates, and of the
    `finding_loss` of each image. Of boxes it is counted how many overlap the true one by half."""
    import torch
    from torch.nn import functional as F

    features = encode_images(visual, batch.images).float()
    cells = len(features)
    logits = heads["characters"](features).view(cells, SLOTS, -1)
    loss, counts = slot_loss(logits, batch.characters)
    losses, counts = [loss], dict(counts)
    read = heads["words"](features).view(cells, HALVES + 2, WORD_CODE)
    asked = {"words": (batch.words, read[:, :HALVES], 1.0), "neighbours": (batch.neighbours, read[:, HALVES:], 0.3)}
    for name, (shown, codes, weight) in asked.items():
        if (shown >= 0).any():
            logits, target = heads["codes"](codes[shown >= 0]), shown[shown >= 0]
            losses.append(weight * F.cross_entropy(logits, target))
            shows = target != batch.nothing
            counts[name] = (((logits.argmax(-1) == target) & shows).sum(), shows.sum())
    sizes = [rows * columns for rows, columns in batch.grids]
    found = [
        finding_loss(codes, shown, heads["codes"].weight, batch.nothing)
        for codes, shown in zip(read[:, :HALVES].split(sizes), batch.words.split(sizes), strict=True)
    ]
    losses.append(0.5 * sum(loss for loss, _ in found) / len(found))
    counts["found"] = tuple(sum(part) for part in zip(*(count for _, count in found), strict=True))
    named = batch.position >= 0
    if named.any():
        logits = heads["position"](features[named])
        losses.append(0.1 * F.cross_entropy(logits, batch.position[named]))
        counts["positions"] = ((logits.argmax(-1) == batch.position[named]).sum(), named.sum())
    boxed = batch.boxes[:, :, 0] >= 0
    if boxed.any():
        cell, half = boxed.nonzero().unbind(1)
        logits = heads["coordinates"](heads["boxes"](features).view(cells, HALVES, 4, -1)[cell, half])
        target = batch.boxes[cell, half]
        losses.append(2 * F.cross_entropy(logits.flatten(0, 1), target.flatten()))
        overlaps = overlap(logits.argmax(-1), target)
        counts["boxes"] = ((overlaps >= 0.5).sum(), len(overlaps))
    return torch.stack(losses).sum(), counts


def finding_loss(
    read: torch.Tensor, shown: torch.Tensor, codes: torch.Tensor, nothing: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, int]]:
    """Of the words of one image, mean of minus the log of the attention that their `codes` (vocabulary, WORD_CODE)
    would pay to the halves that show them, among all; and how many find one of them first. `read` (cells, HALVES,
    WORD_CODE) is what cells tell, `shown` (cells, HALVES) the token ids."""
    import torch

    words = torch.unique(shown[(shown >= 0) & (shown != nothing)])
    if not len(words):
        return read.sum() * 0, (words.sum(), 0)
    paid = (codes[words] @ read.flatten(0, 1).T).log_softmax(-1)
    gold = shown.flatten() == words[:, None]
    loss = -paid.masked_fill(~gold, -torch.inf).logsumexp(-1).mean()
    return loss, (gold.gather(1, paid.argmax(-1)[:, None]).sum(), len(words))


def slot_loss(logits: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, Counts]:
    """Weighted cross-entropy of logits (cells, SLOTS, classes): the first empty slot says where a cell ends, those
    behind it count little, cells of -1 not at all."""
    import torch
    from torch.nn import functional as F

    filled = slots > 0
    closing = torch.cat([torch.ones_like(filled[:, :1]), filled[:, :-1]], 1) & ~filled
    weights = torch.where(filled, 1.0, torch.where(closing, 0.5, 0.02)) * (slots >= 0)
    losses = F.cross_entropy(logits.transpose(1, 2), slots.clamp(min=0), reduction="none")
    right = (logits.argmax(-1) == slots) & filled
    digits = filled & (slots <= 10)
    # Totals are tensors too: waiting for them would hold up an accelerator.
    counts = {"characters": (right.sum(), filled.sum()), "digits": ((right & digits).sum(), digits.sum())}
    return (losses * weights).sum() / weights.sum().clamp(min=1), counts


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU (N,) of boxes (N, 4)."""
    import torch

    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    area = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (a, b)]
    return inner / (area[0] + area[1] - inner).clamp(min=1)
