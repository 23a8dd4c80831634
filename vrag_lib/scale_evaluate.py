"""How well the scale policy perceives, on documents it never saw: exact match and IoU by real greedy generation.

Every question is asked in one message with one image, through the checkpoint as anybody would load it. Crops are the
gold region named in the page's shown pixels, as a perfect agent would name it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrag_lib.geometry import Box, iou, render
from vrag_lib.minidocs import MiniDocs
from vrag_lib.scale_reading import ASK, OPENING, prompt_ids
from vrag_lib.scale_tasks import TITLE, WHERE, page_view, region_view
from vrag_lib.stats import bootstrap_mean
from vrag_lib.torch_setup import ensure_torchvision

if TYPE_CHECKING:
    from PIL import Image

_NUMBERS = re.compile(r"\d+(?:\.\d+)?")


@dataclass
class Probe:
    """One question on one image and what came of it. `task` is crop, page, region or title; `score` the IoU of a
    region, else 1 or 0 for an exact match."""

    uid: str
    task: str
    element: str
    question: str
    expected: str
    got: str = ""
    score: float = 0.0

    @property
    def right(self) -> bool:
        return self.score >= 0.5


def probes(docs: MiniDocs, split: str, documents: Iterable[int]) -> list[tuple[Probe, Image.Image, Box | None]]:
    """What is asked: each single-hop question of these documents of a split three times (value from
    the crop of its region, value from the page, place of the region on the page), and the title of every second page.
    With each probe its image and, for a region, the true box in shown pixels."""
    found: list[tuple[Probe, Image.Image, Box | None]] = []
    for index in documents:
        document = docs.document(split, index)
        images = {page.number: page.image() for page in document.pages}
        for page in document.pages:
            if page.title and page.kind != "cover" and (page.number + index) % 2:
                probe = Probe(f"{document.id}_{page.number}", "title", page.kind, TITLE, page.title)
                found.append((probe, render(images[page.number], page_view(page)), None))
        for number, question in enumerate(docs.mini_questions(document), 1):
            if len(question.facts) != 1:
                continue
            page_number, fact = question.facts[0]
            page = document.page(page_number)
            whole = page_view(page)
            shown = render(images[page_number], whole)
            close = render(images[page_number], region_view(page, fact.region_box))
            uid, element = f"{document.id}-q{number}", fact.element
            found.append((Probe(uid, "crop", element, question.query, fact.value), close, None))
            found.append((Probe(uid, "page", element, question.query, fact.value), shown, None))
            box = whole.to_shown(fact.region_box)
            expected = json.dumps([round(v, 1) for v in box.as_tuple()])
            found.append((Probe(uid, "region", element, WHERE + question.query, expected), shown, box))
    return found


def evaluate_policy(
    path: str | Path, split: str = "test", documents: int = 80, batch_size: int = 32, docs: MiniDocs | None = None
) -> list[Probe]:
    """Ask the checkpoint at `path` all probes of a split, greedily, in float32 on the CPU."""
    from tqdm import tqdm

    model, processor = load_policy(path)
    asked = probes(docs or MiniDocs(), split, range(documents))
    asked.sort(key=lambda entry: entry[0].task)
    for start in tqdm(range(0, len(asked), batch_size), "evaluating", mininterval=5):
        part = asked[start : start + batch_size]
        replies = generate(model, processor, [image for _, image, _ in part], [probe.question for probe, _, _ in part])
        for (probe, _, box), reply in zip(part, replies, strict=True):
            probe.got = reply
            probe.score = _box_score(reply, box) if box is not None else float(reply.strip() == probe.expected)
    return [probe for probe, _, _ in asked]


@dataclass(frozen=True)
class Look:
    """A question asked of one image: what is shown at which size, the truth, and what the policy read."""

    image: Image.Image
    shown: str
    question: str
    expected: str
    got: str


def page_and_crop(path: str | Path, docs: MiniDocs, split: str, index: int) -> list[Look]:
    """For one look-up question of each element (table, chart, text) of a document: the policy's reading of the whole
    page and of the gold region, in this order."""
    model, processor = load_policy(path)
    asked: dict[tuple[str, str], tuple[Probe, Image.Image]] = {}
    for number in range(index, index + 1000):  # on to the next documents until every element was asked for
        found = {(p.element, p.task): (p, image) for p, image, _ in probes(docs, split, [number]) if p.task in _LOOKS}
        asked = found | asked
        if all((element, task) in asked for element in ("table", "chart", "text") for task in _LOOKS):
            break
    chosen = [asked[element, task] for element in ("table", "chart", "text") for task in _LOOKS]
    replies = generate(model, processor, [image for _, image in chosen], [probe.question for probe, _ in chosen])
    return [
        Look(image, f"{_LOOKS[probe.task]}, {image.width} × {image.height} px", probe.question, probe.expected, reply)
        for (probe, image), reply in zip(chosen, replies, strict=True)
    ]


_LOOKS = {"page": "whole page", "crop": "gold region"}


def load_policy(path: str | Path) -> tuple[Any, Any]:
    """Model in float32, ready to generate on the CPU, and processor of a checkpoint."""
    ensure_torchvision()
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(path)


def generate(model: Any, processor: Any, images: Sequence[Image.Image] | None, questions: Sequence[str]) -> list[str]:
    """Greedy replies to one question per image; images have their shown size already. None: no images at all."""
    import torch

    tokenizer = processor.tokenizer
    pixels: dict[str, Any] = {}
    if images is None:
        rows = [tokenizer.encode(OPENING + question + ASK, add_special_tokens=False) for question in questions]
    else:
        pixels = dict(processor.image_processor(images=list(images), do_resize=False, return_tensors="pt"))
        rows = [
            prompt_ids(tokenizer, int(grid.prod()) // 4, question)
            for grid, question in zip(pixels["image_grid_thw"], questions, strict=True)
        ]
    longest = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    is_image = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=is_image, do_sample=False, max_new_tokens=48, **pixels
        )
    return tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)


def _box_score(reply: str, truth: Box) -> float:
    numbers = [float(v) for v in _NUMBERS.findall(reply)]
    return iou(Box(*numbers), truth) if len(numbers) == 4 else 0.0


def summary(found: Sequence[Probe]) -> list[dict[str, Any]]:
    """One row per task and element, and per task over all: n, share that is right, limits of its 95 % interval."""
    rows = []
    for task in ("crop", "region", "title", "page"):
        of_task = [probe for probe in found if probe.task == task]
        groups = {"all": of_task}
        if task == "page":
            groups = {"table and chart": [p for p in of_task if p.element in ("table", "chart")]}
        for element in sorted({probe.element for probe in of_task}):
            groups[element] = [probe for probe in of_task if probe.element == element]
        for name, group in groups.items():
            if group:
                mean, low, high = bootstrap_mean([float(probe.right) for probe in group], most=1)
                rows.append({"task": task, "element": name, "n": len(group), "right": mean, "low": low, "high": high})
    return rows


def write_evaluation(found: Sequence[Probe], folder: Path) -> list[dict[str, Any]]:
    """Write `perception.csv` (the summary) and `perception_probes.csv` (every answer); returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = summary(found)
    for name, table in (("perception.csv", rows), ("perception_probes.csv", [asdict(probe) for probe in found])):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    return rows
