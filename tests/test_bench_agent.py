"""bench_agent: a clock that counts every second once, and what the two benchmarks of the agent share."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from vrag_lib import bench_agent
from vrag_lib.bench_agent import OURS, STOCK, UNCOUNTED, Stopwatch, phase_figure, summarise
from vrag_lib.stages import Collection


def test_a_phase_inside_another_takes_its_time_from_it():
    watch, start = Stopwatch(), time.perf_counter()
    with watch.phase("outer"):
        time.sleep(0.02)
        with watch.phase("inner"):
            time.sleep(0.03)
        with watch.phase(UNCOUNTED), watch.phase("inner"):
            time.sleep(0.01)
    whole = time.perf_counter() - start
    assert watch.seconds["inner"] >= 0.03 and watch.seconds["outer"] >= 0.02 and watch.seconds[UNCOUNTED] >= 0.01
    assert sum(watch.seconds.values()) == pytest.approx(whole, abs=0.005)
    assert watch.calls == {"outer": 1, "inner": 1, UNCOUNTED: 2}


def test_watched_functions_count_inside_a_phase_and_are_put_back():
    class Model:
        def forward(self, size):
            return size + 1

    model, watch = Model(), Stopwatch()
    with watch.watching((model, "forward", lambda size: "long" if size > 1 else "short")):
        assert model.forward(1) == 2 and not watch.calls
        with watch.phase("other"):
            assert [model.forward(size) for size in (5, 1, 1)] == [6, 2, 2]
    assert watch.calls == {"other": 1, "long": 1, "short": 2}
    assert "forward" not in vars(model)
    with watch.watching((model, "forward", "alone"), outermost=True), pytest.raises(TypeError):
        model.forward()
    assert watch.calls["alone"] == 1 and not watch._open


def test_speedups_are_of_the_turns_and_of_the_least():
    def turns(*seconds):
        return [SimpleNamespace(seconds={"a": s - 1, "b c": 1.0}) for s in seconds]

    rows = summarise({STOCK: turns(6, 4, 10), OURS: turns(2, 4, 2)}, ("a", "b c"))
    ours = rows[1]
    assert ours["method"] == OURS and ours["seconds"] == 2 and ours["seconds_min"] == 2
    assert ours["speedup"] == 3 and ours["speedup_of_least"] == 2 and rows[0]["speedup"] == 1
    assert ours["seconds_a"] == 1 and ours["seconds_b_c"] == 1
    axes = phase_figure(pd.DataFrame(rows), ("a", "b c")).axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert np.allclose(ends, [5, 1, 6, 2]) and "3.00×" in axes.texts[1].get_text()


def test_questions_come_from_all_over_the_split(monkeypatch):
    split = Collection(tuple("abcdefgh"), None, lambda: None)
    monkeypatch.setattr(bench_agent, "collection", lambda config, name: split)
    assert bench_agent.minidocs_questions(None, 3, 2, 1) == (split, ["a", "c", "f"])
    for sizes, message in [
        ((9, 2, 1), "9 questions are asked for; the test split has 8"),
        ((2, 1, 1), "at least 2 trajectories, not 1"),
        ((2, 2, 0), "1 turn is counted, not 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            bench_agent.minidocs_questions(None, *sizes)
