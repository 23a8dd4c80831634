"""The agent's evaluation: trajectories on a question set become one row each, and rows become tables with intervals.

    frame = run(policy, questions, corpus, retriever, EnvironmentConfig(), "results/laptop/evaluate")
    summarise(frame, by="query_type")
    compare(frame, other_frame, "judge")          # paired by question
    rescore("results/laptop/evaluate", questions, judge=other_judge, label="model")

Deviations from the released code, whose evaluation script is not published (spec 1.8): what failed or gave no answer is
wrong and stays in every mean (ViDoRAG drops it, spec 8.5); accuracy is the judge alone, the trainer's product with the
format gate (trap T4) stands beside it as `judge_gated`; intervals resample questions, the samples of a question being
averaged first; an answer without a verdict is taken to be right as often as those judged, and counted (`unjudged`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.actions import ActionKind, InvalidReason
from vrag_lib.answer_metrics import METRICS, gold_answers, is_answerable, is_refusal
from vrag_lib.claims import alone_in, claim
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Corpus, Question
from vrag_lib.geometry import iou
from vrag_lib.judge import Judge, rule_judge, verdicts
from vrag_lib.policy import Policy
from vrag_lib.provenance import provenance
from vrag_lib.rendering import read_json, write_atomically
from vrag_lib.retrieval import Retriever
from vrag_lib.rewards import ndcg, pattern_reward
from vrag_lib.stats import Difference, Interval, bootstrap_mean, edge_limits, paired_difference
from vrag_lib.synthesis import SynthesisError, questions_fingerprint, sample
from vrag_lib.trajectory import Trajectory, clean_text, read_trajectories, write_trajectories

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_METRICS = ("exact", "f1", "anls")

ELEMENTS = {"pure-text (plain-text)": "text", "generalized-text (layout)": "layout", "2d_layout": "layout"}
"""Element names of the paper's Table 1 for the benchmarks' spellings in lower case; others are their own."""

_BREAKDOWNS = ("dataset", "query_type", "element", "template", "answerable")
_MEANS = ("searches", "crops", "noise_pages", "tokens_sampled", "seconds_generate", "seconds_retrieve")


def evaluate_trajectories(
    trajectories: Sequence[Trajectory],
    questions: Sequence[Question],
    judge: Judge = rule_judge,
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> pd.DataFrame:
    """One row per trajectory, in order. Truth is read from `questions`, so corrected references need no new rollouts.

    Columns: the question (`uid`, `dataset`, `query`, `reference_answer`, `source_type`, `query_type`, `template`,
    `answerable`, `gold_pages`); the trajectory (`id`, `run_id`, `seed`, `policy`, `answer`, `stop_reason`, `error`);
    `answered`, and `failed`, its opposite; `judge` (1, 0, or NaN without a verdict), `judge_score` (of a judge that
    keeps `scores`, as ViDoRAG's) and `judge_gated` (0 unless a search and an answer happened); each of `metrics`;
    `refused`; `ndcg` and `gold_recall` of the pages shown, and `gold_page_seen` (any), all NaN for a question without
    gold pages; `pages` and `noise_pages` shown; `searches`, `crops`, `replies`, `invalid` and `invalid_<reason>`,
    counted; `crop_iou`, the best IoU of any crop with a gold region, in raw page pixels, NaN without a crop or a known
    region; `wrong_actions`, what the paper counts as invalid (see there); `tokens_sampled` (NaN for a policy without
    tokens) and `seconds_generate`, `seconds_retrieve`.

    Raises ValueError for no trajectories, an unknown metric, a trajectory whose question is missing, or a uid used
    twice.
    """
    import pandas as pd

    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"there is no metric {unknown[0]!r}; metrics are {', '.join(METRICS)}")
    if not trajectories:
        raise ValueError("there are no trajectories to evaluate")
    by_uid = {question.uid: question for question in questions}
    if len(by_uid) != len(questions):
        twice = Counter(question.uid for question in questions).most_common(1)[0][0]
        raise ValueError(f"two questions have the uid {twice!r}; give each its own")
    missing = next((t.question_id for t in trajectories if t.question_id not in by_uid), None)
    if missing is not None:
        raise ValueError(f"no question has the uid {missing!r} of a trajectory; pass the questions it was made from")
    asked = [by_uid[trajectory.question_id] for trajectory in trajectories]
    verdicts = _verdicts(judge, trajectories, asked)
    rows = []
    for trajectory, question, verdict in zip(trajectories, asked, verdicts, strict=True):
        judged = {"judge": verdict, "judge_gated": verdict if pattern_reward(trajectory) else 0.0}
        if hasattr(judge, "scores"):
            points = [judge.scores.get((question.query, gold, trajectory.answer)) for gold in gold_answers(question)]
            judged["judge_score"] = max((p for p in points if p is not None), default=math.nan)
        scores = {name: METRICS[name](question, trajectory.answer) for name in metrics}
        rows.append(_identity(trajectory, question) | judged | scores | _behaviour(trajectory, question))
    return pd.DataFrame(rows)


def _verdicts(judge: Judge, trajectories: Sequence[Trajectory], asked: Sequence[Question]) -> list[float]:
    """1, 0, or NaN where the judge failed; no answer is 0 unasked, and one of several accepted answers is enough. A
    judge with `many` gets all answers at once."""
    items = [
        (i, (question.query, gold, trajectory.answer))
        for i, (trajectory, question) in enumerate(zip(trajectories, asked, strict=True))
        if trajectory.answer is not None
        for gold in gold_answers(question)
    ]
    found: dict[int, list[bool | None]] = {}
    for (i, _), verdict in zip(items, verdicts(judge, [item for _, item in items]), strict=True):
        found.setdefault(i, []).append(verdict)
    return [_any_of(found.get(i, [False])) for i in range(len(trajectories))]


def _any_of(found: Sequence[bool | None]) -> float:
    """1 where any verdict is yes; NaN where none is and one is missing."""
    return 1.0 if any(found) else math.nan if None in found else 0.0


def _identity(trajectory: Trajectory, question: Question) -> dict[str, Any]:
    return {
        "uid": question.uid,
        "dataset": str(question.extra.get("dataset", "")),
        "query": clean_text(question.query),
        "reference_answer": clean_text(question.reference_answer),
        "source_type": question.source_type,
        "query_type": question.query_type,
        "template": str(question.extra.get("template", "")),
        "answerable": is_answerable(question),
        "gold_pages": len(question.gold_page_ids),
        "id": trajectory.id,
        "run_id": trajectory.run_id,
        "seed": trajectory.seed,
        "policy": trajectory.policy,
        "answer": trajectory.answer or "",
        "stop_reason": trajectory.stop_reason.value,
        "error": trajectory.error,
        "answered": trajectory.answer is not None,
        "failed": trajectory.answer is None,
    }


def _behaviour(trajectory: Trajectory, question: Question) -> dict[str, Any]:
    gold, shown = set(question.gold_page_ids), set(trajectory.shown_pages)
    invalid = Counter(turn.invalid for turn in trajectory.replies if turn.invalid is not None)
    tokens = [turn.token_ids for turn in trajectory.replies]
    return {
        "refused": trajectory.answer is not None and is_refusal(trajectory.answer),
        "ndcg": ndcg(trajectory.shown_pages, gold) if gold else math.nan,
        "gold_recall": len(gold & shown) / len(gold) if gold else math.nan,
        "gold_page_seen": float(bool(gold & shown)) if gold else math.nan,
        "pages": len(shown),
        "noise_pages": len(shown - gold),
        "searches": trajectory.count(ActionKind.SEARCH),
        "crops": trajectory.count(ActionKind.CROP),
        "replies": len(trajectory.replies),
        "invalid": invalid.total(),
        **{f"invalid_{reason.value}": invalid[reason] for reason in InvalidReason},
        "crop_iou": crop_iou(trajectory, question),
        "wrong_actions": wrong_actions(trajectory, question),
        "tokens_sampled": math.nan if None in tokens else sum(map(len, tokens)),
        "seconds_generate": trajectory.timings.get("generate", math.nan),
        "seconds_retrieve": trajectory.timings.get("retrieve", math.nan),
    }


def crop_iou(trajectory: Trajectory, question: Question) -> float:
    """Best IoU, in raw page pixels, of any crop with any of the question's gold regions (`Question.gold_regions`); a
    crop of another page has 0. NaN without a crop or without regions.

    Raises ValueError for regions of another form.
    """
    crops = [image for image in trajectory.images if image.is_crop]
    overlaps = [
        iou(crop.view.box, box) if crop.page_id == page_id else 0.0
        for crop in crops
        for page_id, box in question.gold_regions
    ]
    return max(overlaps, default=math.nan)


def wrong_actions(trajectory: Trajectory, question: Question) -> float:
    """Replies that the paper calls invalid actions (§3.3): invalid ones, crops that miss, an answer before any page
    or part of one was shown. The paper does not say when a crop is wrong; here it is one that shows at most half of
    each gold region. NaN where no region is known.

    Raises ValueError for regions of another form.
    """
    regions = question.gold_regions
    if not regions:
        return math.nan
    missed = sum(
        all(
            crop.page_id != page_id or crop.view.box.intersection(box).area <= 0.5 * box.area
            for page_id, box in regions
        )
        for crop in trajectory.images
        if crop.is_crop
    )
    blind = trajectory.answer is not None and not (trajectory.images or trajectory.shown_pages)
    return float(sum(reply.invalid is not None for reply in trajectory.replies) + missed + blind)


def by_element(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows once per element that their evidence lies in (`element`: text, table, chart, figure, layout), as the
    paper's Table 1 counts MMLongBench-Doc, whose questions name several; `none` where nothing is named."""
    elements = frame["source_type"].fillna("").astype(str).str.lower().str.strip().str.split(r"\s*[,;]\s*")
    named = elements.map(lambda names: list(dict.fromkeys(ELEMENTS.get(name, name) or "none" for name in names)))
    return frame.assign(element=named).explode("element", ignore_index=True)


def summarise(frame: pd.DataFrame, by: str | Sequence[str] = (), samples: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """One row per group of rows (one for all without `by`), its means over questions with 95 % bootstrap intervals.

    The trajectories of a question are one cluster: they are averaged first, and questions are resampled. Columns: `by`;
    `n` questions, `trajectories`, `failed` of them, and `unjudged`; then, each with `_low` and `_high`, `accuracy`
    (judge; NaN where it gave no verdict on any answer), `accuracy_gated`, every answer metric, `finish_rate` (share
    answered), `invalid_rate` (invalid replies of all replies), `ndcg`, `gold_recall`, `crop_iou`, `turns` (replies),
    and `mmlongbench_f1` where that metric is (NaN unless questions without an answer were asked, too, which it is
    about); then plain means of what else was counted. Questions without a value (no gold page, no crop) are left out of
    that mean; `crop_iou_n` says how many have one. NaN where none has.

    Raises ValueError when the frame is empty.
    """
    import pandas as pd

    if frame.empty:
        raise ValueError("there are no rows to summarise")
    by = [by] if isinstance(by, str) else list(by)
    groups = frame.groupby(by, dropna=False) if by else [((), frame)]
    rows = []
    for key, group in groups:
        row = dict(zip(by, key, strict=True)) | _counts(group)
        for name, interval in _intervals(group, samples, seed).items():
            row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        per_question = _per_question(group, _MEANS)
        rows.append(row | {name: per_question[name].mean() for name in _MEANS})
    return pd.DataFrame(rows)


def _counts(group: pd.DataFrame) -> dict[str, int]:
    return {
        "n": group["uid"].nunique(),
        "trajectories": len(group),
        "failed": int(group["failed"].sum()),
        "unjudged": int(group["judge"].isna().sum()),
        "crop_iou_n": group.loc[group["crop_iou"].notna(), "uid"].nunique(),
    }


def _intervals(group: pd.DataFrame, samples: int, seed: int) -> dict[str, Interval]:
    columns = {"accuracy": "judge", "accuracy_gated": "judge_gated"}
    columns |= {name: name for name in METRICS if name in group}
    columns |= {"finish_rate": "answered", "ndcg": "ndcg", "gold_recall": "gold_recall"}
    columns |= {"crop_iou": "crop_iou", "turns": "replies"}
    means = _per_question(group, list(columns.values()))
    found = {
        name: _mean_interval(means[column], samples, seed, None if column == "replies" else 1.0)
        for name, column in columns.items()
    }
    if group["judge"].isna().any():
        answered = group["answered"].astype(bool)
        found["accuracy"] = _judged_interval(group, "judge", answered, samples, seed)
        found["accuracy_gated"] = _judged_interval(
            group, "judge_gated", answered & (group["searches"] > 0), samples, seed
        )
    counted = _per_question(group, ("invalid", "replies"))
    found["invalid_rate"] = ratio_interval(counted["invalid"], counted["replies"], samples=samples, seed=seed)
    if "mmlongbench" in group and group["answerable"].all():
        found["mmlongbench_f1"] = Interval(math.nan, math.nan, math.nan)
    elif "mmlongbench" in group:
        # F1 = 2PR / (P + R) = 2S / (answered + answerable), see answer_metrics.mmlongbench_result
        parts = group.assign(
            twice=2 * group["mmlongbench"] * group["answerable"], size=group["answerable"] + 1.0 - group["refused"]
        )
        means = _per_question(parts, ("twice", "size"))
        found["mmlongbench_f1"] = ratio_interval(means["twice"], means["size"], samples=samples, seed=seed)
    return found


def _per_question(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Mean of each question's trajectories, by uid; NaN where none has a value."""
    return frame.groupby("uid")[list(columns)].mean()


def _judged_interval(group: pd.DataFrame, column: str, asked: pd.Series, samples: int, seed: int) -> Interval:
    """Of verdicts some of which are missing: the share of trajectories that are `asked` about, the others being wrong,
    times the share of right ones among those judged, all resampled together. Leaving rows out would make those weigh
    more that are wrong unasked. NaN without any verdict."""
    judged = asked & group[column].notna()
    parts = group.assign(asked=asked.astype(float), right=group[column].where(judged, 0.0), judged=judged.astype(float))
    means = _per_question(parts, ("asked", "right", "judged")).to_numpy(float)
    if not means[:, 2].sum():
        return Interval(math.nan, math.nan, math.nan)
    sums = _resampled_sums(means, samples, seed)
    shares = np.divide(sums[:, 1], sums[:, 2], out=np.full(samples, math.nan), where=sums[:, 2] > 0)
    low, high = np.nanquantile(shares * sums[:, 0] / len(means), [0.025, 0.975])
    mean = float(means[:, 0].mean() * means[:, 1].sum() / means[:, 2].sum())
    low, high = edge_limits(mean, len(means)) or (low, high)
    return Interval(mean, float(low), float(high))


def _mean_interval(values: pd.Series, samples: int, seed: int, most: float | None) -> Interval:
    values = values.dropna()
    if values.empty:
        return Interval(math.nan, math.nan, math.nan)
    return bootstrap_mean(values.to_numpy(dtype=float), samples=samples, seed=seed, most=most)


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Ratio of the sums of two (n,) columns of questions, a share, with its percentile bootstrap interval; both columns
    are resampled together. A resample whose denominators sum to 0 has ratio 0; all of them 0 gives NaN. Limits of the
    ratios 0 and 1 are exact (`stats.edge_limits`).

    >>> ratio_interval([1, 2], [2, 4])
    Interval(mean=0.5, low=0.5, high=0.5)
    """
    pairs = np.column_stack([numerators, denominators]).astype(float)
    if not pairs[:, 1].sum():
        return Interval(math.nan, math.nan, math.nan)
    sums = _resampled_sums(pairs, samples, seed)
    ratios = np.divide(sums[:, 0], sums[:, 1], out=np.zeros(samples), where=sums[:, 1] > 0)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    share = float(pairs[:, 0].sum() / pairs[:, 1].sum())
    low, high = edge_limits(share, int((pairs[:, 1] > 0).sum()), confidence) or (low, high)
    return Interval(share, float(low), float(high))


def _resampled_sums(columns: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Sums (samples, k) of the columns (questions, k) of that many resamples of questions."""
    rng = np.random.default_rng(seed)
    step = max(1, 2_000_000 // len(columns))  # indices in memory together
    return np.concatenate(
        [
            columns[rng.integers(0, len(columns), (min(step, samples - start), len(columns)))].sum(axis=1)
            for start in range(0, samples, step)
        ]
    )


def compare(
    frame_a: pd.DataFrame, frame_b: pd.DataFrame, column: str = "judge", samples: int = 10_000, seed: int = 0
) -> Difference:
    """How much higher `column` is in `frame_a` than in `frame_b`, paired by question, each question's trajectories
    averaged first. Questions that lack a value on one side are left out on both.

    Raises ValueError when the frames are not of the same questions, lack the column, or share no value of it.
    """
    for frame in (frame_a, frame_b):
        if column not in frame:
            raise ValueError(f"there is no column {column!r} to compare")
    a, b = (_per_question(frame, [column])[column] for frame in (frame_a, frame_b))
    alone = a.index.symmetric_difference(b.index)
    if len(alone):
        raise ValueError(f"{len(alone)} questions are in one frame only, for example {alone[0]!r}; pair the same ones")
    both = a.notna() & b.notna()
    if not both.any():
        raise ValueError(f"no question has a value of {column!r} on both sides")
    return paired_difference(a[both].to_numpy(float), b[both].to_numpy(float), samples=samples, seed=seed)


def run(
    policy: Policy,
    questions: Sequence[Question],
    corpus: Corpus,
    retriever: Retriever,
    environment: EnvironmentConfig,
    folder: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 8,
    workers: int = 1,
    max_sampled_tokens: int | None = None,
    retry_errors: bool = True,
    judge: Judge = rule_judge,
    metrics: Sequence[str] = DEFAULT_METRICS,
    preset: str = "",
    settings: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Roll out every question once per seed, score, and write `trajectories.parquet`, `questions.csv` (a row per
    trajectory), `summary.csv` (all, and by type) and `provenance.json` to `folder`; returns the rows.

    Trajectories are kept in `samples/` as they end (`synthesis.sample`): after a kill the same call makes what is
    missing and nothing twice, and with another judge or other metrics it only scores again. `retry_errors` makes those
    again that failed but not by the model's doing, see `sample`. `settings`: what else the trajectories depend on, such
    as a checkpoint.

    Raises SynthesisError when the folder holds trajectories of other settings or another process writes to it,
    SamplingError as `sample` (nothing is scored then, the samples are kept), ValueError as `evaluate_trajectories`.
    """
    folder = Path(folder)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different and at least one, not {list(seeds)}")
    described = {
        "policy": policy.name,
        "retriever": retriever.name,
        "corpus_fingerprint": corpus.fingerprint,
        "corpus_pages": len(corpus.page_ids),
        "environment": asdict(environment),
        **dict(settings or {}),
    }
    # The tables hold the seeds of one call; those of another evaluation must not be written over them.
    claim(folder / "samples", described | {"questions": questions_fingerprint(questions)}, error=SynthesisError)
    with alone_in(folder / "samples", SynthesisError):
        trajectories: list[Trajectory] = []
        for seed in seeds:
            trajectories += sample(
                policy,
                questions,
                corpus,
                retriever,
                environment,
                folder / "samples" / f"seed-{seed}",
                samples_per_question=1,
                seed=seed,
                workers=workers,
                batch_size=batch_size,
                max_sampled_tokens=max_sampled_tokens,
                retry_errors=retry_errors,
                preset=preset,
                settings=settings,
            )
        write_trajectories(trajectories, folder / "trajectories.parquet")
        frame = evaluate_trajectories(trajectories, questions, judge, metrics)
        _write_scores(folder, frame, judge, metrics, described | {"seeds": list(seeds)})
        return frame


def rescore(
    folder: str | Path,
    questions: Sequence[Question],
    judge: Judge = rule_judge,
    metrics: Sequence[str] = DEFAULT_METRICS,
    label: str = "",
) -> pd.DataFrame:
    """Score the trajectories that `run` left in `folder` again, without rollouts. With a `label` the new tables stand
    beside the old ones (`questions-<label>.csv` and so on), without one they replace them.

    Raises RecordError when the folder holds no trajectories, ValueError as `evaluate_trajectories` or for a bad label.
    """
    if label and not re.fullmatch(r"[\w-]+", label):
        raise ValueError(f"a label is made of letters, digits, - and _, not {label!r}")
    trajectories = read_trajectories(Path(folder) / "trajectories.parquet")
    frame = evaluate_trajectories(trajectories, questions, judge, metrics)
    before = (read_json(Path(folder) / "provenance.json") or {}).get("settings", {})
    _write_scores(Path(folder), frame, judge, metrics, {**before, "rescored": True}, label)
    return frame


def summary_table(frame: pd.DataFrame) -> pd.DataFrame:
    """`summarise` of all rows and by each of dataset, question type, element, template and answerability that has two
    values or more; `by` and `group` name the rows."""
    import pandas as pd

    tables = [summarise(frame).assign(by="all", group="all")]
    for name in _BREAKDOWNS:
        rows = by_element(frame) if name == "element" else frame
        if rows[name].nunique() > 1:
            tables.append(summarise(rows, name).rename(columns={name: "group"}).assign(by=name))
    table = pd.concat(tables, ignore_index=True)
    return table[["by", "group", *(column for column in table.columns if column not in ("by", "group"))]]


def _write_scores(
    folder: Path,
    frame: pd.DataFrame,
    judge: Judge,
    metrics: Sequence[str],
    settings: Mapping[str, Any],
    label: str = "",
) -> None:
    ending = f"-{label}" if label else ""
    name = getattr(judge, "name", getattr(judge, "__name__", type(judge).__name__))
    scored = {"questions": frame["uid"].nunique(), "judge": name, "metrics": list(metrics)}
    record = {"settings": {**settings, **scored}, "provenance": provenance(None)}
    write_atomically(folder / f"provenance{ending}.json", (json.dumps(record, indent=1) + "\n").encode())
    for stem, table in (("questions", frame), ("summary", summary_table(frame))):
        # A carriage return alone ends a row for who reads the file, and is not quoted by who writes it.
        plain = table.replace(r"\r\n?", "\n", regex=True)
        write_atomically(folder / f"{stem}{ending}.csv", plain.to_csv(index=False, float_format="%.6g").encode())
