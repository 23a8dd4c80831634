"""One way of running independent tasks in worker processes: progress shown, memory bounded, crashes contained."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from loky import ProcessPoolExecutor
from tqdm import tqdm


class WorkerCrash(RuntimeError):
    """The process that ran a task died: a crash in native code, or killed for its memory."""


def run_tasks(
    function: Callable[..., Any],
    tasks: Sequence[tuple],
    workers: int,
    description: str,
    unit: str,
    sizes: Sequence[int] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Call `function(*task)` for each task in `workers` processes; yield `(index, result or exception)` as they end.

    Exceptions are handed over, not raised: one bad document must not stop the rest. If a process dies, the tasks that
    may have been running are run again, each alone, and only one that kills its process again ends in WorkerCrash.
    `sizes` are the units that each task counts for in the progress bar (default 1).

    Processes are started afresh, so that no threads or native libraries of the caller are inherited, and without
    importing the caller's main module: any script, notebook or interpreter can call this.
    """
    if not tasks:
        return
    suspects: list[int] = []
    pending = iter(range(len(tasks)))
    with tqdm(total=sum(sizes or [1] * len(tasks)), desc=description, unit=unit, delay=1) as progress:
        broken = True
        while broken:
            broken = False
            for index, result in _run_pool(function, tasks, pending, min(max(1, workers), len(tasks))):
                if isinstance(result, BrokenProcessPool):
                    broken = True
                    suspects.append(index)
                    continue
                progress.update(sizes[index] if sizes else 1)
                yield index, result
        for index in suspects:
            for _, result in _run_pool(function, tasks, iter([index]), 1):
                progress.update(sizes[index] if sizes else 1)
                dead = isinstance(result, BrokenProcessPool)
                yield index, WorkerCrash("the process that was reading it died") if dead else result


def _run_pool(
    function: Callable[..., Any], tasks: Sequence[tuple], pending: Iterator[int], workers: int
) -> Iterator[tuple[int, Any]]:
    """Run until `pending` is used up or the pool breaks; at most two tasks per worker are in flight."""
    pool = ProcessPoolExecutor(workers, initializer=_end_with, initargs=(os.getpid(),))
    running: dict[Future, int] = {}

    def submit(indices: Iterable[int]) -> None:
        for index in indices:
            try:
                future = pool.submit(function, *tasks[index])
            except BrokenProcessPool as error:  # it broke since the last wait
                future = Future()
                future.set_exception(error)
            running[future] = index

    try:
        submit(islice(pending, 2 * workers))
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            errors = {future: future.exception() for future in done}
            for future, error in errors.items():
                yield running.pop(future), future.result() if error is None else error
            if not any(isinstance(error, BrokenProcessPool) for error in errors.values()):
                submit(islice(pending, len(done)))
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def _end_with(parent: int) -> None:
    """Let this worker end when the process `parent` is killed; it would otherwise wait for tasks for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
