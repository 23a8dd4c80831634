"""MiniDocs: exact truth, no overlaps, disjoint splits, the same pages everywhere, and no way round the pages."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace

import pypdfium2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrag_lib.corpus_formats import check_gold, load_dataset, load_questions
from vrag_lib.geometry import PATCH, View, view_of_raw_box
from vrag_lib.minidocs import MiniDocs, MiniDocsConfig, majority_accuracy
from vrag_lib.minidocs_content import NOT_ANSWERABLE, SPLITS, entities
from vrag_lib.minidocs_documents import PAGE_TOKENS, absent_entities, document_entities
from vrag_lib.minidocs_pdf import write_pdf
from vrag_lib.minidocs_styles import families, palettes

DOCS = MiniDocs()
SMALL = MiniDocs(MiniDocsConfig(train_documents=3, validation_documents=2, test_documents=2))
EVERY_DOCUMENT = {"split": st.sampled_from(SPLITS), "index": st.integers(0, 5000), "seed": st.integers(0, 99)}


def some_document(split: str, index: int, seed: int):
    return MiniDocs(replace(DOCS.config, seed=seed)).document(split, index)


@settings(max_examples=25, deadline=None)
@given(**EVERY_DOCUMENT)
def test_nothing_cut_nothing_overlapping(split, index, seed):
    for page in some_document(split, index, seed).pages:
        boxes = [box for _, box in page.lines]
        for i, box in enumerate(boxes):
            assert box.x1 >= 0 and box.y1 >= 0 and box.x2 <= page.size.width and box.y2 <= page.size.height
            assert all(box.intersection(other).area == 0 for other in boxes[i + 1 :]), page.lines[i]


@settings(max_examples=25, deadline=None)
@given(**EVERY_DOCUMENT)
def test_facts_stand_where_they_say(split, index, seed):
    """Every fact's value is text inside its answer box, its answer box inside its region, its region on the page."""
    document = some_document(split, index, seed)
    kinds = {page.kind for page in document.pages}
    assert {"cover", "table", "bars", "text"} <= kinds and kinds & {"pie", "line"} and kinds & {"board", "flow"}
    for page in document.pages:
        assert page.facts
        for fact in page.facts:
            region, answer = fact.region_box, fact.answer_box
            assert region.intersection(answer) == answer
            assert 0 <= region.x1 < region.x2 <= page.size.width and 0 <= region.y1 < region.y2 <= page.size.height
            there = [text for text, box in page.lines if box.intersection(answer).area > 0]
            assert len(there) == 1 and re.search(rf"(?<![\w.]){re.escape(fact.value)}(?![\w])", there[0])
    cells = [(f.subject, f.item, f.column) for page in document.pages for f in page.facts]
    assert len(cells) == len(set(cells))


@settings(max_examples=10, deadline=None)
@given(**EVERY_DOCUMENT)
def test_figures_need_a_crop_and_labels_do_not(split, index, seed):
    """At the standard size labels are 10 pixels high or more, figures 6.3 or less; in the crop of their region 17."""
    config = DOCS.config
    pixels = PAGE_TOKENS * PATCH * PATCH
    for page in some_document(split, index, seed).pages:
        whole = View.of_page(page.size, pixels, pixels)
        assert whole.shown.tokens == PAGE_TOKENS
        scale = whole.shown.height / page.size.height
        assert config.label_px * scale >= 10 and config.value_px * scale <= 6.3
        for fact in page.facts:
            if fact.element in ("table", "chart") or fact.column == "entry":
                crop = view_of_raw_box(page.size, fact.region_box, pixels, pixels)
                shrink = min(crop.shown.height / crop.box.height, crop.shown.width / crop.box.width)
                assert config.value_px * shrink >= 17


def test_sentences_may_be_set_larger_than_labels_and_nothing_else_changes():
    large = MiniDocs(MiniDocsConfig(text_px=60))
    assert large.fingerprint != DOCS.fingerprint
    assert MiniDocs(MiniDocsConfig(text_px=None)).fingerprint == DOCS.fingerprint
    for index in range(4):
        for page, other in zip(large.document("test", index).pages, DOCS.document("test", index).pages, strict=True):
            if page.kind != "text":
                assert page.lines == other.lines and page.facts == other.facts
                continue
            sizes = {text.font.px for text in page.canvas.texts}
            assert 60 in sizes and 60 not in {text.font.px for text in other.canvas.texts}
            assert 1 <= len(page.facts) < len(other.facts)
            assert {(f.item, f.value) for f in page.facts} <= {(f.item, f.value) for f in other.facts}
    for wrong in (37, 66):
        with pytest.raises(ValueError, match="text_px must lie between label_px and short_side / 12"):
            MiniDocsConfig(text_px=wrong)


