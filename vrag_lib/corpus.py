"""Documents, pages and questions, and the corpus that holds them.

A corpus is made of a folder of PDFs and images (`Corpus.from_folder`); page images and text lines come from the cache
that `rendering` fills, so images are never held in memory. Page ids are `{document id}_{1-based number}`, the naming
of the paper's corpora, and the document id is the file's name without its last suffix: dots before it stay (trap T14).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from vrag_lib.config import cache_dir as default_cache_dir
from vrag_lib.geometry import Box, Size
from vrag_lib.parallel import run_tasks
from vrag_lib.rendering import (
    CHUNK_PAGES,
    IMAGE_SUFFIXES,
    PDF_SUFFIXES,
    RenderSettings,
    chunk_file,
    chunks,
    inspect_file,
    read_json,
    render_chunk,
)

logger = logging.getLogger(__name__)


class CorpusError(ValueError):
    """Input from which no corpus can be made, or a page that a corpus does not hold; the message says the remedy."""


@dataclass(frozen=True)
class Problem:
    """A document, page or item that was left out, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class TextLine:
    """One line of text on a page and its box in raw page pixels."""

    text: str
    box: Box


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a document. `size` is that of the image at `image_path`: the raw frame of all its boxes.

    `text_source` is `layer` (the PDF's own text), `ocr` (read off the image) or `none`.
    """

    id: str
    document_id: str
    number: int
    image_path: Path
    size: Size
    lines: tuple[TextLine, ...] = ()
    text_source: str = "none"

    @property
    def text(self) -> str:
        """The lines, one below the other, in reading order as far as the source tells it."""
        return "\n".join(line.text for line in self.lines)

    def open_image(self) -> Image.Image:
        """The page image, RGB, of `size`. CorpusError when the cached file is gone or damaged."""
        try:
            with Image.open(self.image_path) as image:
                loaded = image.convert("RGB")
        except OSError as error:
            raise CorpusError(
                f"the image of page {self.id!r} cannot be read from {self.image_path} ({error}); build the corpus "
                "again with Corpus.from_folder to render it anew"
            ) from error
        if loaded.size != (self.size.width, self.size.height):
            raise CorpusError(
                f"the image of page {self.id!r} at {self.image_path} is {loaded.size[0]} x {loaded.size[1]} pixels, "
                f"not {self.size.width} x {self.size.height}; delete it and build the corpus again"
            )
        return loaded


@dataclass(frozen=True)
class Document:
    """A file with its pages; `sha256` is of the file's content, `id` the file's name without its last suffix."""

    id: str
    path: Path
    sha256: str
    pages: tuple[Page, ...]


@dataclass(frozen=True)
class Question:
    """A question in the unified item format; `reference_pages` are 1-based pages of `file_name`.

    >>> Question("q1", "Who?", "Ann", "2023.acl-long.386.pdf", (4,)).gold_page_ids
    ('2023.acl-long.386_4',)
    """

    uid: str
    query: str
    reference_answer: str
    file_name: str = ""
    reference_pages: tuple[int, ...] = ()
    source_type: str = ""
    query_type: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def gold_page_ids(self) -> tuple[str, ...]:
        """Page ids of the reference pages."""
        return tuple(f"{document_stem(self.file_name)}_{number}" for number in self.reference_pages)


class Corpus:
    """Documents and their pages, sorted by document id, then page number; immutable.

    `problems` names what was left out and why. `fingerprint` is a sha256 over the documents' ids, contents and render
    settings: equal corpora have equal fingerprints on every machine.
    """

    def __init__(self, documents: Iterable[Document], problems: Iterable[Problem] = (), settings_tag: str = "") -> None:
        self.documents = tuple(sorted(documents, key=lambda document: document.id))
        self.problems = tuple(problems)
        self.settings_tag = settings_tag
        self.pages = tuple(page for document in self.documents for page in document.pages)
        self.page_ids = tuple(page.id for page in self.pages)
        self._by_id = {page.id: page for page in self.pages}
        if len(self._by_id) != len(self.pages):
            twice = next(page.id for page in self.pages if self._by_id[page.id] is not page)
            raise CorpusError(f"two pages are called {twice!r}; rename one of the documents")

    def __len__(self) -> int:
        return len(self.pages)

    def __repr__(self) -> str:
        return f"Corpus({len(self.documents)} documents, {len(self.pages)} pages, {len(self.problems)} problems)"

    def __contains__(self, page_id: object) -> bool:
        return page_id in self._by_id

    def page(self, page_id: str) -> Page:
        """The page of that id; CorpusError naming it when there is none."""
        try:
            return self._by_id[page_id]
        except KeyError:
            raise CorpusError(
                f"no page {page_id!r} among the {len(self.pages)} pages of this corpus (ids are document_number, "
                f"such as {self.page_ids[0]!r})"
            ) from None

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over document ids, file contents and render settings; text lines do not enter."""
        digest = hashlib.sha256(self.settings_tag.encode())
        for document in self.documents:
            digest.update(f"\n{document.id}\t{document.sha256}".encode())
        return digest.hexdigest()

    def with_pages(self, pages: Iterable[Page]) -> Corpus:
        """The same corpus with the given pages in place of those of the same ids (OCR adds lines this way)."""
        new = {page.id: page for page in pages}
        documents = [
            replace(document, pages=tuple(new.get(page.id, page) for page in document.pages))
            for document in self.documents
        ]
        return Corpus(documents, self.problems, self.settings_tag)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        cache_dir: str | Path | None = None,
        dpi: int = 150,
        workers: int = 2,
        settings: RenderSettings | None = None,
    ) -> Corpus:
        """Render every PDF and image below a folder (or one file) and read its text layer.

        Rendered pages are cached by content under `cache_dir` (default: `config.cache_dir()`), so a second call, or
        one after a kill, does only what is missing. Documents and pages that cannot be read are left out and named in
        `problems`. A file of the same content as another is left out too; files of one name and different content
        get their folders' names in front (`a/report.pdf` → `a_report`).

        Raises CorpusError when the path does not exist, holds no document, or none of them could be read.
        """
        settings = settings or RenderSettings(dpi=dpi)
        root = Path(path)
        cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        files = find_documents(root)
        problems: list[Problem] = []
        found = _without_duplicates(_inspect(files, workers, problems), problems)
        ids = document_ids([file for file, _, _ in found], root)
        folders = {sha256: cache / "pages" / f"{sha256}-{settings.tag}" for _, sha256, _ in found}
        _render_missing(found, folders, settings, workers, problems)
        documents = []
        for file, sha256, page_count in found:
            pages, errors = _load_pages(ids[file], folders[sha256], page_count)
            problems += [Problem(str(file), error) for error in errors]
            if pages:
                documents.append(Document(ids[file], file, sha256, pages))
        for problem in problems:
            logger.warning("left out: %s", problem)
        if not documents:
            reasons = "; ".join(str(problem) for problem in problems[:5])
            raise CorpusError(f"none of the {len(files)} documents in {root} could be read: {reasons}")
        return cls(documents, problems, settings.tag)


