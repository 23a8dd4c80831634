"""The tables and the data of the figures of the paper, from the rows of the matrix: our numbers with intervals, beside
them the paper's and the re-run's, and what became of each effect.

    tables = make_tables(read_rows(config))       # {"table_1": frame, ..., "effects": frame, "ablations": frame}

Pure functions of rows. A trajectory that failed or gave no answer counts as wrong; how many did stands in every table.
Intervals: 95 %, questions and training seeds resampled (`stats.crossed_mean`, 10,000 resamples). P-values of the
effects are corrected within their family by Holm's method; an effect whose corrected p-value is 0.05 or more is `not
resolved`, whatever its sign. The paper gives no intervals, so only signs are compared, never sizes. What a sign rests
on stands beside it (`basis`): where no whole page can be read, an agent that crops is above one that does not by
construction. What an agent answers most often stands in the tables, too: one that says the same to every question
shows no skill by how it behaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.agents import VANILLA_PAGES
from vrag_lib.answer_metrics import is_refusal
from vrag_lib.evaluate import by_element
from vrag_lib.matrix_cells import CELLS, CONTEXT_PAGES
from vrag_lib.paper_numbers import (
    ABLATIONS,
    EFFECTS,
    PAPER_BY_TYPE,
    PAPER_FIGURE_3,
    PAPER_FIGURE_3_BOUND,
    PAPER_OVERALL,
    PAPER_TABLE_2,
    PAPER_TABLE_3,
    SCORE_BEHAVIOUR,
    SCORE_OVERALL,
    Effect,
)
from vrag_lib.stats import Difference, Interval, crossed_difference, crossed_mean, holm

if TYPE_CHECKING:
    import pandas as pd

    Rows = Mapping[str, pd.DataFrame]

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

BEHAVIOUR = ("finish_rate", "invalid_rate")
"""Of COLUMNS those that an agent which collapsed can be good at."""

LESS_IS_BETTER = ("invalid_rate", "invalid", "noise_pages", "tokens_sampled", "seconds", "seconds_generate",
                  "seconds_retrieve")  # fmt: skip
"""Of COLUMNS those of which less is better."""

COLUMNS = {
    "accuracy": ("judge", None, 100),
    "finish_rate": ("answered", None, 100),
    "invalid_rate": ("invalid", "replies", 100),
    "first_gold": ("first_gold", None, 100),
    "gold_seen": ("gold_page_seen", None, 100),
    "gold_recall": ("gold_recall", None, 100),
    "ndcg": ("ndcg", None, 100),
    "crop_iou": ("crop_iou", None, 1),
    "pages": ("pages", None, 1),
    "noise_pages": ("noise_pages", None, 1),
    "searches": ("searches", None, 1),
    "crops": ("crops", None, 1),
    "answers": ("answered", None, 1),
    "invalid": ("invalid", None, 1),
    "turns": ("replies", None, 1),
    "tokens_sampled": ("tokens_sampled", None, 1),
    "seconds": ("seconds", None, 1),
    "seconds_generate": ("seconds_generate", None, 1),
    "seconds_retrieve": ("seconds_retrieve", None, 1),
}
"""What is reported: the column of the rows summed, the one it is divided by (none: by the number of rows with a value),
and a factor: 100 for shares given in percent."""

TYPES = {
    "single": ("query_type", "Single-Hop"),
    "multi": ("query_type", "Multi-Hop"),
    "text": ("element", "text"),
    "table": ("element", "table"),
    "chart": ("element", "chart"),
    "layout": ("element", "layout"),
}
"""Kinds of question of Table 1 that MiniDocs has: name -> column and value."""

METHODS = (
    "raw", "no_retrieval", "vanilla_rag_5_text", "react_text", "search_r1_text",
    *(f"vanilla_rag_{k}" for k in VANILLA_PAGES), "react", "vrag_prompted", "search_r1", "cold_start", "sft_search",
    "sft", "sft_rl_search", "vrag_rl", "gold_pages", "gold_pages_crop", "gold_regions",
)  # fmt: skip
"""Rows of Table 1: the paper's methods, the two that separate its confound, those given gold pages or regions."""


BEFORE_AND_AFTER = ("sft", "vrag_rl", "invalid_penalised", "sft_1000", "rl_1000", "sft_300", "rl_300")
"""Rows of Table 3: the paper's, RL that penalises invalid replies, and the same after SFT on fewer trajectories."""


