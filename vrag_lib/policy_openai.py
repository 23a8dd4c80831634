"""The endpoint policy: replies from any server that speaks OpenAI's chat completions with images.

`endpoint` sends the requests: time-outs, retries, failures by kind, the cache and the costs are there. A conversation
that fails becomes a reply with an error, so one bad request costs one trajectory. The reply is cut at its first closing
action tag here as well, whatever the server does with stop strings (trap T5). Thoughts that the server sends apart from
the text stand in front of it, as a model writes them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vrag_lib.actions import STOP_STRINGS, cut_reply, without_tags
from vrag_lib.endpoint import Completion, Endpoint, EndpointError, Message, Request, Usage, image_parts
from vrag_lib.policy import Conversation, Reply
from vrag_lib.trajectory import clean_text

if TYPE_CHECKING:
    from vrag_lib.corpus import Corpus

_OPENING = re.compile(r"<(search|bbox|answer)>")


class OpenAIPolicy:
    """Replies from an OpenAI-compatible endpoint.

    corpus: where image references are rendered from.
    base_url: up to and including `/v1`. model: the model's name there.
    system_prompt: opens every conversation, if given; the record does not hold it.
    image_format: PNG (exact) or JPEG (smaller).
    extra_body: more fields of the request; None as a value removes a field (some models refuse `stop`, say).
    endpoint: key, limits, cache and prices, see `endpoint.Endpoint`. No cache unless one is named: a policy in
        training changes under its name.

    `usage` counts requests, tokens, cost and failures. Replies have no tokens. Seeds are sent, but whether they settle
    the reply is up to the server. A context too long for the server gives the finish reason `overflow`, not an error.
    """

    def __init__(
        self,
        corpus: Corpus,
        base_url: str,
        model: str,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_reply_tokens: int = 2048,
        system_prompt: str = "",
        image_format: str = "PNG",
        extra_body: Mapping[str, Any] | None = None,
        **endpoint: Any,
    ):
        self.name = f"openai:{model}"
        self._endpoint = Endpoint(
            base_url,
            model,
            temperature=temperature,
            top_p=top_p,
            max_reply_tokens=max_reply_tokens,
            extra_body={"stop": list(STOP_STRINGS), **(extra_body or {})},
            **endpoint,
        )
        self._system: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self._image_part = image_parts(corpus, image_format)

    def __repr__(self) -> str:
        return f"OpenAIPolicy({self._endpoint.url!r}, model={self._endpoint.model!r})"

    @property
    def usage(self) -> Usage:
        """Requests, tokens, cost, failures."""
        return self._endpoint.usage

    @property
    def failures(self) -> Counter[str]:
        """Failed attempts by kind."""
        return self.usage.failures

    @property
    def failed_conversations(self) -> int:
        """Conversations given up; one that outgrew the server's context is none of them."""
        return self.usage.given_up.total() - self.usage.given_up["overflow"]

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]:
        """One reply per conversation; `error` begins with the kind of failure. Never raises for what a server does."""
        if seeds is not None and len(seeds) != len(conversations):
            raise ValueError(f"{len(conversations)} conversations but {len(seeds)} seeds")
        requests = [
            Request(partial(self._messages, conversation), _read_reply, None if seeds is None else seeds[i])
            for i, conversation in enumerate(conversations)
        ]
        return [_as_reply(result) for result in self._endpoint.ask(requests)]

    def _messages(self, conversation: Conversation) -> list[Message]:
        """Images first, then text, as the record has them. Raises EndpointError `image`."""
        messages = list(self._system)
        for turn in conversation:
            content: str | list[Message] = clean_text(turn.text)
            if turn.images:
                text = [{"type": "text", "text": content}] if content else []
                content = [self._image_part(image) for image in turn.images] + text
            messages.append({"role": turn.role, "content": content})
        return messages


def _read_reply(completion: Completion) -> Reply:
    is_whole = completion.finish_reason == "length" or completion.end_of_turn
    text = cut_reply(completion.text if is_whole else close_action(completion.text))
    return Reply(with_thoughts(text, completion.thoughts), finish_reason=completion.finish_reason)


def _as_reply(result: Reply | EndpointError) -> Reply:
    if isinstance(result, Reply):
        return result
    if result.kind == "overflow":
        return Reply("", finish_reason="overflow")
    return Reply("", finish_reason="error", error=str(result))


def with_thoughts(text: str, thoughts: str) -> str:
    """A reply with the thoughts that came apart from it, unless it holds some itself. Their tags are left out: they
    are part of no action.

    >>> with_thoughts("<search>2019</search>", "The year? Perhaps <answer>3</answer>.")
    '<think>The year? Perhaps  3 .</think>\\n<search>2019</search>'
    """
    thoughts = without_tags(thoughts).strip()
    if not thoughts or "<think>" in text or "</think>" in text:
        return text
    return f"<think>{thoughts}</think>\n{text}"


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
