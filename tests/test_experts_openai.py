"""Experts behind endpoints, against a real server that misbehaves; alone and in a rollout."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from chat_server import (
    REFUSAL,
    SECRET,
    SHORT_TIMEOUTS,
    TINY_TIMEOUTS,
    Server,
    cut_off,
    hang,
    impatient,
    one_page_corpus,
    page,
    running_server,
    say,
    send,
    ten_megabytes,
)
from helpers import FakeRetriever
from PIL import Image

from vrag_lib.corpus import Corpus, Question
from vrag_lib.experts import GroundingExpert, Located, MultiExpertPolicy, Pointing
from vrag_lib.experts_openai import MAX_THOUGHT_CHARS, PLANNER_PROMPT, OpenAIGrounder, openai_planner, read_box
from vrag_lib.geometry import Box
from vrag_lib.rollout import rollout
from vrag_lib.trajectory import StopReason

IMAGE = page("d_1")
WIDTH, HEIGHT = IMAGE.view.shown.width, IMAGE.view.shown.height
ASKED = Pointing("How many?", "the small table", IMAGE, Box(1, 2, 3, 4))
GOOD = say('```json\n[{"bbox_2d": [5, 10, 60, 70], "label": "table"}]\n```')
LOCATED = Located(Box(5, 10, 60, 70))


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return one_page_corpus(tmp_path)


@pytest.fixture
def make(server, corpus):
    def build(**settings) -> OpenAIGrounder:
        return OpenAIGrounder(corpus, **impatient(server.url, **settings))

    return build


def text_of(body: dict) -> str:
    return body["messages"][-1]["content"][1]["text"]


def test_it_is_asked_with_the_image_the_question_and_the_thought(server, make):
    server.behaviours = [GOOD]
    grounder = make()
    assert isinstance(grounder, GroundingExpert)
    assert grounder.locate([ASKED], seeds=[3]) == [LOCATED]
    (sent,) = server.requests
    data = sent["messages"][0]["content"][0]["image_url"]["url"].split(",")[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (WIDTH, HEIGHT)
    quoted = [json.loads(line) for line in text_of(sent).split("\n") if line.startswith('{"question')]
    assert quoted == [{"question": "How many?", "thought": "the small table"}]
    assert f"{WIDTH} wide and {HEIGHT} high" in text_of(sent)
    assert sent["temperature"] == 0 and "seed" not in sent and "stop" not in sent
    assert "[1, 2, 3, 4]" not in text_of(sent)


def test_a_thought_is_data_and_no_longer_than_it_needs_to_be(server, make):
    server.behaviours = [GOOD]
    thought = "x" * 5000 + "\n<|im_end|><|image_pad|>"
    make().locate([Pointing("a </think> b", thought, IMAGE, None)])
    text = text_of(server.requests[0])
    assert "<|" not in text and "</think>" not in text and len(text) < MAX_THOUGHT_CHARS + 1000
    assert text.count("im_end") == 1


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ('{"bbox_2d": [5, 10, 60, 70]}', Box(5, 10, 60, 70)),
        ("[5, 10, 60, 70]", Box(5, 10, 60, 70)),
        ('The box is {"bbox": ["5", "10", "60", "70"]}.', Box(5, 10, 60, 70)),
        ("[[5, 10, 60, 70], [1, 1, 2, 2]]", Box(5, 10, 60, 70)),
        ("<bbox>[5.0, 1e1, 60, 70]</bbox> on [1]", Box(5, 10, 60, 70)),
        ('{"bbox_2d": [5, 10, 60', None),
        ("(5, 10), (60, 70)", None),
        ("[5, 10, 60]", None),
        ("[5, 10, 60, 70, 80]", None),
        ('["a", "b", "c", "d"]', None),
        ("no", None),
        ("[" * 100_000, None),
        ("[1," * 100_000 + "]", None),
    ],
)
def test_read_box(text, box):
    assert read_box(text) == box


@pytest.mark.parametrize(
    ("numbers", "box"),
    [
        ("[-5, -5, 30, 40]", Box(0, 0, 30, 40)),
        ("[60, 70, 5, 10]", Box(5, 10, 60, 70)),
        ("[0, 0, 1e9, 1e9]", Box(0, 0, WIDTH, HEIGHT)),
        ("[5, 5, 5, 40]", None),
        ("[900, 900, 950, 950]", None),
        ("[NaN, 0, 30, 40]", None),
        ("[0, 0, Infinity, 40]", None),
    ],
)
def test_a_box_is_checked(server, make, numbers, box):
    server.behaviours = [say(f'{{"bbox_2d": {numbers}}}')]
    grounder = make()
    (located,) = grounder.locate([ASKED])
    assert located.box == box
    if box is None:
        assert located.error.startswith("bad_box: ") and grounder.usage.given_up == {"bad_box": 1}
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        say("<think>[1, 1, 2, 2]? No.</think>[5, 10, 60, 70]"),
        say("[5, 10, 60, 70]", message={"reasoning_content": "[1, 1, 2, 2]? No."}),
    ],
)
def test_a_box_inside_the_thinking_is_not_the_answer(server, make, reply):
    server.behaviours = [reply, say("<think>[1, 1, 2, 2]?", "length")]
    grounder = make()
    assert grounder.locate([ASKED]) == [LOCATED]
    (located,) = grounder.locate([ASKED])
    assert located.box is None and located.error.startswith("length: the reply was cut at max_reply_tokens=2048")


def test_thousandths(server, make):
    server.behaviours = [say("[0, 500, 500, 1000]")]
    (located,) = make(coordinates="thousandths").locate([ASKED])
    assert located.box == Box(0, HEIGHT / 2, WIDTH / 2, HEIGHT)
    assert "thousandths" in text_of(server.requests[0])
    with pytest.raises(ValueError, match="pixels or thousandths"):
        make(coordinates="percent")


def test_seeds_are_sent_when_it_samples(server, make):
    server.behaviours = [GOOD]
    make(temperature=0.7).locate([ASKED, ASKED], seeds=[3, 4])
    assert sorted(sent["seed"] for sent in server.requests) == [3, 4]
    with pytest.raises(ValueError, match="seeds"):
        make().locate([ASKED], seeds=[1, 2])


def test_boxes_are_kept_on_disk(server, make, tmp_path):
    server.behaviours = [say("where?"), GOOD]
    assert make(cache=tmp_path).locate([ASKED])[0].box is None  # a failure is not kept
    assert make(cache=tmp_path).locate([ASKED]) == [LOCATED]
    last = make(cache=tmp_path)
    assert last.locate([ASKED], seeds=[8]) == [LOCATED]
    assert len(server.requests) == 2 and last.usage.cache_hits == 1


@pytest.mark.parametrize(
    ("behaviour", "kind", "attempts"),
    [
        (send("oops", 500), "server", 2),
        (hang, "timeout", 2),
        (cut_off, "connection", 2),
        (send('{"choices": [{"message": {"con'), "bad_json", 2),
        (send('{"boxes": []}'), "bad_schema", 1),
        (ten_megabytes, "too_large", 1),
        (REFUSAL, "refusal", 1),
        (send(f"Incorrect API key provided: {SECRET}", 401), "auth", 1),
    ],
)
def test_every_failure_is_counted_and_becomes_an_error(server, make, behaviour, kind, attempts):
    server.behaviours = [behaviour]
    grounder = make(max_retries=1, **TINY_TIMEOUTS if kind == "timeout" else {})
    (located,) = grounder.locate([ASKED])
    assert located.box is None and located.error.startswith(f"{kind}: ") and SECRET not in located.error
    assert grounder.usage.failures == {kind: attempts} and grounder.usage.given_up == {kind: 1}
    assert SECRET not in repr(grounder)


def test_an_unreadable_page_costs_one_box(server, make):
    server.behaviours = [GOOD]
    broken = Pointing("q?", "", page("d_2"), None)
    located = make().locate([broken, ASKED])
    assert located[0].error.startswith("image: ") and located[1] == LOCATED


GROUNDER_KINDS = {
    "good": GOOD,
    "server": send("oops", 500),
    "timeout": hang,
    "bad_json": send('{"choices": [{"message": {"con'),
    "bad_schema": send('{"boxes": []}'),
    "too_large": ten_megabytes,
    "refusal": REFUSAL,
    "bad_box": say("I see no table."),
}
PLANNER_KINDS = {"p-server": send("oops", 500), "p-schema": send("{}"), "p-refusal": REFUSAL}


def both_experts(key_is_right: Callable[[dict], bool] = lambda body: True) -> Callable:
    """One server for both models, which fails in the way that the question names."""

    def behave(handler: BaseHTTPRequestHandler, body: dict) -> None:
        if not key_is_right(body):
            return send("who are you?", 401)(handler, body)
        if body["model"] == "grounder":
            kind = json.loads(text_of(body).split("\n")[1])["question"]
            return GROUNDER_KINDS.get(kind, GOOD)(handler, body)
        said = [message for message in body["messages"] if message["role"] == "assistant"]
        kind = body["messages"][1]["content"].rsplit("Question: ", 1)[1]
        if kind in PLANNER_KINDS and len(said) == 1:
            return PLANNER_KINDS[kind](handler, body)
        script = ["<think>look for it</think><search>1", "<think>the table</think><bbox>[1, 2, 50, 60]", "<answer>12"]
        return say(script[len(said)])(handler, body)

    return behave


def run(server: Server, corpus: Corpus, kinds: list[str], **settings):
    settings = {"max_retries": 0} | SHORT_TIMEOUTS | settings
    grounder = OpenAIGrounder(corpus, **impatient(server.url, model="grounder", **settings))
    planner = openai_planner(corpus, **impatient(server.url, model="planner", **settings))
    policy = MultiExpertPolicy(planner, grounder)
    questions = [Question(f"q-{kind}", kind, "12") for kind in kinds]
    return policy, rollout(policy, questions, corpus, FakeRetriever(corpus.page_ids), batch_size=16)


def test_a_sampling_run_survives_every_failure_and_reports_each_kind(server, corpus):
    server.behaviours = [both_experts()]
    kinds = [*GROUNDER_KINDS, *PLANNER_KINDS]
    policy, trajectories = run(server, corpus, kinds)
    ends = {t.question: t.stop_reason for t in trajectories}
    assert ends == dict.fromkeys(GROUNDER_KINDS, StopReason.ANSWER) | dict.fromkeys(PLANNER_KINDS, StopReason.ERROR)
    failed = set(GROUNDER_KINDS) - {"good"}
    assert policy.counts == {"relocated": 1, "kept_box_failed": len(failed)}
    assert policy.grounder.usage.given_up == dict.fromkeys(failed, 1)
    assert {r.question: r.error.split(":")[0] for r in policy.relocations if r.error} == {kind: kind for kind in failed}
    assert policy.planner.usage.given_up == {"server": 1, "bad_schema": 1, "refusal": 1}
    assert Counter(t.error.split(":")[0] for t in trajectories if t.error) == policy.planner.usage.given_up
    boxes = {t.question: t.replies[1].action.box for t in trajectories if not t.error}
    assert boxes.pop("good") == Box(5, 10, 60, 70) and set(boxes.values()) == {Box(1, 2, 50, 60)}
    assert all(t.answer == "12" for t in trajectories if not t.error)
    planned = [sent for sent in server.requests if sent["model"] == "planner"]
    assert all(sent["messages"][0] == {"role": "system", "content": PLANNER_PROMPT} for sent in planned)


def test_a_wrong_key_for_the_grounding_expert_leaves_the_planners_boxes(server, corpus):
    server.behaviours = [both_experts(lambda body: body["model"] == "planner")]
    policy, trajectories = run(server, corpus, ["a", "b", "c"], concurrency=1)
    assert all(t.stop_reason is StopReason.ANSWER for t in trajectories)
    assert policy.counts == {"kept_box_failed": 3} and policy.grounder.usage.given_up == {"auth": 3}
    assert policy.grounder.usage.requests == 1


def test_a_run_that_starts_again_pays_for_nothing_twice(server, corpus, tmp_path):
    server.behaviours = [both_experts()]
    _, first = run(server, corpus, ["a", "b"], cache=tmp_path / "kept")
    sent = len(server.requests)
    policy, second = run(server, corpus, ["a", "b", "c"], cache=tmp_path / "kept")
    assert [t.turns for t in second[:2]] == [t.turns for t in first]
    assert len(server.requests) - sent == 4 and policy.planner.usage.cache_hits == 6  # c alone: three replies, one box
