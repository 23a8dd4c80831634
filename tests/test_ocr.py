"""OCR: what is read and where, what the layer already has, the cache, and pages that fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pdf_files import PdfPage, write_pdf
from PIL import Image, ImageDraw, ImageFont

from vrag_lib import ocr
from vrag_lib.corpus import Corpus, TextLine
from vrag_lib.geometry import Box, iou
from vrag_lib.ocr import ocr_pages


def _drawn(text: str, size: tuple[int, int], at: tuple[int, int], height: int) -> tuple[Image.Image, Box]:
    """A white grey-scale picture of a text, and the box of its ink."""
    image = Image.new("L", size, 255)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(height)
    draw.text(at, text, font=font, fill=0)
    return image, Box(*draw.textbbox(at, text, font=font))


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Path, Box]:
    """Two pages without a layer, and one whose layer lacks what its picture says."""
    folder, cache = tmp_path_factory.mktemp("documents"), tmp_path_factory.mktemp("cache")
    image, box = _drawn("Quarterly revenue 4217", (800, 300), (150, 120), 40)
    image.save(folder / "scan.png")
    Image.new("L", (400, 300), 255).save(folder / "white.png")
    chart, _ = _drawn("Lisbon harbour", (500, 100), (40, 20), 50)
    picture = f"q 250 0 0 50 25 100 cm BI /W 500 /H 100 /CS /G /BPC 8 /F /AHx ID {chart.tobytes().hex()}> EI Q"
    layer = [(30, 300, 20, "Known words of the layer"), (30, 250, 20, "and more of them")]
    write_pdf(folder / "figure.pdf", [PdfPage(layer, content=picture)])
    return Corpus.from_folder(folder, cache), cache, box


def test_pages_without_text_are_read_where_it_stands(
    scanned: tuple[Corpus, Path, Box], capfd: pytest.CaptureFixture[str]
) -> None:
    corpus, cache, box = scanned
    read = ocr_pages(corpus, cache)
    page = read.page("scan_1")
    assert (page.text, page.text_source) == ("Quarterly revenue 4217", "ocr")
    assert iou(page.lines[0].box, box) > 0.6
    assert read.page("white_1").text_source == "none"
    assert read.page("figure_1") == corpus.page("figure_1")
    assert read.fingerprint == corpus.fingerprint and read.problems == ()
    assert "INFO" not in capfd.readouterr().err  # rapidocr logs on every model it opens


def test_what_the_layer_lacks_is_added_once(scanned: tuple[Corpus, Path, Box]) -> None:
    corpus, cache, _ = scanned
    page = ocr_pages(corpus, cache, pages="all").page("figure_1")
    assert [line.text for line in page.lines] == ["Known words of the layer", "and more of them", "Lisbon harbour"]
    assert page.text_source == "layer"
    box = page.lines[-1].box
    assert 52 < box.x1 < 110 and 521 < box.y1 < box.y2 < 626  # the picture's place: 25 pt from the left, 100 up


def test_only_what_is_missing_is_read_again(scanned: tuple[Corpus, Path, Box], monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, cache, _ = scanned
    first = ocr_pages(corpus, cache, pages="all")
    asked = []

    def watched(function: object, tasks: list, *arguments: object) -> list:
        asked.extend(Path(task[0]).parent.name[:64] for task in tasks)
        for task in tasks:
            ocr.read_page(*task)
        return [(index, None) for index in range(len(tasks))]

    monkeypatch.setattr(ocr, "run_tasks", watched)
    assert ocr_pages(corpus, cache, pages="all").pages == first.pages
    assert asked == []
    page = corpus.page("scan_1")
    key = ocr._cache_key(page)
    (cache / "ocr" / f"{key}.json").write_text("[[ half")
    assert ocr_pages(corpus, cache, pages="all").pages == first.pages
    assert asked == [next(d.sha256 for d in corpus.documents if d.id == "scan")]
    monkeypatch.setattr(ocr, "PARAMETERS", {**ocr.PARAMETERS, "Det.limit_side_len": 640})
    assert ocr._cache_key(page) != key


def test_a_page_that_fails_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    for name in ("damaged", "fine", "vanished"):
        _drawn(f"This is {name}", (400, 120), (20, 30), 40)[0].save(tmp_path / f"{name}.png")
    corpus = Corpus.from_folder(tmp_path, tmp_path / "cache")
    corpus.page("damaged_1").image_path.write_bytes(b"no image")
    corpus.page("vanished_1").image_path.unlink()
    read = ocr_pages(corpus, tmp_path / "cache")
    assert read.page("fine_1").text == "This is fine"
    assert {problem.path for problem in read.problems} == {"damaged_1", "vanished_1"}
    assert all(problem.reason.startswith("OCR: ") for problem in read.problems)
    assert [read.page(f"{name}_1").text_source for name in ("damaged", "vanished")] == ["none", "none"]


def test_a_layer_of_a_page_number_counts_as_lacking_text(tmp_path: Path) -> None:
    pages = [PdfPage([(150, 20, 10, "12")]), PdfPage([(30, 300, 10, "a layer of a few words or more")])]
    corpus = Corpus.from_folder(write_pdf(tmp_path / "d.pdf", pages), tmp_path / "cache")
    assert [ocr.lacks_text(page) for page in corpus.pages] == [True, False]


def test_unknown_choice_of_pages_is_refused(scanned: tuple[Corpus, Path, Box]) -> None:
    with pytest.raises(ValueError, match="'no_text' or 'all', not 'some'"):
        ocr_pages(scanned[0], scanned[1], pages="some")


def test_painting_over_takes_the_colour_around() -> None:
    pixels = np.full((60, 80, 3), (10, 200, 30), dtype=np.uint8)
    pixels[20:30, 20:60] = 255
    pixels[50:, 70:] = 7
    ocr._paint_over(pixels, [(20.2, 20.1, 59.9, 29.9), (-5, -5, 3, 3), (200, 200, 210, 210)])
    assert (pixels[:50] == (10, 200, 30)).all()
    assert (pixels[52:, 72:] == 7).all()


def test_lines_that_the_layer_has_nearby_are_known() -> None:
    layer = [TextLine("Total revenue 2019", Box(0, 0, 100, 10)), TextLine("far", Box(0, 500, 9, 510))]
    assert ocr._is_known(TextLine("total Revenue", Box(2, 3, 80, 14)), layer)
    assert not ocr._is_known(TextLine("Lisbon revenue harbour", Box(2, 3, 80, 14)), layer)
    assert not ocr._is_known(TextLine("far", Box(2, 3, 80, 14)), layer)
    assert ocr._is_known(TextLine("ue 2019", Box(101, 0, 125, 10)), layer)  # the end of a line, beside its box
    assert not ocr._is_known(TextLine("ue 2019", Box(140, 0, 165, 10)), layer)
