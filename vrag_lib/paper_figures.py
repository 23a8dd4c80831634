"""The figures of the paper in miniature, drawn from the CSV files of `paper_tables` alone, in seconds.

    draw_figures("results/laptop/paper")          # every <name>.csv there becomes <name>.png

Ours are filled, with 95 % intervals; the paper's are hollow and carry none, for it gives none. They were measured with
other models on other documents: compare directions, not heights.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from vrag_lib.paper_columns import ELEMENT_KINDS, LESS_IS_BETTER
from vrag_lib.paper_effects import BEHAVIOUR, MEASURED, NO_EVIDENCE
from vrag_lib.plots import COLOURS, interval_bars, interval_errors, save_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BUILT_IN = "agrees, but the sign is built in or by design"
VERDICTS = {
    "agrees": COLOURS[2],
    BUILT_IN: "#68d391",
    "disagrees": COLOURS[4],
    "better": COLOURS[0],
    "worse": COLOURS[1],
}
"""Colours of verdicts; whatever is not resolved is grey."""

PER_QUESTION = {"searches": "difference in searches per question", "seconds": "difference in seconds per question"}
"""Columns of effects that are not in points."""

_GREY = "#a0aec0"


def draw_figures(folder: str | Path) -> list[Path]:
    """Draw every table of `folder` that has a figure and is not empty; returns the PNG files.

    Raises FileNotFoundError, naming the command, when no table is there.
    """
    import pandas as pd

    folder = Path(folder)
    drawn = []
    tables = {name: folder / f"{name}.csv" for name in FIGURES}
    if not any(path.is_file() for path in tables.values()):
        raise FileNotFoundError(f"{folder} holds no tables; `vrag reproduce-paper --report-only` writes them")
    for name, path in tables.items():
        picture = folder / f"{name}.png"
        picture.unlink(missing_ok=True)  # that no figure of rows which are gone stays beside the tables
        if not path.is_file() or not path.read_text().strip():
            continue
        table = pd.read_csv(path)
        if name in ("effects", "ablations"):
            table = table[table["verdict"] != "not measured"]
        if not table.empty:
            drawn.append(save_figure(FIGURES[name](table), picture))
    return drawn


def table_1(table: pd.DataFrame) -> Figure:
    """Accuracy by method, overall and by kind of question: one panel each, a row per method."""
    kinds = ("overall", "single", "multi", *ELEMENT_KINDS)
    figure = Figure(figsize=(13, 1.4 + 0.3 * len(table)), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharey=True, width_ratios=[1.7] + [1] * (len(kinds) - 1))
    places = np.arange(len(table))[::-1]
    for ax, kind in zip(axes, kinds, strict=True):
        paper = table["paper_7b"] if kind == "overall" else table[f"paper_{kind}"]
        ax.errorbar(table[kind], places, xerr=interval_errors(table, kind), fmt="o", color=COLOURS[0], ms=4, capsize=2)
        ax.plot(paper, places, "D", mfc="none", color=COLOURS[1], ms=5)
        ax.set(title=kind, xlim=(-4, 104), xticks=[0, 50, 100])
        ax.grid(axis="y", color="#edf2f7")
        _plain(ax)
    names = [
        f"{about} ({name})" if isinstance(name, str) else about for about, name in table[["about", "paper_name"]].values
    ]
    axes[0].set_yticks(places, names, fontsize=8)
    handles = [
        axes[0].plot([], [], "o-", color=COLOURS[0], ms=4, label="here, MiniDocs")[0],
        axes[0].plot([], [], "D", mfc="none", color=COLOURS[1], label="paper, 7B (by kind: SlideVQA, MMLongBench)")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle("Table 1: accuracy, %", fontsize=11)
    return figure


def table_2(table: pd.DataFrame) -> Figure:
    """Accuracy by reward and actions."""
    names = [f"{reward}; {actions}" for reward, actions in zip(table["reward"], table["actions"], strict=True)]
    return _two_sources(table, names, [("accuracy", "paper", "accuracy, %")], "Table 2: reward × crop")


def table_3(table: pd.DataFrame) -> Figure:
    """Invalid actions and finished trajectories before and after RL, and what the paper's table has not."""
    panels = [
        ("wrong_action_rate", "paper_invalid", "invalid actions, %"),
        ("invalid_rate", "", "invalid replies, %"),
        ("finish_rate", "paper_finish", "finished, %"),
        ("accuracy", "", "right, %"),
        ("ndcg", "", "nDCG of the pages seen, %"),
    ]
    panels = [panel for panel in panels if table[panel[0]].notna().any()]
    return _two_sources(table, [_wrapped(about) for about in table["about"]], panels, "Table 3: before and after RL")


