"""The scale retriever: vocabulary, labels, equality with the class's own forward, training, files that others load."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from vrag_lib.minidocs import MiniDocs, MiniDocsConfig
from vrag_lib.minidocs_content import MEASURES, entities
from vrag_lib.minidocs_documents import build_document
from vrag_lib.scale_retriever import (
    WORD_START,
    build_processor,
    build_retriever,
    embed_pages,
    embed_queries,
    encode_cells,
    load_retriever,
    page_prompt,
    page_words,
    query_ids,
    save_retriever,
    syllables,
)
from vrag_lib.scale_retriever_pages import PagePool, Vocabulary, document_page, page_query, random_phrase, word_page


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def vocabulary(processor):
    return Vocabulary(processor.tokenizer)


def test_unseen_names_fall_into_known_syllables(processor):
    starts, ends = syllables()
    names = [entity.name for entity in entities("test") if entity.name not in page_words()]
    assert len(names) > 200
    for name in names:
        first, second = processor.tokenizer.tokenize(name)
        assert first.removeprefix(WORD_START) in starts and second in ends


def test_any_text_is_tokenised(processor):
    tokens = processor.tokenizer.tokenize("Zürich-7 ☃ Finland?")
    assert f"{WORD_START}finland" in tokens and len(tokens) > 6


def test_random_text_never_shows_a_held_out_name():
    held_out = {entity.name.lower() for split in ("validation", "test") for entity in entities(split)}
    rng = random.Random(0)
    words = {word.lower() for _ in range(20000) for word in random_phrase(rng).split()}
    assert not words & held_out - {word.lower() for word in page_words()}


def test_queries_never_use_everyday_wordings():
    rng = random.Random(1)
    document = build_document(MiniDocsConfig(), "train", 3)
    queries = [page_query(rng, document, page) for page in document.pages for _ in range(40)]
    assert not any(measure.everyday in query for query in queries for measure in MEASURES)


def test_labels_say_where_the_title_stands(vocabulary):
    document = build_document(MiniDocsConfig(), "train", 0)
    page = next(page for page in document.pages if page.kind == "table")
    labelled = document_page(page, vocabulary)
    title = vocabulary.spans(page.title)
    assert {word for word, _, _ in title} <= set(labelled.words.tolist())
    row = labelled.near[list(labelled.words).index(title[0][0])].argmax() // labelled.grid[1]
    box = next(box for text, box in page.lines if text == page.title)
    assert row == int((box.y1 + box.y2) / 2 / page.size.height * labelled.grid[0])
    assert labelled.patches.shape == (4 * labelled.grid[0] * labelled.grid[1], 588)


def test_a_window_keeps_the_cells_and_words_in_it(vocabulary):
    page = word_page(random.Random(2), (8, 12), vocabulary)
    window = page.window(2, 3, (4, 6))
    whole = page.patches.reshape(8, 12, 4, 588)
    assert np.array_equal(window.patches.reshape(4, 6, 4, 588), whole[2:6, 3:9])
    assert 0 < len(window.words) < len(page.words) and (window.near.sum(1) > 0.7).all()


def test_batches_hold_pages_of_the_same_title_and_document(vocabulary):
    pool = PagePool(MiniDocsConfig(), vocabulary, documents=40)
    for seed in range(20):
        places = pool.batch(random.Random(seed), groups=3)
        assert len(set(places)) == len(places) == 9
        for anchor, twin, sibling in zip(*[iter(places)] * 3, strict=True):
            assert set(pool.titles[anchor]) & set(pool.titles[twin]) and anchor[0] != twin[0]
            assert anchor[0] == sibling[0]


def test_fast_forward_equals_the_class(processor):
    import torch

    model = build_retriever(processor.tokenizer, seed=1).eval()
    image = build_document(MiniDocsConfig(), "train", 1).page(2).image()
    batch = processor.process_images([image])
    _, high, wide = batch["image_grid_thw"][0].tolist()
    patches = batch["pixel_values"].view(1, -1, 3, 2, 196)[:, :, :, 0].reshape(1, -1, 588)
    queries = ["Norvale Port Exports by goods", "known as the Silver Heron at last"]
    with torch.no_grad():
        expected = model(**batch)
        features = encode_cells(model.visual, patches, high // 2, wide // 2)
        found = embed_pages(model, page_prompt(processor), features, high // 2, wide // 2)
        assert torch.allclose(found, expected, atol=1e-5)
        inputs = processor.process_queries(queries)
        found, mask = embed_queries(model, query_ids(processor, queries), processor.tokenizer.pad_token_id)
        assert torch.equal(mask, inputs["attention_mask"])
        assert torch.allclose(found * mask[..., None], model(**inputs), atol=1e-5)


def test_the_shown_page_is_what_the_processor_makes(processor, vocabulary):
    page = build_document(MiniDocsConfig(), "train", 1).page(2)
    labelled = document_page(page, vocabulary)
    values = processor.process_images([page.image()])["pixel_values"].view(-1, 3, 2, 196)[:, :, 0].reshape(-1, 588)
    difference = np.abs((values.numpy() + 1) * 127.5 - labelled.patches)  # of two libraries' bicubic resampling
    assert difference.max() < 3 and difference.mean() < 0.01


def test_a_path_without_the_class_name_is_refused(processor, tmp_path):
    with pytest.raises(ValueError, match="colqwen2"):
        save_retriever(None, processor, tmp_path / "retriever")


class _Killed(Exception):
    pass


def _train(folder: Path, stop_at: int | None):
    from vrag_lib.scale_loop import Schedule, train
    from vrag_lib.scale_retriever_training import Trainer

    trainer = Trainer(seed=3)
    pool = PagePool(MiniDocsConfig(), trainer.vocabulary, documents=3)

    def step(number: int):
        if number == stop_at:
            raise _Killed
        return trainer.reading_step(pool, number)

    schedule = Schedule(3, muon=1e-3, adamw=1e-3, warmup=1, save_every=1, log_every=1)
    train("reading", trainer.modules, int, step, schedule, folder, folder / "reading.csv")
    return trainer, pool


def test_a_killed_training_goes_on_bit_equal_and_the_model_is_loaded_by_all(tmp_path):
    import torch

    straight, pool = _train(tmp_path / "straight", None)
    with pytest.raises(_Killed):
        _train(tmp_path / "killed", 2)
    resumed, _ = _train(tmp_path / "killed", None)
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    features = straight.page_features(pool)
    losses = []
    optimizer = torch.optim.AdamW(straight.model.language_model.parameters(), lr=1e-3)
    for _ in range(3):
        loss, counts = straight.finding_step(pool, features, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and counts["query_finds_page"][1] > 0

    folder = save_retriever(straight.model, straight.processor, tmp_path / "colqwen2")
    model, loaded = load_retriever(folder)
    assert torch.equal(model.custom_text_proj.weight, straight.model.custom_text_proj.weight)
    assert loaded.tokenizer.tokenize("Norvale Port") == straight.processor.tokenizer.tokenize("Norvale Port")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 16e6

    from vrag_lib.visual_retrieval import VisualRetriever

    corpus = MiniDocs(MiniDocsConfig(test_documents=1)).corpus("test", tmp_path / "cache")
    found = []
    for engine in ("byaldi", "native"):
        retriever = VisualRetriever.build(corpus, folder, engine=engine, device="cpu", cache_dir=tmp_path / engine)
        found.append(retriever.search(["Exports by goods"], len(corpus.pages))[0])
    scores = [{hit.page_id: hit.score for hit in hits} for hits in found]
    assert set(scores[0]) == set(corpus.page_ids)
    # A retriever that has hardly learnt scores pages alike; the order of equals is a matter of bfloat16's rounding.
    assert scores[0] == pytest.approx(scores[1], rel=0.01)
