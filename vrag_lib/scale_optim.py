"""Muon as in Jordan et al. 2024 (github.com/KellerJordan/Muon), for small models on a CPU.

Deviation from `torch.optim.Muon`: the orthogonalisation runs in float32, because bfloat16 products are emulated, and
about a hundred times slower, on CPUs without them; matrices of one shape are orthogonalised together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

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
    """Nesterov momentum whose update is orthogonalised, its size matched to AdamW's (0.2 root mean square)."""

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                updates = []
                for p in parameters:
                    state = self.state[p]
                    buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for p, update in zip(parameters, orthogonalised(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-rate)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of giving them back to the system: activations of every step then need
    no fresh pages, which halves the time of a step on a CPU. Does nothing elsewhere."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(option, 2**31 - 1)
