"""Trajectories for other tools, their data card, and the split of questions between SFT and reinforcement learning.

The record itself is the parquet file of `trajectory.write_trajectories`; what is written here is made from it:

* `write_dataset`: a Hugging Face dataset, `messages` and `images` as TRL and Qwen-VL expect them;
* `write_llama_factory`: LLaMA-Factory's JSON with PNG files beside it, the paper's way of training;
* `write_card`: README.md, all of it counted from the trajectories.

Images are rendered at the shown size of the record, the frame that the boxes in the replies refer to (trap T8); its
sides are multiples of 28, so Qwen's processor leaves them as they are, given `max_pixels` (LLaMA-Factory:
`image_max_pixels`) no smaller. An image stands before the text of its turn. Both tools also train on the `<|im_end|>`
after a reply, which this package does not.

Deviation from the released code: text that a tool would read as markup, such as `<image>` in a question, would shift
all images behind it. There is no way to escape it there, so such a trajectory is left out and counted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vrag_lib.actions import ActionKind
from vrag_lib.corpus import Corpus, Question, document_stem
from vrag_lib.provenance import provenance
from vrag_lib.rendering import read_json, write_atomically
from vrag_lib.synthesis_filters import Funnel
from vrag_lib.trajectory import ImageRef, Trajectory, Turn

_SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>")
"""Anything of this form in a text may become one of Qwen's special tokens, an image among them, in a chat template."""

_PLACEHOLDER = re.compile(r"<(?:image|video|audio)>")
"""What LLaMA-Factory replaces by a medium, wherever it stands."""

_RENDERED_IMAGES = 128
"""Images kept as PNG, about 0.1 MB each: samples of one question show the same pages."""


@dataclass(frozen=True)
class Exported:
    """What was written where, and how many trajectories were left out by reason: `no_reply`, `markup` (text that the
    tool would take for an image or a special token), `image` (a page that cannot be read, or is not in the corpus)."""

    path: Path
    rows: int
    left_out: dict[str, int]


class ExportError(ValueError):
    """Nothing can be exported, or there is something else in the way; the message says what."""


