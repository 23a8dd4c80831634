"""Draw the pages of MiniDocs and keep the truth: for every value on a page its box and the box of its row or section.

Each `draw_*` function fills a box of a canvas and returns the facts it drew. Labels, headings and text are set at
label size, figures in tables and charts at the much smaller value size: shown whole, a page lets a reader tell which
row or bar is meant but not what it says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vrag_lib.geometry import Box
from vrag_lib.minidocs_canvas import Canvas, Font, arc, cap_height, text_width, union, wrap
from vrag_lib.minidocs_content import SHORT_MONTHS, Board, Table
from vrag_lib.minidocs_styles import Style, fitted


@dataclass(frozen=True)
class Fact:
    """One thing a page says. Boxes are raw page pixels: `answer_box` around the ink of `value`, `region_box` around
    the row, bar, legend entry, sentence or box that says it.

    `element` is text, table, chart or layout; `subject` the measure or board it belongs to, `item` the row, bar, month
    or heading, `column` what the value is: `value`, `change`, `share`, `heading`, `entry` or `emblem`.
    """

    element: str
    subject: str
    item: str
    column: str
    value: str
    answer_box: Box
    region_box: Box
    position: str = ""


def draw_header(canvas: Canvas, style: Style, entity: str, title: str, footer: str, number: int) -> Box:
    """Title, the entity's name, small print at the foot; returns the box left for the page's content."""
    palette, size, margin = style.palette, style.size, style.margin
    header = style.family.header
    left = margin + (style.label_px if header == "side" else 0)
    width = size.width - left - margin
    x, align = (left + width / 2, "centre") if style.family.centred else (left, "left")
    title_font = fitted(title, style.title, width)
    entity_base = margin * 0.6 + style.label_px
    title_base = (entity_base if header != "foot" else margin * 0.3) + style.title_px * 1.25
    top = title_base + style.title_px * 0.55
    bottom = size.height - margin * 0.5 - style.value_px * 1.4
    colour, title_colour = palette.text, palette.text if palette.name.startswith("dark") else palette.primary
    if header == "band":
        canvas.rectangle(Box(0, 0, size.width, top), fill=palette.primary)
        colour = title_colour = palette.on_primary
    elif header == "rule":
        canvas.rectangle(Box(left, top - 4, left + width, top), fill=palette.primary)
    elif header == "side":
        canvas.rectangle(Box(0, 0, style.label_px, size.height), fill=palette.primary)
    else:
        band = style.label_px * 1.7
        canvas.rectangle(Box(0, size.height - band, size.width, size.height), fill=palette.primary)
        base = size.height - band / 2 + cap_height(style.label) / 2
        canvas.text(margin, base, entity, style.label, palette.on_primary)
        canvas.text(size.width - margin, base, f"{footer}  {number}", style.value, palette.on_primary, "right")
        bottom = size.height - band - margin * 0.3
    if header != "foot":
        canvas.text(x, entity_base, entity, style.label, colour, align)
        base = size.height - margin * 0.5
        canvas.text(left, base, footer, style.value, palette.small)
        canvas.text(size.width - margin, base, str(number), style.value, palette.small, "right")
    canvas.text(x, title_base, title, title_font, title_colour, align)
    return Box(left, top + style.label_px * 0.7, left + width, bottom - style.value_px * 0.5)


def draw_cover(canvas: Canvas, style: Style, entity: str, emblem: str, headline: str, small: Sequence[str]) -> Fact:
    """The first page: whose document it is and, only here, under which emblem the entity is known."""
    palette, size, margin = style.palette, style.size, style.margin
    header = style.family.header
    if header == "side":
        canvas.rectangle(Box(0, 0, size.width * 0.3, size.height), fill=palette.primary)
    elif header == "band":
        canvas.rectangle(Box(0, 0, size.width, size.height * 0.24), fill=palette.primary)
    elif header == "rule":
        canvas.rectangle(Box(margin, size.height * 0.27, size.width - margin, size.height * 0.27 + 6), palette.primary)
    else:
        canvas.rectangle(Box(0, size.height * 0.82, size.width, size.height), fill=palette.primary)
    left = size.width * 0.3 + margin if header == "side" else margin
    width = size.width - left - margin
    x, align = (left + width / 2, "centre") if style.family.centred else (left, "left")
    _cover_ornament(canvas, style)
    large = Font(style.family.heading_face, round(style.title_px * 1.35))
    y = size.height * 0.42
    canvas.text(x, y, entity, fitted(entity, large, width), palette.text, align)
    canvas.text(x, y + style.title_px * 1.5, headline, fitted(headline, style.label, width), palette.text, align)
    line = f"known as the {emblem}"
    base = y + style.title_px * 1.5 + style.label_px * 2
    font = fitted(line, style.label, width)
    region = canvas.text(x, base, line, font, palette.text, align)
    answer = Box(region.x2 - text_width(emblem, font) - 2, region.y1, region.x2, region.y2)
    for i, text in enumerate(small):
        canvas.text(x, base + style.label_px * 1.6 + i * style.value_px * 1.7, text, style.value, palette.small, align)
    return Fact("text", "cover", entity, "emblem", emblem, answer, _pad(region, style.label_px * 0.4, style))


def _cover_ornament(canvas: Canvas, style: Style) -> None:
    size, palette = style.size, style.palette
    x, y, r = size.width * 0.84, size.height * 0.14, style.title_px
    if style.family.header == "side":
        x = size.width * 0.15
    if style.family.rounded:
        for i in range(3):
            canvas.polygon(arc((x - (i - 1) * 1.3 * r, y), 0.55 * r, 0, 2 * math.pi), palette.series[i])
    else:
        for i, height in enumerate((0.7, 1.2, 0.9, 1.6)):
            x1 = x + (i - 2) * 0.7 * r
            canvas.rectangle(Box(x1, y + 0.8 * r - height * r, x1 + 0.5 * r, y + 0.8 * r), fill=palette.series[i])


def draw_text(canvas: Canvas, box: Box, style: Style, sentences: Sequence[tuple[str, str, str, str]]) -> list[Fact]:
    """Sentences, one below the other; each is `(text, subject, item, value)`, fillers with no value.

    Sentences that no longer fit the box are left out.
    """
    facts: list[Fact] = []
    font, step = style.text, style.text_px * 1.42
    bullets = style.family.format == "slide"
    indent = style.text_px * 1.0 if bullets else 0
    blocks = [(wrap(text, font, box.width - indent), rest) for text, *rest in sentences]
    while sum(len(lines) for lines, _ in blocks) * step + len(blocks) * step * 0.35 > box.height:
        blocks.pop()
    spare = box.height - sum(len(lines) for lines, _ in blocks) * step
    gap = min(step * 0.9, spare / max(1, len(blocks)))
    y = box.y1
    for lines, (subject, item, value) in blocks:
        if bullets:
            dot = style.text_px * 0.28
            middle = y + step * 0.5
            canvas.rectangle(Box(box.x1, middle - dot / 2, box.x1 + dot, middle + dot / 2), fill=style.palette.primary)
        answer = None
        boxes = []
        for i, line in enumerate(lines):
            base = y + i * step + step * 0.5 + cap_height(font) / 2
            boxes.append(canvas.text(box.x1 + indent, base, line, font, style.palette.text))
            found = re.search(rf"(?<![\w.]){re.escape(value)}(?!\w|\.\d)", line) if value else None
            if found:
                start = box.x1 + indent + text_width(line[: found.start()], font)
                end = start + text_width(value, font)
                answer = Box(start - 1, boxes[-1].y1, end + 1, boxes[-1].y2)
        if answer:
            region = _pad(union([*boxes, answer]), style.text_px * 0.25, style)
            facts.append(Fact("text", subject, item, "value", value, answer, region))
        y += len(lines) * step + gap
    return facts


def draw_notes(canvas: Canvas, box: Box, style: Style, notes: Sequence[str]) -> None:
    """Remarks below a table or chart, as many as the box has room for; nothing is asked about them."""
    step = style.label_px * 1.42
    y = box.y1
    for note in notes:
        lines = wrap(note, style.label, box.width)
        if y + len(lines) * step > box.y2:
            return
        for i, line in enumerate(lines):
            base = y + (i + 0.5) * step + cap_height(style.label) / 2
            canvas.text(box.x1, base, line, style.label, style.palette.text)
        y += (len(lines) + 0.35) * step


def draw_table(canvas: Canvas, box: Box, style: Style, table: Table, with_changes: bool) -> list[Fact]:
    """A ruled table: items at label size, values (and changes) at value size. A fact's region is its row."""
    palette, ruling = style.palette, style.family.ruling
    rows = len(table.items) + 1
    height = min(box.height / rows, style.label_px * 2.3)
    width = min(box.width, style.label_px * (24 if with_changes else 19))
    x1 = box.x1 + (box.width - width) / 2 if style.family.centred else box.x1
    x2 = x1 + width
    y1 = box.y1 + min(style.label_px, (box.height - height * rows) * 0.3)
    columns = [(table.values, "value", table.measure.unit, x2 - (width * 0.27 if with_changes else 0))]
    if with_changes:
        columns.append((table.changes, "change", "change", x2))
    pad = style.label_px * 0.5

    def middle(row: int, font: Font) -> float:
        return y1 + (row + 0.5) * height + cap_height(font) / 2

    head = Box(x1, y1, x2, y1 + height)
    filled = ruling in ("boxed", "zebra")
    canvas.rectangle(head, fill=palette.primary if filled else palette.panel)
    head_colour = palette.on_primary if filled else palette.text
    canvas.text(x1 + pad, middle(0, style.heading), table.measure.dimension.name, style.heading, head_colour)
    for _, _, name, right in columns:
        canvas.text(right - pad, middle(0, style.value), name, style.value, head_colour, "right")
    facts = []
    for i, item in enumerate(table.items, 1):
        row = Box(x1, y1 + i * height, x2, y1 + (i + 1) * height)
        if ruling == "zebra" and i % 2 == 0:
            canvas.rectangle(row, fill=palette.panel)
        if ruling in ("grid", "lines"):
            canvas.rectangle(Box(x1, row.y2 - 1, x2, row.y2 + 1), fill=palette.hairline)
        canvas.text(x1 + pad, middle(i, style.label), item, style.label, palette.text)
        for values, column, _, right in columns:
            ink = canvas.text(right - pad, middle(i, style.value), values[i - 1], style.value, palette.small, "right")
            facts.append(Fact("table", table.measure.name, item, column, values[i - 1], ink, row))
    whole = Box(x1, y1, x2, y1 + rows * height)
    if ruling in ("grid", "boxed"):
        canvas.rectangle(whole, outline=palette.hairline if ruling == "grid" else palette.primary, line_width=2)
    if ruling == "grid":
        for _, _, _, right in columns:
            line = right - width * 0.27
            canvas.rectangle(Box(line - 1, y1, line + 1, whole.y2), fill=palette.hairline)
    return facts


