"""Trainings that tests run in processes of their own: to be killed, or to share one batch."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiny_agent import ENVIRONMENT, QUESTIONS, corpus, retriever, scripted

SFT = {"epochs": 2, "batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-3, "save_steps": 1}
"""Four steps on four trajectories; the second epoch begins with step 3."""

GRPO = {
    "steps": 3,
    "questions_per_step": 2,
    "group_size": 4,
    "micro_batch_size": 4,
    "learning_rate": 2e-3,
    "warmup_steps": 0,
    "lora_rank": 4,
    "lora_alpha": 8,
    "temperature": 0.7,
    "max_reply_tokens": 16,
    "rollout_batch_size": 8,
    "save_steps": 2,
}


def curves(folder: Path) -> list[dict[str, str]]:
    """Rows of a run's curves, without what a clock measured."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per", "step_time"))}
            for row in csv.DictReader(file)
        ]


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_sft(checkpoint: Path, folder: Path, die_at_batch: int = 0) -> Path:
    """Supervised fine-tuning on the scripts; SIGKILL when the given micro-batch (1, 2, ...) is collated."""
    import torch

    from vrag_lib import sft

    torch.set_num_threads(1)
    whole, calls = sft.collate, []

    def collate(*arguments: Any) -> Any:
        calls.append(0)
        return die() if len(calls) == die_at_batch else whole(*arguments)

    sft.collate = collate
    try:
        return sft.train_sft(checkpoint, scripted(), corpus(), sft.SFTConfig(**SFT), folder, seed=5, device="cpu")
    finally:
        sft.collate = whole


def run_grpo(checkpoint: Path, folder: Path, die_at_rollout: int = 0, die_in: str = "rollout", **settings: Any) -> Path:
    """GRPO on the questions; SIGKILL when the given rollout (1, 2, ...) begins, or in the update or the saving of the
    checkpoint that follows it (`die_in`)."""
    import torch

    from vrag_lib.grpo import GRPOConfig, train_grpo
    from vrag_lib.grpo_trainer import AgentGRPOTrainer

    torch.set_num_threads(1)
    calls = []
    later = {"update": "compute_loss", "checkpoint": "_save_rng_state"}

    def sampler(policy: Any) -> Any:
        calls.append(0)
        if len(calls) == die_at_rollout:
            if die_in == "rollout":
                die()
            setattr(AgentGRPOTrainer, later[die_in], die)
        return policy

    return train_grpo(
        checkpoint,
        QUESTIONS,
        corpus(),
        retriever(),
        GRPOConfig(**GRPO | settings),
        folder,
        environment=ENVIRONMENT,
        sampler=sampler,
        seed=3,
        device="cpu",
    )


def start(target: Callable[..., Any], *arguments: Any, **settings: Any) -> multiprocessing.Process:
    """Run `target` in a process forked from a server that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_jobs", "vrag_lib.grpo_trainer"])
    process = context.Process(target=target, args=arguments, kwargs=settings)
    process.start()
    return process


def finish(processes: Sequence[multiprocessing.Process], seconds: float = 240) -> list[int | None]:
    """Exit codes; what has not ended by itself in time, or when another failed, is killed."""
    deadline = time.monotonic() + seconds
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def run_sharded(target: Callable[..., Any], *arguments: Any, **settings: Any) -> None:
    """`target` with weights shared out over the processes as `launch/fsdp.yaml` says. Accelerate does that on GPUs
    alone, so it is told that these processors are some. Raises RuntimeError when nothing was shared out after all."""
    import torch
    import yaml
    from accelerate.state import DistributedType, PartialState
    from torch.distributed.fsdp import FSDPModule

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    asked = yaml.safe_load((Path(__file__).parent.parent / "launch" / "fsdp.yaml").read_text())["fsdp_config"]
    os.environ |= {"ACCELERATE_USE_FSDP": "true"} | {
        name.upper().replace("LAYER_CLS", "CLS"): str(value) for name, value in asked.items()
    }
    gather, gathered = FSDPModule.unshard, []
    FSDPModule.unshard = lambda self, *options: gathered.append(self) or gather(self, *options)
    target(*arguments, **settings)
    if not gathered:
        raise RuntimeError("the weights were whole in every process")


def start_together(count: int, target: Callable[..., Any], *arguments: Any, **settings: Any) -> list[Any]:
    """`count` processes that train together, as `accelerate launch` would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(_join, rank, count, port, target, arguments, settings) for rank in range(count)]


def _join(rank: int, count: int, port: int, target: Callable[..., Any], arguments: tuple, settings: dict) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    target(*arguments, **settings)
