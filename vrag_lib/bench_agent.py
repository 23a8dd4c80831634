"""What the benchmarks of the agent share: questions, a model where none is given, a clock by phase, rows and bars."""

from __future__ import annotations

import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vrag_lib.config import Config
from vrag_lib.corpus import Question
from vrag_lib.plots import COLOURS
from vrag_lib.stages import Collection, collection
from vrag_lib.trajectory import ImageRef
from vrag_lib.vision_cache import vision_tower

OURS = "vrag_lib"
STOCK = "stock TRL"
UNCOUNTED = "uncounted"
"""A phase that is left out, with all that is done in it."""

VISION, IMAGES, OTHER = "vision tower", "image processing", "other"

Place = tuple[Any, str, str | Callable[..., str]]
"""A function to watch: its owner, its name there, and its phase or what tells the phase from a call's arguments."""


class Stopwatch:
    """Seconds and calls by phase. While a phase is open inside another, the outer one's clock stands still."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done inside to `name`."""
        self._lap()
        self._open.append(UNCOUNTED if UNCOUNTED in self._open else name)
        self.calls[self._open[-1]] += 1
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def watching(self, *places: Place, outermost: bool = False) -> Iterator[None]:
        """Count calls of functions to their phases. Only calls inside an open phase count, unless `outermost`."""

        def watched(function: Callable, phase: str | Callable[..., str]) -> Callable:
            @functools.wraps(function)  # generation reads the signature of a model's forward
            def call(*arguments: Any, **settings: Any) -> Any:
                if not (self._open or outermost):
                    return function(*arguments, **settings)
                with self.phase(phase if isinstance(phase, str) else phase(*arguments, **settings)):
                    return function(*arguments, **settings)

            return call

        with ExitStack() as stack:
            for owner, name, phase in places:
                # patch.object puts back what was there, be it the object's or its class's
                stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name), phase)))
            yield


def image_places(model: Any, processor: Any) -> list[Place]:
    """Where images are rendered and cut into patches, and where the model looks at them."""
    return [
        (ImageRef, "render", IMAGES),
        (processor.image_processor, "preprocess", IMAGES),
        (vision_tower(model), "forward", VISION),
    ]


def summarise(turns: dict[str, list[Stopwatch]], phases: Sequence[str]) -> list[dict[str, Any]]:
    """One row per method from its stopwatches, one per turn: median and least seconds, `speedup` over stock TRL (the
    median of the ratios within a turn), `speedup_of_least`, and the median of each phase."""
    seconds = {name: np.array([[w.seconds[phase] for phase in phases] for w in turns[name]]) for name in turns}
    totals = {name: by_phase.sum(axis=1) for name, by_phase in seconds.items()}  # (turns,)
    return [
        {
            "method": name,
            "seconds": float(np.median(totals[name])),
            "seconds_min": float(totals[name].min()),
            "speedup": float(np.median(totals[STOCK] / totals[name])),
            "speedup_of_least": float(totals[STOCK].min() / totals[name].min()),
            **{_column(phase): float(np.median(seconds[name][:, i])) for i, phase in enumerate(phases)},
        }
        for name in turns
    ]


def _column(phase: str) -> str:
    return f"seconds_{phase.replace(' ', '_')}"


def phase_figure(table: pd.DataFrame, phases: Sequence[str]) -> Figure:
    """The seconds of each method as one bar, its phases one after the other, the last of them grey."""
    figure = Figure(figsize=(8.5, 2.4), layout="constrained")
    ax = figure.subplots()
    left = np.zeros(len(table))
    colours = [*COLOURS[: len(phases) - 1], "#cbd5e0"]
    for phase, colour in zip(phases, colours, strict=True):
        ax.barh(table["method"], table[_column(phase)], left=left, color=colour, label=phase)
        left = left + table[_column(phase)].to_numpy()
    for y, (end, speedup) in enumerate(zip(left, table["speedup"], strict=True)):
        ax.text(end, y, f"  {speedup:.2f}×", va="center", fontsize=9)
    ax.set_xlim(0, left.max() * 1.12)
    ax.invert_yaxis()
    ax.set_xlabel("seconds (median of each phase)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def minidocs_questions(config: Config, questions: int, group: int, repeats: int) -> tuple[Collection, list[Question]]:
    """MiniDocs' test split, and `questions` of its questions from all over it: neighbours ask about one document.

    Raises ValueError when there are not that many, a group is none, or no turn would be counted.
    """
    if group < 2 or repeats < 1:
        raise ValueError(f"a group has at least 2 trajectories, not {group}, and 1 turn is counted, not {repeats}")
    test = collection(config, "test")
    if not 1 <= questions <= len(test.questions):
        raise ValueError(f"{questions} questions are asked for; the test split has {len(test.questions)}")
    return test, [test.questions[i * len(test.questions) // questions] for i in range(questions)]


def random_scale_policy(folder: str | Path, seed: int = 0) -> Path:
    """Write the scale policy with random weights to `folder` as a checkpoint, and return it."""
    from vrag_lib.scale_policy import build_model, build_processor

    processor = build_processor()
    build_model(processor.tokenizer, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
