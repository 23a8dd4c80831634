"""The small collection that ships in `data/quickstart`: five generated PDFs, one scanned page, twenty questions.

It uses the MiniDocs generator with print large enough for people and text retrievers; entities, layout families and
palettes are those of the training split, so nothing of the benchmark's test split is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from vrag_lib.corpus import Question
from vrag_lib.corpus_formats import write_unified
from vrag_lib.minidocs import MiniDocs, MiniDocument, to_question
from vrag_lib.minidocs_documents import MiniDocsConfig
from vrag_lib.minidocs_pdf import write_pdf

QUICKSTART = MiniDocsConfig(
    seed=11, train_documents=5, validation_documents=0, test_documents=0,
    min_pages=7, max_pages=8, title_px=44, label_px=30, value_px=24,
)  # fmt: skip

SCANNED_DOCUMENT = 4
"""Index of the document of which one page is a picture without a text layer."""

_PER_DOCUMENT = 4


def write_quickstart(out_dir: str | Path) -> tuple[Question, ...]:
    """Write `{out_dir}/documents/*.pdf` and `{out_dir}/questions.json`; returns the questions.

    The page that answers the first question on document `SCANNED_DOCUMENT` is written as a grey, noisy picture, so
    that its text can only be had by OCR.
    """
    out = Path(out_dir)
    docs = MiniDocs(QUICKSTART)
    questions: list[Question] = []
    for document in docs.documents("train"):
        chosen = _choose(docs, document)
        pages: list = [page.canvas for page in document.pages]
        if document.index == SCANNED_DOCUMENT:
            number = chosen[0].reference_pages[0]
            pages[number - 1] = scanned(document.page(number).image(), seed=QUICKSTART.seed)
        write_pdf(out / "documents" / file_name(document), pages)
        questions += chosen
    write_unified(questions, out / "questions.json")
    return tuple(questions)


def file_name(document: MiniDocument) -> str:
    """A telling name: entity, organisation and year."""
    return f"{document.name} {document.headline.split()[-1]}.pdf".lower().replace(" ", "-")


def _choose(docs: MiniDocs, document: MiniDocument) -> Sequence[Question]:
    """Four of the document's eight questions, so that all kinds appear over the collection."""
    name = file_name(document)
    stem = name.removesuffix(".pdf")
    asked = docs.mini_questions(document)[document.index % 2 :: 2][:_PER_DOCUMENT]
    return [to_question(question, f"{stem}-q{number}", name) for number, question in enumerate(asked, 1)]


def scanned(image: Image.Image, seed: int) -> Image.Image:
    """A page as a scanner sees it: grey, a little blurred, noisy, greyish paper; same size, so boxes stay true."""
    grey = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(0.8)), dtype=np.float32)
    noise = np.random.default_rng(seed).normal(0, 6, grey.shape)
    shade = np.linspace(0, 14, grey.shape[1])[None, :]
    return Image.fromarray(np.clip(grey * 0.93 + 8 - shade + noise, 0, 255).astype(np.uint8))
