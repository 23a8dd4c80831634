"""Evaluation: what a row says about a trajectory, intervals by hand, and runs that go on where they stopped."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import FailingRetriever, FakeCorpus, FakeRetriever

from vrag_lib.actions import InvalidReason
from vrag_lib.answer_metrics import NOT_ANSWERABLE, mmlongbench_result
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Question
from vrag_lib.evaluate import (
    by_element,
    compare,
    crop_iou,
    evaluate_trajectories,
    ratio_interval,
    rescore,
    run,
    summarise,
    summary_table,
)
from vrag_lib.geometry import Size
from vrag_lib.policy import Reply, ScriptedPolicy
from vrag_lib.rollout import rollout
from vrag_lib.stats import bootstrap_mean
from vrag_lib.synthesis import SamplingError, SynthesisError, read_samples
from vrag_lib.trajectory import RecordError, read_trajectories


class KnownCorpus(FakeCorpus):
    fingerprint = text_fingerprint = "three square pages"


# Pages of this size are shown as they are, so boxes in a reply are boxes of the page.
CORPUS = KnownCorpus([Size(560, 560)] * 3)
RETRIEVER = FakeRetriever(CORPUS.page_ids)
REGION = {"page": 2, "region_box": [0, 0, 280, 140]}
QUESTION = Question("q0", "what?", "seven", "doc.pdf", (2,), "Chart", "Single-Hop", {"regions": [REGION]})
GOOD = ["<search>2</search>", "<bbox>[0, 0, 280, 280]</bbox>", "<answer>Seven</answer>"]
ONE_REPLY = ["<answer>seven</answer>"]


def roll(script, questions=(QUESTION,), retriever=RETRIEVER, **settings):
    policy = script if hasattr(script, "generate") else ScriptedPolicy(script)
    return rollout(policy, questions, CORPUS, retriever, **settings)


def row(script, question=QUESTION, retriever=RETRIEVER, **settings):
    frame = evaluate_trajectories(roll(script, [question], retriever), [question], **settings)
    assert len(frame) == 1
    return frame.iloc[0]


def rows(values, column="judge", **more):
    """A frame of one row per (uid, value), as far as `summarise` reads it."""
    zeros = dict.fromkeys(("judge", "judge_gated", "exact", "answered", "failed", "ndcg", "gold_recall"), 0.0)
    zeros |= dict.fromkeys(("crop_iou", "replies", "invalid", "searches", "crops", "noise_pages"), 0.0)
    zeros |= dict.fromkeys(("tokens_sampled", "seconds_generate", "seconds_retrieve"), 0.0)
    frame = pd.DataFrame([{"uid": uid, **zeros, column: value} for uid, value in values])
    return frame.assign(**more)


def test_a_good_trajectory():
    found = row(GOOD)
    assert (found["judge"], found["judge_gated"], found["exact"], found["f1"], found["anls"]) == (1, 1, 1, 1, 1)
    assert (found["answered"], found["failed"], found["stop_reason"]) == (True, False, "answer")
    assert (found["ndcg"], found["gold_recall"], found["gold_page_seen"], found["noise_pages"]) == (1, 1, 1, 0)
    assert (found["searches"], found["crops"], found["replies"], found["invalid"]) == (1, 1, 3, 0)
    assert found["crop_iou"] == pytest.approx(0.5)  # 280 x 140 of a crop of 280 x 280
    assert (found["source_type"], found["query_type"], found["answer"]) == ("Chart", "Single-Hop", "Seven")
    assert math.isnan(found["tokens_sampled"])
    assert found["seconds_generate"] >= 0 and found["seconds_retrieve"] >= 0


def test_the_gate_zeroes_a_right_answer_without_a_search_and_stands_beside_the_judge():
    found = row(ONE_REPLY)
    assert (found["judge"], found["judge_gated"]) == (1, 0)
    assert (found["ndcg"], found["gold_recall"], found["gold_page_seen"]) == (0, 0, 0)
    assert math.isnan(found["crop_iou"])

    def broken(*_):
        raise OSError("gone")

    found = row(ONE_REPLY, judge=broken)
    assert math.isnan(found["judge"]) and found["judge_gated"] == 0


def test_invalid_actions_as_the_paper_counts_them():
    """An invalid reply, a crop that shows half of the region at most, an answer before any page."""
    half = ["<search>2</search>", "<bbox>[140, 0, 280, 280]</bbox>", "<answer>seven</answer>"]
    more = ["<search>2</search>", "<bbox>[130, 0, 280, 280]</bbox>", "<answer>seven</answer>"]
    elsewhere = ["<search>1</search>", "<bbox>[0, 0, 280, 280]</bbox>", "no tag", "<answer>seven</answer>"]
    found = [row(script)["wrong_actions"] for script in (GOOD, ONE_REPLY, half, more, elsewhere)]
    assert found == [0, 1, 1, 0, 2]
    as_text = EnvironmentConfig(observation="text", allow_crop=False)
    searched = roll(["<search>2</search>", "<answer>seven</answer>"], config=as_text)
    assert evaluate_trajectories(searched, [QUESTION])["wrong_actions"].item() == 0
    assert math.isnan(row(GOOD, replace(QUESTION, extra={}))["wrong_actions"])


def test_one_of_several_accepted_answers_is_enough_for_the_judge():
    several = dataclasses.replace(QUESTION, reference_answer="seven", extra={"answers": ["7 units", "seven"]})
    assert row(ONE_REPLY, several)["judge"] == 1
    assert row(["<answer>eight</answer>"], several)["judge"] == 0

    def fails_on_units(query, reference, answer):
        if "units" in reference:
            raise OSError("gone")
        return reference == answer

    assert row(ONE_REPLY, several, judge=fails_on_units)["judge"] == 1
    assert math.isnan(row(["<answer>eight</answer>"], several, judge=fails_on_units)["judge"])


def test_an_element_may_be_missing_or_spelt_loosely():
    kinds = pd.DataFrame({"source_type": [None, "Text , Table", "Chart;Table"]})
    assert list(by_element(kinds)["element"]) == ["none", "text", "table", "chart", "table"]


def test_pages_off_the_gold_ones_are_noise_and_a_late_gold_page_costs_ndcg():
    found = row(["<search>1</search>", "<search>2</search>", "<answer>no</answer>"])
    assert found["ndcg"] == pytest.approx(1 / math.log2(3))
    assert (found["pages"], found["noise_pages"], found["gold_recall"], found["judge"]) == (2, 1, 1, 0)


def test_invalid_replies_are_counted_by_reason():
    found = row(["hm", "<bbox>[0, 0, 9, 9]</bbox>", "<search>2</search>", "<answer>seven</answer>"])
    assert (found["invalid"], found["invalid_no_action"], found["invalid_no_image"]) == (2, 1, 1)
    assert sum(found[f"invalid_{reason.value}"] for reason in InvalidReason) == 2
    assert found["replies"] == 4


@pytest.mark.parametrize(
    ("script", "retriever", "reason"),
    [
        (["<search>1</search>"], RETRIEVER, "max_turns"),
        (["hm"], RETRIEVER, "invalid_streak"),
        (["<search>1</search>"], FailingRetriever(CORPUS.page_ids), "error"),
    ],
)
def test_what_failed_is_wrong_and_shown(script, retriever, reason):
    found = row(script, retriever=retriever)
    assert (found["failed"], found["answered"], found["judge"], found["exact"]) == (True, False, 0, 0)
    assert found["stop_reason"] == reason
    assert ("the search server is away" in found["error"]) == (reason == "error")


def test_what_failed_counts_in_the_accuracy():
    table = summarise(rows([("a", 1), ("b", 0)], answered=[True, False], failed=[False, True])).iloc[0]
    assert (table["accuracy"], table["accuracy_gated"], table["n"], table["failed"]) == (0.5, 0.0, 2, 1)


def test_a_question_without_gold_pages_has_no_retrieval_score():
    found = row(GOOD, Question("q1", "what?", NOT_ANSWERABLE), metrics=("mmlongbench", "evisrag_em"))
    assert math.isnan(found["ndcg"]) and math.isnan(found["gold_recall"]) and math.isnan(found["gold_page_seen"])
    assert (found["answerable"], found["refused"], found["mmlongbench"]) == (False, False, 0)
    found = row(["<answer>Not answerable</answer>"], Question("q1", "?", NOT_ANSWERABLE), metrics=("mmlongbench",))
    assert (found["judge"], found["refused"], found["mmlongbench"]) == (1, True, 1)


def test_the_best_crop_counts_and_only_on_the_page_of_a_region():
    trajectory = roll([*GOOD[:2], "<bbox>[0, 0, 28, 28]</bbox>", GOOD[2]])[0]
    assert crop_iou(trajectory, QUESTION) == pytest.approx(0.5)  # of the first crop; the second is far too small
    elsewhere = {**REGION, "page": 3}
    for regions, expected in (([elsewhere], 0.0), ([elsewhere, REGION], 0.5)):
        question = Question("q0", "what?", "7", "doc.pdf", (2, 3), extra={"regions": regions})
        assert crop_iou(trajectory, question) == pytest.approx(expected)
    with pytest.raises(ValueError, match="regions of question 'q0'"):
        crop_iou(trajectory, Question("q0", "what?", "7", extra={"regions": [{"box": [1]}]}))


class TokenPolicy:
    """Gives token ids: the code points of its replies."""

    name = "tokens"

    def generate(self, conversations, *, seeds=None):
        return [Reply("<answer>ab</answer>", (1, 2, 3), (-1.0,) * 3, (7,) * 5) for _ in conversations]


def test_sampled_tokens_are_counted():
    assert row(TokenPolicy())["tokens_sampled"] == 3


def test_wrong_input_is_named():
    trajectories = roll(GOOD)
    with pytest.raises(ValueError, match="no metric 'rouge'; metrics are exact"):
        evaluate_trajectories(trajectories, [QUESTION], metrics=("rouge",))
    with pytest.raises(ValueError, match="no question has the uid 'q0'"):
        evaluate_trajectories(trajectories, [Question("q9", "what?", "7")])
    with pytest.raises(ValueError, match="two questions have the uid 'q0'"):
        evaluate_trajectories(trajectories, [QUESTION, QUESTION])
    with pytest.raises(ValueError, match="no trajectories"):
        evaluate_trajectories([], [QUESTION])


def test_truth_comes_from_the_questions_not_from_the_record():
    corrected = Question("q0", "what?", "eight", "doc.pdf", (1,))
    frame = evaluate_trajectories(roll(GOOD), [corrected])
    assert (frame["judge"][0], frame["ndcg"][0]) == (0, 0)


def test_a_judge_that_fails_says_nothing_and_is_counted():
    def judge(question, reference, answer):
        if answer == "broken":
            raise ConnectionError("no reply")
        return True

    questions = [Question("a", "1?", "x"), Question("b", "2?", "x"), Question("c", "3?", "x")]
    answers = {"1?": "<answer>fine</answer>", "2?": "<answer>broken</answer>", "3?": "hm"}
    policy = ScriptedPolicy(lambda conversation: answers[conversation[0].text[-2:]])
    frame = evaluate_trajectories(roll(policy, questions), questions, judge)
    assert frame["judge"][0] == 1 and math.isnan(frame["judge"][1]) and frame["judge"][2] == 0
    table = summarise(frame).iloc[0]
    assert (table["accuracy"], table["n"], table["unjudged"], table["failed"]) == (pytest.approx(2 / 3), 3, 1, 1)


def test_a_judge_of_many_is_asked_once_about_all_different_answers():
    class Judge:
        name = "many"

        def __init__(self):
            self.asked = []

        def many(self, items):
            self.asked.append(list(items))
            return [None if item[2] == "odd" else item[1] == item[2] for item in items]

    questions = [Question(uid, "what?", "seven") for uid in ("a", "b", "c")]
    judge = Judge()
    frame = evaluate_trajectories(roll(ONE_REPLY, questions), questions, judge)
    assert judge.asked == [[("what?", "seven", "seven")]]
    assert list(frame["judge"]) == [1, 1, 1]


def test_samples_of_a_question_are_one_cluster():
    """Questions with means 1/2 and 1: resamples have means 1/2, 3/4, 1 with probabilities 1/4, 1/2, 1/4, so the 95 %
    interval is [1/2, 1]. Resampling the four rows would reach down to 1/4 (probability 0.05)."""
    table = summarise(rows([("a", 1), ("a", 0), ("b", 1), ("b", 1)])).iloc[0]
    assert (table["accuracy"], table["accuracy_low"], table["accuracy_high"]) == (0.75, 0.5, 1.0)
    assert (table["n"], table["trajectories"]) == (2, 4)


def test_a_question_sampled_more_often_weighs_no_more():
    assert summarise(rows([("a", 1), ("a", 1), ("a", 1), ("b", 0)]))["accuracy"][0] == 0.5


def test_rates_by_hand():
    """Two questions with 1 of 2 and 0 of 2 replies invalid: 1/4, and 0 or 1/2 when one question is drawn twice."""
    frame = rows([("a", 1), ("b", 0)], "invalid", replies=2, answered=[True, False], failed=[False, True])
    table = summarise(frame).iloc[0]
    assert [table[f"invalid_rate{end}"] for end in ("", "_low", "_high")] == [0.25, 0.0, 0.5]
    assert [table[f"finish_rate{end}"] for end in ("", "_low", "_high")] == [0.5, 0.0, 1.0]
    assert (table["turns"], table["failed"]) == (2, 1)


def test_what_has_no_value_is_left_out_of_its_mean():
    table = summarise(rows([("a", 0.5), ("b", math.nan), ("c", 0.7), ("c", math.nan)], "crop_iou")).iloc[0]
    assert table["crop_iou"] == pytest.approx(0.6)
    assert table["crop_iou_n"] == 2
    table = summarise(rows([("a", math.nan)], "crop_iou")).iloc[0]
    assert math.isnan(table["crop_iou"]) and math.isnan(table["crop_iou_low"])


def test_summaries_by_group():
    frame = rows([("a", 1), ("b", 0), ("c", 1)], query_type=["Single-Hop", "Multi-Hop", "Single-Hop"])
    table = summarise(frame, by="query_type").set_index("query_type")
    assert (table.loc["Single-Hop", "accuracy"], table.loc["Multi-Hop", "accuracy"]) == (1.0, 0.0)
    assert list(table["n"]) == [1, 2]
    with pytest.raises(ValueError, match="no rows"):
        summarise(frame.iloc[:0])


def test_ratios_with_equal_denominators_are_means():
    values = np.random.default_rng(3).random(30)
    assert ratio_interval(values, np.ones(30)) == pytest.approx(bootstrap_mean(values))
    assert math.isnan(ratio_interval([0, 0], [0, 0]).mean)


def test_mmlongbench_f1_is_the_benchmarks_own():
    scores, answers = [1, 0.8, 0, 0, 1, 0], ["a", "b", "c", NOT_ANSWERABLE, NOT_ANSWERABLE, "5"]
    answerable = [True] * 4 + [False] * 2
    frame = rows([(str(i), score) for i, score in enumerate(scores)], "mmlongbench", answerable=answerable)
    frame["refused"] = [answer == NOT_ANSWERABLE for answer in answers]
    references = ["x" if is_answerable else NOT_ANSWERABLE for is_answerable in answerable]
    table = summarise(frame).iloc[0]
    assert table["mmlongbench_f1"] == pytest.approx(mmlongbench_result(scores, references, answers).f1)
    assert table["mmlongbench_f1_low"] < table["mmlongbench_f1"] < table["mmlongbench_f1_high"]
    without = summarise(frame[frame["answerable"]]).iloc[0]
    assert without["mmlongbench"] == pytest.approx(0.45) and math.isnan(without["mmlongbench_f1"])


def test_questions_count_for_every_element_they_name():
    sources = ["Pure-text (Plain-text), Table", "2d_layout", "", "Chart"]
    frame = by_element(rows([(str(i), i % 2) for i in range(4)], source_type=sources))
    assert list(frame["element"]) == ["text", "table", "layout", "none", "chart"]
    assert list(frame["uid"]) == ["0", "0", "1", "2", "3"]


def test_comparison_is_paired_by_question():
    a = rows([("x", 1), ("y", 1), ("z", 0)])
    b = rows([("z", 0), ("x", 0), ("y", 1), ("y", 0)])
    difference = compare(a, b)
    assert difference.mean == pytest.approx((1 + 0.5 + 0) / 3)
    assert difference.low >= 0
    with pytest.raises(ValueError, match="1 questions are in one frame only, for example 'z'"):
        compare(a, rows([("x", 0), ("y", 1)]))
    with pytest.raises(ValueError, match="no column 'rouge'"):
        compare(a, b, "rouge")
    with pytest.raises(ValueError, match="no question has a value"):
        compare(a, a.assign(judge=math.nan))


QUESTIONS = [
    Question(f"q{i}", f"question {i}", str(i), "doc.pdf", (1 + i % 3,), "Chart", ("Single-Hop", "Multi-Hop")[i % 2])
    for i in range(6)
]


class CountingPolicy:
    """Searches, then answers with the question's number or, by its seed, with another; may break off."""

    name = "counting"

    def __init__(self, break_at=math.inf):
        self.break_at, self.replies = break_at, 0

    def generate(self, conversations, *, seeds=None):
        replies = []
        for conversation, seed in zip(conversations, seeds, strict=True):
            self.replies += 1
            if self.replies >= self.break_at:
                raise ZeroDivisionError("a policy with a bug")
            said = len(conversation) > 1
            number = conversation[0].text[-1] if seed % 2 else "9"
            replies.append(Reply(f"<answer>{number}</answer>" if said else "<search>1 2</search>"))
        return replies