def figure_3(table: pd.DataFrame) -> Figure:
    """Accuracy by pages in context, and with the gold pages, the paper's bound: ours and the paper's each on a scale of
    its own, for where whole pages cannot be read ours is next to nothing."""
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    ours, paper = figure.subplots(1, 2)
    found, bound = table[table["pages_given"].notna()], table[table["pages_given"].isna()]
    errors = interval_errors(found, "accuracy")
    ours.errorbar(found["pages_given"], found["accuracy"], yerr=errors, fmt="o-", color=COLOURS[0], capsize=2)
    paper.plot(found["pages_given"], found["paper"], "D--", mfc="none", color=COLOURS[1])
    for row in bound.itertuples():
        ours.axhline(row.accuracy, color=COLOURS[0], linewidth=1, label="gold pages")
        ours.axhspan(row.accuracy_low, row.accuracy_high, color=COLOURS[0], alpha=0.12)
        paper.axhline(row.paper, color=COLOURS[1], linewidth=1, linestyle="--", label="bound")
    for ax, title in ((ours, "here, MiniDocs"), (paper, "paper, read off the picture")):
        ax.set(xlabel="pages in context", ylabel="accuracy, %", title=title, ylim=(0, None))
        ax.set_xticks(sorted(found["pages_given"]))
        if len(bound):
            ax.legend(fontsize=8, loc="lower right" if ax is paper else "best")
        _plain(ax)
    figure.suptitle("Figure 3: pages in context (the scales differ)", fontsize=11)
    return figure


def figure_4(table: pd.DataFrame) -> Figure:
    """Retrieval by who writes the query."""
    series = {"first_gold": "first page shown is a gold page", "gold_seen": "any page shown is"}
    named = {f"{column}{end}": f"{name}{end}" for column, name in series.items() for end in ("", "_low", "_high")}
    figure = interval_bars(table.rename(columns=named), "query", list(series.values()), "% of questions")
    figure.axes[0].set(title="Figure 4: retrieval by query", ylim=(0, 104))
    return figure


def figure_5(table: pd.DataFrame) -> Figure:
    """Accuracy by element, with and without crop."""
    elements = [element for element in ELEMENT_KINDS if element in set(table["element"])]
    methods = list(dict.fromkeys(table["method"]))
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    ax = figure.subplots()
    for i, method in enumerate(methods):
        part = table[table["method"] == method].set_index("element").reindex(elements)
        places = np.arange(len(elements)) + (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
        ax.bar(places, part["accuracy"], 0.8 / len(methods), yerr=interval_errors(part, "accuracy"), capsize=2,
               label=method, color=COLOURS[i])  # fmt: skip
    ax.set_xticks(range(len(elements)), elements)
    ax.set(ylabel="accuracy, %", title="Figure 5: crop by element of the answer")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _plain(ax)
    return figure


def figure_6(table: pd.DataFrame) -> Figure:
    """Seconds and replies per trajectory by method, stacked by phase."""
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(table)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(table))[::-1]
    seconds = {"seconds_generate": "writing", "seconds_retrieve": "searching"}
    replies = {"searches": "searches", "crops": "crops", "answers": "answers", "invalid": "invalid"}
    for ax, parts, total, xlabel, colours in (
        (left, seconds, "seconds", "seconds per trajectory", COLOURS),
        (right, replies, "turns", "replies per trajectory", COLOURS[len(seconds) :]),
    ):
        start = np.zeros(len(table))
        for (column, label), colour in zip(parts.items(), colours, strict=False):
            width = table[column].fillna(0).to_numpy()
            ax.barh(places, width, 0.7, left=start, color=colour, label=label)
            start += width
        ax.errorbar(table[total], places, xerr=interval_errors(table, total), fmt="none", color="black", capsize=2)
        ax.set_xlabel(xlabel)
        ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
        _plain(ax)
    left.set_yticks(places, table["method"])
    figure.suptitle("Figure 6: latency and turns by phase", fontsize=11)
    return figure


def effects(table: pd.DataFrame) -> Figure:
    """Differences with their intervals, coloured by verdict: accuracies and shares in points together, other units in
    axes of their own."""
    built_in = (table["verdict"] == "agrees") & table["basis"].isin(NO_EVIDENCE)
    table = table.assign(verdict=table["verdict"].mask(built_in, BUILT_IN))
    return _differences(table, table["column"].map(PER_QUESTION).fillna("difference in points"))