def draw_bars(canvas: Canvas, box: Box, style: Style, table: Table) -> list[Fact]:
    """A bar chart with the value printed at each bar: columns where the labels fit below them, else rows."""
    widest = max(text_width(item, style.label) for item in table.items)
    if style.family.horizontal_bars or widest + style.label_px * 0.5 > box.width / len(table.items):
        return _draw_rows(canvas, box, style, table, widest)
    palette, slot = style.palette, box.width / len(table.items)
    base = min(box.y2, box.y1 + box.width * 0.75) - style.label_px * 1.7
    full = base - box.y1 - style.value_px * 2.4
    facts = []
    for i, (item, value, share) in enumerate(zip(table.items, table.values, _heights(table), strict=True)):
        x = box.x1 + (i + 0.5) * slot
        top = base - full * share
        bar = Box(x - slot * 0.27, top, x + slot * 0.27, base)
        canvas.rectangle(bar, fill=_series(style, i), radius=0)
        label = canvas.text(x, base + style.label_px * 1.2, item, style.label, palette.text, "centre")
        ink = canvas.text(x, top - style.value_px * 0.6, value, style.value, palette.small, "centre")
        region = _pad(union([bar, label, ink]), style.value_px * 0.4, style)
        facts.append(Fact("chart", table.measure.name, item, "value", value, ink, region))
    canvas.rectangle(Box(box.x1, base, box.x2, base + 2), fill=palette.hairline)
    return facts


