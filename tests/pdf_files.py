"""Small PDF files written by hand for the corpus tests: each feature is one the writer spells out itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PdfPage:
    """A page: `text` pieces are (x, y, font size, string) from the lower left, in points; `content` is drawn as is;
    `filled` are (x, y, value) of fields of a form."""

    text: Sequence[tuple[float, float, float, str]] = ()
    size: tuple[float, float] = (300, 400)
    rotate: int = 0
    crop: tuple[float, float, float, float] | None = None
    content: str = ""
    filled: Sequence[tuple[float, float, str]] = ()
    missing: bool = False


def write_pdf(path: Path, pages: Sequence[PdfPage], encrypted: bool = False, to_unicode: str = "") -> Path:
    """A PDF with Helvetica text. `encrypted` asks for a password; `to_unicode` maps every A-Z to that code (hex)."""
    objects: dict[int, bytes] = {}
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding"
    if to_unicode:
        cmap = (
            "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /M def /CMapType 2 def "
            "1 begincodespacerange <00> <FF> endcodespacerange 26 beginbfchar "
            + " ".join(f"<{code:02X}> <{to_unicode}>" for code in range(65, 91))
            + " endbfchar endcmap end end"
        ).encode()
        objects[4] = b"<< /Length %d >> stream\n%s\nendstream" % (len(cmap), cmap)
        font += " /ToUnicode 4 0 R"
    objects[3] = f"{font} >>".encode()
    kids, fields = [], []
    for index, page in enumerate(pages):
        number, content = 10 + 2 * index, 11 + 2 * index
        kids.append(f"{number} 0 R")
        if page.missing:
            continue
        width, height = page.size
        crop = f"/CropBox [{' '.join(map(str, page.crop))}]" if page.crop else ""
        objects[number] = (
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] {crop} /Rotate {page.rotate} "
            f"/Contents {content} 0 R /Resources << /Font << /F 3 0 R >> >> "
            f"/Annots [{' '.join(f'{500 + len(fields) + k} 0 R' for k in range(len(page.filled)))}] >>"
        ).encode()
        for x, y, value in page.filled:
            objects[500 + len(fields)] = (
                f"<< /Type /Annot /Subtype /Widget /FT /Tx /T (field{len(fields)}) /V ({value}) /F 4 "
                f"/DA (/F 16 Tf 0 g) /Rect [{x} {y} {x + 200} {y + 24}] /P {number} 0 R >>"
            ).encode()
            fields.append(f"{500 + len(fields)} 0 R")
        shown = [f"BT /F {size} Tf {x} {y} Td ({string}) Tj ET" for x, y, size, string in page.text]
        stream = "\n".join([*shown, page.content]).encode("latin-1")
        objects[content] = b"<< /Length %d >> stream\n%s\nendstream" % (len(stream), stream)
    form = f"/AcroForm << /Fields [{' '.join(fields)}] /DR << /Font << /F 3 0 R >> >> >>" if fields else ""
    objects[1] = f"<< /Type /Catalog /Pages 2 0 R {form} >>".encode()
    objects[2] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(pages)} >>".encode()
    trailer = "/Root 1 0 R"
    if encrypted:
        objects[5] = b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (b"11" * 32, b"22" * 32)
        trailer += f" /Encrypt 5 0 R /ID [<{'33' * 16}> <{'33' * 16}>]"
    body, offsets = bytearray(b"%PDF-1.4\n"), {}
    for number in sorted(objects):
        offsets[number] = len(body)
        body += b"%d 0 obj\n%s\nendobj\n" % (number, objects[number])
    start, size = len(body), max(objects) + 1
    entries = [b"%010d 00000 n \n" % offsets[n] if n in offsets else b"0000000000 65535 f \n" for n in range(size)]
    body += b"xref\n0 %d\n%s" % (size, b"".join(entries))
    body += f"trailer << /Size {size} {trailer} >>\nstartxref\n{start}\n%%EOF\n".encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


def words_pdf(path: Path, *pages: str) -> Path:
    """A PDF with one line of text on each page."""
    return write_pdf(path, [PdfPage([(30, 300, 20, text)]) for text in pages])