def document_stem(file_name: str) -> str:
    """The document id of a file name: without folders and document suffix, other dots kept, safe as a file name.

    >>> document_stem("2023.acl-long.386.pdf"), document_stem("deck.v2_95"), document_stem("a/b.PDF")
    ('2023.acl-long.386', 'deck.v2_95', 'b')
    """
    name = re.split(r"[/\\\\]", unicodedata.normalize("NFC", file_name))[-1]
    if name.lower().endswith(PDF_SUFFIXES + IMAGE_SUFFIXES):
        name = name[: name.rindex(".")]
    return re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", name)


def find_documents(root: Path) -> list[Path]:
    """Every PDF and image file below `root` (or `root` itself), sorted by path; hidden files and folders are left out.

    Raises CorpusError when `root` does not exist or holds none.
    """
    suffixes = PDF_SUFFIXES + IMAGE_SUFFIXES
    if not root.exists():
        raise CorpusError(f"{root} does not exist; give a folder of PDFs or images, or one such file")
    if not root.is_dir():
        if not root.name.lower().endswith(suffixes):
            raise CorpusError(f"{root} is not a document; it must end in one of {', '.join(suffixes)}")
        return [root]
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found = [name for name in names + subfolders if name.lower().endswith(suffixes) and not name.startswith(".")]
        files += [Path(folder) / name for name in found]
    if not files:
        raise CorpusError(f"{root} holds no document; put PDFs or images ({', '.join(suffixes)}) in it")
    return sorted(files)


