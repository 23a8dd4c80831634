"""Which samples become training data (paper §D): a chain of named filters, a balanced draw, and the ablation's numbers.

    result = filter_trajectories(samples, judge)
    chosen = balance(result.kept, target=3000, seed=0)
    result.funnel.with_stage("balance", len(chosen)).to_frame()

Deviations from the released code: what a reply did is read from the record, so that a crop counts as following a page
only if a page was shown right before it, not if "search" occurs somewhere in the text (trap T21); boxes are checked in
the frame of the image they were named on, the one the policy will see in training (T8); near-duplicates are left out;
balance, there a commented-out filter, is a draw. The paper gives no rule but "2-6 steps, types of action balanced"; six
replies do not occur where `environment.max_turns` is 5, as it is by default.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrag_lib.actions import ActionKind
from vrag_lib.corpus import Question
from vrag_lib.geometry import Box, iou
from vrag_lib.judge import Judge, normalise, rule_judge
from vrag_lib.rendering import write_atomically
from vrag_lib.settings import setting
from vrag_lib.stats import bootstrap_mean
from vrag_lib.trajectory import ImageRef, StopReason, Trajectory, Turn

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

Filter = Callable[[Sequence[Trajectory]], list[bool]]
"""For each trajectory whether it stays, in order."""

Verdicts = dict[tuple[str, str, str], bool | None]
"""(question, reference answer, given answer) -> right, wrong, or None where the judge failed."""

_TAG = re.compile(r"</?(?:think|search|bbox|answer)>")


@dataclass(frozen=True)
class FilterConfig:
    """Limits of the filters. Box sides are shown pixels of the image that the box was named on. The environment grows
    sides below `geometry.MIN_CROP_SIDE`; that is no fault of a box: a table row of MiniDocs is shown 20 pixels high."""

    min_replies: int = setting(2, "fewest replies, the answer included (paper: 2)")
    max_replies: int = setting(6, "most replies, the answer included (paper: 6)")
    min_box_side: float = setting(14, "least side of a crop's box: one patch of the encoder, the least that is seen")
    max_box_iou: float = setting(0.9, "IoU of a crop's box with the whole image from which on it enlarges nothing")
    min_crop_pixels: int = setting(56 * 56, "least area of a crop as shown, pixels (released code, there of pages)")
    max_crop_pixels: int = setting(1280 * 28 * 28, "largest area of a crop as shown, pixels (released code, of pages)")
    duplicate_iou: float = setting(0.8, "near-duplicates: all boxes overlap by more than this IoU")


@dataclass(frozen=True)
class Funnel:
    """How many trajectories are left after each stage: (stage, number), the first one what went in."""

    stages: tuple[tuple[str, int], ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """stage, kept, dropped, and share: kept of all that went in."""
        counts = [kept for _, kept in self.stages]
        before = [counts[0], *counts]
        return [
            {"stage": stage, "kept": kept, "dropped": last - kept, "share": kept / counts[0] if counts[0] else 0.0}
            for (stage, kept), last in zip(self.stages, before, strict=False)
        ]

    def with_stage(self, stage: str, kept: int) -> Funnel:
        """The same with one more stage.

        >>> Funnel((("sampled", 4),)).with_stage("balance", 3).rows[1]
        {'stage': 'balance', 'kept': 3, 'dropped': 1, 'share': 0.75}
        """
        return Funnel((*self.stages, (stage, kept)))

    def to_frame(self) -> pd.DataFrame:
        """The rows as a table."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["stage", "kept", "dropped", "share"])

    def write_csv(self, path: str | Path) -> Path:
        """The rows as a CSV file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.to_frame().to_csv(index=False).encode())
        return path


@dataclass(frozen=True)
class FilterResult:
    """What a chain of filters left, what each stage dropped, and how many that were."""

    kept: tuple[Trajectory, ...]
    dropped: dict[str, tuple[Trajectory, ...]]
    funnel: Funnel


def filter_trajectories(
    trajectories: Sequence[Trajectory],
    judge: Judge = rule_judge,
    config: FilterConfig | None = None,
    *,
    judge_workers: int = 1,
) -> FilterResult:
    """The standard chain, see `standard_filters`. Every distinct answer is judged once."""
    return apply_filters(trajectories, standard_filters(judge_answers(trajectories, judge, judge_workers), config))


def apply_filters(trajectories: Sequence[Trajectory], filters: dict[str, Filter]) -> FilterResult:
    """Each filter sees what the ones before it left."""
    kept = list(trajectories)
    dropped: dict[str, tuple[Trajectory, ...]] = {}
    funnel = Funnel((("sampled", len(kept)),))
    for stage, stays in filters.items():
        verdicts = list(zip(kept, stays(kept), strict=True))
        dropped[stage] = tuple(trajectory for trajectory, stay in verdicts if not stay)
        kept = [trajectory for trajectory, stay in verdicts if stay]
        funnel = funnel.with_stage(stage, len(kept))
    return FilterResult(tuple(kept), dropped, funnel)


def standard_filters(verdicts: Verdicts, config: FilterConfig | None = None) -> dict[str, Filter]:
    """The chain by name, in order. Each drops what its name says:

    error           the policy or the search engine failed
    not_finished    no answer
    not_judged      the judge failed
    wrong_answer    the judge says no; where nothing answers the question, anything but saying so
    invalid_action  some reply was invalid
    structure       a reply that is not one thought and one action, or a crop that does not follow an image
    box_rules       a box that leaves the image, is too small, or nearly the whole image
    steps           fewer or more replies than wanted
    repeats         the same query, or the same region, twice
    near_duplicate  as a trajectory of the same question before it: actions, pages, answer, boxes nearly so
    """
    config = config or FilterConfig()

    def verdict(trajectory: Trajectory) -> bool | None:
        return verdicts[_judged(trajectory)]

    return {
        "error": _each(lambda t: t.stop_reason is not StopReason.ERROR),
        "not_finished": _each(lambda t: t.answer is not None),
        "not_judged": _each(lambda t: verdict(t) is not None),
        "wrong_answer": _each(lambda t: verdict(t) is True),
        "invalid_action": _each(lambda t: all(reply.invalid is None for reply in t.replies)),
        "structure": _each(has_structure),
        "box_rules": _each(lambda t: has_good_boxes(t, config)),
        "steps": _each(lambda t: config.min_replies <= len(t.replies) <= config.max_replies),
        "repeats": _each(lambda t: not has_repeats(t)),
        "near_duplicate": lambda trajectories: are_new(trajectories, config.duplicate_iou),
    }


def _each(stays: Callable[[Trajectory], bool]) -> Filter:
    return lambda trajectories: [stays(trajectory) for trajectory in trajectories]


def judge_answers(trajectories: Iterable[Trajectory], judge: Judge = rule_judge, workers: int = 1) -> Verdicts:
    """A verdict on every distinct answer. A judge that can be asked for many at once (`many`) is; any other is called
    one by one, in `workers` threads, and where it raises the verdict is None."""
    items = list(dict.fromkeys(_judged(t) for t in trajectories if t.answer is not None))
    if hasattr(judge, "many"):
        return dict(zip(items, judge.many(items), strict=True))

    def ask(item: tuple[str, str, str]) -> bool | None:
        try:
            return bool(judge(*item))
        except Exception as error:  # a judge behind a network may fail in any way; that costs one answer
            logger.warning("no verdict on the answer %r to %r: %s", item[2][:80], item[0][:80], error)
            return None

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(items, pool.map(ask, items), strict=True))


def _judged(trajectory: Trajectory) -> tuple[str, str, str]:
    return trajectory.question, trajectory.reference_answer, trajectory.answer or ""


def has_structure(trajectory: Trajectory) -> bool:
    """Whether every reply is one thought and one action, nothing else, and every crop directly follows an image."""
    for before, reply in zip(trajectory.turns, trajectory.turns[1:], strict=False):
        if reply.role != "assistant":
            continue
        if reply.action is None or not is_thought_and_action(reply.text, reply.action.kind):
            return False
        if reply.action.kind is ActionKind.CROP and not before.images:
            return False
    return True


def is_thought_and_action(text: str, kind: ActionKind) -> bool:
    """Whether a reply is a thought that is not empty and one action of this kind; linear in its length.

    >>> is_thought_and_action("<think>when?</think>\\n<search>year</search>", ActionKind.SEARCH)
    True
    >>> is_thought_and_action("<think>or <answer>?</think> <search>year</search>", ActionKind.SEARCH)
    False
    """
    text = text.strip()
    if _TAG.findall(text) != ["<think>", "</think>", f"<{kind.value}>", f"</{kind.value}>"]:
        return False
    thought, _, action = text.removeprefix("<think>").partition("</think>")
    is_framed = text.startswith("<think>") and text.endswith(f"</{kind.value}>")
    return is_framed and bool(thought.strip()) and action.lstrip().startswith(f"<{kind.value}>")


def has_good_boxes(trajectory: Trajectory, config: FilterConfig) -> bool:
    """Whether every crop's box lies on the image it was named on, is large enough to be seen, leaves out enough to
    enlarge something, and is shown at a permitted size."""
    image: ImageRef | None = None
    for reply, seen in _steps(trajectory):
        if reply is not None and reply.action is not None and reply.action.box is not None:
            if image is None or not _is_good_box(reply.action.box, image, config):
                return False
            if seen is not None and not config.min_crop_pixels <= _area(seen) <= config.max_crop_pixels:
                return False
        image = seen or image
    return True


def _is_good_box(box: Box, image: ImageRef, config: FilterConfig) -> bool:
    shown = image.view.shown
    inside = 0 <= box.x1 < box.x2 <= shown.width and 0 <= box.y1 < box.y2 <= shown.height
    large = min(box.width, box.height) >= config.min_box_side
    return inside and large and iou(box, Box(0, 0, shown.width, shown.height)) < config.max_box_iou


def _area(image: ImageRef) -> int:
    return image.view.shown.width * image.view.shown.height


def _steps(trajectory: Trajectory) -> list[tuple[Turn | None, ImageRef | None]]:
    """Each reply with the image it led to, None if to none."""
    steps: list[tuple[Turn | None, ImageRef | None]] = []
    for turn in trajectory.turns:
        if turn.role == "assistant":
            steps.append((turn, None))
        elif turn.images:
            reply = steps.pop()[0] if steps else None
            steps.append((reply, turn.images[-1]))
    return steps


def has_repeats(trajectory: Trajectory) -> bool:
    """Whether a query (case and spacing aside) or a cropped region of a page occurs twice."""
    done: list[Any] = []
    for reply, seen in _steps(trajectory):
        action = None if reply is None else reply.action
        if action is not None and action.kind is ActionKind.SEARCH:
            done.append(" ".join(action.argument.casefold().split()))
        elif action is not None and action.kind is ActionKind.CROP and seen is not None:
            done.append((seen.page_id, seen.view.box))
    return len(set(done)) < len(done)


def are_new(trajectories: Sequence[Trajectory], duplicate_iou: float) -> list[bool]:
    """For each trajectory whether none before it, of those found new, is nearly the same: same question, sequence of
    actions, pages and answer, and every region shown overlapping by more than `duplicate_iou`."""
    found: dict[Any, list[list[Box]]] = {}
    verdicts = []
    for trajectory in trajectories:
        kinds = tuple(reply.action.kind if reply.action else reply.invalid for reply in trajectory.replies)
        pages = tuple(image.page_id for image in trajectory.images)
        alike = found.setdefault((trajectory.question_id, kinds, pages, normalise(trajectory.answer or "")), [])
        boxes = [image.view.box for image in trajectory.images]
        is_new = not any(all(iou(a, b) > duplicate_iou for a, b in zip(boxes, others, strict=True)) for others in alike)
        if is_new:
            alike.append(boxes)
        verdicts.append(is_new)
    return verdicts


def balance(trajectories: Sequence[Trajectory], target: int, seed: int) -> list[Trajectory]:
    """Draw up to `target` trajectories, evenly over numbers of replies, within those over types (with or without a
    crop, number of searches), and within those from the questions drawn least.

    A question is drawn at most once more than the mean needed, unless the target cannot be reached otherwise. What is
    drawn depends on the set and the seed, not on the order; the draw's first n are themselves balanced.
    """
    if target < 0:
        raise ValueError(f"cannot draw {target} trajectories")
    pool = sorted(trajectories, key=lambda t: t.id)
    random.Random(seed).shuffle(pool)
    cells: dict[tuple[int, bool, int], list[Trajectory]] = {}
    for trajectory in pool:
        cells.setdefault(cell_of(trajectory), []).append(trajectory)
    by_replies: Counter[int] = Counter()
    by_cell: Counter[tuple[int, bool, int]] = Counter()
    by_question: Counter[str] = Counter()
    most = math.ceil(target / max(1, len({t.question_id for t in pool}))) + 1
    drawn: list[Trajectory] = []
    open_cells = set(cells)
    while len(drawn) < target and any(cells.values()):
        if not open_cells:  # every question that is left has been drawn `most` times
            most += 1
            open_cells = {cell for cell, left in cells.items() if left}
        cell = min(open_cells, key=lambda c: (by_replies[c[0]], by_cell[c], c))
        counts = [by_question[trajectory.question_id] for trajectory in cells[cell]]
        if min(counts, default=most) >= most:
            open_cells.discard(cell)
            continue
        chosen = cells[cell].pop(counts.index(min(counts)))
        drawn.append(chosen)
        by_replies[cell[0]] += 1
        by_cell[cell] += 1
        by_question[chosen.question_id] += 1
    return drawn


def cell_of(trajectory: Trajectory) -> tuple[int, bool, int]:
    """What `balance` counts by: replies, whether it crops, searches."""
    crops, searches = trajectory.count(ActionKind.CROP), trajectory.count(ActionKind.SEARCH)
    return len(trajectory.replies), crops > 0, searches


def ablation_row(
    name: str,
    trajectories: Sequence[Trajectory],
    kept: Sequence[Trajectory],
    questions: Sequence[Question],
    judge: Judge = rule_judge,
    seed: int = 0,
) -> dict[str, Any]:
    """One configuration of experts in numbers: `name`, `sampled`, `kept`, `crops`, and these means, each with `_low`
    and `_high`, the limits of its 95 % bootstrap interval:

    yield           share of the samples kept
    accuracy        share of the samples whose answer the judge accepts; no answer is wrong, no verdict not counted
    finished        share of the samples with an answer
    crop_iou        IoU of a crop with the gold region, of crops of gold pages
    invalid_rate    share of the replies that were invalid
    replies         replies of a sample

    Samples of one question are averaged first and questions resampled, because samples of one question are alike.
    Where there is nothing to average (no crops, no regions), mean and limits are NaN.

    Raises ValueError for a trajectory whose question is not among `questions`, and for no trajectories.
    """
    by_id = {question.uid: question for question in questions}
    unknown = next((t.question_id for t in trajectories if t.question_id not in by_id), None)
    if unknown is not None:
        raise ValueError(f"a trajectory of {name!r} answers {unknown!r}, which is not among the questions given")
    if not trajectories:
        raise ValueError(f"there are no trajectories of {name!r}")
    verdicts = judge_answers(trajectories, judge)
    is_right = [(t.question_id, False if t.answer is None else verdicts[_judged(t)]) for t in trajectories]
    kept_ids = {trajectory.id for trajectory in kept}
    values: dict[str, list[tuple[str, float]]] = {
        "yield": [(t.question_id, t.id in kept_ids) for t in trajectories],
        "accuracy": [(question_id, right) for question_id, right in is_right if right is not None],
        "finished": [(t.question_id, t.answer is not None) for t in trajectories],
        "crop_iou": [(t.question_id, v) for t in trajectories for v in crop_ious(t, by_id[t.question_id])],
        "invalid_rate": [(t.question_id, r.invalid is not None) for t in trajectories for r in t.replies],
        "replies": [(t.question_id, len(t.replies)) for t in trajectories],
    }
    crops = sum(image.is_crop for t in trajectories for image in t.images)
    row: dict[str, Any] = {"name": name, "sampled": len(trajectories), "kept": len(kept_ids), "crops": crops}
    for measure, pairs in values.items():
        grouped: dict[str, list[float]] = {}
        for question_id, value in pairs:
            grouped.setdefault(question_id, []).append(float(value))
        means = [sum(group) / len(group) for group in grouped.values()]
        interval = (
            bootstrap_mean(means, seed=seed, most=None if measure == "replies" else 1) if means else (math.nan,) * 3
        )
        row |= zip((measure, f"{measure}_low", f"{measure}_high"), interval, strict=True)
    return row


def crop_ious(trajectory: Trajectory, question: Question) -> list[float]:
    """For each crop of a page with a gold region the IoU with the nearest one, both in raw page pixels. Regions are
    `question.gold_regions`; a crop of any other page is not counted."""
    regions: dict[str, list[Box]] = {}
    for page_id, box in question.gold_regions:
        regions.setdefault(page_id, []).append(box)
    return [
        max(iou(image.view.box, box) for box in regions[image.page_id])
        for image in trajectory.images
        if image.is_crop and image.page_id in regions
    ]