def ablations(table: pd.DataFrame) -> Figure:
    """Differences with their intervals, coloured by better and worse: an axis for each thing that is measured."""
    titles = {name: f"{label}: difference in points" for name, label in MEASURED.items()}
    titles |= {name: f"{title}, fewer is better" for name, title in titles.items() if name in LESS_IS_BETTER}
    return _differences(table, table["column"].map(titles), built_in_marked=True)


def _differences(table: pd.DataFrame, titles: pd.Series, built_in_marked: bool = False) -> Figure:
    """A row per difference of `table`, with its 95 % interval; those with the same of `titles` share axes. Marked are
    differences of behaviour where an agent collapsed to one answer and, on demand, signs that are built in."""
    parts = dict(list(table.groupby(titles, sort=False)))
    rows = [len(part) for part in parts.values()]
    figure = Figure(figsize=(9.5, 0.9 + 0.27 * len(table) + 0.55 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[0.4 + count for count in rows])[:, 0]
    for ax, (title, part) in zip(axes, parts.items(), strict=True):
        places = np.arange(len(part))[::-1]
        for place, row in zip(places, part.itertuples(), strict=True):
            colour = VERDICTS.get(row.verdict, _GREY)
            ax.plot([row.low, row.high], [place, place], color=colour, linewidth=2)
            ax.plot(row.difference, place, "o", color=colour, ms=5)
        ax.plot(part["paper"], places, "D", mfc="none", color="black", ms=5)
        ax.axvline(0, color="black", linewidth=0.8)
        collapsed = part["collapsed"].notna() & part["column"].isin(BEHAVIOUR)
        marks = collapsed.map({True: " (collapsed)", False: ""})
        if built_in_marked:
            certain = part["basis"].isin(NO_EVIDENCE) & (part["verdict"] != "not resolved")
            marks += certain.map({True: " (built in)", False: ""})
        ax.set_yticks(places, part["effect"] + marks, fontsize=8)
        ax.set_xlabel(title, fontsize=8)
        ax.tick_params(axis="x", labelsize=8)
        ax.set_ylim(-0.7, len(part) - 0.3)
        ax.grid(axis="y", color="#edf2f7")
        _plain(ax)
    names = {name: name for name in VERDICTS} | {"not resolved": "not resolved: Holm's p not below 0.05"}
    shown = {name: label for name, label in names.items() if name in set(table["verdict"])}
    handles = [axes[0].plot([], [], "o-", color=VERDICTS.get(k, _GREY), label=label)[0] for k, label in shown.items()]
    if table["paper"].notna().any():
        handles += axes[0].plot([], [], "D", mfc="none", color="black", linestyle="none", label="paper, 7B")
    figure.legend(handles=handles, fontsize=8, ncols=len(handles), loc="outside upper center")
    return figure


def _two_sources(table: pd.DataFrame, names: list[str], panels: list[tuple[str, str, str]], title: str) -> Figure:
    """Bars of ours with the paper's numbers, where it has any, as hollow marks: one panel per (column, the paper's
    column, axis label), two side by side."""
    rows, columns = -(-len(panels) // 2), min(len(panels), 2)
    figure = Figure(figsize=(3.2 + 3 * columns, 1.0 + rows * (0.6 + 0.32 * len(names))), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    places = np.arange(len(names))[::-1]
    for ax, (column, paper, label) in zip(axes.flat, panels, strict=False):
        errors = interval_errors(table, column)
        ax.barh(places, table[column], 0.6, xerr=errors, capsize=3, color=COLOURS[0], label="here")
        if paper:
            ax.plot(table[paper], places, "D", mfc="white", color=COLOURS[1], linestyle="none", label="paper, 7B")
        ax.set_yticks(places, names, fontsize=8)
        ax.set(xlabel=label, xlim=(0, None))
        _plain(ax)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    named = max((ax.get_legend_handles_labels() for ax in axes.flat), key=lambda found: len(found[0]))
    figure.legend(*named, fontsize=8, ncols=2, loc="outside lower center")
    figure.suptitle(title, fontsize=11)
    return figure


def _wrapped(text: str, width: int = 36) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)


FIGURES = {
    "table_1": table_1,
    "table_2": table_2,
    "table_3": table_3,
    "figure_3": figure_3,
    "figure_4": figure_4,
    "figure_5": figure_5,
    "figure_6": figure_6,
    "effects": effects,
    "ablations": ablations,
}
"""What draws each table."""
