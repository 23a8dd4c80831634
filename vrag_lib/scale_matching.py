"""What the language model of the scale policy starts from: what the vision tower has learnt to tell.

After the dense stage a linear layer reads off a cell's feature which word stands in each of its halves, the box of what
that word names, and the characters one by one (`scale_cells.cell_heads`). A language model with random weights would
have to find these directions anew, word by word, while everything behind them is still noise. `begin_with_codes` lays
them into its residual stream instead, at tokens of text:

    0 to 63     the code of a word: that of the token itself, or what a cell shows
    64 to 127   the four coordinates of a box, or characters in the slots of a cell, as they were read off a cell
    128 to 143  the code of the coordinate to write next
    144 to 151  the code of the character to write next

The heads that look names up compare codes of words and copy boxes; the head that looks back at the name copies them on,
and a few units of that layer are to choose which coordinate comes next; the same for characters one layer later. Which
place attends to what, and what comes next, is learnt. `begin_with_copying` does the like for words of a question.

Not part of the paper, whose models come trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vrag_lib.scale_cells import BOX_CODE, COORDINATES, WORD_CODE
from vrag_lib.scale_characters import CHARACTERS, SLOTS
from vrag_lib.scale_policy import BOX_STEP, coordinate_tokens
from vrag_lib.scale_reading import ANSWER_TO_CELLS, BOX_TO_NAME, COPY_TO_NEXT, NAME_TO_HALF

if TYPE_CHECKING:
    import torch

CHARACTER_CODE = 8
"""Width of the space in which characters are told apart."""

READ, COORDINATE = WORD_CODE, WORD_CODE + 4 * BOX_CODE
CHARACTER = COORDINATE + BOX_CODE
FREE = CHARACTER + CHARACTER_CODE
"""First dimensions of the parts of the residual stream above."""

EMBEDDING_STD = 0.4
"""Standard deviation of embeddings. With the usual 0.02 the first layer's output, which is that of much larger image
features, drowns what token it was."""

SIZE = 0.45
"""About what the residual stream of text has when the second layer reads it; that of cells is near 1."""


CODE_NORM, WORD_NORM = 1.0, 0.3
"""The final norm where the codes of what to write next stand, and where those of words do."""

COPY_GAIN = 1.5
"""How much larger a copied embedding is written than it was read."""


def begin_with_codes(model: Any, tokenizer: Any, heads: Any) -> None:
    """Set embeddings, final norm and some heads and units of a Qwen2.5-VL in place. `heads` are those of `cell_heads`.

    The final norm is scaled down as far as embeddings are up, so that what is written first stays as likely; but less
    so where codes stand, which could not move a logit otherwise.
    """
    import torch

    text, embeddings = model.model.language_model, model.get_input_embeddings().weight
    words = heads["codes"].weight.detach()
    characters, slots = character_codes(heads["characters"].weight.detach())
    with torch.no_grad():
        text.norm.weight *= float(embeddings.std()) / EMBEDDING_STD
        text.norm.weight[COORDINATE:FREE], text.norm.weight[:WORD_CODE] = CODE_NORM, WORD_NORM
        embeddings *= EMBEDDING_STD / embeddings.std()
        embeddings[:, :WORD_CODE] = _sized(words)
        embeddings[:, READ:FREE] = 0
        codes = _sized(heads["coordinates"].weight.detach())
        for number in range(COORDINATES):
            for token in coordinate_tokens(number * BOX_STEP):
                row = tokenizer.convert_tokens_to_ids(token)
                embeddings[row, :WORD_CODE] = 0
                embeddings[row, COORDINATE:CHARACTER] = codes[number]
        for character, code in zip(CHARACTERS, _sized(characters), strict=True):
            row = tokenizer.convert_tokens_to_ids(character)
            embeddings[row, :WORD_CODE] = 0
            embeddings[row, CHARACTER:FREE] = code
        shows, boxes = _by_half(heads["words"], WORD_CODE), _by_half(heads["boxes"], 4 * BOX_CODE)
        for half, head in enumerate(NAME_TO_HALF):
            _compare(text, head, words, shows[half][0])
            _copy(text, head, *boxes[half], READ)
        same = torch.eye(embeddings.shape[1])[READ:COORDINATE].to(embeddings)
        _copy(text, BOX_TO_NAME, same, same.new_zeros(len(same)), READ)
        _choose(text.layers[BOX_TO_NAME[0]].mlp, 4, COORDINATE, BOX_CODE)
        _copy(text, ANSWER_TO_CELLS[0], *(sum(part) for part in zip(*shows, strict=True)), 0)
        _copy(text, ANSWER_TO_CELLS[1], slots, slots.new_zeros(len(slots)), READ)
        _choose(text.layers[ANSWER_TO_CELLS[1][0]].mlp, SLOTS, CHARACTER, CHARACTER_CODE)


def begin_with_copying(model: Any) -> None:
    """Let the head that is shown what to copy write the token that it looks at: most of its embedding, to where
    embeddings are compared with what is to be written."""
    import torch

    text, embeddings = model.model.language_model, model.get_input_embeddings().weight.detach()
    layer, head = COPY_TO_NEXT
    attention = text.layers[layer].self_attn
    own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    strongest = torch.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False)[2][: attention.head_dim]
    with torch.no_grad():
        attention.v_proj.weight[own] = strongest
        attention.v_proj.bias[own] = 0
        attention.o_proj.weight[:, own] = COPY_GAIN * strongest.T


def _by_half(reading: Any, width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight (width, width of a feature) and bias (width,) with which a linear layer reads a code off either half."""
    return [
        (reading.weight.detach()[start : start + width], reading.bias.detach()[start : start + width])
        for start in range(0, len(NAME_TO_HALF) * width, width)
    ]


