"""The report of the matrix: tables as CSV, figures drawn from them, and one page that says what agrees with the paper.

    write_report(load_config("laptop", experiment=True))

writes the page, `results/REPORT.md` (other presets than `laptop`: `results/REPORT_<preset>.md`), and
`results/<preset>/paper/`: CSV, PNG, and `README.md` with all tables and figures. Everything is made from the rows of
finished cells; nothing is run. Every sentence about a result follows from a table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrag_lib.config import Config
from vrag_lib.matrix import SEEDS, MatrixError, Outcome, read_rows, states
from vrag_lib.matrix_cells import CELLS
from vrag_lib.paper_columns import ELEMENT_KINDS, TYPES, seeds_spread
from vrag_lib.paper_effects import BEHAVIOUR, COLLAPSE, MEASURED, NO_EVIDENCE, illegible
from vrag_lib.paper_figures import draw_figures
from vrag_lib.paper_numbers import ABLATIONS, EFFECTS, PAPER_TABLE_2, SCORE_BEHAVIOUR
from vrag_lib.paper_tables import BEFORE_AND_AFTER, METHODS, SUMMARY, make_tables
from vrag_lib.provenance import provenance
from vrag_lib.rendering import write_atomically

if TYPE_CHECKING:
    import pandas as pd

COMMAND = "vrag reproduce-paper"

ANSWERS = ("most frequent answer, %", "“not answerable”, %")
"""Columns that say how far an agent has collapsed to one answer."""


_BUT = {"built in": "the sign is built in", "by design": "the sign is by design",
        "both at the bottom": "both are at the bottom"}  # fmt: skip


def write_report(config: Config, seeds: int = SEEDS) -> Path:
    """Write tables, figures and the page from the finished cells; returns the page.

    seeds: how many the matrix was meant to have, to say what is missing. Raises MatrixError when no cell is finished.
    """
    rows = read_rows(config)
    if not rows:
        raise MatrixError(f"{config.folder('matrix')} holds no finished cell; `{COMMAND}` runs them")
    folder = config.folder("paper")
    folder.mkdir(parents=True, exist_ok=True)
    tables = make_tables(rows)
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g").encode())
    record = {"cells": {name: sorted(map(int, set(frame["seed"]))) for name, frame in rows.items()}}
    record |= {"provenance": provenance(config.seed)}
    write_atomically(folder / "provenance.json", (json.dumps(record, indent=1) + "\n").encode())
    names = [path.stem for path in draw_figures(folder)]
    spread = {name: seeds_spread(frame) for name, frame in rows.items() if frame["seed"].nunique() > 1}
    write_atomically(folder / "README.md", tables_text(config, tables, spread, names).encode())
    page = Path(config.results) / _page(config)
    write_atomically(page, page_text(config, tables, states(config, seeds=seeds), names).encode())
    return page


def page_text(
    config: Config, tables: Mapping[str, pd.DataFrame], found: Sequence[Outcome], pictures: Sequence[str]
) -> str:
    """The page. found: what there is of each cell and seed. pictures: names of the figures drawn."""
    folder = f"{config.preset}/paper"
    parts = [
        f"# The paper's experiments in miniature (preset `{config.preset}`)",
        _what(config, tables, found),
        _summary(tables["summary"]),
        "## What agrees with the paper",
        verdicts(tables["effects"]),
        _effects(tables["effects"]),
        legibility(tables),
        collapse(tables),
        *(f"![{name}]({folder}/{name}.png)" for name in ("effects", "table_1") if name in pictures),
        "## Ablations that nobody published",
        _ablations(tables["ablations"]) or "None of them is measured yet.",
        "## How sure",
        _how_sure(tables),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def tables_text(
    config: Config, tables: Mapping[str, pd.DataFrame], spread: Mapping[str, Sequence[float]], pictures: Sequence[str]
) -> str:
    """All tables and figures. spread: accuracy by training seed, of cells with several."""
    order = ("table_1", "table_2", "table_3", "figure_3", "figure_4", "figure_5", "figure_6", "effects", "ablations")
    parts = [
        f"# Tables and figures (preset `{config.preset}`)",
        "Of the effects that the paper claims:",
        verdicts(tables["effects"]),
        _table_1(tables["table_1"]),
        gold(tables),
        collapse(tables),
        _table_2(tables["table_2"]),
        _table_3(tables["table_3"]),
        _figure_6(tables["figure_6"]),
        _effects(tables["effects"]) and f"**Effects that the paper claims.**\n\n{_effects(tables['effects'])}",
        legibility(tables),
        *(f"![{name}]({name}.png)" for name in order if name in pictures),
        _spread(spread),
        f"What the numbers mean and how sure they are: [the report](../../{_page(config)}).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_markdown(name: str, tables: Mapping[str, pd.DataFrame]) -> str:
    """One of TEXTS with its intervals; where it has no row yet, the command that runs its cells.

    Raises KeyError for another name.
    """
    text, cells = TEXTS[name]
    return text(tables[name]) or f"Nothing of this is measured yet; `{COMMAND} --cells {' '.join(cells)}` does it."


def _page(config: Config) -> str:
    return "REPORT.md" if config.preset == "laptop" else f"REPORT_{config.preset}.md"


def _what(config: Config, tables: Mapping[str, pd.DataFrame], found: Sequence[Outcome]) -> str:
    finished = [outcome.cell for outcome in found if outcome.state == "finished"]
    failed = [outcome for outcome in found if outcome.state == "failed"]
    questions = tables["cells"]["questions"].max()
    lines = [
        "Models answer questions on generated documents (MiniDocs), on the laptop preset tiny ones trained from "
        "nothing. That can show whether an effect of the paper has the same direction here; it says nothing about its "
        "size at 7B. An effect that cannot be told from zero is called not resolved.",
        f"{len(set(finished))} of {len(CELLS)} cells have a finished seed, {len(finished)} of {len(found)} cells × "
        f"seeds are finished, on {questions} answerable test questions. Generated by `{COMMAND} --report-only` from "
        f"the rows in `{config.preset}/matrix/`; all tables and figures: "
        f"[{config.preset}/paper]({config.preset}/paper/README.md).",
    ]
    if failed:
        named = "; ".join(f"`{outcome.cell}` seed {outcome.seed}: {outcome.error}" for outcome in failed)
        lines.append(f"**Failed:** {named}")
    missing = list(dict.fromkeys(o.cell for o in found if o.state in ("missing", "begun")))
    if missing:
        lines.append(f"Not finished with every seed: {', '.join(f'`{name}`' for name in missing)}.")
    return "\n\n".join(lines)


def verdicts(effects: pd.DataFrame) -> str:
    """Which effects agree with the paper's sign, by evidence or otherwise, which do not, and which are open."""
    agrees, certain = effects["verdict"] == "agrees", effects["basis"].isin(NO_EVIDENCE)
    groups = {"agrees by measurement": agrees & ~certain}
    groups |= {f"agrees, but {_BUT[name]}": agrees & (effects["basis"] == name) for name in NO_EVIDENCE}
    groups |= {name: effects["verdict"] == name for name in ("disagrees", "not resolved", "not measured")}
    return "\n".join(
        f"- **{name}** ({chosen.sum()} of {len(effects)}): {'; '.join(effects.loc[chosen, 'effect']) or 'none'}"
        for name, chosen in groups.items()
        if chosen.any() or (name == "agrees by measurement" and agrees.any())
    )


