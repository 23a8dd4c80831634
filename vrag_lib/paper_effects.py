"""What became of each effect and ablation: the difference of two cells with its interval and p-value, its sign beside
the one that the paper claims, and what that sign rests on.

    effects(read_rows(config), EFFECTS)           # a row per effect

P-values are corrected within their family by Holm's method; an effect whose corrected p-value is 0.05 or more is `not
resolved`, whatever its sign. The paper gives no intervals, so only signs are compared, never sizes. A sign that could
hardly be another one is no evidence, and `basis` says so: where no whole page can be read, an agent that crops is above
one that does not by construction. An agent that says the same to every question shows no skill by how it behaves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from vrag_lib.matrix_cells import CELLS
from vrag_lib.paper_columns import ELEMENT_KINDS, LESS_IS_BETTER, answers, matrices, select
from vrag_lib.stats import Difference, crossed_difference, holm

if TYPE_CHECKING:
    import pandas as pd

    from vrag_lib.paper_columns import Rows
    from vrag_lib.paper_numbers import Effect

ALPHA = 0.05
"""Corrected p-value below which an effect is resolved."""

UNKNOWN = Difference(math.nan, math.nan, math.nan, math.nan)

FLOOR = 5.0
"""Accuracy, %, with the gold pages given whole, below which whole pages count as illegible."""

COLLAPSE = 25.0
"""Share of one and the same answer, %, above which an agent counts as collapsed to it."""

MEASURED = {
    "accuracy": "answers right",
    "ndcg": "nDCG of the pages seen",
    "finish_rate": "finished trajectories",
    "invalid_rate": "invalid replies",
}
"""Of COLUMNS those that ablations are measured by, in the order of their table, and what they are."""

NO_EVIDENCE = ("built in", "by design", "both at the bottom")
"""What a sign can rest on (`basis`) that could hardly be another one, or says nothing."""

BEHAVIOUR = ("finish_rate", "invalid_rate", "wrong_action_rate")
"""Of COLUMNS those that an agent which collapsed can be good at."""


def difference(frame_a: pd.DataFrame, frame_b: pd.DataFrame, column: str, kind: str = "") -> Difference:
    """How much higher one of COLUMNS is in `frame_a`, paired by question and, where both were trained several times, by
    the seeds they share; NaN where no question is of that kind, or one side has no value.

    Raises ValueError when they are not of the same questions or share no seed.
    """
    part_a, part_b = (select(frame, kind) for frame in _of_shared_seeds(frame_a, frame_b))
    if part_a.empty and part_b.empty:
        return UNKNOWN
    a, a_sizes = matrices(part_a, column)
    b, b_sizes = matrices(part_b, column)
    alone = a.columns.symmetric_difference(b.columns)
    if len(alone):
        raise ValueError(f"{len(alone)} questions are in one cell only, for example {alone[0]!r}; run both on the same")
    if not a_sizes.to_numpy().sum() or not b_sizes.to_numpy().sum():
        return UNKNOWN
    return crossed_difference(a.to_numpy(), b.to_numpy(), a_sizes.to_numpy(), b_sizes.to_numpy())


def _of_shared_seeds(frame_a: pd.DataFrame, frame_b: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the seeds that both have, where both were trained several times; else all."""
    if min(frame_a["seed"].nunique(), frame_b["seed"].nunique()) < 2:
        return frame_a, frame_b
    shared = set(frame_a["seed"]) & set(frame_b["seed"])
    if not shared:
        raise ValueError("the two cells share no seed; run them with the same ones")
    return frame_a[frame_a["seed"].isin(shared)], frame_b[frame_b["seed"].isin(shared)]


def effects(rows: Rows, wanted: Sequence[Effect]) -> pd.DataFrame:
    """One row per effect: the difference, its interval, p-value, Holm's p-value among the measured ones, verdict. Where
    a cell or what is compared is missing the numbers are NaN and the verdict is `not measured`. `collapsed` names
    those of the two agents that give one answer to more than COLLAPSE % of the questions."""
    import pandas as pd

    collapsed = {name for name, frame in rows.items() if answers(frame)["top_share"] > COLLAPSE}
    table = []
    for effect in wanted:
        missing = [name for name in (effect.a, effect.b) if name not in rows]
        found = UNKNOWN
        if not missing:
            found = difference(*_compared(rows, effect), effect.column, effect.element)
        table.append(
            {
                "effect": effect.name,
                "a": effect.a,
                "b": effect.b,
                "column": effect.column,
                "element": effect.element,
                "seeds": _seeds(rows, effect),
                "difference": found.mean,
                "low": found.low,
                "high": found.high,
                "p": found.p_value,
                "source": effect.source,
                "paper": math.nan if effect.paper is None else effect.paper,
                "paper_sign": effect.claimed,
                "score": " / ".join(f"{points:+.1f}" for points in effect.score),
                "note": effect.note,
                "collapsed": ", ".join(name for name in (effect.a, effect.b) if name in collapsed),
            }
        )
    frame = pd.DataFrame(table)
    known = frame["p"].notna()
    frame["p_holm"] = math.nan
    if known.any():
        frame.loc[known, "p_holm"] = holm(frame.loc[known, "p"].to_numpy())
    frame["verdict"] = [
        verdict(*row) for row in frame[["difference", "p_holm", "paper_sign", "column"]].itertuples(index=False)
    ]
    return frame


