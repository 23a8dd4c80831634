"""MiniDocs: a generated benchmark of visually rich documents with exact truth for every value and region.

The laptop preset's stand-in for SlideVQA, ViDoSeek and MMLongBench-Doc, and no part of the paper. It keeps in small
what makes the paper's problem hard: documents that share their vocabulary, pages on which figures are too small to
read until a region is cropped, text, table, chart and layout questions over one or two pages, and some that nothing
answers. Splits share no document, entity, layout family or palette.

    docs = MiniDocs(MiniDocsConfig(seed=0))
    docs.document("train", 7).pages[2].image()      # drawn on the spot, the same on every machine
    docs.questions("test")                          # unified items with regions in raw page pixels
    docs.corpus("test", cache_dir)                  # pages for retrieval and the environment
    docs.write("out")                               # PDFs and questions.json per split
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vrag_lib.config import cache_dir as default_cache_dir
from vrag_lib.corpus import Corpus, Document, Page, Question, TextLine
from vrag_lib.corpus_formats import write_unified
from vrag_lib.geometry import Box
from vrag_lib.minidocs_content import NOT_ANSWERABLE, SPLITS
from vrag_lib.minidocs_documents import MiniDocsConfig, MiniDocument, MiniPage, build_document
from vrag_lib.minidocs_pdf import write_pdf
from vrag_lib.minidocs_questions import MiniQuestion, build_questions
from vrag_lib.rendering import read_json, write_atomically

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = ["NOT_ANSWERABLE", "SPLITS", "MiniDocs", "MiniDocsConfig", "MiniDocument", "MiniPage", "MiniQuestion"]

SOURCE_TYPES = {"text": "Text", "table": "Table", "chart": "Chart", "layout": "2d_layout", "": ""}
"""Elements in the spelling of ViDoSeek's `source_type`."""

EXPORT_FORMS = ("pdf", "images")