def _effects(effects: pd.DataFrame) -> str:
    measured = effects[effects["verdict"] != "not measured"]
    if measured.empty:
        return ""
    rows = [
        (
            row.effect + _note(row),
            f"`{row.a}` − `{row.b}`",
            _signed(row.difference, row.low, row.high, row.column),
            _p(row.p_holm),
            f"{'+' if row.paper_sign > 0 else '-'} (not printed)" if math.isnan(row.paper) else _points(row.paper),
            row.score or "",
            row.source,
            row.verdict,
            row.basis,
        )
        for row in measured.itertuples()
    ]
    head = ("effect", "cells", "here [95 %]", "p, Holm", "paper, 7B", "SCORE, SlideVQA / ViDoSeek", "from", "sign",
            "basis")  # fmt: skip
    return f"{_markdown(head, rows)}\n\n{_key(measured)}"


def legibility(tables: Mapping[str, pd.DataFrame]) -> str:
    """What cannot be seen where the policy cannot read a page unless it enlarges a part; nothing where it can, or where
    one of the two bounds that tell is not measured."""
    first = tables["table_1"]
    kinds = ["overall"] if illegible(first) else [kind for kind in ELEMENT_KINDS if illegible(first, kind)]
    if not kinds:
        return ""
    of, these = ("", "the") if kinds == ["overall"] else (f" of {_and(kinds)} questions", "these")
    bounds = {row["cell"]: row for row in first.to_dict("records")}
    whole, regions = (_and([_cell(bounds[name], kind) for kind in kinds]) for name in ("gold_pages", "gold_regions"))
    effects = tables["effects"]
    neither, one = (
        list(effects.loc[effects["basis"] == name, "effect"]) for name in ("both at the bottom", "built in")
    )
    lines = [
        f"**Pages{of} are not legible whole at this scale.** Given the gold pages the policy answers {whole} % of "
        f"{these} questions, given the gold regions {regions} %. An agent that cannot crop is held to the former, "
        "whatever it finds."
    ]
    if neither:
        lines.append(f"So these compare two agents at the bottom and show nothing, either way: {'; '.join(neither)}.")
    if one:
        lines.append(f"And of these the sign is built in: {'; '.join(one)}.")
    return " ".join(lines)


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def collapse(tables: Mapping[str, pd.DataFrame]) -> str:
    """Which agents say the same to very many questions, and what follows; nothing where none does."""
    cells = tables["cells"]
    same = cells if cells.empty else cells[cells["top_share"] > COLLAPSE]
    if same.empty:
        return ""
    said = [
        f"- `{row.cell}` ({row.about}): {_said(row.top_answer)} in {row.top_share:.1f} %, that or the second "
        f"most frequent in {row.top_two_share:.1f} %"
        for row in same.itertuples()
    ]
    lines = ["How often such an agent finishes, and how few of its replies are invalid, says nothing about its skill."]
    refusing = [f"`{row.cell}`" for row in same.itertuples() if row.refused_share > COLLAPSE]
    if refusing:
        lines.append(
            f"All questions counted here have an answer; for some training questions `Not answerable` is right, and "
            f"whether that is why {' and '.join(refusing)} came to say so was not tested."
        )
    behaviour = [
        row.effect
        for row in (*tables["effects"].itertuples(), *tables["ablations"].itertuples())
        if row.verdict != "not measured" and row.column in BEHAVIOUR and row.collapsed
    ]
    if behaviour:
        lines.append(f"So these differences show no skill, whatever their sign: {'; '.join(behaviour)}.")
    head = f"**Collapsed to one answer**, which ends more than {COLLAPSE:.0f} % of the trajectories of these agents:"
    return "\n\n".join((head, "\n".join(said), " ".join(lines)))


