"""One way of running independent tasks in worker processes: progress, bounded queue, crashes contained."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from tqdm import tqdm


class WorkerCrash(RuntimeError):
    """The process that ran a task died (a crash in native code, or killed for its memory)."""


def run_tasks(
    function: Callable[..., Any],
    tasks: Sequence[tuple],
    workers: int,
    description: str,
    unit: str = "it",
    initializer: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Call `function(*task)` for each task in `workers` processes; yield `(index, result or exception)` as they end.

    Exceptions are handed over, not raised: one bad document must not stop the rest. If a process dies, the tasks it
    may have been running are run again, each alone, and only the one that kills its process again is given up.
    Processes are spawned, so a script that calls this needs the usual `if __name__ == "__main__":` guard.
    """
    if not tasks:
        return
    suspects: list[int] = []
    with tqdm(total=len(tasks), desc=description, unit=unit) as progress:
        pending = iter(range(len(tasks)))
        while True:
            broken = False
            for index, result in _run_pool(function, tasks, pending, max(1, workers), initializer):
                if isinstance(result, BrokenProcessPool):
                    suspects.append(index)
                    broken = True
                    continue
                progress.update()
                yield index, result
            if not broken:
                break
        for index in suspects:
            for _, result in _run_pool(function, tasks, iter([index]), 1, initializer):
                progress.update()
                yield index, WorkerCrash("its worker process died") if isinstance(result, BrokenProcessPool) else result


def _run_pool(
    function: Callable[..., Any],
    tasks: Sequence[tuple],
    pending: Iterator[int],
    workers: int,
    initializer: Callable[[], None] | None,
) -> Iterator[tuple[int, Any]]:
    """Run until `pending` is used up or the pool breaks; never more than two tasks per worker are in flight."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=initializer) as pool:
        running: dict[Future, int] = {}

        def submit(indices: Iterable[int]) -> None:
            for index in indices:
                try:
                    future = pool.submit(function, *tasks[index])
                except BrokenProcessPool as error:
                    future = Future()
                    future.set_exception(error)
                running[future] = index

        submit(islice(pending, 2 * workers))
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                broken = False
                for future in done:
                    error = future.exception()
                    broken = broken or isinstance(error, BrokenProcessPool)
                    yield running.pop(future), error if error is not None else future.result()
                if not broken:
                    submit(islice(pending, len(done)))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
