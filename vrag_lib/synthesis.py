"""Multi-expert sampling (paper §2.2, §D): several trajectories per question through the one rollout loop, kept on disk.

    trajectories = sample(policy, questions, corpus, retriever, EnvironmentConfig(), "results/laptop/synthesis/samples",
                          samples_per_question=2, seed=0)

The samples are cut into shards, `samples-00000.parquet` and so on, in the order of the questions. A shard is written
while its trajectories end; after a kill the same call samples what is missing and nothing twice, except what failed
for want of an endpoint, a search engine or a page. `settings.json` says what the samples depend on, so that samples of
different settings never mix.

Deviations from the released code: trajectories come out of the environment that the policy will be trained in, with
its images, budget and boxes, not out of a pipeline of their own (trap T8); finished samples are kept as they end (S8)
and one that fails is kept with its reason instead of vanishing (S9); gold pages are not shown first unless `oracle`
asks for it (T20).
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vrag_lib.claims import alone_in, claim, text_fingerprint
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Corpus, Question
from vrag_lib.endpoint import cancel_requests
from vrag_lib.policy import Policy, Reply
from vrag_lib.rendering import read_json
from vrag_lib.retrieval import Retriever
from vrag_lib.rollout import rollout, trajectory_id
from vrag_lib.trajectory import StopReason, Trajectory, read_trajectories, write_trajectories

logger = logging.getLogger(__name__)

SHARD_SIZE = 32
"""Trajectories in one shard: what one worker samples at a time."""

SAVE_SECONDS = 5.0
"""A shard is written at most this often while it fills; a kill costs no more finished work than this."""

OUTAGE = frozenset({"connection", "timeout", "auth", "server", "rate_limit", "search failed"})
"""Kinds of failure that the next trajectory will have as well, where an endpoint or a search engine is away."""

MOST_OUTAGES = 32
"""So many of them in a row end the sampling: each costs time, and replies that were paid for."""

_SETTINGS = "settings.json"

_DROPPED = ("more.synthesis.concurrency", "more.synthesis.trajectories", "more.synthesis.rl_questions",
            "more.synthesis.dataset_path", "more.policy_settings.base_url")  # fmt: skip
"""What earlier versions wrote into it and no sample depends on."""

OF_THE_MODEL = frozenset({"refusal", "too_large"})
"""Kinds of failure that are the model's own doing and so a result; to sample again until they are gone would flatter
it. All others (an endpoint, a search engine, a page file) say nothing about it."""


class SynthesisError(ValueError):
    """A folder or a set of questions that cannot be sampled into; the message names the remedy."""


class SamplingError(RuntimeError):
    """Every sample failed, so there is no result; the message says how and what to do."""

    exit_status = 1
    """Of the command line: what was asked for was right, the run was not."""


@dataclass(frozen=True)
class _Task:
    """One trajectory to be sampled."""

    question: Question
    seed: int
    id: str


def sample(
    policy: Policy,
    questions: Sequence[Question],
    corpus: Corpus,
    retriever: Retriever,
    environment: EnvironmentConfig,
    folder: str | Path,
    *,
    samples_per_question: int,
    seed: int = 0,
    workers: int = 1,
    batch_size: int = 8,
    max_sampled_tokens: int | None = None,
    oracle: bool = False,
    retry_errors: bool = True,
    run_id: str = "",
    preset: str = "",
    settings: Mapping[str, Any] | None = None,
) -> list[Trajectory]:
    """`samples_per_question` trajectories for each question, question by question; resumes what `folder` holds.

    workers: shards sampled at once, each in a thread; for policies that wait for a network and can be called from
        several threads. Neither it nor `batch_size` changes the trajectories or their order.
    oracle: show the gold pages first if they rank at all (`experts.GoldFirstRetriever`, trap T20).
    retry_errors: sample those again that failed earlier, but not by the model's own doing (`OF_THE_MODEL`): an
        endpoint that was away must not leave wrong answers for good.
    run_id: enters every trajectory's id; made of policy, oracle and seed when empty.
    settings: more that the samples depend on and names do not tell (temperatures, models), as plain JSON.

    What a policy or a search engine does wrong ends up as `error` trajectories, see `count_errors`. Raises
    SynthesisError for a folder with samples of other settings or in which another process writes, for no samples, and
    for a uid that occurs twice; SamplingError, once all is written, when nothing but failures that are not the model's
    own came of it, and before that when MOST_OUTAGES in a row had no endpoint or search engine; an exception of the
    policy itself is passed on once the other workers' shards are written.
    """
    _check(questions, samples_per_question, workers)
    folder = Path(folder)
    run_id = run_id or f"{policy.name}{':oracle' if oracle else ''}:{seed}"
    _claim(
        folder,
        {
            "policy": policy.name,
            "questions": questions_fingerprint(questions),
            "corpus": corpus.fingerprint,
            "page_texts": corpus.text_fingerprint,
            "retriever": retriever.name,
            "environment": asdict(environment),
            "samples_per_question": samples_per_question,
            "seed": seed,
            "max_sampled_tokens": max_sampled_tokens,
            "oracle": oracle,
            "run_id": run_id,
            "preset": preset,
            "shard_size": SHARD_SIZE,
            "more": dict(settings or {}),
        },
    )
    tasks = _tasks(questions, samples_per_question, seed, run_id)
    stop = threading.Event()

    def roll(wanted: Sequence[_Task], searched: Retriever, on_finished: Callable[[Trajectory], None]) -> None:
        rollout(
            _Stoppable(policy, stop),
            [task.question for task in wanted],
            corpus,
            searched,
            environment,
            seeds=[task.seed for task in wanted],
            batch_size=batch_size,
            max_sampled_tokens=max_sampled_tokens,
            run_id=run_id,
            preset=preset,
            on_finished=on_finished,
        )

    with alone_in(folder, SynthesisError):
        shards = [
            _Shard(folder / f"samples-{number:05d}.parquet", tasks[start : start + SHARD_SIZE])
            for number, start in enumerate(range(0, len(tasks), SHARD_SIZE))
        ]
        _fill(shards, roll, retriever, workers, oracle, retry_errors, stop)
    trajectories = [trajectory for shard in shards for trajectory in shard.trajectories()]
    _report_errors(trajectories, folder)
    return trajectories


def read_samples(folder: str | Path) -> list[Trajectory]:
    """The trajectories that `sample` has written to a folder so far, in its order.

    Raises SynthesisError when there are none.
    """
    files = sorted(Path(folder).glob("samples-*.parquet"))
    if not files:
        raise SynthesisError(f"{folder} holds no samples; write some with synthesis.sample")
    return [trajectory for file in files for trajectory in read_trajectories(file)]


def count_errors(trajectories: Iterable[Trajectory]) -> dict[str, int]:
    """How many trajectories failed, by kind: what stands before the colon of their error, the commonest first."""
    errors = [_kind(t) for t in trajectories if t.stop_reason is StopReason.ERROR]
    return dict(Counter(errors).most_common())


def _kind(trajectory: Trajectory) -> str:
    return trajectory.error.partition(":")[0]


def may_pass(trajectory: Trajectory) -> bool:
    """Whether a trajectory failed in a way that is not the model's own, so that another try may succeed."""
    return trajectory.stop_reason is StopReason.ERROR and _kind(trajectory) not in OF_THE_MODEL


