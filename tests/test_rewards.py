"""Rewards read from the record (traps T3, T4, T14); worked examples of spec §1.5."""

from __future__ import annotations

import dataclasses
import math

import pytest
from helpers import FakeCorpus, FakeRetriever
from hypothesis import given
from hypothesis import strategies as st

from vrag_lib.corpus import Question
from vrag_lib.geometry import Size
from vrag_lib.judge import JudgeError
from vrag_lib.policy import ScriptedPolicy
from vrag_lib.rewards import RECIPES, RewardRecipe, Scorer, ndcg, score
from vrag_lib.rollout import rollout
from vrag_lib.trajectory import Trajectory

CORPUS = FakeCorpus([Size(800, 600)] * 5)
QUESTION = Question("q", "how many?", "42", file_name="doc.pdf", reference_pages=(2,))


def run(*replies: str) -> Trajectory:
    return rollout(ScriptedPolicy(list(replies)), [QUESTION], CORPUS, FakeRetriever(CORPUS.page_ids))[0]


@pytest.mark.parametrize("place, value", [(1, 1.0), (2, 0.631), (3, 0.5), (4, 0.431)])
def test_one_gold_page_found_at_search_k(place, value):
    shown = [f"x{i}" for i in range(place - 1)] + ["gold"]
    assert ndcg(shown, ["gold"]) == pytest.approx(value, abs=5e-4)


@given(st.lists(st.sampled_from("abcdef"), max_size=8), st.sets(st.sampled_from("abcdef")))
def test_ndcg_is_within_0_and_1_even_when_pages_repeat(shown, gold):
    assert 0 <= ndcg(shown, gold) <= 1 + 1e-12


def test_pages_after_the_gold_ones_cost_nothing():
    assert ndcg(["g", "x", "y", "z"], ["g"]) == ndcg(["g"], ["g"]) == 1


def test_a_complete_trajectory_under_each_recipe():
    record = run("<search>2</search>", "<answer>42</answer>")
    assert score(record).rewards == {"retrieval": (1.0, 0.2), "answer": (1.0, 0.8), "pattern": (1.0, 0.0)}
    assert all(score(record, recipe).total_reward == pytest.approx(1.0) for recipe in RECIPES.values())


def test_the_gate_takes_a_right_answer_without_a_search_and_the_paper_does_not():
    record = run("<answer>42</answer>")
    assert score(record, RECIPES["released_code"]).total_reward == 0
    assert score(record, RECIPES["paper"]).total_reward == pytest.approx(0.8)
    assert score(record, RECIPES["released_code"]).rewards["answer"] == (1.0, 0.0)


def test_example_text_in_observations_and_thoughts_earns_nothing():
    """Trap T3: the released code rewards the example answer in its own invalid-action message."""
    question = dataclasses.replace(QUESTION, reference_answer="Beijing")
    policy = ScriptedPolicy(["<think><answer>Beijing", "no action", "nothing"])
    record = rollout(policy, [question], CORPUS, FakeRetriever(CORPUS.page_ids))[0]
    assert "Beijing" in record.turns[0].text  # the prompt's own example
    assert score(record, RECIPES["released_code"]).total_reward == 0
    assert {s for s, _ in score(record).rewards.values()} == {0.0}


def test_crops_are_not_pages():
    record = run("<search>1</search>", "<bbox>[0,0,90,90]</bbox>", "<search>2</search>", "<answer>x</answer>")
    assert record.shown_pages == ("doc_1", "doc_2")
    assert score(record).rewards["retrieval"][0] == pytest.approx(0.631, abs=5e-4)


def test_free_weights_and_another_judge():
    record = run("<search>2</search>", "<answer>41</answer>")
    lenient = score(record, RewardRecipe(0.5, 0.25, 0.25), judge=lambda question, reference, answer: True)
    assert lenient.total_reward == pytest.approx(1.0)
    assert score(record, RewardRecipe(0.5, 0.25, 0.25)).total_reward == pytest.approx(0.75)


def test_a_judge_that_fails_is_an_unknown_reward_and_never_a_zero():
    """Trap S2: and it costs nothing where the answer has no weight."""

    def judge(question, reference, answer):
        raise JudgeError("no verdict")

    record = run("<search>2</search>", "<answer>42</answer>")
    assert math.isnan(score(record, judge=judge).total_reward)
    assert score(record, RECIPES["retrieval_only"], judge).total_reward == 1
    assert score(run("<answer>42</answer>"), RECIPES["released_code"], judge).total_reward == 0
    assert score(run("no action"), judge=judge).total_reward == 0


def test_a_model_judge_gets_all_answers_of_a_rollout_at_once():
    class Judge:
        def many(self, items):
            self.items = list(items)
            return [answer == reference for _, reference, answer in items]

    records = [run(f"<answer>{text}</answer>") for text in ("42", "41", "42")] + [run("no action")]
    scorer = Scorer(RECIPES["answer_only"], Judge())
    assert [t.total_reward for t in scorer.many(records)] == [1, 0, 1, 0] and len(scorer.judge.items) == 2


def test_a_crop_of_the_whole_page_is_no_further_page():
    """Trap T14: the gold page stays the second that was shown."""
    record = run("<search>1</search>", "<bbox>[0, 0, 5000, 5000]</bbox>", "<search>2</search>", "<answer>42</answer>")
    assert len(record.images) == 3 and len(record.shown_pages) == 2
    assert ndcg(record.shown_pages, record.gold_page_ids) == pytest.approx(0.631, abs=5e-4)
