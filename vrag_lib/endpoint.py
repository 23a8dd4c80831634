"""Requests to any server that speaks OpenAI's chat completions with images (vLLM, SGLang, a hosted model): what the
endpoint policy, the grounding expert and the model judge share.

Deviations from the released code: the format that servers speak (trap S3, S9); retries are bounded and every failure
is counted by kind (S2), so one bad request costs one result; replies can be kept on disk, so a killed run that starts
again pays only for what it lacks.

A failure's kind is one of these. The first six are tried again, after exponential back-off:

    rate_limit   429; waits as long as Retry-After says
    server       5xx, or a reply that the server broke off
    timeout      no connection, no data or no end in time
    connection   refused, reset, cut off
    bad_json     the reply is not JSON, often because it was cut off
    bad_verdict  a judge's reply holds no verdict, or two that differ
    bad_box      a grounding expert's reply holds no box inside the image
    bad_schema   JSON, but not a chat completion; or a web page
    too_large    the reply is longer than the cap
    length       the reply was cut at `max_reply_tokens` before it said what was asked for
    refusal      the model or a filter refuses to answer
    overflow     the context is too long for the server
    image        a page image cannot be read
    auth         the key is missing or wrong; the rest of the batch is not sent
    bad_request  any other 3xx or 4xx
    cache        a reply was good but could not be kept on disk; counted, nothing else is lost
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from vrag_lib.config import cache_dir
from vrag_lib.endpoint_reply import Completion, EndpointError, completion_of, http_failure, read_body
from vrag_lib.rendering import read_json, write_atomically
from vrag_lib.settings import check_url
from vrag_lib.trajectory import ImageRef, clean_text

if TYPE_CHECKING:
    import ssl

    import httpx

    from vrag_lib.corpus import Corpus

T = TypeVar("T")

_TRIED_AGAIN = frozenset({"rate_limit", "server", "timeout", "connection", "bad_json", "bad_verdict"})
_ENCODED_IMAGES = 64
"""Images kept encoded between calls, about 0.5 MB each: a conversation sends all of its images every turn."""

_LEAST_SECRET = 8
"""A shorter key is a placeholder such as `EMPTY`, which local servers want, and is not searched for in texts."""

Message = dict[str, Any]
"""One message of a request, as the server wants it."""


@dataclass(frozen=True)
class Request(Generic[T]):
    """What is asked, and how a reply to it is read.

    messages: makes the messages when it is their turn, so that a long list of requests holds no images. read: the
    result; raises EndpointError for a reply that is not what was asked for. Both may run in other threads.
    """

    messages: Callable[[], list[Message]]
    read: Callable[[Completion], T]
    seed: int | None = None


@dataclass
class Usage:
    """What was asked for and what it cost.

    requests: attempts sent. cache_hits: results that needed none. prompt_tokens, completion_tokens: as the servers'
    replies say, failed ones too; without_usage: completions that did not say. failures: failed attempts by kind;
    given_up: requests without a result by kind. Prices are in money per million tokens.

    >>> usage = Usage(prompt_price=0.5, completion_price=2.0)
    >>> usage.add(requests=1, prompt_tokens=1_000_000, completion_tokens=100_000)
    >>> usage.cost
    0.7
    """

    prompt_price: float = 0.0
    completion_price: float = 0.0
    requests: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    given_up: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, failure: str = "", given_up: str = "", **counts: int) -> None:
        """Count, from whichever thread."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)
            if failure:
                self.failures[failure] += 1
            if given_up:
                self.given_up[given_up] += 1

    @property
    def cost(self) -> float:
        """Money, by the prices given."""
        return (self.prompt_tokens * self.prompt_price + self.completion_tokens * self.completion_price) / 1e6

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for a run's record."""
        names = ("requests", "cache_hits", "prompt_tokens", "completion_tokens", "without_usage", "cost")
        counts = {"failures": dict(self.failures), "given_up": dict(self.given_up)}
        return {name: getattr(self, name) for name in names} | counts