def _draw_rows(canvas: Canvas, box: Box, style: Style, table: Table, widest: float) -> list[Fact]:
    palette = style.palette
    height = min(box.height / len(table.items), style.label_px * 3)
    width = min(box.width, style.label_px * 24)
    x1 = box.x1 + (box.width - width) / 2 if style.family.centred else box.x1
    left = x1 + widest + style.label_px * 0.6
    longest = max(text_width(value, style.value) for value in table.values)
    full = x1 + width - left - longest - style.value_px * 1.2
    facts = []
    for i, (item, value, share) in enumerate(zip(table.items, table.values, _heights(table), strict=True)):
        y = box.y1 + (i + 0.5) * height
        bar = Box(left, y - height * 0.28, left + full * share, y + height * 0.28)
        canvas.rectangle(bar, fill=_series(style, i))
        base = y + cap_height(style.label) / 2
        label = canvas.text(left - style.label_px * 0.4, base, item, style.label, palette.text, "right")
        base = y + cap_height(style.value) / 2
        ink = canvas.text(bar.x2 + style.value_px * 0.5, base, value, style.value, palette.small)
        region = _pad(union([bar, label, ink]), style.value_px * 0.4, style)
        facts.append(Fact("chart", table.measure.name, item, "value", value, ink, region))
    canvas.rectangle(Box(left - 2, box.y1, left, box.y1 + len(table.items) * height), fill=palette.hairline)
    return facts