def evaluate(folder, policy, questions=QUESTIONS, **settings):
    return run(policy, questions, CORPUS, RETRIEVER, EnvironmentConfig(), folder, batch_size=1, **settings)


def stable(frame):
    return frame.drop(columns=["seconds_generate", "seconds_retrieve"])


def test_a_run_goes_on_where_it_stopped_and_ends_as_the_unbroken_one(tmp_path):
    whole = evaluate(tmp_path / "whole", CountingPolicy(), seeds=(0, 1))
    assert len(whole) == 12 and whole["id"].nunique() == 12
    with pytest.raises(ZeroDivisionError):
        evaluate(tmp_path / "broken", CountingPolicy(break_at=18), seeds=(0, 1))
    rest = CountingPolicy()
    resumed = evaluate(tmp_path / "broken", rest, seeds=(0, 1))
    assert rest.replies == 2 * (12 - 8)  # 17 replies ended 8 trajectories of two replies each
    pd.testing.assert_frame_equal(stable(whole), stable(resumed))
    evaluate(tmp_path / "broken", CountingPolicy(break_at=0), seeds=(0, 1))  # nothing is left to be generated


def test_answers_without_a_verdict_do_not_make_those_without_an_answer_weigh_more():
    """8 of 12 questions are answered, all rightly; the judge says so of two of them, and nothing of the others."""
    frame = rows([(f"q{i}", 0.0) for i in range(12)]).assign(answered=[True] * 8 + [False] * 4)
    frame["judge"] = frame["judge_gated"] = [1.0, 1.0, *[math.nan] * 6, *[0.0] * 4]
    frame["searches"] = 1.0
    row = summarise(frame).iloc[0]
    assert row["accuracy"] == row["accuracy_gated"] == pytest.approx(8 / 12) and row["unjudged"] == 6
    frame["judge"] = frame["judge_gated"] = [*[math.nan] * 8, *[0.0] * 4]
    row = summarise(frame).iloc[0]
    assert math.isnan(row["accuracy"]) and math.isnan(row["accuracy_gated"]) and row["finish_rate"] == 8 / 12


