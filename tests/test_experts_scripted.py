"""Scripted experts: what they know, the mistakes they are said to make, and that both follow from seeds."""

from __future__ import annotations

import random

import pytest

from vrag_lib.actions import ActionKind, InvalidReason
from vrag_lib.experts import MultiExpertPolicy, Pointing
from vrag_lib.experts_scripted import Flaws, ScriptedGrounder, ScriptedJudge, ScriptedPlanner, point
from vrag_lib.geometry import Box, Size, View, iou
from vrag_lib.judge import rule_judge
from vrag_lib.minidocs import MiniDocs, MiniDocsConfig
from vrag_lib.presets import load_config
from vrag_lib.rollout import rollout
from vrag_lib.scale_policy import BOX_STEP
from vrag_lib.text_retrieval import BM25Retriever
from vrag_lib.trajectory import ImageRef

NONE = Flaws(**{name: 0.0 for name in Flaws.__dataclass_fields__})
ENVIRONMENT = load_config("laptop", experiment=True).environment


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    docs = MiniDocs(MiniDocsConfig(validation_documents=12))
    corpus = docs.corpus("validation", tmp_path_factory.mktemp("minidocs"))
    return docs.questions("validation"), corpus, BM25Retriever.from_corpus(corpus)


def right(trajectories):
    return [t for t in trajectories if t.answer is not None and rule_judge(t.question, t.reference_answer, t.answer)]


def play(world, policy, seeds=None):
    questions, corpus, retriever = world
    return rollout(policy, questions, corpus, retriever, ENVIRONMENT, batch_size=32, seeds=seeds)


def share(world, policy):
    return len(right(play(world, policy))) / len(world[0])


def test_without_flaws_the_planner_answers_nearly_everything(world):
    found = play(world, ScriptedPlanner(world[0], NONE))
    assert len(right(found)) / len(found) > 0.9  # the text index misses some pages, and a sum takes the whole budget
    assert not any(turn.invalid for t in found for turn in t.turns)
    small = {q.uid for q in world[0] if q.source_type in ("Table", "Chart")}
    assert {t.question_id for t in right(found)} & small
    assert all(t.count(ActionKind.CROP) for t in right(found) if t.question_id in small)


def test_planner_points_badly_and_the_grounding_expert_mends_it(world):
    questions = world[0]
    planner, grounder = ScriptedPlanner(questions), ScriptedGrounder(questions)
    alone, together = share(world, planner), share(world, MultiExpertPolicy(planner, grounder))
    assert together > alone + 0.05
    assert together > share(world, grounder) + 0.1


def test_grounding_expert_cannot_plan(world):
    found = play(world, ScriptedGrounder(world[0], NONE))
    planned = play(world, ScriptedPlanner(world[0], NONE))
    shares = []
    for trajectories in (found, planned):
        two_pages = [t for t in trajectories if len(t.gold_page_ids) == 2]
        shares.append(len(right(two_pages)) / len(two_pages))
    assert shares[0] < shares[1] - 0.2
    assert all(t.count(ActionKind.SEARCH) <= 1 for t in found)


def test_seeds_settle_everything(world):
    planner = ScriptedPlanner(world[0])
    first, again = (play(world, planner) for _ in range(2))
    other = play(world, planner, seeds=[7_000 + i for i in range(len(world[0]))])
    texts = [[turn.text for t in found for turn in t.turns] for found in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("flaw", ["malformed", "no_crop", "misread"])
def test_each_flaw_costs_what_it_says(world, flaw):
    flawed = Flaws(**{name: 0.0 for name in Flaws.__dataclass_fields__} | {flaw: 0.6})
    found = play(world, ScriptedPlanner(world[0], flawed))
    if flaw == "malformed":
        replies = [turn for t in found for turn in t.replies]
        assert 0.4 < sum(turn.invalid is InvalidReason.NO_ACTION for turn in replies) / len(replies) < 0.8
    assert len(right(found)) / len(found) < 0.75


def test_boxes_are_always_valid():
    rng = random.Random(0)
    for _ in range(500):
        size = Size(rng.choice((784, 1176)), rng.choice((784, 1176)))
        view = View.of_page(size, ENVIRONMENT.min_pixels, ENVIRONMENT.max_pixels)
        x, y = rng.uniform(0, size.width - 5), rng.uniform(0, size.height - 5)
        region = Box(x, y, rng.uniform(x + 1, size.width), rng.uniform(y + 1, size.height))
        box = point(ImageRef("a_1", view), region, rng, 0.3, 0.3)
        assert 0 <= box.x1 < box.x2 <= view.shown.width and 0 <= box.y1 < box.y2 <= view.shown.height
        assert all(v % BOX_STEP == 0 for v in box.as_tuple())
        view.crop(box, ENVIRONMENT.min_pixels, ENVIRONMENT.max_pixels)


def test_grounding_expert_finds_the_region(world):
    questions, corpus, _ = world
    scores = []
    for question in questions:
        for region in question.extra["regions"][-1:]:
            page = corpus.page(f"{question.file_name.removesuffix('.pdf')}_{region['page']}")
            view = View.of_page(page.size, ENVIRONMENT.min_pixels, ENVIRONMENT.max_pixels)
            request = Pointing(question.query, "", ImageRef(page.id, view), None)
            found = ScriptedGrounder(questions).locate([request], seeds=[3])[0]
            scores.append(iou(found.box, view.to_shown(Box(*region["region_box"]))))
    assert 0.85 < sum(s > 0.5 for s in scores) / len(scores) < 1


def test_judge_errs_as_often_as_it_says():
    judge = ScriptedJudge(Flaws(judging=0.2))
    verdicts = [judge("how many?", str(n), str(n)) for n in range(1000)]
    assert 0.74 < sum(verdicts) / 1000 < 0.86
    assert verdicts == [judge("how many?", str(n), str(n)) for n in range(1000)]


def test_unknown_question(world):
    with pytest.raises(ValueError, match="know nothing of the question"):
        rollout(ScriptedPlanner([]), world[0][:1], world[1], world[2], ENVIRONMENT)
