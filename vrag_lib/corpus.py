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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vrag_lib.config import cache_dir as default_cache_dir
from vrag_lib.document_files import (
    CorpusError,
    Problem,
    document_ids,
    document_stem,
    find_documents,
    path_below,
)
from vrag_lib.geometry import Box, Size
from vrag_lib.parallel import WorkerCrash, run_tasks
from vrag_lib.rendering import (
    RenderSettings,
    UnreadableError,
    chunk_file,
    chunk_of,
    chunks,
    inspect_file,
    read_json,
    render_chunk,
)

logger = logging.getLogger(__name__)


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
    """A file with its pages. `id` is the file's name without suffix, `sha256` that of the file's content.

    `settings` tells how its pages were rendered. A document made of page images (`page_pattern`) has their folder as
    its path and a sha256 over theirs.
    """

    id: str
    path: Path
    sha256: str
    pages: tuple[Page, ...]
    settings: str = ""

    @property
    def file_name(self) -> str:
        """What a `Question` about it calls it: the file's name, or the id where that name gives another."""
        return self.path.name if document_stem(self.path.name) == self.id else self.id


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

    @property
    def gold_regions(self) -> tuple[tuple[str, Box], ...]:
        """Page id and box, in raw page pixels, of each of the `regions` of `extra`; empty where none are known.

        Raises ValueError for regions of another form.
        """
        try:
            return tuple(
                (f"{document_stem(self.file_name)}_{region['page']}", Box(*region["region_box"]))
                for region in self.extra.get("regions") or ()
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"regions of question {self.uid!r} need a page and a region_box of four numbers each: {error!r}"
            ) from error


