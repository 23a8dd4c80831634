"""What the language model of the scale policy starts from: the words that the vision tower has learnt to tell apart.

After the dense stage a cell's feature tells which word stands in each of its halves, by a code that is compared with
that of every token (`scale_cells.cell_heads`). A language model with random embeddings would have to find these codes
anew, word by word, before it could look up on a page what a question names. `begin_with_codes` gives each token's
embedding its code, and the two heads that look names up the directions in which codes are read off cells; these heads,
and the one that looks back at a name, begin by copying what cells tell of boxes.

Not part of the paper, whose models come trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vrag_lib.scale_cells import ABSENT, WORD_CODE
from vrag_lib.scale_reading import ANSWER_TO_NAME, NAME_TO_HALF

if TYPE_CHECKING:
    import torch

EMBEDDING_STD = 0.4
"""Standard deviation of embeddings. With the usual 0.02 the first layer's output, which is that of much larger image
features, drowns what token it was."""

SHARPNESS = 1.0
"""Length of the rows of the two heads' projections to begin with; at 0.02 a head attends to everything alike."""


def begin_with_codes(model: Any, heads: Any) -> None:
    """Set embeddings, final norm and two heads of a Qwen2.5-VL in place. `heads` are those of `cell_heads`.

    The first `WORD_CODE` dimensions of an embedding become the token's code, whitened over the vocabulary as a whole;
    the final norm is scaled down as far as embeddings are up, so that what is written first stays as likely.
    """
    import torch

    text, embeddings = model.model.language_model, model.get_input_embeddings().weight
    codes = heads["codes"].weight.detach()
    codes = codes - codes.mean(0)
    directions = torch.linalg.svd(codes, full_matrices=False)[2]  # strongest first
    with torch.no_grad():
        text.norm.weight *= float(embeddings.std()) / EMBEDDING_STD
        embeddings *= EMBEDDING_STD / embeddings.std()
        embeddings[:, :WORD_CODE] = codes / codes.std() * EMBEDDING_STD
        for half, (layer, head) in enumerate(NAME_TO_HALF):
            attention = text.layers[layer].self_attn
            width = attention.head_dim
            # Rotary pairs (i, i + width / 2) turn slower the larger i: what matters most goes where positions do least.
            slowest = [i + part for i in range(width // 2 - 1, -1, -1) for part in (0, width // 2)]
            rows = torch.tensor(slowest[: len(directions)]) + head * width
            chosen = directions[: len(rows)]
            read = chosen @ heads["words"].weight[half * WORD_CODE : (half + 1) * WORD_CODE]
            attention.q_proj.weight[rows] = 0
            attention.q_proj.weight[rows, :WORD_CODE] = SHARPNESS * chosen
            attention.k_proj.weight[rows] = SHARPNESS * read * len(rows) ** 0.5 / read.norm()
        _begin_with_boxes(text, heads["boxes"].weight.view(len(NAME_TO_HALF), -1, embeddings.shape[1]))


def _begin_with_boxes(text: Any, read: torch.Tensor) -> None:
    """Let the heads that look names up copy what cells tell of boxes, and the head that answers look back with copy it
    on. `read` (halves, digits, width) is how it is read off either half of a cell; of the digits the combinations that
    tell most are written to the dimensions of the residual stream behind the codes of words."""
    import torch

    wide = text.layers[0].self_attn.head_dim
    digits = read - read.view(len(read), -1, ABSENT + 1, read.shape[-1]).mean(2).repeat_interleave(ABSENT + 1, 1)
    kept = torch.linalg.svd(torch.cat(list(digits), 1), full_matrices=False)[0][:, :wide].T
    place = torch.eye(read.shape[-1])[WORD_CODE : WORD_CODE + wide].to(read)
    copies = [(*head, kept @ digits[half]) for half, head in enumerate(NAME_TO_HALF)]
    for layer, head, values in [*copies, (*ANSWER_TO_NAME, place)]:
        attention, own = text.layers[layer].self_attn, slice(head * wide, (head + 1) * wide)
        attention.v_proj.weight[own] = values * wide**0.5 / values.norm()
        attention.v_proj.bias[own] = 0
        attention.o_proj.weight[:, own] = place.T