def _report_errors(trajectories: Sequence[Trajectory], folder: Path) -> None:
    errors = count_errors(trajectories)
    if not errors:
        return
    if all(map(may_pass, trajectories)):
        raise SamplingError(
            f"all {len(trajectories)} samples failed: {errors}; the first: {trajectories[0].error}. They lie in "
            f"{folder}. Put right what failed and run the same again: failed samples are then made anew"
        )
    logger.warning("%d of %d samples failed: %s", sum(errors.values()), len(trajectories), errors)


def sample_seeds(seed: int, uid: str, count: int) -> list[int]:
    """The seeds of one question's samples: distinct, and the same whatever else is sampled.

    >>> sample_seeds(0, "q1", 2) == sample_seeds(0, "q1", 3)[:2]
    True
    """
    first = int.from_bytes(hashlib.sha256(f"{seed}\x1f{uid}".encode()).digest()[:4])
    return [(first + number) % 2**32 for number in range(count)]


def _check(questions: Sequence[Question], samples_per_question: int, workers: int) -> None:
    if not questions:
        raise SynthesisError("there are no questions to sample")
    if samples_per_question < 1 or workers < 1:
        raise SynthesisError(f"samples_per_question={samples_per_question} and workers={workers} must be at least 1")
    uid, times = Counter(q.uid for q in questions).most_common(1)[0]
    if times > 1:
        raise SynthesisError(f"{times} questions have the uid {uid!r}; give each its own")


def _tasks(questions: Sequence[Question], count: int, seed: int, run_id: str) -> list[_Task]:
    return [
        _Task(question, number, trajectory_id(question.uid, number, run_id))
        for question in questions
        for number in sample_seeds(seed, question.uid, count)
    ]