def test_few_verdicts_make_a_wide_interval():
    frame = rows([(f"q{i}", math.nan) for i in range(100)]).assign(answered=True)
    frame.loc[[0, 1], "judge"] = 1.0, 0.0
    row = summarise(frame).iloc[0]
    assert (row["accuracy"], row["accuracy_low"], row["accuracy_high"]) == (0.5, 0.0, 1.0)


def test_a_carriage_return_in_an_answer_is_no_new_row(tmp_path):
    class Returning(CountingPolicy):
        def generate(self, conversations, *, seeds=None):
            replies = super().generate(conversations, seeds=seeds)
            return [replace(r, text=r.text.replace("</answer>", "\rb</answer>")) for r in replies]

    frame = evaluate(tmp_path, Returning())
    written = pd.read_csv(tmp_path / "questions.csv")
    assert list(written["id"]) == list(frame["id"]) and frame["answer"].str.endswith("\rb").all()
    assert written["answer"].str.endswith("\nb").all()


def test_a_folder_holds_the_seeds_of_one_evaluation(tmp_path):
    """The tables are of all seeds: another set with a seed of its own would write over them."""
    before = evaluate(tmp_path, CountingPolicy(), seeds=(0,))
    with pytest.raises(SynthesisError, match="questions="):
        evaluate(tmp_path, CountingPolicy(), QUESTIONS[:3], seeds=(1,))
    with pytest.raises(SynthesisError, match="checkpoint=None not 7"):
        evaluate(tmp_path, CountingPolicy(), seeds=(1,), settings={"checkpoint": 7})
    assert list(pd.read_csv(tmp_path / "questions.csv")["id"]) == list(before["id"])
    assert evaluate(tmp_path, CountingPolicy(), seeds=(0, 1))["id"].nunique() == 2 * len(before)


