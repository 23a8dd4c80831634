"""One way of running independent tasks in worker processes: progress shown, memory bounded, crashes contained."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

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

    Processes are spawned, so that no threads or native libraries of the caller are inherited; RuntimeError with the
    remedy when they cannot be.
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
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
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
        _check_workers_start(pool)
        submit(islice(pending, 2 * workers))
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            errors = {future: future.exception() for future in done}
            for future, error in errors.items():
                yield running.pop(future), future.result() if error is None else error
            if not any(isinstance(error, BrokenProcessPool) for error in errors.values()):
                submit(islice(pending, len(done)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Let this worker end when its parent is killed; it would otherwise wait for tasks for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _check_workers_start(pool: ProcessPoolExecutor) -> None:
    try:
        pool.submit(int).result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "worker processes cannot start; in a script, put the code that runs under `if __name__ == '__main__':`, "
            "and do not feed the script to Python through its standard input"
        ) from error