def make_tables(rows: Rows) -> dict[str, pd.DataFrame]:
    """Every table by its name. Cells that are not there are left out; a table without any row is empty."""
    first, claimed, unclaimed = table_1(rows), effects(rows, EFFECTS), effects(rows, ABLATIONS)
    claimed["basis"] = [basis(first, *row) for row in claimed[["verdict", "a", "b", "column", "element"]].values]
    return {
        "table_1": first,
        "table_2": table_2(rows),
        "table_3": table_3(rows),
        "figure_3": figure_3(rows),
        "figure_4": figure_4(rows),
        "figure_5": figure_5(rows),
        "figure_6": figure_6(rows),
        "effects": claimed,
        "ablations": unclaimed.sort_values("column", key=lambda names: names.map(list(MEASURED).index), kind="stable"),
        "cells": cells_table(rows),
    }


def select(frame: pd.DataFrame, kind: str = "") -> pd.DataFrame:
    """The rows of one of TYPES; all without one."""
    if not kind:
        return frame
    column, value = TYPES[kind]
    frame = by_element(frame) if column == "element" else frame
    return frame[frame[column] == value]


def matrices(frame: pd.DataFrame, column: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `stats.crossed_mean` takes for one of COLUMNS: values and sizes, a row per seed and a column per question.

    Raises ValueError when a seed lacks a question of the others, or has one twice.
    """
    top, bottom, factor = COLUMNS[column]
    frame = frame.assign(seconds=frame["seconds_generate"] + frame["seconds_retrieve"])
    values = _grid(frame, top)
    sizes = values.notna().astype(float) if bottom is None else _grid(frame, bottom)
    return factor * values.fillna(0.0), sizes


def _grid(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    counts = frame.groupby(["seed", "uid"]).size().unstack()
    if not (counts == 1).all(axis=None):
        raise ValueError("every seed of a cell must have every question once; run the cell again from an empty folder")
    return frame.assign(**{column: frame[column].astype(float)}).pivot(index="seed", columns="uid", values=column)


def interval(frame: pd.DataFrame, column: str, kind: str = "") -> Interval:
    """One of COLUMNS with its interval, over the questions of one of TYPES or all; NaN where there is no value."""
    part = select(frame, kind)
    if part.empty:
        return Interval(math.nan, math.nan, math.nan)
    values, sizes = matrices(part, column)
    if not sizes.to_numpy().sum():
        return Interval(math.nan, math.nan, math.nan)
    return crossed_mean(values.to_numpy(), sizes.to_numpy())


def difference(frame_a: pd.DataFrame, frame_b: pd.DataFrame, column: str, kind: str = "") -> Difference:
    """How much higher one of COLUMNS is in `frame_a`, paired by question and, where both were trained several times, by
    the seeds they share; NaN where no question is of that kind, or one side has no value.

    Raises ValueError when they are not of the same questions or share no seed.
    """
    part_a, part_b = select(frame_a, kind), select(frame_b, kind)
    if part_a.empty and part_b.empty:
        return UNKNOWN
    a, a_sizes = matrices(part_a, column)
    b, b_sizes = matrices(part_b, column)
    alone = a.columns.symmetric_difference(b.columns)
    if len(alone):
        raise ValueError(f"{len(alone)} questions are in one cell only, for example {alone[0]!r}; run both on the same")
    if len(a) > 1 and len(b) > 1:
        shared = a.index.intersection(b.index)
        if shared.empty:
            raise ValueError("the two cells share no seed; run them with the same ones")
        a, a_sizes, b, b_sizes = (table.loc[shared] for table in (a, a_sizes, b, b_sizes))
    if not a_sizes.to_numpy().sum() or not b_sizes.to_numpy().sum():
        return UNKNOWN
    return crossed_difference(a.to_numpy(), b.to_numpy(), a_sizes.to_numpy(), b_sizes.to_numpy())


def effects(rows: Rows, wanted: Sequence[Effect]) -> pd.DataFrame:
    """One row per effect: the difference, its interval, p-value, Holm's p-value among the measured ones, verdict. Where
    a cell or what is compared is missing the numbers are NaN and the verdict is `not measured`. `collapsed` names
    those of the two agents that give one answer to more than COLLAPSE % of the questions."""
    import pandas as pd

    collapsed = {name for name, frame in rows.items() if _answers(frame)["top_share"] > COLLAPSE}
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


def basis(first: pd.DataFrame, verdict: str, a: str, b: str, column: str, element: str) -> str:
    """What an effect rests on: it is `measured`; or, being one on answers where whole pages are `illegible`, it is
    `built in`, because one of the two agents is shown images and cannot crop, or has `both at the bottom`, because
    neither can. Empty where the effect is not measured."""
    if verdict == "not measured":
        return ""
    agents = [CELLS[name].find_agent() for name in (a, b)]
    blind = [agent.observation == "image" and not agent.allow_crop for agent in agents]
    if column != "accuracy" or not any(blind) or not illegible(first, element):
        return "measured"
    return "both at the bottom" if all(blind) else "built in"


def _compared(rows: Rows, effect: Effect) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of both cells; of SFT, beside the RL that went on from it, those of the trainings that it began with,
    where that is recorded."""
    a, b = rows[effect.a], rows[effect.b]
    return _begun_with(a, effect.a, b, effect.b), _begun_with(b, effect.b, a, effect.a)


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


def _counts(frame: pd.DataFrame) -> dict[str, int]:
    """How much a row stands on: seeds, questions, trajectories, of those without answer, of those ended by an error."""
    return {
        "seeds": frame["seed"].nunique(),
        "questions": frame["uid"].nunique(),
        "trajectories": len(frame),
        "failed": int(frame["failed"].sum()),
        "errors": int((frame["stop_reason"] == "error").sum()),
    }


def _answers(frame: pd.DataFrame) -> dict[str, Any]:
    """What is said most often, all seeds together: the answer, its share of all trajectories and that of the two most
    frequent, and the share that says that the documents do not answer the question, %."""
    given = frame.loc[frame["answered"], "answer"].astype(str).str.strip()
    counts = given.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    return {
        "top_answer": counts.index[0] if len(counts) else "",
        "top_share": 100 * counts.iloc[:1].sum() / len(frame),
        "top_two_share": 100 * counts.iloc[:2].sum() / len(frame),
        "refused_share": 100 * sum(map(is_refusal, given)) / len(frame),
    }


def _with_limits(name: str, found: Interval) -> dict[str, float]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _measured(rows: Rows, cell: str, columns: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"cell": cell, "about": CELLS[cell].about, **_counts(rows[cell])}
    for column in columns:
        row |= _with_limits(column, interval(rows[cell], column))
    return row


def _table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(rows))


