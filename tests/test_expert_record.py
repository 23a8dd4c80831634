"""What experts did and cost: counted over runs, and a grounding expert that does nothing but fail is no success."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from test_experts import CROP, IMAGE, Grounder, conversation

from vrag_lib.endpoint import Usage
from vrag_lib.expert_record import check_record, expert_record, keep_record
from vrag_lib.experts import Located, MultiExpertPolicy
from vrag_lib.geometry import Box
from vrag_lib.policy import ScriptedPolicy
from vrag_lib.synthesis import SynthesisError

GOOD, AWAY = Located(Box(10, 20, 300, 250)), Located(None, "connection: ConnectError at http://x/v1: refused")


def asked(*answers: Located) -> MultiExpertPolicy:
    """A policy whose grounding expert was asked once for each of these answers and paid for."""
    grounder = Grounder(*answers)
    grounder.usage = Usage(prompt_price=2.0)
    policy = MultiExpertPolicy(ScriptedPolicy([CROP]), grounder)
    policy.generate([conversation(IMAGE)] * len(answers))
    grounder.usage.add(requests=len(answers), prompt_tokens=500_000, failure="connection", given_up="connection")
    return policy


def test_runs_add_up_and_one_that_asks_nothing_changes_nothing(tmp_path):
    first = keep_record(asked(GOOD, AWAY), tmp_path)
    assert first["counts"] == {"relocated": 1, "kept_box_failed": 1} and first["failed_boxes"] == {"connection": 1}
    second = keep_record(asked(AWAY, Located(Box(5000, 5000, 6000, 6000))), tmp_path)
    assert second["counts"] == {"relocated": 1, "kept_box_failed": 2, "kept_box_invalid": 1}
    assert second["failed_boxes"] == {"connection": 2, "bad_box": 1} and second["first_failure"] == AWAY.error
    grounder = second["experts"]["grounder"]
    assert (grounder["name"], grounder["requests"], grounder["cost"]) == ("grounder", 4, 2.0)
    assert grounder["failures"] == grounder["given_up"] == {"connection": 2}
    assert second["experts"]["planner"] == {"name": "scripted"}
    assert (
        keep_record(ScriptedPolicy([CROP]), tmp_path) == second == json.loads((tmp_path / "experts.json").read_text())
    )


def test_a_policy_that_counts_nothing_has_no_record(tmp_path):
    assert expert_record(ScriptedPolicy([CROP])) == {} == keep_record(ScriptedPolicy([CROP]), tmp_path)
    assert not any(tmp_path.iterdir())
    alone = SimpleNamespace(name="openai:m", usage=Usage(requests=3))
    assert expert_record(alone)["experts"]["alone"]["requests"] == 3


def test_some_failures_are_a_warning_and_nothing_but_failures_an_error(tmp_path, caplog):
    for fine in (asked(GOOD), ScriptedPolicy([CROP])):
        check_record(expert_record(fine), fine, tmp_path)
    assert not caplog.text
    some = asked(GOOD, AWAY, AWAY)
    check_record(expert_record(some), some, tmp_path)
    assert "located 1 of 3 boxes" in caplog.text and "{'connection': 2}" in caplog.text
    none = asked(AWAY, AWAY)
    with pytest.raises(SynthesisError, match=r"located 0 of 2 boxes.*ConnectError at http://x/v1.*remove .* run again"):
        check_record(expert_record(none), none, tmp_path)
