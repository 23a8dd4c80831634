"""The scale policy: tokenizer, exact training forward, truth of its samples, resumable training, checkpoint."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrag_lib.actions import parse_reply
from vrag_lib.geometry import PATCH, Box, Size, View, iou
from vrag_lib.minidocs_documents import MiniDocsConfig, build_document
from vrag_lib.scale_characters import BINS, CHARACTERS, SLOTS, draw_character_page
from vrag_lib.scale_policy import MAX_PIXELS, MIN_PIXELS
from vrag_lib.scale_tasks import (
    WHERE,
    WHO,
    PageSamples,
    draw_page,
    draw_samples,
    page_view,
    region_view,
    shown_box,
)

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def built():
    from vrag_lib.scale_policy import build_model, build_processor

    torch.set_num_threads(1)
    processor = build_processor()
    return build_model(processor.tokenizer, seed=0).eval(), processor


MIX = {"whole": 1, "crop": 1, "several": 2, "close": 2}


@pytest.fixture(scope="module")
def samples():
    return draw_samples(random.Random(0), "train", 2, MiniDocsConfig(), MIX)


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_every_string_can_be_written(built, text):
    import unicodedata

    tokenizer = built[1].tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_tags_are_single_tokens_and_numbers_are_digits(built):
    tokenizer = built[1].tokenizer
    for tag in ("<think>", "</think>", "<search>", "</search>", "<bbox>", "</bbox>", "<answer>", "</answer>"):
        assert len(tokenizer.encode(tag)) == 1
    assert [tokenizer.decode([i]) for i in tokenizer.encode("40.7%")] == ["4", "0", ".", "7", "%"]
    assert len(tokenizer.encode("What is the figure of exports for Brazil?")) <= 10


def test_the_transformers_policy_accepts_the_chat_template(built):
    from tests.helpers import FakeCorpus
    from vrag_lib.policy_transformers import TransformersPolicy

    TransformersPolicy(*built, FakeCorpus([]), max_reply_tokens=1)


def test_the_fast_tower_is_the_tower(built):
    from vrag_lib.scale_vision import arrange, encode_images

    visual = built[0].model.visual
    grids = [(8, 12), (3, 7), (1, 5), (4, 24)]
    patches = torch.rand(sum(r * c for r, c in grids) * 4, 588) * 2 - 1
    frames = patches.view(-1, 3, 1, 196).expand(-1, -1, 2, -1).reshape(-1, 1176)
    with torch.no_grad():
        own = visual(frames, torch.tensor([(1, 2 * r, 2 * c) for r, c in grids])).pooler_output
        assert torch.allclose(encode_images(visual, arrange(patches.numpy(), grids)), own, atol=1e-5)


def test_patches_are_those_of_the_processor(built, samples):
    from vrag_lib.scale_vision import patchify

    image = samples[0].image
    own = built[1].image_processor(images=[image], do_resize=False, return_tensors="pt")["pixel_values"]
    ours = torch.from_numpy(patchify(image) / 127.5 - 1).float()
    ours = ours.view(-1, 3, 1, 196).expand(-1, -1, 2, -1).reshape(-1, 1176)
    assert torch.allclose(own, ours, atol=1e-5)


@pytest.fixture(scope="module")
def conversations():
    drawn = draw_samples(random.Random(3), "train", 2, MiniDocsConfig(), {"conversation": 3})
    return [sample for sample in drawn if sample.later]


@pytest.mark.parametrize("several_images", [False, True])
def test_the_training_loss_is_the_model_s_own(built, samples, conversations, several_images):
    from vrag_lib.scale_reading import make_batch, reading_loss

    model, processor = built
    chosen = conversations if several_images else samples[:4]
    batch = make_batch(processor.tokenizer, chosen)
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.row, batch.column] = batch.input_ids[batch.row, batch.column]
    patches = batch.images.patches.float() / 127.5 - 1
    frames = patches.view(-1, 3, 1, 196).expand(-1, -1, 2, -1).reshape(-1, 1176)
    with torch.no_grad():
        own = model(
            input_ids=batch.input_ids,
            attention_mask=(batch.input_ids != processor.tokenizer.pad_token_id).long(),
            pixel_values=frames,
            image_grid_thw=torch.tensor(
                [(1, i.height // 14, i.width // 14) for sample in chosen for i in sample.images.values()]
            ),
            mm_token_type_ids=batch.is_image.int(),
            labels=labels,
        ).loss
        ours, counts = reading_loss(model, batch, train_tower=False)
    assert ours.item() == pytest.approx(own.item(), abs=1e-4)
    overlap = counts.pop("overlap")
    assert overlap[1] == batch.kinds.count("region") and 0 <= overlap[0] <= overlap[1]
    assert sum(total for _, total in counts.values()) == len(batch.kinds)


def test_samples_say_what_the_pages_say(samples):
    again = draw_samples(random.Random(0), "train", 2, MiniDocsConfig(), MIX)
    assert [s.turns for s in again] == [s.turns for s in samples]
    for sample in samples:
        assert sample.turns and sample.image.width % PATCH == 0 and sample.image.height % PATCH == 0
        for turn in sample.turns:
            if turn.question.startswith(WHERE):
                box = parse_reply(f"<bbox>{turn.answer}</bbox>").box
                assert box.area > 0 and box.x2 <= sample.image.width and box.y2 <= sample.image.height
                assert all(iou(box, place) > 0 for place in turn.places)


def test_a_conversation_asks_about_its_newest_image(built, conversations):
    """Texts first, then images: places lie on the image shown last, and heads look at no cell of an earlier one."""
    from vrag_lib.scale_reading import NAME_TO_HALF, make_batch

    assert any(len(sample.later) > 2 for sample in conversations)
    for sample in conversations:
        first = min(sample.images)
        assert {turn.kind for turn in sample.turns[:first]} <= {"copy", "measure", "about", "column"} and first >= 2
        shown = None
        for number, turn in enumerate(sample.turns):
            shown = sample.images.get(number, shown)
            for place in (*turn.places, *turn.named_places):
                assert place.intersection(Box(0, 0, shown.width, shown.height)).area > 0.9 * place.area
    batch = make_batch(built[1].tokenizer, conversations)
    last_cells = [len(s.later) - 1 for s in conversations]
    for row, column, gold in zip(
        *(getattr(batch.gaze[NAME_TO_HALF[0]], n) for n in ("row", "column", "gold")), strict=True
    ):
        image_of = (batch.is_image[row].int().diff(prepend=torch.tensor([0])) == 1).cumsum(0) - 1
        assert gold[0] or (image_of[gold] == image_of[column]).all()
        assert image_of[column] <= last_cells[row]


def test_texts_are_asked_for_emblems_and_columns_and_said_by_their_column():
    drawn = draw_samples(random.Random(5), "train", 20, MiniDocsConfig(), {"language": 0.5, "conversation": 3})
    turns = [turn for sample in drawn for turn in sample.turns]
    whom = [turn for turn in turns if turn.question.startswith(WHO)]
    emblems = [turn for turn in whom if f"the group known as the {turn.answer}" in turn.question]
    assert emblems and len(emblems) < len(whom) and all(turn.answer in turn.question for turn in whom)
    columns = {turn.answer: turn.question for turn in turns if turn.kind == "column"}
    assert set(columns) == {"figure", "change", "share"}
    assert "change in" in columns["change"] or "set against the year before" in columns["change"]
    assert "share of" in columns["share"] or "as a part of the whole" in columns["share"]
    values = [turn for turn in turns if turn.kind.startswith("told")]
    said = {word: [t for t in values if f"The {word} " in t.saying] for word in ("figure", "change", "share")}
    assert sum(map(len, said.values())) == len(values) > 0 and said["figure"] and said["change"]
    assert all(t.answer[0] in "+-" and t.answer[-1] == "%" for t in said["change"])
    assert all(t.named in t.saying for t in values)


def test_what_a_question_says_in_other_words_is_looked_at(built):
    from vrag_lib.scale_reading import ANSWER_TO_NAME, make_batch

    tokenizer = built[1].tokenizer
    drawn = draw_samples(random.Random(4), "train", 4, MiniDocsConfig(), {"language": 2})
    echoes = [echo for sample in drawn for turn in sample.turns for echo in turn.echoes]
    said = [words for written, words in echoes if written != words]
    gaze = make_batch(tokenizer, drawn).gaze[ANSWER_TO_NAME]
    ids = make_batch(tokenizer, drawn).input_ids
    seen = {tokenizer.decode(ids[row][gold]).strip().lower() for row, gold in zip(gaze.row, gaze.gold, strict=True)}
    assert len(set(said)) > 5 and seen == {words.lower() for words in said}


def test_regions_are_asked_for_where_they_are():
    """Whatever the wording, the box that answers is the region of the fact, and what is named stands in that region."""
    for index in range(4):
        document = build_document(MiniDocsConfig(), "train", index)
        for page in document.pages:
            maker, view = PageSamples(document, page, random.Random(index)), page_view(page)
            for fact in page.facts:
                asked, region = maker.place_question(view, fact), view.to_shown(fact.region_box)
                assert iou(parse_reply(f"<bbox>{asked.answer}</bbox>").box, region) > 0.5
                for label in asked.places:
                    assert label.intersection(region).area > 0.5 * label.area
                assert asked.places or page.kind == "cover"


def test_rounded_regions_hold_their_answers():
    """Naming a region in whole multiples of 4 shown pixels keeps the region, and its crop keeps the figure."""
    for index in range(6):
        document = build_document(MiniDocsConfig(), "train", index)
        for page in document.pages:
            for fact in page.facts:
                whole = page_view(page)
                assert iou(shown_box(whole, fact.region_box), whole.to_shown(fact.region_box)) > 0.5
                view = region_view(page, fact.region_box)
                inside = view.box.intersection(fact.answer_box)
                assert inside.area > 0.9 * fact.answer_box.area


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_character_targets_are_in_reading_order(seed):
    page = draw_character_page(random.Random(seed), 3, 5, (12, 30))
    assert page.image.size == (5 * PATCH, 3 * PATCH)
    assert page.slots.shape == (3, 5, SLOTS) and page.cover.shape == (3, 5, BINS[0] * BINS[1])
    assert page.slots.min() >= 0 and page.slots.max() <= len(CHARACTERS)
    filled = page.slots > 0
    assert (filled[..., 1:] <= filled[..., :-1]).all()  # no hole before a character


def test_page_questions_are_the_benchmark_s():
    document = build_document(MiniDocsConfig(), "train", 3)
    page = next(page for page in document.pages if page.kind == "table")
    maker = PageSamples(document, page, random.Random(0))
    assert document.name in maker.writer.ask(document.name, page.facts[0])[1]
    assert Box(0, 0, page.size.width, page.size.height).intersection(page.facts[0].region_box).area > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stage_ends_with_the_same_weights(built, tmp_path, workers):
    from vrag_lib.scale_loop import Schedule, train
    from vrag_lib.scale_training import Trained, character_batch

    def run(folder, stops):
        trained = Trained.new(built[1].tokenizer, 1, "cpu")
        visual = trained.model.model.visual
        done = []

        def batch_of_step(number: int):
            return character_batch(random.Random(number), (12, 30), 24), None

        def loss_of_batch(batch):
            if len(done) in stops:
                stops.clear()
                raise KeyboardInterrupt
            done.append(batch)
            return trained.dense_loss(batch, "cpu")

        schedule = Schedule(steps=4, muon=1e-3, adamw=1e-3, warmup=2, log_every=1, save_every=2)
        modules = {"visual": visual, "characters": trained.characters}
        curve = folder / "curve.csv"
        train("dense", modules, batch_of_step, loss_of_batch, schedule, folder, curve, workers=workers)
        return visual.state_dict()

    whole = run(tmp_path / "whole", [])
    stops = [3]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stops)
    resumed = run(tmp_path / "cut", stops)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = (tmp_path / "cut" / "curve.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3", "4"]


def test_words_are_looked_for_in_the_half_they_stand_in(built):
    from vrag_lib.scale_reading import NAME_TO_CARD, NAME_TO_HALF, make_batch

    (sample,) = draw_samples(random.Random(1), "train", 1, MiniDocsConfig(), {"naming": 1})
    batch = make_batch(built[1].tokenizer, [sample])
    found = [batch.gaze[head].gold[:, 1:].any(1) for head in NAME_TO_HALF]
    assert len(sample.words) == len(found[0]) > 5 and (found[0] | found[1]).all() and found[0].any() and found[1].any()
    assert not batch.gaze[NAME_TO_CARD].gold[:, 1:].any() and not batch.kinds


def test_heads_are_shown_the_cells_that_hold_what_is_asked(built, samples):
    """The gold of every guided token lies on the image, is the name's last token, or the first token of all where
    there is nothing to look at; and none of it comes later."""
    from vrag_lib.scale_reading import (
        ANSWER_TO_NAME,
        BOX_TO_NAME,
        NAME_TO_CARD,
        NAME_TO_HALF,
        gaze_losses,
        make_batch,
    )

    model, processor = built
    batch = make_batch(processor.tokenizer, samples)
    assert set(batch.gaze) >= {*NAME_TO_HALF, ANSWER_TO_NAME, BOX_TO_NAME, NAME_TO_CARD}
    for head, gaze in batch.gaze.items():
        assert gaze.gold.any(1).all()
        last = torch.where(gaze.gold, torch.arange(gaze.gold.shape[1]), -1).amax(1)
        assert (last <= gaze.column).all()
        if head == BOX_TO_NAME:
            assert 0 < (last == 0).sum() < len(last) and not batch.is_image[gaze.row, last].any()
        elif head == ANSWER_TO_NAME:
            named = {processor.tokenizer.decode([t]).strip() for t in batch.input_ids[gaze.row, last].tolist()}
            assert not named & {"is", "the", "?", "|im_end|"}
        else:
            sunk = gaze.gold[:, 0]
            assert batch.is_image[gaze.row[~sunk]][gaze.gold[~sunk]].all() and (gaze.gold[sunk].sum(1) == 1).all()
            assert not sunk.any() or head in (*NAME_TO_HALF, NAME_TO_CARD)
    with torch.no_grad():
        out = model.model.language_model(
            inputs_embeds=torch.zeros(*batch.input_ids.shape, 192), position_ids=batch.position_ids, use_cache=False,
            output_hidden_states=True,
        )  # fmt: skip
        loss, counts = gaze_losses(model.model.language_model, batch, out.hidden_states)
        silent = dataclasses.replace(batch, gaze={})  # a transcription alone: nobody is told where to look
        assert gaze_losses(model.model.language_model, silent, out.hidden_states)[0].item() == 0
    # Nothing to tell tokens apart by: all that came before is paid alike.
    expected = sum(-(gaze.gold.sum(1) / (gaze.column + 1)).log().mean() for gaze in batch.gaze.values())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert len(counts) == len(batch.gaze) and all(0 <= hits <= total for hits, total in counts.values())
    heads = (f"gaze_{head[0]}.{head[1]}" for head in batch.gaze)
    looking = [float((~gaze.gold[:, 0]).sum()) for gaze in batch.gaze.values()]
    assert [float(counts[head][1]) for head in heads] == looking


def test_attention_may_stay_in_float32(built, samples):
    """The same loss outside an autocast; inside one, only attention leaves it; afterwards all is as before."""
    from vrag_lib.scale_reading import float32_attention, make_batch, reading_loss

    model, processor = built
    batch, text = make_batch(processor.tokenizer, samples[:3]), model.model.language_model
    with torch.no_grad():
        loss = reading_loss(model, batch, train_tower=False)[0]
        with float32_attention(text):
            assert reading_loss(model, batch, train_tower=False)[0] == loss
            seen = []
            hook = text.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
            with torch.autocast("cpu", torch.bfloat16):
                assert reading_loss(model, batch, train_tower=False)[0].item() == pytest.approx(loss.item(), rel=0.02)
            hook.remove()
            assert seen == [torch.float32]
    assert text.config._attn_implementation == "sdpa"


def test_cells_say_what_the_page_says(built):
    """Of a table page: each row's label is told by the half of a cell it stands in, with the row's box beside it."""
    from vrag_lib.scale_cells import cell_page, word_token
    from vrag_lib.scale_policy import BOX_STEP
    from vrag_lib.scale_tasks import label_boxes, words

    tokenizer = built[1].tokenizer
    document = build_document(MiniDocsConfig(), "train", 3)
    page = next(page for page in document.pages if page.kind == "table")
    view = page_view(page)
    cells = cell_page(tokenizer, page, view, page.image(), random.Random(0))
    columns = view.shown.width // PATCH
    for fact in page.facts:
        (label,) = label_boxes(view, fact, words(page, view))
        row, column = int((label.y1 + label.y2) // PATCH), int((label.x1 + label.x2) / 2 // PATCH)
        cell, half = row // 2 * columns + column, row % 2
        assert cells.words[cell, half] == word_token(tokenizer, fact.item)
        assert tuple(cells.boxes[cell, half] * BOX_STEP) == shown_box(view, fact.region_box).as_tuple()
    assert (cells.boxes[:, :, 0] >= 0).sum() >= len({fact.item for fact in page.facts})


@pytest.mark.parametrize("shown", [Size(560, 84), Size(280, 84), Size(140, 84)], ids=lambda size: str(size.width))
def test_characters_stand_where_a_stretched_crop_shows_them(shown):
    """The figure of a table's row, by the cells of a crop shown wider, and narrower, than it is high."""
    from vrag_lib.scale_cells import characters_of
    from vrag_lib.scale_characters import CHARACTERS

    document = build_document(MiniDocsConfig(), "train", 3)
    page = next(page for page in document.pages if page.kind == "table")
    fact = page.facts[0]
    figure = next(t for t in page.canvas.texts if t.string == fact.value and t.box.intersection(fact.answer_box).area)
    x, y = round(figure.box.x1) - 100, round(figure.box.y1) - 8
    view = View(page.size, Box(x, y, x + 200, y + 60), shown)
    classes = characters_of(page, view).reshape(3, shown.width // PATCH, -1)
    place = view.to_shown(figure.box)
    written = ""
    for column, cell in enumerate(classes.max(0)):
        inside = "".join(CHARACTERS[c - 1] for c in cell if c > 0)
        assert not inside or (place.x1 < (column + 1) * PATCH and column * PATCH < place.x2)
        written += inside
    assert written == fact.value


def test_crops_are_shown_as_they_are():
    """Wider or narrower by little: their area may be chosen to fit."""
    bent = []
    for number in range(40):
        document = build_document(MiniDocsConfig(), "train", number)
        for page in document.pages:
            for fact in page.facts:
                view = region_view(page, fact.region_box)
                bent.append(abs(math.log(view.shown.width / view.box.width * view.box.height / view.shown.height)))
                assert MIN_PIXELS <= view.shown.width * view.shown.height <= MAX_PIXELS
    assert np.mean(bent) < 0.08 and max(bent) < 0.25


def test_cards_have_neighbours(built):
    from vrag_lib.scale_cells import POSITIONS, cell_page, neighbours_of, word_token

    tokenizer = built[1].tokenizer
    pages = (page for i in range(20) for page in build_document(MiniDocsConfig(), "train", i).pages)
    page = next(page for page in pages if page.kind == "board")
    cards = {fact.position: fact for fact in page.facts if fact.column == "heading"}
    left, below = cards["upper left"], cards["lower left"]
    found = neighbours_of(list(cards.values()))
    assert found[left.item] == ("", "") and found[below.item][1] == ""
    # Straight from the geometry: the nearest card that starts at the same height or the same edge.
    for card in cards.values():
        own = card.region_box
        higher = [c for c in cards.values() if c.region_box.x1 == own.x1 and c.region_box.y2 <= own.y1]
        further = [c for c in cards.values() if c.region_box.y1 == own.y1 and c.region_box.x2 <= own.x1]
        assert found[card.item] == (
            max(higher, key=lambda c: c.region_box.y2).item if higher else "",
            max(further, key=lambda c: c.region_box.x2).item if further else "",
        )
    cells = cell_page(tokenizer, page, page_view(page), page.image(), random.Random(0))
    assert set(cells.position[cells.position >= 0].tolist()) == {POSITIONS.index(name) for name in cards}
    assert word_token(tokenizer, left.item) in cells.neighbours[:, 0]


def test_a_copied_answer_is_looked_up_in_its_question(built):
    """While a copied answer is written, one head is shown the token of the question that comes next; and another, at
    each of these tokens, the one in front of it."""
    from vrag_lib.scale_reading import COPY_TO_NEXT, TO_BEFORE, make_batch
    from vrag_lib.scale_tasks import draw_samples

    tokenizer = built[1].tokenizer
    drawn = draw_samples(random.Random(4), "train", 6, MiniDocsConfig(), {"language": 2})
    turns = [turn for sample in drawn for turn in sample.turns]
    assert {turn.kind for turn in turns} == {"copy", "measure", "about", "column"}
    assert all(words in turn.question.lower() or words in turn.question for turn in turns for _, words in turn.echoes)
    batch = make_batch(tokenizer, drawn)
    gaze, before = batch.gaze[COPY_TO_NEXT], batch.gaze[TO_BEFORE]
    copied = [written for turn in turns for written, words in turn.echoes if written == words]
    assert len(gaze.row) >= len(copied) and not gaze.gold[:, 0].any()
    for row, column, gold in zip(gaze.row, gaze.column, gaze.gold, strict=True):
        written = tokenizer.decode(batch.input_ids[row, column + 1 : column + 2]).strip()
        seen = tokenizer.decode(batch.input_ids[row][gold])
        assert written and (written in seen or seen.strip() in written)
    assert (before.gold.int().argmax(1) == before.column - 1).all() and (before.gold.sum(1) == 1).all()


def test_questions_follow_the_seed_and_not_the_process():
    """Strings hash differently in every process; what is asked does not."""
    code = (
        "import random; from vrag_lib.minidocs_documents import MiniDocsConfig, build_document\n"
        "from vrag_lib.scale_tasks import PageSamples\n"
        "documents = (build_document(MiniDocsConfig(), 'train', i) for i in range(60))\n"
        "found = ((d, p) for d in documents for p in d.pages if len({f.subject for f in p.facts}) > 1)\n"
        "maker = PageSamples(*next(found), random.Random(1))\n"
        "for kind in ('whole', 'crop', 'several', 'close', 'language') * 4:\n"
        "    print(getattr(maker, kind)().turns)"
    )
    asked = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(asked) == 1 and asked.pop().count(b"kind='copy'") > 4


def test_words_are_found_where_they_stand():
    """Worked by hand: of three cells, word 5 stands in the upper half of the first and word 6 in the lower half of the
    second; the third shows nothing, and of the other halves nothing is known."""
    from vrag_lib.scale_cells import finding_loss

    codes = torch.zeros(9, 2)
    codes[5], codes[6] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    shown = torch.tensor([[5, -1], [-1, 6], [0, -1]])
    read = torch.zeros(3, 2, 2)
    read[0, 0, 0] = read[1, 0, 1] = math.log(5)  # 5 is told where it stands, 6 in the wrong half
    loss, (found, asked) = finding_loss(read, shown, codes, nothing=0)
    assert loss.item() == pytest.approx((math.log(2) + math.log(10)) / 2)
    assert (found.item(), asked) == (1, 2)
    loss, (found, asked) = finding_loss(read, torch.tensor([[0, -1]] * 3), codes, nothing=0)
    assert (loss.item(), found.item(), asked) == (0, 0, 0)


def test_a_coordinate_is_one_token(built):
    """Boxes in steps of four pixels are a token per coordinate, others digits; both are written as they were."""
    tokenizer = built[1].tokenizer
    assert tokenizer.tokenize("<bbox>[12, 36, 104, 672]</bbox>")[1:-1] == ["[12", ", 36", ", 104", ", 672", "]"]
    for text in ("[12, 36, 104, 672]", "[3, 14, 159, 1000]", "May 3, 2021", "Item 4, 12, 5"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_dense_losses_are_those_of_the_truth(built, monkeypatch):
    """Readings that tell the truth have next to no loss, and every box is found; one wrong row is seen."""
    from vrag_lib import scale_cells
    from vrag_lib.scale_cells import COORDINATES, HALVES, cell_batch, cell_loss

    batch = cell_batch(random.Random(2), built[1].tokenizer, MiniDocsConfig(), 6)
    cells, vocabulary = len(batch.words), len(built[1].tokenizer)
    monkeypatch.setattr(scale_cells, "WORD_CODE", vocabulary)

    codes = torch.nn.Linear(vocabulary, vocabulary, bias=False)
    torch.nn.init.eye_(codes.weight)

    def told(target, classes):
        return 40.0 * torch.nn.functional.one_hot(target.clamp(min=0), classes).float().flatten(1)

    heads = {
        "characters": lambda x: told(batch.characters, len(CHARACTERS) + 1),
        "words": lambda x: told(torch.cat([batch.words, batch.neighbours], 1), vocabulary),
        "codes": codes,
        "position": lambda x: told(batch.position, len(scale_cells.POSITIONS))[batch.position >= 0],
        "boxes": lambda x: told(batch.boxes, COORDINATES),
        "coordinates": lambda x: x,
    }
    with torch.no_grad():
        loss, counts = cell_loss(built[0].model.visual, heads, batch)
        assert batch.words.shape == (cells, HALVES) and loss.item() < 1e-3
        assert all(hits == total > 0 for hits, total in counts.values())
        heads["boxes"] = lambda x: told(batch.boxes * 0, COORDINATES)
        loss, counts = cell_loss(built[0].model.visual, heads, batch)
    assert loss.item() > 1 and counts["boxes"][0] == 0


def _train_in_processes(folder: Path) -> None:
    from vrag_lib.scale_loop import Schedule, process_rank, train

    layer, seldom = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    for module in (layer, seldom):
        torch.nn.init.constant_(module.weight, 0.5)
        torch.nn.init.zeros_(module.bias)
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    data[:, 0] = torch.tensor([1.0, -1.0]).repeat(4)
    world = process_rank()[1]

    def batch_of_step(number: int):
        return data[number : number + 1] if world > 1 else data[2 * number : 2 * number + 2]

    def loss_of_batch(x):
        chosen = x[x[:, 0] > 0]  # none in the second process: what one leaves out another may need
        loss = layer(x).square().mean()
        return (loss + seldom(chosen).square().sum() / len(x) if len(chosen) else loss), {}

    schedule = Schedule(steps=4, muon=1e-2, adamw=1e-2, warmup=1, log_every=1, save_every=4)
    modules = {"visual": layer, "visual seldom": seldom}
    train("run", modules, batch_of_step, loss_of_batch, schedule, folder, folder / "c.csv")


def test_two_processes_train_as_one_with_steps_twice_as_wide(tmp_path):
    from safetensors.torch import load_file

    from vrag_lib.scale_loop import in_processes

    in_processes(1, _train_in_processes, tmp_path / "one")
    in_processes(2, _train_in_processes, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "run" / "checkpoint.safetensors") for name in ("one", "two"))
    for name in ("weights/visual/weight", "weights/visual/bias", "weights/visual seldom/weight"):
        assert torch.allclose(one[name], two[name], atol=1e-6) and not set(one[name].flatten().tolist()) & {0.0, 0.5}
    assert len((tmp_path / "two" / "c.csv").read_text().splitlines()) == 5


_WAITING = """
import os, sys, time
from pathlib import Path
from vrag_lib.scale_loop import in_processes

def wait(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    in_processes(2, wait, sys.argv[1])
"""


def test_a_killed_training_leaves_no_process(tmp_path):
    """Even one started in the background of a shell, where interrupts are ignored."""
    script, alive = tmp_path / "waiting.py", tmp_path / "alive"
    script.write_text(_WAITING)
    alive.mkdir()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen([sys.executable, str(script), str(alive)], stderr=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while len(list(alive.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = [int(path.name) for path in alive.iterdir()]
    process.kill()
    process.wait()
    assert len(children) == 2
    for child in children:
        with pytest.raises(ProcessLookupError):  # init may take seconds to reap it
            for _ in range(100):
                os.kill(child, 0)
                time.sleep(0.2)


def test_muon_moves_a_kernel_of_two_frames_as_it_moves_their_sum():
    from vrag_lib.scale_optim import Muon

    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(5, 3, 2, 2, 2))
    whole = torch.nn.Parameter(kernel.detach().sum(2).flatten(1))
    optimizer = Muon([kernel, whole], lr=0.1, weight_decay=0)
    for _ in range(3):
        gradient = torch.randn(5, 3, 2, 2)
        kernel.grad, whole.grad = gradient[:, :, None].repeat(1, 1, 2, 1, 1), gradient.flatten(1)
        optimizer.step()
    assert torch.allclose(kernel.detach().sum(2).flatten(1), whole, atol=1e-5)


def test_muon_s_update_is_orthogonal():
    from vrag_lib.scale_optim import orthogonalised

    values = torch.linalg.svdvals(orthogonalised(torch.randn(2, 24, 8)))
    assert values.min() > 0.5 and values.max() < 1.4


def test_pages_quoted_as_text_are_asked_for_values_that_stand_in_them(built):
    from vrag_lib.scale_reading import COPY_TO_NEXT, make_batch

    drawn = draw_samples(random.Random(6), "train", 8, MiniDocsConfig(), {"quoted": 1})
    assert len(drawn) == 8 and not any(sample.images for sample in drawn)
    for sample in drawn:
        (turn,) = sample.turns
        page, question = turn.question.rsplit("\n", 1)
        assert page.startswith("A page:\n> ") and turn.answer in page and turn.answer not in question
        assert turn.kind.startswith("quoted ") and turn.echoes == ((turn.answer, turn.answer),)
    # A head is shown the value in the page: a batch needs one image, of whatever sample.
    image = draw_samples(random.Random(6), "train", 1, MiniDocsConfig(), {"crop": 1})
    gaze = make_batch(built[1].tokenizer, [*drawn, *image]).gaze[COPY_TO_NEXT]
    assert set(range(8)) <= set(gaze.row.tolist())


def test_all_values_of_a_legible_page_of_text_are_asked_for_and_pages_are_drawn_by_kind():
    def of_pages(config):
        drawn = draw_samples(random.Random(2), "train", 12, config, {"whole": 1}, (0, 1, 0))
        return sum(turn.kind == "page text" for sample in drawn for turn in sample.turns)

    large = MiniDocsConfig(text_px=60)
    facts = sum(len(draw_page(random.Random(i), "train", large, (0, 1, 0))[1].facts) for i in range(12))
    assert of_pages(large) >= 24 > 12 >= of_pages(MiniDocsConfig()) and facts >= 24
    kinds = [draw_page(random.Random(i), "train", large, (0, 0, 1))[1].kind for i in range(12)]
    assert set(kinds) == {"board", "flow"}
    before = random.Random(5)
    document = build_document(large, "train", before.randrange(1_000_000))
    assert draw_page(random.Random(5), "train", large)[1].number == before.randint(1, len(document.plan))


@pytest.mark.parametrize(("pages", "count"), [(1, 3), (3, 3), (1, 1), (2, 2)])
def test_every_part_of_a_step_holds_an_image(pages, count):
    from vrag_lib.scale_training import FINISHING_MIX, parts_of

    for step in range(20):
        drawn = draw_samples(random.Random(step), "train", pages, MiniDocsConfig(), FINISHING_MIX | {"quoted": 1})
        parts = parts_of(drawn, count)
        assert sorted(id(sample) for part in parts for sample in part) == sorted(map(id, drawn))
        assert len(parts) == count and all(any(sample.images for sample in part) for part in parts)


def test_the_saved_policy_loads_through_the_auto_classes(built, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vrag_lib.scale_training import save_policy

    save_policy(*built, tmp_path)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration" and not info["missing_keys"]
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) <= 16 * 2**20
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.encode("a <bbox> 1") == built[1].tokenizer.encode("a <bbox> 1")


def test_the_whole_recipe_in_miniature(tmp_path, monkeypatch):
    from vrag_lib import scale_training
    from vrag_lib.scale_loop import Schedule
    from vrag_lib.scale_make import make_policy

    monkeypatch.setattr(scale_training, "HELD_OUT_BATCHES", 1)
    steps = Schedule(steps=2, muon=1e-3, adamw=1e-3, warmup=1)
    recipe = scale_training.PolicyTraining(
        0, *[steps] * 7, MiniDocsConfig(text_px=60), cells_per_step=48, pages_per_step=1, cell_pages_per_step=1
    )
    out, results = tmp_path / "policy", tmp_path / "results"
    rows = make_policy(out, results, tmp_path / "work", recipe, test_documents=1)
    assert {row["task"] for row in rows} == {"crop", "page", "region", "title"}
    assert all(0 <= row["low"] <= row["right"] <= row["high"] <= 1 for row in rows)
    assert (results / "curve_copying.csv").read_text().splitlines()[-1].startswith("2,")
    assert {p.stem for p in results.glob("*.png")} == {f"curve_{stage}" for stage in scale_training.LEGIBLE_STAGES}
    card = (out / "README.md").read_text()
    assert "value from the crop of its region" in card and "dense 2 steps" in card
    weights = (out / "model.safetensors").read_bytes()
    make_policy(out, results, tmp_path / "work", recipe, test_documents=1)  # all stages are done: nothing is trained
    assert (out / "model.safetensors").read_bytes() == weights