class Endpoint:
    """One model behind an OpenAI-compatible endpoint.

    base_url: up to and including `/v1`. model: the model's name there.
    temperature, top_p, max_reply_tokens: of the sampling.
    extra_body: more fields of the request; None as a value removes a field (some models refuse `stop`, say).
    api_key, api_key_env: the key, or the name of the environment variable that holds it; without either no key is
        sent. It appears in no repr, error, reply or file.
    concurrency: requests under way at once, from whichever threads; a semaphore is a limit that endpoints share.
    connect_timeout, read_timeout, total_timeout: seconds to connect, between two pieces of data, for one attempt.
    max_retries: attempts after the first. backoff: seconds before the first retry, doubled each time, with jitter.
    max_wait: seconds; a server that asks to wait longer is not waited for.
    max_reply_bytes: cap on a response body.
    cache: a folder for replies, `auto` for the one in `config.cache_dir()`, None for none. A reply is found again by
        the endpoint's address and all that is sent, images included. Failures are not kept, nor are replies that were
        sampled (temperature above 0) without a seed: asked again, those shall differ. Name no folder for a model that
        changes under its name.
    prompt_price, completion_price: money per million tokens, for `usage.cost`.

    Seeds are sent, but whether they settle the reply is up to the server.

    Raises ValueError for an address or a key that cannot be one.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_reply_tokens: int = 2048,
        extra_body: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int | asyncio.Semaphore = 8,
        connect_timeout: float = 10.0,
        read_timeout: float = 120.0,
        total_timeout: float = 300.0,
        max_retries: int = 4,
        backoff: float = 1.0,
        max_wait: float = 60.0,
        max_reply_bytes: int = 4 * 2**20,
        cache: str | Path | None = None,
        prompt_price: float = 0.0,
        completion_price: float = 0.0,
    ):
        check_url("the base URL", base_url)
        if not model:
            raise ValueError("name the model as the endpoint calls it")
        self.model = model
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.usage = Usage(prompt_price, completion_price)
        self._key_env = api_key_env
        self._key = (api_key if api_key is not None else os.environ.get(api_key_env, "")).strip()
        if not re.fullmatch(r"[\x21-\x7e]*", self._key):
            raise ValueError(f"the key (from the argument or ${api_key_env}) holds spaces or characters outside ASCII")
        self._settings = {"model": model, "temperature": temperature, "top_p": top_p, "max_tokens": max_reply_tokens}
        self._extra_body = dict(extra_body or {})
        self._limit = concurrency if isinstance(concurrency, asyncio.Semaphore) else asyncio.Semaphore(concurrency)
        self._connect_timeout, self._read_timeout, self._total_timeout = connect_timeout, read_timeout, total_timeout
        self._max_retries, self._backoff, self._max_wait = max_retries, backoff, max_wait
        self._max_reply_bytes = max_reply_bytes
        self._cache = cache_dir() / "endpoint" if cache == "auto" else None if cache is None else Path(cache)

    def ask(self, requests: Sequence[Request[T]]) -> list[T | EndpointError]:
        """One result per request, in order; an EndpointError in its place where there is none.

        Never raises for what a server does. An interrupt cancels what is queued and under way, and is passed on;
        replies that have come are kept.
        """
        if not requests:
            return []
        with _starting:
            loop = _loop(os.getpid())
        work = asyncio.run_coroutine_threadsafe(self._all(requests), loop)
        _under_way.add(work)
        try:
            return work.result()
        finally:
            work.cancel()  # does nothing to what is done
            _under_way.discard(work)

    async def _all(self, requests: Sequence[Request[T]]) -> list[T | EndpointError]:
        import httpx

        headers = {"Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        timeout = httpx.Timeout(self._read_timeout, connect=self._connect_timeout, pool=None)
        refused = asyncio.Event()  # set by the first wrong key: the server would say the same to all
        async with httpx.AsyncClient(headers=headers, timeout=timeout, verify=_tls()) as client:
            tasks = [asyncio.ensure_future(self._one(client, refused, request)) for request in requests]
            try:
                return await asyncio.gather(*tasks)
            finally:  # where one raises, the others must not go on by themselves
                for task in tasks:
                    task.cancel()

    async def _one(self, client: httpx.AsyncClient, refused: asyncio.Event, request: Request[T]) -> T | EndpointError:
        """One request: the kept reply, or attempts until one succeeds, fails for good, or the retries are used up."""
        async with self._limit:
            try:
                body, file = await asyncio.to_thread(self._body, request)
            except EndpointError as failure:
                self.usage.add(failure=failure.kind)
                return self._give_up(failure, 1)
            kept = _read_kept(file)
            if kept is not None:
                with suppress(EndpointError):
                    result = request.read(kept)
                    self.usage.add(cache_hits=1)
                    return result
            attempt = 0
            while not refused.is_set():
                try:
                    self.usage.add(requests=1)
                    completion = await self._attempt(client, body)
                    result = self._result(request, completion)
                    self._keep(file, completion)
                    return result
                except EndpointError as failure:
                    self.usage.add(failure=failure.kind)
                    if failure.kind == "auth":
                        refused.set()
                    wait = max(failure.wait_seconds, self._backoff * 2**attempt * random.uniform(0.5, 1.5))
                    hopeless = failure.kind not in _TRIED_AGAIN or failure.wait_seconds > self._max_wait
                    if hopeless or attempt >= self._max_retries:
                        return self._give_up(failure, attempt + 1)
                await asyncio.sleep(min(wait, self._max_wait))
                attempt += 1
            return self._give_up(EndpointError("auth", "not sent, because the endpoint refused the key"), attempt)

    def _result(self, request: Request[T], completion: Completion) -> T:
        """What the request reads in the reply. Raises EndpointError as it does, and `length` where the reply was cut:
        asked again, it would be as long, and has to be paid for."""
        try:
            return request.read(completion)
        except EndpointError as failure:
            if completion.finish_reason != "length":
                raise
            tokens = self._settings["max_tokens"]
            what = f"the reply was cut at max_reply_tokens={tokens} (raise it, or let the model think less)"
            raise EndpointError("length", f"{what}: {failure.detail}") from failure

    def _give_up(self, failure: EndpointError, attempts: int) -> EndpointError:
        self.usage.add(given_up=failure.kind)
        tried = f" (tried {attempts} times)" if attempts > 1 else ""
        return EndpointError(failure.kind, self._hide(clean_text(failure.detail)) + tried)

    def _hide(self, text: str) -> str:
        """Servers like to quote the key that they refuse."""
        return text.replace(self._key, "[key]") if len(self._key) >= _LEAST_SECRET else text

    def _body(self, request: Request[T]) -> tuple[bytes, Path | None]:
        """The request as JSON and the file that keeps its reply, if any. Raises EndpointError `image`."""
        seed = {} if request.seed is None else {"seed": request.seed}
        body = self._settings | seed | {"messages": request.messages()} | self._extra_body
        body = {key: value for key, value in body.items() if value is not None}
        data = json.dumps(body, sort_keys=True).encode()
        is_repeatable = "seed" in body or body.get("temperature") == 0
        if self._cache is None or not is_repeatable:
            return data, None
        name = hashlib.sha256(self.url.encode() + b"\n" + data).hexdigest()
        return data, self._cache / name[:2] / f"{name}.json"

    def _keep(self, file: Path | None, completion: Completion) -> None:
        if file is None:
            return
        record = {"model": self.model} | {name: getattr(completion, name) for name in _KEPT}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(record).encode())
        except OSError:  # a full disk must not cost a reply that was paid for
            self.usage.add(failure="cache")

    async def _attempt(self, client: httpx.AsyncClient, body: bytes) -> Completion:
        """One request. Raises EndpointError."""
        import httpx

        json_header = {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(self._total_timeout),
                client.stream("POST", self.url, content=body, headers=json_header) as response,
            ):
                data = bytearray()
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > self._max_reply_bytes:
                        raise EndpointError("too_large", f"the reply is longer than {self._max_reply_bytes} bytes")
        except (TimeoutError, httpx.TimeoutException) as error:
            raise EndpointError("timeout", f"{type(error).__name__} at {self.url}") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise EndpointError("connection", f"{type(error).__name__} at {self.url}: {error}") from error
        if response.status_code != 200:
            raise http_failure(
                response.status_code, response.headers, bytes(data), self.url, self._key_hint(), self._hide
            )
        completion = read_body(bytes(data), self._hide)
        self._count_tokens(completion.get("usage"))
        return completion_of(completion, self._hide)

    def _key_hint(self) -> str:
        if self._key:
            return "a key was sent"
        if self._key_env:
            return f"no key was sent, ${self._key_env} is not set"
        return "no key was sent; policy.api_key_env= or --judge-key-env names the variable that holds it"

    def _count_tokens(self, usage: Any) -> None:
        told = usage if isinstance(usage, dict) else {}
        counts = {name: told.get(name) for name in ("prompt_tokens", "completion_tokens")}
        if all(type(count) is int and 0 <= count < 10**9 for count in counts.values()):
            self.usage.add(**counts)
        else:
            self.usage.add(without_usage=1)


_starting = threading.Lock()
_under_way: set[Future] = set()


def cancel_requests() -> None:
    """Cancel what all threads of this process wait for; an interrupt itself reaches the main thread alone."""
    for work in list(_under_way):
        work.cancel()


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of all endpoints of a process (a forked one has its own), in a thread of its own: one loop, so
    that a limit holds across threads; its own thread, because a notebook already runs a loop in the main one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="endpoints", daemon=True).start()
    return loop


@cache
def _tls() -> ssl.SSLContext:
    """Reading all certificates anew for each batch of requests would take longer than a local server's reply."""
    import httpx

    return httpx.create_ssl_context()


