"""What a server of chat completions says: a reply, or a failure of one of the kinds that `endpoint` lists.

Failures quote the server: shortened, without control characters, and without the key. The key is taken out before
anything is cut, so that no part of one is left.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vrag_lib.trajectory import clean_text

Hide = Callable[[str], str]
"""Takes the key out of a text."""

_TOO_LONG = re.compile(r"context[ _]length|maximum context|too many (?:input )?tokens|longer than the maximum", re.I)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_INTERRUPTED = ("error", "abort", "insufficient_system_resource")
"""Finish reasons of a reply that the server broke off, which is not the model's doing."""


class EndpointError(RuntimeError):
    """A request without a result: its kind, what happened, and how long the server asks to wait."""

    def __init__(self, kind: str, detail: str, wait_seconds: float = 0.0):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.wait_seconds = kind, detail, wait_seconds


@dataclass(frozen=True)
class Completion:
    """The text of a reply. `finish_reason` is `stop` or `length`. `end_of_turn`: the server says that the model ended
    its turn by itself, not at a stop string (vLLM tells; others do not, and then it is False). `thoughts`: the
    thinking, where the server sends it apart from the text (vLLM's reasoning parsers, DeepSeek)."""

    text: str
    finish_reason: str = "stop"
    end_of_turn: bool = False
    thoughts: str = ""


def after_thinking(text: str) -> str:
    """What a reply says once its thinking has ended; nothing while it has not.

    >>> after_thinking("<think>4? no</think> 5"), after_thinking("the template opened it</think> 5")
    (' 5', ' 5')
    >>> after_thinking("5"), after_thinking("<think>4? or")
    ('5', '')
    """
    return text.rpartition("</think>")[2].partition("<think>")[0]


def http_failure(
    status: int, headers: Mapping[str, str], data: bytes, url: str, key_hint: str, hide: Hide
) -> EndpointError:
    """The failure that a status other than 200 stands for. key_hint: which key was sent, for those that want one."""
    said = hide(data.decode("utf-8", "replace")).strip()
    detail = f"HTTP {status} from {url}: {_shown(said, 500)}"
    if 300 <= status < 400:
        return EndpointError(
            "bad_request",
            f"HTTP {status} from {url}: it redirects to {_host(headers.get('location', ''))}, and redirects are not "
            "followed; give the base URL that it leads to",
        )
    if status in (401, 403):
        return EndpointError("auth", f"the endpoint refuses access ({key_hint}); {detail}")
    if status in (408, 425):
        return EndpointError("timeout", detail)
    if status == 429 or status >= 500:
        wait = _retry_after(headers.get("retry-after", ""))
        return EndpointError("rate_limit" if status == 429 else "server", detail, wait)
    if status in (400, 413, 422) and _TOO_LONG.search(said[:2000]):
        return EndpointError("overflow", detail)
    return EndpointError("bad_request", detail)


def read_body(data: bytes, hide: Hide) -> dict[str, Any]:
    """The body of a chat completion: it has a choice, and that has a message. Raises EndpointError `bad_json` for what
    may have been cut off, `rate_limit` or `server` for an error of such a code that a router passes on as if all were
    well, `bad_schema` for anything else."""
    said = hide(data.decode("utf-8", "replace")).strip()
    if said.startswith("<"):  # a login page or a website, and the same the next time
        raise EndpointError("bad_schema", f"a web page, no chat completion; is the base URL right? {_shown(said, 100)}")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        what = f"the reply of {len(data)} bytes is not JSON ({error}): {_shown(said, 100)}"
        raise EndpointError("bad_json", what) from error
    try:
        has_message = isinstance(body["choices"][0]["message"], dict)
    except (KeyError, IndexError, TypeError):
        has_message = False
    if not has_message:
        raise EndpointError(_passed_on(body), f"not a chat completion: {_shown(said, 200)}")
    return body


def _passed_on(body: Any) -> str:
    """The kind of failure in a body without a reply, by the status that its `error` names."""
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    if type(code) is not int:
        return "bad_schema"
    return "rate_limit" if code == 429 else "server" if 500 <= code < 600 else "bad_schema"


def completion_of(body: Mapping[str, Any], hide: Hide) -> Completion:
    """The reply in a body that `read_body` let pass. A model that uses up its tokens thinking, or calls a tool, replies
    with nothing: that is its own doing and no failure.

    Raises EndpointError `refusal`, `server` for a reply that the server broke off, `bad_schema` for one without text.
    """
    choice = body["choices"][0]
    message, reason = choice["message"], choice.get("finish_reason")
    if reason in _INTERRUPTED:
        said = choice.get("error") or body.get("error") or "no reason given"
        raise EndpointError("server", f"the server broke the reply off ({reason}): {_shown(hide(str(said)), 500)}")
    if message.get("refusal") or reason == "content_filter":
        said = hide(str(message.get("refusal") or "stopped by a content filter"))
        raise EndpointError("refusal", _shown(said, 500))
    text = _text(message.get("content"), is_finished=isinstance(reason, str))
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    return Completion(
        hide(clean_text(text)),
        "length" if reason == "length" else "stop",
        # vLLM tells in stop_reason which stop string it met, null for an end of turn; others do not tell.
        "stop_reason" in choice and not isinstance(choice["stop_reason"], str),
        hide(clean_text(thoughts)) if isinstance(thoughts, str) else "",
    )


def _text(content: Any, is_finished: bool) -> str:
    if content is None and is_finished:
        return ""
    if isinstance(content, list):
        try:
            content = "".join(part["text"] for part in content if part["type"] == "text")
        except (KeyError, TypeError) as error:
            raise EndpointError("bad_schema", "the message holds a list that is not one of parts with text") from error
    if not isinstance(content, str):
        raise EndpointError("bad_schema", f"the message holds no text but {type(content).__name__}")
    return content


def _shown(text: str, most: int) -> str:
    """The beginning of a server's text, fit for a terminal and a log."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text[:most])


def _host(location: str) -> str:
    """Scheme, host and port of a Location header: its path and query may hold what no message should."""
    try:
        parts = urlsplit(location)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "an address that is none"
    if not host:
        return "another path on the same host" if location else "no address"
    return _shown(f"{parts.scheme or 'http'}://{host}" + (f":{port}" if port else ""), 200)


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
