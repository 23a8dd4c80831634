"""Keys and values of contexts that a model has read, so that each turn of a conversation reads only what is new.

A context grows by appending: the next begins with all tokens of the last, the sampled ones included. `ContextCache`
keeps what the model computed for them, by the tokens and images themselves, and `batch_cache` puts several of different
lengths side by side. Log-probs differ from those of reading everything again by rounding only.

Not in the paper or the released code. vLLM does the same for its own policies (prefix caching).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vrag_lib.vision_cache import weights_state

if TYPE_CHECKING:
    import torch

MAX_BYTES = 4 * 2**30
"""Keys and values kept per policy; the oldest go first. A token of Qwen2.5-VL-3B takes 36 KiB in bfloat16."""


@dataclass(frozen=True)
class Read:
    """Keys and values (layers, 2, heads, tokens, size) of the first `length` tokens of a context."""

    length: int
    states: torch.Tensor


class ContextCache:
    """What was read, by tokens and images. A context is taken out once, because it is put back longer."""

    def __init__(self, model: Any, max_bytes: int = MAX_BYTES):
        self._model, self._max_bytes = model, max_bytes
        self._reads: OrderedDict[Hashable, Read] = OrderedDict()
        self._bytes = 0
        self._state: Any = None

    def __len__(self) -> int:
        return len(self._reads)

    def put(self, token_ids: Sequence[int], images: Sequence[Hashable], states: torch.Tensor) -> None:
        """Keep the states (layers, 2, heads, tokens, size) of `token_ids`, which show `images`, in order."""
        self._remove((tuple(token_ids), tuple(images)))
        self._reads[tuple(token_ids), tuple(images)] = Read(len(token_ids), states)
        self._bytes += states.nbytes
        while self._bytes > self._max_bytes:
            self._remove(next(iter(self._reads)))

    def take(self, token_ids: Sequence[int], images: Sequence[Hashable], image_start: int) -> Read | None:
        """The longest beginning of a context that is kept and shorter than it, removed from here; None without one.
        `image_start` is the token that opens each image."""
        tokens = tuple(token_ids)
        for length in sorted({read.length for read in self._reads.values() if read.length < len(tokens)}, reverse=True):
            shown = tokens[:length].count(image_start)
            read = self._remove((tokens[:length], tuple(images[:shown])))
            if read is not None:
                return read
        return None

    def clear(self) -> None:
        """Forget everything."""
        self._reads.clear()
        self._bytes = 0

    def forget_if_changed(self) -> None:
        """Forget everything if a weight has changed since the last call, or an adapter was switched. To be called once
        before the contexts of a batch are taken."""
        adapters = [getattr(module, "disable_adapters", None) for module in self._model.modules()]
        state = weights_state(self._model.parameters()), adapters
        if state != self._state:
            self.clear()
            self._state = state

    def _remove(self, key: Hashable) -> Read | None:
        read = self._reads.pop(key, None)
        if read is not None:
            self._bytes -= read.states.nbytes
        return read


def batch_cache(reads: Sequence[Read | None]) -> tuple[Any, torch.Tensor] | None:
    """Several reads as the cache of one batch, padded on the left, and its attention mask (B, longest); None when
    nothing was read."""
    import torch
    from transformers import DynamicCache

    known = next((read for read in reads if read is not None), None)
    if known is None:
        return None
    layers, two, heads, _, size = known.states.shape
    longest = max(read.length for read in reads if read is not None)
    states = known.states.new_zeros(layers, two, len(reads), heads, longest, size)
    mask = torch.zeros(len(reads), longest, dtype=torch.long, device=states.device)
    for row, read in enumerate(reads):
        if read is not None:
            states[:, :, row, :, longest - read.length :] = read.states
            mask[row, longest - read.length :] = 1
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(states):
        cache.update(keys, values, layer)
    return cache, mask


def row_states(cache: Any, row: int, mask: torch.Tensor) -> torch.Tensor:
    """States (layers, 2, heads, tokens, size) of one row of a batch's cache; `mask` (T,) is 1 where it holds tokens."""
    import torch

    at = mask.nonzero()[:, 0]
    heads, _, size = cache.layers[0].keys[row].shape
    states = cache.layers[0].keys.new_empty(len(cache.layers), 2, heads, len(at), size)
    for layer, (keys, values) in zip(cache.layers, states, strict=True):
        torch.index_select(layer.keys[row], 1, at, out=keys)
        torch.index_select(layer.values[row], 1, at, out=values)
    return states
