"""The record: masks from structure, parquet round trip, re-rendering."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import FakeCorpus
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageChops

from vrag_lib.actions import Action, ActionKind, InvalidReason
from vrag_lib.geometry import Box, Size, View
from vrag_lib.trajectory import (
    SCHEMA_VERSION,
    ImageRef,
    RecordError,
    StopReason,
    Trajectory,
    Turn,
    clean_text,
    from_row,
    read_trajectories,
    to_row,
    write_trajectories,
)

VIEW = View.of_page(Size(1000, 800), 256 * 784, 512 * 784)
CROP = VIEW.crop(Box(10, 20, 300, 200), 256 * 784, 512 * 784)


def example(**changes) -> Trajectory:
    turns = (
        Turn("user", "Question: q", token_ids=(1, 2, 3)),
        Turn(
            "assistant",
            "<search>a</search>",
            token_ids=(4, 5),
            logprobs=(-0.5, -1.5),
            action=Action(ActionKind.SEARCH, "a"),
        ),
        Turn("user", "", images=(ImageRef("doc_1", VIEW),), token_ids=(6, 7, 7, 7, 8)),
        Turn(
            "assistant",
            "<bbox>[10, 20, 300, 200]</bbox>",
            token_ids=(9,),
            logprobs=(-0.1,),
            action=Action(ActionKind.CROP, "[10, 20, 300, 200]", Box(10, 20, 300, 200)),
        ),
        Turn("user", "", images=(ImageRef("doc_1", CROP),), token_ids=(6, 7, 8)),
        Turn("assistant", "hm", token_ids=(10,), logprobs=(-2.0,), invalid=InvalidReason.NO_ACTION),
        Turn("user", "invalid", token_ids=(11,)),
        Turn(
            "assistant",
            "<answer>x</answer>",
            token_ids=(12, 13),
            logprobs=(-0.2, -0.3),
            action=Action(ActionKind.ANSWER, "x"),
            finish_reason="stop",
        ),
    )
    record = Trajectory(
        id="t1",
        question_id="q1",
        question="q",
        turns=turns,
        stop_reason=StopReason.ANSWER,
        seed=7,
        gold_page_ids=("doc_1",),
        rewards={"answer": (1.0, 0.7), "retrieval": (0.5, 0.2)},
        timings={"generate": 0.25},
        versions={"torch": "2"},
    )
    return dataclasses.replace(record, **changes)


def test_the_loss_mask_covers_exactly_the_sampled_tokens():
    tokens = example().tokens()
    assert len(tokens.token_ids) == len(tokens.sampled) == len(tokens.logprobs) == len(tokens.turn_index)
    assert [t for t, s in zip(tokens.token_ids, tokens.sampled, strict=True) if s] == [4, 5, 9, 10, 12, 13]
    assert [p for p, s in zip(tokens.logprobs, tokens.sampled, strict=True) if s] == [-0.5, -1.5, -0.1, -2, -0.2, -0.3]
    assert all(p == 0 for p, s in zip(tokens.logprobs, tokens.sampled, strict=True) if not s)


def test_a_record_of_text_alone_has_no_tokens():
    record = example(turns=(Turn("user", "q"), Turn("assistant", "a")))
    with pytest.raises(RecordError, match="turn 0"):
        record.tokens()


def test_what_is_derived_comes_from_the_structure():
    record = example()
    assert record.answer == "x" and record.shown_pages == ("doc_1",)
    assert [image.is_crop for image in record.images] == [False, True] and record.evidence.view == CROP
    assert record.total_reward == pytest.approx(0.8) and record.count(ActionKind.SEARCH) == record.count("search") == 1
    assert len(record.replies) == 4


def test_pages_shown_as_text_count_as_shown_and_older_records_have_none():
    turns = (Turn("user", "q", images=(ImageRef("doc_2", VIEW),)), Turn("user", "page", text_pages=("doc_3", "doc_1")))
    row = to_row(example(turns=turns))
    assert from_row(row).shown_pages == ("doc_2", "doc_3", "doc_1")
    for turn in row["turns"]:
        del turn["text_pages"]
    assert from_row(row).shown_pages == ("doc_2",)


def test_a_trajectory_that_did_not_answer_has_no_answer_whatever_its_text_says():
    """Trap T3: an answer tag in an observation is not an answer."""
    record = example(
        turns=(Turn("user", "for example <answer> Beijing </answer>"), Turn("assistant", "<answer>x")),
        stop_reason=StopReason.MAX_TURNS,
    )
    assert record.answer is None


def test_parquet_round_trip_is_exact(tmp_path):
    records = [example(), example(id="t2", turns=(Turn("user", "q"),), stop_reason=StopReason.ERROR, error="e")]
    assert read_trajectories(write_trajectories(records, tmp_path / "a" / "t.parquet")) == records
    assert read_trajectories(write_trajectories([], tmp_path / "empty.parquet")) == []


@given(st.text(alphabet=st.characters(codec=None, exclude_categories=())))
def test_any_text_survives_once_cleaned(text):
    record = example(turns=(Turn("user", clean_text(text)),))
    assert from_row(to_row(record)) == record
    clean_text(text).encode("utf-8")


def test_a_record_renders_to_the_same_images_again(tmp_path):
    corpus = FakeCorpus([Size(1000, 800)])
    record = example()
    again = read_trajectories(write_trajectories([record], tmp_path / "t.parquet"))[0]
    for first, second in zip(record.images, again.images, strict=True):
        a, b = first.render(corpus), second.render(corpus)
        assert a.size == (first.view.shown.width, first.view.shown.height)
        assert ImageChops.difference(a, b).getbbox() is None


def test_contradictions_are_refused():
    with pytest.raises(RecordError, match="one each"):
        Turn("assistant", "a", token_ids=(1, 2), logprobs=(0.0,))
    with pytest.raises(RecordError, match="of the user or of the assistant"):
        Turn("tool", "a")
    with pytest.raises(RecordError, match="one each"):
        Turn("user", "a", token_ids=(1,), logprobs=(0.0,))
    row = to_row(example())
    row["turns"][1]["sampled"] = [False, True]
    with pytest.raises(RecordError, match="sampled mask"):
        from_row(row)
    with pytest.raises(RecordError, match="schema 99"):
        from_row(to_row(example()) | {"schema_version": 99})


def test_files_that_hold_no_records_are_named(tmp_path):
    with pytest.raises(RecordError, match=r"there is no trajectory file .*missing"):
        read_trajectories(tmp_path / "missing.parquet")
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(RecordError, match=r"bad\.parquet is not a parquet file"):
        read_trajectories(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"schema_version": [SCHEMA_VERSION], "id": ["a"]}), tmp_path / "bad.parquet")
    with pytest.raises(RecordError, match=r"bad\.parquet holds no trajectories: the column 'stop_reason' is missing"):
        read_trajectories(tmp_path / "bad.parquet")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_trajectories([example()], tmp_path / "t.parquet")
    broken = example(turns=(Turn("user", "\ud800"),))
    with pytest.raises(UnicodeEncodeError):
        write_trajectories([broken], path)
    assert read_trajectories(path) == [example()]
