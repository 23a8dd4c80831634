"""Figures of the notebooks and results: pages, boxes, intervals. Each function returns a matplotlib Figure.

Figures are drawn from records and tables only, so any of them can be redrawn without running anything again.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from vrag_lib.geometry import Box
from vrag_lib.judge import rule_judge
from vrag_lib.trajectory import ImageRef, Trajectory

if TYPE_CHECKING:
    import pandas as pd

    from vrag_lib.corpus import Corpus, Page
    from vrag_lib.scale_evaluate import Look

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")
"""One colour per series, in order; distinguishable in print and by colour-blind readers."""

RIGHT, WRONG = "#2f855a", "#c53030"
"""Colours of answers; a mark or the truth always stands beside them."""


def page_gallery(pages: Sequence[Page], columns: int = 4, width: float = 11.0) -> Figure:
    """The pages as thumbnails with their ids, `columns` to a row; `width` in inches."""
    if not pages:
        raise ValueError("there are no pages to show")
    columns = min(columns, len(pages))
    rows = [pages[i : i + columns] for i in range(0, len(pages), columns)]
    heights = [width / columns * max(page.size.height / page.size.width for page in row) + 0.2 for row in rows]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for ax in axes.flat:
        ax.axis("off")
    for ax, page in zip(axes.flat, pages, strict=False):
        _draw_image(ax, page.open_image(), 480)
        ax.set_title(page.id, fontsize=8, parse_math=False)
    return figure


def view_figure(corpus: Corpus, image: ImageRef, width: float = 11.0) -> Figure:
    """A crop as the model gets it: the box on its page (left) and the enlarged region (right), each with its size."""
    page = corpus.page(image.page_id)
    figure = Figure(figsize=(width, width * 0.42), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_image(left, page.open_image(), 900)
    _draw_box(left, image.view.box, COLOURS[1])
    left.set_title(f"{page.id}: {page.size.width} × {page.size.height} raw px", fontsize=9, parse_math=False)
    shown = image.view.shown
    _draw_image(right, image.render(corpus), 900)
    right.set_title(f"shown at {shown.width} × {shown.height} px, {shown.tokens} vision tokens", fontsize=9)
    for ax in (left, right):
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def trajectory_figure(record: Trajectory, corpus: Corpus, width: float = 11.0) -> Figure:
    """A trajectory as a strip: each image it was shown, the box of the crop that follows drawn on it, and under it the
    reply; question and answer on top. Where a reference answer is known it stands beside the answer, which the rule
    judge marks and colours. Text of models and files is drawn as plain characters."""
    images = [(i, image) for i, turn in enumerate(record.turns) for image in turn.images]
    if not images:
        raise ValueError(f"trajectory {record.id} was shown no image")
    figure = Figure(figsize=(width, 0.62 * width / min(max(len(images), 2), 4) + 1.3), layout="constrained")
    figure.suptitle(_plain(record.question, 110), fontsize=11, fontweight="bold", parse_math=False)
    strip = figure.subfigures()
    said, colour = _verdict(record)
    strip.suptitle(_plain(said, 110), fontsize=11, fontweight="bold", color=colour, parse_math=False)
    axes = strip.subplots(1, len(images), squeeze=False)[0]
    for ax, (i, image), following in zip(axes, images, [*images[1:], None], strict=True):
        _draw_image(ax, image.render(corpus), 700)
        if following is not None and following[1].is_crop and following[1].page_id == image.page_id:
            _draw_box(ax, image.view.to_shown(following[1].view.box), COLOURS[1])
        ax.set_xticks([])
        ax.set_yticks([])
        shown = image.view.shown
        name = f"{'region of ' if image.is_crop else ''}{image.page_id}, {shown.width} × {shown.height} px"
        ax.set_title(name, fontsize=8, parse_math=False)
        reply = record.turns[i + 1].text if i + 1 < len(record.turns) else ""
        ax.set_xlabel(_plain(reply, 52), fontsize=8, parse_math=False)
    return figure


def _verdict(record: Trajectory) -> tuple[str, str]:
    """The answer beside the truth, marked by the rule judge, and the colour of that; unmarked without a truth."""
    answer = record.answer if record.answer is not None else f"none ({record.stop_reason})"
    if not record.reference_answer:
        return f"→ {answer}", "black"
    right = rule_judge(record.question, record.reference_answer, record.answer or "")
    return f"→ {answer} {'✓' if right else '✗'} (truth: {record.reference_answer})", RIGHT if right else WRONG


def boxes_figure(page: Page, boxes: Mapping[str, Box], width: float = 7.0) -> Figure:
    """Named boxes (raw pixels) drawn on their page; the names stand above it, where they cover nothing."""
    figure = Figure(figsize=(width, width * page.size.height / page.size.width + 0.3), layout="constrained")
    ax = figure.subplots()
    ax.axis("off")
    _draw_image(ax, page.open_image(), 1200)
    for (name, box), colour in zip(boxes.items(), _cycle(COLOURS), strict=False):
        _draw_box(ax, box, colour, name)
    if boxes:
        figure.legend(fontsize=9, ncols=4, loc="outside upper left", frameon=False)
    return figure


def readings_figure(looks: Sequence[Look], columns: int = 2, width: float = 11.0) -> Figure:
    """Images as the policy was shown them, each at its own scale, with question, truth and what it read."""
    rows = -(-len(looks) // columns)
    figure = Figure(figsize=(width, 2.6 * rows), layout="constrained")
    for ax, look in zip(figure.subplots(rows, columns, squeeze=False).flat, looks, strict=False):
        ax.imshow(look.image, interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks([])
        right = look.got.strip() == look.expected
        said = f"reads {look.got.strip()[:30]!r}, truth {look.expected!r}"
        ax.set_title(_plain(f"{look.shown}\n{look.question}", 70), fontsize=8, parse_math=False)
        ax.set_xlabel(said, fontsize=9, color=RIGHT if right else WRONG, parse_math=False)
    return figure


def score_mixture_figure(scores: Sequence[float], kept: int, title: str = "") -> Figure:
    """The scores of a ranking with the two Gaussians that ViDoRAG fits to them; `kept` pages pass (ViDoRAG §4.1)."""
    from sklearn.mixture import GaussianMixture

    values = np.asarray(scores, dtype=float)  # (n,)
    if len(values) < 2:
        raise ValueError("a mixture of two needs at least two scores")
    mixture = GaussianMixture(2, random_state=0).fit(values[:, None])
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(np.arange(1, len(values) + 1), values, color=[COLOURS[0]] * kept + ["#cbd5e0"] * (len(values) - kept))
    spread = values.max() - values.min() or 1.0
    left.set_ylim(values.min() - 0.1 * spread, values.max() + 0.1 * spread)
    left.set(xlabel="rank", ylabel="score", title=f"{kept} of {len(values)} pages kept")
    left.set_xlim(0.3, len(values) + 0.7)
    left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    grid = np.linspace(values.min() - 0.2 * spread, values.max() + 0.2 * spread, 300)
    right.hist(values, bins=min(20, len(values)), density=True, color="#e2e8f0")
    for i in np.argsort(-mixture.means_[:, 0]):
        mean, variance = mixture.means_[i, 0], mixture.covariances_[i, 0, 0]
        density = mixture.weights_[i] * np.exp(-((grid - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
        right.plot(grid, density, label=f"mean {mean:.3g}, weight {mixture.weights_[i]:.2f}")
    right.set(xlabel="score", ylabel="density", title=title or "two components")
    right.legend(fontsize=8)
    return figure


def interval_bars(
    table: pd.DataFrame, label: str, metrics: Sequence[str], ylabel: str = "%", low: str = "_low", high: str = "_high"
) -> Figure:
    """Grouped bars with error bars: one group per row (named by column `label`), one bar per metric; the columns
    `metric + low` and `metric + high` hold the interval."""
    figure = Figure(figsize=(max(6, 1.5 * len(table)), 3.8), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(metrics)
    for i, metric in enumerate(metrics):
        errors = interval_errors(table, metric, low, high)
        places = np.arange(len(table)) + (i - (len(metrics) - 1) / 2) * width
        ax.bar(places, table[metric], width, yerr=errors, capsize=2, label=metric, color=COLOURS[i % len(COLOURS)])
    names = [_broken(str(name), 18) for name in table[label]]
    ax.set_xticks(np.arange(len(table)), names, fontsize=8)
    ax.set_ylabel(ylabel)
    figure.legend(fontsize=8, ncols=len(metrics), loc="outside upper left")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def interval_errors(table: pd.DataFrame, column: str, low: str = "_low", high: str = "_high") -> np.ndarray:
    """(2, rows): how far the interval of a column reaches below and above it."""
    middle = table[column].to_numpy(float)
    return np.clip([middle - table[column + low], table[column + high] - middle], 0, None)


def curves_figure(
    table: pd.DataFrame,
    columns: Mapping[str, Sequence[str]],
    x: str = "step",
    width: float = 11.0,
    over: str = "",
    across: int | None = None,
    twin: str = "",
) -> Figure:
    """Curves of a training run: one panel per entry of `columns` (title -> columns drawn in it), `across` to a row
    (default: all), each with its legend below. Empty cells, as they stand between validations, are skipped; columns
    that the table does not have are left out.

    over: the column that tells repeated runs apart, such as their seed. A line is then the mean of the runs, its band
    reaches from the lowest to the highest, and both end where the shortest run does.
    twin: how the names of columns begin that are drawn dashed, in the colour of the column whose name goes on so."""
    across = min(across or len(columns), len(columns))
    rows = -(-len(columns) // across)
    most = max((len(names) for names in columns.values()), default=0)
    figure = Figure(figsize=(width, rows * (3.0 + 0.18 * -(-most // 2))), layout="constrained")
    colours = COLOURS if most <= len(COLOURS) else matplotlib.color_sequences["tab20"]
    axes = figure.subplots(rows, across, squeeze=False).flat
    for ax in axes[len(columns) :]:
        ax.remove()
    for ax, (title, names) in zip(axes, columns.items(), strict=False):
        there = [name for name in names if name in table or (twin and twin + name in table)]
        for name, colour in zip(there, _cycle(colours), strict=False):
            if name in table:
                _draw_curve(ax, table, name, x, over, name, colour)
            if twin and twin + name in table:
                _draw_curve(ax, table, twin + name, x, over, "" if name in table else name, colour, "--")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(x)
        if ax.lines:  # below the name of the axis, where it covers no curve
            below = ax.transAxes + ScaledTranslation(0, -0.45, figure.dpi_scale_trans)
            ax.legend(
                fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, frameon=False,
                handlelength=1.5, columnspacing=1.0,
            )  # fmt: skip
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def compared_curves(
    table: pd.DataFrame, columns: Mapping[str, str], by: str, over: str, x: str = "step", smooth: int = 1
) -> Figure:
    """Curves of several experiments side by side: one panel per entry of `columns` (title -> column), in it a line per
    value of `by`, mean and band over its runs as in `curves_figure`. smooth: rows of a run averaged, the row itself and
    those before it."""
    names = list(dict.fromkeys(table[by]))
    figure = Figure(figsize=(3.4 * len(columns), 3.4 + 0.12 * len(names)), layout="constrained")
    colours = COLOURS if len(names) <= len(COLOURS) else matplotlib.color_sequences["tab20"]
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for ax, (title, column) in zip(axes, columns.items(), strict=True):
        for name, colour in zip(names, _cycle(colours), strict=False):
            part = table[table[by] == name].sort_values([over, x])
            averaged = part.groupby(over)[column].transform(lambda values: values.rolling(smooth, 1).mean())
            _draw_curve(ax, part.assign(**{column: averaged}), column, x, over, name, colour)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(x)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    return figure


def _draw_curve(
    ax, table: pd.DataFrame, column: str, x: str, over: str, label: str, colour: str, style: str = "-"
) -> None:
    # One column per run; a step that one of them lacks is left out.
    runs = table.pivot(index=x, columns=over, values=column) if over else table.set_index(x)[[column]]
    runs = runs.dropna()
    marker = "o" if len(runs) == 1 else None  # a line of one point would not be seen
    ax.plot(runs.index, runs.mean(axis=1), label=label, color=colour, linewidth=1.3, linestyle=style, marker=marker)
    if over:
        ax.fill_between(runs.index, runs.min(axis=1), runs.max(axis=1), color=colour, alpha=0.18, linewidth=0)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG at a size fit for a page."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return path


def _plain(text: str, width: int, lines: int = 5) -> str:
    """Text wrapped to `width` characters and at most `lines` lines, what is left out marked."""
    wrapped = [line for part in text.splitlines() for line in textwrap.wrap(part, width)]
    return "\n".join(wrapped[:lines] + ["…"] * (len(wrapped) > lines))


def _broken(name: str, width: int) -> str:
    """A name in lines of at most `width` characters, broken between its parts and never inside one.

    >>> _broken("visual:scale_retriever_colqwen2", 18).splitlines()
    ['visual:scale_', 'retriever_colqwen2']
    >>> _broken("BM25, OCR where no layer", 18).splitlines()
    ['BM25, OCR where no', 'layer']
    """
    lines = [""]
    for part in re.findall(r"[^\s_:+/-]*[_:+/-]+\s*|[^\s_:+/-]+\s*", name):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _cycle(values: Sequence[str]):
    while True:
        yield from values


def _draw_image(ax, image, most: int) -> None:
    """Draw an image in its own pixel frame; at most `most` pixels a side are kept in the figure."""
    width, height = image.size
    small = image.convert("RGB")
    small.thumbnail((most, most))
    ax.imshow(np.asarray(small), extent=(0, width, height, 0), interpolation="antialiased")


def _draw_box(ax, box: Box, colour: str, name: str = "") -> None:
    ax.add_patch(
        Rectangle((box.x1, box.y1), box.width, box.height, fill=False, edgecolor=colour, linewidth=2, label=name)
    )