class MiniDocs:
    """One collection: everything in it follows from its configuration."""

    def __init__(self, config: MiniDocsConfig | None = None):
        self.config = config or MiniDocsConfig()

    def document(self, split: str, index: int) -> MiniDocument:
        """Document `index` of a split, independent of all others; training may ask for indices beyond the split's
        number of documents. Raises ValueError for an unknown split or a negative index."""
        return build_document(self.config, split, index)

    def documents(self, split: str) -> Iterator[MiniDocument]:
        """The documents of a split in order, each built when asked for."""
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; splits are {', '.join(SPLITS)}")
        return (self.document(split, index) for index in range(self.config.documents[split]))

    def mini_questions(self, document: MiniDocument) -> list[MiniQuestion]:
        """The questions of one document with the facts they rest on."""
        return build_questions(self.config, document)

    def questions(self, split: str) -> tuple[Question, ...]:
        """All questions of a split in the unified item format.

        `extra` holds `answerable`, `answer_format`, `template`, `wording`, `rewritten_query`, `hop_queries` (one per
        gold page) and `regions`: hop by hop `page`, `element`, `item`, `column`, `value`, `region_box` (row, bar,
        sentence, box) and `answer_box` (the value's ink), both `[x1, y1, x2, y2]` in raw page pixels.
        """
        return tuple(question for document in self.documents(split) for question in self.unified(document))

    def unified(self, document: MiniDocument, file_name: str | None = None) -> list[Question]:
        """The questions of one document as unified items; `file_name` defaults to `{document id}.pdf`."""
        file_name = file_name or f"{document.id}.pdf"
        stem = file_name.removesuffix(".pdf")
        return [
            to_question(question, f"{stem}-q{number}", file_name)
            for number, question in enumerate(self.mini_questions(document), 1)
        ]

    def corpus(self, split: str, cache_dir: str | Path | None = None) -> Corpus:
        """The pages of a split as a corpus with exact text lines. Images are painted into the cache (default:
        `config.cache_dir()`) once, by configuration; a second call, or one after a kill, paints what is missing."""
        cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        folder = cache / "minidocs" / self.fingerprint / split
        total = self.config.documents[split]
        return Corpus(
            _document_in_corpus(document, folder, f"minidocs-{self.fingerprint}")
            for document in tqdm(self.documents(split), "drawing pages", total, unit="document", disable=total < 20)
        )

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the sha256 of the configuration, without what is null; names the cache folder."""
        settings = {name: value for name, value in asdict(self.config).items() if value is not None}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, out_dir: str | Path, form: str = "pdf", splits: Sequence[str] = SPLITS) -> Path:
        """Export splits to `{out_dir}/{split}/`: `questions.json` beside `documents/*.pdf` (vector pages with a text
        layer) or, with `form="images"`, `img/{document}_{page}.png`. `load_dataset("unified", ...)` reads either.

        Raises ValueError for an unknown form or split, and for a folder that holds another collection.
        """
        if form not in EXPORT_FORMS:
            raise ValueError(f"MiniDocs are exported as {' or '.join(EXPORT_FORMS)}, not as {form!r}")
        out = Path(out_dir)
        described = {"form": form, "fingerprint": self.fingerprint, "config": asdict(self.config)}
        present = read_json(out / "config.json")
        if present not in (None, described):
            raise ValueError(f"{out} holds MiniDocs of another configuration or form; give another folder")
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.json", (json.dumps(described, indent=1) + "\n").encode())
        for split in splits:
            folder = out / split / ("documents" if form == "pdf" else "img")
            documents = self.documents(split)
            folder.mkdir(parents=True, exist_ok=True)
            for document in tqdm(documents, f"writing {split}", self.config.documents[split], unit="document"):
                if form == "pdf":
                    write_pdf(folder / f"{document.id}.pdf", [page.canvas for page in document.pages])
                else:
                    for page in document.pages:
                        write_atomically(folder / f"{document.id}_{page.number}.png", _png(page))
            write_unified(self.questions(split), out / split / "questions.json")
        return out

    def to_datasets(self, split: str) -> DatasetDict:
        """A split as a `datasets.DatasetDict`: `pages` (id, document, number, text, image) and `questions` (uid,
        query, answer, types, gold page ids, gold images, regions as JSON)."""
        from datasets import Dataset, DatasetDict, Features, Image, List, Value

        string, number = Value("string"), Value("int32")
        images: dict[str, dict[str, Any]] = {}
        pages: list[dict[str, Any]] = []
        questions: list[dict[str, Any]] = []
        for document in tqdm(self.documents(split), "drawing pages", self.config.documents[split], unit="document"):
            for page in document.pages:
                key = f"{document.id}_{page.number}"
                images[key] = {"bytes": _png(page), "path": f"{key}.png"}
                text = "\n".join(text for text, _ in page.lines)
                row = {"id": key, "document": document.id, "number": page.number, "kind": page.kind, "text": text}
                pages.append({**row, "image": images[key]})
            questions += [_row(question, images) for question in self.unified(document)]
        page_features = {"id": string, "document": string, "number": number, "kind": string, "text": string}
        question_features = {key: string for key in questions[0] if key not in ("gold_page_ids", "images")}
        question_features |= {"gold_page_ids": List(string), "images": List(Image())}
        return DatasetDict(
            pages=Dataset.from_list(pages, Features({**page_features, "image": Image()})),
            questions=Dataset.from_list(questions, Features(question_features)),
        )


def to_question(question: MiniQuestion, uid: str, file_name: str) -> Question:
    """A question in the unified item format; what that format has no field for goes into `extra`."""
    regions = [
        {
            "page": number,
            "element": fact.element,
            "item": fact.item,
            "column": fact.column,
            "value": fact.value,
            "region_box": _rounded(fact.region_box),
            "answer_box": _rounded(fact.answer_box),
        }
        for number, fact in question.facts
    ]
    return Question(
        uid=uid,
        query=question.query,
        reference_answer=question.answer,
        file_name=file_name,
        reference_pages=question.pages,
        source_type=SOURCE_TYPES[question.element],
        query_type="Multi-Hop" if question.multi_hop else "Single-Hop",
        extra={
            "answerable": question.answerable,
            "answer_format": _answer_format(question.answer),
            "template": question.template,
            "wording": question.wording,
            "rewritten_query": question.rewritten_query,
            "hop_queries": list(question.hop_queries),
            "regions": regions,
        },
    )


def majority_accuracy(reference: Iterable[Question], questions: Iterable[Question]) -> dict[str, float]:
    """How many of `questions` are answered right, without any page, by the answer that `reference` (training
    questions) gives most often to the same template; answerable ones only, by template and over `all`.

    Raises ValueError when there is nothing answerable to be asked.
    """
    seen: dict[str, Counter[str]] = {}
    for question in reference:
        if question.extra["answerable"]:
            seen.setdefault(question.extra["template"], Counter())[question.reference_answer] += 1
    guesses = {template: max(sorted(counter), key=counter.__getitem__) for template, counter in seen.items()}
    right: dict[str, list[bool]] = {"all": []}
    for question in questions:
        if question.extra["answerable"]:
            hit = guesses.get(question.extra["template"]) == question.reference_answer
            right.setdefault(question.extra["template"], []).append(hit)
            right["all"].append(hit)
    if not right["all"]:
        raise ValueError("none of the questions has an answer")
    return {template: sum(hits) / len(hits) for template, hits in sorted(right.items())}


def _document_in_corpus(document: MiniDocument, folder: Path, settings: str) -> Document:
    folder = folder / document.id
    folder.mkdir(parents=True, exist_ok=True)
    pages = []
    digest = hashlib.sha256()
    for page in document.pages:
        digest.update(repr((page.canvas.size, page.canvas.background, page.canvas.items)).encode())
        path = folder / f"{page.number}.png"
        if not path.is_file():
            write_atomically(path, _png(page))
        lines = tuple(TextLine(text, box) for text, box in page.lines)
        pages.append(Page(f"{document.id}_{page.number}", document.id, page.number, path, page.size, lines, "layer"))
    return Document(document.id, folder, digest.hexdigest(), tuple(pages), settings)


def _png(page: MiniPage) -> bytes:
    out = io.BytesIO()
    page.image().save(out, "PNG", compress_level=3)
    return out.getvalue()


def _row(question: Question, images: dict[str, dict[str, Any]]) -> dict[str, Any]:
    extra = question.extra
    return {
        "uid": question.uid,
        "query": question.query,
        "reference_answer": question.reference_answer,
        "file_name": question.file_name,
        "source_type": question.source_type,
        "query_type": question.query_type,
        "template": extra["template"],
        "wording": extra["wording"],
        "rewritten_query": extra["rewritten_query"],
        "regions": json.dumps(extra["regions"]),
        "gold_page_ids": list(question.gold_page_ids),
        "images": [images[page_id] for page_id in question.gold_page_ids],
    }


def _answer_format(answer: str) -> str:
    """Int, Float, Str or None, as MMLongBench-Doc calls them.

    >>> [_answer_format(answer) for answer in ("412", "4.7", "+4.7%", "Barn", NOT_ANSWERABLE)]
    ['Int', 'Float', 'Float', 'Str', 'None']
    """
    if answer == NOT_ANSWERABLE:
        return "None"
    if answer.isdigit():
        return "Int"
    return "Float" if answer.rstrip("%").lstrip("+-").replace(".", "", 1).isdigit() else "Str"


def _rounded(box: Box) -> list[float]:
    return [round(v, 1) for v in box.as_tuple()]