def draw_line(canvas: Canvas, box: Box, style: Style, table: Table) -> list[Fact]:
    """A line chart over months with the value printed at each point. A fact's region is the month's upright strip."""
    palette, slot = style.palette, box.width / len(table.items)
    base = min(box.y2, box.y1 + box.width * 0.75) - style.label_px * 1.7
    top = box.y1 + style.value_px * 2.4
    for i in range(5):
        y = base - (base - box.y1) * i / 5
        canvas.rectangle(Box(box.x1, y, box.x2, y + (2 if i == 0 else 1)), fill=palette.hairline)
    low, high = 0.12, 1.0
    heights = [low + (high - low) * (h - 0.25) / 0.75 for h in _heights(table)]
    points = [(box.x1 + (i + 0.5) * slot, base - (base - top) * h) for i, h in enumerate(heights)]
    colour = palette.series[0] if palette.name.startswith("dark") else palette.primary
    canvas.polyline(points, colour, 4)
    facts = []
    for i, ((x, y), item, value) in enumerate(zip(points, table.items, table.values, strict=True)):
        canvas.polygon(arc((x, y), 7, 0, 2 * math.pi), colour)
        around = [points[j][1] for j in (i - 1, i + 1) if 0 <= j < len(points)]
        above = y <= sum(around) / len(around) or y + style.value_px * 2 > base
        baseline = y - style.value_px * 0.8 if above else y + style.value_px * 0.8 + cap_height(style.value)
        half = text_width(value, style.value) / 2 + 3
        # The page shows through behind the figure, so that no stroke crosses it.
        back = Box(x - half, baseline - cap_height(style.value) - 3, x + half, baseline + 3)
        canvas.rectangle(back, fill=canvas.background)
        ink = canvas.text(x, baseline, value, style.value, palette.small, "centre")
        canvas.text(x, base + style.label_px * 1.2, SHORT_MONTHS.get(item, item), style.label, palette.text, "centre")
        strip = Box(x - slot / 2, box.y1, x + slot / 2, base + style.label_px * 1.7)
        facts.append(Fact("chart", table.measure.name, item, "value", value, ink, strip))
    return facts


