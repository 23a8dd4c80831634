"""PDF and image files to page images and text lines, in worker processes, cached by content.

pdfium (through pypdfium2) renders and reads the text layer; no system package is needed. pdfium is not thread-safe
and may crash on hostile files, so documents are opened in worker processes and never in the caller's.

The cache of one document is the folder `<cache>/pages/<sha256 of the file>-<settings>/`: `{number}.jpg` for each page,
then, after each chunk of pages, `pages_{first}.json` with their sizes and lines. Each file is written under a temporary
name and then moved into place, so a killed run resumes at the next chunk, and two processes that build the same
document at once do no harm.

Deviation: the released code renders with poppler (pdf2image, 200 dpi); pdfium at 150 dpi is used here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c
from PIL import Image, ImageOps

from vrag_lib.text_layer import page_text_lines

PDF_SUFFIXES = (".pdf",)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
CHUNK_PAGES = 32
"""Pages rendered by one task: the unit of resumption, and of sharing one long PDF among workers."""

MAX_IMAGE_PIXELS = 150_000_000
"""An image file that would decode to more pixels than this is refused as a decompression bomb."""

MAX_PAGE_ASPECT = 200
"""Qwen's image processor refuses a larger ratio of sides, so such a page could never be shown."""

_CACHE_VERSION = 3  # raise when the files written below change in content or form
_PDF_ERRORS = {
    2: "the file cannot be read",
    3: "not a PDF, or broken beyond repair",
    4: "encrypted: a password is needed to open it",
    5: "encrypted in a way that is not supported",
}


class UnreadableError(ValueError):
    """A document or a page that cannot be read; the message is the reason alone."""


@dataclass(frozen=True)
class RenderSettings:
    """How a page becomes an image: `dpi`, lowered where the longest side would exceed `max_side` pixels."""

    dpi: int = 150
    max_side: int = 3508
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        if not (1 <= self.dpi <= 2400 and 28 <= self.max_side <= 20_000 and 1 <= self.jpeg_quality <= 100):
            raise ValueError(f"{self} is out of range: dpi 1-2400, max_side 28-20000, jpeg_quality 1-100")

    @property
    def tag(self) -> str:
        """The settings and the cache's version as part of a folder name."""
        return f"dpi{self.dpi}-side{self.max_side}-q{self.jpeg_quality}-v{_CACHE_VERSION}"


