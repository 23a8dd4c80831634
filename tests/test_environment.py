"""The environment's contract, and 100,000 replies that must not break it."""

from __future__ import annotations

import math
import random
import sys

import pytest
from helpers import FailingRetriever, FakeCorpus, FakeRetriever

from vrag_lib.actions import LAST_TURN, NO_NEW_PAGE, ActionKind, Invalid, InvalidReason, parse_reply
from vrag_lib.config import ConfigError, EnvironmentConfig
from vrag_lib.corpus import Question
from vrag_lib.environment import Environment
from vrag_lib.geometry import Box, Size
from vrag_lib.retrieval import Hit, RetrievalIndexError
from vrag_lib.trajectory import StopReason

SIZES = [Size(1000, 800), Size(800, 1000), Size(640, 480), Size(50, 900)]


def make(sizes=SIZES, **settings) -> Environment:
    corpus = FakeCorpus(sizes)
    return Environment(corpus, FakeRetriever(corpus.page_ids), EnvironmentConfig(**settings))


def test_a_search_shows_the_best_page_not_yet_shown():
    environment = make(max_turns=9)
    environment.reset("q")
    shown = [environment.step("<search>3 3 2</search>").images[0].page_id for _ in range(4)]
    assert shown == ["doc_3", "doc_2", "doc_1", "doc_4"]
    nothing = environment.step("<search>3 3 2</search>")
    assert nothing.text == NO_NEW_PAGE and not nothing.images and not nothing.done


def test_reset_forgets_what_was_shown():
    environment = make()
    for _ in range(2):
        environment.reset("q")
        assert environment.step("<search>2</search>").images[0].page_id == "doc_2"


def test_a_crop_of_a_crop_is_cut_from_the_raw_page():
    environment = make(max_turns=9)
    environment.reset("q")
    page = environment.step("<search>1</search>").images[0].view
    first = environment.step(f"<bbox>{list(page.to_shown(Box(200, 100, 600, 500)).as_tuple())}</bbox>")
    inner = first.images[0].view.to_shown(Box(300, 200, 400, 300))
    second = environment.step(f"<bbox>{list(inner.as_tuple())}</bbox>")
    assert second.images[0].view.box == Box(300, 200, 400, 300)
    assert second.images[0].page_id == "doc_1" and second.images[0].is_crop


def test_a_crop_refers_to_the_last_image_shown():
    environment = make(max_turns=9)
    environment.reset("q")
    environment.step("<search>1</search>")
    environment.step("<search>2</search>")
    assert environment.step("<bbox>[0, 0, 100, 100]</bbox>").images[0].page_id == "doc_2"


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("hello", InvalidReason.NO_ACTION),
        ("<bbox>[1, 2, 3, 4]</bbox>", InvalidReason.NO_IMAGE),
        ("<search>a <|image_pad|> b</search>", InvalidReason.IMAGE_TOKEN),
    ],
)
def test_an_invalid_reply_costs_a_turn_and_is_explained_without_an_action(reply, reason):
    environment = make(max_turns=3)
    environment.reset("q")
    seen = environment.step(reply)
    assert seen.invalid is reason and not seen.done and isinstance(parse_reply(seen.text), Invalid)
    assert LAST_TURN in environment.step(reply).text
    assert environment.step(reply).stop_reason is StopReason.MAX_TURNS


@pytest.mark.parametrize(
    "box, reason",
    [
        ("[5, 5, 5, 9]", InvalidReason.ZERO_AREA),
        ("[0, 0, 0, 0]", InvalidReason.ZERO_AREA),
        ("[9999, 9999, 99999, 99999]", InvalidReason.OUTSIDE),
        ("[NaN, 0, 1, 1]", InvalidReason.NOT_FINITE),
        ("[1, 2]", InvalidReason.BAD_BOX),
    ],
)
def test_a_box_without_a_region_is_invalid_and_shows_nothing(box, reason):
    environment = make()
    environment.reset("q")
    environment.step("<search>1</search>")
    seen = environment.step(f"<bbox>{box}</bbox>")
    assert seen.invalid is reason and not seen.images and seen.action is None


def test_a_full_page_box_shows_the_page_again():
    environment = make()
    environment.reset("q")
    page = environment.step("<search>1</search>").images[0]
    again = environment.step(f"<bbox>[0, 0, {page.view.shown.width}, {page.view.shown.height}]</bbox>").images[0]
    assert again == page


