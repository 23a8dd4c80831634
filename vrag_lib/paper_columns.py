"""What is reported of a cell's rows: columns with their intervals, kinds of question, the most frequent answers.

Pure functions of rows (`matrix.read_rows`: a row per seed and question). A trajectory that failed or gave no answer
counts as wrong. Intervals: 95 %, questions and training seeds resampled (`stats.crossed_mean`, 10,000 resamples).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.answer_metrics import is_refusal
from vrag_lib.evaluate import by_element
from vrag_lib.stats import Interval, crossed_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    Rows = Mapping[str, pd.DataFrame]

LESS_IS_BETTER = ("invalid_rate", "wrong_action_rate", "invalid", "noise_pages", "tokens_sampled", "seconds",
                  "seconds_generate", "seconds_retrieve")  # fmt: skip
"""Of COLUMNS those of which less is better."""

COLUMNS = {
    "accuracy": ("judge", None, 100),
    "exact": ("exact", None, 100),
    "f1": ("f1", None, 100),
    "anls": ("anls", None, 100),
    "finish_rate": ("answered", None, 100),
    "invalid_rate": ("invalid", "replies", 100),
    "wrong_action_rate": ("wrong_actions", "replies", 100),
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

ELEMENT_KINDS = tuple(name for name, (column, _) in TYPES.items() if column == "element")
"""Those of TYPES that say where the answer stands."""


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
    known = values.notna().astype(float)
    sizes = known if bottom is None else known * _grid(frame, bottom)
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
    most = 1 if column == "crop_iou" else 100 if COLUMNS[column][2] == 100 else None
    return crossed_mean(values.to_numpy(), sizes.to_numpy(), most=most)


def answers(frame: pd.DataFrame) -> dict[str, Any]:
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


def seeds_spread(frame: pd.DataFrame, column: str = "accuracy") -> list[float]:
    """One of COLUMNS for each training seed, in order."""
    values, sizes = matrices(frame, column)
    return np.divide(values.sum(axis=1), sizes.sum(axis=1)).tolist()
