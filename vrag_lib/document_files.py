"""Which files are documents and what they are called: one rule for document ids, in corpora and in questions."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from vrag_lib.rendering import IMAGE_SUFFIXES, PDF_SUFFIXES

logger = logging.getLogger(__name__)

UNREAD_SUFFIXES = (
    ".docx", ".doc", ".odt", ".rtf", ".pages", ".pptx", ".ppt", ".odp", ".xlsx", ".xls", ".ods", ".epub", ".mobi",
    ".djvu", ".xps", ".ps", ".eps", ".svg", ".heic", ".heif", ".avif", ".gif",
)  # fmt: skip
"""Of files that their owner may take for documents. Notes, .csv, .json and .html, which `vrag` writes itself, are not
among them: they lie beside those."""


class CorpusError(ValueError):
    """Input from which no corpus can be made, or a page that a corpus does not hold; the message says the remedy."""


@dataclass(frozen=True)
class Problem:
    """A document, page or item that was left out, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def document_stem(file_name: str) -> str:
    """The document id of a file name: without folders and document suffix, other dots kept, safe as a file name.

    >>> document_stem("2023.acl-long.386.pdf"), document_stem("deck.v2_95"), document_stem("a/b.PDF")
    ('2023.acl-long.386', 'deck.v2_95', 'b')
    """
    name = re.split(r"[/\\\\]", unicodedata.normalize("NFC", file_name))[-1]
    if name.lower().endswith(PDF_SUFFIXES + IMAGE_SUFFIXES):
        name = name[: name.rindex(".")]
    return _safe(name)


def _safe(name: str) -> str:
    # Halves of surrogate pairs stand for bytes that are no UTF-8, as in names from old archives.
    name = unicodedata.normalize("NFC", name).encode("utf-8", "replace").decode()
    return re.sub(r'[\x00-\x1f\x7f<>:"|?*\\/]', "_", name)


def find_documents(root: Path, problems: list[Problem] | None = None) -> list[Path]:
    """Every PDF and image file below `root` (or `root` itself), sorted by path; hidden files and folders are left out.

    Folders that cannot be listed are added to `problems`; documents of other kinds are counted in the log. Raises
    CorpusError when `root` does not exist or holds no document.
    """
    suffixes = PDF_SUFFIXES + IMAGE_SUFFIXES
    if not root.exists():
        raise CorpusError(f"{root} does not exist; give a folder of PDFs or images, or one such file")
    if not root.is_dir():
        if not root.name.lower().endswith(suffixes):
            raise CorpusError(f"{root} is not a document; a document's name ends in one of {', '.join(suffixes)}")
        return [root]

    def unlisted(error: OSError) -> None:
        if problems is not None:
            problems.append(Problem(str(error.filename), f"the folder cannot be listed: {error.strerror}"))

    files: list[Path] = []
    unread: list[str] = []
    seen: set[str] = set()  # a link to a folder above would otherwise be followed for ever
    for folder, subfolders, names in os.walk(root, onerror=unlisted, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [] if real in seen else [name for name in subfolders if not name.startswith(".")]
        if real not in seen:
            files += [Path(folder, name) for name in [*names, *subfolders] if name.lower().endswith(suffixes)]
            unread += [name for name in names if name.lower().endswith(UNREAD_SUFFIXES)]
        seen.add(real)
    files = sorted(file for file in files if not file.name.startswith("."))
    unread = sorted(name for name in unread if not name.startswith((".", "~$")))  # ~$: an office program's lock
    read = ", ".join(suffixes)
    others = f"{', '.join(unread[:3])} ({len(unread)} in all); convert to PDF what belongs to the documents"
    if not files:
        raise CorpusError(
            f"{root} holds no document; put PDFs or images ({read}) into it"
            + (f"; not read are {others}" if unread else "")
        )
    if unread:
        logger.warning("files in %s that are not read, being none of %s: %s", root, read, others)
    return files


def path_below(file: Path, root: Path) -> str:
    """The path of a file below `root`, with slashes; its name where it is `root` itself."""
    return file.relative_to(root).as_posix() if file != root else file.name


def files_meant(name: str, paths: Iterable[str]) -> list[str]:
    """Which of some files, given by their paths below the folder and equal in `document_stem`, a question's file name
    means; several where it does not tell.

    Best fits whose path ends as the name does or the other way round, in the more folders the better; then whose suffix
    is the name's too; then who lies in no further folders. Where no folders fit, they are those of another place.

    >>> files_meant("a/x.pdf", ["a/x.pdf", "b/x.pdf", "x.pdf"]), files_meant("documents/x.pdf", ["a/x.pdf", "x.pdf"])
    (['a/x.pdf'], ['x.pdf'])
    >>> files_meant("x.pdf", ["a/x.pdf", "b/x.pdf"]), files_meant("elsewhere/x.pdf", ["a/x.pdf"])
    (['a/x.pdf', 'b/x.pdf'], ['a/x.pdf'])
    """
    *asked, file_name = _parts(name)
    fits: dict[str, tuple[int, bool, bool]] = {}
    for path in paths:
        *folders, last = _parts(path)
        both = min(len(asked), len(folders))
        shared = both if asked[len(asked) - both :] == folders[len(folders) - both :] else -1
        fits[path] = shared, last == file_name, shared == len(folders)
    best = max(fits.values(), default=None)
    return [path for path, fit in fits.items() if fit == best]


def _parts(path: str) -> list[str]:
    return [_safe(part) for part in re.split(r"[/\\]", path) if part not in ("", ".")] or [""]


def own_id(file: Path) -> str:
    """The document id that a file would have if no other were there."""
    return document_stem(file.name or Path(os.path.abspath(file)).name)


def document_ids(files: Sequence[Path], root: Path) -> dict[Path, str]:
    """An id per file: its stem where that is unique, else its path below `root` joined by `_`, else that with its
    suffix and, last, with a number in path order.

    >>> ids = document_ids([Path("r/a/x.pdf"), Path("r/b/x.pdf"), Path("r/b/x.png"), Path("r/y.pdf")], Path("r"))
    >>> sorted(ids.values())
    ['a_x', 'b_x_pdf', 'b_x_png', 'y']
    """

    def below(file: Path) -> str:
        folders = file.relative_to(root).parts[:-1] if file != root else ()
        return "_".join([*(_safe(folder) for folder in folders), own_id(file)])

    def below_with_suffix(file: Path) -> str:
        return f"{below(file)}_{file.suffix[1:]}"

    ids: dict[Path, str] = {}
    taken: set[str] = set()
    left = list(files)
    for rule in (own_id, below, below_with_suffix):
        names = Counter(rule(file) for file in left)
        ids |= {file: rule(file) for file in left if names[rule(file)] == 1 and rule(file) not in taken}
        taken |= set(ids.values())
        left = [file for file in left if file not in ids]
    for file in left:
        ids[file] = next(name for n in count(1) if (name := f"{below_with_suffix(file)}_{n}") not in taken)
        taken.add(ids[file])
    return ids
