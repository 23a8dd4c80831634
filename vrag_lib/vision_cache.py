"""Features of a frozen vision tower, computed once per image.

An agent's context shows the same images again at every turn, in every sample of a group, in the trainer's passes and in
the next epoch; with the tower frozen (the paper's choice) its features never change. `remember_features` lets a
Qwen2(.5)-VL's tower look them up. Each image goes through the tower by itself, so its features do not depend on what
else is in the batch, and a resumed run sees the numbers of the uninterrupted one.

Not in the paper or the released code, which compute them each time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MAX_BYTES = 512 * 2**20
"""Features kept per model; the ones not used for longest go first."""


class FeatureCache:
    """Stands before a tower's forward. `hits` and `misses` count images.

    The features are looked up only while no parameter of the tower wants a gradient or belongs to an adapter, and none
    has changed since they were computed; otherwise the tower runs as ever.
    """

    def __init__(self, tower: Any, max_bytes: int = MAX_BYTES):
        self._tower, self._forward, self._max_bytes = tower, tower.forward, max_bytes
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._state: Any = None
        self.hits = self.misses = 0

    def __call__(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        """The tower's output with `pooler_output` (cells of all images, width); other fields are left out."""
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        named = list(self._tower.named_parameters())
        parameters = [p for _, p in named]
        is_adapted = any("lora_" in name for name, _ in named)  # switched off and on without a weight changing
        if is_adapted or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
            return self._forward(hidden_states, grid_thw=grid_thw, **kwargs)
        self._forget_if_changed(parameters)
        patches = torch.split(hidden_states, grid_thw.prod(-1).tolist())
        found = [self._look_up(p, g, kwargs) for p, g in zip(patches, grid_thw, strict=True)]
        return BaseModelOutputWithPooling(last_hidden_state=None, pooler_output=torch.cat(found))

    def _look_up(self, patches: torch.Tensor, grid: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        import torch

        content = patches.detach().cpu().contiguous().view(torch.uint8).numpy()
        key = hashlib.blake2b(content, digest_size=16, key=repr(grid.tolist()).encode()).digest()
        if key in self._features:
            self.hits += 1
            self._features.move_to_end(key)
            return self._features[key]
        self.misses += 1
        # Out of inference mode, or the features could not stand in a graph that is differentiated later.
        with torch.inference_mode(False), torch.no_grad():
            features = self._forward(patches.clone(), grid_thw=grid[None].clone(), **kwargs).pooler_output
        self._features[key] = features
        self._bytes += features.nbytes
        while self._bytes > self._max_bytes and len(self._features) > 1:
            self._bytes -= self._features.popitem(last=False)[1].nbytes
        return features

    def _forget_if_changed(self, parameters: list[Any]) -> None:
        state = weights_state(parameters)
        if state != self._state:
            self._features.clear()
            self._bytes, self._state = 0, state


def remember_features(model: Any, max_bytes: int = MAX_BYTES) -> FeatureCache:
    """Put a cache before the vision tower of a Qwen2(.5)-VL, once; returns it, or the one already there."""
    _notice_optimizers()
    tower = vision_tower(model)
    if not isinstance(tower.__dict__.get("forward"), FeatureCache):
        tower.forward = FeatureCache(tower, max_bytes)
    return tower.forward


def weights_state(parameters: Iterable[torch.nn.Parameter]) -> list[tuple[Any, ...]]:
    """What differs after any of these weights was replaced or changed in place. Steps of a fused optimizer are seen
    once `remember_features` was called."""
    return [(p.data_ptr(), p._version, p.dtype) for p in parameters]


@cache
def _notice_optimizers() -> None:
    """Fused optimizers, the trainers' default, change weights without raising their version: do it after every step."""
    from torch.autograd.graph import increment_version
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        increment_version([p for group in optimizer.param_groups for p in group["params"] if p.grad is not None])

    register_optimizer_step_post_hook(after_step)


def vision_tower(model: Any) -> Any:
    """The vision tower of a Qwen2(.5)-VL, with or without an adapter round the model."""
    return next(module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "visual")
