"""Readers and writers of benchmark questions: the unified item format, ViDoSeek, SlideVQA and MMLongBench-Doc.

Every reader gives `Question`s whose `reference_pages` are 1-based and whose `file_name` keeps its dots, so that
`gold_page_ids` meet the corpus's page ids. An item that lacks what a question needs is left out and named as a
`Problem` (file, item and field); a file that is no such format at all raises `CorpusError`. A reference page 0 is
kept, so that counts stay those of the benchmark (MMLongBench-Doc has such slips); `check_gold` names it.

The formats (spec 1.7, 2.4; the public repositories of SlideVQA and MMLongBench-Doc):

* `unified` and `vidoseek`: `{"examples": [{uid, query, reference_answer, meta_info: {file_name, reference_page,
  source_type, query_type, ...}}]}`, or the bare list; the refined SlideVQA test file has this form too. Only query and
  reference_answer are needed: an item without a uid is called by its place, q1, q2, ..., and one without reference
  pages needs no file_name. The fields of meta_info may stand beside it.
* `slidevqa`: the original annotation, one JSON object a line: qa_id, deck_name, question, answer, evidence_pages,
  reasoning_type, answer_type, arithmetic_expression, and the deck's URLs.
* `mmlongbench_doc`: a JSON list of doc_id, doc_type, question, answer, evidence_pages, evidence_sources,
  answer_format; the two evidence fields are strings that hold Python lists.

How an item becomes a question: `question_items`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vrag_lib.corpus import Corpus, Question
from vrag_lib.document_files import CorpusError, Problem, document_stem, files_meant
from vrag_lib.minidocs_content import NOT_ANSWERABLE
from vrag_lib.question_items import READERS, ItemError, encodable, misspelt_fields
from vrag_lib.rendering import write_atomically

logger = logging.getLogger(__name__)

SLIDEVQA_PAGE_IMAGE = r"-(?P<number>\d+)-\d+\.jpe?g"
"""SlideVQA keeps a deck as a folder of images whose names end in the slide's number and the image's width."""

NUMBERED_PAGE_IMAGE = r"(?P<document>.+)_(?P<number>\d+)\.(?:jpe?g|png)"
"""The paper's code keeps pages as `{pdf stem}_{1-based page}.jpg` in one folder."""

_FORMS = {
    "unified": ("unified",),
    "vidoseek": ("unified",),
    "slidevqa": ("unified", "slidevqa"),
    "mmlongbench_doc": ("mmlongbench_doc",),
}
_QUESTION_FILES = {
    "unified": ("questions.json", "rag_dataset.json"),
    "vidoseek": ("vidoseek.json", "rag_dataset.json"),
    "slidevqa": ("slidevqa_refined.json", "annotations/qa/test.jsonl", "test.jsonl"),
    "mmlongbench_doc": ("samples.json", "data/samples.json"),
}
_SPLIT_FILES = {"slidevqa": ("annotations/qa/{split}.jsonl", "{split}.jsonl")}
"""Where questions of another split than test lie; other formats have one file, whatever it is for."""

_DOCUMENT_FOLDERS = ("{name}_pdf_document", "documents", "pdf", "pdfs", "images", "img")
_TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx", ".xls", ".ods", ".parquet")
"""Files that might hold questions and are not read."""


def load_questions(
    path: str | Path, format: str = "auto", problems: list[Problem] | None = None, split: str = "test"
) -> tuple[Question, ...]:
    """The questions of a file, or of the one question file that a folder holds.

    `format` is `unified`, `vidoseek`, `slidevqa`, `mmlongbench_doc`, or `auto`, which goes by the content. Items that
    cannot be used are left out, logged, and added to `problems`; fields that look misspelt are logged. `split`: which
    file of a folder in the format of SlideVQA, the only one that knows splits.

    Raises CorpusError when there is no such file or several, it is not of the format, or no item in it can be used.
    """
    if format != "auto" and format not in _FORMS:
        raise CorpusError(f"format {format!r} is not one of auto, {', '.join(_FORMS)}")
    file = _question_file(Path(path), format, split)
    found: list[Problem] = []
    items = _read_items(file, found)
    if not items:
        reason = found[0].reason if found else "it is empty; an item needs a query and a reference_answer"
        raise CorpusError(f"{file} holds no question: {reason}")
    form = _form_of(items, file)
    if format != "auto" and form not in _FORMS[format]:
        raise CorpusError(f"{file} is in the {form} format, not in {format}; pass format={form!r} or 'auto'")
    questions: dict[str, Question] = {}
    named = {str(item.get("uid")) for item in items if isinstance(item, dict)}
    for index, item in enumerate(items):
        item = encodable(item)
        if form == "unified" and isinstance(item, dict) and item.get("uid") is None:
            item |= {"uid": f"q{index + 1}" + "_" * (f"q{index + 1}" in named)}
        try:
            question = READERS[form](item, questions)
            if question.uid in questions:
                raise ItemError(f"field uid: {question.uid!r} was used before")
            questions[question.uid] = question
        except ItemError as error:
            found.append(Problem(str(file), f"item {index}: {error}"))
    for problem in found:
        logger.warning("left out: %s", problem)
    for (name, right), count in misspelt_fields(items).items() if form == "unified" else ():
        logger.warning("%s: %d items have a field %r, which is not read; is %r meant?", file, count, name, right)
    if problems is not None:
        problems += found
    if not questions:
        raise CorpusError(f"{file} holds no usable question" + (f"; the first: {found[0].reason}" if found else ""))
    return tuple(questions.values())


