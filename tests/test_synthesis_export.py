"""Exports hold the images that were shown and one placeholder for each; the card counts; splits share no document."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections import Counter

import pytest
from helpers import FakeCorpus, FakeRetriever
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from vrag_lib.actions import LAST_TURN
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Question, document_stem
from vrag_lib.geometry import Size
from vrag_lib.policy import ScriptedPolicy
from vrag_lib.rollout import rollout
from vrag_lib.synthesis_export import (
    ExportError,
    split_questions,
    write_card,
    write_dataset,
    write_llama_factory,
)
from vrag_lib.synthesis_filters import filter_trajectories
from vrag_lib.trajectory import Trajectory, Turn, read_trajectories, write_trajectories


class KnownCorpus(FakeCorpus):
    fingerprint = text_fingerprint = "two pages"

    def __init__(self, sizes):
        super().__init__(sizes)
        self.drawn = 0

    def page(self, page_id):
        self.drawn += 1
        return super().page(page_id)


SIZES = [Size(560, 392), Size(392, 560)]
CORPUS = KnownCorpus(SIZES)
ENVIRONMENT = EnvironmentConfig(max_turns=4, min_pixels=24 * 784, max_pixels=24 * 784)
SCRIPT = [
    "<think>find it</think>\n<search>1</search>",
    "<think>closer</think>\n<bbox>[28, 28, 84, 84]</bbox>",
    "<think>and the other</think>\n<search>2</search>",
    "<think>read</think>\n<answer>12</answer>",
]


def play(query: str = "how many?", script=SCRIPT, uid: str = "q0", seed: int = 0) -> Trajectory:
    question = Question(uid, query, "12", "doc.pdf", (1,))
    retriever = FakeRetriever(CORPUS.page_ids)
    return rollout(ScriptedPolicy(script), [question], CORPUS, retriever, ENVIRONMENT, seeds=[seed])[0]


GOOD = [play(seed=0), play("how much?", SCRIPT[:1] + SCRIPT[3:], "q1")]
PHANTOM = play("what does <image> mean?", uid="q2")
SPECIAL = play("what does <|im_end|> mean?", uid="q3")
SILENT = dataclasses.replace(GOOD[0], id="silent", turns=GOOD[0].turns[:1])
LOST = dataclasses.replace(
    GOOD[0],
    id="lost",
    turns=tuple(
        dataclasses.replace(t, images=tuple(dataclasses.replace(i, page_id="doc_9") for i in t.images))
        for t in GOOD[0].turns
    ),
)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.mode == b.mode == "RGB" and ImageChops.difference(a, b).getbbox() is None


class UnknownPages(KnownCorpus):
    """Says of a page it does not hold what `Corpus` says, in kind."""

    def page(self, page_id):
        if page_id not in self.page_ids:
            raise ValueError(f"no page {page_id!r}")
        return super().page(page_id)


# --- Hugging Face


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from datasets import load_from_disk

    folder = tmp_path_factory.mktemp("hf") / "sft"
    exported = write_dataset([GOOD[0], SPECIAL, SILENT, GOOD[1], LOST, PHANTOM], UnknownPages(SIZES), folder)
    return exported, load_from_disk(str(folder))


def test_a_dataset_holds_messages_with_one_image_part_per_image(dataset):
    exported, rows = dataset
    assert (exported.rows, exported.left_out) == (3, {"markup": 1, "no_reply": 1, "image": 1})
    assert rows["id"] == [GOOD[0].id, GOOD[1].id, PHANTOM.id] and rows["question_id"] == ["q0", "q1", "q2"]
    row = rows[0]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 4
    parts = [part["type"] for message in row["messages"] for part in message["content"]]
    assert Counter(parts) == {"image": 3, "text": 6} and len(row["images"]) == 3
    assert row["messages"][2]["content"] == [{"type": "image", "text": None}]
    last = row["messages"][6]["content"]
    assert [part["type"] for part in last] == ["image", "text"] and last[1]["text"] == LAST_TURN
    replies = [m["content"][0]["text"] for m in row["messages"] if m["role"] == "assistant"]
    assert replies == [turn.text for turn in GOOD[0].replies] == SCRIPT


def test_a_dataset_holds_the_images_as_they_were_shown(dataset):
    _, rows = dataset
    for row, trajectory in zip(rows, (*GOOD, PHANTOM), strict=True):
        for image, shown in zip(row["images"], trajectory.images, strict=True):
            assert same(image, shown.render(CORPUS)) and all(side % 28 == 0 for side in image.size)


def test_a_literal_placeholder_is_text_where_images_are_parts(dataset):
    row = dataset[1][2]
    assert "<image>" in row["messages"][0]["content"][0]["text"] and len(row["images"]) == 3


def test_an_earlier_dataset_is_replaced_and_nothing_else(tmp_path):
    from datasets import load_from_disk

    write_dataset(GOOD, CORPUS, tmp_path / "sft")
    write_dataset(GOOD[1:], CORPUS, tmp_path / "sft")
    assert load_from_disk(str(tmp_path / "sft"))["id"] == [GOOD[1].id]
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]
    with pytest.raises(ExportError, match=r"none of 1 trajectories .*no_reply"):
        write_dataset([SILENT], CORPUS, tmp_path / "sft")
    assert load_from_disk(str(tmp_path / "sft"))["id"] == [GOOD[1].id], "a failed export leaves the old one"
    with pytest.raises(ExportError, match="something that is no dataset"):
        write_dataset(GOOD, CORPUS, tmp_path)


# --- LLaMA-Factory


def test_llama_factory_gets_a_placeholder_per_image_and_the_files_it_names(tmp_path):
    exported = write_llama_factory(GOOD, CORPUS, tmp_path, "cold_start")
    assert (exported.rows, exported.left_out) == (2, {})
    samples = json.loads((tmp_path / "cold_start.json").read_text())
    for sample, trajectory in zip(samples, GOOD, strict=True):
        assert [message["role"] for message in sample["messages"]] == ["user", "assistant"] * len(trajectory.replies)
        placed = sum(message["content"].count("<image>") for message in sample["messages"])
        assert placed == len(sample["images"]) == len(trajectory.images)
        for relative, shown in zip(sample["images"], trajectory.images, strict=True):
            with Image.open(tmp_path / relative) as image:
                assert same(image, shown.render(CORPUS))
    contents = [message["content"] for message in samples[0]["messages"]]
    assert contents[2] == "<image>" and contents[6] == f"<image>{LAST_TURN}" and contents[1::2] == SCRIPT
    info = json.loads((tmp_path / "dataset_info.json").read_text())["cold_start"]
    assert (tmp_path / info["file_name"]).is_file() and info["formatting"] == "sharegpt"
    assert info["columns"] == {"messages": "messages", "images": "images"} and set(samples[0]) == {"messages", "images"}
    assert info["tags"]["assistant_tag"] == "assistant"


def test_images_are_drawn_once_and_shared(tmp_path):
    corpus = KnownCorpus(SIZES)
    write_llama_factory(GOOD, corpus, tmp_path)
    assert corpus.drawn == len(list((tmp_path / "images").iterdir())) == 3, "both samples show the first page"
    write_llama_factory([*GOOD, play(seed=9)], corpus, tmp_path)
    assert corpus.drawn == 3


@pytest.mark.parametrize("text", ["<image>", "<video>", "<audio>", "<|image_pad|>", "<|im_end|>"])
def test_markup_in_a_text_leaves_the_trajectory_out(tmp_path, text):
    inside = [GOOD[0].turns[0], Turn("assistant", f"<think>{text}</think>\n<answer>1</answer>")]
    bad = [play(f"what is {text}?"), dataclasses.replace(GOOD[0], turns=tuple(inside))]
    exported = write_llama_factory([*bad, GOOD[1]], CORPUS, tmp_path)
    assert (exported.rows, exported.left_out) == (1, {"markup": 2})
    with pytest.raises(ExportError, match=r"none of 2 trajectories .*markup"):
        write_llama_factory(bad, CORPUS, tmp_path)


def test_other_datasets_of_the_folder_stay_listed(tmp_path):
    write_llama_factory(GOOD[:1], CORPUS, tmp_path, "one")
    write_llama_factory(GOOD[1:], CORPUS, tmp_path, "two")
    assert set(json.loads((tmp_path / "dataset_info.json").read_text())) == {"one", "two"}
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(ExportError, match=r"dataset_info\.json is not the description"):
        write_llama_factory(GOOD, CORPUS, tmp_path)
    exported = write_llama_factory([LOST, GOOD[0]], UnknownPages(SIZES), tmp_path / "other")
    assert exported.left_out == {"image": 1}


def test_what_follows_the_last_reply_is_not_exported(tmp_path):
    cut = dataclasses.replace(GOOD[0], turns=GOOD[0].turns[:3])
    write_llama_factory([cut], CORPUS, tmp_path)
    sample = json.loads((tmp_path / "vrag_sft.json").read_text())[0]
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant"] and sample["images"] == []


# --- the card


def test_the_card_counts_and_names_who_wrote_it(tmp_path):
    kinds = {"template": "table value", "wording": "aside", "answerable": True}
    asked = [Question(f"q{i}", f"how {i}?", "12", "doc.pdf", (1,), "Table", "Single-Hop", kinds) for i in range(3)]
    named = [dataclasses.replace(t, policy="scripted|planner", run_id="both", preset="laptop") for t in GOOD]
    result = filter_trajectories([*named, dataclasses.replace(PHANTOM, reference_answer="13")])
    exported = write_llama_factory([*named, PHANTOM], CORPUS, tmp_path / "lf")
    path = write_card(
        tmp_path, result.kept, result.funnel, questions=asked, seed=7, exported=[exported], about="Scripted experts."
    )
    text = path.read_text()
    assert "2 trajectories on 2 questions" in text and "Scripted experts." in text
    assert r"| scripted\|planner | both | laptop | 2 |" in text
    assert "| wrong_answer | 2 | 1 | 66.7 % |" in text and "| sampled | 3 | 0 | 100.0 % |" in text
    assert "| search | 3 | 50.0 % |" in text and "| bbox | 1 | 16.7 % |" in text and "| invalid | 0 | 0.0 % |" in text
    assert "| 2 | 1 |\n| 4 | 1 |" in text, "replies"
    assert "| table value | 3 | 2 | 2 |" in text and "| aside | 3 | 2 | 2 |" in text and "| yes | 3 | 2 | 2 |" in text
    assert "| `vrag_sft.json` | 2 | markup: 1 |" in text
    facts = json.loads(re.search(r"```json\n(.*?)\n```", text, re.S)[1])
    assert facts["seed"] == 7 and facts["commit"] and facts["versions"]["python"]


def test_a_card_of_nothing_can_be_written(tmp_path):
    text = write_card(tmp_path, [], filter_trajectories([]).funnel).read_text()
    assert "0 trajectories on 0 questions" in text and "Their kinds are not known." in text


def test_the_record_survives_its_parquet_file(tmp_path):
    assert read_trajectories(write_trajectories(GOOD, tmp_path / "trajectories.parquet")) == GOOD


# --- the split


def questions(documents: int, each: int) -> list[Question]:
    return [Question(f"{d}-{n}", "?", "!", f"{d}.pdf", (1,)) for d in range(documents) for n in range(each)]


@given(st.integers(2, 12), st.integers(1, 9), st.data())
def test_the_parts_share_no_document_and_lose_little(documents, each, data):
    asked = questions(documents, each)
    n_rl = data.draw(st.integers(0, (documents - 1) * each))
    sft, rl = split_questions(asked, n_rl, data.draw(st.integers(0, 5)))
    assert len(rl) == n_rl and len(asked) - len(sft) - len(rl) < each
    assert not {q.file_name for q in sft} & {q.file_name for q in rl}
    for part in (sft, rl):
        assert list(part) == [q for q in asked if q in part]


def test_which_documents_are_set_apart_follows_from_the_seed_and_not_from_their_order():
    asked = questions(20, 4)
    assert split_questions(asked, 40, 0) == split_questions(asked, 40, 0) != split_questions(asked, 40, 1)
    backwards = split_questions(asked[::-1], 40, 0)
    assert [set(part) for part in map(ids, backwards)] == [
        set(part) for part in map(ids, split_questions(asked, 40, 0))
    ]


def test_a_document_written_in_two_ways_is_one():
    names = ["a.pdf", "x/a.PDF", "a", "b.pdf", "b", "c.v2.pdf"]
    asked = [Question(f"q{n}", "?", "!", name, (1,)) for n, name in enumerate(names)]
    for seed in range(6):
        sft, rl = ({document_stem(q.file_name) for q in part} for part in split_questions(asked, 2, seed))
        assert sft and rl and not sft & rl


def ids(part) -> list[str]:
    return [question.uid for question in part]


def test_a_split_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cannot set 9 of 8 questions apart; draw them from more documents"):
        split_questions(questions(2, 4), 9, 0)
    with pytest.raises(ValueError, match="take all documents"):
        split_questions(questions(2, 4), 5, 0)
    with pytest.raises(ValueError, match="'q' names no document"):
        split_questions([Question("q", "?", "!")], 0, 0)


def test_png_files_are_whole(tmp_path):
    write_llama_factory(GOOD, CORPUS, tmp_path)
    for path in (tmp_path / "images").iterdir():
        Image.open(io.BytesIO(path.read_bytes())).verify()