def test_a_run_writes_tables_that_say_how_they_came_about(tmp_path):
    frame = evaluate(tmp_path, CountingPolicy(), seeds=(3,), settings={"checkpoint": 7})
    assert [t.id for t in read_trajectories(tmp_path / "trajectories.parquet")] == list(frame["id"])
    written = pd.read_csv(tmp_path / "questions.csv")
    assert list(written["uid"]) == list(frame["uid"]) and list(written["judge"]) == list(frame["judge"])
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert list(summary["by"]) == ["all", "query_type", "query_type"]
    assert summary["accuracy"][0] == pytest.approx(frame["judge"].mean(), abs=1e-5)
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record["settings"]["checkpoint"] == 7 and record["settings"]["judge"] == "rule_judge"
    assert "commit" in record["provenance"]


def test_another_judge_or_metric_needs_no_new_rollouts(tmp_path):
    first = evaluate(tmp_path, CountingPolicy())
    before = (tmp_path / "questions.csv").read_bytes()
    again = rescore(tmp_path, QUESTIONS, judge=lambda *item: False, metrics=("slidevqa_em",), label="strict")
    assert list(again["id"]) == list(first["id"])
    assert again["judge"].sum() == 0 and list(again["slidevqa_em"]) == list(first["exact"])
    assert (tmp_path / "questions.csv").read_bytes() == before
    assert {"questions-strict.csv", "summary-strict.csv", "provenance-strict.json"} <= set(
        path.name for path in tmp_path.iterdir()
    )
    assert json.loads((tmp_path / "provenance-strict.json").read_text())["settings"]["policy"] == "counting"
    rescore(tmp_path, QUESTIONS, metrics=("exact",))
    assert (tmp_path / "questions.csv").read_bytes() != before
    with pytest.raises(ValueError, match="a label"):
        rescore(tmp_path, QUESTIONS, label="../x")
    with pytest.raises(RecordError, match="no trajectory file"):
        rescore(tmp_path / "empty", QUESTIONS)