def test_the_budget_is_announced_once_and_then_ends():
    """Trap T23: the same hint in training and demo."""
    environment = make(max_turns=3)
    assert LAST_TURN not in environment.reset("q").text
    assert LAST_TURN not in environment.step("<search>1</search>").text
    assert LAST_TURN in environment.step("<search>2</search>").text
    end = environment.step("<search>3</search>")
    assert end.stop_reason is StopReason.MAX_TURNS and end.action.kind is ActionKind.SEARCH
    assert environment.retriever.calls == [["1"], ["2"]]
    assert LAST_TURN in make(max_turns=1).reset("q").text


def test_an_answer_ends_and_a_finished_environment_stays_finished():
    environment = make()
    environment.reset("q")
    end = environment.step("<think>t</think><answer> 42 </answer>")
    assert end.stop_reason is StopReason.ANSWER and end.action.argument == "42"
    assert environment.step("<search>1</search>").stop_reason is StopReason.ERROR
    assert environment.retriever.calls == []


def test_a_streak_of_invalid_replies_ends_and_a_valid_one_breaks_it():
    environment = make(max_turns=20, max_invalid_streak=3)
    environment.reset("q")
    replies = ["x", "x", "<search>1</search>", "x", "x", "x"]
    ends = [environment.step(reply).stop_reason for reply in replies]
    assert ends == [None] * 5 + [StopReason.INVALID_STREAK]


def test_actions_can_be_switched_off():
    environment = make(allow_crop=False, max_turns=9)
    assert "bbox" not in environment.reset("q").text
    environment.step("<search>1</search>")
    assert environment.step("<bbox>[0,0,50,50]</bbox>").invalid is InvalidReason.NOT_ALLOWED
    environment = make(allow_search=False)
    environment.reset("q")
    assert environment.search_query("<search>1</search>") is None
    assert environment.step("<search>1</search>").invalid is InvalidReason.NOT_ALLOWED


def test_given_pages_count_as_shown_and_are_forgotten_by_a_reset():
    environment = make(max_turns=9, given="gold_pages")
    pages = environment.given(Question("q", "q", "", "doc.pdf", (3, 2)))
    first = environment.reset("q", pages)
    assert [image.page_id for image in first.images] == ["doc_3", "doc_2"] and not any(i.is_crop for i in first.images)
    assert environment.step("<bbox>[0, 0, 100, 100]</bbox>").images[0].page_id == "doc_2"
    assert environment.step("<search>3 3 2</search>").images[0].page_id == "doc_1"
    assert environment.reset("q").images == ()
    assert environment.step("<bbox>[0, 0, 100, 100]</bbox>").invalid is InvalidReason.NO_IMAGE
    assert environment.step("<search>3</search>").images[0].page_id == "doc_3"


def test_a_page_that_is_found_twice_is_given_once():
    environment = make(given="retrieved", given_pages=3, allow_search=False, allow_crop=False)
    environment.retriever.search = lambda queries, k: [[Hit(f"doc_{n}", 1.0) for n in (2, 2, 1, 2, 3, 4)]]
    assert [image.page_id for image in environment.given(Question("q", "q", ""))] == ["doc_2", "doc_1", "doc_3"]


def test_the_budget_is_announced_below_given_pages_too():
    environment = make(max_turns=1, given="retrieved", given_pages=2, allow_search=False, allow_crop=False)
    first = environment.reset("q", environment.given(Question("q", "4 4 1", "")))
    assert [image.page_id for image in first.images] == ["doc_4", "doc_1"] and first.text.endswith(LAST_TURN)