def gold(tables: Mapping[str, pd.DataFrame]) -> str:
    """Why agents given the gold pages are below VRAG-RL, which has to find them; nothing where they are not."""
    cells = {row["cell"]: row for row in tables["cells"].to_dict("records")}
    ours = cells.get("vrag_rl", {"accuracy_low": math.nan})
    below = [name for name in ("gold_pages", "gold_pages_crop") if name in cells
             and cells[name]["accuracy_high"] < ours["accuracy_low"]]  # fmt: skip
    if not below:
        return ""
    lines = [
        f"**Given the gold pages, yet below `vrag_rl`** ({_cell(ours, 'accuracy')} %), and so no upper bound: "
        + " and ".join(f"`{name}` ({_cell(cells[name], 'accuracy')} %)" for name in below)
        + "."
    ]
    if "gold_pages" in below and illegible(tables["table_1"]):
        lines.append("`gold_pages` may not crop, and whole pages are not legible at this scale.")
    if "gold_pages_crop" in below:
        text = "`gold_pages_crop` learnt to crop from the planner alone, which points badly where it is a script"
        found, wanted = _cell(cells["gold_pages_crop"], "crop_iou"), _cell(ours, "crop_iou")
        more = f": the best IoU of its crops with a gold region is {found}, of those of `vrag_rl` {wanted}"
        lines.append(f"{text}{more if found and wanted else ''}.")
    return " ".join(lines)


def _summary(table: pd.DataFrame) -> str:
    head = ("cell", "", "right", *(f"of that: {kind}" for kind in ELEMENT_KINDS), "nDCG of the pages seen", "seeds")
    return _titled("**In short**, % [95 %]:", table, head, lambda row: (
        f"`{row['cell']}`", "the best that cannot crop: " * row["best_without_crop"] + row["about"],
        _cell(row, "accuracy"), *(_cell(row, kind) for kind in ELEMENT_KINDS), _cell(row, "ndcg"), row["seeds"],
    ))  # fmt: skip


def _titled(
    title: str, table: pd.DataFrame, head: Sequence[str], cells: Callable[[dict[str, Any]], Sequence[object]]
) -> str:
    """A table under its title, `cells` of each row; nothing where there is no row."""
    if table.empty:
        return ""
    return f"{title}\n\n{_markdown(head, [cells(row) for row in table.to_dict('records')])}"


