"""The data card of MiniDocs: counts, pictures, split definitions; written by code, never by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from vrag_lib.corpus import Question
from vrag_lib.geometry import PATCH, View, render, view_of_raw_box
from vrag_lib.minidocs import MiniDocs, majority_accuracy
from vrag_lib.minidocs_content import SPLITS
from vrag_lib.minidocs_documents import PAGE_TOKENS, MiniDocument, MiniPage, absent_entities, document_entities
from vrag_lib.minidocs_styles import families, palettes
from vrag_lib.rendering import write_atomically

_GUTTER = 12
_GREY = (120, 124, 130)
_KINDS = ("cover", "text", "table", "bars", "line", "pie", "board", "flow", "dashboard")


def write_card(out_dir: str | Path, docs: MiniDocs | None = None) -> Path:
    """Write `README.md`, `splits.json` and two pictures (`pages.png`, `sizes.png`) for a collection."""
    docs = docs or MiniDocs()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, Counter[str]] = {}
    questions: dict[str, list[Question]] = {}
    for split in SPLITS:
        kinds[split], questions[split] = Counter(), []
        total = docs.config.documents[split]
        for document in tqdm(docs.documents(split), f"counting {split}", total, unit="document"):
            kinds[split].update(plan.kind for plan in document.plan)
            questions[split] += docs.unified(document)
    write_atomically(out / "splits.json", (json.dumps(split_definitions(docs), indent=1) + "\n").encode())
    _save(contact_sheet(docs), out / "pages.png")
    _save(size_picture(docs), out / "sizes.png")
    write_atomically(out / "README.md", _readme(docs, kinds, questions).encode())
    return out


def split_definitions(docs: MiniDocs) -> dict[str, object]:
    """What belongs to which split: entities with and without documents, layout families, palettes; and the
    configuration that everything else follows from."""
    return {
        "config": asdict(docs.config),
        "fingerprint": docs.fingerprint,
        "splits": {
            split: {
                "documents": docs.config.documents[split],
                "entities": [entity.name for entity in document_entities(split)],
                "entities_without_documents": [entity.name for entity in absent_entities(split)],
                "layout_families": [family.name for family in families(split)],
                "palettes": [palette.name for palette in palettes(split)],
            }
            for split in SPLITS
        },
    }


def contact_sheet(docs: MiniDocs, split: str = "train", width: int = 400) -> Image.Image:
    """One slide and one report page of each kind, with region boxes (red) and answer boxes (blue)."""
    rows = []
    for portrait in (False, True):
        found: dict[str, MiniPage] = {}
        for document in docs.documents(split):
            if (document.style.size.height > document.style.size.width) == portrait:
                found |= _new_kinds(document, found)
            if len(found) == len(_KINDS):
                break
        pages = [marked(found[kind]) for kind in _KINDS if kind in found]
        for start in range(0, len(pages), 5):
            rows.append([_to_width(image, width) for image in pages[start : start + 5]])
    return _grid(rows)


def _new_kinds(document: MiniDocument, found: dict[str, MiniPage]) -> dict[str, MiniPage]:
    """The first page of each kind that is still missing; a document gives two at most, so that styles vary."""
    new: dict[str, MiniPage] = {}
    for number, plan in enumerate(document.plan, 1):
        if plan.kind not in found and plan.kind not in new and len(new) < 2:
            new[plan.kind] = document.page(number)
    return new


def marked(page: MiniPage) -> Image.Image:
    """The page with its facts' boxes: regions red, answers blue. Outlines stand around the boxes, so that they cover
    nothing of what is in them."""
    image = page.image()
    draw = ImageDraw.Draw(image)
    for fact in page.facts:
        for box, away, colour in ((fact.region_box, 3, (220, 30, 30)), (fact.answer_box, 9, (30, 60, 220))):
            draw.rectangle((box.x1 - away, box.y1 - away, box.x2 + away, box.y2 + away), outline=colour, width=3)
    return image


def size_picture(docs: MiniDocs, tokens: int = PAGE_TOKENS) -> Image.Image:
    """A table and a chart page as a model sees them at `tokens` vision tokens, beside the crop of one region."""
    rows = []
    for kind, portrait in (("table", False), ("bars", False), ("line", False)):
        page = next(
            document.page(number)
            for document in docs.documents("train")
            for number, plan in enumerate(document.plan, 1)
            if plan.kind == kind and (document.style.size.height > document.style.size.width) == portrait
        )
        pixels = tokens * PATCH * PATCH
        image = page.image()
        whole = render(image, View.of_page(page.size, pixels, pixels))
        crop = render(image, view_of_raw_box(page.size, page.facts[-1].region_box, pixels, pixels))
        rows.append([whole, crop])
    return _grid(rows)


def _to_width(image: Image.Image, width: int) -> Image.Image:
    return image.resize((width, round(width * image.height / image.width)), Image.Resampling.LANCZOS)


def _grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    width = max(sum(image.width + _GUTTER for image in row) for row in rows) + _GUTTER
    height = sum(max(image.height for image in row) + _GUTTER for row in rows) + _GUTTER
    sheet = Image.new("RGB", (width, height), _GREY)
    y = _GUTTER
    for row in rows:
        x = _GUTTER
        for image in row:
            sheet.paste(image, (x, y))
            x += image.width + _GUTTER
        y += max(image.height for image in row) + _GUTTER
    return sheet


def _save(image: Image.Image, path: Path) -> None:
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _counted(title: str, values: dict[str, list[str]]) -> str:
    """A table with one row per value and one column per split."""
    counters = {split: Counter(found) for split, found in values.items()}
    names = sorted({name for counter in counters.values() for name in counter})
    return _table([title, *counters], [[name, *(c[name] for c in counters.values())] for name in names])


def _readme(docs: MiniDocs, kinds: dict[str, Counter[str]], questions: dict[str, list[Question]]) -> str:
    config = docs.config
    counts = [
        [split, config.documents[split], kinds[split].total(), len(questions[split]),
         sum(q.extra["answerable"] for q in questions[split]),
         len(document_entities(split)), len(families(split)), len(palettes(split))]
        for split in SPLITS
    ]  # fmt: skip
    by = {
        "element of the answer": lambda q: q.source_type or "none (not answerable)",
        "hops": lambda q: q.query_type if q.extra["answerable"] else "not answerable",
        "template": lambda q: q.extra["template"],
        "wording": lambda q: q.extra["wording"],
    }
    mixtures = "\n\n".join(
        _counted(name, {split: [get(q) for q in questions[split]] for split in SPLITS}) for name, get in by.items()
    )
    prior = majority_accuracy(questions["train"], questions["test"])
    page_kinds = _counted("page", {split: list(kinds[split].elements()) for split in SPLITS})
    shown = View.of_page(docs.document("train", 0).style.size, *[PAGE_TOKENS * PATCH * PATCH] * 2).shown
    scale = max(shown.width, shown.height) / config.long_side
    label, value = config.label_px * scale, config.value_px * scale
    settings = _table(
        ["setting", "value", "meaning"],
        [[f.name, getattr(config, f.name), f.metadata["doc"]] for f in fields(config)],
    )
    return f"""# MiniDocs