def table_1(rows: Rows) -> pd.DataFrame:
    """Accuracy by method and kind of question, %; what is answered most often; the overall accuracy of the paper and of
    the re-run, and the paper's by kind (`paper_<kind>`)."""
    table = []
    for cell in (name for name in METHODS if name in rows):
        row = {"cell": cell, "about": CELLS[cell].about, **_counts(rows[cell])}
        row |= _with_limits("overall", interval(rows[cell], "accuracy"))
        for kind in TYPES:
            row |= _with_limits(kind, interval(rows[cell], "accuracy", kind))
        row |= _answers(rows[cell])
        name, big, small = PAPER_OVERALL.get(cell, ("", math.nan, math.nan))
        slides, vidoseek = SCORE_OVERALL.get(cell, (math.nan, math.nan))
        row |= {"paper_name": name, "paper_7b": big, "paper_3b": small}
        row |= {"score_slidevqa": slides, "score_vidoseek": vidoseek}
        row |= {f"paper_{k}": v for k, v in zip(TYPES, PAPER_BY_TYPE.get(cell, [math.nan] * 6), strict=True)}
        table.append(row)
    return _table(table)


def table_2(rows: Rows) -> pd.DataFrame:
    """Accuracy by reward and actions, %, and what is answered most often."""
    return _table(
        [
            _measured(rows, cell, ["accuracy"])
            | _answers(rows[cell])
            | {
                "reward": "answer alone" if "answer_only" in cell else "with nDCG",
                "actions": "search, crop" if CELLS[cell].find_agent().allow_crop else "search",
                "paper": paper,
            }
            for cell, paper in PAPER_TABLE_2.items()
            if cell in rows
        ]
    )


