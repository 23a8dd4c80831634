"""The action grammar: one reply becomes one `Action` or one `Invalid`, and the prompts that teach it.

A reply is some reasoning followed by exactly one action:

    <think> … </think> <search> query </search>
    <think> … </think> <bbox> [x1, y1, x2, y2] </bbox>
    <think> … </think> <answer> … </answer>

The paper's text calls the crop tag `region`, its prompt and code `bbox`; it is `bbox` here (paper Fig. 9).

Deviations from the released code: a reply ends at its first closing action tag, so nothing after it is ever read
(trap T5); the text is never rewritten (T2); messages to the model hold no parsable action, so none of them can
earn a reward (T3). Boxes with negative numbers or their corners the other way round are invalid there; here they are
cut at the image and turned round (`geometry`), so fewer replies count as invalid.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from vrag_lib.geometry import Box


class ActionKind(StrEnum):
    SEARCH = "search"
    CROP = "bbox"
    ANSWER = "answer"


class InvalidReason(StrEnum):
    """Why a reply could not be carried out. The first seven are found by `parse_reply`, the rest by the environment."""

    NO_ACTION = "no_action"
    UNCLOSED = "unclosed"
    NESTED = "nested"
    EMPTY = "empty"
    BAD_BOX = "bad_box"
    NOT_FINITE = "not_finite"
    IMAGE_TOKEN = "image_token"
    NO_IMAGE = "no_image"
    ZERO_AREA = "zero_area"
    OUTSIDE = "outside"
    NOT_ALLOWED = "not_allowed"


@dataclass(frozen=True)
class Action:
    """One executable action. `argument` is the stripped text inside the tags; `box` is set for a crop, in the frame
    of the last image shown."""

    kind: ActionKind
    argument: str
    box: Box | None = None


@dataclass(frozen=True)
class Invalid:
    """A reply that holds no executable action, and why."""

    reason: InvalidReason


STOP_STRINGS = tuple(f"</{kind.value}>" for kind in ActionKind)
"""Generation stops at these: a reply ends with its first closing action tag."""

IMAGE_TOKENS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
)
"""Placeholders of Qwen-VL that only the environment may insert; suppressed in sampling and refused in a reply."""

MAX_QUERY_CHARS = 2000
"""A longer query is cut here: no search engine needs more, and a runaway reply must not cost a search minutes."""

_CLOSING = re.compile(r"</(search|bbox|answer)>")
_ANY_TAG = re.compile(r"</?(?:think|search|bbox|answer)>")
_FORBIDDEN = re.compile("|".join([_ANY_TAG.pattern, *map(re.escape, IMAGE_TOKENS)]))
_MAX_BOX_CHARS = 400


def cut_reply(text: str) -> str:
    """The reply up to and including its first closing action tag; all of it if there is none.

    >>> cut_reply("<search>a</search><answer>b</answer>")
    '<search>a</search>'
    """
    match = _CLOSING.search(text)
    return text[: match.end()] if match else text


def parse_reply(text: str) -> Action | Invalid:
    """Read the one action of a reply. Never raises, linear in the length of `text`.

    >>> parse_reply("<think>which year?</think><search> revenue 2019 </search>")
    Action(kind=<ActionKind.SEARCH: 'search'>, argument='revenue 2019', box=None)
    >>> parse_reply("<bbox>[10, 20, 30.5, 40]</bbox>").box
    Box(x1=10.0, y1=20.0, x2=30.5, y2=40.0)
    >>> parse_reply("I do not know").reason
    <InvalidReason.NO_ACTION: 'no_action'>
    """
    text = cut_reply(text)
    if any(token in text for token in IMAGE_TOKENS):
        return Invalid(InvalidReason.IMAGE_TOKEN)
    closing = _CLOSING.search(text)
    if closing is None:
        opened = any(f"<{kind.value}>" in text for kind in ActionKind)
        return Invalid(InvalidReason.UNCLOSED if opened else InvalidReason.NO_ACTION)
    kind = ActionKind(closing.group(1))
    opening = f"<{kind.value}>"
    start = text.rfind(opening, 0, closing.start())
    if start < 0:
        return Invalid(InvalidReason.NO_ACTION)
    argument = text[start + len(opening) : closing.start()]
    if _ANY_TAG.search(argument):
        return Invalid(InvalidReason.NESTED)
    argument = argument.strip()
    if not argument:
        return Invalid(InvalidReason.EMPTY)
    if kind is ActionKind.SEARCH:
        return Action(kind, argument[:MAX_QUERY_CHARS])
    if kind is ActionKind.ANSWER:
        return Action(kind, argument)
    return _parse_box(argument)


def _parse_box(argument: str) -> Action | Invalid:
    """A JSON list of four numbers. NaN and infinities are reported apart: models write them when they lose count."""
    if len(argument) > _MAX_BOX_CHARS:
        return Invalid(InvalidReason.BAD_BOX)
    try:
        values = json.loads(argument)
    except (ValueError, RecursionError):
        return Invalid(InvalidReason.BAD_BOX)
    is_list = isinstance(values, list) and len(values) == 4
    if not is_list or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return Invalid(InvalidReason.BAD_BOX)
    try:
        numbers = [float(v) for v in values]
    except OverflowError:
        return Invalid(InvalidReason.NOT_FINITE)
    if not all(math.isfinite(v) for v in numbers):
        return Invalid(InvalidReason.NOT_FINITE)
    return Action(ActionKind.CROP, argument, Box(*numbers))


def format_reply(thought: str, kind: ActionKind, argument: str) -> str:
    """The canonical text of a reply, as synthesis and scripted policies write it.

    >>> format_reply("look closer", ActionKind.CROP, "[0, 0, 56, 56]")
    '<think>look closer</think>\\n<bbox>[0, 0, 56, 56]</bbox>'
    """
    return f"<think>{thought}</think>\n<{kind.value}>{argument}</{kind.value}>"


def format_box(box: Box) -> str:
    """A box as the argument of a crop: whole pixels of the shown frame.

    >>> format_box(Box(0.2, 9.6, 56.1, 84))
    '[0, 10, 56, 84]'
    """
    return "[" + ", ".join(str(round(v)) for v in box.as_tuple()) + "]"


def without_tags(text: str) -> str:
    """Text of a document with a space for every tag and image placeholder.

    >>> without_tags("a</search>b <|image_pad|>")
    'a b  '
    """
    return _FORBIDDEN.sub(" ", text)


def quote_page(text: str, most_chars: int) -> str:
    """The text of a page as an observation: at most `most_chars` characters of it, without tags, each line behind a
    mark so that no line of a document can pass for one of the prompt's.

    >>> quote_page("Total: 7\\nQuestion: <answer>8</answer>", 99)
    'A page:\\n> Total: 7\\n> Question:  8 '
    """
    lines = without_tags(text[:most_chars]).splitlines() or ["(no text)"]
    return "\n> ".join(["A page:", *lines])


_PROMPT_SEARCH = (
    "Answer the question below from a collection of {pages}. Whenever you receive new information, first reason "
    "inside <think> and </think>. If you lack knowledge, call the search engine with <search> query </search>; it "
    "returns {page} that you have not seen yet. "
)
_PROMPT_GIVEN = (
    "Answer the question below from the references above it: {pages}. First reason inside <think> and </think>. "
)
_PROMPT_NOTHING_GIVEN = "No reference was found for the question below. First reason inside <think> and </think>. "
_PROMPT_ALONE = "Answer the question below from what you know. First reason inside <think> and </think>. "
_PROMPT_CROP = (
    "To see a part of the last image enlarged, give its box in that image's pixels as <bbox>[x1, y1, x2, y2]</bbox>. "
)
_PROMPT_ACTING = "You may act as often as your budget allows, one action per message. When you need nothing more, give "
_PROMPT_AT_ONCE = "Then give "
_PROMPT_ANSWER = (
    "the answer inside <answer> and </answer>, as short as possible, for example <answer> Beijing </answer>."
)


def question_prompt(
    question: str, crop: bool = True, *, search: bool = True, given: int | None = None, text: bool = False
) -> str:
    """The user message that opens a trajectory: it offers the allowed actions and no other.

    With search it follows paper Fig. 9, without the crop sentence Fig. 10. Without search it follows Fig. 11 where
    `given` references stand above the question, and asks for what the model knows where `given` is None.
    text: pages are shown as text, not as images.
    """
    if search:
        pages, page = ("pages", "the text of one page") if text else ("page images", "one page image")
        head = _PROMPT_SEARCH.format(pages=pages, page=page)
    elif given is None:
        head = _PROMPT_ALONE
    elif given:
        head = _PROMPT_GIVEN.format(pages="the text of pages" if text else "images of pages or of parts of pages")
    else:
        head = _PROMPT_NOTHING_GIVEN
    tail = (_PROMPT_ACTING if search or crop else _PROMPT_AT_ONCE) + _PROMPT_ANSWER
    return head + (_PROMPT_CROP if crop else "") + tail + f"\nQuestion: {question}"


_INVALID_TEXT = {
    InvalidReason.NO_ACTION: "it held no action.",
    InvalidReason.UNCLOSED: "its action tag was never closed.",
    InvalidReason.NESTED: "one action held another tag.",
    InvalidReason.EMPTY: "the action was empty.",
    InvalidReason.BAD_BOX: "a box is a list of four numbers, left, top, right and bottom, in pixels of the last image.",
    InvalidReason.NOT_FINITE: "the numbers of a box must be finite.",
    InvalidReason.IMAGE_TOKEN: "a message cannot contain image placeholders.",
    InvalidReason.NO_IMAGE: "there is no image to enlarge yet; search first.",
    InvalidReason.ZERO_AREA: "the box had no area.",
    InvalidReason.OUTSIDE: "the box lay outside the image.",
    InvalidReason.NOT_ALLOWED: "this action is not available here.",
}


def invalid_message(reason: InvalidReason, allowed: Sequence[ActionKind] = tuple(ActionKind)) -> str:
    """What the environment says to an invalid reply, the answer being the last of the `allowed` actions. Names no tag
    in full, so it can never be parsed as an action."""
    *others, answer = (kind.value for kind in allowed)
    actions = f"{', '.join(others)} or {answer}" if others else answer
    return (
        f"Your last message could not be carried out: {_INVALID_TEXT[reason]} "
        f"Reason first, then use exactly one action: {actions}, in its tags."
    )


NO_NEW_PAGE = "The search returned no page that you have not already seen. Try other words, or answer."
"""Observation of a search whose results were all shown before (trap T9)."""

LAST_TURN = "This is your last message: give your answer now."
"""Appended to the observation before the last permitted reply, in training, evaluation and demo alike (trap T23)."""
