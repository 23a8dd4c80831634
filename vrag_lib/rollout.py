"""The one rollout loop: a batch of environments and a policy become trajectories.

Synthesis, GRPO, evaluation and `vrag ask` all come through here, so they share budget, hints, observations and record.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vrag_lib.actions import cut_reply
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Corpus, Question
from vrag_lib.environment import Environment, Observation
from vrag_lib.policy import Policy, Reply
from vrag_lib.provenance import versions
from vrag_lib.retrieval import Hit, Retriever
from vrag_lib.trajectory import ImageRef, StopReason, Trajectory, Turn, clean_text


class TokenMismatchError(RuntimeError):
    """A policy sampled from other tokens than the record holds: training on such a record would be wrong."""


def turn_seed(seed: int, turn: int) -> int:
    """The seed of one reply, from its trajectory's seed and its turn; independent of the batch."""
    return int(np.random.SeedSequence([seed & 0xFFFFFFFF, turn]).generate_state(1)[0])


def trajectory_id(question_id: str, seed: int, run_id: str) -> str:
    """A stable id: the same question, seed and run always give the same."""
    return hashlib.sha256(f"{run_id}\x1f{question_id}\x1f{seed}".encode()).hexdigest()[:16]


@dataclass
class _Running:
    """One trajectory under way."""

    question: Question
    seed: int
    environment: Environment
    turns: list[Turn] = field(default_factory=list)
    stop_reason: StopReason | None = None
    error: str = ""
    sampled_tokens: int = 0
    timings: dict[str, float] = field(default_factory=lambda: {"generate": 0.0, "retrieve": 0.0})

    def stop(self, reason: StopReason, error: str = "") -> None:
        self.stop_reason, self.error = reason, error