def table_3(rows: Rows) -> pd.DataFrame:
    """Invalid actions (share of replies) and finished trajectories, %; and, which the paper's table has not, answers,
    the most frequent one, nDCG of the pages seen, and cold starts on fewer trajectories."""
    columns = ["invalid_rate", "finish_rate", "accuracy", "ndcg"]
    table = []
    for cell in BEFORE_AND_AFTER:
        if cell in rows:
            invalid, finish = PAPER_TABLE_3.get(cell, (math.nan, math.nan))
            known = {"paper_invalid": invalid, "paper_finish": finish}
            table.append(_measured(rows, cell, columns) | _answers(rows[cell]) | known)
    return _table(table)


def figure_3(rows: Rows) -> pd.DataFrame:
    """Accuracy by pages in context, %; the row without a number of pages is of the gold pages, the paper's bound."""
    cells = {f"vanilla_rag_{k}": k for k in CONTEXT_PAGES} | {"gold_pages": math.nan}
    return _table(
        [
            _measured(rows, cell, ["accuracy"])
            | {"pages_given": k, "paper": PAPER_FIGURE_3_BOUND if math.isnan(k) else PAPER_FIGURE_3.get(k, math.nan)}
            for cell, k in cells.items()
            if cell in rows
        ]
    )


def figure_4(rows: Rows) -> pd.DataFrame:
    """Retrieval by who writes the query, % of questions: the first page shown is a gold page; any page shown is."""
    queries = {
        "vanilla_rag_1": "question as asked",
        "react": "ReAct, not trained",
        "search_r1": "learnt, no SFT",
        "sft": "learnt by SFT",
        "vrag_rl": "learnt by SFT and RL",
    }
    return _table(
        [
            _measured(rows, cell, ["first_gold", "gold_seen", "searches"]) | {"query": query}
            for cell, query in queries.items()
            if cell in rows
        ]
    )


def figure_5(rows: Rows) -> pd.DataFrame:
    """Accuracy by element of the answer, %: Vanilla RAG, trained without crop, trained with crop (VRAG-RL)."""
    kinds = [name for name, (column, _) in TYPES.items() if column == "element"]
    table = []
    for cell, name in (("vanilla_rag_1", "Vanilla RAG"), ("sft_rl_search", "without crop"), ("vrag_rl", "with crop")):
        for kind in kinds if cell in rows else ():
            part = select(rows[cell], kind)
            if not part.empty:
                row = {"cell": cell, "method": name, "element": kind, **_counts(part)}
                table.append(row | _with_limits("accuracy", interval(rows[cell], "accuracy", kind)))
    return _table(table)


def figure_6(rows: Rows) -> pd.DataFrame:
    """Behaviour and cost per trajectory by method: seconds in which the policy writes and the index is searched,
    replies by what they do, pages seen, tokens. `score_<column>` is the re-run's, of VRAG-RL-7B."""
    columns = [
        "accuracy", "seconds", "seconds_generate", "seconds_retrieve", "turns", "searches", "crops", "answers",
        "invalid", "tokens_sampled", "pages", "noise_pages", "gold_recall", "crop_iou",
    ]  # fmt: skip
    names = {"vanilla_rag_1": "Vanilla RAG", "react": "ReAct", "search_r1": "Search-R1-VL", "sft": "SFT alone",
             "sft_rl_search": "SFT, RL, no crop", "vrag_rl": "VRAG-RL"}  # fmt: skip
    table = []
    for cell, name in names.items():
        if cell in rows:
            score = SCORE_BEHAVIOUR if cell == "vrag_rl" else {}
            others = {f"score_{column}": score.get(column, math.nan) for column in SCORE_BEHAVIOUR}
            table.append({"method": name} | _measured(rows, cell, columns) | others)
    return _table(table)


def cells_table(rows: Rows) -> pd.DataFrame:
    """Every cell that was run: what it is, its main numbers, and what it answers most often."""
    columns = ["accuracy", "finish_rate", "invalid_rate", "gold_recall", "turns", "searches", "crops", "crop_iou"]
    return _table(
        [_measured(rows, cell, columns) | _answers(rows[cell]) | {"chain": CELLS[cell].chain} for cell in rows]
    )


def seeds_spread(frame: pd.DataFrame, column: str = "accuracy") -> list[float]:
    """One of COLUMNS for each training seed, in order."""
    values, sizes = matrices(frame, column)
    return np.divide(values.sum(axis=1), sizes.sum(axis=1)).tolist()
