"""Write canvases as a PDF: vector shapes, embedded subset fonts, a real text layer; or a page as a mere picture.

The page size in points is chosen so that rendering at `dpi` gives back exactly the canvas's raw pixels: boxes drawn
by MiniDocs stay true for pages that went through a PDF. Output is the same bytes for the same canvases.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from vrag_lib.minidocs_canvas import Canvas, Colour, Polygon, Polyline, Rectangle, Text, font_path
from vrag_lib.rendering import write_atomically

_ASCII = "".join(map(chr, range(32, 127)))


@cache
def _subset(face: str) -> tuple[bytes, list[int], list[int], int, int]:
    """A face cut down to printable ASCII: file, advances of characters 32-126, bounding box, ascent, descent; all
    metrics in thousandths of an em."""
    from fontTools import subset
    from fontTools.ttLib import TTFont

    font = TTFont(font_path(face), recalcTimestamp=False)
    options = subset.Options(hinting=False, layout_features=[], notdef_outline=True, name_IDs=[1, 2, 4, 6])
    options.drop_tables += ["FFTM"]  # a font editor's time stamps
    cutter = subset.Subsetter(options)
    cutter.populate(text=_ASCII)
    cutter.subset(font)
    out = io.BytesIO()
    font.save(out)
    scale = 1000 / font["head"].unitsPerEm
    names, advances = font.getBestCmap(), font["hmtx"].metrics
    widths = [round(advances[names[ord(c)]][0] * scale) for c in _ASCII]
    head, rows = font["head"], font["hhea"]
    bbox = [round(v * scale) for v in (head.xMin, head.yMin, head.xMax, head.yMax)]
    return out.getvalue(), widths, bbox, round(rows.ascent * scale), round(rows.descent * scale)


class _File:
    """The numbered objects of one PDF file."""

    def __init__(self) -> None:
        self.objects: list[bytes] = []

    def add(self, body: str | bytes) -> int:
        self.objects.append(body.encode("ascii") if isinstance(body, str) else body)
        return len(self.objects)

    def stream(self, data: bytes, entries: str = "", compress: bool = True) -> int:
        if compress:
            data, entries = zlib.compress(data, 9), entries + " /Filter /FlateDecode"
        return self.add(f"<< /Length {len(data)}{entries} >>\nstream\n".encode() + data + b"\nendstream")

    def save(self, path: Path, root: int) -> None:
        out = bytearray(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
        offsets = []
        for number, body in enumerate(self.objects, 1):
            offsets.append(len(out))
            out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
        start = len(out)
        out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(offsets) + 1)
        out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
        out += b"trailer\n<< /Size %d /Root %d 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(offsets) + 1, root, start)
        write_atomically(path, bytes(out))


def write_pdf(path: str | Path, pages: Sequence[Canvas | Image.Image], dpi: int = 150) -> Path:
    """Write one document; a `Canvas` becomes vector shapes and text, an image a page without any text layer.

    Raises ValueError for text outside printable ASCII, which the embedded fonts do not carry.
    """
    file = _File()
    tree = file.add(b"")  # the page tree must name its pages, so its body is filled in last
    fonts: dict[str, int] = {}
    kids = []
    for page in pages:
        if isinstance(page, Canvas):
            width, height = page.size.width, page.size.height
            used = sorted({text.font.face for text in page.texts})
            for face in used:
                if face not in fonts:
                    fonts[face] = _embed(file, face)
            named = " ".join(f"/{face} {fonts[face]} 0 R" for face in used)
            resources = f"<< /Font << {named} >> >>"
            content = file.stream(_operators(page, dpi).encode("ascii"))
        else:
            (width, height), picture = page.size, _picture(file, page)
            resources = f"<< /XObject << /picture {picture} 0 R >> >>"
            content = file.stream(f"{_n(width * 72 / dpi)} 0 0 {_n(height * 72 / dpi)} 0 0 cm /picture Do".encode())
        # A hair less than whole, or a renderer that rounds pixel sizes upwards would add a row.
        box = f"[0 0 {_n(width * 72 / dpi - 0.002)} {_n(height * 72 / dpi - 0.002)}]"
        kids.append(
            file.add(
                f"<< /Type /Page /Parent {tree} 0 R /MediaBox {box} /Resources {resources} /Contents {content} 0 R >>"
            )
        )
    names = " ".join(f"{kid} 0 R" for kid in kids)
    file.objects[tree - 1] = f"<< /Type /Pages /Kids [{names}] /Count {len(kids)} >>".encode()
    root = file.add(f"<< /Type /Catalog /Pages {tree} 0 R >>")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save(path, root)
    return path


def _embed(file: _File, face: str) -> int:
    data, widths, bbox, ascent, descent = _subset(face)
    name = "MINDOC+DejaVu-" + face.title().replace("-", "")
    program = file.stream(data, f" /Length1 {len(data)}")
    descriptor = file.add(
        f"<< /Type /FontDescriptor /FontName /{name} /Flags 32 /FontBBox [{' '.join(map(str, bbox))}] "
        f"/ItalicAngle 0 /Ascent {ascent} /Descent {descent} /CapHeight 729 /StemV 80 /FontFile2 {program} 0 R >>"
    )
    return file.add(
        f"<< /Type /Font /Subtype /TrueType /BaseFont /{name} /FirstChar 32 /LastChar 126 "
        f"/Widths [{' '.join(map(str, widths))}] /FontDescriptor {descriptor} 0 R /Encoding /WinAnsiEncoding >>"
    )


def _picture(file: _File, image: Image.Image) -> int:
    out = io.BytesIO()
    image.convert("L").save(out, "JPEG", quality=60)
    entries = (
        f" /Type /XObject /Subtype /Image /Width {image.width} /Height {image.height}"
        " /ColorSpace /DeviceGray /BitsPerComponent 8 /Filter /DCTDecode"
    )
    return file.stream(out.getvalue(), entries, compress=False)


def _n(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _rgb(colour: Colour, operator: str) -> str:
    return " ".join(_n(c / 255) for c in colour) + f" {operator}"


def _operators(page: Canvas, dpi: int) -> str:
    """The content stream. A first transformation puts the origin top left and makes the unit a raw pixel."""
    scale = 72 / dpi
    out = [f"{scale:.6f} 0 0 {-scale:.6f} 0 {_n(page.size.height * scale)} cm", _rgb(page.background, "rg")]
    out.append(f"0 0 {page.size.width} {page.size.height} re f")
    for item in page.items:
        if isinstance(item, Text):
            out.append(_show_text(item))
        elif isinstance(item, Rectangle):
            out.append(_show_rectangle(item))
        elif isinstance(item, Polygon):
            out.append(f"{_rgb(item.fill, 'rg')} {_path(item.points)} h f")
        elif isinstance(item, Polyline):
            out.append(f"{_rgb(item.colour, 'RG')} {_n(item.width)} w 1 j {_path(item.points)} S")
    return "\n".join(out)


def _show_text(item: Text) -> str:
    if not all(" " <= c <= "~" for c in item.string):
        raise ValueError(f"MiniDocs sets printable ASCII only, not {item.string!r}")
    widths = _subset(item.font.face)[1]
    natural = sum(widths[ord(c) - 32] for c in item.string) * item.font.px / 1000
    # Pillow rounds each glyph's advance to whole pixels; stretching the run makes both end at the same place.
    stretch = 100 * item.width / natural if natural else 100
    escaped = item.string.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
    return (
        f"BT {_rgb(item.colour, 'rg')} /{item.font.face} {item.font.px} Tf {stretch:.2f} Tz "
        f"1 0 0 -1 {_n(item.x)} {_n(item.baseline)} Tm ({escaped}) Tj ET"
    )


def _show_rectangle(item: Rectangle) -> str:
    b, out = item.box, []
    if item.fill:
        out.append(f"{_rgb(item.fill, 'rg')} {_rounded(b.x1, b.y1, b.x2, b.y2, item.radius)} f")
    if item.outline:
        h = item.line_width / 2
        path = _rounded(b.x1 + h, b.y1 + h, b.x2 - h, b.y2 - h, max(0, item.radius - h))
        out.append(f"{_rgb(item.outline, 'RG')} {item.line_width} w {path} S")
    return "\n".join(out)


def _rounded(x1: float, y1: float, x2: float, y2: float, r: float) -> str:
    if not r:
        return f"{_n(x1)} {_n(y1)} {_n(x2 - x1)} {_n(y2 - y1)} re"
    k = r * 0.4477  # distance of a Bezier handle from the corner for a quarter circle
    points = (
        (x1 + r, y1), "m", (x2 - r, y1), "l", (x2 - k, y1), (x2, y1 + k), (x2, y1 + r), "c",
        (x2, y2 - r), "l", (x2, y2 - k), (x2 - k, y2), (x2 - r, y2), "c",
        (x1 + r, y2), "l", (x1 + k, y2), (x1, y2 - k), (x1, y2 - r), "c",
        (x1, y1 + r), "l", (x1, y1 + k), (x1 + k, y1), (x1 + r, y1), "c h",
    )  # fmt: skip
    return " ".join(p if isinstance(p, str) else f"{_n(p[0])} {_n(p[1])}" for p in points)


def _path(points: Sequence[tuple[float, float]]) -> str:
    start, *rest = (f"{_n(x)} {_n(y)}" for x, y in points)
    return f"{start} m " + " ".join(f"{p} l" for p in rest)