def test_same_document_in_any_order():
    backwards = [DOCS.document("test", index) for index in (5, 4, 3)]
    again = MiniDocs().document("test", 3)
    assert [page.canvas.items for page in again.pages] == [page.canvas.items for page in backwards[-1].pages]
    assert again.page(2).image().tobytes() == backwards[-1].pages[1].image().tobytes()
    assert DOCS.mini_questions(again) == DOCS.mini_questions(backwards[-1])
    other = MiniDocs(MiniDocsConfig(seed=1)).document("test", 3)
    assert [page.canvas.items for page in other.pages] != [page.canvas.items for page in again.pages]


def test_pages_are_pinned():
    """The collection that results speak of does not change unnoticed."""
    page = DOCS.document("test", 0).pages[1]
    assert (DOCS.fingerprint, page.title) == ("12e4b3f84bf8f5b3", "At a glance")
    question = DOCS.mini_questions(DOCS.document("test", 0))[0]
    assert question.query == "At Melport Lines, what is the figure of migration for Iceland?"


def test_splits_share_nothing():
    for kinds in (entities, families, palettes):
        found = [{getattr(thing, "name", thing) for thing in kinds(split)} for split in SPLITS]
        assert all(found) and sum(map(len, found)) == len(set().union(*found))
    emblems = [{entity.emblem for entity in entities(split)} for split in SPLITS]
    assert sum(map(len, emblems)) == len(set().union(*emblems))
    looks = {split: set() for split in SPLITS}
    names = {split: set() for split in SPLITS}
    for split in SPLITS:
        for index in range(40):
            document = DOCS.document(split, index)
            looks[split].add((document.style.family.name, document.style.palette.name))
            names[split] |= {document.entity.name, document.entity.emblem}
    assert not looks["train"] & looks["test"] and not looks["train"] & looks["validation"]
    assert not names["train"] & names["test"] and not names["validation"] & names["test"]


def test_held_out_families_recombine_what_training_shows():
    for habit in ("format", "header", "ruling", "body_face", "heading_face", "centred", "rounded", "donut"):
        seen = {getattr(family, habit) for family in families("train")}
        for split in ("validation", "test"):
            assert {getattr(family, habit) for family in families(split)} <= seen


def test_no_two_documents_of_a_corpus_share_an_entity():
    for split, count in DOCS.config.documents.items():
        assert count <= len(document_entities(split))
        used = {DOCS.document(split, index).entity.name for index in range(count)}
        assert len(used) == count and not used & {entity.name for entity in absent_entities(split)}


def test_every_question_is_answered_by_its_facts():
    templates = set()
    for index in range(30):
        document = DOCS.document("test", index)
        questions = DOCS.mini_questions(document)
        assert len({question.query for question in questions}) == len(questions) == 8
        for question in questions:
            templates.add(question.template)
            assert len(question.hop_queries) == max(1, len(question.facts))
            for number, fact in question.facts:
                assert fact in document.page(number).facts
            if question.template in ("sum", "difference"):
                larger, smaller = (int(fact.value) for _, fact in question.facts)
                assert int(question.answer) in (larger + smaller, larger - smaller) and int(question.answer) > 0
            elif question.answerable:
                assert question.answer == question.facts[-1][1].value
                assert question.answer not in question.query
            else:
                assert question.pages == () and question.answer == NOT_ANSWERABLE
    assert len(templates) >= 13


def test_unanswerable_questions_name_what_no_page_shows():
    seen = set()
    for index in range(40):
        document = DOCS.document("test", index)
        text = "\n".join(text for page in document.pages for text, _ in page.lines)
        for question in DOCS.mini_questions(document):
            if question.template == "absent item":
                item = question.hop_queries[0].split()[-1]
                assert item in question.query and item not in text
                seen.add("item")
            elif question.template == "absent entity":
                assert document.entity.name not in question.query
                assert any(entity.name in question.query for entity in absent_entities("test"))
                seen.add("entity")
    assert seen == {"item", "entity"}


def test_question_alone_does_not_answer():
    train = [q for index in range(100) for q in DOCS.unified(DOCS.document("train", index))]
    test = DOCS.questions("test")
    rates = majority_accuracy(train, test)
    assert rates["all"] <= 0.05
    # Templates of a handful of questions are left to the mean: one lucky hit would be several per cent.
    counts = [q.extra["template"] for q in test]
    assert all(rate <= 0.05 for template, rate in rates.items() if counts.count(template) >= 25)
    with pytest.raises(ValueError, match="none of the questions"):
        majority_accuracy(train, [q for q in train if not q.extra["answerable"]])


def test_everyday_words_stay_off_the_pages():
    for index in range(10):
        document = DOCS.document("train", index)
        text = " ".join(text for page in document.pages for text, _ in page.lines).lower()
        for table in (table for plan in document.plan for table in plan.tables):
            assert table.measure.everyday not in text
            assert table.measure.name.lower() not in table.measure.everyday