def write_unified(questions: Iterable[Question], path: str | Path) -> None:
    """Write questions in the unified item format, replacing the file in one step; `extra` goes into `meta_info`."""
    examples = [
        {
            "uid": question.uid,
            "query": question.query,
            "reference_answer": question.reference_answer,
            "meta_info": {
                **question.extra,
                "file_name": question.file_name,
                "reference_page": list(question.reference_pages),
                "source_type": question.source_type,
                "query_type": question.query_type,
            },
        }
        for question in questions
    ]
    text = json.dumps({"examples": examples}, ensure_ascii=False, indent=1)
    write_atomically(Path(path), text.encode())


def answerable(questions: Iterable[Question]) -> tuple[Question, ...]:
    """The questions that have an answer and reference pages; of MMLongBench-Doc's 1,082 these are the paper's 847."""
    return tuple(q for q in questions if q.reference_pages and q.reference_answer.strip() != NOT_ANSWERABLE)


def check_gold(corpus: Corpus, questions: Iterable[Question]) -> list[Problem]:
    """Every reference page that the corpus does not hold, with what it holds instead; empty when all is well."""
    counts = {document.id: len(document.pages) for document in corpus.documents}
    problems = []
    for question in questions:
        for page_id in question.gold_page_ids:
            if page_id in corpus:
                continue
            document_id, _, number = page_id.rpartition("_")
            if number == "0":
                reason = f"gold page {page_id!r}: pages are counted from 1, is the annotation counted from 0?"
            elif document_id in counts:
                reason = f"gold page {page_id!r} is not in the corpus, which has {counts[document_id]} pages of it"
            else:
                reason = f"gold page {page_id!r} is of a document that the corpus does not hold"
            problems.append(Problem(question.uid, reason))
    return problems


def with_document_names(corpus: Corpus, questions: Iterable[Question]) -> tuple[Question, ...]:
    """The questions, with file names that lead to their documents' ids: of several files of one name the one in the
    folders that a question names (`files_meant`), for a duplicate the document that was kept, whose pages are the same.
    Logs how many are about duplicates.

    Raises CorpusError for a file name that may mean several documents.
    """
    questions = tuple(questions)
    documents = {document.id: document.file_name for document in corpus.documents}
    alike: dict[str, list[str]] = {}
    kept: dict[str, str] = {}
    for path, document_id in corpus.files.items():
        alike.setdefault(document_stem(path), []).append(path)
        kept.setdefault(document_id, path)
    names: dict[str, str] = {}
    duplicates = set()
    for name in dict.fromkeys(question.file_name for question in questions if question.file_name):
        stem = document_stem(name)
        meant = files_meant(name, alike.get(stem, []))
        ids = {corpus.files[path] for path in meant}
        if len(ids) > 1 and "" in ids:  # the one that could be read will do
            ids.remove("")
            meant = [path for path in meant if corpus.files[path]]
        if len(ids) > 1:
            raise CorpusError(
                f"questions are about {name!r}, which is ambiguous: there are {_some(meant)}; give as file_name the "
                f"path below the folder of documents, such as {meant[0]!r}"
            )
        document_id = ids.pop() if ids else stem
        if document_id and meant and kept[document_id] not in meant:
            duplicates.add(name)
        if document_id in documents and document_id != stem:
            names[name] = documents[document_id]
        elif not document_id and stem in documents:  # it could not be read, and is not the document of that id
            names[name] = meant[0].replace("/", "_")
    moved = sum(question.file_name in duplicates for question in questions)
    if moved:
        logger.warning(
            "%d of %d questions are about duplicates; taken to be about the documents kept", moved, len(questions)
        )
    return tuple(replace(q, file_name=names.get(q.file_name, q.file_name)) for q in questions)


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def with_prefix(prefix: str, corpus: Corpus, questions: Iterable[Question]) -> tuple[Corpus, tuple[Question, ...]]:
    """The same with `prefix` before document ids and the questions' file names: to tell apart what is called alike."""
    named = tuple(
        replace(q, file_name=prefix + re.split(r"[/\\]", q.file_name)[-1]) if q.file_name else q for q in questions
    )
    return corpus.with_prefix(prefix), named