def rollout(
    policy: Policy,
    questions: Sequence[Question],
    corpus: Corpus,
    retriever: Retriever,
    config: EnvironmentConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    batch_size: int = 8,
    max_sampled_tokens: int | None = None,
    run_id: str = "",
    preset: str = "",
    on_finished: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """One trajectory per entry of `questions` (repeat a question to sample it several times), in the same order.

    seeds: one per trajectory; the place in `questions` otherwise.
    batch_size: conversations generated together; a finished one makes room for the next.
    max_sampled_tokens: tokens a policy may sample in one trajectory; beyond it the trajectory stops (`max_tokens`).
    on_finished: called with each trajectory as it ends, so that a long run can save as it goes.

    Raises ValueError when the seeds do not fit, TokenMismatchError when a policy's context is not the record's.
    """
    config = config or EnvironmentConfig()
    seeds = list(range(len(questions))) if seeds is None else list(seeds)
    if len(seeds) != len(questions):
        raise ValueError(f"{len(questions)} questions but {len(seeds)} seeds")
    if batch_size < 1:
        raise ValueError(f"a batch holds at least one conversation, not {batch_size}")
    waiting = list(range(len(questions)))[::-1]
    active: dict[int, _Running] = {}
    finished: dict[int, Trajectory] = {}
    while waiting or active:
        while waiting and len(active) < batch_size:
            i = waiting.pop()
            active[i] = _open(questions[i], seeds[i], Environment(corpus, retriever, config))
        running = [run for run in active.values() if run.stop_reason is None]
        if running:
            _advance(policy, running, retriever, config, max_sampled_tokens)
        for i in [i for i, run in active.items() if run.stop_reason is not None]:
            finished[i] = _record(active.pop(i), policy.name, run_id, preset)
            if on_finished is not None:
                on_finished(finished[i])
    return [finished[i] for i in range(len(questions))]


def _open(question: Question, seed: int, environment: Environment) -> _Running:
    run = _Running(question, seed, environment)
    given: tuple[ImageRef, ...] = ()
    start = time.perf_counter()
    try:
        given = environment.given(question)
    except Exception as error:  # as in a search: whatever fails must cost this trajectory only
        run.stop(StopReason.ERROR, clean_text(f"what is given with the question cannot be shown: {error}"))
    run.timings["retrieve"] += time.perf_counter() - start
    run.turns.append(_user_turn(environment.reset(question.query, given)))
    return run


def _user_turn(seen: Observation) -> Turn:
    return Turn("user", clean_text(seen.text), images=seen.images, text_pages=seen.text_pages)


def _advance(
    policy: Policy,
    runs: list[_Running],
    retriever: Retriever,
    config: EnvironmentConfig,
    max_sampled_tokens: int | None,
) -> None:
    """One reply for each run, searched for together, then one step of each environment."""
    start = time.perf_counter()
    replies = policy.generate(
        [run.turns for run in runs], seeds=[turn_seed(run.seed, len(run.turns) // 2) for run in runs]
    )
    if len(replies) != len(runs):
        raise RuntimeError(f"policy {policy.name!r} gave {len(replies)} replies to {len(runs)} conversations")
    for run in runs:
        run.timings["generate"] += (time.perf_counter() - start) / len(runs)
    start = time.perf_counter()
    hits = _search_together(runs, replies, retriever, config.search_depth)
    for run in runs:
        run.timings["retrieve"] += (time.perf_counter() - start) / len(runs)
    for run, reply, found in zip(runs, replies, hits, strict=True):
        _step(run, reply, found, max_sampled_tokens)


def _search_together(
    runs: list[_Running], replies: list[Reply], retriever: Retriever, depth: int
) -> list[list[Hit] | None]:
    """The hits of every reply that searches, one call for all of them, in which the same words are looked up once. If
    that call fails, None: each environment then searches for itself, so that one bad query cannot end the others'
    trajectories."""
    queries = [
        None if reply.error else run.environment.search_query(clean_text(reply.text))
        for run, reply in zip(runs, replies, strict=True)
    ]
    wanted = list(dict.fromkeys(query for query in queries if query is not None))
    if not wanted:
        return [None] * len(runs)
    try:
        found = dict(zip(wanted, retriever.search(wanted, depth), strict=True))
    except Exception:
        return [None] * len(runs)
    return [None if query is None else found[query] for query in queries]


def _step(run: _Running, reply: Reply, hits: list[Hit] | None, max_sampled_tokens: int | None) -> None:
    if reply.error is not None or reply.finish_reason == "error":
        return run.stop(StopReason.ERROR, clean_text(reply.error or "the policy failed without saying why"))
    if reply.finish_reason == "overflow":
        return run.stop(StopReason.CONTEXT_OVERFLOW)
    if reply.prompt_token_ids is not None:
        _insert_token_ids(run, reply.prompt_token_ids)
    text = cut_reply(clean_text(reply.text))
    seen = run.environment.step(text, hits)
    run.turns.append(
        Turn(
            "assistant",
            text,
            token_ids=reply.token_ids,
            logprobs=reply.logprobs,
            action=seen.action,
            invalid=seen.invalid,
            finish_reason=reply.finish_reason,
        )
    )
    run.sampled_tokens += len(reply.token_ids or ())
    _observe(run, seen, max_sampled_tokens)


def _observe(run: _Running, seen: Observation, max_sampled_tokens: int | None) -> None:
    if seen.stop_reason is not None:
        return run.stop(seen.stop_reason, clean_text(seen.error))
    if max_sampled_tokens is not None and run.sampled_tokens >= max_sampled_tokens:
        return run.stop(StopReason.MAX_TOKENS)
    run.turns.append(_user_turn(seen))


def _insert_token_ids(run: _Running, prompt_ids: tuple[int, ...]) -> None:
    """Give the newest user turn its tokens: what the policy's context holds beyond the tokens already recorded."""
    known = [token for turn in run.turns[:-1] for token in turn.token_ids or ()]
    if list(prompt_ids[: len(known)]) != known:
        raise TokenMismatchError(
            f"question {run.question.uid!r}, turn {len(run.turns) - 1}: the context the policy sampled from does not "
            "begin with the recorded tokens; was a reply tokenised again?"
        )
    run.turns[-1] = replace(run.turns[-1], token_ids=tuple(prompt_ids[len(known) :]))


def _record(run: _Running, policy: str, run_id: str, preset: str) -> Trajectory:
    assert run.stop_reason is not None
    return Trajectory(
        id=trajectory_id(run.question.uid, run.seed, run_id),
        question_id=run.question.uid,
        question=clean_text(run.question.query),
        turns=tuple(run.turns),
        stop_reason=run.stop_reason,
        seed=run.seed,
        preset=preset,
        run_id=run_id,
        policy=policy,
        reference_answer=run.question.reference_answer,
        gold_page_ids=run.question.gold_page_ids,
        timings=run.timings,
        error=run.error,
        versions=dict(versions()),
    )
