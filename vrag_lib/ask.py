"""One question to one collection: answer, document, page, region, and the trajectory to look at."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vrag_lib.actions import ActionKind
from vrag_lib.config import Config, ConfigError, RolloutConfig, save_config
from vrag_lib.corpus import Corpus, Question
from vrag_lib.document_files import CorpusError
from vrag_lib.factory import make_policy, make_retriever, open_corpus, require_policy, require_retriever
from vrag_lib.rollout import rollout
from vrag_lib.trajectory import Trajectory, Turn, write_trajectories
from vrag_lib.viewer import trajectory_html, visible

_SHOWN_CHARS = 300
"""Of a reply without a proper action."""


@dataclass(frozen=True)
class Answer:
    """What `vrag ask` found. `viewer` is the HTML page of the trajectory; the corpus is kept to look further."""

    trajectory: Trajectory
    corpus: Corpus
    viewer: Path

    def report(self) -> str:
        """Answer, source and trajectory as text for a terminal."""
        return f"{describe_answer(self.trajectory, self.corpus)}\n\n{describe_turns(self.trajectory)}"


def ask(path: str | Path, question: str, config: Config) -> Answer:
    """Answer `question` from the documents at `path`; write trajectory, config and viewer page to a new folder below
    `ask/` of the results.

    Raises CorpusError, ConfigError, ModelError or RetrievalIndexError when the documents, settings, results folder,
    model or index cannot be used, settings and folder before documents are rendered; a policy that fails ends with a
    trajectory that says so.
    """
    if not question.strip():
        raise ValueError("the question is empty")
    acting = dataclasses.replace(config, rollout=RolloutConfig())  # one question needs no engine
    config.environment.validate()
    require_retriever(config)
    require_policy(acting)
    if not Path(path).exists():
        raise CorpusError(f"{path} does not exist; give a folder of PDFs or images, or one such file")
    folder = _new_folder(config.folder("ask"), question)
    try:
        corpus = open_corpus(path, config)
        retriever = make_retriever(corpus, config)
        item = Question("ask", question.strip(), "")
        trajectory = rollout(
            make_policy(corpus, acting),
            [item],
            corpus,
            retriever,
            config.environment,
            seeds=[config.seed],
            preset=config.preset,
            run_id="ask",
        )[0]
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise
    save_config(config, folder)
    write_trajectories([trajectory], folder / "trajectories.parquet")
    viewer = folder / "trajectory.html"
    viewer.write_text(trajectory_html([trajectory], corpus, title=question.strip()), encoding="utf-8")
    return Answer(trajectory, corpus, viewer)


def _new_folder(parent: Path, question: str) -> Path:
    """A folder of this run's own, named by the time (UTC) and the question's first words: no earlier answer is lost.

    Raises ConfigError where none can be made.
    """
    words = re.sub(r"[\W_]+", "-", question.lower()).strip("-")[:40].strip("-")
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{words}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = parent / (name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):  # the same question in the same second
                folder.mkdir()
                return folder
    except OSError as error:
        raise ConfigError(
            f"no folder can be made in {parent} ({error.strerror}); name another with --out or results="
        ) from error


def describe_answer(trajectory: Trajectory, corpus: Corpus) -> str:
    """Answer, document, page and region, one line each."""
    lines = [f"question  {visible(trajectory.question)}"]
    if trajectory.answer is not None:
        lines.append(f"answer    {visible(trajectory.answer)}")
    else:
        error = f": {visible(trajectory.error)}" if trajectory.error else ""
        lines.append(f"answer    none ({trajectory.stop_reason}{error})")
    evidence = trajectory.evidence
    if evidence is None:
        return "\n".join([*lines, "source    no page was looked at"])
    page = corpus.page(evidence.page_id)
    document = next(d for d in corpus.documents if d.id == page.document_id)
    box = ", ".join(str(round(v)) for v in evidence.view.box.as_tuple())
    return "\n".join(
        [
            *lines,
            f"document  {visible(str(document.path))}",
            f"page      {page.number}",
            f"region    [{box}] of {page.size.width} x {page.size.height} pixels"
            + ("" if evidence.is_crop else " (whole page)"),
        ]
    )


def describe_turns(trajectory: Trajectory) -> str:
    """The trajectory, one paragraph per turn after the prompt."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    paragraphs = []
    for turn in trajectory.turns[1:]:
        text = visible(_reply_line(turn) if turn.role == "assistant" else _observation_line(turn))
        mark = "agent > " if turn.role == "assistant" else "    < "
        paragraphs.append(textwrap.fill(text, width, initial_indent=mark, subsequent_indent=" " * len(mark)))
    return "\n".join([*paragraphs, f"stop    {trajectory.stop_reason}, {len(trajectory.replies)} replies"])


def _reply_line(turn: Turn) -> str:
    if turn.action is None:  # what was said instead is what one needs to see
        return f"{textwrap.shorten(turn.text, _SHOWN_CHARS, placeholder=' …')} [invalid: {turn.invalid}]".strip()
    thought = turn.text.partition("<think>")[2].partition("</think>")[0].strip()
    verb = {ActionKind.SEARCH: "search", ActionKind.CROP: "look closer at", ActionKind.ANSWER: "answer"}
    return f"{thought} → {verb[turn.action.kind]}: {turn.action.argument}".strip()


def _observation_line(turn: Turn) -> str:
    shown = [
        f"{'region of' if image.is_crop else 'page'} {image.page_id} "
        f"({image.view.shown.width} x {image.view.shown.height} px)"
        for image in turn.images
    ]
    return "; ".join([*shown, *([turn.text] if turn.text else [])]) or "(nothing)"