def test_pdf_keeps_text_and_boxes(tmp_path):
    """The text layer has the words, and each run lies where the canvas says, to a tenth of its height and two
    pixels."""
    for index in range(3):
        document = DOCS.document("train", index)
        path = write_pdf(tmp_path / "a.pdf", [page.canvas for page in document.pages])
        with pypdfium2.PdfDocument(path) as pdf:
            assert len(pdf) == len(document.pages)
            for page, drawn in zip(pdf, document.pages, strict=True):
                scale = 150 / 72
                assert round(page.get_width() * scale) == drawn.size.width
                layer = page.get_textpage()
                plain = layer.get_text_bounded()
                for text in drawn.canvas.texts:
                    string, box, slack = text.string, text.box, 0.1 * text.font.px + 2
                    assert string in plain
                    place = layer.search(string).get_next() if plain.count(string) == 1 else None
                    if place:
                        rectangles = [layer.get_charbox(place[0] + i) for i, c in enumerate(string) if c != " "]
                        left, right = min(r[0] for r in rectangles) * scale, max(r[2] for r in rectangles) * scale
                        assert abs(left - box.x1) <= slack and abs(right - box.x2) <= slack, string


def test_pdf_refuses_text_it_has_no_glyphs_for(tmp_path):
    page = DOCS.document("train", 0).page(1)
    page.canvas.text(10, 10, "naïve", page.canvas.texts[0].font, (0, 0, 0))
    with pytest.raises(ValueError, match="printable ASCII"):
        write_pdf(tmp_path / "a.pdf", [page.canvas])


@pytest.mark.parametrize("form", ["pdf", "images"])
def test_exported_collection_loads_as_a_benchmark(tmp_path, form):
    SMALL.write(tmp_path / "out", form, splits=("test",))
    corpus, questions = load_dataset("unified", tmp_path / "out" / "test", cache_dir=tmp_path, answerable_only=False)
    direct = SMALL.corpus("test", tmp_path / "cache")
    assert corpus.page_ids == direct.page_ids and not check_gold(corpus, questions)
    assert [page.size for page in corpus.pages] == [page.size for page in direct.pages]
    assert questions == SMALL.questions("test")
    with pytest.raises(ValueError, match="another configuration"):
        DOCS.write(tmp_path / "out", form)


def test_corpus_is_painted_once(tmp_path):
    corpus = SMALL.corpus("test", tmp_path)
    before = {page.image_path: page.image_path.stat().st_mtime_ns for page in corpus.pages}
    first = corpus.pages[0]
    first.image_path.unlink()
    again = SMALL.corpus("test", tmp_path)
    assert again.fingerprint == corpus.fingerprint and again.pages == corpus.pages
    drawn = SMALL.document("test", 0).pages[0]
    assert first.open_image().tobytes() == drawn.image().tobytes()
    assert [line.text for line in first.lines] == [text for text, _ in drawn.lines]
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items() if path != first.image_path)


def test_unified_items_carry_their_regions(tmp_path):
    SMALL.write(tmp_path, splits=("validation",))
    for question in load_questions(tmp_path / "validation"):
        regions = question.extra["regions"]
        assert sorted({region["page"] for region in regions}) == list(question.reference_pages)
        assert question.extra["answerable"] == bool(regions)
        for region in regions:
            assert region["region_box"][0] <= region["answer_box"][0] < region["answer_box"][2]


def test_as_datasets():
    loaded = SMALL.to_datasets("validation")
    assert loaded["pages"].num_rows == sum(len(document.plan) for document in SMALL.documents("validation"))
    row = loaded["questions"][0]
    assert len(row["images"]) == len(row["gold_page_ids"]) and json.loads(row["regions"])
    assert row["images"][0].size in ((1176, 784), (784, 1176))


def test_fast_enough_to_draw_while_training():
    """At least 25 pages a second even on a busy core; idle it is more than 100."""
    start, pages = time.process_time(), 0
    for index in range(200, 212):
        for page in DOCS.document("train", index).pages:
            page.image()
            pages += 1
    assert pages / (time.process_time() - start) > 25


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"min_pages": 3}, "at least 5 pages"),
        ({"max_pages": 11}, "at most 10"),
        ({"value_px": 60}, "font sizes"),
        ({"long_side": 700}, "short_side <= long_side"),
        ({"test_documents": 100_000}, "names for 219 documents"),
    ],
)
def test_impossible_settings_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        MiniDocsConfig(**settings_)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'"):
        DOCS.document("dev", 0)
    with pytest.raises(ValueError, match="no split 'dev'"):
        DOCS.questions("dev")
    with pytest.raises(ValueError, match="start at 0"):
        DOCS.document("test", -1)
    with pytest.raises(IndexError, match="pages 1 to"):
        DOCS.document("test", 0).page(99)
    with pytest.raises(ValueError, match="not as 'docx'"):
        DOCS.write(tmp_path, "docx")