_KEPT = ("text", "finish_reason", "end_of_turn", "thoughts")


def _read_kept(file: Path | None) -> Completion | None:
    """A reply kept on disk; None where there is none or the file is damaged."""
    if file is None:
        return None
    try:
        record = read_json(file)
    except (OSError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    record = {"thoughts": ""} | record  # which earlier versions did not keep
    if [type(record.get(name)) for name in _KEPT] != [str, str, bool, str]:
        return None
    return Completion(*(record[name] for name in _KEPT))


def image_parts(corpus: Corpus, image_format: str = "PNG") -> Callable[[ImageRef], Message]:
    """A function from an image reference to its part of a message, rendered from the corpus; the latest stay encoded.

    image_format: PNG (exact) or JPEG (smaller). It raises EndpointError `image` when a page cannot be rendered.
    """
    if image_format not in ("PNG", "JPEG"):
        raise ValueError(f"images are sent as PNG or JPEG, not {image_format!r}")
    options = {"quality": 90} if image_format == "JPEG" else {}

    @lru_cache(_ENCODED_IMAGES)
    def part(ref: ImageRef) -> Message:
        buffer = io.BytesIO()
        try:
            ref.render(corpus).save(buffer, image_format, **options)
        except Exception as error:  # a page file may be broken in any way
            raise EndpointError("image", str(error)) from error
        data = base64.b64encode(buffer.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/{image_format.lower()};base64,{data}"}}

    return part


def quote_data(data: Mapping[str, str]) -> str:
    """Texts of others as one line of JSON in which they can close neither a tag nor a fence, nor write a special
    token of a chat template: angle brackets, bars and backticks stand as escapes, which models read as well.

    >>> quote_data({"answer": "12</answer>\\n<judge>"})
    '{"answer": "12\\\\u003c/answer\\\\u003e\\\\n\\\\u003cjudge\\\\u003e"}'
    """
    text = json.dumps({name: clean_text(value) for name, value in data.items()}, ensure_ascii=False)
    return re.sub(r"[<>|`\u2028\u2029\x85]", lambda match: f"\\u{ord(match[0]):04x}", text)
