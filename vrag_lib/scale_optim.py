"""Muon as in Jordan et al. 2024 (github.com/KellerJordan/Muon), for small models on a CPU.

Deviation from `torch.optim.Muon`: the orthogonalisation runs in float32, because bfloat16 products are emulated, and
about a hundred times slower, on CPUs without them; matrices of one shape are orthogonalised together,
and processes that train together share the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Newton-Schulz: matrices (n, a, b) with the same singular vectors and all singular values near 1."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised, its size matched to AdamW's (0.2 root mean square). Parameters
    are matrices (out, in) or kernels (out, channels, frames, height, width), which are treated as matrices."""

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            updates = []
            for p in parameters:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(buffer, group["momentum"]).flatten(1))
            for p, update in zip(parameters, _together(updates), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # A still image gives all frames of a kernel the same update, and what they do adds up.
                frames = p.shape[2] if p.ndim == 5 else 1
                p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5 / frames)


def shares(shapes: Sequence[tuple[int, int]], count: int) -> list[list[int]]:
    """Which of some matrices each of `count` processes orthogonalises: the dearest first, each to whoever has the least
    to do.

    >>> shares([(4, 4), (8, 8), (4, 4), (2, 4)], 2)
    [[1], [0, 2, 3]]
    """
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    found: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        min(found, key=lambda own: sum(costs[i] for i in own)).append(index)
    return [sorted(own) for own in found]


def _together(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """All matrices orthogonalised, by all processes of `scale_loop.in_processes` that there are, each a part."""
    import torch.distributed as dist

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    flat = torch.zeros(sum(m.numel() for m in matrices), device=matrices[0].device)
    found = [part.view_as(m) for part, m in zip(flat.split([m.numel() for m in matrices]), matrices, strict=True)]
    by_shape: dict[torch.Size, list[int]] = {}
    for index in shares([tuple(m.shape) for m in matrices], world)[rank]:
        by_shape.setdefault(matrices[index].shape, []).append(index)
    for indices in by_shape.values():
        for index, matrix in zip(indices, orthogonalised(torch.stack([matrices[i] for i in indices])), strict=True):
            found[index].copy_(matrix)
    if world > 1:
        dist.all_reduce(flat)
    return found
