"""The endpoint client: replies kept on disk, costs, and texts of others quoted as data. Its failures are tested where
they matter, in the tests of the policy, the grounding expert and the judge."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from chat_server import SECRET, Server, impatient, one_page_corpus, page, running_server, say, send
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vrag_lib.endpoint import (
    Completion,
    Endpoint,
    EndpointError,
    Request,
    Usage,
    cancel_requests,
    image_parts,
    quote_data,
)


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def cached(server, tmp_path):
    """Endpoints that all keep their replies in one folder."""

    def build(**settings) -> Endpoint:
        return Endpoint(**impatient(server.url, cache=tmp_path / "kept") | settings)

    return build


def request(text: str = "why?", seed: int | None = None) -> Request[str]:
    return Request(lambda: [{"role": "user", "content": text}], lambda completion: completion.text, seed)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_kept_reply_costs_no_request(server, cached):
    server.behaviours = [say("yes")]
    first, second = cached(), cached()
    assert first.ask([request("a"), request("b")]) == ["yes", "yes"]
    server.behaviours = [send("", 500)]
    assert second.ask([request("b"), request("a")]) == ["yes", "yes"]
    assert len(server.requests) == 2
    assert (first.usage.requests, first.usage.cache_hits) == (2, 0)
    assert (second.usage.requests, second.usage.cache_hits) == (0, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "other"},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"max_reply_tokens": 7},
        {"extra_body": {"repetition_penalty": 1.1}},
    ],
)
def test_a_reply_is_not_found_again_under_other_settings(server, cached, settings):
    server.behaviours = [say("first"), say("second")]
    assert cached().ask([request(seed=1)]) == ["first"]
    assert cached(**settings).ask([request(seed=1)]) == ["second"]


def test_a_reply_is_not_found_again_for_another_seed_or_address(server, cached):
    server.behaviours = [say("first"), say("second"), say("third")]
    assert cached().ask([request(seed=1)]) == ["first"]
    assert cached().ask([request(seed=2)]) == ["second"]
    assert cached(base_url=server.url.replace("127.0.0.1", "localhost")).ask([request(seed=1)]) == ["third"]


def test_images_count_by_their_content(server, cached, tmp_path):
    server.behaviours = [say("white"), say("black")]

    def look() -> list:
        part = image_parts(one)(page("d_1"))
        return cached().ask([Request(lambda: [{"role": "user", "content": [part]}], lambda c: c.text)])

    one = one_page_corpus(tmp_path)
    assert look() == ["white"] and look() == ["white"]
    Image.new("RGB", (100, 140), "black").save(tmp_path / "p.png")
    assert look() == ["black"]


def test_what_is_sampled_without_a_seed_is_asked_anew(server, cached, tmp_path):
    server.behaviours = [say("heads"), say("tails"), say("third")]
    assert cached(temperature=1.0).ask([request()]) == ["heads"]
    assert cached(temperature=1.0).ask([request()]) == ["tails"]
    assert cached(extra_body={"temperature": None}).ask([request()]) == ["third"]
    assert not files(tmp_path)


def test_failures_and_replies_that_do_not_read_are_not_kept(server, cached, tmp_path):
    def read(completion: Completion) -> str:
        if completion.text == "nonsense":
            raise EndpointError("bad_verdict", "nonsense")
        return completion.text

    ask = [Request(request().messages, read)]
    server.behaviours = [send("no", 400), say("nonsense"), say("nonsense"), say("yes")]
    endpoint = cached(max_retries=1)
    assert endpoint.ask(ask)[0].kind == "bad_request"
    failed = endpoint.ask(ask)[0]
    assert isinstance(failed, EndpointError) and str(failed) == "bad_verdict: nonsense (tried 2 times)"
    assert not files(tmp_path)
    assert endpoint.ask(ask) == ["yes"] and len(files(tmp_path)) == 1
    assert endpoint.usage.failures == {"bad_request": 1, "bad_verdict": 2}
    assert endpoint.usage.given_up == {"bad_request": 1, "bad_verdict": 1}


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"text": "x"}', b'{"text": 1, "finish_reason": "", "x": 2}', b"\xff"]
)
def test_a_damaged_file_is_asked_again_and_written_anew(server, cached, tmp_path, damage):
    server.behaviours = [say("one"), say("two")]
    cached().ask([request()])
    (file,) = files(tmp_path)
    file.write_bytes(damage)
    assert cached().ask([request()]) == ["two"] and cached().ask([request()]) == ["two"]


def test_thoughts_are_kept_and_replies_from_before_they_were_are_found(server, cached, tmp_path):
    server.behaviours = [say("yes", message={"reasoning_content": f"why not, {SECRET}?"})]
    ask = [Request(request().messages, lambda completion: (completion.text, completion.thoughts))]
    assert cached().ask(ask) == cached().ask(ask) == [("yes", "why not, [key]?")]
    (file,) = files(tmp_path)
    file.write_text(json.dumps({"text": "old", "finish_reason": "stop", "end_of_turn": False}))
    assert cached().ask(ask) == [("old", "")] and len(server.requests) == 1


def test_a_reply_that_is_cut_before_its_result_says_so_and_is_not_asked_again(server, cached, tmp_path):
    def read(completion: Completion) -> str:
        if completion.text != "yes":
            raise EndpointError("bad_verdict", "no yes")
        return completion.text

    server.behaviours = [say("", "length"), say("yes", "length")]
    endpoint = cached(max_reply_tokens=77)
    (failed,) = endpoint.ask([Request(request().messages, read)])
    assert failed.kind == "length" and "max_reply_tokens=77 (raise it, or let the model think less): no yes" in str(
        failed
    )
    assert len(server.requests) == 1 and not files(tmp_path)
    assert endpoint.ask([Request(request().messages, read)]) == ["yes"]


def test_a_folder_that_cannot_be_written_costs_no_reply(server, cached, tmp_path):
    (tmp_path / "file").write_text("in the way")
    server.behaviours = [say("paid for")]
    endpoint = cached(cache=tmp_path / "file")
    assert endpoint.ask([request()]) == ["paid for"] and endpoint.usage.failures == {"cache": 1}


def test_the_folder_of_the_project_is_the_default_choice(server, tmp_path, monkeypatch):
    monkeypatch.setenv("VRAG_CACHE", str(tmp_path))
    server.behaviours = [say("x")]
    Endpoint(**impatient(server.url, cache="auto")).ask([request()])
    (file,) = files(tmp_path / "endpoint")
    assert json.loads(file.read_bytes()) == {
        "model": "tiny",
        "text": "x",
        "finish_reason": "stop",
        "end_of_turn": False,
        "thoughts": "",
    }


def test_the_key_reaches_no_file_and_no_result(server, cached, tmp_path):
    server.behaviours = [say(f"your key is {SECRET}")]
    endpoint = cached()
    assert endpoint.ask([request(f"my key is {SECRET}")]) == ["your key is [key]"]
    (file,) = files(tmp_path)
    assert SECRET.encode() not in file.read_bytes() and SECRET not in file.name
    assert SECRET not in repr(vars(endpoint.usage))


def test_a_placeholder_for_a_key_is_not_cut_from_texts(server, cached):
    server.behaviours = [say("the cell is EMPTY")]
    assert cached(api_key="EMPTY").ask([request()]) == ["the cell is EMPTY"]


def told(usage: object):
    body = {"choices": [{"message": {"content": "x", "refusal": None}}], "usage": usage}
    return send(json.dumps(body))


def test_tokens_and_cost_are_what_the_server_says(server, cached):
    server.behaviours = [told({"prompt_tokens": 3000, "completion_tokens": 200, "total_tokens": 3200})]
    endpoint = cached(prompt_price=2.0, completion_price=10.0)
    endpoint.ask([request("a"), request("b")])
    endpoint.ask([request("a")])
    usage = endpoint.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.without_usage) == (6000, 400, 0)
    assert usage.cost == pytest.approx(0.016)
    assert json.loads(json.dumps(usage.as_dict()))["cache_hits"] == 1


def test_a_refusal_is_paid_for_as_well(server, cached):
    refusal = {"choices": [{"message": {"content": None, "refusal": "no"}}]}
    server.behaviours = [send(json.dumps(refusal | {"usage": {"prompt_tokens": 5, "completion_tokens": 2}}))]
    endpoint = cached()
    assert endpoint.ask([request()])[0].kind == "refusal" and endpoint.usage.prompt_tokens == 5


@pytest.mark.parametrize(
    "usage",
    [None, [], "many", {"prompt_tokens": 1}, {"prompt_tokens": -1, "completion_tokens": 2}]
    + [{"prompt_tokens": value, "completion_tokens": 1} for value in (True, 1.5, "3", 10**30)],
)
def test_counts_that_make_no_sense_are_not_added(server, cached, usage):
    server.behaviours = [told(usage)]
    endpoint = cached()
    assert endpoint.ask([request()]) == ["x"]
    assert (endpoint.usage.prompt_tokens, endpoint.usage.without_usage) == (0, 1)


def test_usage_counts_from_several_threads():
    usage = Usage()

    def count() -> None:
        for _ in range(500):
            usage.add(failure="server", requests=1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert usage.requests == 2000 and usage.failures == {"server": 2000}


def slowly(handler: BaseHTTPRequestHandler, body: dict) -> None:
    time.sleep(0.1)
    say("yes")(handler, body)


@pytest.mark.parametrize("shared", [False, True])
def test_the_limit_holds_across_threads_and_for_endpoints_that_share_it(server, cached, shared):
    server.behaviours = [slowly]
    if shared:
        limit = asyncio.Semaphore(2)
        endpoints = [cached(cache=None, concurrency=limit) for _ in range(4)]
    else:
        endpoints = [cached(cache=None, concurrency=2)] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda endpoint: endpoint.ask([request()] * 3), endpoints))
    assert found == [["yes"] * 3] * 4 and server.most_at_once == 2


def test_an_error_of_the_reader_is_passed_on_and_stops_the_others(server, cached):
    def read(completion: Completion) -> str:
        raise ZeroDivisionError

    server.behaviours = [slowly]
    with pytest.raises(ZeroDivisionError):
        cached(concurrency=1).ask([Request(request().messages, read), *map(request, "abcdef")])
    time.sleep(0.3)
    assert len(server.requests) <= 2


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from vrag_lib.judge_openai import OpenAIJudge
judge = OpenAIJudge(sys.argv[1], "tiny", cache=sys.argv[2], concurrency=2)
try:
    judge.many([("q?", "12", str(i)) for i in range(100)])
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_stops_what_is_queued_and_keeps_what_has_come(server, tmp_path):
    def judge(handler: BaseHTTPRequestHandler, body: dict) -> None:
        time.sleep(0.1)
        say("<judge>True</judge>")(handler, body)

    server.behaviours = [judge]
    command = [sys.executable, "-c", INTERRUPTED, server.url, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        while len(server.requests) < 8 and asking.poll() is None:
            time.sleep(0.01)
        asking.send_signal(signal.SIGINT)
        said = asking.communicate(timeout=60)[0]
    assert said == "interrupted\n" and asking.returncode == 0
    assert len(server.requests) <= 50 and 4 <= len(files(tmp_path)) < len(server.requests)


def test_what_other_threads_wait_for_can_be_cancelled(server, cached):
    server.behaviours = [slowly]
    endpoint = cached(concurrency=1)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(endpoint.ask, [request(f"{i} {n}?") for n in range(50)]) for i in range(2)]
        while len(server.requests) < 2:
            time.sleep(0.01)
        cancel_requests()
        assert all(isinstance(work.exception(timeout=10), CancelledError) for work in asked)
    assert len(server.requests) <= 6  # of 100


def test_nothing_asked_nothing_sent(server, cached):
    assert cached().ask([]) == [] and not server.requests


@given(st.text(max_size=60))
def test_quoted_data_can_be_read_back_and_closes_nothing(text):
    quoted = quote_data({"answer": text})
    readable = text.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")
    assert json.loads(quoted) == {"answer": readable}
    assert not set("<>|`") & set(quoted) and len(quoted.splitlines()) == 1


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999/v1", "http://[::1/v1", "ftp://host/v1", "http://a:b@host/v1", "http://:b@host/v1"]
)
def test_an_address_that_cannot_be_one_is_refused_at_once(url):
    with pytest.raises(ValueError, match=r"the base URL (is no address|holds a user name)") as error:
        Endpoint(url, "tiny")
    assert url not in str(error.value)
