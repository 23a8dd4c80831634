"""The one rollout loop: order, budgets, tokens, failures."""

from __future__ import annotations

from importlib import metadata

import pytest
from helpers import FailingRetriever, FakeCorpus, FakeRetriever

from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Question
from vrag_lib.geometry import Size
from vrag_lib.policy import Policy, Reply, ScriptedPolicy
from vrag_lib.rollout import TokenMismatchError, rollout, trajectory_id, turn_seed
from vrag_lib.trajectory import StopReason

CORPUS = FakeCorpus([Size(1000, 800), Size(800, 600), Size(640, 480)])
QUESTIONS = [Question(f"q{i}", f"question {i}", str(i)) for i in range(5)]


def run(policy, questions=QUESTIONS, retriever=None, **settings):
    retriever = retriever or FakeRetriever(CORPUS.page_ids)
    return rollout(policy, questions, CORPUS, retriever, **settings)


class TokenPolicy:
    """Token ids are code points: enough to check what the loop records."""

    name = "tokens"

    def __init__(self, script, tamper=False):
        self._script = ScriptedPolicy(script)
        self._tamper = tamper
        self.seeds = []

    def generate(self, conversations, *, seeds=None):
        self.seeds += seeds
        replies = []
        for conversation in conversations:
            text = self._script.generate([conversation])[0].text
            context = [t for turn in conversation[:-1] for t in turn.token_ids]
            if self._tamper and len(conversation) > 1:
                context[0] += 1
            context += [ord(c) for c in conversation[-1].text] + [0] * len(conversation[-1].images)
            ids = tuple(map(ord, text))
            replies.append(Reply(text, ids, (-1.0,) * len(ids), tuple(context)))
        return replies


SCRIPT = ["<think>t</think><search>2</search>", "<bbox>[0, 0, 200, 200]</bbox>", "<answer>7</answer>"]


def test_trajectories_come_in_the_order_of_their_questions_for_any_batch_size():
    def length_by_question(conversation):
        number = int(conversation[0].text[-1])
        return "<answer>x</answer>" if len(conversation) > 2 * number else "<search>1</search>"

    policy = ScriptedPolicy(length_by_question)
    one = run(policy, batch_size=1)
    three = run(policy, batch_size=3)
    assert [t.question_id for t in one] == [q.uid for q in QUESTIONS]
    assert [t.turns for t in one] == [t.turns for t in three]
    assert [len(t.replies) for t in one] == [1, 2, 3, 4, 5]


def test_the_record_holds_the_tokens_as_sampled_and_inserted():
    record = run(TokenPolicy(SCRIPT), QUESTIONS[:1])[0]
    tokens = record.tokens()
    sampled = "".join(chr(t) for t, s in zip(tokens.token_ids, tokens.sampled, strict=True) if s)
    assert sampled == "".join(SCRIPT)
    inserted = [t for t, s in zip(tokens.token_ids, tokens.sampled, strict=True) if not s]
    assert "".join(map(chr, inserted)).replace("\0", "") == "".join(t.text for t in record.turns if t.role == "user")
    assert inserted.count(0) == 2 == len(record.images)


def test_the_record_says_which_versions_made_it():
    record = run(TokenPolicy(SCRIPT), QUESTIONS[:1])[0]
    assert record.versions["torch"] == metadata.version("torch") and "python" in record.versions


def test_a_policy_that_changes_recorded_tokens_is_caught():
    with pytest.raises(TokenMismatchError, match="'q0', turn 2"):
        run(TokenPolicy(SCRIPT, tamper=True), QUESTIONS[:1])


def test_searches_of_a_batch_go_to_the_retriever_together_the_same_words_once():
    retriever = FakeRetriever(CORPUS.page_ids)
    records = run(ScriptedPolicy(SCRIPT), retriever=retriever, batch_size=5)
    assert retriever.calls == [["2"]]
    assert all(record.shown_pages == ("doc_2",) for record in records)


def test_seeds_belong_to_trajectory_and_turn_not_to_the_batch():
    policies = [TokenPolicy(SCRIPT), TokenPolicy(SCRIPT)]
    for policy, batch_size in zip(policies, (1, 5), strict=True):
        run(policy, seeds=[3, 1, 4, 1, 5], batch_size=batch_size)
    assert sorted(policies[0].seeds) == sorted(policies[1].seeds)
    assert len({turn_seed(s, t) for s in range(50) for t in range(10)}) == 500
    assert trajectory_id("q", 1, "r") != trajectory_id("q", 2, "r") == trajectory_id("q", 2, "r")