def questions_fingerprint(questions: Iterable[Question]) -> str:
    """16 hexadecimal digits of what is asked, its truth included."""
    return text_fingerprint([(q.uid, q.query, q.reference_answer, q.gold_page_ids) for q in questions])


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write what the samples depend on, or make sure that it is what those already there depend on."""
    present = read_json(folder / _SETTINGS)
    if present is None and any(folder.glob("samples-*.parquet")):
        raise SynthesisError(f"{folder} holds samples but no readable {_SETTINGS}; give another folder")
    if present is not None and "page_texts" not in present:  # earlier versions did not write it
        settings = {name: value for name, value in settings.items() if name != "page_texts"}
    claim(folder, settings, _SETTINGS, SynthesisError, _DROPPED)


class _Stoppable:
    """A policy that writes no further reply once `stop` is set: threads other than the main one notice no interrupt."""

    def __init__(self, policy: Policy, stop: threading.Event):
        self.name, self._policy, self._stop = policy.name, policy, stop

    def generate(self, conversations: Any, *, seeds: Sequence[int] | None = None) -> list[Reply]:
        if self._stop.is_set():
            raise InterruptedError("the sampling was stopped")
        return self._policy.generate(conversations, seeds=seeds)


class _Shard:
    """The trajectories of consecutive tasks and their file. One thread at a time fills it."""

    def __init__(self, path: Path, tasks: Sequence[_Task]):
        self.path, self.tasks = path, tasks
        self._done = {t.id: t for t in read_trajectories(path)} if path.is_file() else {}
        self._saved_at = time.monotonic()
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None  # there while something is not saved

    def missing(self, retry_errors: bool) -> list[_Task]:
        """Tasks without a trajectory, and if asked those whose trajectory failed and may yet succeed."""

        def is_done(task: _Task) -> bool:
            done = self._done.get(task.id)
            return done is not None and not (retry_errors and may_pass(done))

        return [task for task in self.tasks if not is_done(task)]

    def add(self, trajectory: Trajectory) -> None:
        """Saves in time even when nothing is added for long: batches end together, and the next may take minutes."""
        with self._lock:
            self._done[trajectory.id] = trajectory
            if self._timer is None:
                self._timer = threading.Timer(SAVE_SECONDS, self._save_if_possible)
                self._timer.daemon = True
                self._timer.start()
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        with self._lock:
            if self._timer is not None:
                write_trajectories(self.trajectories(), self.path)
                self._timer.cancel()
                self._saved_at, self._timer = time.monotonic(), None

    def _save_if_possible(self) -> None:
        with suppress(OSError):  # a full disk, say, is reported by the last save, which the caller waits for
            self.save()

    def trajectories(self) -> list[Trajectory]:
        """What is there, in the order of the tasks."""
        return [self._done[task.id] for task in self.tasks if task.id in self._done]


def _fill(
    shards: Sequence[_Shard],
    roll: Callable[[Sequence[_Task], Retriever, Callable[[Trajectory], None]], None],
    retriever: Retriever,
    workers: int,
    oracle: bool,
    retry_errors: bool,
    stop: threading.Event,
) -> None:
    """Sample what the shards lack, `workers` of them at once; sets `stop` when it is interrupted or in vain."""
    total = sum(len(shard.tasks) for shard in shards)
    wanted = [(shard, shard.missing(retry_errors)) for shard in shards]
    wanted = [(shard, missing) for shard, missing in wanted if missing]
    done = total - sum(len(missing) for _, missing in wanted)
    lock = threading.Lock()  # tqdm counts without one
    outages = 0
    with tqdm(total=total, initial=done, desc="sampling", unit="trajectory", delay=1) as progress:

        def fill(shard: _Shard, missing: Sequence[_Task]) -> None:
            def on_finished(trajectory: Trajectory) -> None:
                nonlocal outages
                shard.add(trajectory)
                with lock:
                    progress.update()
                    outages = outages + 1 if _kind(trajectory) in OUTAGE else 0
                if outages >= MOST_OUTAGES:
                    raise SamplingError(
                        f"{outages} trajectories in a row failed, the last with: {trajectory.error}. Those made so far "
                        f"lie in {shard.path.parent}. Put right what failed and run the same again"
                    )

            try:
                for group, searched in _by_retriever(missing, retriever, oracle):
                    roll(group, searched, on_finished)
            finally:
                shard.save()

        if workers == 1:
            for shard, missing in wanted:
                fill(shard, missing)
            return
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(fill, shard, missing) for shard, missing in wanted]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException as error:  # no other shard is begun; those under way are finished unless it is in vain
                if isinstance(error, KeyboardInterrupt | SamplingError):
                    stop.set()
                    cancel_requests()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _by_retriever(
    tasks: Sequence[_Task], retriever: Retriever, oracle: bool
) -> Iterable[tuple[Sequence[_Task], Retriever]]:
    """Tasks that share a retriever: all of them, or with `oracle` those of neighbours with the same gold pages."""
    if not oracle:
        return [(tasks, retriever)]
    from vrag_lib.experts import GoldFirstRetriever

    return [
        (list(group), GoldFirstRetriever(retriever, gold))
        for gold, group in groupby(tasks, key=lambda task: task.question.gold_page_ids)
    ]
