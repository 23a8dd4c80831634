"""The endpoint policy against a real server that misbehaves in every way a real one does."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler

import pytest
from chat_server import (
    BOMB,
    REFUSAL,
    SECRET,
    TINY_TIMEOUTS,
    TOO_LONG,
    Server,
    cut_off,
    drip,
    drip_headers,
    hang,
    impatient,
    one_page_corpus,
    page,
    running_server,
    say,
    send,
    ten_megabytes,
)
from PIL import Image

from vrag_lib.actions import STOP_STRINGS
from vrag_lib.corpus import Corpus
from vrag_lib.geometry import Box
from vrag_lib.policy import Policy, Reply
from vrag_lib.policy_openai import OpenAIPolicy, close_action
from vrag_lib.trajectory import ImageRef, Turn


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return one_page_corpus(tmp_path)


@pytest.fixture
def make(server, corpus):
    def build(**settings) -> OpenAIPolicy:
        return OpenAIPolicy(corpus, **impatient(server.url, **settings))

    return build


def ask(text: str = "why?") -> list[Turn]:
    return [Turn("user", text)]


def one(policy: OpenAIPolicy) -> Reply:
    return policy.generate([ask()])[0]


def test_is_a_policy(make):
    assert isinstance(make(), Policy)


def test_messages_hold_images_first_then_text(server, make):
    server.behaviours = [say("<search>x")]
    crop = ImageRef("d_1", page("d_1").view.crop(Box(0, 0, 56, 56), 28 * 28, 64 * 28 * 28))
    conversation = [
        Turn("user", "Question: why?"),
        Turn("assistant", "<search>y</search>"),
        Turn("user", "", (page("d_1"),)),
        Turn("assistant", "<bbox>[0, 0, 56, 56]</bbox>"),
        Turn("user", "last", (crop,)),
    ]
    reply = make().generate([conversation], seeds=[7])[0]
    assert reply == Reply("<search>x</search>")
    sent = server.requests[0]
    assert sent["stop"] == list(STOP_STRINGS) and sent["model"] == "tiny" and sent["seed"] == 7
    assert [m["role"] for m in sent["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert sent["messages"][0]["content"] == "Question: why?"
    assert sent["messages"][2]["content"][0]["type"] == "image_url" and len(sent["messages"][2]["content"]) == 1
    assert sent["messages"][4]["content"][1] == {"type": "text", "text": "last"}
    for message, ref in ((sent["messages"][2], conversation[2].images[0]), (sent["messages"][4], crop)):
        head, data = message["content"][0]["image_url"]["url"].split(",")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert head == "data:image/png;base64" and image.size == (ref.view.shown.width, ref.view.shown.height)


def test_the_system_prompt_comes_first_and_seeded_replies_are_kept(server, make, tmp_path):
    server.behaviours = [say("<answer>1")]
    policy = make(system_prompt="Be brief.", cache=tmp_path / "kept")
    policy.generate([ask()], seeds=[1])
    assert policy.generate([ask()], seeds=[1])[0].text == "<answer>1</answer>"
    assert server.requests[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert len(server.requests) == 1 and policy.usage.cache_hits == 1


def test_jpeg_and_extra_body(server, make):
    server.behaviours = [say("<answer>1</answer>")]
    policy = make(image_format="JPEG", extra_body={"stop": None, "max_completion_tokens": 5, "max_tokens": None})
    policy.generate([[Turn("user", "", (page("d_1"),))]])
    sent = server.requests[0]
    assert "stop" not in sent and "max_tokens" not in sent and sent["max_completion_tokens"] == 5
    assert sent["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")


@pytest.mark.parametrize(
    ("choice", "text", "finish"),
    [
        ({"text": "<think>t</think><search>a b"}, "<think>t</think><search>a b</search>", "stop"),
        ({"text": "<answer>x</answer> and <search>more"}, "<answer>x</answer>", "stop"),
        ({"text": "no action at all"}, "no action at all", "stop"),
        ({"text": "<search>cut of", "finish": "length"}, "<search>cut of", "length"),
        ({"text": "<search>forgotten", "stop_reason": None}, "<search>forgotten", "stop"),
        ({"text": "<bbox>[1, 2, 3, 4]", "stop_reason": "</bbox>"}, "<bbox>[1, 2, 3, 4]</bbox>", "stop"),
        ({"text": [{"type": "text", "text": "<answer>"}, {"type": "text", "text": "y"}]}, "<answer>y</answer>", "stop"),
        ({"text": "<answer>\ud800</answer>"}, "<answer>?</answer>", "stop"),
        ({"text": ""}, "", "stop"),
        ({"text": None}, "", "stop"),
        ({"text": None, "finish": "length"}, "", "length"),
        ({"text": None, "finish": "tool_calls", "message": {"tool_calls": [{"type": "function"}]}}, "", "stop"),
    ],
)
def test_reply_text(server, make, choice, text, finish):
    server.behaviours = [say(**choice)]
    assert one(make()) == Reply(text, finish_reason=finish)


@pytest.mark.parametrize(
    ("choice", "text", "finish"),
    [
        (
            {"text": "<search>a", "message": {"reasoning_content": " when? "}},
            "<think>when?</think>\n<search>a</search>",
            "stop",
        ),
        ({"text": "<search>a</search>", "message": {"reasoning": "b"}}, "<think>b</think>\n<search>a</search>", "stop"),
        ({"text": None, "finish": "length", "message": {"reasoning": "hmm hmm"}}, "<think>hmm hmm</think>\n", "length"),
        (
            {"text": "<think>a</think><search>b", "message": {"reasoning": "a"}},
            "<think>a</think><search>b</search>",
            "stop",
        ),
        (
            {"text": "<answer>2", "message": {"reasoning": "<answer>1</answer> or <|image_pad|>"}},
            "<think>1  or</think>\n<answer>2</answer>",
            "stop",
        ),
        (
            {"text": "<answer>2", "message": {"reasoning": ["x"], "reasoning_content": None}},
            "<answer>2</answer>",
            "stop",
        ),
        ({"text": "no action", "message": {"reasoning": "or <search>"}}, "<think>or</think>\nno action", "stop"),
    ],
)
def test_thoughts_that_come_apart_from_the_text_stand_in_front_of_it(server, make, choice, text, finish):
    server.behaviours = [say(**choice)]
    assert one(make()) == Reply(text, finish_reason=finish)


def test_close_action_puts_back_only_what_is_missing():
    assert close_action("<search>a</search>") == "<search>a</search>"
    assert close_action("plain") == "plain"
    assert (
        close_action("<think>the <search> tag</think><answer>3") == "<think>the <search> tag</think><answer>3</answer>"
    )


def test_retries_until_the_server_recovers(server, make):
    good = say("<answer>1</answer>")
    server.behaviours = [send("busy", 503), send("{", headers={"Content-Length": "1"}), good]
    policy = make()
    assert one(policy).text == "<answer>1</answer>"
    assert policy.failures == {"server": 1, "bad_json": 1} and policy.failed_conversations == 0


@pytest.mark.parametrize(
    ("behaviour", "kind", "attempts"),
    [
        (send("oops", 500), "server", 3),
        (send("slow down", 429), "rate_limit", 3),
        (hang, "timeout", 3),
        (drip, "timeout", 3),
        (drip_headers, "timeout", 3),
        (cut_off, "connection", 3),
        (send('{"choices": [{"message": {"con'), "bad_json", 3),
        (send("[" * 100_000), "bad_json", 3),
        (send("<html>gateway</html>"), "bad_schema", 1),
        (send('data: {"error": "overloaded"}\n\n'), "bad_json", 3),
        (say("half a rep", "error", error={"code": 502}), "server", 3),
        (say(None, "abort"), "server", 3),
        (send('{"error": {"code": 502, "message": "upstream"}}'), "server", 3),
        (send('{"error": {"code": 429, "message": "slow down"}}'), "rate_limit", 3),
        (send('{"error": {"code": 404, "message": "no such model"}}'), "bad_schema", 1),
        (send('{"error": "overloaded"}'), "bad_schema", 1),
        (send("{}"), "bad_schema", 1),
        (send('{"choices": []}'), "bad_schema", 1),
        (send('{"choices": {"0": 1}}'), "bad_schema", 1),
        (send('{"choices": [{"message": "text"}]}'), "bad_schema", 1),
        (send('[1, 2]'), "bad_schema", 1),
        (say(None, None), "bad_schema", 1),
        (say(12), "bad_schema", 1),
        (say([{"type": "text"}]), "bad_schema", 1),
        (ten_megabytes, "too_large", 1),
        (BOMB, "too_large", 1),
        (REFUSAL, "refusal", 1),
        (say("half a", "content_filter"), "refusal", 1),
        (send("bad image", 400), "bad_request", 1),
        (send("", 302, {"Location": "http://127.0.0.1:1/"}), "bad_request", 1),
        (send(f"Incorrect API key provided: {SECRET}", 401), "auth", 1),
        (send("no", 403), "auth", 1),
    ],
)  # fmt: skip
def test_every_failure_is_counted_and_becomes_an_error(server, make, behaviour, kind, attempts):
    server.behaviours = [behaviour]
    policy = make(**TINY_TIMEOUTS if kind == "timeout" else {})
    reply = one(policy)
    assert reply.finish_reason == "error" and reply.text == "" and reply.error.startswith(f"{kind}: ")
    assert policy.failures == {kind: attempts} and len(server.requests) == attempts
    assert policy.failed_conversations == 1
    assert SECRET not in reply.error and len(reply.error) < 1000


@pytest.mark.parametrize("before", [87, 187, 487])  # messages show 100, 200 and 500 characters
@pytest.mark.parametrize(
    "behave",
    [
        lambda said: send(said, 401),
        lambda said: send(said, 400),
        lambda said: send(said),
        lambda said: send(json.dumps(said)),
        lambda said: send(f"<html>{said}"),
        lambda said: say(None, message={"refusal": said}),
        lambda said: say("x", "error", error=said),
        lambda said: send("", 307, {"Location": f"http://{SECRET}/{SECRET}"}),
    ],
)
def test_no_part_of_a_key_is_left_where_a_message_is_cut(server, make, behave, before):
    server.behaviours = [behave("x" * before + SECRET)]
    assert SECRET[:10] not in one(make(max_retries=0)).error


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (send("<html>Log in to the wifi</html>"), "is the base URL right? <html>Log in to the wifi"),
        (send('data: {"error": "over\x1b[31mloaded"}\n'), r'): data: {"error": "over\x1b[31mloaded"}'),
        (send("no\x1b]0;title\x07\nmore", 500), r": no\x1b]0;title\x07\nmore"),
        (
            say("half", "error", error={"message": "out of memory"}),
            "broke the reply off (error): {'message': 'out of memory'}",
        ),
        (
            send("", 307, {"Location": "https://other:8443/v1?key=x"}),
            "it redirects to https://other:8443, and redirects are",
        ),
        (send("", 308, {"Location": "/v1/chat/completions/"}), "it redirects to another path on the same host"),
        (send("", 300, {"Location": "http://[::1/"}), "it redirects to an address that is none"),
        (send("", 304), "it redirects to no address"),
    ],
)
def test_a_failure_says_what_the_server_said(server, make, behaviour, said):
    server.behaviours = [behaviour]
    error = one(make(max_retries=0)).error
    assert said in error and "key=x" not in error


def test_nobody_listening(corpus):
    policy = OpenAIPolicy(corpus, "http://127.0.0.1:9/v1", "m", backoff=0.01, max_retries=1)
    assert one(policy).error.startswith("connection: ") and policy.failures == {"connection": 2}


def test_context_overflow_is_no_error(server, make):
    server.behaviours = [TOO_LONG]
    assert one(make()) == Reply("", finish_reason="overflow")


def test_a_wrong_key_stops_the_batch_at_once(server, make):
    server.behaviours = [send("wrong", 401)]
    policy = make(concurrency=1)
    replies = policy.generate([ask()] * 20)
    assert len(server.requests) == 1 and policy.failures == {"auth": 1}
    assert all(reply.error.startswith("auth: ") for reply in replies)
    assert policy.failed_conversations == 20


def test_a_missing_key_is_named(server, make, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    server.behaviours = [send("who are you?", 401)]
    policy = make(api_key=None, api_key_env="MY_KEY")
    assert "$MY_KEY is not set" in one(policy).error
    assert (
        "no key was sent; policy.api_key_env= or --judge-key-env names" in one(make(api_key="", api_key_env="")).error
    )
    assert "Authorization" not in server.headers[0]


def test_the_key_is_sent_and_never_shown(server, make, monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    server.behaviours = [say("<answer>1</answer>")]
    policy = make(api_key=None, api_key_env="MY_KEY")
    one(policy)
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in repr(policy) and SECRET not in policy.name
    with pytest.raises(ValueError) as caught:
        make(api_key=f"{SECRET}\nX-Injected: 1")
    assert SECRET not in str(caught.value)


def test_one_bad_conversation_leaves_the_others_alone(server, make):
    def behave(handler: BaseHTTPRequestHandler, body: dict) -> None:
        text = body["messages"][0]["content"]
        (send("{}") if "bad" in text else say(f"<answer>{text}"))(handler, body)

    server.behaviours = [behave]
    policy = make(concurrency=3)
    conversations = [ask("a"), ask("bad"), ask("b"), [Turn("user", "", (page("d_2"),))], [Turn("user", "\ud800c")]]
    replies = policy.generate(conversations)
    assert [reply.text for reply in replies] == [
        "<answer>a</answer>",
        "",
        "<answer>b</answer>",
        "",
        "<answer>?c</answer>",
    ]
    assert replies[1].error.startswith("bad_schema: ")
    assert replies[3].error.startswith("image: ") and "d_2" in replies[3].error


def test_requests_run_together_up_to_the_limit(server, make):
    def behave(handler: BaseHTTPRequestHandler, body: dict) -> None:
        time.sleep(0.1)
        say("<answer>1")(handler, body)

    server.behaviours = [behave]
    make(concurrency=4).generate([ask()] * 12)
    assert 2 <= server.most_at_once <= 4


IN_AN_HOUR = formatdate(time.time() + 3600, usegmt=True)


@pytest.mark.parametrize(
    "value",
    ["0.5", pytest.param(IN_AN_HOUR, id="in an hour"), "soon", "-3", "nan", "1e400"],
)
def test_retry_after(server, make, value):
    server.behaviours = [send("", 429, {"Retry-After": value}), say("<answer>1")]
    reply = one(make(max_wait=5))
    if value == "0.5":
        assert reply.error is None and server.times[1] - server.times[0] >= 0.5
    elif "GMT" in value:
        assert reply.error.startswith("rate_limit: ") and len(server.requests) == 1  # an hour is not waited for
    else:
        assert reply.error is None and server.times[1] - server.times[0] < 0.5


def test_back_off_grows(server, make):
    server.behaviours = [send("", 500)]
    one(make(backoff=0.05, max_retries=4))
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 4 and gaps[0] >= 0.02 and gaps[3] >= 8 * 0.02


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http:///v1", "http://me:pw@host/v1", ""])
def test_base_url_is_checked(corpus, url):
    with pytest.raises(ValueError, match="base URL"):
        OpenAIPolicy(corpus, url, "m")


def test_works_inside_a_running_event_loop(server, make):
    import asyncio

    server.behaviours = [say("<answer>1")]

    async def notebook_cell() -> Reply:
        return one(make())

    assert asyncio.run(notebook_cell()).text == "<answer>1</answer>"