def inspect_file(path: str) -> tuple[str, int]:
    """The sha256 (hex) of a document and its number of pages; UnreadableError when it has none to give."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise UnreadableError("the file is empty (0 bytes)")
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from error
    with _opened(path) as document:
        if isinstance(document, pdfium.PdfDocument):
            page_count = len(document)
        else:  # frames of other formats are animations or previews, not pages
            page_count = document.n_frames if document.format == "TIFF" else 1
    return sha256, page_count


def render_chunk(path: str, folder: str, first: int, last: int, settings: RenderSettings) -> None:
    """Render pages `first`..`last` (1-based, inclusive) of a document into `folder`, one in memory at a time.

    A page that fails is recorded with its reason in place of size and lines; the others go on.
    """
    records: dict[str, dict[str, Any]] = {}
    with _opened(path) as document:
        for number in range(first, last + 1):
            try:
                image, lines = _render_page(document, number, settings)
            except (UnreadableError, pdfium.PdfiumError, OSError, ValueError, SyntaxError) as error:
                records[str(number)] = {"error": f"page {number}: {error}"}
                continue
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG", quality=settings.jpeg_quality)
            write_atomically(Path(folder) / f"{number}.jpg", jpeg.getvalue())
            records[str(number)] = {"size": image.size, "lines": lines}
    write_json(chunk_file(folder, first), records)


def chunks(page_count: int) -> list[tuple[int, int]]:
    """The first and last page (1-based, inclusive) of each chunk of a document.

    >>> chunks(40)
    [(1, 32), (33, 40)]
    """
    return [(first, min(first + CHUNK_PAGES - 1, page_count)) for first in range(1, page_count + 1, CHUNK_PAGES)]


def chunk_of(number: int) -> int:
    """The first page of the chunk that page `number` belongs to.

    >>> chunk_of(1), chunk_of(32), chunk_of(33)
    (1, 1, 33)
    """
    return (number - 1) // CHUNK_PAGES * CHUNK_PAGES + 1


def chunk_file(folder: str | Path, first: int) -> Path:
    """Where the sizes and lines of the chunk that begins at page `first` are kept."""
    return Path(folder) / f"pages_{first}.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that no reader, and no later run, ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:  # unlike tempfile's, readable by others as the umask says
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` of compact UTF-8 JSON."""
    write_atomically(path, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def read_json(path: Path) -> Any | None:
    """The JSON of a cache file; None when it is missing or damaged, so that the caller builds it anew."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


@contextmanager
def _opened(path: str) -> Iterator[pdfium.PdfDocument | Image.Image]:
    if path.lower().endswith(PDF_SUFFIXES):
        document: pdfium.PdfDocument | Image.Image = _open_pdf(path)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                document = Image.open(path)
        except Image.DecompressionBombError as error:
            raise UnreadableError(f"too large: {error}") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise UnreadableError(f"not a readable image: {error}") from error
    with closing(document):
        yield document


def _open_pdf(path: str) -> pdfium.PdfDocument:
    raw = pdfium_c.FPDF_LoadDocument(os.fsencode(path), None)
    if not raw:
        error = pdfium_c.FPDF_GetLastError()
        raise UnreadableError(_PDF_ERRORS.get(error, f"pdfium cannot open it (error {error})"))
    document = pdfium.PdfDocument(raw)
    document.init_forms()  # before anything else is asked of it: what was filled into a form is then drawn, too
    if len(document) == 0:  # asked here because pdfium's last error, from whichever file, would be blamed for it
        document.close()
        raise UnreadableError("the document has no pages")
    return document


def _render_page(
    document: pdfium.PdfDocument | Image.Image, number: int, settings: RenderSettings
) -> tuple[Image.Image, list[list]]:
    if not isinstance(document, pdfium.PdfDocument):
        return _render_frame(document, number, settings), []
    with closing(document[number - 1]) as page:
        image = _draw(page, settings)
        if not _is_form(document, page):
            return image, page_text_lines(page, *image.size)
        # What was filled in is drawn, but no text before it is made part of the page; that drops other annotations.
        pdfium_c.FPDFPage_Flatten(page, pdfium_c.FLAT_NORMALDISPLAY)
    with closing(document[number - 1]) as page:
        return image, page_text_lines(page, *image.size)


def _is_form(document: pdfium.PdfDocument, page: pdfium.PdfPage) -> bool:
    """Whether the page has fields of a form."""
    if document.formenv is None:
        return False
    annotations = (pdfium_c.FPDFPage_GetAnnot(page, i) for i in range(pdfium_c.FPDFPage_GetAnnotCount(page)))
    kinds = []
    for annotation in filter(None, annotations):
        kinds.append(pdfium_c.FPDFAnnot_GetSubtype(annotation))
        pdfium_c.FPDFPage_CloseAnnot(annotation)
    return pdfium_c.FPDF_ANNOT_WIDGET in kinds


def _draw(page: pdfium.PdfPage, settings: RenderSettings) -> Image.Image:
    width, height = page.get_size()
    _check_sides(width, height)
    scale = min(settings.dpi / 72, (settings.max_side - 1) / max(width, height))
    with closing(page.render(scale=scale, rev_byteorder=True)) as bitmap:
        return bitmap.to_pil().convert("RGB")


def _render_frame(document: Image.Image, number: int, settings: RenderSettings) -> Image.Image:
    document.seek(number - 1)
    _check_sides(*document.size)
    if document.width * document.height > MAX_IMAGE_PIXELS:
        raise UnreadableError(f"too large: {document.width} x {document.height} pixels")
    image = ImageOps.exif_transpose(document)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    elif image.mode.startswith(("I", "F")):  # grey of more than 8 bits, which PIL's conversion would clip, not scale
        scale = _to_8_bits(image)
        image = image.point(lambda value: value * scale).convert("L")
    image = image.convert("RGB")
    image.thumbnail((settings.max_side, settings.max_side), Image.Resampling.LANCZOS)
    return image


def _to_8_bits(image: Image.Image) -> float:
    """What grey values are multiplied by: as for 16 bits where the mode says so, else by the range that they lie in."""
    high = image.getextrema()[1]
    if image.mode.startswith("I;16") or 255 < high <= 65535:
        return 1 / 256
    if high <= 1 and image.mode == "F":
        return 255.0
    return 1.0 if high <= 255 else 255 / high


def _check_sides(width: float, height: float) -> None:
    if not (min(width, height) > 0 and max(width, height) / min(width, height) <= MAX_PAGE_ASPECT):
        raise UnreadableError(f"{width:g} x {height:g} is no page that could be shown (ratio above {MAX_PAGE_ASPECT})")
