"""Sampling: every sample once, in order, whatever happens in between."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from helpers import FailingRetriever, FakeCorpus, FakeRetriever

from vrag_lib import synthesis
from vrag_lib.config import EnvironmentConfig
from vrag_lib.corpus import Question
from vrag_lib.geometry import Size
from vrag_lib.policy import Reply
from vrag_lib.synthesis import SamplingError, SynthesisError, count_errors, read_samples, sample, sample_seeds
from vrag_lib.trajectory import RecordError, StopReason, Trajectory


class KnownCorpus(FakeCorpus):
    fingerprint = text_fingerprint = "three pages"


CORPUS = KnownCorpus([Size(1000, 800), Size(800, 600), Size(640, 480)])
QUESTIONS = [Question(f"q{i}", f"question {i}", str(i), "doc.pdf", (1 + i % 3,)) for i in range(5)]


class SeededPolicy:
    """Searches, then answers with a number drawn from the seed. Counts its replies; may die, wait, break or fail."""

    name = "seeded"

    def __init__(
        self,
        die_at: int = 0,
        raise_at: int = 0,
        wait: float = 0.0,
        failing: tuple[str, ...] = (),
        error: str = "timeout: no reply in 3 s",
    ):
        self.die_at, self.raise_at, self.wait, self.failing, self.error = die_at, raise_at, wait, failing, error
        self.replies = 0

    def generate(self, conversations, *, seeds=None):
        replies = []
        for conversation, seed in zip(conversations, seeds, strict=True):
            self.replies += 1
            if self.replies == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.replies == self.raise_at:
                raise ZeroDivisionError("a policy with a bug")
            time.sleep(self.wait * (seed % 3))
            if any(conversation[0].text.endswith(f"question {number}") for number in self.failing):
                replies.append(Reply("", finish_reason="error", error=self.error))
            elif len(conversation) == 1:
                replies.append(Reply(f"<think>find it</think><search>{seed % 4}</search>"))
            else:
                replies.append(Reply(f"<think>read</think><answer>{seed % 1000}</answer>"))
        return replies


def run(folder: Path, policy: SeededPolicy | None = None, questions=QUESTIONS, **settings) -> list[Trajectory]:
    retriever = settings.pop("retriever", None) or FakeRetriever(CORPUS.page_ids)
    settings = {"samples_per_question": 3, "seed": 7} | settings
    return sample(policy or SeededPolicy(), questions, CORPUS, retriever, EnvironmentConfig(), folder, **settings)


def untimed(trajectories: list[Trajectory]) -> list[Trajectory]:
    return [dataclasses.replace(trajectory, timings={}) for trajectory in trajectories]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(synthesis, "SHARD_SIZE", 4)
    monkeypatch.setattr(synthesis, "SAVE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[Trajectory]:
    """The samples of a run that nothing interrupted, in one shard."""
    return untimed(run(tmp_path_factory.mktemp("whole")))


def test_every_question_is_sampled_in_order_with_seeds_of_its_own(tmp_path, whole):
    assert [t.question_id for t in whole] == [q.uid for q in QUESTIONS for _ in range(3)]
    assert len({t.id for t in whole}) == len({t.seed for t in whole}) == len(whole) == 15
    assert len({t.answer for t in whole}) > 10, "samples of one question must differ"
    assert untimed(run(tmp_path)) == whole == untimed(read_samples(tmp_path))
    assert len(list(tmp_path.glob("samples-*.parquet"))) == 4


@pytest.mark.parametrize("settings", [{"workers": 3}, {"batch_size": 1}, {"workers": 2, "batch_size": 3}])
def test_neither_order_nor_content_depend_on_workers_and_batches(tmp_path, whole, settings):
    assert untimed(run(tmp_path, SeededPolicy(wait=0.002), **settings)) == whole


def test_a_sample_does_not_depend_on_the_other_questions(tmp_path, whole):
    alone = untimed(run(tmp_path, questions=QUESTIONS[3:4], samples_per_question=2))
    assert alone == whole[9:11]
    assert len(set(sample_seeds(0, "q", 50))) == 50


def kill_at(folder: Path, reply: int) -> None:
    synthesis.SHARD_SIZE, synthesis.SAVE_SECONDS = 4, 0.0
    run(folder, SeededPolicy(die_at=reply), batch_size=2)


def test_a_killed_run_goes_on_where_it_was(tmp_path, whole):
    process = multiprocessing.get_context("spawn").Process(target=kill_at, args=(tmp_path, 15))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = read_samples(tmp_path)
    assert 4 < len(kept) < 8, "the second shard is half full"
    policy = SeededPolicy()
    assert untimed(run(tmp_path, policy)) == whole
    assert policy.replies == 2 * (15 - len(kept)), "only what was missing is sampled"
    assert [t for t in read_samples(tmp_path) if t in kept] == kept


def test_a_complete_run_samples_nothing_again(tmp_path, whole):
    run(tmp_path)
    policy = SeededPolicy()
    assert untimed(run(tmp_path, policy)) == whole and policy.replies == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_what_ended_before_a_policy_broke_is_kept(tmp_path, whole, workers):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, SeededPolicy(raise_at=20), workers=workers, batch_size=2)
    kept = read_samples(tmp_path)
    assert kept and {t.id for t in kept} < {t.id for t in whole}
    assert untimed(run(tmp_path)) == whole


def test_failed_samples_are_counted_and_sampled_again_unless_that_is_not_wanted(tmp_path, whole, caplog):
    first = run(tmp_path, SeededPolicy(failing=("1", "4")))
    assert [t.question_id for t in first if t.stop_reason is StopReason.ERROR] == ["q1"] * 3 + ["q4"] * 3
    assert count_errors(first) == {"timeout": 6} and "6 of 15 samples failed: {'timeout': 6}" in caplog.text
    policy = SeededPolicy()
    assert run(tmp_path, policy, retry_errors=False) == first and policy.replies == 0
    again = run(tmp_path, policy)
    assert untimed(again) == whole and policy.replies == 12 and count_errors(again) == {}
    assert run(tmp_path, policy) == again and policy.replies == 12


@pytest.mark.parametrize(
    ("error", "again"),
    [
        *((f"{kind}: x", True) for kind in ("auth", "connection", "server", "rate_limit", "bad_request", "image")),
        ("refusal: I will not", False),
        ("too_large: the reply is longer than 4 bytes", False),
    ],
)
def test_what_the_model_itself_did_is_a_result_and_stays(tmp_path, error, again):
    run(tmp_path, SeededPolicy(failing=("1",), error=error))
    policy = SeededPolicy()
    assert count_errors(run(tmp_path, policy)) == ({} if again else {error.partition(":")[0]: 3})
    assert policy.replies == (6 if again else 0)


def test_when_all_fail_the_error_says_how_and_what_to_do_and_the_samples_are_kept(tmp_path, whole):
    away = FailingRetriever(CORPUS.page_ids)
    expected = (
        r"all 15 samples failed: \{'search failed': 15\}; the first: search failed: the search server is away.* run"
    )
    with pytest.raises(SamplingError, match=expected):
        run(tmp_path, retriever=away)
    assert count_errors(read_samples(tmp_path)) == {"search failed": 15}
    back = FakeRetriever(CORPUS.page_ids)
    back.name = away.name
    assert untimed(run(tmp_path, retriever=back)) == whole


@pytest.mark.parametrize("workers", [1, 3])
def test_an_endpoint_that_is_away_is_not_asked_to_the_end(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(synthesis, "MOST_OUTAGES", 4)
    everything = tuple(str(i) for i in range(5))
    policy = SeededPolicy(failing=everything, error="connection: refused")
    count = "4" if workers == 1 else "[4-9]"  # threads under way may end before the others hear of it
    with pytest.raises(SamplingError, match=rf"{count} trajectories in a row failed.*refused.*run the same again"):
        run(tmp_path, policy, batch_size=1, workers=workers)
    assert 4 <= policy.replies <= 4 + 2 * workers and len(read_samples(tmp_path)) == policy.replies
    run(tmp_path / "page", SeededPolicy(failing=("0", "1"), error="image: damaged"), batch_size=1)  # nothing is away


def test_an_interrupt_stops_all_threads_at_their_next_reply(tmp_path):
    class Slow(SeededPolicy):
        def generate(self, conversations, *, seeds=None):
            if self.replies == 2:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return super().generate(conversations, seeds=seeds)

    policy = Slow()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # parallel runs of the tests ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, policy, batch_size=1, workers=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert policy.replies <= 6  # of 30: one more in each thread


def test_a_folder_of_an_earlier_version_is_gone_on_with(tmp_path, whole):
    run(tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["page_texts"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert untimed(run(tmp_path, SeededPolicy(raise_at=1))) == whole


def test_what_ended_is_on_disk_soon_even_if_nothing_ends_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "SAVE_SECONDS", 0.2)
    seen = []

    class Slow(SeededPolicy):
        def generate(self, conversations, *, seeds=None):
            if self.replies == 6:  # one batch of three has ended; the next one waits for its endpoint
                time.sleep(1)
                seen.extend(read_samples(tmp_path))
            return super().generate(conversations, seeds=seeds)

    run(tmp_path, Slow(), batch_size=3, questions=QUESTIONS[:2], samples_per_question=2)
    assert len(seen) == 3


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    class Second(SeededPolicy):
        def generate(self, conversations, *, seeds=None):
            with pytest.raises(SynthesisError, match="another process is writing to"):
                run(tmp_path)
            return super().generate(conversations, seeds=seeds)

    assert len(run(tmp_path, Second())) == 15
    assert len(run(tmp_path)) == 15


def test_a_model_that_refuses_everything_has_a_result(tmp_path):
    everything = tuple(str(i) for i in range(5))
    samples = run(tmp_path, SeededPolicy(failing=everything, error="refusal: I will not"))
    assert count_errors(samples) == {"refusal": 15}


def test_samples_of_other_settings_do_not_mix(tmp_path):
    run(tmp_path)
    with pytest.raises(SynthesisError, match="made with other settings: seed=7 not 8; use those, give another folder"):
        run(tmp_path, seed=8, run_id="seeded:7")
    with pytest.raises(SynthesisError, match="samples_per_question=3 not 2"):
        run(tmp_path, samples_per_question=2)
    with pytest.raises(SynthesisError, match=r"more\.temperature=None not 0\.5"):
        run(tmp_path, settings={"temperature": 0.5})
    with pytest.raises(SynthesisError, match=r"other settings: more\.path=None not 'x'; use"):
        run(tmp_path, settings={"path": "x"})
    run(tmp_path, settings={"path": None})  # of a setting that came later, recorded nowhere
    recorded = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps(recorded | {"fingerprint": "of an earlier version"}))
    run(tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(SynthesisError, match=r"no readable settings\.json"):
        run(tmp_path)


def test_a_damaged_shard_is_named_and_left_alone(tmp_path):
    run(tmp_path)
    (tmp_path / "samples-00001.parquet").write_bytes(b"half")
    with pytest.raises(RecordError, match=r"samples-00001\.parquet"):
        run(tmp_path)
    assert (tmp_path / "samples-00001.parquet").read_bytes() == b"half"


def test_the_oracle_shows_each_question_its_own_gold_page_first(tmp_path):
    assert any(t.shown_pages != t.gold_page_ids for t in run(tmp_path / "plain"))
    oracle = run(tmp_path / "oracle", oracle=True)
    assert all(t.shown_pages == t.gold_page_ids for t in oracle)
    assert {t.gold_page_ids for t in oracle} == {("doc_1",), ("doc_2",), ("doc_3",)}
    assert [t.question_id for t in oracle] == [q.uid for q in QUESTIONS for _ in range(3)]


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(SynthesisError, match="no questions"):
        run(tmp_path, questions=[])
    with pytest.raises(SynthesisError, match="2 questions have the uid 'q0'"):
        run(tmp_path, questions=[QUESTIONS[0], QUESTIONS[0]])
    with pytest.raises(SynthesisError, match="workers=0"):
        run(tmp_path, workers=0)
    with pytest.raises(SynthesisError, match="holds no samples"):
        read_samples(tmp_path)
    assert not any(tmp_path.iterdir())