def draw_pie(canvas: Canvas, box: Box, style: Style, table: Table) -> list[Fact]:
    """A pie or ring with a legend that carries the shares. A fact's region is its row of the legend."""
    palette = style.palette
    count = len(table.items)
    widest = max(text_width(item, style.label) for item in table.items)
    longest = max(text_width(value, style.value) for value in table.values)
    legend_width = style.label_px * 2.2 + widest + longest
    beside = box.width > 1.15 * box.height and box.width - legend_width > style.label_px * 6
    if beside:
        radius = min(box.height, box.width - legend_width - style.label_px * 2) / 2
        centre = (box.x1 + radius, box.y1 + box.height / 2)
        height = min(box.height / count, style.label_px * 2.2)
        left, top = box.x1 + 2 * radius + style.label_px * 2, centre[1] - height * count / 2
    else:
        height = min(box.height * 0.55 / count, style.label_px * 1.7)
        radius = min(box.width * 0.8, box.height - height * count - style.label_px) / 2
        centre = (box.x1 + box.width / 2, box.y1 + radius)
        left, top = box.x1 + (box.width - legend_width) / 2, centre[1] + radius + style.label_px
    angle = 0.0
    facts = []
    for i, (item, value) in enumerate(zip(table.items, table.values, strict=True)):
        sweep = 2 * math.pi * float(value.rstrip("%")) / 100
        canvas.polygon([centre, *arc(centre, radius, angle, angle + sweep)], palette.series[i])
        angle += sweep
        y = top + (i + 0.5) * height
        swatch = style.label_px * 0.7
        mark = Box(left, y - swatch / 2, left + swatch, y + swatch / 2)
        canvas.rectangle(mark, fill=palette.series[i])
        x = left + style.label_px * 1.2
        label = canvas.text(x, y + cap_height(style.label) / 2, item, style.label, palette.text)
        base = y + cap_height(style.value) / 2
        ink = canvas.text(x + widest + style.label_px * 0.6, base, value, style.value, palette.small)
        region = Box(left - style.value_px * 0.4, y - height / 2, ink.x2 + style.value_px * 0.5, y + height / 2)
        region = union([region, _pad(label, 1, style)])
        facts.append(Fact("chart", table.measure.name, item, "share", value, ink, region))
    if style.family.donut:
        canvas.polygon(arc(centre, radius * 0.5, 0, 2 * math.pi), canvas.background)
    return facts


_ROW_NAMES = {2: ("upper", "lower"), 3: ("upper", "middle", "lower")}
_COLUMN_NAMES = {2: ("left", "right"), 3: ("left", "middle", "right")}


def position_name(row: int, column: int, rows: int, columns: int) -> str:
    """What a place in a grid is called.

    >>> position_name(0, 1, 2, 3), position_name(1, 1, 3, 2), position_name(1, 0, 2, 2)
    ('upper middle', 'middle right', 'lower left')
    """
    return f"{_ROW_NAMES[rows][row]} {_COLUMN_NAMES[columns][column]}"


def draw_board(
    canvas: Canvas, box: Box, style: Style, board: Board, headings: Sequence[str], entries: Sequence[str]
) -> list[Fact]:
    """A grid of four or six headed boxes, each with a small entry. A fact's region is its box."""
    across = style.family.format == "slide"
    columns = 2 if len(headings) == 4 or not across else 3
    rows = len(headings) // columns
    width, step_x, left = _spread(box.x1, box.width, columns, style.label_px * 10, style.label_px)
    height, step_y, top = _spread(box.y1, box.height, rows, style.label_px * 5.5, style.label_px)
    facts = []
    for i, (heading, entry) in enumerate(zip(headings, entries, strict=True)):
        row, column = divmod(i, columns)
        x1, y1 = left + column * step_x, top + row * step_y
        card = Box(x1, y1, x1 + width, y1 + height)
        position = position_name(row, column, rows, columns)
        facts += _draw_card(canvas, card, style, board, heading, entry, position)
    return facts


