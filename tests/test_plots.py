"""Figures are drawn, and drawn at the place the record says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers import FakeCorpus, FakeRetriever
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from vrag_lib.corpus import Question
from vrag_lib.environment import EnvironmentConfig
from vrag_lib.geometry import Box, Size, View
from vrag_lib.plots import (
    RIGHT,
    WRONG,
    boxes_figure,
    compared_curves,
    curves_figure,
    interval_bars,
    page_gallery,
    readings_figure,
    save_figure,
    score_mixture_figure,
    trajectory_figure,
    view_figure,
)
from vrag_lib.policy import ScriptedPolicy
from vrag_lib.rollout import rollout
from vrag_lib.scale_evaluate import Look
from vrag_lib.trajectory import ImageRef

CORPUS = FakeCorpus([Size(800, 600), Size(600, 900), Size(800, 600)])


def pixels(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_a_gallery_shows_every_page_once():
    figure = page_gallery(CORPUS.pages, columns=2)
    assert [ax.get_title() for ax in figure.axes] == ["doc_1", "doc_2", "doc_3", ""]
    assert len(np.unique(pixels(figure).reshape(-1, 4), axis=0)) > 100
    with pytest.raises(ValueError, match="no pages"):
        page_gallery([])


def test_a_crop_is_drawn_where_its_view_says():
    view = View.of_page(Size(800, 600), 256 * 784, 512 * 784)
    crop = view.crop(view.to_shown(Box(100, 200, 400, 500)), 256 * 784, 512 * 784)
    left, right = view_figure(CORPUS, ImageRef("doc_1", crop)).axes
    patch = left.patches[0]
    assert (patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) == (100, 200, 300, 300)
    assert f"{crop.shown.width} × {crop.shown.height}" in right.get_title()


def test_a_trajectory_strip_shows_each_image_and_the_next_crops_box():
    script = ["<search>1</search>", "<bbox>[50, 60, 250, 200]</bbox>", "<think>$x$</think><answer>$7_a^</answer>"]
    retriever = FakeRetriever(CORPUS.page_ids)
    record = rollout(ScriptedPolicy(script), [Question("q", "how $many_?", "9")], CORPUS, retriever)[0]
    figure = trajectory_figure(record, CORPUS)
    page, region = figure.axes
    patch = page.patches[0]
    assert abs(patch.get_x() - 50) < 2 and abs(patch.get_y() - 60) < 2 and not region.patches
    assert figure.get_suptitle() == "how $many_?" and "[50, 60, 250, 200]" in page.get_xlabel()
    said = page.figure.get_suptitle()
    assert said == "→ $7_a^ ✗ (truth: 9)"
    pixels(figure)
    with pytest.raises(ValueError, match="shown no image"):
        trajectory_figure(
            rollout(ScriptedPolicy(["<answer>x</answer>"]), [Question("q", "?", "")], CORPUS, retriever)[0], CORPUS
        )


@pytest.mark.parametrize(
    ("answer", "truth", "said", "colour"),
    [
        ("7.0", "7", "→ 7.0 ✓ (truth: 7)", RIGHT),
        ("8", "7", "→ 8 ✗ (truth: 7)", WRONG),
        ("8", "", "→ 8", "black"),
        (None, "7", "→ none (max_turns) ✗ (truth: 7)", WRONG),
    ],
)
def test_the_answer_of_a_strip_is_judged_where_the_truth_is_known(answer, truth, said, colour):
    script = ["<search>1</search>", "<search>2</search>" if answer is None else f"<answer>{answer}</answer>"]
    environment = EnvironmentConfig(max_turns=2)
    question = Question("q", "how many?", truth)
    record = rollout(ScriptedPolicy(script), [question], CORPUS, FakeRetriever(CORPUS.page_ids), environment)[0]
    strip = trajectory_figure(record, CORPUS).axes[0].figure
    assert strip.get_suptitle() == said and strip._suptitle.get_color() == colour


def test_named_boxes_carry_their_names_where_they_cover_nothing():
    figure = boxes_figure(CORPUS.pages[0], {"title": Box(0, 0, 90, 20), "row": Box(5, 50, 90, 60)})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["title", "row"]
    assert len(figure.axes[0].patches) == 2 and not figure.axes[0].texts
    pixels(figure)
    assert legend.get_window_extent().y0 >= figure.axes[0].get_window_extent().y1
    assert not boxes_figure(CORPUS.pages[0], {}).legends


def test_a_mixture_needs_two_scores_and_shows_what_was_kept():
    figure = score_mixture_figure([0.9, 0.88, 0.3, 0.29, 0.28], kept=2)
    assert "2 of 5 pages kept" in figure.axes[0].get_title() and len(figure.axes[1].lines) == 2
    pixels(figure)
    low, high = figure.axes[0].get_xlim()
    ranks = [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high]
    assert ranks and all(tick == int(tick) and 1 <= tick <= 5 for tick in ranks)
    with pytest.raises(ValueError, match="at least two"):
        score_mixture_figure([1.0], 1)


def test_interval_bars_carry_their_intervals(tmp_path):
    table = pd.DataFrame({"method": ["a", "b+c"], "R@1": [10.0, 20], "R@1_low": [5.0, 15], "R@1_high": [15.0, 30]})
    figure = interval_bars(table, "method", ["R@1"])
    segments = figure.axes[0].collections[0].get_segments()
    assert [tuple(segment[:, 1]) for segment in segments] == [(5.0, 15.0), (15.0, 30.0)]
    assert save_figure(figure, tmp_path / "a" / "bars.png").stat().st_size > 1000


def test_readings_say_what_was_read_and_whether_it_is_right():
    image = Image.new("RGB", (56, 28))
    looks = [
        Look(image, "whole page, 56 × 28 px", "how many?", "12", "12"),
        Look(image, "gold region, 56 × 28 px", "how $x$ much?", "7", "<b>8</b>"),
        Look(image, "gold region, 56 × 28 px", "how?", "7", "7"),
    ]
    figure = readings_figure(looks)
    axes = [ax for ax in figure.axes if ax.images]
    assert len(axes) == 3
    assert [ax.xaxis.label.get_color() for ax in axes] == [RIGHT, WRONG, RIGHT]
    assert "how $x$ much?" in axes[1].get_title() and "truth '7'" in axes[1].get_xlabel()


def test_curves_skip_empty_cells_and_absent_columns():
    table = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "eval_loss": [None, 2.5, None]})
    figure = curves_figure(table, {"loss": ["loss", "eval_loss", "other"], "rate": []})
    lines = figure.axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3], [2]]
    assert [ax.get_title() for ax in figure.axes] == ["loss", "rate"]


def test_legends_stand_below_the_curves_and_held_out_columns_are_dashed_twins():
    table = pd.DataFrame({"step": [1, 2], "a": [0.0, 1], "held a": [0.0, 0.5], "held b": [0.1, 0.2], "c": [1.0, 1]})
    figure = curves_figure(table, {"one": ["a", "b"], "two": ["c"], "three": ["a"]}, across=2, twin="held ")
    one, two, three = figure.axes
    a, held_a, held_b = one.lines
    assert (a.get_linestyle(), held_a.get_linestyle(), held_b.get_linestyle()) == ("-", "--", "--")
    assert a.get_color() == held_a.get_color() != held_b.get_color()
    assert [text.get_text() for text in one.get_legend().get_texts()] == ["a", "b"]
    pixels(figure)
    assert one.get_position().y0 > three.get_position().y1 and one.get_position().x1 < two.get_position().x0
    for ax in figure.axes:
        assert ax.get_legend().get_window_extent().y1 < ax.xaxis.label.get_window_extent().y0 + 1


def test_curves_of_several_seeds_are_their_mean_and_range_where_all_have_a_value():
    table = pd.DataFrame(
        {"seed": [0, 0, 0, 1, 1], "step": [1, 2, 3, 1, 2], "reward": [0.0, 0.4, 0.9, 0.2, 0.6], "kl": [1.0] * 5}
    )
    left, right = curves_figure(table, {"reward": ["reward"], "kl": ["kl"]}, over="seed").axes
    line = left.lines[0]
    assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == pytest.approx([0.1, 0.5])
    band = left.collections[0].get_datalim(left.transData)
    assert (band.x0, band.x1, band.y0, band.y1) == pytest.approx((1, 2, 0.0, 0.6))
    assert list(right.lines[0].get_ydata()) == [1.0, 1.0]


def test_experiments_are_compared_line_by_line_each_run_smoothed_by_itself():
    table = pd.DataFrame(
        {
            "cell": ["a"] * 4 + ["b"] * 2,
            "seed": [0, 0, 1, 1, 0, 0],
            "step": [1, 2, 1, 2, 1, 2],
            "reward": [0.0, 1.0, 1.0, 2.0, 5.0, 7.0],
        }
    )
    (panel,) = compared_curves(table, {"reward": "reward"}, by="cell", over="seed", smooth=2).axes
    assert [line.get_label() for line in panel.lines] == ["a", "b"]
    assert [list(line.get_ydata()) for line in panel.lines] == [[0.5, 1.0], [5.0, 6.0]]
