"""Filters, one by one and as a chain; the balanced draw; the ablation's numbers."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
from helpers import FakeCorpus, FakeRetriever
from hypothesis import given, settings
from hypothesis import strategies as st

from vrag_lib.actions import ActionKind, InvalidReason, format_box
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Question
from vrag_lib.geometry import Box, Size
from vrag_lib.minidocs_content import NOT_ANSWERABLE
from vrag_lib.policy import Reply, ScriptedPolicy
from vrag_lib.rollout import rollout
from vrag_lib.synthesis_filters import (
    FilterConfig,
    Funnel,
    ablation_row,
    are_new,
    balance,
    cell_of,
    crop_ious,
    filter_trajectories,
    has_good_boxes,
    has_repeats,
    has_structure,
    is_thought_and_action,
    judge_answers,
    standard_filters,
)
from vrag_lib.trajectory import StopReason, Trajectory

CORPUS = FakeCorpus([Size(1120, 784), Size(784, 1120), Size(1120, 784)])
ENVIRONMENT = EnvironmentConfig(max_turns=8, min_pixels=140 * 784, max_pixels=140 * 784)
SHOWN = Size(392, 280)
"""Size at which the first page is shown: 14 x 10 cells."""

GOLD = Box(280, 196, 560, 392)
"""The gold region in raw pixels; a quarter of the page away from its top left corner."""
QUESTION = Question(
    "q0", "how many?", "12", "doc.pdf", (1,), extra={"regions": [{"page": 1, "region_box": list(GOLD.as_tuple())}]}
)


def search(query: str = "1") -> str:
    return f"<think>look for it</think>\n<search>{query}</search>"


def crop(*box: float) -> str:
    return f"<think>look closer</think>\n<bbox>{format_box(Box(*box))}</bbox>"


def answer(text: str = "12") -> str:
    return f"<think>read it</think>\n<answer>{text}</answer>"


GOOD_BOX = (98, 70, 196, 140)


def play(*replies: str, question: Question = QUESTION, seed: int = 0, environment=ENVIRONMENT) -> Trajectory:
    retriever = FakeRetriever(CORPUS.page_ids)
    return rollout(ScriptedPolicy(replies), [question], CORPUS, retriever, environment, seeds=[seed])[0]


GOOD = play(search(), crop(*GOOD_BOX), answer())


def dropped_at(trajectory: Trajectory, judge=None, config=None) -> str | None:
    """The stage at which a trajectory falls out of the chain, alone."""
    judged = {} if judge is None else {"judge": judge}
    result = filter_trajectories([trajectory], config=config, **judged)
    return next((stage for stage, fallen in result.dropped.items() if fallen), None)


def test_the_page_is_shown_as_the_tests_below_assume():
    assert GOOD.images[0].view.shown == SHOWN and GOOD.images[1].view.box == GOLD


@pytest.mark.parametrize(
    ("stage", "replies"),
    [
        (None, [search(), crop(*GOOD_BOX), answer()]),
        (None, [search(), search("2"), crop(*GOOD_BOX), crop(0, 0, 100, 100), answer("12.0")]),
        ("not_finished", [search()]),
        ("wrong_answer", [search(), answer("13")]),
        ("invalid_action", [crop(*GOOD_BOX), search(), answer()]),
        ("structure", [search(), "look closer <bbox>[98, 70, 196, 140]</bbox>", answer()]),
        ("box_rules", [search(), crop(0, 0, 380, 280), answer()]),
        ("steps", [answer()]),
        ("repeats", [search("1"), search(" 1 "), answer()]),
    ],
)
def test_each_stage_drops_what_its_name_says(stage, replies):
    assert dropped_at(play(*replies)) == stage


def test_a_failed_trajectory_is_an_error_not_an_unfinished_one():
    class Failing(ScriptedPolicy):
        def generate(self, conversations, *, seeds=None):
            return [Reply("", finish_reason="error", error="timeout: 3 s") for _ in conversations]

    failed = rollout(Failing([]), [QUESTION], CORPUS, FakeRetriever(CORPUS.page_ids), ENVIRONMENT)[0]
    assert dropped_at(failed) == "error"


def test_where_nothing_answers_only_saying_so_is_right():
    absent = dataclasses.replace(QUESTION, reference_answer=NOT_ANSWERABLE)
    assert dropped_at(play(search(), answer("not answerable"), question=absent)) is None
    assert dropped_at(play(search(), answer("12"), question=absent)) == "wrong_answer"
    assert dropped_at(play(search(), answer(NOT_ANSWERABLE))) == "wrong_answer"


def test_a_judge_that_fails_costs_one_answer_and_is_no_verdict():
    def judge(question: str, reference: str, given: str) -> bool:
        if given == "12":
            raise ConnectionError("the judge is away")
        return True

    assert dropped_at(GOOD, judge) == "not_judged"
    assert dropped_at(play(search(), answer("13")), judge) is None
    row = ablation_row("a", [GOOD, play(search(), answer("13"), seed=1)], [], [QUESTION], judge)
    assert row["accuracy"] == 1.0, "an answer without a verdict is neither right nor wrong"


def test_equal_answers_are_judged_once_and_together_where_a_judge_can():
    class Judge:
        def __init__(self):
            self.asked = []

        def many(self, items):
            self.asked.append(list(items))
            return [True] * len(items)

    trajectories = [GOOD, play(search(), answer()), play(search(), answer("13")), play(search())]
    judge = Judge()
    verdicts = judge_answers(trajectories, judge)
    assert judge.asked == [[("how many?", "12", "12"), ("how many?", "12", "13")]] and len(verdicts) == 2
    calls = []
    judge_answers(trajectories, lambda *item: calls.append(item), workers=2)
    assert sorted(calls) == sorted(verdicts)


# --- structure


@pytest.mark.parametrize(
    "text",
    [
        "<search>a</search>",
        "<think></think><search>a</search>",
        "<think> \n </think><search>a</search>",
        "<think>a</think><think>b</think><search>a</search>",
        "<think>first <search> then</think><search>a</search>",
        "so: <think>a</think><search>a</search>",
        "<think>a</think> so <search>a</search>",
        "<think>a</think><search>a</search> done",
        "</think>a<think><search>a</search>",
        "<think>a</think><answer>a</answer>",
        "<search>a</search><think>a</think>",
    ],
)
def test_anything_but_one_thought_and_one_action_is_refused(text):
    assert not is_thought_and_action(text, ActionKind.SEARCH)
    assert is_thought_and_action(" <think>a\n</think>\n\n<search>a</search>\n", ActionKind.SEARCH)


def test_a_crop_must_follow_an_image_whatever_its_thought_says():
    """Trap T21: the word search in the thought is no search."""
    blind = "<think>the search <search showed it</think>\n<bbox>[98, 70, 196, 140]</bbox>"
    trajectory = play(search("1"), search("1"), search("1"), search("1"), blind, answer())
    assert [len(turn.images) for turn in trajectory.turns if turn.role == "user"] == [0, 1, 1, 1, 0, 1]
    assert trajectory.replies[4].action.kind is ActionKind.CROP, "the environment crops the last image"
    assert not has_structure(trajectory)
    assert has_structure(play(search("1"), blind, answer()))


def test_an_invalid_reply_has_no_structure():
    assert not has_structure(play("hm", search(), answer()))


# --- boxes


@pytest.mark.parametrize(
    ("box", "good"),
    [
        ((0, 0, 14, 14), True),
        ((364, 252, 392, 280), True),
        ((0, 0, 392, 251), True),
        ((0, 0, 392, 252), False),
        ((0, 0, 392, 280), False),
        ((0, 0, 13, 100), False),
        ((100, 100, 50, 50), False),
        ((365, 252, 393, 280), False),
        ((-1, 0, 100, 100), False),
    ],
)
def test_boxes_lie_on_the_image_and_enlarge_something(box, good):
    trajectory = play(search(), crop(*box), answer())
    assert all(reply.invalid is None for reply in trajectory.replies)
    assert has_good_boxes(trajectory, FilterConfig()) is good


def test_the_least_side_of_a_box_is_a_setting():
    small = play(search(), crop(0, 0, 27, 100), answer())
    assert has_good_boxes(small, FilterConfig()) and not has_good_boxes(small, FilterConfig(min_box_side=28))


def test_a_box_on_a_crop_is_measured_on_that_crop():
    first = play(search(), crop(*GOOD_BOX), answer()).images[1].view.shown
    nested = (0, 0, first.width - 28, first.height - 28)
    assert has_good_boxes(play(search(), crop(*GOOD_BOX), crop(*nested), answer()), FilterConfig())
    whole = (0, 0, first.width, first.height)
    assert not has_good_boxes(play(search(), crop(*GOOD_BOX), crop(*whole), answer()), FilterConfig())


def test_a_crop_is_shown_at_a_permitted_size():
    area = GOOD.images[1].view.shown.width * GOOD.images[1].view.shown.height
    assert has_good_boxes(GOOD, FilterConfig(min_crop_pixels=area, max_crop_pixels=area))
    assert not has_good_boxes(GOOD, FilterConfig(min_crop_pixels=area + 1))
    assert not has_good_boxes(GOOD, FilterConfig(max_crop_pixels=area - 1))


# --- steps, repeats, near-duplicates


def test_limits_of_steps_are_settings():
    assert dropped_at(GOOD, config=FilterConfig(max_replies=2)) == "steps"
    long = play(*[search(str(i)) for i in range(1, 3)], *[crop(i, i, 200 + i, 200 + i) for i in range(4)], answer())
    assert len(long.replies) == 7 and dropped_at(long) == "steps"
    assert dropped_at(long, config=FilterConfig(max_replies=7)) is None


def test_the_same_region_twice_is_a_repeat_and_the_same_numbers_on_another_image_are_not():
    assert has_repeats(play(search(), crop(*GOOD_BOX), search("2"), search("1 again"), answer())) is False
    again = play(search("1"), crop(*GOOD_BOX), crop(*GOOD_BOX), answer())
    assert again.images[1].view.box != again.images[2].view.box and not has_repeats(again)
    page = play(search("1"), crop(0, 0, 392, 280), crop(0, 0, 392, 280), answer())
    assert page.images[1].view.box == page.images[2].view.box and has_repeats(page)
    assert has_repeats(play(search("Page  1"), search("page 1"), answer()))


def test_near_duplicates_share_question_actions_pages_answer_and_boxes():
    near = play(search("1 "), crop(98, 70, 196, 148), answer("12.0"), seed=1)
    assert are_new([GOOD, near], 0.8) == [True, True], "another text of the answer"
    near = play(search("1 x"), crop(98, 70, 196, 148), answer(" 12"), seed=1)
    assert are_new([GOOD, near], 0.8) == [True, False] and are_new([GOOD, near], 0.95) == [True, True]
    far = play(search(), crop(98, 70, 196, 210), answer(), seed=2)
    other_page = play(search("3"), crop(*GOOD_BOX), answer(), seed=3)
    other_question = dataclasses.replace(GOOD, question_id="q1")
    longer = play(search(), answer(), seed=4)
    assert all(are_new([GOOD, far, other_page, other_question, longer], 0.8))
    assert are_new([GOOD, far, dataclasses.replace(far, id="x"), GOOD], 0.8) == [True, True, False, False]


# --- chain and funnel


def test_the_funnel_counts_every_stage_and_keeps_what_fell():
    samples = [
        GOOD,
        play(search(), answer("13"), seed=1),
        play(search(), seed=2),
        dataclasses.replace(GOOD, id="again"),
        play(search(), answer(), seed=3),
    ]
    result = filter_trajectories(samples)
    assert result.kept == (samples[0], samples[4])
    assert {stage: len(fallen) for stage, fallen in result.dropped.items() if fallen} == {
        "not_finished": 1,
        "wrong_answer": 1,
        "near_duplicate": 1,
    }
    assert result.dropped["wrong_answer"] == (samples[1],)
    frame = result.funnel.with_stage("balance", 1).to_frame()
    assert list(frame["stage"]) == ["sampled", *standard_filters({}), "balance"]
    assert list(frame["kept"])[-2:] == [2, 1] and frame["dropped"].sum() == 4 and frame["share"].iloc[-1] == 0.2
    assert filter_trajectories([]).funnel.rows[-1] == {
        "stage": "near_duplicate", "kept": 0, "dropped": 0, "share": 0.0,
    }  # fmt: skip


def test_the_funnel_is_a_csv_file(tmp_path):
    path = Funnel((("sampled", 4), ("error", 3))).write_csv(tmp_path / "new" / "funnel.csv")
    assert path.read_text() == "stage,kept,dropped,share\nsampled,4,0,1.0\nerror,3,1,0.75\n"


# --- balance


def made(kind: int, question: int, number: int) -> Trajectory:
    """One of three kinds of trajectory, as sample `number` of a question."""
    trajectory = (play(search(), answer()), GOOD, play(search(), search("2"), answer()))[kind]
    return dataclasses.replace(trajectory, question_id=f"q{question}", id=f"{kind}-{question}-{number}")


def test_a_draw_is_even_over_replies_then_types():
    pool = [made(0, q, n) for q in range(10) for n in range(9)] + [made(k, q, 0) for k in (1, 2) for q in range(10)]
    drawn = balance(pool, 20, seed=0)
    assert Counter(map(cell_of, drawn)) == {(2, False, 1): 10, (3, True, 1): 5, (3, False, 2): 5}
    assert max(Counter(t.question_id for t in drawn).values()) <= 3
    first = Counter(map(cell_of, drawn[:8]))
    assert first == {(2, False, 1): 4, (3, True, 1): 2, (3, False, 2): 2}, "so is the beginning of a draw"


def test_a_rare_type_is_taken_whole_and_the_rest_fills_up():
    pool = [made(0, q, n) for q in range(10) for n in range(5)] + [made(1, q, 0) for q in range(2)]
    drawn = balance(pool, 30, seed=1)
    assert Counter(map(cell_of, drawn)) == {(2, False, 1): 28, (3, True, 1): 2}


def test_no_question_is_drawn_much_more_often_than_others():
    pool = [made(0, 0, n) for n in range(50)] + [made(1, q, n) for q in range(1, 6) for n in range(3)]
    drawn = Counter(t.question_id for t in balance(pool, 12, seed=0))
    assert drawn["q0"] <= 3 and drawn.total() == 12
    everything = balance(pool, 60, seed=0)
    assert len(everything) == 60, "unless the target cannot be reached otherwise"
    assert min(count for q, count in Counter(t.question_id for t in everything).items()) == 3


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=25), st.integers(0, 30), st.integers(0, 3))
def test_a_draw_takes_as_many_as_there_are_each_once_whatever_their_order(kinds, target, seed):
    pool = [made(kind, question, number) for number, (kind, question) in enumerate(kinds)]
    drawn = balance(pool, target, seed)
    assert len(drawn) == min(target, len(pool)) == len({t.id for t in drawn}) and all(t in pool for t in drawn)
    assert balance(pool[::-1], target, seed) == drawn


def test_draws_of_two_seeds_differ():
    pool = [made(0, q, n) for q in range(10) for n in range(5)]
    assert balance(pool, 10, seed=0) != balance(pool, 10, seed=1)
    with pytest.raises(ValueError, match="cannot draw -1"):
        balance(pool, -1, seed=0)


# --- ablation


def test_boxes_are_compared_with_the_gold_region_on_its_page():
    assert crop_ious(GOOD, QUESTION) == [1.0]
    half = play(search(), crop(98, 70, 196, 105), answer())
    assert crop_ious(half, QUESTION) == [pytest.approx(0.5, abs=0.02)]
    assert crop_ious(play(search("2"), crop(*GOOD_BOX), answer()), QUESTION) == []
    assert crop_ious(GOOD, Question("q", "a", "b", "doc.pdf", (1,))) == []


def test_a_row_averages_within_questions_first():
    other = dataclasses.replace(QUESTION, uid="q1")
    samples = [
        GOOD,
        play(search(), answer("13"), seed=1),
        play("hm", search(), answer(), seed=2),
        play(search(), search("2"), search("3"), answer(), question=other, seed=3),
    ]
    result = filter_trajectories(samples)
    row = ablation_row("both", samples, result.kept, [QUESTION, other])
    assert (row["name"], row["sampled"], row["kept"], row["crops"]) == ("both", 4, 2, 1)
    assert row["yield"] == pytest.approx((1 / 3 + 1) / 2) and row["accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert row["finished"] == 1.0 and row["crop_iou"] == 1.0
    assert row["invalid_rate"] == pytest.approx((1 / 8 + 0) / 2) and row["replies"] == pytest.approx((8 / 3 + 4) / 2)
    assert row["yield_low"] <= row["yield"] <= row["yield_high"] and row["yield_low"] < row["yield_high"]
    assert samples[2].replies[0].invalid is InvalidReason.NO_ACTION


def test_a_row_without_crops_says_so_and_unknown_questions_are_named():
    row = ablation_row("planner", [play(search(), answer())], [], [QUESTION])
    assert math.isnan(row["crop_iou"]) and math.isnan(row["crop_iou_low"]) and row["yield"] == 0.0
    with pytest.raises(ValueError, match="'q0', which is not among the questions"):
        ablation_row("planner", [GOOD], [], [])
    with pytest.raises(ValueError, match="no trajectories of 'planner'"):
        ablation_row("planner", [], [], [QUESTION])
    assert GOOD.stop_reason is StopReason.ANSWER
