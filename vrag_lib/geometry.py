"""Image sizes and boxes in named frames: the one geometry of SFT, rollout, evaluation and viewer.

Three frames, all with the origin at the top left, x to the right, y down, in pixels:

* **raw**: the page image as stored on disk. Pixels are only ever cut from here.
* **shown**: an image as the model sees it, sides multiples of 28. Boxes in a reply are read in the frame of the
  last image shown (paper §2.2, eq. 2).
* a `View` ties the two together: which part of which raw page an image shows, and at what size.

Deviations from the released code, each on purpose: shown sizes are multiples of 28 *before* any box is read
(trap T8); a box on a crop is mapped through that crop's own view, so nested crops are right (T6); degenerate and
extreme boxes are decided by rule before any pixel is touched (T10).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

PATCH = 28
"""Side in pixels of one vision token of Qwen2-VL and Qwen2.5-VL after its 2x2 merge of 14-pixel patches."""

MAX_ASPECT = 20.0
"""Longest permitted ratio of a crop's sides; a thinner box is widened."""

MAX_SHOWN_ASPECT = 200
"""Longest ratio of the sides of what is shown, and the longest that Qwen's processor takes."""

MIN_CROP_SIDE = 28
"""Least side of a crop in shown pixels of the image it was named on; a smaller box grows about its centre."""


class BoxError(ValueError):
    """A box that names no region of the page; `reason` is a short machine-readable word."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    @property
    def tokens(self) -> int:
        """Vision tokens of an image shown at this size: one per 28x28 cell."""
        return (self.width // PATCH) * (self.height // PATCH)


@dataclass(frozen=True)
class Box:
    """An axis-parallel box `(x1, y1, x2, y2)`, right and bottom edges exclusive, in whichever frame its owner says."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def width(self) -> float:
        return self.x2 - self.x1

    @property
    def height(self) -> float:
        return self.y2 - self.y1

    @property
    def area(self) -> float:
        return max(0.0, self.width) * max(0.0, self.height)

    def as_tuple(self) -> tuple[float, float, float, float]:
        return (self.x1, self.y1, self.x2, self.y2)

    def intersection(self, other: Box) -> Box:
        """The common part; its area is 0 where the boxes do not meet."""
        return Box(max(self.x1, other.x1), max(self.y1, other.y1), min(self.x2, other.x2), min(self.y2, other.y2))


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes of the same frame, in [0, 1].

    >>> iou(Box(0, 0, 2, 2), Box(1, 0, 3, 2))
    0.3333333333333333
    """
    common = a.intersection(b).area
    union = a.area + b.area - common
    return common / union if union > 0 else 0.0


def shown_size(width: float, height: float, min_pixels: int, max_pixels: int) -> Size:
    """The size at which an image of `width` x `height` pixels is shown: sides multiples of 28, area within
    `min_pixels` and `max_pixels`, of those sizes next to the scaled image the one that distorts it least (where all of
    them are below `min_pixels`, as of some tall strips, the least distorted of these).

    Qwen2-VL's image processor leaves such a size as it is, so boxes and pixels stay in one frame. (Its own rule
    always rounds an oversized image down, which distorts a 1280 x 720 slide by 5 %; this one by 0.7 %.)

    >>> shown_size(1280, 720, 256 * 28 * 28, 512 * 28 * 28)
    Size(width=840, height=476)

    Raises ValueError for a side below 1, an aspect ratio above MAX_SHOWN_ASPECT or bounds that contradict.
    """
    if not 0 < min_pixels <= max_pixels or max_pixels < PATCH * PATCH:
        raise ValueError(f"no image has between {min_pixels} and {max_pixels} pixels and sides of 28 or more")
    if not (math.isfinite(width) and math.isfinite(height)) or min(width, height) < 1:
        raise ValueError(f"an image of {width} x {height} pixels cannot be shown")
    if max(width, height) / min(width, height) > MAX_SHOWN_ASPECT:
        raise ValueError(
            f"aspect ratio of {width} x {height} is above {MAX_SHOWN_ASPECT}, which Qwen's processor refuses"
        )
    area = width * height
    scale = math.sqrt(min(max(area, min_pixels), max_pixels) / area)
    columns, rows = width * scale / PATCH, height * scale / PATCH
    low, high = min_pixels / PATCH**2, max_pixels / PATCH**2
    best = None
    for r in {max(1, math.floor(rows)), math.ceil(rows)}:
        for c in {max(1, math.floor(columns)), math.ceil(columns), max(1, math.floor(high / r))}:
            if c * r > high or max(c, r) > MAX_SHOWN_ASPECT * min(c, r):
                continue
            distortion = abs(math.log(c / r * height / width))
            key = (c * r < low, round(distortion, 9), -c * r)
            if best is None or key < best[0]:
                best = (key, Size(c * PATCH, r * PATCH))
    if best is None:  # a strip so thin that even one row or column of cells is too long: as long as it may be
        long = PATCH * min(math.floor(high), MAX_SHOWN_ASPECT)
        return Size(long, PATCH) if width > height else Size(PATCH, long)
    return best[1]


@dataclass(frozen=True)
class View:
    """What one shown image shows: `box` (raw pixels, whole numbers) of a page, at `shown` size.

    A page shown whole is the view whose box is the page. `page` is the raw page's size.
    """

    page: Size
    box: Box
    shown: Size

    @classmethod
    def of_page(cls, page: Size, min_pixels: int, max_pixels: int) -> View:
        """The whole page at its shown size."""
        return cls(
            page, Box(0, 0, page.width, page.height), shown_size(page.width, page.height, min_pixels, max_pixels)
        )

    def to_raw(self, box: Box) -> Box:
        """Map a box from this view's shown frame to the raw page (paper eq. 2, composed with the view's own box)."""
        sx, sy = self.box.width / self.shown.width, self.box.height / self.shown.height
        return Box(
            self.box.x1 + box.x1 * sx,
            self.box.y1 + box.y1 * sy,
            self.box.x1 + box.x2 * sx,
            self.box.y1 + box.y2 * sy,
        )

    def to_shown(self, box: Box) -> Box:
        """Map a box from the raw page to this view's shown frame; the inverse of `to_raw`."""
        sx, sy = self.shown.width / self.box.width, self.shown.height / self.box.height
        return Box(
            (box.x1 - self.box.x1) * sx,
            (box.y1 - self.box.y1) * sy,
            (box.x2 - self.box.x1) * sx,
            (box.y2 - self.box.y1) * sy,
        )

    def crop(self, box: Box, min_pixels: int, max_pixels: int, padding: float = 0.0) -> View:
        """The view that a crop action opens: `box` is in this view's shown frame, `padding` in its shown pixels.

        Rules, in this order: corners in any order are accepted; the box must have an area and meet the image
        (`BoxError` otherwise); it is padded, grown to `MIN_CROP_SIDE` and to `MAX_ASPECT`, mapped to the raw page,
        kept inside the page (a grown box is shifted in rather than cut) and rounded outwards to whole raw pixels.

        Raises BoxError with reason `not_finite`, `zero_area` or `outside`.
        """
        if not all(math.isfinite(v) for v in box.as_tuple()):
            raise BoxError("not_finite", "a box needs four finite numbers")
        box = Box(min(box.x1, box.x2), min(box.y1, box.y2), max(box.x1, box.x2), max(box.y1, box.y2))
        if box.width <= 0 or box.height <= 0:
            raise BoxError("zero_area", "the box has no area")
        image = Box(0, 0, self.shown.width, self.shown.height)
        box = box.intersection(image)
        if box.width <= 0 or box.height <= 0:
            raise BoxError("outside", "the box lies outside the image")
        width = max(box.width + 2 * padding, MIN_CROP_SIDE)
        height = max(box.height + 2 * padding, MIN_CROP_SIDE)
        raw = self.to_raw(_about_centre(box, width, height))
        return view_of_raw_box(self.page, raw, min_pixels, max_pixels)


