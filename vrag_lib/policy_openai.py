"""The endpoint policy: any server that speaks OpenAI's chat completions with images (vLLM, SGLang, a hosted model).

Deviations from the released code: retries are bounded and every failure is counted by kind (traps S2, S3, S9); a
conversation that fails becomes a reply with an error, so one bad request costs one trajectory; the reply is cut at its
first closing action tag here as well, whatever the server does with stop strings (T5).

A failure's kind is one of these. The first five are tried again, after exponential back-off:

    rate_limit   429; waits as long as Retry-After says
    server       5xx
    timeout      no connection, no data or no end in time
    connection   refused, reset, cut off
    bad_json     the reply is not JSON, often because it was cut off
    bad_schema   JSON, but not a chat completion
    too_large    the reply is longer than the cap
    refusal      the model or a filter refuses to answer
    overflow     the context is too long for the server; the reply's finish reason is `overflow`, not an error
    image        a page image cannot be read
    auth         the key is missing or wrong; the rest of the batch is not sent
    bad_request  any other 3xx or 4xx
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import json
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vrag_lib.actions import STOP_STRINGS, cut_reply
from vrag_lib.policy import Conversation, Reply
from vrag_lib.trajectory import ImageRef, clean_text

if TYPE_CHECKING:
    import httpx

    from vrag_lib.corpus import Corpus

_TRIED_AGAIN = frozenset({"rate_limit", "server", "timeout", "connection", "bad_json"})
_OPENING = re.compile(r"<(search|bbox|answer)>")
_TOO_LONG = re.compile(r"context[ _]length|maximum context|too many (?:input )?tokens|longer than the maximum", re.I)
_ENCODED_IMAGES = 64
"""Images kept encoded between calls, about 0.5 MB each: a conversation sends all of its images every turn."""


class _Failure(Exception):
    """One failed attempt: its kind, what happened, and how long the server asks to wait."""

    def __init__(self, kind: str, detail: str, wait_seconds: float = 0.0):
        super().__init__(detail)
        self.kind, self.wait_seconds = kind, wait_seconds


class OpenAIPolicy:
    """Replies from an OpenAI-compatible endpoint.

    corpus: where image references are rendered from.
    base_url: up to and including `/v1`. model: the model's name there.
    api_key, api_key_env: the key, or the name of the environment variable that holds it; without either no key is
        sent. It appears in no repr, error or record.
    concurrency: requests under way at once.
    connect_timeout, read_timeout, total_timeout: seconds to connect, between two pieces of data, for one attempt.
    max_retries: attempts after the first. backoff: seconds before the first retry, doubled each time, with jitter.
    max_wait: seconds; a server that asks to wait longer is not waited for.
    max_reply_bytes: cap on a response body.
    image_format: PNG (exact) or JPEG (smaller).
    extra_body: more fields of the request; None as a value removes a field (some models refuse `stop`, say).

    `failures` counts failed attempts by kind, `failed_conversations` those given up. Replies have no tokens. Seeds
    are sent, but whether they settle the reply is up to the server.
    """

    def __init__(
        self,
        corpus: Corpus,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_reply_tokens: int = 2048,
        concurrency: int = 8,
        connect_timeout: float = 10.0,
        read_timeout: float = 120.0,
        total_timeout: float = 300.0,
        max_retries: int = 4,
        backoff: float = 1.0,
        max_wait: float = 60.0,
        max_reply_bytes: int = 4 * 2**20,
        image_format: str = "PNG",
        extra_body: Mapping[str, Any] | None = None,
    ):
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError("the base URL is like https://host/v1, without user name, password or query")
        if not model:
            raise ValueError("name the model as the endpoint calls it")
        if image_format not in ("PNG", "JPEG"):
            raise ValueError(f"images are sent as PNG or JPEG, not {image_format!r}")
        self.name = f"openai:{model}"
        self.failures: Counter[str] = Counter()
        self.failed_conversations = 0
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._key_env = api_key_env
        self._key = (api_key if api_key is not None else os.environ.get(api_key_env, "")).strip()
        if not re.fullmatch(r"[\x21-\x7e]*", self._key):
            raise ValueError(f"the key (from the argument or ${api_key_env}) holds spaces or characters outside ASCII")
        self._settings = {
            "model": model,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_reply_tokens,
            "stop": list(STOP_STRINGS),
        }
        self._extra_body = dict(extra_body or {})
        self._concurrency = concurrency
        self._connect_timeout, self._read_timeout, self._total_timeout = connect_timeout, read_timeout, total_timeout
        self._max_retries, self._backoff, self._max_wait = max_retries, backoff, max_wait
        self._max_reply_bytes = max_reply_bytes
        self._data_url = lru_cache(_ENCODED_IMAGES)(lambda ref: _data_url(ref, corpus, image_format))

    def __repr__(self) -> str:
        return f"OpenAIPolicy({self._url!r}, model={self._settings['model']!r})"

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]:
        """One reply per conversation; `error` begins with the kind of failure. Never raises for what a server does."""
        if seeds is not None and len(seeds) != len(conversations):
            raise ValueError(f"{len(conversations)} conversations but {len(seeds)} seeds")
        work = self._all(conversations, [None] * len(conversations) if seeds is None else seeds)
        with ThreadPoolExecutor(1) as executor:  # a thread of its own, because a notebook already runs an event loop
            return executor.submit(asyncio.run, work).result()

    async def _all(self, conversations: Sequence[Conversation], seeds: Sequence[int | None]) -> list[Reply]:
        import httpx

        headers = {"Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        timeout = httpx.Timeout(self._read_timeout, connect=self._connect_timeout, pool=None)
        limit = asyncio.Semaphore(self._concurrency)
        refused = asyncio.Event()  # set by the first wrong key: the server would say the same to all
        async with httpx.AsyncClient(headers=headers, timeout=timeout) as client:
            tasks = (self._one(client, limit, refused, c, seed) for c, seed in zip(conversations, seeds, strict=True))
            return list(await asyncio.gather(*tasks))

    async def _one(
        self,
        client: httpx.AsyncClient,
        limit: asyncio.Semaphore,
        refused: asyncio.Event,
        conversation: Conversation,
        seed: int | None,
    ) -> Reply:
        """One conversation: attempts until one succeeds, fails for good, or the retries are used up."""
        async with limit:
            attempt = 0
            while True:
                if refused.is_set():
                    return self._give_up(_Failure("auth", "not sent, because the endpoint refused the key"), attempt)
                try:
                    body = await asyncio.to_thread(self._body, conversation, seed)
                    return await self._attempt(client, body)
                except _Failure as failure:
                    self.failures[failure.kind] += 1
                    if failure.kind == "auth":
                        refused.set()
                    wait = max(failure.wait_seconds, self._backoff * 2**attempt * random.uniform(0.5, 1.5))
                    hopeless = failure.kind not in _TRIED_AGAIN or failure.wait_seconds > self._max_wait
                    if hopeless or attempt >= self._max_retries:
                        return self._give_up(failure, attempt + 1)
                await asyncio.sleep(min(wait, self._max_wait))
                attempt += 1

    def _give_up(self, failure: _Failure, attempts: int) -> Reply:
        if failure.kind == "overflow":
            return Reply("", finish_reason="overflow")
        self.failed_conversations += 1
        tried = f" (tried {attempts} times)" if attempts > 1 else ""
        detail = clean_text(str(failure))
        if self._key:
            detail = detail.replace(self._key, "[key]")  # servers like to quote it
        return Reply("", finish_reason="error", error=f"{failure.kind}: {detail}{tried}")

    def _body(self, conversation: Conversation, seed: int | None) -> bytes:
        """The request as JSON. Raises _Failure `image` when a page cannot be rendered."""
        messages = []
        for turn in conversation:
            if not turn.images:
                messages.append({"role": turn.role, "content": clean_text(turn.text)})
                continue
            try:
                urls = [self._data_url(image) for image in turn.images]
            except Exception as error:  # a page file may be broken in any way
                raise _Failure("image", str(error)) from error
            content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            if turn.text:
                content.append({"type": "text", "text": clean_text(turn.text)})
            messages.append({"role": turn.role, "content": content})
        body = self._settings | ({} if seed is None else {"seed": seed}) | {"messages": messages} | self._extra_body
        return json.dumps({key: value for key, value in body.items() if value is not None}).encode()

    async def _attempt(self, client: httpx.AsyncClient, body: bytes) -> Reply:
        """One request. Raises _Failure."""
        import httpx

        json_header = {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(self._total_timeout),
                client.stream("POST", self._url, content=body, headers=json_header) as response,
            ):
                data = bytearray()
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > self._max_reply_bytes:
                        raise _Failure("too_large", f"the reply is longer than {self._max_reply_bytes} bytes")
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _Failure("timeout", f"{type(error).__name__} at {self._url}") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise _Failure("connection", f"{type(error).__name__} at {self._url}: {error}") from error
        if response.status_code != 200:
            raise self._http_failure(response.status_code, response.headers, bytes(data))
        return _read_completion(bytes(data))

    def _http_failure(self, status: int, headers: Mapping[str, str], data: bytes) -> _Failure:
        said = data[:2000].decode("utf-8", "replace").strip()
        detail = f"HTTP {status} from {self._url}: {said[:500]}"
        if status in (401, 403):
            hint = "a key was sent" if self._key else f"no key was sent, ${self._key_env} is not set"
            return _Failure("auth", f"the endpoint refuses access ({hint}); {detail}")
        if status in (408, 425):
            return _Failure("timeout", detail)
        if status == 429 or status >= 500:
            wait = _retry_after(headers.get("retry-after", ""))
            return _Failure("rate_limit" if status == 429 else "server", detail, wait)
        if status in (400, 413, 422) and _TOO_LONG.search(said):
            return _Failure("overflow", detail)
        return _Failure("bad_request", detail)


def _data_url(ref: ImageRef, corpus: Corpus, image_format: str) -> str:
    buffer = io.BytesIO()
    ref.render(corpus).save(buffer, image_format, **({"quality": 90} if image_format == "JPEG" else {}))
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, given in seconds or as a date; 0 for anything else."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _read_completion(data: bytes) -> Reply:
    """A chat completion as a reply. Raises _Failure `bad_json`, `bad_schema` or `refusal`."""
    try:
        completion = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Failure("bad_json", f"the reply of {len(data)} bytes is not JSON: {error}") from error
    try:
        choice = completion["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Failure("bad_schema", f"not a chat completion: {data[:200].decode('utf-8', 'replace')}") from error
    if refusal or reason == "content_filter":
        raise _Failure("refusal", str(refusal or "stopped by a content filter")[:500])
    if not isinstance(content, str):
        raise _Failure("bad_schema", f"the message holds no text but {type(content).__name__}")
    if reason == "length":
        return Reply(cut_reply(clean_text(content)), finish_reason="length")
    # vLLM tells in stop_reason which stop string it met, null for an end of turn; others do not tell.
    if "stop_reason" not in choice or isinstance(choice["stop_reason"], str):
        content = close_action(content)
    return Reply(cut_reply(clean_text(content)))


def close_action(text: str) -> str:
    """Put back the closing action tag that a server strips when it stops there.

    >>> close_action("<think>when?</think><search>year 2019")
    '<think>when?</think><search>year 2019</search>'
    >>> close_action("<answer>12</answer>")
    '<answer>12</answer>'
    """
    if cut_reply(text) != text or text.endswith(STOP_STRINGS):
        return text
    opened = _OPENING.findall(text)
    return f"{text}</{opened[-1]}>" if opened else text
