"""Documents, pages and questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from vrag_lib.geometry import Box, Size


@dataclass(frozen=True)
class TextLine:
    """One line of text on a page and its box in raw page pixels."""

    text: str
    box: Box


@dataclass(frozen=True)
class Page:
    """One page of a document. `id` is `{document id}_{1-based number}`, the naming of the paper's corpora."""

    id: str
    document_id: str
    number: int
    image_path: Path
    size: Size
    lines: tuple[TextLine, ...] = ()
    text_source: str = "none"

    @property
    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)

    def open_image(self) -> Image.Image: ...


@dataclass(frozen=True)
class Document:
    id: str
    path: Path
    sha256: str
    pages: tuple[Page, ...]


@dataclass(frozen=True)
class Question:
    """A question in the unified item format."""

    uid: str
    query: str
    reference_answer: str
    file_name: str = ""
    reference_pages: tuple[int, ...] = ()
    source_type: str = ""
    query_type: str = ""
    extra: dict = field(default_factory=dict)


class Corpus:
    """Pages by id."""
