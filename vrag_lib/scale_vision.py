"""The Qwen2.5-VL vision tower on many images at once: the same numbers as its own forward, with fewer operations.

The tower's own forward attends window by window in a Python loop and convolves both of its identical frames. Here the
windows of all images are one batched attention and the two frames one matrix product. A test holds the two together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.geometry import PATCH

if TYPE_CHECKING:
    import torch
    from PIL import Image

HALF = PATCH // 2

Grid = tuple[int, int]
"""Rows and columns of 28x28 cells of a shown image."""


def patchify(image: Image.Image) -> np.ndarray:
    """Patches (4 * cells, 588) of an image whose sides are multiples of 28, values in [-1, 1]: cell by cell in
    reading order, four 14-pixel patches per cell, each as (channel, y, x)."""
    pixels = np.asarray(image, np.float32) / 127.5 - 1
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    parts = pixels.reshape(rows, 2, HALF, columns, 2, HALF, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(parts).reshape(rows * columns * 4, 3 * HALF * HALF)


@functools.lru_cache(1024)
def _places(grid: Grid) -> torch.Tensor:
    """Row and column (4 * cells, 2) of every patch of an image, in patches."""
    import torch

    r, c = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    inner = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    return (torch.stack([r, c], -1)[:, :, None] * 2 + inner).view(-1, 2)


@functools.lru_cache(1024)
def _windows(grid: Grid, side: int) -> tuple[tuple[int, ...], ...]:
    """The patches of every window of `side` x `side` cells; side 0 is one window, the whole image."""
    index = np.arange(grid[0] * grid[1] * 4).reshape(grid[0], grid[1], 4)
    if not side:
        return (tuple(index.reshape(-1).tolist()),)
    return tuple(
        tuple(index[i : i + side, j : j + side].reshape(-1).tolist())
        for i in range(0, grid[0], side)
        for j in range(0, grid[1], side)
    )


@functools.lru_cache(64)
def _layout(grids: tuple[Grid, ...], side: int) -> tuple[Any, Any, Any]:
    """Patches of all windows of all images (windows, longest), padded with patch 0; the mask of the real ones, or None
    when all are; and where in the flattened windows each patch stands (patches,)."""
    import torch

    rows: list[np.ndarray] = []
    start = 0
    for grid in grids:
        rows += [np.asarray(window) + start for window in _windows(grid, side)]
        start += grid[0] * grid[1] * 4
    longest = max(len(row) for row in rows)
    index = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for k, row in enumerate(rows):
        index[k, : len(row)], mask[k, : len(row)] = torch.from_numpy(row), True
    back = torch.empty(start, dtype=torch.long)
    back[index[mask]] = mask.view(-1).nonzero()[:, 0]
    return index, None if bool(mask.all()) else mask[:, None, None, :], back


def encode_images(visual: Any, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """Features (all cells, width of the language model) of images one after the other; `patches` (4 * all cells, 588)
    as `patchify` cuts them. Equal to the tower's own output for the same images."""
    import torch
    from torch.nn import functional as F

    config = visual.config
    heads, dim = config.num_heads, config.hidden_size // config.num_heads
    length = len(patches)
    grids = tuple(grids)
    place = torch.cat([_places(grid) for grid in grids])
    angles = (place[:, :, None].float() * visual.rotary_pos_emb.inv_freq).reshape(length, -1)  # rows, then columns
    cos, sin = (torch.cat([t, t], -1)[:, None] for t in (angles.cos(), angles.sin()))
    layouts = {0: _layout(grids, 0), config.window_size // PATCH: _layout(grids, config.window_size // PATCH)}

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin

    def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)

    # Both frames of a still image are the same: their kernels may as well be added.
    x = F.linear(patches, visual.patch_embed.proj.weight.sum(2).flatten(1))
    for number, block in enumerate(visual.blocks):
        index, mask, back = layouts[0 if number in config.fullatt_block_indexes else config.window_size // PATCH]
        q, k, v = block.attn.qkv(norm(x, block.norm1)).view(length, 3, heads, dim).unbind(1)
        parts = (t[index].transpose(1, 2) for t in (rotate(q), rotate(k), v))  # (windows, heads, patches, dim)
        mixed = F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)
        x = x + block.attn.proj(mixed.reshape(-1, heads * dim)[back])
        x = x + block.mlp(norm(x, block.norm2))
    return visual.merger(x)