def test_given_pages_stand_in_the_first_turn_of_the_record():
    config = EnvironmentConfig(given="retrieved", given_pages=2, allow_search=False, allow_crop=False)
    retriever = FakeRetriever(CORPUS.page_ids)
    record = run(TokenPolicy(["<answer>7</answer>"]), [Question("q", "3 3 1", "7")], retriever, config=config)[0]
    first = record.turns[0]
    assert [image.page_id for image in first.images] == ["doc_3", "doc_1"] == list(record.shown_pages)
    assert first.token_ids.count(0) == 2 and sum(record.tokens().sampled) == len("<answer>7</answer>")
    assert retriever.calls == [["3 3 1"]] and record.timings["retrieve"] > 0


def test_text_pages_survive_the_tokens_of_their_turn():
    config = EnvironmentConfig(observation="text", allow_crop=False)
    record = run(TokenPolicy(["<search>2</search>", "<answer>7</answer>"]), QUESTIONS[:1], config=config)[0]
    assert record.shown_pages == record.turns[2].text_pages == ("doc_2",) and record.turns[2].token_ids
    assert "".join(map(chr, record.turns[2].token_ids)) == record.turns[2].text == "A page:\n> text of doc_2"


def test_nothing_is_generated_when_no_trajectory_could_open():
    class Unasked(ScriptedPolicy):
        def generate(self, conversations, *, seeds=None):
            raise AssertionError("asked for nothing")

    config = EnvironmentConfig(given="retrieved", given_pages=2)
    records = run(Unasked([]), retriever=FailingRetriever(CORPUS.page_ids), config=config, batch_size=2)
    assert [t.stop_reason for t in records] == [StopReason.ERROR] * 5
    assert all("the search server is away" in t.error and len(t.turns) == 1 for t in records)


def test_one_failed_conversation_leaves_the_others():
    class Flaky(ScriptedPolicy):
        def generate(self, conversations, *, seeds=None):
            replies = super().generate(conversations)
            replies[0] = Reply("", finish_reason="error", error="time-out after 3 tries")
            return replies

    first, *rest = run(Flaky(["<answer>x</answer>"]), batch_size=5)
    assert first.stop_reason is StopReason.ERROR and first.error == "time-out after 3 tries" and first.answer is None
    assert all(t.answer == "x" for t in rest)


def test_a_failing_search_engine_is_recorded_not_raised():
    records = run(ScriptedPolicy(SCRIPT), retriever=FailingRetriever(CORPUS.page_ids))
    assert {t.stop_reason for t in records} == {StopReason.ERROR}
    assert all("the search server is away" in t.error for t in records)


def test_a_query_that_fails_costs_its_own_trajectory_only():
    """Trap T22: all searches of a batch are one call, which the one bad query fails for all."""

    class Choosy(FakeRetriever):
        def search(self, queries, k):
            if "bad" in queries:
                raise ValueError("this query cannot be read")
            return super().search(queries, k)

    def reply(conversation):
        query = "bad" if conversation[0].text.endswith("question 2") else "3"
        return f"<search>{query}</search>" if len(conversation) == 1 else "<answer>x</answer>"

    records = run(ScriptedPolicy(reply), retriever=Choosy(CORPUS.page_ids), batch_size=5)
    bad = records.pop(2)
    assert bad.stop_reason is StopReason.ERROR and "this query cannot be read" in bad.error and not bad.shown_pages
    assert [(t.shown_pages, t.answer) for t in records] == [(("doc_3",), "x")] * 4


def test_budgets_end_a_trajectory_with_their_own_reason():
    long = run(TokenPolicy(["<search>1</search>"]), QUESTIONS[:1], max_sampled_tokens=30)[0]
    assert long.stop_reason is StopReason.MAX_TOKENS and len(long.replies) == 2

    class Full(ScriptedPolicy):
        def generate(self, conversations, *, seeds=None):
            return [Reply("", finish_reason="overflow") for _ in conversations]

    assert run(Full([]), QUESTIONS[:1])[0].stop_reason is StopReason.CONTEXT_OVERFLOW
    turns = run(ScriptedPolicy(["<search>1</search>"]), QUESTIONS[:1], config=EnvironmentConfig(max_turns=3))[0]
    assert turns.stop_reason is StopReason.MAX_TURNS and len(turns.replies) == 3


def test_finished_trajectories_are_handed_over_as_they_end():
    seen = []
    records = run(ScriptedPolicy(["<answer>x</answer>"]), batch_size=2, on_finished=seen.append)
    assert seen == records


def test_unprintable_replies_are_recorded_and_text_after_the_action_is_dropped():
    record = run(ScriptedPolicy(["a\ud800\x00<search>1</search><answer>later</answer>"]), QUESTIONS[:1])[0]
    assert record.turns[1].text == "a?\ufffd<search>1</search>"


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="5 questions but 1 seeds"):
        run(ScriptedPolicy(["x"]), seeds=[1])
    with pytest.raises(ValueError, match="at least one conversation"):
        run(ScriptedPolicy(["x"]), batch_size=0)
    assert isinstance(ScriptedPolicy(["x"]), Policy)
