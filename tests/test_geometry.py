"""Frames, shown sizes and crops (contract: one geometry; traps T6, T8, T10)."""

from __future__ import annotations

import math

import pytest
from helpers import FakePage
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageChops

from vrag_lib.geometry import (
    MAX_ASPECT,
    MIN_CROP_SIDE,
    PATCH,
    Box,
    BoxError,
    Size,
    View,
    iou,
    render,
    shown_size,
    view_of_raw_box,
)

LOW, HIGH = 256 * 28 * 28, 512 * 28 * 28
sides = st.integers(1, 6000)
sizes = st.builds(Size, sides, sides).filter(lambda s: max(s.width, s.height) <= 20 * min(s.width, s.height))
fractions = st.floats(0, 1, allow_nan=False)
unit_boxes = st.tuples(fractions, fractions, fractions, fractions)


def box_in(size: Size, unit: tuple[float, float, float, float]) -> Box:
    x1, x2 = sorted((unit[0] * size.width, unit[2] * size.width))
    y1, y2 = sorted((unit[1] * size.height, unit[3] * size.height))
    return Box(x1, y1, x2, y2)


@given(sizes)
def test_shown_sides_are_multiples_of_28_within_the_bounds(size):
    shown = shown_size(size.width, size.height, LOW, HIGH)
    assert shown.width % PATCH == 0 and shown.height % PATCH == 0
    assert LOW <= shown.width * shown.height <= HIGH
    assert shown.tokens == shown.width * shown.height // PATCH**2


@given(sizes)
def test_shown_aspect_ratio_is_within_one_patch_of_the_original(size):
    shown = shown_size(size.width, size.height, LOW, HIGH)
    scale = math.sqrt(min(max(size.width * size.height, LOW), HIGH) / (size.width * size.height))
    for side, raw in ((shown.width, size.width), (shown.height, size.height)):
        assert abs(side - raw * scale) <= max(PATCH, 0.25 * raw * scale)


def test_qwens_own_processor_leaves_a_shown_size_as_it_is():
    from vrag_lib.torch_setup import ensure_torchvision

    ensure_torchvision()
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    for width, height in [(1280, 720), (1654, 2339), (300, 200), (4000, 210), (28, 28), (5000, 5000)]:
        shown = shown_size(width, height, LOW, HIGH)
        unchanged = smart_resize(shown.height, shown.width, factor=28, min_pixels=LOW, max_pixels=HIGH)
        assert unchanged == (shown.height, shown.width)


@pytest.mark.parametrize("width, height", [(0, 10), (10, 0), (float("nan"), 5), (float("inf"), 5), (1, 201)])
def test_sizes_that_cannot_be_shown_are_refused(width, height):
    with pytest.raises(ValueError, match=r"cannot be shown|aspect ratio"):
        shown_size(width, height, LOW, HIGH)


@pytest.mark.parametrize("size", [(98, 9800), (9800, 98), (147, 2716), (193, 1), (1, 200)])
def test_the_thinnest_strips_are_shown_too(size):
    """Also where a row of cells at their scale is longer than the bounds allow, and never as a shape Qwen refuses."""
    for low, high in ((80, 96), (4, 16), (4, 1280)):
        shown = shown_size(*size, low * 784, high * 784)
        assert shown.tokens <= high and max(shown.width, shown.height) <= 200 * min(shown.width, shown.height)
        assert (shown.width > shown.height) == (size[0] > size[1])


def test_contradicting_bounds_are_refused():
    with pytest.raises(ValueError, match="no image has between"):
        shown_size(100, 100, 2000, 1000)


@given(sizes, unit_boxes)
def test_frames_round_trip_within_one_pixel(size, unit):
    view = View.of_page(size, LOW, HIGH)
    box = box_in(size, unit)
    back = view.to_raw(view.to_shown(box))
    assert all(abs(a - b) < 1 for a, b in zip(box.as_tuple(), back.as_tuple(), strict=True))


@given(sizes, unit_boxes, unit_boxes)
def test_a_nested_crop_equals_the_direct_one(size, outer, inner):
    """Trap T6: the same raw region, reached in one crop or in two, is the same view."""
    page = View.of_page(size, LOW, HIGH)
    try:
        first = page.crop(box_in(page.shown, outer), LOW, HIGH)
        second = first.crop(box_in(first.shown, inner), LOW, HIGH)
    except BoxError:
        return
    named = box_in(first.shown, inner)
    cx, cy = (named.x1 + named.x2) / 2, (named.y1 + named.y2) / 2
    w, h = max(named.width, MIN_CROP_SIDE), max(named.height, MIN_CROP_SIDE)
    direct = view_of_raw_box(size, first.to_raw(Box(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)), LOW, HIGH)
    assert second == direct