def view_of_raw_box(page: Size, box: Box, min_pixels: int, max_pixels: int) -> View:
    """The view of a box given in raw page pixels: aspect limited, shifted inside the page, rounded outwards."""
    width = min(max(box.width, box.height / MAX_ASPECT, 1), page.width)
    height = min(max(box.height, box.width / MAX_ASPECT, 1), page.height)
    grown = _about_centre(box, width, height)
    x1 = min(max(grown.x1, 0), page.width - width)
    y1 = min(max(grown.y1, 0), page.height - height)
    # A millionth of a pixel of slack keeps a box that is whole up to float error from growing by one pixel.
    slack = 1e-6
    whole = Box(
        max(0, math.floor(x1 + slack)),
        max(0, math.floor(y1 + slack)),
        min(page.width, math.ceil(x1 + width - slack)),
        min(page.height, math.ceil(y1 + height - slack)),
    )
    return View(page, whole, shown_size(whole.width, whole.height, min_pixels, max_pixels))


def _about_centre(box: Box, width: float, height: float) -> Box:
    cx, cy = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    return Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)


def render(page_image: Image.Image, view: View) -> Image.Image:
    """Cut `view.box` from the raw page image and resize it to `view.shown`; RGB.

    Raises ValueError when `page_image` is not of the size the view was made for.
    """
    if page_image.size != (view.page.width, view.page.height):
        raise ValueError(
            f"the page image is {page_image.size[0]} x {page_image.size[1]} pixels, "
            f"the view was made for {view.page.width} x {view.page.height}"
        )
    return page_image.convert("RGB").resize(
        (view.shown.width, view.shown.height), Image.Resampling.BICUBIC, box=view.box.as_tuple(), reducing_gap=3.0
    )