def _sized(codes: torch.Tensor) -> torch.Tensor:
    return codes / codes.std() * EMBEDDING_STD


def character_codes(reading: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of how characters are read off cells (SLOTS * classes, width), the best approximation that has one code for a
    character in every slot: codes (characters, CHARACTER_CODE), most for telling digits apart, and how the code in each
    slot is read (SLOTS * CHARACTER_CODE, width)."""
    import torch

    classes = reading.view(SLOTS, len(CHARACTERS) + 1, -1)[:, 1:]
    classes = classes - classes.mean(1, keepdim=True)
    weights = torch.tensor([3.0 if c.isdigit() else 1.0 if not c.isalpha() else 0.3 for c in CHARACTERS]).to(reading)
    table = (classes * weights[:, None]).transpose(0, 1).flatten(1)  # characters by slots and width
    codes, sizes, directions = torch.linalg.svd(table, full_matrices=False)
    codes = (codes * sizes)[:, :CHARACTER_CODE] / weights[:, None]
    slots = directions[:CHARACTER_CODE].view(CHARACTER_CODE, SLOTS, -1).transpose(0, 1)
    return codes, slots.flatten(0, 1)


def _compare(text: Any, head: tuple[int, int], words: torch.Tensor, read: torch.Tensor) -> None:
    """Let a head compare the code of a token with the one read off a cell, as sharply as `finding_loss` does; strongest
    directions where rotary positions do least."""
    import torch

    directions = torch.linalg.svd(words, full_matrices=False)[2]  # strongest first
    attention = text.layers[head[0]].self_attn
    width = attention.head_dim
    # Rotary pairs (i, i + width / 2) turn slower the larger i.
    slowest = [i + part for i in range(width // 2 - 1, -1, -1) for part in (0, width // 2)]
    rows = torch.tensor(slowest[: len(directions)]) + head[1] * width
    chosen = directions[: len(rows)]
    # What attention divides by, and what embeddings were multiplied with; by how much norms enlarge them is `SIZE`.
    sharpness = (width**0.5 * words.std() / EMBEDDING_STD * SIZE) ** 0.5
    attention.q_proj.weight[rows] = 0
    attention.q_proj.weight[rows, :WORD_CODE] = sharpness * chosen
    attention.k_proj.weight[rows] = sharpness * (chosen @ read)
    attention.q_proj.bias[rows] = attention.k_proj.bias[rows] = 0


def _copy(text: Any, head: tuple[int, int], values: torch.Tensor, bias: torch.Tensor, place: int) -> None:
    """Let a head copy what `values` (head width, width) and `bias` read off what it looks at, features of size 1, to
    the dimensions from `place`."""
    attention = text.layers[head[0]].self_attn
    wide = attention.head_dim
    own, size = slice(head[1] * wide, (head[1] + 1) * wide), wide**0.5 / values.norm()
    attention.v_proj.weight[own] = values * size
    attention.v_proj.bias[own] = bias * size
    attention.o_proj.weight[:, own] = 0
    attention.o_proj.weight[place : place + wide, own].fill_diagonal_(1)


def _choose(mlp: Any, count: int, place: int, width: int) -> None:
    """Let the first `count * width` units of a layer copy codes read off a cell to where the one to write stands. Their
    gates, which say which of them it is, stay as they are."""
    units = count * width
    mlp.up_proj.weight[:units] = 0
    mlp.up_proj.weight[:units, READ : READ + units].fill_diagonal_(1)
    mlp.down_proj.weight[:, :units] = 0
    for unit in range(units):
        mlp.down_proj.weight[place + unit % width, unit] = 1
