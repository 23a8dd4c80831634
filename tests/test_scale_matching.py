"""The language model begins with the tower's codes of words: it looks a name up before it has learnt anything."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from vrag_lib.scale_cells import BOX_CODE, COORDINATES, HALVES, WORD_CODE, cell_heads  # noqa: E402
from vrag_lib.scale_characters import CHARACTERS, SLOTS  # noqa: E402
from vrag_lib.scale_matching import (  # noqa: E402
    CHARACTER,
    CHARACTER_CODE,
    COORDINATE,
    EMBEDDING_STD,
    FREE,
    READ,
    begin_with_codes,
    begin_with_copying,
    character_codes,
)
from vrag_lib.scale_policy import BOX_STEP, build_model, build_processor, coordinate_tokens  # noqa: E402
from vrag_lib.scale_reading import BOX_TO_NAME, COPY_TO_NEXT, NAME_TO_HALF, of_head  # noqa: E402

WIDTH, WORDS = 192, 96


@pytest.fixture(scope="module")
def begun():
    torch.manual_seed(0)
    tokenizer = build_processor().tokenizer
    model, heads = build_model(tokenizer, seed=0).eval(), cell_heads(WIDTH, len(tokenizer))
    before = model.model.language_model.norm.weight.detach() * model.get_input_embeddings().weight.detach().std()
    begin_with_codes(model, tokenizer, heads)
    return model, heads, before


@pytest.mark.parametrize("half", range(HALVES))
def test_a_token_finds_the_cell_that_shows_it(begun, half):
    """Cells that the dense stage would read as these words, one each; far behind them, the words themselves."""
    model, heads, _ = begun
    words = torch.arange(1000, 1000 + WORDS)
    text, codes = model.model.language_model, heads["codes"].weight.detach()
    read = heads["words"].weight.detach()[half * WORD_CODE : (half + 1) * WORD_CODE]
    cells = 6 * codes[words] / codes.std() @ torch.linalg.pinv(read).T
    states = torch.cat([cells, model.get_input_embeddings().weight.detach()[words]])[None]
    places = torch.cat([torch.full((WORDS,), 20), torch.full((WORDS,), 60)]).expand(3, 1, -1)
    with torch.no_grad():
        q, k = (of_head(text, NAME_TO_HALF[half], name, states, places)[0] for name in ("q_proj", "k_proj"))
    found = (q[WORDS:] @ k[:WORDS].T).argmax(-1)
    assert (found == torch.arange(WORDS)).float().mean() > 0.9


@pytest.mark.parametrize("half", range(HALVES))
def test_the_box_that_a_cell_tells_is_copied_on(begun, half):
    """From a cell to the name, from there to the answer, and of it the coordinate whose units are open."""
    model, heads, _ = begun
    text, features = model.model.language_model, torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1))
    told = heads["boxes"](features).detach().view(50, HALVES, -1)[:, half]
    states = features
    with torch.no_grad():
        for layer, head in (NAME_TO_HALF[half], BOX_TO_NAME):
            attention = text.layers[layer].self_attn
            own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            copied = states @ attention.v_proj.weight[own].T + attention.v_proj.bias[own]
            states = copied @ attention.o_proj.weight[:, own].T
        read = states[:, READ:COORDINATE]
        assert torch.allclose(read / read.std(), told / told.std(), atol=1e-4)
        mlp = text.layers[BOX_TO_NAME[0]].mlp
        for coordinate in range(4):
            units = slice(coordinate * BOX_CODE, (coordinate + 1) * BOX_CODE)
            written = (mlp.up_proj.weight[units] @ states.T).T @ mlp.down_proj.weight[:, units].T
            assert torch.equal(written[:, COORDINATE:CHARACTER], states[:, READ:][:, units])
            assert not written[:, :COORDINATE].any() and not written[:, CHARACTER:].any()


def test_a_box_that_is_told_is_written(begun):
    """With the code of a coordinate where the one to write next stands, its tokens are the likeliest."""
    model, heads, _ = begun
    embeddings, codes = model.get_input_embeddings().weight.detach(), heads["coordinates"].weight.detach()
    tokenizer = build_processor().tokenizer
    for number in (0, 7, 40, COORDINATES - 1):
        state = torch.zeros(WIDTH)
        state[COORDINATE:CHARACTER] = codes[number]
        best = (embeddings @ state).topk(2).indices.tolist()
        assert {tokenizer.decode([token]) for token in best} == set(coordinate_tokens(number * BOX_STEP))


def test_a_token_that_is_looked_at_is_written(begun):
    """What the copying head adds for a word's embedding makes this word the likeliest of a thousand."""
    model = copy.deepcopy(begun[0])
    begin_with_copying(model)
    layer, head = COPY_TO_NEXT
    attention = model.model.language_model.layers[layer].self_attn
    own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    with torch.no_grad():
        words = model.get_input_embeddings().weight[1000:2000]
        written = words @ attention.v_proj.weight[own].T @ attention.o_proj.weight[:, own].T
        assert ((written @ words.T).argmax(-1) == torch.arange(1000)).float().mean() > 0.95


def test_characters_have_one_code_in_every_slot():
    """Readings that are codes of characters, slot by slot, are told apart by them."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randn(len(CHARACTERS), CHARACTER_CODE, generator=generator)
    reads = torch.randn(SLOTS, CHARACTER_CODE, WIDTH, generator=generator)
    classes = torch.zeros(SLOTS, len(CHARACTERS) + 1, WIDTH)
    classes[:, 1:] = torch.einsum("cd,sdw->scw", codes - codes.mean(0), reads)
    found, slots = character_codes(classes.flatten(0, 1))
    again = torch.einsum("cd,sdw->scw", found, slots.view(SLOTS, CHARACTER_CODE, WIDTH))
    assert torch.allclose(again, classes[:, 1:], atol=1e-3)


def test_what_is_written_first_stays_as_likely(begun):
    model, _, before = begun
    embeddings = model.get_input_embeddings().weight.detach()
    words = embeddings[embeddings[:, :WORD_CODE].any(1), :WORD_CODE]  # coordinates and characters have other codes
    assert words.std().item() == pytest.approx(EMBEDDING_STD, rel=0.01)
    assert embeddings[:, FREE:].std().item() == pytest.approx(EMBEDDING_STD, rel=0.02)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.allclose(model.model.language_model.norm.weight.detach()[FREE:] * EMBEDDING_STD, before[FREE:])
    assert (model.model.language_model.norm.weight[COORDINATE:FREE] == 1).all()
