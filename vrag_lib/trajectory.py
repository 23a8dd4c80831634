"""The trajectory record: the one thing that synthesis, SFT, GRPO, evaluation, the viewer and every plot share.

A trajectory is a list of turns. Token ids stand in it as they were sampled or inserted, so the loss mask is read off
the record and never recovered from text (traps T2, T11, T12). Images are references (page, box, shown size), never
pixels; with the corpus they render to the same pixels again.

    write_trajectories(trajectories, "trajectories.parquet")
    trajectories = read_trajectories("trajectories.parquet")
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vrag_lib.actions import Action, ActionKind, InvalidReason
from vrag_lib.geometry import Box, Size, View, render

if TYPE_CHECKING:
    from vrag_lib.corpus import Corpus

SCHEMA_VERSION = 1


class StopReason(StrEnum):
    """Why a trajectory ended."""

    ANSWER = "answer"
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    CONTEXT_OVERFLOW = "context_overflow"
    INVALID_STREAK = "invalid_streak"
    ERROR = "error"


class RecordError(ValueError):
    """A trajectory record that contradicts itself, or a file that holds none."""


@dataclass(frozen=True)
class ImageRef:
    """One image shown to the model: which page, which part of it, at what size."""

    page_id: str
    view: View

    @property
    def is_crop(self) -> bool:
        page = self.view.page
        return self.view.box != Box(0, 0, page.width, page.height)

    def render(self, corpus: Corpus) -> Image.Image:
        """The pixels, RGB, of size `view.shown`."""
        return render(corpus.page(self.page_id).open_image(), self.view)


@dataclass(frozen=True)
class Turn:
    """One message. A user turn is inserted by the environment (its images first, then its text); an assistant turn
    was sampled. `text_pages` are the pages whose text stands in a user turn's text. `token_ids` are the tokens of
    exactly this turn, None for policies that give none; `logprobs` belong to the sampled tokens one by one. `action` or
    `invalid` says what an assistant turn was read as."""

    role: str
    text: str
    images: tuple[ImageRef, ...] = ()
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    action: Action | None = None
    invalid: InvalidReason | None = None
    finish_reason: str = ""
    text_pages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise RecordError(f"a turn is of the user or of the assistant, not of {self.role!r}")
        if self.logprobs is not None and (
            self.role != "assistant" or self.token_ids is None or len(self.logprobs) != len(self.token_ids)
        ):
            raise RecordError("log-probs belong to the sampled tokens of an assistant turn, one each")

    @property
    def sampled(self) -> tuple[bool, ...] | None:
        """For each token whether the policy sampled it: all of an assistant turn, none of a user turn."""
        return None if self.token_ids is None else (self.role == "assistant",) * len(self.token_ids)


@dataclass(frozen=True)
class TokenSequence:
    """All turns as one sequence of T tokens; the four tuples are equally long. `logprobs` is 0.0 where not sampled."""

    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    logprobs: tuple[float, ...]
    turn_index: tuple[int, ...]


@dataclass(frozen=True)
class Trajectory:
    """One question, from the prompt to the stop. `rewards` maps a name to (score, weight); `timings` a phase to
    seconds; `versions` a package to its version."""

    id: str
    question_id: str
    question: str
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    seed: int = 0
    preset: str = ""
    run_id: str = ""
    policy: str = ""
    reference_answer: str = ""
    gold_page_ids: tuple[str, ...] = ()
    rewards: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def answer(self) -> str | None:
        """The answer given, from the structure of the last turn; None if the trajectory ended otherwise (trap T3)."""
        if self.stop_reason is not StopReason.ANSWER:
            return None
        action = self.turns[-1].action
        return action.argument if action is not None else None

    @property
    def total_reward(self) -> float:
        """Weighted sum of the rewards: NaN where one that counts is unknown."""
        return sum(score * weight for score, weight in self.rewards.values() if weight)

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """Every image shown, in order."""
        return tuple(image for turn in self.turns for image in turn.images)

    @property
    def shown_pages(self) -> tuple[str, ...]:
        """Ids of the pages that were shown, with the question or by a search, in the order of their first sight; crops
        are not pages, and one that is as large as its page shows nothing new."""
        return tuple(
            dict.fromkeys(
                page_id
                for turn in self.turns
                for page_id in (*(image.page_id for image in turn.images if not image.is_crop), *turn.text_pages)
            )
        )

    @property
    def evidence(self) -> ImageRef | None:
        """The last image seen before the stop: what an answer stands on."""
        return self.images[-1] if self.images else None

    @property
    def replies(self) -> tuple[Turn, ...]:
        """The assistant turns."""
        return tuple(turn for turn in self.turns if turn.role == "assistant")

    def count(self, kind: ActionKind) -> int:
        """Replies read as this action."""
        return sum(1 for turn in self.turns if turn.action is not None and turn.action.kind == kind)

    def with_rewards(self, rewards: Mapping[str, tuple[float, float]]) -> Trajectory:
        """The same trajectory with these rewards."""
        return dataclasses.replace(self, rewards=dict(rewards))

    def tokens(self) -> TokenSequence:
        """The token sequence with its sampled mask: the loss mask of any trainer.

        Raises RecordError if a turn has no token ids.
        """
        ids: list[int] = []
        sampled: list[bool] = []
        logprobs: list[float] = []
        index: list[int] = []
        for i, turn in enumerate(self.turns):
            if turn.token_ids is None:
                raise RecordError(f"turn {i} of trajectory {self.id} has no token ids: its policy gave only text")
            ids += turn.token_ids
            sampled += [turn.role == "assistant"] * len(turn.token_ids)
            logprobs += turn.logprobs if turn.logprobs is not None else [0.0] * len(turn.token_ids)
            index += [i] * len(turn.token_ids)
        return TokenSequence(tuple(ids), tuple(sampled), tuple(logprobs), tuple(index))


def clean_text(text: str) -> str:
    """Text that any file can hold: lone surrogates and NULs, which no UTF-8 or parquet string can, are replaced."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as one parquet row of plain types."""
    row = {f.name: getattr(trajectory, f.name) for f in dataclasses.fields(trajectory)}
    return row | {
        "schema_version": SCHEMA_VERSION,
        "stop_reason": trajectory.stop_reason.value,
        "turns": [_turn_row(turn) for turn in trajectory.turns],
        "gold_page_ids": list(trajectory.gold_page_ids),
        "rewards": [{"name": n, "score": float(s), "weight": float(w)} for n, (s, w) in trajectory.rewards.items()],
        "timings": json.dumps(dict(trajectory.timings)),
        "versions": json.dumps(dict(trajectory.versions)),
        "total_reward": float(trajectory.total_reward),
    }


