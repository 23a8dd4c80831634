"""The Qwen2.5-VL vision tower on many images at once: the same numbers as its own forward, with fewer operations.

The tower's own forward attends window by window in a Python loop and convolves both of its identical frames. Here the
windows of all images are one batched attention and the two frames one matrix product. A test holds the two together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.geometry import PATCH

if TYPE_CHECKING:
    import torch
    from PIL import Image

HALF = PATCH // 2

WINDOW = 4
"""Side in cells of the windows of the scale policy's tower (112 pixels)."""

Grid = tuple[int, int]
"""Rows and columns of 28x28 cells of a shown image."""


def patchify(image: Image.Image) -> np.ndarray:
    """Patches (4 * cells, 588), uint8, of an image whose sides are multiples of 28: cell by cell in reading order,
    four 14-pixel patches per cell, each as (channel, y, x)."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    parts = pixels.reshape(rows, 2, HALF, columns, 2, HALF, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(parts).reshape(rows * columns * 4, 3 * HALF * HALF)


@dataclass(frozen=True)
class OnDevice:
    """A record of tensors that goes to a device as a whole."""

    def to(self, device: Any) -> Any:
        """The same record with every tensor, and every record in it, on `device`."""
        values = (getattr(self, f.name) for f in fields(self))
        return type(self)(*(value.to(device) if hasattr(value, "to") else value for value in values))


@dataclass(frozen=True)
class Windows(OnDevice):
    """Windows of some images: index (windows, longest) of their patches, padded with patch 0; mask (windows, 1, 1,
    longest) of the real ones, or None when all are; back (patches,), where in the flattened windows each stands."""

    index: torch.Tensor
    mask: torch.Tensor | None
    back: torch.Tensor


@dataclass(frozen=True)
class Images(OnDevice):
    """Images one after the other: patches (4 * all cells, 588) uint8 or in [-1, 1], places (4 * all cells, 2) their
    rows and columns in patches, and which of them see each other in windowed and in full attention."""

    patches: torch.Tensor
    places: torch.Tensor
    windowed: Windows
    full: Windows


@functools.lru_cache(1024)
def _places(grid: Grid) -> np.ndarray:
    """Row and column (4 * cells, 2) of every patch of an image, in patches."""
    cells = np.stack(np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij"), -1)
    inner = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    return (cells[:, :, None] * 2 + inner).reshape(-1, 2)


@functools.lru_cache(1024)
def _windows(grid: Grid, side: int) -> tuple[np.ndarray, ...]:
    """The patches of every window of `side` x `side` cells; side 0 is one window, the whole image."""
    index = np.arange(grid[0] * grid[1] * 4).reshape(grid[0], grid[1], 4)
    if not side:
        return (index.reshape(-1),)
    return tuple(
        index[i : i + side, j : j + side].reshape(-1) for i in range(0, grid[0], side) for j in range(0, grid[1], side)
    )


def _layout(grids: Sequence[Grid], side: int) -> Windows:
    import torch

    rows: list[np.ndarray] = []
    start = 0
    for grid in grids:
        rows += [window + start for window in _windows(grid, side)]
        start += grid[0] * grid[1] * 4
    longest = max(len(row) for row in rows)
    index = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros((len(rows), longest), bool)
    for k, row in enumerate(rows):
        index[k, : len(row)], mask[k, : len(row)] = row, True
    back = np.empty(start, np.int64)
    back[index[mask]] = mask.reshape(-1).nonzero()[0]
    seen = None if mask.all() else torch.from_numpy(mask[:, None, None, :])
    return Windows(torch.from_numpy(index), seen, torch.from_numpy(back))


def arrange(patches: np.ndarray, grids: Sequence[Grid], window: int = WINDOW) -> Images:
    """Everything about images that does not depend on weights; `patches` as `patchify` cuts them, one image after the
    other, `window` the side of the tower's windows in cells."""
    import torch

    places = np.concatenate([_places(grid) for grid in grids]).astype(np.float32)
    return Images(torch.from_numpy(patches), torch.from_numpy(places), _layout(grids, window), _layout(grids, 0))


def encode_images(visual: Any, images: Images) -> torch.Tensor:
    """Features (all cells, width of the language model), equal to the tower's own output for the same images."""
    import torch
    from torch.nn import functional as F

    config = visual.config
    heads, dim = config.num_heads, config.hidden_size // config.num_heads
    patches = images.patches
    if patches.dtype == torch.uint8:
        patches = patches.float() / 127.5 - 1
    length = len(patches)
    angles = (images.places[:, :, None] * visual.rotary_pos_emb.inv_freq).reshape(length, -1)  # rows, then columns
    cos, sin = (torch.cat([t, t], -1)[:, None, None] for t in (angles.cos(), angles.sin()))

    def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)

    # Both frames of a still image are the same: their kernels may as well be added.
    x = F.linear(patches, visual.patch_embed.proj.weight.sum(2).flatten(1)).float()
    for number, block in enumerate(visual.blocks):
        layout = images.full if number in config.fullatt_block_indexes else images.windowed
        qkv = block.attn.qkv(norm(x, block.norm1)).view(length, 3, heads, dim)
        qk = qkv[:, :2]
        rotated = qk * cos + torch.cat([-qk[..., dim // 2 :], qk[..., : dim // 2]], -1) * sin
        parts = torch.cat([rotated, qkv[:, 2:]], 1).flatten(1).index_select(0, layout.index.flatten())
        q, k, v = parts.view(*layout.index.shape, 3, heads, dim).permute(2, 0, 3, 1, 4)
        with torch.autocast(x.device.type, enabled=False):  # on processors several times slower in bfloat16
            mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=layout.mask)
        mixed = mixed.transpose(1, 2)
        x = x + block.attn.proj(mixed.reshape(-1, heads * dim).index_select(0, layout.back))
        x = x + block.mlp(norm(x, block.norm2))
    return visual.merger(x)
