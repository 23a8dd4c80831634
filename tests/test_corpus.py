"""Documents to pages: what is read, what is named as unreadable, caching, resuming, and bounded memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pdf_files import PdfPage, words_pdf, write_pdf
from PIL import Image

from vrag_lib.corpus import Corpus, Document, Page, Question, TextLine
from vrag_lib.document_files import CorpusError, Problem, document_stem
from vrag_lib.geometry import Box, Size

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT.parent / "shared" / "data" / "vidorag_example"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Corpus]:
    """A folder with good, odd and broken documents: the folder, its cache and its corpus."""
    folder, cache = tmp_path_factory.mktemp("documents"), tmp_path_factory.mktemp("cache")
    words_pdf(folder / "2023.acl-long.386.pdf", "First page", "Second page")
    words_pdf(folder / "a" / "report.pdf", "Report of A")
    words_pdf(folder / "b" / "report.pdf", "Report of B")
    words_pdf(folder / "copy" / "again.pdf", "Report of A")
    write_pdf(folder / "locked.pdf", [PdfPage([(30, 300, 20, "Secret")])], encrypted=True)
    write_pdf(folder / "no_pages.pdf", [])
    write_pdf(folder / "hole.pdf", [PdfPage([(30, 300, 20, "One")]), PdfPage(missing=True), PdfPage()])
    (folder / "zero_bytes.pdf").write_bytes(b"")
    (folder / "cut.pdf").write_bytes((folder / "2023.acl-long.386.pdf").read_bytes()[:60])
    (folder / "a_folder.pdf").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "half.jpg").write_bytes(_image_bytes(folder / "x.jpg", (600, 400))[:3000])
    (folder / "notes.txt").write_text("no document")
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(folder / "clear.png")
    Image.new("RGB", (3600, 1800), "navy").save(folder / "large.webp")
    Image.new("RGB", (6100, 20), "navy").save(folder / "strip.bmp")
    Image.new("I;16", (30, 30), 65535).save(folder / "deep.png")
    frames = [Image.new("RGB", (50 + i, 60), "white") for i in range(3)]
    frames[0].save(folder / "scan.tiff", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.webp", save_all=True, append_images=[Image.new("RGB", (50, 60), "black")])
    turned = Image.new("RGB", (200, 100), "green")
    exif = turned.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    turned.save(folder / "photo.JPG", exif=exif)
    return folder, cache, Corpus.from_folder(folder, cache)


def _image_bytes(path: Path, size: tuple[int, int]) -> bytes:
    Image.effect_noise(size, 80).save(path)
    content = path.read_bytes()
    path.unlink()
    return content


def test_pages_are_sorted_and_named_by_stem_and_number(mixed: tuple[Path, Path, Corpus]) -> None:
    corpus = mixed[2]
    assert corpus.page_ids == tuple(page.id for page in corpus.pages)
    assert [d.id for d in corpus.documents] == sorted(d.id for d in corpus.documents)
    assert "2023.acl-long.386_2" in corpus and "scan_3" in corpus
    page = corpus.page("2023.acl-long.386_2")
    assert (page.number, page.text, page.text_source) == (2, "Second page", "layer")
    assert page.open_image().size == (page.size.width, page.size.height) == (625, 834)  # 300 x 400 pt at 150 dpi
    assert Question("q", "?", "!", "2023.acl-long.386.pdf", (2,)).gold_page_ids == (page.id,)


def test_each_unreadable_document_is_named_with_its_reason(
    mixed: tuple[Path, Path, Corpus], caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache, corpus = mixed
    reasons = {os.path.relpath(problem.path, folder): problem.reason for problem in corpus.problems}
    expected = {
        "locked.pdf": "encrypted",
        "no_pages.pdf": "no pages",
        "hole.pdf": "page 2",
        "zero_bytes.pdf": "empty (0 bytes)",
        "cut.pdf": "not a PDF, or broken",
        "a_folder.pdf": "directory",
        "gone.png": "No such file",
        "broken.png": "not a readable image",
        "half.jpg": "truncated",
        "strip.bmp": "ratio above 200",
        "copy/again.pdf": "same content as",
    }
    assert set(reasons) == set(expected)
    for name, words in expected.items():
        assert words in reasons[name], (name, reasons[name])
    assert [page.number for page in corpus.pages if page.document_id == "hole"] == [1, 3]
    Corpus.from_folder(folder, cache)
    assert f"left out: {folder / 'locked.pdf'}: encrypted" in caplog.text


def test_images_become_rgb_pages(mixed: tuple[Path, Path, Corpus]) -> None:
    corpus = mixed[2]
    assert corpus.page("clear_1").open_image().getpixel((5, 5)) == (255, 255, 255)  # transparent shows white
    assert corpus.page("deep_1").open_image().getpixel((5, 5)) == (255, 255, 255)
    assert corpus.page("large_1").size == Size(3508, 1754)
    assert corpus.page("photo_1").size == Size(100, 200)
    assert [page.size.width for page in corpus.pages if page.document_id == "scan"] == [50, 51, 52]
    assert sum(page.document_id == "moving" for page in corpus.pages) == 1  # an animation is one picture
    assert corpus.page("photo_1").text_source == "none"


@pytest.mark.parametrize(
    "mode, values, shades",
    [("I", (0, 255), (0, 255)), ("I", (0, 65535), (0, 255)), ("F", (0.0, 1.0), (0, 255)), ("F", (0.0, 6e4), (0, 234))],
)
def test_deep_greys_are_scaled_not_clipped(tmp_path: Path, mode: str, values: tuple, shades: tuple) -> None:
    image = Image.new(mode, (40, 40), values[0])
    image.paste(values[1], (20, 0, 40, 40))
    image.save(tmp_path / "deep.tif")
    (page,) = Corpus.from_folder(tmp_path, tmp_path / "cache").pages
    shown = Image.open(page.image_path).convert("L")
    assert [shown.getpixel(place) for place in ((5, 20), (35, 20))] == pytest.approx(shades, abs=4)


def test_a_name_that_is_no_utf_8_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xdcbersicht.png")
    corpus = Corpus.from_folder(tmp_path, tmp_path.parent / "cache_of_latin")
    assert corpus.documents[0].id == "_bersicht" and corpus.fingerprint


def test_files_of_one_name_keep_apart(mixed: tuple[Path, Path, Corpus]) -> None:
    corpus = mixed[2]
    assert corpus.page("a_report_1").text == "Report of A"
    assert corpus.page("b_report_1").text == "Report of B"


def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    for name, size in {"a.png": (20_000, 18_000), "b.png": (13_000, 12_000)}.items():
        Image.new("1", size).save(tmp_path / name)
    with pytest.raises(CorpusError, match=r"a\.png: too large.*b\.png: page 1: too large"):
        Corpus.from_folder(tmp_path, tmp_path / "cache", workers=1)


def test_a_folder_that_gives_nothing_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist; give a folder"):
        Corpus.from_folder(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="holds no document; put PDFs or images"):
        Corpus.from_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("no document")
    (tmp_path / ".hidden.pdf").write_text("no document")
    with pytest.raises(CorpusError, match="holds no document"):
        Corpus.from_folder(tmp_path)
    with pytest.raises(CorpusError, match=r"notes\.txt is not a document"):
        Corpus.from_folder(tmp_path / "notes.txt")
    (tmp_path / "empty.pdf").touch()
    with pytest.raises(CorpusError, match=r"none of the documents in .*empty\.pdf: the file is empty"):
        Corpus.from_folder(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("dpi", [0, -72, 100_000])
def test_a_resolution_out_of_range_is_refused_by_the_name_of_its_setting(tmp_path: Path, dpi: int) -> None:
    words_pdf(tmp_path / "d.pdf", "One")
    with pytest.raises(CorpusError, match=rf"dpi={dpi} .*corpus\.dpi.*150 is usual.*dpi 1-2400"):
        Corpus.from_folder(tmp_path, tmp_path / "cache", dpi=dpi)


def test_damaged_files_never_raise(tmp_path: Path) -> None:
    good = write_pdf(tmp_path / "good.pdf", [PdfPage([(30, 300, 20, "words")]), PdfPage()]).read_bytes()
    rng = random.Random(0)
    for index in range(60):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 30)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / f"{index}.pdf").write_bytes(damaged[: rng.randint(1, len(damaged))])
    corpus = Corpus.from_folder(tmp_path, tmp_path / "cache")
    assert "good_2" in corpus
    for index in range(60):  # each file gave pages, or a problem, or both
        name = f"{index}.pdf"
        assert any(d.path.name == name for d in corpus.documents) or any(name in p.path for p in corpus.problems)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    words_pdf(tmp_path / "d.pdf", "One")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CorpusError, match=r"cache folder .* cannot be written .*VRAG_CACHE"):
        Corpus.from_folder(tmp_path / "d.pdf", tmp_path / "cache")


def test_one_file_and_linked_folders(tmp_path: Path) -> None:
    file = words_pdf(tmp_path / "elsewhere" / "one.pdf", "Alone")
    assert Corpus.from_folder(file, tmp_path / "cache").page_ids == ("one_1",)
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(file.parent)
    (root / "loop").symlink_to(root)
    assert Corpus.from_folder(root, tmp_path / "cache").page_ids == ("one_1",)


def test_text_layer_of_rotated_and_cropped_pages(tmp_path: Path) -> None:
    text = [(120, 300, 20, "Upright word")]
    pages = [PdfPage(text, rotate=angle) for angle in (0, 90, 180, 270)]
    pages.append(PdfPage([*text, (5, 5, 10, "cut off")], crop=(100, 200, 280, 380)))
    corpus = Corpus.from_folder(write_pdf(tmp_path / "turned.pdf", pages), tmp_path / "cache", dpi=72)
    sizes = [(page.size.width, page.size.height) for page in corpus.pages]
    assert sizes == [(300, 400), (400, 300), (300, 400), (400, 300), (180, 180)]
    for page in corpus.pages:
        assert [line.text for line in page.lines] == ["Upright word"]
        box = page.lines[0].box
        ink = page.open_image().convert("L").point(lambda value: 255 * (value < 128)).getbbox()
        assert max(abs(a - b) for a, b in zip(box.as_tuple(), ink, strict=True)) <= 2, page.id


def test_what_was_filled_into_a_form_is_on_the_page(tmp_path: Path) -> None:
    """Seen and read: a form without what was filled in is another document."""
    label, empty = (30, 300, 20, "Applicant"), (30, 200, 20, "Cars")
    write_pdf(
        tmp_path / "filled.pdf", [PdfPage([label, empty], filled=[(30, 260, "Wilhelmina Brandt"), (90, 195, "47")])]
    )
    write_pdf(tmp_path / "blank.pdf", [PdfPage([label, empty])])
    corpus = Corpus.from_folder(tmp_path)
    filled, blank = corpus.page("filled_1"), corpus.page("blank_1")
    assert blank.text == "Applicant\nCars" and {"Wilhelmina Brandt", "47"} <= set(filled.text.split("\n"))
    line = next(line for line in filled.lines if line.text == "Wilhelmina Brandt")
    box = tuple(round(side) for side in line.box.as_tuple())
    inked, clear = (page.open_image().convert("L").crop(box).getextrema() for page in (filled, blank))
    assert inked[0] < 60 and clear[0] > 200


def test_lines_split_at_gutters_and_join_at_superscripts(tmp_path: Path) -> None:
    page = PdfPage(
        [(20, 300, 12, "left column"), (150, 300, 12, "right column"), (20, 200, 12, "energy  is mc")],
        content="BT /F 8 Tf 92 205 Td (2) Tj ET BT /F 12 Tf 100 200 Td (and more) Tj ET",
    )
    corpus = Corpus.from_folder(write_pdf(tmp_path / "lines.pdf", [page]), tmp_path / "cache")
    assert [line.text for line in corpus.pages[0].lines] == ["left column", "right column", "energy is mc2 and more"]


def test_lines_that_the_content_lists_upside_down_are_turned(tmp_path: Path) -> None:
    page = PdfPage([(20, 200, 12, "second line"), (20, 214, 12, "first line"), (20, 100, 12, "another paragraph")])
    corpus = Corpus.from_folder(write_pdf(tmp_path / "order.pdf", [page]), tmp_path / "cache")
    assert corpus.pages[0].text == "first line\nsecond line\nanother paragraph"


def test_a_layer_of_unmapped_characters_is_none(tmp_path: Path) -> None:
    pages = [PdfPage([(30, 300, 20, "SECRET CODE")])]
    corpus = Corpus.from_folder(write_pdf(tmp_path / "private.pdf", pages, to_unicode="E001"), tmp_path / "cache")
    assert (corpus.pages[0].text_source, corpus.pages[0].lines) == ("none", ())
    corpus = Corpus.from_folder(write_pdf(tmp_path / "control.pdf", pages, to_unicode="0000"), tmp_path / "cache")
    assert corpus.pages[0].text_source == "none"


def test_page_sizes_are_capped(tmp_path: Path) -> None:
    pages = [PdfPage(size=(3000, 1500)), PdfPage(size=(10, 10)), PdfPage(size=(5000, 20))]
    corpus = Corpus.from_folder(write_pdf(tmp_path / "sizes.pdf", pages), tmp_path / "cache")
    assert [page.size for page in corpus.pages] == [Size(3507, 1754), Size(21, 21)]
    assert "page 3" in corpus.problems[0].reason


def test_a_second_run_renders_nothing_and_a_vanished_image_is_rendered_anew(tmp_path: Path) -> None:
    file, cache = words_pdf(tmp_path / "d.pdf", "One", "Two"), tmp_path / "cache"
    corpus = Corpus.from_folder(file, cache)
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")}
    again = Corpus.from_folder(file, cache)
    assert again.pages == corpus.pages and again.fingerprint == corpus.fingerprint
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")} == times
    corpus.pages[0].image_path.unlink()
    with pytest.raises(CorpusError, match=r"image of page 'd_1'.*build the corpus again"):
        corpus.pages[0].open_image()
    next(cache.rglob("pages_1.json")).write_text("{ half")
    assert Corpus.from_folder(file, cache).page("d_1").open_image().size == (625, 834)
    Image.new("RGB", (10, 10)).save(corpus.pages[0].image_path)
    with pytest.raises(CorpusError, match="10 x 10 pixels, not 625 x 834"):
        corpus.pages[0].open_image()


def test_fingerprint_depends_on_content_and_settings_alone(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        words_pdf(tmp_path / folder / "d.pdf", "Same")
    here, there = (Corpus.from_folder(tmp_path / f, tmp_path / f"cache_{f}") for f in ("here", "there"))
    assert here.fingerprint == there.fingerprint
    assert Corpus.from_folder(tmp_path / "here", tmp_path / "cache_here", dpi=72).fingerprint != here.fingerprint
    words_pdf(tmp_path / "here" / "d.pdf", "Other")
    assert Corpus.from_folder(tmp_path / "here", tmp_path / "cache_here").fingerprint != there.fingerprint


def test_unknown_pages_are_named() -> None:
    with pytest.raises(CorpusError, match=r"no page 'x_9' among the 1 pages.*such as 'd_1'"):
        _corpus("d").page("x_9")
    with pytest.raises(CorpusError, match="no page 'x_9' among the 0 pages"):
        Corpus([]).page("x_9")


def _corpus(*ids: str, content: str = "0", problems: tuple[Problem, ...] = ()) -> Corpus:
    def page(document: str) -> Page:
        return Page(f"{document}_1", document, 1, Path(f"{document}.jpg"), Size(10, 10))

    return Corpus([Document(i, Path(f"{content}/{i}.pdf"), content, (page(i),)) for i in ids], problems)


def test_merge_keeps_each_document_once_and_refuses_a_clash() -> None:
    problem = Problem("x.pdf", "broken")
    merged = Corpus.merge([_corpus("b", "a", problems=(problem,)), _corpus("b", "c")])
    assert merged.page_ids == ("a_1", "b_1", "c_1") and merged.problems == (problem,)
    other = _corpus("b", content="1")
    with pytest.raises(CorpusError, match=r"'b' stands for 0/b\.pdf and for 1/b\.pdf.*prefix"):
        Corpus.merge([_corpus("b"), other])
    assert Corpus.merge([_corpus("b"), other.with_prefix("x-")]).page_ids == ("b_1", "x-b_1")
    assert other.with_prefix("x-").page("x-b_1").document_id == "x-b"


def test_files_tell_the_document_of_each_file_found(tmp_path: Path) -> None:
    for name, colour in {
        "a.png": "red", "b.png": "red", "x/c.png": "red", "y/c.png": "red",  # one picture under three names
        "m/d.png": "blue", "n/d.png": "green", "o/d.png": "green",  # two contents share a name
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), colour).save(tmp_path / name)
    (tmp_path / "n" / "broken.png").touch()
    corpus = Corpus.from_folder(tmp_path, tmp_path / "cache", workers=1)
    assert [document.id for document in corpus.documents] == ["a", "m_d", "n_d"] and len(corpus.problems) == 5
    assert [document.file_name for document in corpus.documents] == ["a.png", "m_d", "n_d"]
    assert corpus.files == {
        "a.png": "a", "b.png": "a", "x/c.png": "a", "y/c.png": "a",
        "m/d.png": "m_d", "n/d.png": "n_d", "o/d.png": "n_d", "n/broken.png": "",
    }  # fmt: skip
    assert Corpus.from_folder(tmp_path / "a.png", tmp_path / "cache", workers=1).files == {"a.png": "a"}


def test_files_survive_what_is_made_of_a_corpus() -> None:
    corpus = Corpus(_corpus("a", "c").documents, (), {"a.pdf": "a", "b.pdf": "a", "c.pdf": "c", "x.pdf": "gone"})
    assert corpus.files == {"a.pdf": "a", "b.pdf": "a", "c.pdf": "c", "x.pdf": ""}
    problem = Problem("x.pdf", "broken")
    assert corpus.with_pages([]).with_problems([problem]).files == corpus.files
    assert corpus.with_problems([problem]).with_problems([problem]).problems == (problem, problem)
    some = corpus.with_documents({"a"})
    assert (some.page_ids, some.files) == (("a_1",), {"a.pdf": "a", "b.pdf": "a", "c.pdf": "", "x.pdf": ""})
    assert corpus.with_prefix("p-").files == {} == Corpus.merge([corpus]).files  # several folders may hold an a.pdf


def test_with_pages_replaces_by_id() -> None:
    corpus = _corpus("a", "b")
    page = Page("b_1", "b", 1, Path("b.jpg"), Size(10, 10), (TextLine("hello", Box(0, 0, 5, 5)),), "ocr")
    new = corpus.with_pages([page])
    assert new.page("b_1").text == "hello" and new.page("a_1") is corpus.page("a_1")
    assert new.fingerprint == corpus.fingerprint and new.text_fingerprint != corpus.text_fingerprint


def test_document_ids_are_safe_as_file_names() -> None:
    assert document_stem("..\\up/a:b\x00c?.pdf") == "a_b_c_"
    assert document_stem("e\u0301.pdf") == document_stem("\u00e9.pdf")
    with pytest.raises(CorpusError, match="two pages have the id"):
        _corpus("a", "a")


def test_page_images_in_folders_become_documents(tmp_path: Path) -> None:
    for deck in ("deck.one", "deck.two"):
        (tmp_path / deck).mkdir()
        for number in (1, 2, 11):  # slides 1 and 2 of both decks look the same
            shade = number if number < 11 else len(deck) + ord(deck[-1])
            Image.new("RGB", (64, 48), (shade, 0, 0)).save(tmp_path / deck / f"title-of-3-{number}-1024.jpg")
    corpus = Corpus.from_folder(tmp_path, tmp_path / "cache", page_pattern=r"-(?P<number>\d+)-\d+\.jpg")
    assert corpus.page_ids == tuple(f"deck.{deck}_{number}" for deck in ("one", "two") for number in (1, 2, 11))
    assert corpus.problems == ()
    Image.new("RGB", (64, 48)).save(tmp_path / "deck.one" / "title-of-3-1-320.jpg")
    corpus = Corpus.from_folder(tmp_path, tmp_path / "cache", page_pattern=r"-(?P<number>\d+)-\d+\.jpg")
    assert "its page, 1, is" in corpus.problems[0].reason
    (tmp_path / "last").mkdir()
    Image.new("RGB", (64, 48), "green").save(tmp_path / "last" / "rest-5-1024.jpg")
    Image.new("RGB", (64, 48), "green").save(tmp_path / "single.jpg")
    corpus = Corpus.from_folder(tmp_path, tmp_path / "cache", page_pattern=r"-(?P<number>\d+)-\d+\.jpg")
    assert {"last_5", "single_1"} <= set(corpus.page_ids)  # no duplicates: their pages have other numbers
    with pytest.raises(CorpusError, match=r"needs a group \(\?P<number>"):
        Corpus.from_folder(tmp_path, page_pattern="x")


BUILD = """
import sys, resource, json
from vrag_lib.corpus import Corpus
if __name__ == "__main__":
    corpus = Corpus.from_folder(sys.argv[1], sys.argv[2])
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps([len(corpus), corpus.fingerprint, *peaks]))
"""


def _start_build(tmp_path: Path, documents: Path, cache: Path) -> subprocess.Popen[str]:
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    command = [sys.executable, str(script), str(documents), str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _result(process: subprocess.Popen[str]) -> list:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)


def test_memory_does_not_grow_with_the_number_of_pages(tmp_path: Path) -> None:
    peaks = {}
    for count in (32, 128):  # 1,500 x 1,500 pixels each: 860 MB raw for the larger document
        file = write_pdf(tmp_path / f"{count}.pdf", [PdfPage(size=(720, 720))] * count)
        pages, _, *peaks[count] = _result(_start_build(tmp_path, file, tmp_path / "cache"))
        assert pages == count
    for few, many in zip(peaks[32], peaks[128], strict=True):
        assert many < few + 60, peaks  # MB


def test_a_long_document_keeps_its_page_numbers(tmp_path: Path) -> None:
    file = write_pdf(tmp_path / "long.pdf", [PdfPage([(2, 5, 5, f"page {i + 1}")], (30, 20)) for i in range(1_500)])
    corpus = Corpus.from_folder(file, tmp_path / "cache", dpi=36)
    assert len(corpus) == 1_500 and corpus.problems == ()
    assert all(page.text == f"page {page.number}" for page in corpus.pages)


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    file, cache = write_pdf(tmp_path / "d.pdf", [PdfPage(size=(480, 480))] * 400), tmp_path / "cache"
    process = _start_build(tmp_path, file, cache)
    deadline = time.monotonic() + 60
    while not list(cache.rglob("pages_*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    time.sleep(0.5)
    done = {path: path.stat().st_mtime_ns for path in cache.rglob("pages_*.json")}
    assert 0 < len(done) < 13  # of 13 chunks
    corpus = Corpus.from_folder(file, cache)
    assert len(corpus) == 400 and corpus.problems == ()
    assert {path: path.stat().st_mtime_ns for path in done} == done
    with pytest.raises(ProcessLookupError):  # the killed run's workers went with it; init may take seconds to reap them
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.2)


def test_two_processes_may_build_one_corpus_at_once(tmp_path: Path) -> None:
    file, cache = write_pdf(tmp_path / "d.pdf", [PdfPage([(9, 9, 9, "word")], (200, 200))] * 150), tmp_path / "cache"
    runs = [_start_build(tmp_path, file, cache) for _ in range(2)]
    results = [_result(run)[:2] for run in runs]
    corpus = Corpus.from_folder(file, cache)
    assert results == [[150, corpus.fingerprint]] * 2
    for page in corpus.pages:
        page.open_image()
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="needs ../shared")
def test_a_real_deck(tmp_path: Path) -> None:
    corpus = Corpus.from_folder(EXAMPLE, tmp_path)
    assert len(corpus) == 23 and corpus.problems == ()
    assert corpus.page_ids[9].endswith("_10")
    for page in corpus.pages:
        assert all(0 <= l.box.x1 < l.box.x2 <= page.size.width for l in page.lines)  # noqa: E741
        assert all(0 <= l.box.y1 < l.box.y2 <= page.size.height for l in page.lines)  # noqa: E741