def _turn_row(turn: Turn) -> dict[str, Any]:
    action = turn.action
    return {
        "role": turn.role,
        "text": turn.text,
        "images": [_image_row(image) for image in turn.images],
        "text_pages": list(turn.text_pages),
        "token_ids": None if turn.token_ids is None else list(turn.token_ids),
        "sampled": None if turn.sampled is None else list(turn.sampled),
        "logprobs": None if turn.logprobs is None else list(turn.logprobs),
        "action": None if action is None else action.kind.value,
        "argument": None if action is None else action.argument,
        "box": None if action is None or action.box is None else list(action.box.as_tuple()),
        "invalid": None if turn.invalid is None else turn.invalid.value,
        "finish_reason": turn.finish_reason,
    }


def _image_row(image: ImageRef) -> dict[str, Any]:
    view = image.view
    return {
        "page_id": image.page_id,
        "page": [view.page.width, view.page.height],
        "box": list(view.box.as_tuple()),
        "shown": [view.shown.width, view.shown.height],
    }


def from_row(row: Mapping[str, Any]) -> Trajectory:
    """The inverse of `to_row`. Raises RecordError for another schema or a row that contradicts itself."""
    version = row.get("schema_version")
    if version != SCHEMA_VERSION:
        raise RecordError(f"the record has schema {version}, this version reads {SCHEMA_VERSION}; write it again")
    names = {f.name for f in dataclasses.fields(Trajectory)}
    plain = {name: row[name] for name in names if name in row}
    return Trajectory(
        **plain
        | {
            "stop_reason": StopReason(row["stop_reason"]),
            "turns": tuple(_turn_from_row(t) for t in row["turns"]),
            "gold_page_ids": tuple(row["gold_page_ids"]),
            "rewards": {r["name"]: (r["score"], r["weight"]) for r in row["rewards"]},
            "timings": json.loads(row["timings"]),
            "versions": json.loads(row["versions"]),
        }
    )