def test_a_nested_crop_has_the_direct_ones_pixels():
    page = FakePage("doc_1", Size(1000, 800))
    image = page.open_image()
    whole = View.of_page(page.size, LOW, HIGH)
    first = whole.crop(whole.to_shown(Box(200, 100, 600, 500)), LOW, HIGH)
    second = first.crop(first.to_shown(Box(300, 200, 500, 400)), LOW, HIGH)
    direct = whole.crop(whole.to_shown(Box(300, 200, 500, 400)), LOW, HIGH)
    assert second.box == direct.box == Box(300, 200, 500, 400)
    assert ImageChops.difference(render(image, second), render(image, direct)).getbbox() is None
    left, top = render(image, second).getpixel((0, 0))[:2]
    assert abs(left - 300 / 1000 * 255) < 3 and abs(top - 200 / 800 * 255) < 3


@given(sizes, unit_boxes, st.floats(0, 200))
def test_every_crop_stays_on_the_page_with_a_showable_shape(size, unit, padding):
    view = View.of_page(size, LOW, HIGH)
    try:
        crop = view.crop(box_in(view.shown, unit), LOW, HIGH, padding)
    except BoxError as error:
        assert error.reason in {"zero_area", "outside"}
        return
    box = crop.box
    assert 0 <= box.x1 < box.x2 <= size.width and 0 <= box.y1 < box.y2 <= size.height
    assert all(v == int(v) for v in box.as_tuple())
    page_aspect = max(size.width / size.height, size.height / size.width)
    # Rounding outwards to whole pixels can stretch a side by two pixels.
    assert max(box.width, box.height) / min(box.width, box.height) <= max(MAX_ASPECT, page_aspect) + 2


@given(sizes, unit_boxes)
def test_a_crop_holds_what_was_named(size, unit):
    view = View.of_page(size, LOW, HIGH)
    named = box_in(view.shown, unit)
    try:
        crop = view.crop(named, LOW, HIGH)
    except BoxError:
        return
    raw = view.to_raw(named)
    assert crop.box.x1 <= raw.x1 + 1e-3 and crop.box.x2 >= raw.x2 - 1e-3
    assert crop.box.y1 <= raw.y1 + 1e-3 and crop.box.y2 >= raw.y2 - 1e-3


@pytest.mark.parametrize(
    "box, reason",
    [
        (Box(10, 10, 10, 50), "zero_area"),
        (Box(10, 10, 50, 10), "zero_area"),
        (Box(5000, 5000, 6000, 6000), "outside"),
        (Box(-90, -90, -10, -10), "outside"),
        (Box(float("nan"), 0, 1, 1), "not_finite"),
        (Box(0, 0, float("inf"), 1), "not_finite"),
    ],
)
def test_boxes_that_name_no_region_are_refused_by_rule(box, reason):
    with pytest.raises(BoxError) as caught:
        View.of_page(Size(1000, 700), LOW, HIGH).crop(box, LOW, HIGH)
    assert caught.value.reason == reason


def test_the_whole_page_can_be_cropped_and_shows_the_page():
    view = View.of_page(Size(1000, 700), LOW, HIGH)
    assert view.crop(Box(0, 0, view.shown.width, view.shown.height), LOW, HIGH) == view
    assert view.crop(Box(-1e9, -1e9, 1e9, 1e9), LOW, HIGH) == view


def test_corners_in_any_order_name_the_same_region():
    view = View.of_page(Size(1000, 700), LOW, HIGH)
    assert view.crop(Box(300, 200, 100, 50), LOW, HIGH) == view.crop(Box(100, 50, 300, 200), LOW, HIGH)


def test_an_extreme_aspect_ratio_is_widened_not_raised():
    """Trap T10: 1000 x 4 raw pixels would be 7083 x 28 shown."""
    size, thin = Size(1000, 700), Box(0, 300, 1000, 304)
    page = View.of_page(size, LOW, HIGH)
    assert page.shown.width / MIN_CROP_SIDE > MAX_ASPECT  # that a crop has a least side does not widen it enough
    for crop in (view_of_raw_box(size, thin, LOW, HIGH), page.crop(page.to_shown(thin), LOW, HIGH)):
        assert crop.box.height == 1000 / MAX_ASPECT
        assert crop.shown.width / crop.shown.height <= 1.3 * MAX_ASPECT


def test_a_small_crop_is_enlarged_to_the_least_shown_area():
    view = View.of_page(Size(2000, 1400), LOW, HIGH)
    crop = view.crop(Box(100, 100, 180, 160), LOW, HIGH)
    assert crop.shown.width * crop.shown.height >= LOW
    assert crop.shown.width / crop.box.width > 2 * view.shown.width / view.box.width


def test_render_refuses_an_image_of_another_size():
    view = View.of_page(Size(100, 100), LOW, HIGH)
    with pytest.raises(ValueError, match="the view was made for"):
        render(FakePage("doc_1", Size(100, 101)).open_image(), view)


def test_iou_of_disjoint_empty_and_equal_boxes():
    assert iou(Box(0, 0, 1, 1), Box(2, 2, 3, 3)) == 0
    assert iou(Box(0, 0, 0, 0), Box(0, 0, 0, 0)) == 0
    assert iou(Box(1, 2, 3, 4), Box(1, 2, 3, 4)) == 1
