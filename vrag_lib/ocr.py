"""Text of pages read off their images with rapidocr (PP-OCR models that come in the wheel; nothing is downloaded).

The text layer says nothing about what is drawn or scanned: over a quarter of the 839 pages of a real collection have
none, and the labels of charts are often paths. Where there is a layer, its lines are painted over before reading, so
that only what it lacks is read, and a page that lacks nothing takes a tenth of the time.

Results are cached one page at a time under `<cache>/ocr/`, by the page image's content, the painted boxes and the
OCR's version and parameters, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vrag_lib.config import cache_dir as default_cache_dir
from vrag_lib.corpus import Corpus, Page, Problem, TextLine
from vrag_lib.geometry import Box
from vrag_lib.parallel import run_tasks
from vrag_lib.rendering import read_json, write_json

logger = logging.getLogger(__name__)

PARAMETERS = {
    "Global.use_cls": False,
    "Global.log_level": "critical",
    "Det.limit_type": "max",
    "Det.limit_side_len": 960,
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
}
"""rapidocr settings: no upright/upside-down classifier, detection at 960 px on the longest side, one thread each."""

MIN_LAYER_CHARACTERS = 20
"""A text layer with fewer letters and digits than this says nothing of its page."""

_engine: Any = None


def ocr_pages(
    corpus: Corpus,
    cache_dir: str | Path | None = None,
    workers: int = 2,
    pages: str = "no_text",
) -> Corpus:
    """A corpus whose pages carry OCR lines, added to those of the layer: pages that lack text (`no_text`), or `all`.

    A page whose OCR fails keeps what it had and is named in the result's `problems`. One core reads a slide in
    about 2 s, a dense page in 8 s, a page whose layer lacks nothing in 0.7 s.
    """
    if pages not in ("no_text", "all"):
        raise ValueError(f"pages must be 'no_text' or 'all', not {pages!r}")
    folder = (Path(cache_dir) if cache_dir is not None else default_cache_dir()) / "ocr"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [page for page in corpus.pages if pages == "all" or lacks_text(page)]
    files: dict[str, Path] = {}
    problems: list[Problem] = []
    for page in wanted:
        try:
            files[page.id] = folder / f"{_cache_key(page)}.json"
        except OSError as error:
            problems.append(Problem(page.id, f"OCR: the page image cannot be read: {error}"))
    waiting = {files[page.id]: page for page in wanted if page.id in files and read_json(files[page.id]) is None}
    tasks = [(str(page.image_path), _layer_boxes(page), str(file)) for file, page in waiting.items()]
    todo = list(waiting.values())
    for index, result in run_tasks(read_page, tasks, workers, "reading pages (OCR)", "page"):
        if isinstance(result, Exception):
            problems.append(Problem(todo[index].id, f"OCR: {type(result).__name__}: {result}"))
    for problem in problems:
        logger.warning("left without OCR: %s", problem)
    read = [_with_lines(page, read_json(files[page.id]) or []) for page in wanted if page.id in files]
    return corpus.with_pages(read).with_problems(problems)


def lacks_text(page: Page) -> bool:
    """Whether a page has no text yet, or a layer with hardly more than a page number or a stamp."""
    return sum(character.isalnum() for line in page.lines for character in line.text) < MIN_LAYER_CHARACTERS


def read_page(image_path: str, painted: Sequence[tuple[float, ...]], result_file: str) -> None:
    """Read a page image outside the `painted` boxes (raw page px); write `[text, x1, y1, x2, y2]` lines as JSON."""
    with Image.open(image_path) as image:
        pixels = np.asarray(image.convert("RGB"))[:, :, ::-1].copy()  # (H, W, 3), BGR as OpenCV has it
    _paint_over(pixels, painted)
    output = _ocr_engine()(pixels)
    lines = []
    if output.txts is not None:
        height, width = pixels.shape[:2]
        for text, corners in zip(output.txts, output.boxes, strict=True):  # corners: (4, 2)
            (x1, y1), (x2, y2) = corners.min(axis=0), corners.max(axis=0)
            box = Box(float(x1), float(y1), float(x2), float(y2)).intersection(Box(0, 0, width, height))
            text = " ".join(text.split())
            if text and box.width > 0 and box.height > 0:
                lines.append([text, *(round(value, 1) for value in box.as_tuple())])
    write_json(Path(result_file), lines)


def _ocr_engine() -> Any:
    """This process's engine; loading the models takes about a second."""
    global _engine
    if _engine is None:
        import cv2
        from rapidocr import RapidOCR

        cv2.setNumThreads(1)
        _engine = RapidOCR(params=PARAMETERS)
    return _engine


def _paint_over(pixels: np.ndarray, boxes: Sequence[tuple[float, ...]], margin: int = 2) -> None:
    """Fill boxes of an image (H, W, 3), in place, with the median colour of their rims."""
    height, width = pixels.shape[:2]
    for x1, y1, x2, y2 in boxes:
        left, top = max(0, int(x1) - margin), max(0, int(y1) - margin)
        right, bottom = min(width, int(x2) + 1 + margin), min(height, int(y2) + 1 + margin)
        region = pixels[top:bottom, left:right]
        if region.size:
            rim = np.concatenate([region[0], region[-1], region[:, 0], region[:, -1]])
            region[:] = np.median(rim, axis=0).astype(np.uint8)


def _layer_boxes(page: Page) -> list[tuple[float, ...]]:
    return [line.box.as_tuple() for line in page.lines] if page.text_source == "layer" else []


def _cache_key(page: Page) -> str:
    """sha256 (hex) of everything that an OCR result depends on."""
    digest = hashlib.sha256(page.image_path.read_bytes())
    setup = ["rapidocr", importlib.metadata.version("rapidocr"), PARAMETERS, _layer_boxes(page)]
    digest.update(json.dumps(setup, sort_keys=True).encode())
    return digest.hexdigest()


def _with_lines(page: Page, found: list[list]) -> Page:
    lines = tuple(TextLine(text, Box(*box)) for text, *box in found)
    if page.text_source != "layer":
        return replace(page, lines=lines, text_source="ocr" if lines else "none")
    return replace(page, lines=page.lines + tuple(line for line in lines if not _is_known(line, page.lines)))


def _is_known(line: TextLine, layer: Sequence[TextLine]) -> bool:
    """Whether the layer's lines that an OCR line touches hold its text: most of its words, or its letters in a row.

    The layer of a scan often lies beside its print, so that ends of words stay visible beside what was painted over.
    """
    reach = line.box.height / 4
    box = Box(line.box.x1 - reach, line.box.y1, line.box.x2 + reach, line.box.y2)
    near = [other.text.lower() for other in layer if box.intersection(other.box).area > 0]
    text = line.text.lower()
    words, near_words = text.split(), {word for other in near for word in other.split()}
    if 2 * sum(word in near_words for word in words) > len(words):
        return True
    return any("".join(words) in "".join(other.split()) for other in near)