def document_ids(files: Sequence[Path], root: Path) -> dict[Path, str]:
    """An id per file: its stem where that is unique, else its path below `root` joined by `_`, else that with its
    suffix and, last, with a number in path order.

    >>> ids = document_ids([Path("r/a/x.pdf"), Path("r/b/x.pdf"), Path("r/b/x.png"), Path("r/y.pdf")], Path("r"))
    >>> list(ids.values())
    ['a_x', 'b_x_pdf', 'b_x_png', 'y']
    """

    def below(file: Path) -> str:
        parts = file.relative_to(root).parts if file != root else (file.name,)
        return "_".join([*parts[:-1], document_stem(file.name)])

    rules = [
        lambda file: document_stem(file.name),
        below,
        lambda file: f"{below(file)}_{file.suffix[1:]}",
    ]
    ids: dict[Path, str] = {}
    left = list(files)
    for rule in rules:
        names = Counter(rule(file) for file in left)
        clear = [file for file in left if names[rule(file)] == 1 and rule(file) not in ids.values()]
        ids.update({file: rule(file) for file in clear})
        left = [file for file in left if file not in ids]
    for file in left:
        number = next(n for n in count(1) if f"{rules[-1](file)}_{n}" not in ids.values())
        ids[file] = f"{rules[-1](file)}_{number}"
    return {file: ids[file] for file in files}


def _inspect(files: Sequence[Path], workers: int, problems: list[Problem]) -> list[tuple[Path, str, int]]:
    """`(file, sha256, page count)` of the readable files, in the order given."""
    results = dict(run_tasks(inspect_file, [(str(file),) for file in files], workers, "reading documents", "file"))
    found = []
    for index, file in enumerate(files):
        if isinstance(results[index], Exception):
            problems.append(Problem(str(file), str(results[index])))
        else:
            found.append((file, *results[index]))
    return found


def _without_duplicates(found: list[tuple[Path, str, int]], problems: list[Problem]) -> list[tuple[Path, str, int]]:
    first: dict[str, Path] = {}
    for file, sha256, _ in found:
        if first.setdefault(sha256, file) != file:
            problems.append(Problem(str(file), f"same content as {first[sha256]}; kept once"))
    return [entry for entry in found if first[entry[1]] == entry[0]]


def _render_missing(
    found: list[tuple[Path, str, int]],
    folders: dict[str, Path],
    settings: RenderSettings,
    workers: int,
    problems: list[Problem],
) -> None:
    tasks = []
    for file, sha256, page_count in found:
        folder = folders[sha256]
        folder.mkdir(parents=True, exist_ok=True)
        present = set(os.listdir(folder))
        for first, last in chunks(page_count):
            records = read_json(chunk_file(folder, first))
            if records is None or any("size" in r and f"{n}.jpg" not in present for n, r in records.items()):
                tasks.append((str(file), str(folder), first, last, settings))
    for index, result in run_tasks(render_chunk, tasks, workers, "rendering pages", f"x{CHUNK_PAGES} pages"):
        if isinstance(result, Exception):
            file, _, first, last, _ = tasks[index]
            problems.append(Problem(file, f"pages {first}-{last}: {result}"))


def _load_pages(document_id: str, folder: Path, page_count: int) -> tuple[tuple[Page, ...], list[str]]:
    """The pages that the cache holds, and the reasons of those that could not be rendered."""
    pages, errors = [], []
    for first, _ in chunks(page_count):
        for name, record in (read_json(chunk_file(folder, first)) or {}).items():
            if "error" in record:
                errors.append(record["error"])
                continue
            lines = tuple(TextLine(text, Box(*box)) for text, *box in record["lines"])
            source = "layer" if lines else "none"
            pages.append(
                Page(
                    f"{document_id}_{name}",
                    document_id,
                    int(name),
                    folder / f"{name}.jpg",
                    Size(*record["size"]),
                    lines,
                    source,
                )
            )
    return tuple(pages), errors