def test_pages_are_shown_as_text_with_the_end_of_the_budget():
    environment = make(max_turns=2, observation="text", allow_crop=False)
    environment.reset("q")
    seen = environment.step("<search>2</search>")
    assert (seen.images, seen.text_pages) == ((), ("doc_2",))
    assert seen.text == f"A page:\n> text of doc_2\n{LAST_TURN}"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"given": "all"}, "given is one of none, retrieved"),
        ({"observation": "ocr"}, "observation is one of image, text, not 'ocr'"),
        ({"given": "retrieved"}, "at least one page"),
        ({"given_pages": 3}, "given=none and environment.given_pages=3"),
        ({"observation": "text"}, "allow_crop=false"),
        ({"observation": "text", "allow_crop": False, "given": "gold_regions"}, "no gold_regions"),
        ({"page_chars": 0}, "page_chars is at least 1"),
        ({"max_turns": 0}, r"environment\.max_turns is at least 1 and finite, not 0"),
        ({"search_depth": 0}, "search_depth is at least 1"),
        ({"crop_padding": -1.0}, "crop_padding is at least 0"),
        ({"crop_padding": math.nan}, "crop_padding is at least 0"),
        ({"max_invalid_streak": -1}, "max_invalid_streak is at least 0"),
        ({"min_pixels": 1001, "max_pixels": 1000}, "min_pixels=1001 is more than environment.max_pixels=1000"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_crop_padding_is_one_constant_from_the_config():
    """Trap T7."""
    boxes = []
    for padding in (0.0, 28.0):
        environment = make(crop_padding=padding)
        environment.reset("q")
        view = environment.step("<search>1</search>").images[0].view
        boxes.append(environment.step("<bbox>[100, 100, 200, 200]</bbox>").images[0].view.box)
        scale = view.box.width / view.shown.width
    assert abs((boxes[0].x1 - boxes[1].x1) - 28 * scale) <= 1


def test_a_failing_search_ends_this_trajectory_with_the_reason():
    corpus = FakeCorpus(SIZES)
    environment = Environment(corpus, FailingRetriever(corpus.page_ids))
    environment.reset("q")
    seen = environment.step("<search>x</search>")
    assert seen.stop_reason is StopReason.ERROR and "the search server is away" in seen.error


def test_an_index_of_another_corpus_is_refused():
    with pytest.raises(RetrievalIndexError, match="'other_1'"):
        Environment(FakeCorpus(SIZES), FakeRetriever(["other_1"]))


def hostile_replies(count: int, seed: int = 0):
    """Well-formed, broken and hostile replies: nested tags, several actions, odd numbers, placeholders, all planes."""
    rng = random.Random(seed)
    tags = ["think", "search", "bbox", "answer", "SEARCH", "region", "tool_call", ""]
    numbers = ["0", "-1", "5", "27.9", "400", "1e9", "1e308", "1e999", "NaN", "Infinity", "-Infinity", "null", '"7"']
    numbers += ["true", "[]", "{}", "0x10", "1_0", "٣", "9" * 400]
    words = ["1", "revenue", "<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<think>", "</search>", "&lt;", "\x00"]
    words += ["\ud800", "\u202e", "\ufeff", "<script>", "{{7*7}}", "%s%n", "../../etc", "\\", "\r\n", "'; --"]

    def scrap() -> str:
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(words)
        plane = rng.randrange(17)
        return "".join(chr(min(plane * 0x10000 + rng.randrange(0x10000), sys.maxunicode)) for _ in range(8))

    def box() -> str:
        return "[" + ", ".join(rng.choice(numbers) for _ in range(rng.choice([4, 4, 4, 4, 3, 5, 0]))) + "]"

    def good_box() -> str:
        return str([rng.randrange(-50, 1200) for _ in range(4)])

    def block() -> str:
        tag = rng.choice(tags)
        inner = rng.choice([box, good_box, scrap])() if tag == "bbox" else " ".join(scrap() for _ in range(3))
        if rng.random() < 0.15:
            inner += block()
        close = rng.choice([f"</{tag}>"] * 6 + ["", f"</{rng.choice(tags)}>", f"<{tag}>", f"</{tag} >"])
        return f"<{tag}>{inner}{close}"

    for i in range(count):
        if i % 20_000 == 19_999:
            yield rng.choice(["<search>", "<bbox>[", "x", "</think>", "\U0010ffff"]) * 1_000_000
        elif i % 3 == 0:
            yield rng.choice(["<search>1</search>", f"<bbox>{good_box()}</bbox>", "<search>4</search>"])
        else:
            yield "".join(block() for _ in range(rng.choice([1, 1, 2, 4]))) + (scrap() if rng.random() < 0.3 else "")


def test_a_hundred_thousand_replies_never_make_step_raise():
    environment = make(max_turns=12, max_invalid_streak=6)
    environment.reset("q")
    seen_kinds, reasons, stops = set(), set(), set()
    for reply in hostile_replies(100_000):
        seen = environment.step(reply)
        seen_kinds.add(seen.action and seen.action.kind)
        reasons.add(seen.invalid)
        for image in seen.images:
            page, box = image.view.page, image.view.box
            assert 0 <= box.x1 < box.x2 <= page.width and 0 <= box.y1 < box.y2 <= page.height
        assert isinstance(parse_reply(seen.text), Invalid)
        if seen.done:
            stops.add(seen.stop_reason)
            environment.reset("q")
    # The replies must have reached every branch, or the test shows nothing.
    assert seen_kinds == {None, *ActionKind}
    assert reasons == {None, *InvalidReason} - {InvalidReason.NOT_ALLOWED}
    assert stops == {StopReason.ANSWER, StopReason.MAX_TURNS, StopReason.INVALID_STREAK}