class Corpus:
    """Documents and their pages, sorted by document id, then page number; immutable.

    `problems` names what was left out and why. `files` gives for the path of each file found, below its folder, the id
    of its document: of another file's where the content is the same, so that their pages are, and "" where the corpus
    lacks it; a corpus that was merged or given a prefix knows none. `fingerprint` is equal for equal corpora on every
    machine.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        problems: Iterable[Problem] = (),
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.documents = tuple(sorted(documents, key=lambda document: document.id))
        self.problems = tuple(problems)
        ids = {document.id for document in self.documents}
        self.files = {path: name if name in ids else "" for path, name in (files or {}).items()}
        self.pages = tuple(page for document in self.documents for page in document.pages)
        self.page_ids = tuple(page.id for page in self.pages)
        self._by_id = {page.id: page for page in self.pages}
        if len(self._by_id) != len(self.pages):
            twice = next(page.id for page in self.pages if self._by_id[page.id] is not page)
            raise CorpusError(f"two pages have the id {twice!r}; rename one of the documents")

    def __len__(self) -> int:
        return len(self.pages)

    def __contains__(self, page_id: object) -> bool:
        return page_id in self._by_id

    def __repr__(self) -> str:
        return f"Corpus({len(self.documents)} documents, {len(self.pages)} pages, {len(self.problems)} problems)"

    def page(self, page_id: str) -> Page:
        """The page of that id; CorpusError naming it when there is none."""
        try:
            return self._by_id[page_id]
        except KeyError:
            example = f", such as {self.page_ids[0]!r}" if self.page_ids else ""
            raise CorpusError(
                f"no page {page_id!r} among the {len(self)} pages of this corpus; ids are document_number{example}"
            ) from None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the documents' ids, contents and render settings; text lines do not enter."""
        lines = [f"{document.id}\t{document.sha256}\t{document.settings}\n" for document in self.documents]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def text_fingerprint(self) -> str:
        """sha256 (hex) over the pages' text lines, which OCR changes and `fingerprint` leaves out."""
        digest = hashlib.sha256()
        for page in self.pages:
            digest.update(f"{page.id}\n{page.text}\0".encode(errors="surrogatepass"))
        return digest.hexdigest()

    def with_pages(self, pages: Iterable[Page]) -> Corpus:
        """The same corpus with the given pages in place of those of the same ids (OCR adds lines this way)."""
        new = {page.id: page for page in pages}
        documents = [
            replace(document, pages=tuple(new.get(page.id, page) for page in document.pages))
            for document in self.documents
        ]
        return Corpus(documents, self.problems, self.files)

    def with_problems(self, problems: Iterable[Problem]) -> Corpus:
        """The same corpus with more problems."""
        return Corpus(self.documents, (*self.problems, *problems), self.files)

    def with_documents(self, ids: Collection[str]) -> Corpus:
        """The same corpus without the documents of other ids."""
        return Corpus((document for document in self.documents if document.id in ids), self.problems, self.files)

    def with_prefix(self, prefix: str) -> Corpus:
        """The same corpus with `prefix` before every document id; for merging corpora whose ids clash."""
        documents = []
        for document in self.documents:
            name = prefix + document.id
            pages = tuple(replace(page, id=f"{name}_{page.number}", document_id=name) for page in document.pages)
            documents.append(replace(document, id=name, pages=pages))
        return Corpus(documents, self.problems)

    @classmethod
    def merge(cls, corpora: Iterable[Corpus]) -> Corpus:
        """One corpus of all documents, as the paper evaluates; a document that several hold is taken from the first.

        Raises CorpusError naming a document id that stands for different contents.
        """
        documents: dict[str, Document] = {}
        problems: list[Problem] = []
        for corpus in corpora:
            problems += corpus.problems
            for document in corpus.documents:
                first = documents.setdefault(document.id, document)
                if first.sha256 != document.sha256:
                    raise CorpusError(
                        f"the id {document.id!r} stands for {first.path} and for {document.path}, whose contents "
                        "differ; tell the corpora apart with load_dataset(..., prefix=...) or Corpus.with_prefix"
                    )
        return cls(documents.values(), problems)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        cache_dir: str | Path | None = None,
        dpi: int = 150,
        workers: int = 2,
        page_pattern: str | None = None,
    ) -> Corpus:
        """Render every PDF and image below a folder (or one file) and read its text layer.

        Rendered pages are cached by content under `cache_dir` (default: `config.cache_dir()`), so a second call, or
        one after a kill, does only what is missing. Documents and pages that cannot be read are left out and named in
        `problems`, and so is a document of the same content as another, whose path `files` keeps. Files of one name
        but different content get their folders' names in front (`a/report.pdf` becomes `a_report`).

        `page_pattern` is for documents kept as one image per page: a regular expression for the ends of such file
        names, with a group `number` and, unless the folder's name is the document's, a group `document`.

        Raises CorpusError when the path does not exist, holds no document, or none of them could be read, and for a
        resolution that pages cannot be rendered at.
        """
        if page_pattern is not None and "number" not in re.compile(page_pattern).groupindex:
            raise CorpusError(f"page_pattern {page_pattern!r} needs a group (?P<number>...) for the page's number")
        root = Path(path)
        cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        try:
            settings = RenderSettings(dpi=dpi)
        except ValueError as error:
            raise CorpusError(f"dpi={dpi} (in a config corpus.dpi) cannot be used, 150 is usual: {error}") from error
        problems: list[Problem] = []
        found = find_documents(root, problems)
        sources = _inspect(found, workers, problems)
        folders = {source.sha256: cache / "pages" / f"{source.sha256}-{settings.tag}" for source in sources}
        _render_missing(sources, folders, settings, workers, problems)
        groups = _grouped(sources, page_pattern, problems)
        originals = _originals(groups, problems)
        kept = {path: members for path, members in groups.items() if originals[path] == path}
        ids = document_ids(list(kept), root)
        documents = []
        for path, members in kept.items():
            pages = _load_pages(ids[path], members, folders, problems)
            if pages:
                documents.append(Document(ids[path], path, _digest(members), pages, settings.tag))
        for problem in problems:
            logger.warning("left out: %s", problem)
        if not documents:
            reasons = "; ".join(str(problem) for problem in problems[:5])
            raise CorpusError(f"none of the documents in {root} could be read: {reasons}")
        unread = set(found) - {source.path for source in sources}
        files = {path_below(path, root): ids[original] for path, original in originals.items()}
        return cls(documents, problems, files | {path_below(path, root): "" for path in sorted(unread)})


class _Source(NamedTuple):
    """A readable file."""

    path: Path
    sha256: str
    page_count: int


class _Member(NamedTuple):
    """A page of a document: its number there, and the file and page of the file that it comes from."""

    number: int
    source: _Source
    source_page: int


def _inspect(files: Sequence[Path], workers: int, problems: list[Problem]) -> list[_Source]:
    """The readable files, in the order given."""
    results = dict(run_tasks(inspect_file, [(str(file),) for file in files], workers, "reading documents", "file"))
    for index, file in enumerate(files):
        if isinstance(results[index], Exception):
            problems.append(Problem(str(file), _reason(results[index])))
    return [_Source(file, *results[i]) for i, file in enumerate(files) if not isinstance(results[i], Exception)]


