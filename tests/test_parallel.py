"""Tasks in worker processes: results, exceptions and crashes are each handed over for their own task."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vrag_lib.parallel import WorkerCrash, run_tasks


def _work(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    if number == 5:
        os._exit(7)  # as a crash in native code would
    return number * number


def test_results_exceptions_and_crashes() -> None:
    results = dict(run_tasks(_work, [(i,) for i in range(12)], 2, "working", "task"))
    assert sorted(results) == list(range(12))
    assert isinstance(results[3], ValueError) and isinstance(results[5], WorkerCrash)
    assert all(results[i] == i * i for i in range(12) if i not in (3, 5))


def test_no_tasks_start_no_process() -> None:
    assert list(run_tasks(_work, [], 4, "working", "task")) == []


def test_any_script_can_start_workers(tmp_path: Path) -> None:
    """No main guard, no file at all: spawned processes would import the caller's main module and fail."""
    script = "from vrag_lib.parallel import run_tasks\nprint(list(run_tasks(abs, [(-1,)], 1, 'x', 'x')))"
    for arguments, text in ((["-"], script), ([str(tmp_path / "unguarded.py")], None), (["-c", script], None)):
        (tmp_path / "unguarded.py").write_text(script)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(
            [sys.executable, *arguments], input=text, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "[(0, 1)]\n", done.stderr


def test_sizes_are_the_units_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar:
        def __init__(self, total: int, **options: object):
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, units: int) -> None:
            self.done += units

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr("vrag_lib.parallel.tqdm", Bar)
    assert sorted(run_tasks(abs, [(-1,), (-2,)], 1, "counting", "page", sizes=[32, 8])) == [(0, 1), (1, 2)]
    assert (bars[0].total, bars[0].done) == (40, 40)