def verdict(difference: float, p_holm: float, claimed: int, column: str = "accuracy") -> str:
    """What became of an effect on one of COLUMNS: `agrees` or `disagrees` with the sign claimed, `not resolved`, `not
    measured`; without a claim `better` or `worse`.

    >>> verdict(3.0, 0.01, 1), verdict(3.0, 0.01, -1), verdict(3.0, 0.2, 1)
    ('agrees', 'disagrees', 'not resolved')
    >>> verdict(-3.0, 0.01, 0), verdict(-3.0, 0.01, 0, "invalid_rate")
    ('worse', 'better')
    """
    if math.isnan(difference):
        return "not measured"
    if p_holm >= ALPHA or difference == 0:
        return "not resolved"
    if not claimed:
        return "better" if (difference > 0) != (column in LESS_IS_BETTER) else "worse"
    return "agrees" if difference * claimed > 0 else "disagrees"


def illegible(first: pd.DataFrame, kind: str = "") -> bool:
    """Whether Table 1 shows that the policy cannot read whole pages, of one of TYPES or all: given the gold pages it is
    at the bottom. False where that, or what it reads given the gold regions, is not measured."""
    if first.empty or not {"gold_pages", "gold_regions"} <= set(first["cell"]):
        return False
    return bool(first.set_index("cell").loc["gold_pages", f"{kind or 'overall'}_high"] < FLOOR)


def basis(first: pd.DataFrame, effect: Effect, verdict: str, bottom: Collection[str] = ()) -> str:
    """What an effect rests on: it is `measured`; or `by_design`; or, being one on answers where whole pages are
    `illegible`, it is `built in`, because one of the two agents is shown images and cannot crop, or has `both at the
    bottom`, because neither can, or neither answers more than next to nothing. Over all questions it is built in, too,
    where one of the two can crop and the pages of one kind alone are illegible: that part decides the sign. Empty where
    the effect is not measured.

    first: Table 1. verdict: of `effects`. bottom: cells whose answers are right in less than FLOOR %.
    """
    if verdict == "not measured":
        return ""
    if effect.by_design:
        return "by design"
    agents = [CELLS[name].find_agent() for name in (effect.a, effect.b)]
    blind = [agent.observation == "image" and not agent.allow_crop for agent in agents]
    if effect.column != "accuracy":
        return "measured"
    if {effect.a, effect.b} <= set(bottom):
        return "both at the bottom"
    if all(blind) or not any(blind):
        return "both at the bottom" if any(blind) and illegible(first, effect.element) else "measured"
    enlarges = any(agent.observation == "image" and agent.allow_crop for agent in agents)
    kinds = ("", *ELEMENT_KINDS) if enlarges and not effect.element else (effect.element,)
    return "built in" if any(illegible(first, kind) for kind in kinds) else "measured"


def _compared(rows: Rows, effect: Effect) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of both cells; of SFT, beside the RL that went on from it, those of the trainings that it began with,
    where that is recorded; of two that were trained several times, those of the seeds they share."""
    a, b = rows[effect.a], rows[effect.b]
    return _of_shared_seeds(_begun_with(a, effect.a, b, effect.b), _begun_with(b, effect.b, a, effect.a))


def _begun_with(frame: pd.DataFrame, name: str, other: pd.DataFrame, other_name: str) -> pd.DataFrame:
    start, after = CELLS[name], CELLS[other_name]
    is_start = (start.chain, after.chain) == ("sft", "sft+grpo") and (
        (start.data, start.trajectories) == (after.data, after.trajectories)
    )
    begun = other["cold_start"].dropna()
    return frame[frame["seed"].isin(begun)] if is_start and len(begun) else frame


def _seeds(rows: Rows, effect: Effect) -> str:
    if effect.a not in rows or effect.b not in rows:
        return " / ".join(str(rows[name]["seed"].nunique()) if name in rows else "-" for name in (effect.a, effect.b))
    return " / ".join(str(frame["seed"].nunique()) for frame in _compared(rows, effect))
