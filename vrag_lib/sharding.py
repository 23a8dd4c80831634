"""Weights that several processes share out (FSDP), made whole where each process goes its own way.

Sharded weights are gathered layer by layer during a forward pass, by all processes together. That suits training, where
all make the same passes. Rollouts do not: conversations end at different turns, and a process that makes one pass more
would wait for the others for ever. So rollouts, and whatever else each process does alone, run inside

    with whole_weights(model):
        ...

which costs the memory of all weights on each card for that time. Not in the paper or the released code, which sample
with an engine of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vrag_lib.config import ConfigError


@contextmanager
def whole_weights(*models: Any) -> Iterator[None]:
    """Every process holds all weights of these models (None: no model) while this lasts. All processes have to enter
    and leave together. Models that are not sharded are left as they are.

    Raises ConfigError for shards of ZeRO-3 and of FSDP's first version.
    """
    from torch.autograd.graph import increment_version
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    modules = [module for model in models if model is not None for module in model.modules()]
    shards_otherwise = any(isinstance(module, FullyShardedDataParallel) for module in modules) or any(
        hasattr(parameter, "ds_id") for module in modules for parameter in module.parameters(recurse=False)
    )
    if shards_otherwise:
        raise ConfigError("rollouts need whole weights or shards of FSDP 2: see launch/fsdp.yaml, launch/zero2.yaml")
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    # An optimizer changes the shards; that the gathered weights differ from the last ones would go unnoticed.
    increment_version([parameter for module in sharded for parameter in module.parameters()])
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
