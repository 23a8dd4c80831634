"""The tag grammar (traps T2, T3, T5) and the messages that must never look like an action."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrag_lib.actions import (
    IMAGE_TOKENS,
    LAST_TURN,
    MAX_QUERY_CHARS,
    NO_NEW_PAGE,
    STOP_STRINGS,
    Action,
    ActionKind,
    Invalid,
    InvalidReason,
    cut_reply,
    format_box,
    format_reply,
    invalid_message,
    parse_reply,
    question_prompt,
    quote_page,
)
from vrag_lib.geometry import Box


@pytest.mark.parametrize(
    "reply, kind, argument",
    [
        ("<think>a</think><search>b</search>", ActionKind.SEARCH, "b"),
        ("<search>\n b c \n</search>", ActionKind.SEARCH, "b c"),
        ("<answer>4 < 5 & 6</answer>", ActionKind.ANSWER, "4 < 5 & 6"),
        ("<think>I could <search> again</think><answer>x</answer>", ActionKind.ANSWER, "x"),
        ("<search>first</search><answer>second</answer>", ActionKind.SEARCH, "first"),
        ("no thought <answer>x</answer> and a tail", ActionKind.ANSWER, "x"),
        ("<bbox>[1, 2, 3, 4]</bbox>", ActionKind.CROP, "[1, 2, 3, 4]"),
    ],
)
def test_wellformed_replies(reply, kind, argument):
    action = parse_reply(reply)
    assert isinstance(action, Action)
    assert (action.kind, action.argument) == (kind, argument)


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("", InvalidReason.NO_ACTION),
        ("<think>only</think>", InvalidReason.NO_ACTION),
        ("</answer>", InvalidReason.NO_ACTION),
        ("<search>cut off", InvalidReason.UNCLOSED),
        ("<search> </search>", InvalidReason.EMPTY),
        ("<search><think>x</think></search>", InvalidReason.NESTED),
        ("<search>a</answer>", InvalidReason.NO_ACTION),
        ("<answer><search>a</search></answer>", None),
        ("<bbox>1,2,3,4</bbox>", InvalidReason.BAD_BOX),
        ("<bbox>[1,2,3]</bbox>", InvalidReason.BAD_BOX),
        ("<bbox>[1,2,3,4,5]</bbox>", InvalidReason.BAD_BOX),
        ("<bbox>[true,false,1,2]</bbox>", InvalidReason.BAD_BOX),
        ('<bbox>["1",2,3,4]</bbox>', InvalidReason.BAD_BOX),
        ("<bbox>[NaN,0,1,1]</bbox>", InvalidReason.NOT_FINITE),
        ("<bbox>[0,0,Infinity,1]</bbox>", InvalidReason.NOT_FINITE),
        ("<bbox>[0,0,1e999,1]</bbox>", InvalidReason.NOT_FINITE),
        ("<bbox>[0,0," + "9" * 350 + ",1]</bbox>", InvalidReason.NOT_FINITE),
        ("<bbox>" + "[" * 300 + "</bbox>", InvalidReason.BAD_BOX),
        ("<search>a <|image_pad|></search>", InvalidReason.IMAGE_TOKEN),
    ],
)
def test_broken_replies_are_invalid_with_a_reason(reply, reason):
    parsed = parse_reply(reply)
    if reason is None:
        # The reply ends at its first closing tag, so the inner search is the action.
        assert parsed == Action(ActionKind.SEARCH, "a")
    else:
        assert parsed == Invalid(reason)


def test_a_crop_has_one_tag_which_is_the_prompts():
    """The paper writes region, its prompt and code bbox."""
    assert "<bbox>" in question_prompt("q") and "region>" not in question_prompt("q")
    assert parse_reply("<region>[1, 2, 3, 4]</region>") == Invalid(InvalidReason.NO_ACTION)


def test_nothing_after_the_first_closing_tag_is_read():
    """Trap T5: several actions in one reply."""
    reply = "<think>t</think><search>q</search>\n<answer>leaked</answer><|image_pad|>"
    assert cut_reply(reply) == "<think>t</think><search>q</search>"
    assert parse_reply(reply) == Action(ActionKind.SEARCH, "q")
    assert all(stop in "</search></bbox></answer>" for stop in STOP_STRINGS)


@given(st.text())
def test_cutting_only_ever_takes_a_prefix(text):
    """Trap T2: a reply is cut, never rewritten."""
    assert text.startswith(cut_reply(text))


@given(st.text(alphabet="<>/abehnoqrstwx[], 0123456789.-"))
def test_parsing_never_raises(text):
    assert isinstance(parse_reply(text), Action | Invalid)


def test_messages_to_the_model_hold_no_action():
    """Trap T3: the released code's invalid-action message contains an answer that then earns a reward."""
    for text in [NO_NEW_PAGE, LAST_TURN, *(invalid_message(reason) for reason in InvalidReason)]:
        assert isinstance(parse_reply(text), Invalid)
        assert "<" not in text and not any(token in text for token in IMAGE_TOKENS)


def test_the_crop_sentence_of_the_prompt_can_be_left_out():
    assert "bbox" in question_prompt("q") and "bbox" not in question_prompt("q", crop=False)
    assert question_prompt("why?").endswith("Question: why?")


def test_prompts_without_search_speak_of_what_there_is():
    prompts = {n: question_prompt("why?", crop=False, search=False, given=n) for n in (None, 0, 2)}
    assert "what you know" in prompts[None] and "No reference" in prompts[0] and "references above" in prompts[2]
    assert all("<search>" not in text and "budget" not in text for text in prompts.values())
    assert all("<think>" in text and text.endswith("\nQuestion: why?") for text in prompts.values())
    assert "image" not in question_prompt("why?", crop=False, search=False, given=2, text=True)
    assert "image" not in question_prompt("why?", crop=False, text=True)


def test_messages_name_the_allowed_actions_only():
    said = invalid_message(InvalidReason.NO_ACTION, (ActionKind.SEARCH, ActionKind.ANSWER))
    assert "search or answer" in said and "bbox" not in said
    assert "action: answer, in" in invalid_message(InvalidReason.NO_ACTION, (ActionKind.ANSWER,))


@given(st.lists(st.sampled_from(["<", "</", "search>", "answer>", "<|image_pad|>", "a", "\n", "\u2028", "Question: "])))
def test_a_quoted_page_holds_no_tag_and_no_line_of_its_own(parts):
    quoted = quote_page("".join(parts), 50)
    assert isinstance(parse_reply(quoted), Invalid)
    assert not any(text in quoted for text in (*IMAGE_TOKENS, *STOP_STRINGS))
    first, *lines = quoted.splitlines()
    assert first == "A page:" and lines and all(line.startswith("> ") for line in lines)


@given(st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4))
def test_boxes_written_by_the_package_parse_back(values):
    action = parse_reply(format_reply("t", ActionKind.CROP, format_box(Box(*values))))
    assert all(abs(a - b) <= 0.5 for a, b in zip(action.box.as_tuple(), values, strict=True))


def test_megabytes_are_parsed_in_linear_time_and_queries_are_capped():
    start = time.process_time()
    long = "<search>" + "q" * 5_000_000 + "</search>"
    assert len(parse_reply(long).argument) == MAX_QUERY_CHARS
    for text in ["<search>" * 500_000, "<" * 5_000_000, "</think>" * 500_000, "<answer>" * 10**5 + "</answer>"]:
        parse_reply(text)
    assert time.process_time() - start < 5
