"""What makes MiniDocs hard, in numbers: leakage, what searching costs, what looking closer gains, and the bounds.

    report("data/scale_policy", "…/scale_model/retriever/test.json", "…/scale_model/policy/perception_probes.csv", out)

Reads the evaluations of the two scale models where they lie beside each other in `results/`, and measures what they do
not hold: answers without any page (the lower bound), and with the gold pages and regions of every hop given (the upper
bound). Not in the paper, whose benchmarks come as they are.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vrag_lib.claims import model_fingerprint
from vrag_lib.geometry import render
from vrag_lib.minidocs import MiniDocs, majority_accuracy
from vrag_lib.minidocs_questions import MiniQuestion
from vrag_lib.provenance import provenance
from vrag_lib.rendering import write_atomically
from vrag_lib.scale_evaluate import generate, load_policy
from vrag_lib.scale_tasks import phrase, region_view
from vrag_lib.stats import bootstrap_mean

TARGETS = {
    "leakage": (0.0, 0.05),
    "no page": (0.0, 0.05),
    "asked": (0.35, 0.65),
    "rewritten": (0.85, 1.0),
    "crop": (0.90, 1.0),
    "page": (0.0, 0.50),
}
"""Least and largest share that each row may have for the collection to keep what makes the paper's problem hard."""

NAMES = {
    "leakage": "most frequent training answer of the question's template",
    "no page": "scale policy, question alone (lower bound)",
    "asked": "question as asked finds a gold page at rank 1",
    "rewritten": "rewritten query finds a gold page at rank 1",
    "crop": "value read from its gold region (tables and charts)",
    "page": "value read from the whole gold page (tables and charts)",
    "crop text": "value read from its gold region (text)",
    "page text": "value read from the whole gold page (text)",
    "gold": "every hop read from its gold region (upper bound)",
}


def answerable(docs: MiniDocs, split: str, documents: int) -> list[tuple[int, MiniQuestion]]:
    """Document number and question of all answerable questions of the first `documents` documents."""
    return [
        (index, question)
        for index in range(documents)
        for question in docs.mini_questions(docs.document(split, index))
        if question.answerable
    ]


def bounds(
    policy: str | Path, docs: MiniDocs, split: str, documents: int, batch_size: int = 32
) -> dict[str, list[float]]:
    """For each answerable question 1 or 0: `no page` (the policy is given the question and nothing else) and `gold`
    (it is shown the gold region of each hop, asked for that fact in few words, and right each time)."""
    from tqdm import tqdm

    model, processor = load_policy(policy)
    questions = answerable(docs, split, documents)
    blind = generate(model, processor, None, [question.query for _, question in questions])
    pages: dict[tuple[int, int], Any] = {}
    wanted = []
    for number, (index, question) in enumerate(questions):
        for page_number, fact in question.facts:
            page = docs.document(split, index).page(page_number)
            if (index, page_number) not in pages:
                pages[index, page_number] = page.image()
            view = region_view(page, fact.region_box)
            crop = render(pages[index, page_number], view)
            wanted.append((number, crop, f"What is {phrase(fact)}?", fact.value))
    gold = [1.0] * len(questions)
    for start in tqdm(range(0, len(wanted), batch_size), "reading gold regions", mininterval=5):
        part = wanted[start : start + batch_size]
        replies = generate(model, processor, [crop for _, crop, _, _ in part], [asked for _, _, asked, _ in part])
        for (number, _, _, expected), reply in zip(part, replies, strict=True):
            gold[number] *= float(reply.strip() == expected)
    return {
        "no page": [float(r.strip() == q.answer) for r, (_, q) in zip(blind, questions, strict=True)],
        "gold": gold,
    }


def report(
    policy: str | Path,
    retriever_summary: str | Path,
    probes: str | Path,
    out: str | Path,
    docs: MiniDocs | None = None,
    split: str = "test",
    documents: int | None = None,
) -> list[dict[str, Any]]:
    """Write `hardness.csv`, `README.md` and `config.json` to `out` and return the rows: name, n, share, interval,
    target, met.

    retriever_summary: `test.json` of `evaluate_retriever`. probes: `perception_probes.csv` of `evaluate_policy`. Raises
    FileNotFoundError, naming the command that makes it, where one is missing.
    """
    for path in (retriever_summary, probes):
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no {path}; `vrag scale-model` trains the models and measures them")
    docs = docs or MiniDocs()
    documents = docs.config.documents[split] if documents is None else documents
    found = json.loads(Path(retriever_summary).read_text())
    questions = answerable(docs, split, documents)
    leakage = majority_accuracy(docs.questions("train"), docs.questions(split))["all"]
    rows = [_row("leakage", leakage, leakage, leakage, len(questions))]
    measured = bounds(policy, docs, split, documents)
    rows.append(_of("no page", measured["no page"]))
    for name in ("asked", "rewritten"):
        recall = found[f"{name}_recall@1"]
        rows.append(_row(name, recall["mean"], recall["low"], recall["high"], found["questions"]))
    with Path(probes).open(newline="") as file:
        asked = list(csv.DictReader(file))
    for task in ("crop", "page"):
        for suffix, elements in (("", ("table", "chart")), (" text", ("text",))):
            scores = [float(p["score"]) for p in asked if p["task"] == task and p["element"] in elements]
            rows.append(_of(task + suffix, scores))
    rows.append(_of("gold", measured["gold"]))
    model = model_fingerprint(str(policy))
    settings = {"minidocs": asdict(docs.config), "split": split, "documents": documents, "policy": model}
    _write(Path(out), rows, split, settings)
    return rows


def _of(name: str, scores: Sequence[float]) -> dict[str, Any]:
    return _row(name, *bootstrap_mean(list(scores), most=1), len(scores))


def _row(name: str, share: float, low: float, high: float, n: int) -> dict[str, Any]:
    least, most = TARGETS.get(name, (0.0, 1.0))
    target = "" if name not in TARGETS else f"{least:.0%} to {most:.0%}"
    met = "" if not target else "yes" if least <= share <= most else "no"
    return {
        "measure": NAMES[name], "n": n, "share": share, "low": low, "high": high, "target": target, "met": met,
    }  # fmt: skip


def _write(out: Path, rows: Sequence[dict[str, Any]], split: str, settings: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "hardness.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    made = provenance(settings["minidocs"]["seed"])
    described = {"config": settings, "provenance": made}
    write_atomically(out / "config.json", (json.dumps(described, indent=1) + "\n").encode())
    lines = [
        f"# What makes MiniDocs hard ({split} split)",
        "",
        "| measure | n | share | 95 % | target | met |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['measure']} | {r['n']} | {r['share']:.1%} | {r['low']:.1%} to {r['high']:.1%} | {r['target']} "
        f"| {r['met']} |"
        for r in rows
    ]
    lines += [
        "",
        f"Answerable questions only, exact match, greedy replies. `{made['command']}`, commit {made['commit']}.",
        "",
    ]
    write_atomically(out / "README.md", "\n".join(lines).encode())