def _turn_from_row(row: Mapping[str, Any]) -> Turn:
    action = None
    if row["action"] is not None:
        box = None if row["box"] is None else Box(*row["box"])
        action = Action(ActionKind(row["action"]), row["argument"], box)
    turn = Turn(
        role=row["role"],
        text=row["text"],
        images=tuple(
            ImageRef(i["page_id"], View(Size(*i["page"]), Box(*i["box"]), Size(*i["shown"]))) for i in row["images"]
        ),
        token_ids=None if row["token_ids"] is None else tuple(row["token_ids"]),
        logprobs=None if row["logprobs"] is None else tuple(row["logprobs"]),
        action=action,
        invalid=None if row["invalid"] is None else InvalidReason(row["invalid"]),
        finish_reason=row["finish_reason"],
        text_pages=tuple(row.get("text_pages") or ()),  # files written before pages could be shown as text lack it
    )
    stored = None if row["sampled"] is None else tuple(row["sampled"])
    if stored != turn.sampled:
        raise RecordError("the stored sampled mask is not that of the turn's role")
    return turn


def _schema() -> Any:
    import pyarrow as pa

    text, real = pa.string(), pa.float64()
    image = pa.struct(
        {"page_id": text, "page": pa.list_(pa.int32()), "box": pa.list_(real), "shown": pa.list_(pa.int32())}
    )
    turn = pa.struct(
        {
            "role": text,
            "text": text,
            "images": pa.list_(image),
            "text_pages": pa.list_(text),
            "token_ids": pa.list_(pa.int32()),
            "sampled": pa.list_(pa.bool_()),
            "logprobs": pa.list_(real),
            "action": text,
            "argument": text,
            "box": pa.list_(real),
            "invalid": text,
            "finish_reason": text,
        }
    )
    strings = ("id", "question_id", "question", "reference_answer", "stop_reason", "preset", "run_id", "policy")
    return pa.schema(
        [("schema_version", pa.int32())]
        + [(name, text) for name in strings]
        + [("seed", pa.int64()), ("error", text), ("total_reward", real), ("timings", text), ("versions", text)]
        + [("gold_page_ids", pa.list_(text)), ("turns", pa.list_(turn))]
        + [("rewards", pa.list_(pa.struct({"name": text, "score": real, "weight": real})))]
    )


def write_trajectories(trajectories: Iterable[Trajectory], path: str | Path) -> Path:
    """Write a parquet file, whole or not at all: it is moved into place when complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([to_row(t) for t in trajectories], schema=_schema())
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, path)
    return path


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """Read what `write_trajectories` wrote. Raises RecordError naming a file that is missing or holds no records."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise RecordError(f"there is no trajectory file {path}")
    try:
        rows: Sequence[dict] = pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise RecordError(f"{path} is not a parquet file of trajectories: {error}") from error
    try:
        return [from_row(row) for row in rows]
    except KeyError as error:
        raise RecordError(f"{path} holds no trajectories: the column {error} is missing") from error