def _table_1(table: pd.DataFrame) -> str:
    metrics = {"exact": "exact match", "f1": "F1", "anls": "ANLS"}
    head = ("cell", "", "overall", *TYPES, *metrics.values(), "no answer", "crops", *ANSWERS, "seeds", "paper 7B / 3B",
            "SCORE SlideVQA / ViDoSeek")  # fmt: skip
    return _titled("**Table 1.** Accuracy, % [95 %].", table, head, lambda row: (
        f"`{row['cell']}`", row["about"], _cell(row, "overall"), *(_cell(row, kind) for kind in TYPES),
        *(_cell(row, metric) for metric in metrics), f"{row['failed']} / {row['trajectories']}", _cell(row, "crops"),
        *_answers(row), row["seeds"],
        _two(row["paper_7b"], row["paper_3b"]), _two(row["score_slidevqa"], row["score_vidoseek"]),
    ))  # fmt: skip


def _table_2(table: pd.DataFrame) -> str:
    head = ("cell", "reward", "actions", "accuracy", "no answer", *ANSWERS, "seeds", "paper 7B")
    return _titled("**Table 2.** Reward × crop, after SFT; accuracy, % [95 %].", table, head, lambda row: (
        f"`{row['cell']}`", row["reward"], row["actions"], _cell(row, "accuracy"),
        f"{row['failed']} / {row['trajectories']}", *_answers(row), row["seeds"], _number(row["paper"]),
    ))  # fmt: skip


def _table_3(table: pd.DataFrame) -> str:
    head = ("cell", "", "invalid actions", "paper 7B", "of that: replies", "finished", "paper 7B", "right",
            "nDCG of the pages seen", *ANSWERS, "seeds")  # fmt: skip
    title = (
        "**Table 3.** Before and after RL; % [95 %]. Invalid actions, as in the paper: invalid replies, crops of a "
        "wrong region, here those that show at most half of each gold region, answers before any image."
    )
    return _titled(title, table, head, lambda row: (
        f"`{row['cell']}`", row["about"], _cell(row, "wrong_action_rate"), _number(row["paper_invalid"]),
        _cell(row, "invalid_rate"), _cell(row, "finish_rate"), _number(row["paper_finish"]), _cell(row, "accuracy"),
        _cell(row, "ndcg"), *_answers(row), row["seeds"],
    ))  # fmt: skip


def _figure_6(table: pd.DataFrame) -> str:
    if table.empty:
        return ""
    columns = {"turns": "replies", "searches": "searches", "crops": "crops", "gold_recall": "gold pages seen, %",
               "pages": "pages", "noise_pages": "noise pages", "tokens_sampled": "tokens",
               "seconds": "seconds"}  # fmt: skip
    rows = [(row["method"], *(_cell(row, name) for name in columns)) for row in table.to_dict("records")]
    known = {name: _number(SCORE_BEHAVIOUR[name], 2) for name in columns if name in SCORE_BEHAVIOUR}
    rows.append(("VRAG-RL-7B in SCORE", *(known.get(name, "") for name in columns)))
    return (
        "**Behaviour and cost** per trajectory [95 %] (Figure 6; seconds are shared out over the conversations of a "
        "batch and depend on the machine).\n\n" + _markdown(("", *columns.values()), rows)
    )


def _ablations(table: pd.DataFrame) -> str:
    measured = table[table["verdict"] != "not measured"]
    if measured.empty:
        return ""
    rows = [
        (
            MEASURED[row.column],
            row.effect + _note(row),
            f"`{row.a}` − `{row.b}`",
            _signed(row.difference, row.low, row.high, row.column),
            _p(row.p_holm),
            row.seeds,
            row.verdict,
            row.basis,
        )
        for row in measured.itertuples()
    ]
    left = list(table.loc[table["verdict"] == "not measured", "effect"])
    note = f"\n\nNot measured: {'; '.join(left)}." if left else ""
    text = _markdown(("measured", "change", "cells", "points [95 %]", "p, Holm", "seeds", "result", "basis"), rows)
    return f"{text}\n\n{_key(measured)}{note}"


