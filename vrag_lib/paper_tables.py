"""The tables and the data of the figures of the paper, from the rows of the matrix: our numbers with intervals, beside
them the paper's and the re-run's, and what became of each effect.

    tables = make_tables(read_rows(config))       # {"table_1": frame, ..., "effects": frame, "ablations": frame}

Pure functions of rows. How many trajectories failed or gave no answer stands in every table, and what an agent answers
most often in those of accuracy: one that says the same to every question has not read them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vrag_lib.agents import VANILLA_PAGES
from vrag_lib.matrix_cells import CELLS, CONTEXT_PAGES
from vrag_lib.paper_columns import ELEMENT_KINDS, TYPES, answers, interval, select
from vrag_lib.paper_effects import COLLAPSE, FLOOR, MEASURED, basis, effects
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
)
from vrag_lib.stats import Interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from vrag_lib.paper_columns import Rows
    from vrag_lib.stats import Interval

METHODS = (
    "raw", "no_retrieval", "vanilla_rag_5_text", "react_text", "search_r1_text",
    *(f"vanilla_rag_{k}" for k in VANILLA_PAGES), "react", "vrag_prompted", "search_r1", "cold_start", "sft_search",
    "sft", "sft_rl_search", "vrag_rl", "gold_pages", "gold_pages_crop", "gold_regions",
)  # fmt: skip
"""Rows of Table 1: the paper's methods, the two that separate its confound, those given gold pages or regions."""

BEFORE_AND_AFTER = ("sft", "vrag_rl", "invalid_penalised", "sft_1000", "rl_1000", "sft_300", "rl_300")
"""Rows of Table 3: the paper's, RL that penalises invalid replies, and the same after SFT on fewer trajectories."""

SUMMARY = ("sft", "retrieval_only", "vrag_answer_only", "vrag_rl", "gold_regions")
"""Rows of the summary, after the best agent that cannot crop."""

FINDING = ("first_gold", "gold_seen", "gold_recall", "ndcg")
"""Of COLUMNS those that say how well pages are found."""

_NONE = Interval(math.nan, math.nan, math.nan)


def make_tables(rows: Rows) -> dict[str, pd.DataFrame]:
    """Every table by its name. Cells that are not there are left out; a table without any row is empty."""
    first, claimed, unclaimed = table_1(rows), effects(rows, EFFECTS), effects(rows, ABLATIONS)
    cells = cells_table(rows)
    bottom = set() if cells.empty else set(cells.loc[cells["accuracy_high"] < FLOOR, "cell"])
    for table, wanted in ((claimed, EFFECTS), (unclaimed, ABLATIONS)):
        verdicts = zip(wanted, table["verdict"], strict=True)
        table["basis"] = [basis(first, effect, found, bottom) for effect, found in verdicts]
    return {
        "summary": summary(rows),
        "table_1": first,
        "table_2": table_2(rows),
        "table_3": table_3(rows),
        "figure_3": figure_3(rows),
        "figure_4": figure_4(rows),
        "figure_5": figure_5(rows),
        "figure_6": figure_6(rows),
        "effects": claimed,
        "ablations": unclaimed.sort_values("column", key=lambda names: names.map(list(MEASURED).index), kind="stable"),
        "cells": cells,
    }


def _counts(frame: pd.DataFrame) -> dict[str, int]:
    """How much a row stands on: seeds, questions, trajectories, of those without answer, of those ended by an error."""
    return {
        "seeds": frame["seed"].nunique(),
        "questions": frame["uid"].nunique(),
        "trajectories": len(frame),
        "failed": int(frame["failed"].sum()),
        "errors": int((frame["stop_reason"] == "error").sum()),
    }


def _with_limits(name: str, found: Interval) -> dict[str, float]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _measured(rows: Rows, cell: str, columns: Sequence[str]) -> dict[str, Any]:
    """The columns of a cell; those of FINDING are NaN where the agent neither searches nor is given what was found."""
    agent = CELLS[cell].find_agent()
    finds = agent.allow_search or agent.given == "retrieved"
    row: dict[str, Any] = {"cell": cell, "about": CELLS[cell].about, **_counts(rows[cell])}
    for column in columns:
        row |= _with_limits(column, interval(rows[cell], column) if finds or column not in FINDING else _NONE)
    return row


def _table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(rows))


def summary(rows: Rows) -> pd.DataFrame:
    """What it comes down to: right answers, all and by element, and, of agents that search, nDCG of the pages seen, %;
    the best agent that cannot crop and is given no gold, and SUMMARY."""
    names = [name for name in SUMMARY if name in rows]
    blind = [name for name in rows if not (agent := CELLS[name].find_agent()).allow_crop and "gold" not in agent.given]
    best = max(blind, key=lambda name: rows[name]["judge"].mean(), default=None)
    table = []
    for name in [best, *names] if best else names:
        row = _measured(rows, name, ("accuracy", "ndcg"))
        for kind in ELEMENT_KINDS:
            row |= _with_limits(kind, interval(rows[name], "accuracy", kind))
        table.append(row | {"best_without_crop": name == best})
    return _table(table)


def table_1(rows: Rows) -> pd.DataFrame:
    """Accuracy by method and kind of question, %; metrics of the text beside it; what is answered most often; the
    overall accuracy of the paper and of the re-run, and the paper's by kind (`paper_<kind>`)."""
    table = []
    for cell in (name for name in METHODS if name in rows):
        row = {"cell": cell, "about": CELLS[cell].about, **_counts(rows[cell])}
        row |= _with_limits("overall", interval(rows[cell], "accuracy"))
        for kind in TYPES:
            row |= _with_limits(kind, interval(rows[cell], "accuracy", kind))
        for column in ("exact", "f1", "anls"):
            row |= _with_limits(column, interval(rows[cell], column))
        row |= _with_limits("crops", interval(rows[cell], "crops")) | answers(rows[cell])
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
            | answers(rows[cell])
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
    """Invalid actions (share of replies) and finished trajectories, %; and, which the paper's table has not, invalid
    replies alone, answers, the most frequent one, nDCG of the pages seen, and cold starts on fewer trajectories."""
    columns = ["wrong_action_rate", "invalid_rate", "finish_rate", "accuracy", "ndcg"]
    table = []
    for cell in BEFORE_AND_AFTER:
        if cell in rows:
            invalid, finish = PAPER_TABLE_3.get(cell, (math.nan, math.nan))
            known = {"paper_invalid": invalid, "paper_finish": finish}
            table.append(_measured(rows, cell, columns) | answers(rows[cell]) | known)
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
    """Accuracy by element of the answer, %: Vanilla RAG, trained without crop, trained with crop (VRAG-RL). The
    name of a method says where it collapsed to one answer."""
    names = {"vanilla_rag_1": "Vanilla RAG, 1 page", "sft_rl_search": "without crop", "vrag_rl": "with crop"}
    table = []
    for cell, name in names.items():
        if cell in rows and answers(rows[cell])["top_share"] > COLLAPSE:
            name += " (collapsed)"
        for kind in ELEMENT_KINDS if cell in rows else ():
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
    columns = [
        "accuracy", "exact", "f1", "anls", "finish_rate", "invalid_rate", "ndcg", "gold_recall", "turns", "searches",
        "crops", "crop_iou",
    ]  # fmt: skip
    return _table(
        [_measured(rows, cell, columns) | answers(rows[cell]) | {"chain": CELLS[cell].chain} for cell in rows]
    )