def _spread(start: float, length: float, count: int, longest: float, unit: float) -> tuple[float, float, float]:
    """Places `count` boxes along a length, none longer than `longest`: their length, the step, the first's start."""
    size = min(longest, (length - (count - 1) * unit * 0.7) / count)
    gap = min(unit * 3, (length - count * size) / (count - 1))
    return size, size + gap, start + (length - count * size - (count - 1) * gap) / 2


def draw_flow(
    canvas: Canvas, box: Box, style: Style, board: Board, headings: Sequence[str], entries: Sequence[str]
) -> list[Fact]:
    """A chain of headed boxes joined by arrows, rightwards on slides, downwards on reports."""
    count, palette = len(headings), style.palette
    across = style.family.format == "slide"
    gap = style.label_px * 1.2
    if across:
        width, height = (box.width - gap * (count - 1)) / count, min(box.height, style.label_px * 5.5)
    else:
        width, height = style.label_px * 10, (box.height - gap * (count - 1)) / count
    facts = []
    for i, (heading, entry) in enumerate(zip(headings, entries, strict=True)):
        if across:
            x1, y1 = box.x1 + i * (width + gap), box.y1 + (box.height - height) * 0.35
        else:
            x1, y1 = box.x1 + (box.width - width) / 2, box.y1 + i * (height + gap)
        card = Box(x1, y1, x1 + width, y1 + height)
        facts += _draw_card(canvas, card, style, board, heading, entry, str(i + 1))
        if i + 1 < count:
            a = gap * 0.36
            if across:
                x, y = card.x2 + gap / 2, (card.y1 + card.y2) / 2
                canvas.polygon([(x - a, y - a), (x + a, y), (x - a, y + a)], palette.series[0])
            else:
                x, y = (card.x1 + card.x2) / 2, card.y2 + gap / 2
                canvas.polygon([(x - a, y - a), (x, y + a), (x + a, y - a)], palette.series[0])
    return facts


def _draw_card(
    canvas: Canvas, card: Box, style: Style, board: Board, heading: str, entry: str, position: str
) -> list[Fact]:
    palette = style.palette
    radius = style.label_px * 0.5 if style.family.rounded else 0
    canvas.rectangle(card, fill=palette.panel, outline=palette.primary, line_width=3, radius=radius)
    x, y = (card.x1 + card.x2) / 2, (card.y1 + card.y2) / 2
    font = fitted(heading, style.heading, card.width - style.label_px * 0.6)
    title = canvas.text(x, y - style.label_px * 0.15, heading, font, palette.text, "centre")
    caption = f"{board.caption} "
    width = text_width(caption, style.value) + text_width(entry, style.value)
    base = y + style.label_px * 0.35 + style.value_px * 1.2
    canvas.text(x - width / 2, base, board.caption, style.value, palette.small)
    ink = canvas.text(x - width / 2 + text_width(caption, style.value), base, entry, style.value, palette.small)
    return [
        Fact("layout", board.title, heading, "entry", entry, ink, card, position),
        Fact("layout", board.title, heading, "heading", heading, title, card, position),
    ]


def _heights(table: Table) -> list[float]:
    """Values as shares of the axis, stretched so that the smallest bar still shows: in [0.25, 1]."""
    numbers = table.numbers
    low, high = min(numbers), max(numbers)
    return [0.25 + 0.75 * (n - low) / max(high - low, 1e-9) for n in numbers]


def _series(style: Style, index: int) -> tuple[int, int, int]:
    if style.family.rounded:
        return style.palette.series[index]
    return style.palette.series[0] if style.palette.name.startswith("dark") else style.palette.primary


def _pad(box: Box, by: float, style: Style) -> Box:
    """The box grown on all sides, kept inside the page."""
    return Box(box.x1 - by, box.y1 - by, box.x2 + by, box.y2 + by).intersection(style.page_box)