def _render_missing(
    sources: Sequence[_Source],
    folders: dict[str, Path],
    settings: RenderSettings,
    workers: int,
    problems: list[Problem],
) -> None:
    tasks = {}
    for source in sources:
        folder = folders[source.sha256]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CorpusError(
                f"the cache folder {folder.parent} cannot be written ({error.strerror}); name another as cache_dir or "
                "in the environment variable VRAG_CACHE"
            ) from error
        present = set(os.listdir(folder))
        for first, last in chunks(source.page_count):
            records = read_json(chunk_file(folder, first))
            if records is None or any("size" in r and f"{n}.jpg" not in present for n, r in records.items()):
                tasks[folder, first] = (str(source.path), str(folder), first, last, settings)
    todo = list(tasks.values())
    sizes = [last - first + 1 for _, _, first, last, _ in todo]
    for index, result in run_tasks(render_chunk, todo, workers, "rendering pages", "page", sizes):
        if isinstance(result, Exception):
            path, _, first, last, _ = todo[index]
            problems.append(Problem(path, f"pages {first}-{last}: {_reason(result)}"))


def _grouped(
    sources: Iterable[_Source], page_pattern: str | None, problems: list[Problem]
) -> dict[Path, list[_Member]]:
    """The pages of each document, by the path that names it: a file's own, or that of a set of page images."""
    groups: dict[Path, list[_Member]] = {}
    pattern = re.compile(f"(?:{page_pattern})$") if page_pattern else None
    for source in sources:
        match = pattern.search(source.path.name) if pattern and source.path.suffix.lower() != ".pdf" else None
        if not match:
            groups[source.path] = [_Member(number, source, number) for number in range(1, source.page_count + 1)]
            continue
        folder = source.path.parent
        members = groups.setdefault(folder / match["document"] if "document" in pattern.groupindex else folder, [])
        member = _Member(int(match["number"]), source, 1)
        same = next((other for other in members if other.number == member.number), None)
        if same:
            problems.append(Problem(str(source.path), f"its page, {member.number}, is {same.source.path} already"))
        else:
            members.append(member)
    return {path: sorted(members) for path, members in groups.items()}


def _digest(members: Sequence[_Member]) -> str:
    """The sha256 of a document's content: its file's, or one over its page images' with their numbers."""
    if members[0].number == 1 and len({member.source.path for member in members}) == 1:
        return members[0].source.sha256
    text = "".join(f"{member.number} {member.source.sha256}\n" for member in members)
    return hashlib.sha256(text.encode()).hexdigest()


def _originals(groups: dict[Path, list[_Member]], problems: list[Problem]) -> dict[Path, Path]:
    """For each document the first one of the same content, itself as a rule; the others are added to `problems`."""
    first: dict[str, Path] = {}
    originals = {path: first.setdefault(_digest(members), path) for path, members in groups.items()}
    for path, original in originals.items():
        if path != original:
            problems.append(Problem(str(path), f"same content as {original}, which is kept"))
    return originals


def _load_pages(
    document_id: str, members: Sequence[_Member], folders: dict[str, Path], problems: list[Problem]
) -> tuple[Page, ...]:
    """The pages that the cache holds; those that could not be rendered are added to `problems`."""
    pages = []
    records: dict[Path, dict[str, Any]] = {}  # of the chunk read last
    for number, source, source_page in members:
        folder = folders[source.sha256]
        chunk = chunk_file(folder, chunk_of(source_page))
        if chunk not in records:
            records = {chunk: read_json(chunk) or {}}
        record = records[chunk].get(str(source_page))
        if record is None:  # its whole chunk failed and was named then
            continue
        if "error" in record:
            problems.append(Problem(str(source.path), record["error"]))
            continue
        lines = tuple(TextLine(text, Box(*box)) for text, *box in record["lines"])
        image, size = folder / f"{source_page}.jpg", Size(*record["size"])
        page_id, text_source = f"{document_id}_{number}", "layer" if lines else "none"
        pages.append(Page(page_id, document_id, number, image, size, lines, text_source))
    return tuple(pages)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UnreadableError | WorkerCrash) else f"{type(error).__name__}: {error}"