def write_dataset(trajectories: Sequence[Trajectory], corpus: Corpus, folder: str | Path) -> Exported:
    """A `datasets.Dataset` saved to disk: `id`, `question_id`, `messages` (role, content: parts of type `image` or
    `text`) and `images`, one per image part, in order. An earlier dataset in `folder` is replaced once this is written.

    Raises ExportError when no trajectory can be exported, or `folder` holds something else.
    """
    from datasets import Dataset, Features, Image, List, Value

    folder = Path(folder)
    if folder.exists() and not (folder / "state.json").is_file() and any(folder.iterdir()):
        raise ExportError(f"{folder} holds something that is no dataset; give another folder")
    left_out: Counter[str] = Counter()
    png = lru_cache(_RENDERED_IMAGES)(lambda image: _png(image, corpus))

    def rows() -> Iterator[dict[str, Any]]:
        for trajectory, turns in _exportable(trajectories, _SPECIAL_TOKEN, left_out):
            try:
                images = [{"bytes": png(image), "path": None} for turn in turns for image in turn.images]
            except (OSError, ValueError):
                left_out["image"] += 1
                continue
            messages = [{"role": turn.role, "content": _parts(turn)} for turn in turns]
            yield {"id": trajectory.id, "question_id": trajectory.question_id, "messages": messages, "images": images}

    text = Value("string")
    features = Features(
        {
            "id": text,
            "question_id": text,
            "messages": List({"role": text, "content": List({"type": text, "text": text})}),
            "images": List(Image()),
        }
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\n".join([corpus.fingerprint, *(t.id for t in trajectories)]).encode()).hexdigest()
    ready = rows()
    first = next(ready, None)
    if first is None:
        raise ExportError(f"none of {len(trajectories)} trajectories can be exported: {dict(left_out)}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        dataset = Dataset.from_generator(
            lambda: chain([first], ready), features, cache_dir=f"{temporary}/cache", fingerprint=digest[:16]
        )
        dataset.save_to_disk(f"{temporary}/dataset")
        count = len(dataset)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(f"{temporary}/dataset", folder)
    return Exported(folder, count, dict(left_out))


def write_llama_factory(
    trajectories: Sequence[Trajectory], corpus: Corpus, folder: str | Path, name: str = "vrag_sft"
) -> Exported:
    """`{name}.json` for LLaMA-Factory, the images under `images/`, and the entry in `dataset_info.json`; use the folder
    as its `dataset_dir`. Images are shared between samples and named by page, box and size; those there already are
    not drawn again.

    Raises ExportError when no trajectory can be exported, or `dataset_info.json` is there and cannot be read.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    info_path = folder / "dataset_info.json"
    info = read_json(info_path) if info_path.exists() else {}
    if not isinstance(info, dict):
        raise ExportError(f"{info_path} is not the description of datasets; mend it or give another folder")
    left_out: Counter[str] = Counter()
    samples = []
    markup = re.compile(f"{_SPECIAL_TOKEN.pattern}|{_PLACEHOLDER.pattern}")
    for _, turns in _exportable(trajectories, markup, left_out):
        try:
            images = [_image_file(image, corpus, folder) for turn in turns for image in turn.images]
        except (OSError, ValueError):
            left_out["image"] += 1
            continue
        messages = [{"role": turn.role, "content": "<image>" * len(turn.images) + turn.text} for turn in turns]
        samples.append({"messages": messages, "images": images})
    if not samples:
        raise ExportError(f"none of {len(trajectories)} trajectories can be exported: {dict(left_out)}")
    info[name] = {
        "file_name": f"{name}.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    path = folder / f"{name}.json"
    write_atomically(path, _json(samples))
    write_atomically(info_path, _json(info))
    return Exported(path, len(samples), dict(left_out))


def _exportable(
    trajectories: Sequence[Trajectory], markup: re.Pattern[str], left_out: Counter[str]
) -> Iterator[tuple[Trajectory, tuple[Turn, ...]]]:
    """Trajectories that a tool reads as they are meant, with their turns up to the last reply; the others counted."""
    for trajectory in tqdm(trajectories, "exporting", unit="trajectory", delay=1):
        replies = [i for i, turn in enumerate(trajectory.turns) if turn.role == "assistant"]
        turns = trajectory.turns[: replies[-1] + 1] if replies else ()
        if not turns:
            left_out["no_reply"] += 1
        elif any(markup.search(turn.text) for turn in turns):
            left_out["markup"] += 1
        else:
            yield trajectory, turns


def _parts(turn: Turn) -> list[dict[str, str | None]]:
    parts: list[dict[str, str | None]] = [{"type": "image", "text": None} for _ in turn.images]
    return [*parts, {"type": "text", "text": turn.text}] if turn.text else parts


def _png(image: ImageRef, corpus: Corpus) -> bytes:
    buffer = io.BytesIO()
    image.render(corpus).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _image_file(image: ImageRef, corpus: Corpus, folder: Path) -> str:
    """Draw an image if its file is missing; its path relative to the folder. The name holds no page id, because those
    may hold anything."""
    key = repr((corpus.fingerprint, image.page_id, image.view.box.as_tuple(), image.view.shown))
    relative = f"images/{hashlib.sha256(key.encode()).hexdigest()[:24]}.png"
    if not (folder / relative).is_file():
        write_atomically(folder / relative, _png(image, corpus))
    return relative


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def split_questions(
    questions: Sequence[Question], n_rl: int, seed: int
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Questions for SFT and `n_rl` questions for reinforcement learning that share no document, however its name is
    written, both in the order given. Whole documents are drawn for the latter; the few questions they have beyond
    `n_rl` belong to neither part.

    Raises ValueError when a question names no document, or there are too few questions or documents for both parts.
    """
    remedy = "draw them from more documents, or set fewer apart (synthesis.rl_questions)"
    nameless = next((question.uid for question in questions if not question.file_name), None)
    if nameless is not None:
        raise ValueError(f"question {nameless!r} names no document, so it cannot be kept apart from others")
    if not 0 <= n_rl < len(questions):
        raise ValueError(f"cannot set {n_rl} of {len(questions)} questions apart; {remedy}")
    counts = Counter(document_stem(question.file_name) for question in questions)
    documents = sorted(counts)
    random.Random(seed).shuffle(documents)
    apart: set[str] = set()
    while sum(counts[document] for document in apart) < n_rl:
        apart.add(documents.pop())
    if not documents:
        raise ValueError(f"{n_rl} of {len(questions)} questions take all documents; {remedy}")
    sft = [question for question in questions if document_stem(question.file_name) not in apart]
    rl = [question for question in questions if document_stem(question.file_name) in apart]
    return tuple(sft), tuple(rl[:n_rl])


def write_card(
    folder: str | Path,
    trajectories: Sequence[Trajectory],
    funnel: Funnel,
    *,
    questions: Sequence[Question] = (),
    seed: int | None = None,
    exported: Sequence[Exported] = (),
    title: str = "Cold-start trajectories",
    about: str = "",
    experts: Mapping[str, Any] | None = None,
) -> Path:
    """README.md in `folder`: who wrote the trajectories, counts, funnel, seeds and provenance.

    questions: all that were sampled, so that the card shows which kinds of them are missing among `trajectories`.
    seed: of the sampling run. exported: what was written for other tools.
    about: a paragraph on how the experts worked together, in words. experts: what they did (`expert_record`).
    """
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    answered = Counter(trajectory.question_id for trajectory in trajectories)
    runs = Counter((t.policy, t.run_id, t.preset) for t in trajectories)
    facts = provenance(seed)
    seeds = [trajectory.seed for trajectory in trajectories]
    span = f" Those in this set lie between {min(seeds)} and {max(seeds)}." if seeds else ""
    parts = [
        f"# {title}",
        f"{len(trajectories)} trajectories on {len(answered)} questions: questions answered by searching a collection "
        "of page images, cropping what is too small to read, and answering. Written by code, never by hand.",
        about,
        "## Who wrote them",
        "The replies were written by these policies, under the names they were given:",
        _table(
            ["policy", "run", "preset", "trajectories"],
            [[*run, count] for run, count in sorted(runs.items())],
        ),
        *_expert_tables(experts or {}),
        "## What became of the samples",
        _table(
            ["stage", "kept", "dropped", "kept of all sampled"],
            [[r["stage"], r["kept"], r["dropped"], f"{100 * r['share']:.1f} %"] for r in funnel.rows],
        ),
        "Stages are those of `vrag_lib.synthesis_filters`. Because only accepted answers are kept, what the experts "
        "cannot do is rarer here than among the questions asked.",
        "## Counts",
        *_count_tables(trajectories),
        "## Questions",
        *_question_tables(questions, answered),
        "## Files",
        "`trajectories.parquet` is the record (`vrag_lib.trajectory.read_trajectories`): turns, actions, and images as "
        "page, box in raw page pixels and shown size, never pixels. Other formats are made from it.",
        *_export_tables(exported),
        "## Seeds and provenance",
        f"Seed of the run: {'not given' if seed is None else seed}. Each trajectory holds its own, made of the run's "
        f"seed, the question's uid and the number of the sample.{span}",
        f"```json\n{json.dumps(facts, indent=1)}\n```",
    ]
    write_atomically(path, ("\n\n".join(part for part in parts if part) + "\n").encode())
    return path


def _expert_tables(record: Mapping[str, Any]) -> list[str]:
    """What became of boxes or replies, and what endpoints were asked, failed at and cost; nothing where not counted."""
    if not record:
        return []
    counts = [[name.replace("_", " "), count] for name, count in record["counts"].items()]
    counts += [[f"box failed: {kind}", count] for kind, count in record["failed_boxes"].items()]
    columns = ("name", "requests", "cache_hits", "prompt_tokens", "completion_tokens", "cost")
    rows = [
        [
            role,
            *(expert.get(column, 0) for column in columns),
            *(_listed(expert.get(k)) for k in ("failures", "given_up")),
        ]
        for role, expert in record["experts"].items()
        if "requests" in expert
    ]
    header = ["expert", *(column.replace("_", " ") for column in columns), "failed attempts", "given up"]
    return [
        "What they did, over all runs that were not killed (`experts.json`):",
        *([_table(["what", "times"], counts)] if counts else []),
        *([_table(header, rows)] if rows else []),
    ]


def _listed(counts: Mapping[str, int] | None) -> str:
    return ", ".join(f"{name}: {count}" for name, count in (counts or {}).items()) or "none"


def _count_tables(trajectories: Sequence[Trajectory]) -> list[str]:
    """Replies, actions, searches and crops per trajectory, and how trajectories ended."""
    actions = {kind.value: [t.count(kind) for t in trajectories] for kind in ActionKind}
    actions["invalid"] = [sum(reply.invalid is not None for reply in t.replies) for t in trajectories]
    per_trajectory = {
        "replies": [len(t.replies) for t in trajectories],
        "searches": actions[ActionKind.SEARCH.value],
        "crops": actions[ActionKind.CROP.value],
        "ended by": [t.stop_reason.value for t in trajectories],
    }
    replies = sum(per_trajectory["replies"])
    rows = [[name, sum(counts), f"{100 * sum(counts) / max(1, replies):.1f} %"] for name, counts in actions.items()]
    return [
        _table(["action", "replies", "share"], rows),
        *(_table([name, "trajectories"], sorted(Counter(values).items())) for name, values in per_trajectory.items()),
    ]


def _question_tables(questions: Sequence[Question], answered: Mapping[str, int]) -> list[str]:
    """By kind: questions asked, questions with a trajectory, trajectories."""
    kinds = {
        "template": lambda q: str(q.extra.get("template", "")),
        "source type": lambda q: q.source_type,
        "query type": lambda q: q.query_type,
        "wording": lambda q: str(q.extra.get("wording", "")),
        "answerable": lambda q: {True: "yes", False: "no"}.get(q.extra.get("answerable"), ""),
    }
    tables = []
    for name, kind_of in kinds.items():
        groups: dict[str, list[int]] = {}
        for question in questions:
            groups.setdefault(kind_of(question) or "none", []).append(answered.get(question.uid, 0))
        if groups.keys() - {"none"}:
            rows = [[kind, len(n), sum(1 for i in n if i), sum(n)] for kind, n in sorted(groups.items())]
            tables.append(_table([name, "questions asked", "with a trajectory", "trajectories"], rows))
    return tables or ["Their kinds are not known."]


def _export_tables(exported: Sequence[Exported]) -> list[str]:
    rows = [[f"`{e.path.name}`", e.rows, _listed(e.left_out)] for e in exported]
    return [_table(["export", "trajectories", "left out"], rows)] if rows else []


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
