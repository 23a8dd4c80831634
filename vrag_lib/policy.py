"""Who writes the replies: the `Policy` protocol and the scripted policy. The others live in `policy_transformers`,
`policy_openai` and `policy_extractive`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vrag_lib.trajectory import Turn

Conversation = Sequence[Turn]
"""The turns so far, the last one the user's. Images are references; a policy that needs pixels is given the corpus."""


@dataclass(frozen=True)
class Reply:
    """One reply of a policy.

    `token_ids` and `logprobs` are the sampled tokens, equally long; `prompt_token_ids` is the whole context they were
    sampled from. All three are None for a policy that has no tokens. `finish_reason`: `stop`, `length` (cut at the
    longest reply), `overflow` (the context is full, nothing was sampled) or `error`, and then `error` says which.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    finish_reason: str = "stop"
    error: str | None = None


@runtime_checkable
class Policy(Protocol):
    """Maps conversations to replies, one each, in order.

    Turns that already hold token ids are used as they are, never tokenised again. With `seeds` (one per
    conversation) a reply depends on its own conversation and seed alone, not on what else is in the batch.
    A conversation that fails gets a Reply with `error`; the others are not affected.
    """

    name: str

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]: ...


class ScriptedPolicy:
    """Replies from a list, by turn, or from a function of the conversation: for tests, demonstrations, experts.

    >>> policy = ScriptedPolicy(["<search>cats</search>", "<answer>two</answer>"])
    >>> policy.generate([[Turn("user", "how many?")]])[0].text
    '<search>cats</search>'
    """

    def __init__(self, script: Sequence[str] | Callable[[Conversation], str], name: str = "scripted"):
        self.name = name
        self._script = script

    def generate(self, conversations: Sequence[Conversation], *, seeds: Sequence[int] | None = None) -> list[Reply]:
        return [Reply(self._reply(conversation)) for conversation in conversations]

    def _reply(self, conversation: Conversation) -> str:
        if callable(self._script):
            return self._script(conversation)
        said = sum(1 for turn in conversation if turn.role == "assistant")
        return self._script[min(said, len(self._script) - 1)]
