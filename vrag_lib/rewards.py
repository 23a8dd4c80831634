"""Rewards as pure functions of the trajectory record (paper §2.3, eq. 7-12).

    r = α · retrieval + β · answer + γ · pattern

Deviations: scores are read from the structure of the record, never from decoded text, so nothing an observation says
can earn one (trap T3); pages are compared by id (T14). The paper gives no α and β; the recipe `paper` takes the weights
that the released code holds as a comment. The released code's gate (no reward at all without a search *and* an answer)
is the recipe `released_code`, and is not applied otherwise (T4). `answer_only` is the "vanilla" reward of the paper's
Table 2; `retrieval_only` completes the ablation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vrag_lib.actions import ActionKind
from vrag_lib.judge import Judge, rule_judge, verdicts
from vrag_lib.trajectory import Trajectory


@dataclass(frozen=True)
class RewardRecipe:
    """Weights α, β, γ and whether a trajectory without the pattern earns nothing."""

    retrieval: float
    answer: float
    pattern: float
    gate: bool = False


RECIPES = {
    "paper": RewardRecipe(retrieval=0.2, answer=0.8, pattern=0.0),
    "paper_cold_start": RewardRecipe(retrieval=0.2, answer=0.7, pattern=0.1),
    "released_code": RewardRecipe(retrieval=0.2, answer=0.7, pattern=0.1, gate=True),
    "answer_only": RewardRecipe(retrieval=0.0, answer=1.0, pattern=0.0),
    "retrieval_only": RewardRecipe(retrieval=1.0, answer=0.0, pattern=0.0),
}


def find_recipe(name: str) -> RewardRecipe:
    """One of RECIPES, or free weights of nDCG, answer and pattern, which add up to 1.

    Raises ValueError for anything else.

    >>> find_recipe("0.5, 0.4, 0.1")
    RewardRecipe(retrieval=0.5, answer=0.4, pattern=0.1, gate=False)
    """
    if name in RECIPES:
        return RECIPES[name]
    try:
        retrieval, answer, pattern = map(float, name.split(","))
    except ValueError:
        raise ValueError(
            f"a reward is one of {', '.join(RECIPES)}, or three weights of nDCG, answer and pattern such as "
            f"0.2,0.7,0.1, not {name!r}"
        ) from None
    if not (min(retrieval, answer, pattern) >= 0 and math.isclose(retrieval + answer + pattern, 1)):
        raise ValueError(f"weights of a reward are 0 or more and add up to 1, not {name}")
    return RewardRecipe(retrieval, answer, pattern)


def ndcg(shown: Sequence[str], gold: Collection[str]) -> float:
    """nDCG of the pages in the order they were shown (eq. 7-9), in [0, 1]; 0 when no page is gold.

    A gold page counts once, at its first place. Pages after the last gold one cost nothing; with more gold pages than
    searches 1 cannot be reached.

    >>> ndcg(["a", "b"], ["a"]), round(ndcg(["x", "a"], ["a"]), 3), round(ndcg(["a"], ["a", "b"]), 3)
    (1.0, 0.631, 0.613)
    """
    wanted = set(gold)
    if not wanted:
        return 0.0
    ideal = sum(1 / math.log2(i + 2) for i in range(len(wanted)))
    gained = 0.0
    for i, page_id in enumerate(shown):
        if page_id in wanted:
            wanted.discard(page_id)
            gained += 1 / math.log2(i + 2)
    return gained / ideal


def retrieval_reward(trajectory: Trajectory) -> float:
    """nDCG over the pages shown; crops are not pages."""
    return ndcg(trajectory.shown_pages, trajectory.gold_page_ids)


def answer_rewards(trajectories: Sequence[Trajectory], judge: Judge = rule_judge) -> list[float]:
    """For each trajectory 1 if it answered and the judge accepts it, else 0; NaN where the judge gave no verdict.
    Without an answer the judge is not asked."""
    items = [(t.question, t.reference_answer, t.answer) for t in trajectories if t.answer is not None]
    given = iter(verdicts(judge, items))
    said = [False if t.answer is None else next(given) for t in trajectories]
    return [math.nan if verdict is None else float(verdict) for verdict in said]


def pattern_reward(trajectory: Trajectory) -> float:
    """1 if the trajectory searched at least once and ended with an answer, else 0 (the released code's rule)."""
    return float(trajectory.answer is not None and trajectory.count(ActionKind.SEARCH) > 0)


@dataclass(frozen=True)
class Scorer:
    """Gives trajectories their named rewards, each as (score, weight); a closed gate sets every weight to 0."""

    recipe: RewardRecipe = RECIPES["paper"]
    judge: Judge = rule_judge

    def __call__(self, trajectory: Trajectory) -> Trajectory:
        return self.many([trajectory])[0]

    def many(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """All of them, the judge asked about all answers together."""
        scored = []
        for trajectory, answer in zip(trajectories, answer_rewards(trajectories, self.judge), strict=True):
            pattern = pattern_reward(trajectory)
            is_open = not self.recipe.gate or pattern > 0
            weights = (self.recipe.retrieval, self.recipe.answer, self.recipe.pattern) if is_open else (0.0, 0.0, 0.0)
            scores = (retrieval_reward(trajectory), answer, pattern)
            names = ("retrieval", "answer", "pattern")
            scored.append(trajectory.with_rewards({n: (s, w) for n, s, w in zip(names, scores, weights, strict=True)}))
        return scored


def score(trajectory: Trajectory, recipe: RewardRecipe = RECIPES["paper"], judge: Judge = rule_judge) -> Trajectory:
    """One trajectory as `Scorer` gives it its rewards."""
    return Scorer(recipe, judge)(trajectory)
