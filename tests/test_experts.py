"""Multi-expert sampling: who writes what, what is kept, what is counted (traps T20, T21)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
from helpers import FakeCorpus, FakeRetriever
from hypothesis import given
from hypothesis import strategies as st

from vrag_lib.actions import ActionKind, InvalidReason, parse_reply, question_prompt
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Question
from vrag_lib.experts import (
    CROP_ORDER,
    GoldFirstRetriever,
    GroundingExpert,
    Located,
    MultiExpertPolicy,
    NextReplyPolicy,
    Pointing,
    Relocation,
    box_on_image,
    replace_box,
    thought_of,
)
from vrag_lib.geometry import Box, Size, View
from vrag_lib.policy import Policy, Reply, ScriptedPolicy
from vrag_lib.retrieval import Retriever, best_unseen
from vrag_lib.rollout import rollout
from vrag_lib.trajectory import ImageRef, StopReason, Turn

CORPUS = FakeCorpus([Size(1000, 800), Size(800, 600), Size(640, 480)])
SIZE = CORPUS.pages[0].size
IMAGE = ImageRef("doc_1", View.of_page(SIZE, 56 * 56, 256 * 28 * 28))
CROP = "<think>the small table</think>\n<bbox>[1, 2, 100, 200]</bbox>"


class Grounder:
    """Gives the next of its answers; keeps what it was asked."""

    name = "grounder"

    def __init__(self, *answers: Located):
        self.answers = list(answers)
        self.asked: list[Pointing] = []
        self.seeds: list = []

    def locate(self, requests: Sequence[Pointing], *, seeds: Sequence[int] | None = None) -> list[Located]:
        self.asked += requests
        self.seeds.append(seeds)
        return [self.answers.pop(0) for _ in requests]


def conversation(*images: ImageRef, question: str = "How many?") -> list[Turn]:
    turns = [Turn("user", question_prompt(question))]
    for image in images:
        turns += [Turn("assistant", "<search>x</search>"), Turn("user", "", (image,))]
    return turns


def test_the_protocols_are_met():
    policy = MultiExpertPolicy(ScriptedPolicy([""]), Grounder())
    assert isinstance(policy, Policy) and isinstance(Grounder(), GroundingExpert)
    assert isinstance(NextReplyPolicy(policy, policy), Policy)
    assert isinstance(GoldFirstRetriever(FakeRetriever(CORPUS.page_ids), []), Retriever)


def test_the_box_is_relocated_under_the_planners_thought():
    grounder = Grounder(Located(Box(10.4, 20, 300, 250)))
    policy = MultiExpertPolicy(ScriptedPolicy([CROP]), grounder)
    other = dataclasses.replace(IMAGE, page_id="doc_2")
    reply = policy.generate([conversation(other, IMAGE)], seeds=[7])[0]
    assert reply == Reply("<think>the small table</think>\n<bbox>[10, 20, 300, 250]</bbox>")
    assert grounder.asked == [Pointing("How many?", "the small table", IMAGE, Box(1, 2, 100, 200))]
    assert grounder.seeds == [[7]] and policy.counts == {"relocated": 1}
    expected = Relocation("How many?", "the small table", IMAGE, Box(1, 2, 100, 200), Box(10, 20, 300, 250))
    assert policy.relocations == [expected]


@pytest.mark.parametrize(
    ("located", "count", "error"),
    [
        (Located(None, "server: HTTP 500"), "kept_box_failed", "server: HTTP 500"),
        (Located(None), "kept_box_failed", "no box, no reason"),
        (Located(Box(5000, 5000, 6000, 6000)), "kept_box_invalid", "not on the image"),
        (Located(Box(math.nan, 0, 50, 50)), "kept_box_invalid", "not on the image"),
        (Located(Box(9, 9, 9.2, 80)), "kept_box_invalid", "not on the image"),
    ],
)
def test_the_planners_own_box_stays_where_the_expert_fails(located, count, error):
    policy = MultiExpertPolicy(ScriptedPolicy([CROP]), Grounder(located))
    assert policy.generate([conversation(IMAGE)])[0].text == CROP
    assert policy.counts == {count: 1}
    (relocation,) = policy.relocations
    assert relocation.located is None and error in relocation.error


@pytest.mark.parametrize(
    "text",
    [
        "<think>t</think><search>bbox [1, 2, 3, 4]</search>",
        "<answer>[1, 2, 3, 4]</answer>",
        "<bbox>[1, 2, 3]</bbox>",
        "<bbox>[1, 2, 3, 4]",
        "<bbox>[NaN, 2, 3, 4]</bbox>",
        "<bbox><|image_pad|></bbox>",
        "no action",
        "",
    ],
)
def test_all_other_replies_pass_unchanged(text):
    policy = MultiExpertPolicy(ScriptedPolicy([text]), Grounder())
    assert policy.generate([conversation(IMAGE)])[0].text == text
    assert not policy.counts and not policy.relocations


def test_a_crop_before_the_first_page_is_left_to_the_environment():
    policy = MultiExpertPolicy(ScriptedPolicy([CROP]), Grounder())
    assert policy.generate([conversation()])[0].text == CROP and policy.counts == {"no_image": 1}


def test_only_crops_of_a_batch_are_asked_for_and_go_back_to_their_places():
    def script(conversation):
        question = conversation[0].text[-1]
        return CROP.replace("table", f"table {question}") if question in "bd" else f"<answer>{question}</answer>"

    grounder = Grounder(Located(Box(0, 0, 50, 50)), Located(Box(0, 0, 60, 60)))
    policy = MultiExpertPolicy(ScriptedPolicy(script), grounder)
    replies = policy.generate([conversation(IMAGE, question=q) for q in "abcd"], seeds=[1, 2, 3, 4])
    assert [parse_reply(reply.text).argument for reply in replies] == ["a", "[0, 0, 50, 50]", "c", "[0, 0, 60, 60]"]
    assert [asked.thought[-1] for asked in grounder.asked] == ["b", "d"] and grounder.seeds == [[2, 4]]


class Sampler:
    """A policy with tokens, or one that fails."""

    name = "sampler"

    def __init__(self, **reply):
        self.reply = Reply(**reply)

    def generate(self, conversations, *, seeds=None):
        return [self.reply for _ in conversations]


def test_no_reply_claims_tokens_that_were_not_sampled_for_it():
    sampler = Sampler(text=CROP, token_ids=(1, 2), logprobs=(-1.0, -1.0), prompt_token_ids=(3,), finish_reason="length")
    located = Located(Box(0, 0, 50, 50))
    for policy in (MultiExpertPolicy(sampler, Grounder(located)), NextReplyPolicy(sampler, sampler)):
        (reply,) = policy.generate([conversation(IMAGE)])
        assert reply.token_ids is reply.logprobs is reply.prompt_token_ids is None and reply.finish_reason == "length"


def test_a_planner_that_fails_ends_its_own_trajectory_only():
    sampler = Sampler(text="", finish_reason="error", error="server: HTTP 500")
    assert MultiExpertPolicy(sampler, Grounder()).generate([conversation(IMAGE)]) == [sampler.reply]


def test_in_a_rollout_the_record_holds_the_located_box():
    script = ["<think>find it</think><search>2</search>", CROP, "<answer>12</answer>"]
    policy = MultiExpertPolicy(ScriptedPolicy(script), Grounder(Located(Box(0, 0, 56, 84))))
    (trajectory,) = rollout(policy, [Question("q", "How many?", "12")], CORPUS, FakeRetriever(CORPUS.page_ids))
    assert trajectory.stop_reason is StopReason.ANSWER and trajectory.policy == "multi-expert"
    assert trajectory.replies[1].action.box == Box(0, 0, 56, 84)
    page, crop = trajectory.images
    assert crop.view.box == page.view.crop(Box(0, 0, 56, 84), 56 * 56, 256 * 28 * 28).box


def test_next_reply_the_second_expert_writes_after_each_search_that_showed_a_page():
    heard = []

    def second(conversation):
        heard.append(conversation[-1].text)
        return "<think>second: I will search</think><bbox>[0, 0, 56, 56]</bbox>"

    script = ["<search>1</search>", "unused", "<think>search again?</think><bbox>[0, 0, 50, 50]</bbox>"]
    script += ["<search>2</search>", "unused", "<answer>x</answer>"]
    policy = NextReplyPolicy(ScriptedPolicy(script), ScriptedPolicy(second))
    question, config = Question("q", "Why?", "x"), EnvironmentConfig(max_turns=9)
    (trajectory,) = rollout(policy, [question], CORPUS, FakeRetriever(CORPUS.page_ids), config)
    writers = ["second" if "second:" in reply.text else "planner" for reply in trajectory.replies]
    assert writers == ["planner", "second", "planner", "planner", "second", "planner"]  # T21: not after the word alone
    assert policy.counts == {"planner": 4, "second": 2} and heard == [CROP_ORDER, CROP_ORDER]
    assert all(CROP_ORDER not in turn.text for turn in trajectory.turns)


def test_next_reply_a_search_without_a_new_page_is_the_planners():
    turns = [*conversation(), Turn("assistant", "<search>x</search>"), Turn("user", "no new page")]
    policy = NextReplyPolicy(ScriptedPolicy(["planner"]), ScriptedPolicy(["second"]), instruction="")
    assert policy.generate([turns])[0].text == "planner"


def test_next_reply_seeds_stay_with_their_conversations():
    class Recorder(ScriptedPolicy):
        def generate(self, conversations, *, seeds=None):
            self.seeds = seeds
            return super().generate(conversations, seeds=seeds)

    planner, second = Recorder(["p"]), Recorder(["s"])
    policy = NextReplyPolicy(planner, second)
    replies = policy.generate([conversation(), conversation(IMAGE), conversation()], seeds=[1, 2, 3])
    assert [reply.text for reply in replies] == ["p", "s", "p"]
    assert planner.seeds == [1, 3] and second.seeds == [2]


def test_gold_pages_within_the_top_k_come_first_in_their_order():
    plain = FakeRetriever(["d_1", "d_2", "d_3", "d_4"])  # equal scores: by page id
    biased = GoldFirstRetriever(plain, ["d_4", "d_3"])
    assert [hit.page_id for hit in biased.search(["x"], 4)[0]] == ["d_3", "d_4", "d_1", "d_2"]
    assert [hit.page_id for hit in biased.search(["x"], 3)[0]] == ["d_3", "d_1", "d_2"]
    assert [hit.page_id for hit in biased.search(["x"], 2)[0]] == ["d_1", "d_2"]
    assert best_unseen(biased.search(["x"], 4)[0], {"d_3"}).page_id == "d_4"
    assert biased.page_ids == plain.page_ids and plain.search(["x"], 1)[0][0].page_id == "d_1"


@pytest.mark.parametrize(
    ("reply", "thought"),
    [
        ("<think>a</think> b <think>c</think><bbox>[1,2,3,4]</bbox>", "a c"),
        ("<think>a < b </and> c</think><bbox>[1,2,3,4]</bbox>", "a < b </and> c"),
        ("<think>never closed <bbox>[1,2,3,4]</bbox>", "never closed"),
        ("<think>the <bbox> tag</think><bbox>[1,2,3,4]</bbox>", "the <bbox> tag"),
        ("only words", "only words"),
        ("", ""),
    ],
)
def test_thought(reply, thought):
    assert thought_of(reply) == thought


@given(st.text(max_size=40), st.text(max_size=20))
def test_replacing_a_box_keeps_the_thought_and_stays_one_crop(thought, after):
    reply = f"<think>{thought}</think><bbox>[1, 2, 3, 4]</bbox>{after}"
    new = replace_box(reply, Box(5, 6, 70, 80))
    before, after_parse = parse_reply(reply), parse_reply(new)
    assert after_parse.kind is ActionKind.CROP and after_parse.box == Box(5, 6, 70, 80) != before.box
    assert thought_of(new) == thought_of(reply)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=4, max_size=4))
def test_a_box_on_the_image_opens_a_view(numbers):
    shown = IMAGE.view.shown
    box = box_on_image(Box(*numbers), shown)
    if box is not None:
        assert 0 <= box.x1 < box.x2 <= shown.width and 0 <= box.y1 < box.y2 <= shown.height
        IMAGE.view.crop(box, 56 * 56, 256 * 28 * 28)
        assert not isinstance(parse_reply(replace_box(CROP, box)), InvalidReason)
