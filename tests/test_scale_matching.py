"""The language model begins with the tower's codes of words: it looks a name up before it has learnt anything."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from vrag_lib.scale_cells import HALVES, WORD_CODE, cell_heads  # noqa: E402
from vrag_lib.scale_matching import EMBEDDING_STD, begin_with_codes  # noqa: E402
from vrag_lib.scale_policy import build_model, build_processor  # noqa: E402
from vrag_lib.scale_reading import ANSWER_TO_NAME, NAME_TO_HALF, of_head  # noqa: E402

WIDTH, WORDS = 192, 96


@pytest.fixture(scope="module")
def begun():
    torch.manual_seed(0)
    tokenizer = build_processor().tokenizer
    model, heads = build_model(tokenizer, seed=0).eval(), cell_heads(WIDTH, len(tokenizer))
    before = model.model.language_model.norm.weight.detach() * model.get_input_embeddings().weight.detach().std()
    begin_with_codes(model, heads)
    return model, heads, before


@pytest.mark.parametrize("half", range(HALVES))
def test_a_token_finds_the_cell_that_shows_it(begun, half):
    """Cells that the dense stage would read as these words, one each; far behind them, the words themselves."""
    model, heads, _ = begun
    words = torch.arange(1000, 1000 + WORDS)
    text, codes = model.model.language_model, heads["codes"].weight.detach()
    read = heads["words"].weight.detach()[half * WORD_CODE : (half + 1) * WORD_CODE]
    cells = 6 * (codes[words] - codes.mean(0)) / codes.std() @ torch.linalg.pinv(read).T
    states = torch.cat([cells, model.get_input_embeddings().weight.detach()[words]])[None]
    places = torch.cat([torch.full((WORDS,), 20), torch.full((WORDS,), 60)]).expand(3, 1, -1)
    with torch.no_grad():
        q, k = (of_head(text, NAME_TO_HALF[half], name, states, places)[0] for name in ("q_proj", "k_proj"))
    found = (q[WORDS:] @ k[:WORDS].T).argmax(-1)
    assert (found == torch.arange(WORDS)).float().mean() > 0.9


@pytest.mark.parametrize("half", range(HALVES))
def test_the_box_that_a_cell_tells_is_copied_on(begun, half):
    """From a cell to the name, and from there to the answer: the digits can still be read off linearly."""
    model, heads, _ = begun
    text, features = model.model.language_model, torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(1))
    told = heads["boxes"](features).detach().view(500, HALVES, -1)[:, half]
    states = features
    with torch.no_grad():
        for layer, head in (NAME_TO_HALF[half], ANSWER_TO_NAME):
            attention = text.layers[layer].self_attn
            own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            states = states @ attention.v_proj.weight[own].T @ attention.o_proj.weight[:, own].T
    design = torch.cat([states, torch.ones(500, 1)], 1)
    read = design @ (torch.linalg.pinv(design[:300]) @ told[:300])
    left = (read[300:] - told[300:]).var() / told[300:].var()
    assert left < 0.4, "64 numbers hold most of what 132 random readings tell"


def test_what_is_written_first_stays_as_likely(begun):
    model, _, before = begun
    embeddings = model.get_input_embeddings().weight.detach()
    assert embeddings.std().item() == pytest.approx(EMBEDDING_STD, rel=0.01)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.allclose(model.model.language_model.norm.weight.detach() * EMBEDDING_STD, before)