def test_other_settings_do_not_mix_and_seeds_are_checked(tmp_path):
    evaluate(tmp_path, CountingPolicy(), QUESTIONS[:1], settings={"checkpoint": 7})
    with pytest.raises(SynthesisError, match="checkpoint=7 not 8"):
        evaluate(tmp_path, CountingPolicy(), QUESTIONS[:1], settings={"checkpoint": 8})
    for seeds in ((), (1, 1)):
        with pytest.raises(ValueError, match="seeds must be different"):
            evaluate(tmp_path, CountingPolicy(), seeds=seeds)


def test_a_run_in_which_all_failed_has_no_score_and_is_made_again(tmp_path):
    environment = EnvironmentConfig()
    with pytest.raises(SamplingError, match="all 6 samples failed"):
        run(CountingPolicy(), QUESTIONS, CORPUS, FailingRetriever(CORPUS.page_ids), environment, tmp_path)
    assert read_samples(tmp_path / "samples" / "seed-0") and not (tmp_path / "summary.csv").exists()
    retriever = FakeRetriever(CORPUS.page_ids)
    retriever.name = "failing"  # the same search engine, back again
    assert not run(CountingPolicy(), QUESTIONS, CORPUS, retriever, environment, tmp_path)["failed"].any()


def test_the_summary_breaks_down_what_differs():
    frame = evaluate_trajectories(roll(GOOD, QUESTIONS), QUESTIONS)
    table = summary_table(frame)
    assert list(table["by"]) == ["all", "query_type", "query_type"]
    assert list(table["group"]) == ["all", "Multi-Hop", "Single-Hop"]
    assert list(table["n"]) == [6, 3, 3]