def _how_sure(tables: Mapping[str, pd.DataFrame]) -> str:
    measured = {name: int(tables[name]["p"].notna().sum()) for name in ("effects", "ablations")}
    lines = [
        "- Intervals are 95 % percentile bootstrap intervals of 10,000 resamples: questions are drawn with "
        "replacement, the same for all cells, and where a cell was trained several times its seeds as well, "
        "independently, their spread made up for how little few of them vary. With few that part is rough; with one, "
        "the interval says nothing about training again. Shares of 0 and 100 % have the exact limits of so many "
        "questions; those next to them are too narrow. Differences are paired by question, and by seed where both "
        "cells have the same.",
        f"- P-values of the {measured['effects']} measured effects of the paper, and of the {measured['ablations']} "
        "measured ablations, are corrected by Holm's method within each of the two families; below 0.05 an effect "
        "counts as resolved. The intervals shown are not corrected.",
        "- A trajectory without answer, for whatever reason, is wrong, and stays in every number. Answers are judged "
        "by rule, replies are greedy.",
        "- Neither the paper nor the re-run gives intervals; that a sign agrees is all that can be said. Their models, "
        "documents, judge and retriever are others.",
        "- RL after SFT is compared with the cold starts that it began with, by seed; the rows of SFT in the tables "
        "are means over all of its seeds, and their differences may be others.",
        "- *VRAG-RL's reward* has the paper's form; its weights, 0.2 for nDCG and 0.8 for the answer, stand in a "
        "comment of the released code, for the paper gives none. For RL without SFT the paper adds a reward of the "
        "pattern and leaves out the KL, as `cold_start_paper` does; the other cells without SFT differ from `vrag_rl` "
        "in nothing else.",
        "- *No SFT*, *not trained to* and *found with the question* mean: taught the form of replies, and no more, by "
        "a few hundred trajectories, in place of what an instruct model knows. `vrag_lib/matrix_cells.py` says how, "
        "and which trajectories the other cells learn from.",
    ]
    return "\n".join(lines)


def _spread(spread: Mapping[str, Sequence[float]]) -> str:
    if not spread:
        return ""
    rows = [(f"`{name}`", ", ".join(f"{value:.1f}" for value in values)) for name, values in spread.items()]
    return "**Accuracy by training seed**, %.\n\n" + _markdown(("cell", "seeds in order"), rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _note(effect: Any) -> str:
    """What a reader has to know of a comparison, in brackets."""
    notes = [effect.note, effect.collapsed and f"collapsed to one answer: {effect.collapsed}"]
    return f" ({'; '.join(filter(None, notes))})" if any(notes) else ""


def _key(effects: pd.DataFrame) -> str:
    """What the cells that are compared are."""
    names = dict.fromkeys(name for pair in effects[["a", "b"]].values for name in pair)
    return f"Cells: {'; '.join(f'`{name}`: {CELLS[name].about}' for name in names)}."


def _said(answer: str) -> str:
    """What a model answered, as text that cannot break a table."""
    return f"`{' '.join(answer.split())[:40].replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _answers(row: Mapping[str, Any]) -> tuple[str, str]:
    """The entries under ANSWERS."""
    top = f"{_said(row['top_answer'])} {row['top_share']:.1f}" if row["top_answer"] else ""
    return top, f"{row['refused_share']:.1f}"


def _number(value: float, digits: int = 1) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}".removesuffix(".00")


def _two(first: float, second: float) -> str:
    return "" if math.isnan(first) else f"{first:.1f} / {second:.1f}"


def _points(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.1f}"


def _cell(row: Mapping[str, float], name: str) -> str:
    """A number with its interval, with more digits where it is small and no share."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if math.isnan(value):
        return ""
    digits = 0 if abs(value) >= 1000 else 2 if name in ("turns", "searches", "crops", "crop_iou", "pages",
                                                          "noise_pages", "seconds") else 1  # fmt: skip
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _signed(value: float, low: float, high: float, column: str) -> str:
    digits = 2 if column in ("seconds", "searches") else 1
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


TEXTS: dict[str, tuple[Callable[[Any], str], Sequence[str]]] = {
    "summary": (_summary, SUMMARY),
    "table_1": (_table_1, METHODS),
    "table_2": (_table_2, tuple(PAPER_TABLE_2)),
    "table_3": (_table_3, BEFORE_AND_AFTER),
    "figure_6": (_figure_6, ("vanilla_rag_1", "react", "search_r1", "sft", "sft_rl_search", "vrag_rl")),
    "effects": (_effects, tuple(dict.fromkeys(cell for e in EFFECTS for cell in (e.a, e.b)))),
    "ablations": (_ablations, tuple(dict.fromkeys(cell for e in ABLATIONS for cell in (e.a, e.b)))),
}
"""Tables as text, and the cells that each is made of."""