A generated benchmark of visually rich documents: slides, report pages and dashboards with text, tables, bar, line and
pie charts and layout pages, and questions whose answer, gold pages and regions are known exactly, because the code
that draws a page writes down where everything stands. Made for the laptop preset, where SlideVQA, ViDoSeek and
MMLongBench-Doc are out of reach; it is no part of the paper. Everything is sampled; organisations and figures are
made up.

This card, the pictures and `splits.json` are written by `vrag_lib.minidocs_card.write_card("data/minidocs")`, the
collection itself by `vrag_lib.minidocs.MiniDocs().write(folder)`. Collection `{docs.fingerprint}`.

![pages with regions in red and answers in blue](pages.png)

## Counts
{_table(["split", "documents", "pages", "questions", "answerable", "entities", "families", "palettes"], counts)}

Splits share no document, entity (name or emblem), layout family or palette; every single habit of a held-out family
(format, header, ruling, fonts) occurs in training in another combination. Training may draw further documents of its
split without end. The last twentieth of each split's entities has no document: questions about those have no answer.

{page_kinds}

{mixtures}

## What makes it hard
- **Shared vocabulary.** All documents draw measures and items from the same lists; only the entity's name tells them
  apart. `everyday` questions name a measure in words that no page uses, `aside` questions also mention measures of
  other pages, `emblem` questions name the entity by an emblem that only its cover explains. Each question carries
  `rewritten_query` and one query per gold page (`hop_queries`).
- **Small print.** Shown whole at {PAGE_TOKENS} vision tokens ({shown.width} x {shown.height} pixels), labels are
  {label:.1f} pixels high (em) and figures {value:.1f}; a crop of the region shows the figure three times as large or
  more. On text pages figures are as large as the words.

![a page at the standard size, and the crop of one region](sizes.png)

- **No way round the pages.** Answers are drawn uniformly. Guessing for each template the most frequent answer of the
  training split is right on {100 * prior["all"]:.1f} % of the answerable test questions; by template:

{_table(["template", "accuracy of the training majority"], [[k, f"{100 * v:.1f} %"] for k, v in prior.items()])}

## Items
Unified item format (`questions.json`): uid, query, reference_answer and meta_info with file_name, reference_page
(1-based), source_type (Text, Table, Chart, 2d_layout), query_type (Single-Hop, Multi-Hop), answerable, answer_format,
template, wording, rewritten_query, hop_queries and regions: per hop the page, the element, `region_box` (row, bar,
sentence, box) and `answer_box` (the value itself), `[x1, y1, x2, y2]` in raw page pixels; PDFs rendered at 150 dpi
have these very pixels. Sums and differences stand on no page: their regions are those of the two numbers.

## Settings
{settings}

## Limits
Clean print, few fonts, one language, no photographs, no handwriting, tables of at most six rows. A reader trained on
it reads MiniDocs, not the world.

Licence: Apache-2.0, as the code. Pages are set in the DejaVu fonts that come with matplotlib (free licence).
"""