def load_dataset(
    name: str,
    path: str | Path,
    prefix: str = "",
    answerable_only: bool = True,
    split: str = "test",
    **corpus_options: Any,
) -> tuple[Corpus, tuple[Question, ...]]:
    """The pages and questions of a benchmark in a local folder: `unified`, `vidoseek`, `slidevqa` or `mmlongbench_doc`.

    Documents are looked for in the folder's `{name}_pdf_document`, `documents`, `pdf`, `images` or `img`, else in the
    folder itself; page images in `images`, named as SlideVQA's, or in `img`, named as the paper's, make up documents.
    `prefix` goes before document ids and file names, `corpus_options` to `Corpus.from_folder`, `split` to
    `load_questions`. File names of questions are made to lead to the documents (`with_document_names`); gold pages that
    the corpus lacks are logged (see `check_gold`). Raises CorpusError as these and `Corpus.from_folder` do.
    """
    if name not in _FORMS:
        raise CorpusError(f"dataset {name!r} is not one of {', '.join(_FORMS)}")
    root = Path(path)
    questions = load_questions(root, name, split=split)
    if answerable_only:
        questions = answerable(questions)
    folders = [root / folder.format(name=name) for folder in _DOCUMENT_FOLDERS]
    folder = next((folder for folder in folders if folder.is_dir()), root)
    pattern = {"img": NUMBERED_PAGE_IMAGE, "images": SLIDEVQA_PAGE_IMAGE}.get(folder.name)
    corpus = Corpus.from_folder(folder, **{"page_pattern": pattern, **corpus_options})
    questions = with_document_names(corpus, questions)
    if prefix:
        corpus, questions = with_prefix(prefix, corpus, questions)
    missing = check_gold(corpus, questions)
    if missing:
        logger.warning("%d gold pages are not in the corpus, the first: %s", len(missing), missing[0])
    return corpus, questions


def question_files(folder: Path) -> dict[Path, tuple[str, ...]]:
    """The question files that a folder holds under their usual names, with the formats that use the name."""
    files = dict.fromkeys(folder / name for names in _QUESTION_FILES.values() for name in names)
    return {
        file: tuple(form for form, names in _QUESTION_FILES.items() if file in {folder / name for name in names})
        for file in files
        if file.is_file()
    }


def _question_file(path: Path, format: str, split: str) -> Path:
    if not path.exists():
        raise CorpusError(f"{path} does not exist; give a question file or the folder of one")
    if path.is_file():
        return path
    names = [name for form in ([format] if format != "auto" else _QUESTION_FILES) for name in _QUESTION_FILES[form]]
    of_split = split != "test" and format in _SPLIT_FILES
    if of_split:
        names = [name.format(split=split) for name in _SPLIT_FILES[format]]
    found = [path / name for name in dict.fromkeys(names) if (path / name).is_file()]
    if len(found) > 1 and format not in ("auto", "unified"):  # a benchmark's own name comes first
        logger.warning("questions are read from %s, not from %s", found[0], _some([str(file) for file in found[1:]]))
        found = found[:1]
    usual = bool(found)
    if not found and not of_split:  # a file of another name might hold the test questions
        found = sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
    if len(found) > 1:
        named = ", ".join(file.relative_to(path).as_posix() for file in found)
        rename = "" if usual else f", or call it {names[0]}"
        raise CorpusError(f"{path} holds several question files: {named}; leave only the one to read there{rename}")
    if not found:
        wanted = " or ".join(names) if format != "auto" else "such as questions.json"
        tables = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _TABLE_SUFFIXES)
        instead = f", not from {_some(tables)}" if tables else ""
        raise CorpusError(
            f"{path} holds no question file ({wanted}); questions are read from JSON or JSON lines{instead}"
        )
    return found[0]


def _read_items(file: Path, problems: list[Problem]) -> list[Any]:
    """The items of a question file; a broken line of a .jsonl file is a problem, a broken .json file an error."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() != ".jsonl":
            content = json.loads(text)
            items = content.get("examples") if isinstance(content, dict) else content
            if not isinstance(items, list):
                raise CorpusError(f"{file} is no question file: neither a list nor an object with a list 'examples'")
            return items
    except OSError as error:
        raise CorpusError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(
            f"{file} is not JSON in UTF-8: {error}; it should hold one list, or an object with a list 'examples'; "
            "objects one a line belong in a .jsonl file"
        ) from error
    items = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            items += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            problems.append(Problem(str(file), f"line {number} is not JSON: {error}"))
    return items


def _form_of(items: Sequence[Any], file: Path) -> str:
    """The format whose own field most items carry."""
    marks = {"unified": "query", "slidevqa": "deck_name", "mmlongbench_doc": "doc_id"}
    counts = {form: sum(isinstance(i, dict) and mark in i for i in items) for form, mark in marks.items()}
    form = max(counts, key=counts.__getitem__)
    if not counts[form]:
        raise CorpusError(f"{file} is in no known question format: no item has {', '.join(marks.values())}")
    return form
