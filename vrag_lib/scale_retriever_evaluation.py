"""How often the scale retriever finds the gold page of MiniDocs' questions: as asked, and as a good searcher asks.

Goes the way every retrieval of the package goes (`VisualRetriever`: Byaldi or the batched engine, bf16, exact MaxSim)
over all pages of a split. Unanswerable questions have no gold page and are left out.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrag_lib.minidocs import MiniDocs, MiniDocsConfig
from vrag_lib.provenance import provenance
from vrag_lib.stats import bootstrap_mean

if TYPE_CHECKING:
    from vrag_lib.corpus import Question
    from vrag_lib.retrieval import Retriever

DEPTH = 10
"""Pages ranked per query; a gold page further down counts as not found (rank 0)."""


def gold_rank(hits: Sequence[Any], gold: Sequence[str]) -> int:
    """Rank, from 1, of the first hit that is a gold page; 0 when none is.

    >>> from vrag_lib.retrieval import Hit
    >>> gold_rank([Hit("a", 2.0), Hit("b", 1.0)], ["b", "c"]), gold_rank([Hit("a", 2.0)], ["b"])
    (2, 0)
    """
    return next((rank for rank, hit in enumerate(hits, 1) if hit.page_id in gold), 0)


def rank_questions(retriever: Retriever, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """One row per answerable question: ranks of the first gold page for the question as asked (`asked`) and for its
    rewritten query (`rewritten`), and of the very page that each hop's query is after (`hops`)."""
    rows = []
    for question in questions:
        if not question.extra["answerable"]:
            continue
        gold = question.gold_page_ids
        stem = gold[0].rsplit("_", 1)[0]
        targets = [f"{stem}_{region['page']}" for region in question.extra["regions"]]
        hops = question.extra["hop_queries"]
        found = retriever.search([question.query, question.extra["rewritten_query"], *hops], DEPTH)
        rows.append(
            {
                "uid": question.uid,
                "template": question.extra["template"],
                "wording": question.extra["wording"],
                "asked": gold_rank(found[0], gold),
                "rewritten": gold_rank(found[1], gold),
                "hops": [gold_rank(hits, [target]) for hits, target in zip(found[2:], targets, strict=True)],
            }
        )
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Recall at 1, 5 and 10 with 95 % bootstrap intervals, and the question as asked by wording and template."""
    summary: dict[str, Any] = {"questions": len(rows)}
    for name in ("asked", "rewritten"):
        for k in (1, 5, 10):
            summary[f"{name}_recall@{k}"] = _interval([0 < row[name] <= k for row in rows])
    hops = [rank for row in rows for rank in row["hops"]]
    summary["hops"] = len(hops)
    summary |= {f"hop_recall@{k}": _interval([0 < rank <= k for rank in hops]) for k in (1, 5, 10)}
    for part in ("wording", "template"):
        for value in sorted({row[part] for row in rows}):
            chosen = [row for row in rows if row[part] == value]
            summary[f"{part}: {value}"] = {
                "questions": len(chosen),
                "asked_recall@1": _interval([row["asked"] == 1 for row in chosen]),
                "rewritten_recall@1": _interval([row["rewritten"] == 1 for row in chosen]),
            }
    return summary


def _interval(values: Sequence[bool]) -> dict[str, float]:
    mean, low, high = bootstrap_mean([float(value) for value in values], most=1)
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}


def count_parameters(model: str | Path) -> int:
    """Numbers in the safetensors files of a folder."""
    from safetensors import safe_open

    total = 0
    for path in Path(model).glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total


def evaluate_retriever(
    model: str | Path,
    out_dir: str | Path,
    split: str = "test",
    minidocs: MiniDocsConfig | None = None,
    engine: str = "byaldi",
    dtype: str = "bfloat16",
    cache_dir: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Index a split with the model in a folder, search its questions, and write `{split}.json` (summary with
    provenance) and `{split}.csv` (ranks per question) to `out_dir`. Returns the summary."""
    from vrag_lib.visual_retrieval import VisualRetriever

    docs = MiniDocs(minidocs or MiniDocsConfig())
    corpus = docs.corpus(split, cache_dir)
    retriever = VisualRetriever.build(corpus, model, engine=engine, device="cpu", dtype=dtype, cache_dir=cache_dir)
    rows = rank_questions(retriever, docs.questions(split))
    summary = {"split": split, "pages": len(corpus.pages), "minidocs": docs.fingerprint}
    summary |= (
        {"engine": engine, "dtype": dtype, "parameters": count_parameters(model)}
        | summarise(rows)
        | {"provenance": provenance(seed)}
    )
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{split}.json").write_text(json.dumps(summary, indent=1) + "\n")
    with (out / f"{split}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "hops": " ".join(map(str, row["hops"]))} for row in rows)
    return summary


_CARD = """---
license: apache-2.0
library_name: colpali
tags: [visual-document-retrieval, colqwen2, late-interaction, tiny]
---
# Scale retriever: ColQwen2 in {parameters:.1f} million parameters

colpali-engine's `ColQwen2` with a small config, trained from nothing on a CPU to find the pages of MiniDocs, the
generated documents of the laptop preset. It reads titles, names and labels of those pages and nothing else: no
photograph, no handwriting, no vocabulary but theirs. It is of no use outside this project.

- **Load** with colpali-engine or Byaldi from this path (`colqwen2` in it tells Byaldi the class), or
  `VisualRetriever.build(corpus, "data/scale_retriever_colqwen2")`.
- **Training**: `train_retriever(out_dir, hours={hours}, seed={seed})`. (1) {reading} steps of reading: windows of 48
  cells of random text and of training pages; each cell names its characters, query words are aligned with the cells
  that show them. (2) {finding} steps of finding, tower frozen: ColPali's contrastive loss, {batch} pages per step,
  each with a page of the same title in another document and another page of its own document as hard negatives.
- **Data**: MiniDocs, train split only. Entities, layouts and palettes of validation and test are unseen, and so are
  the everyday wordings of all questions. Page images come from DejaVu fonts (free licence) and drawn shapes.
- **Input**: pages shown in at most 220 cells of 28 x 28 pixels; 128-dimensional embeddings of every cell.

## {split} split: {questions} answerable questions, {pages} pages, {engine} engine, {dtype}
| query | R@1 | R@5 | R@10 |
|---|---|---|---|
{rows}

Percent with 95 % bootstrap intervals over questions; a hop query must find its own page, the others any gold page.
Measured at commit `{commit}`, {time}, by `evaluate_retriever`.
"""


def model_card(summary: dict[str, Any], hours: float, seed: int) -> str:
    """The README of a shipped model, with the numbers of `evaluate_retriever`."""
    from vrag_lib.scale_retriever_training import GROUPS, schedules

    def cell(name: str, k: int) -> str:
        found = summary[f"{name}_recall@{k}"]
        return f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"

    names = {"asked": "question as asked", "rewritten": "rewritten query", "hop": "query of each hop"}
    rows = [f"| {text} | {' | '.join(cell(name, k) for k in (1, 5, 10))} |" for name, text in names.items()]
    reading, finding = schedules(hours)
    return _CARD.format(
        **{key: summary[key] for key in ("questions", "pages", "engine", "dtype")},
        split=summary["split"].capitalize(),
        parameters=summary["parameters"] / 1e6,
        hours=hours,
        seed=seed,
        reading=reading.steps,
        finding=finding.steps,
        batch=3 * GROUPS,
        rows="\n".join(rows),
        commit=summary["provenance"]["commit"],
        time=summary["provenance"]["time"],
    )
