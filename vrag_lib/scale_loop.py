"""One training loop for every stage of the scale policy: schedule, Muon and AdamW, curves, resumable checkpoints.

A step's data and learning rate depend on the seed and the step's number alone, and a checkpoint holds the weights and
the optimizers' state, so a killed and resumed run goes on as the uninterrupted one would have.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Schedule:
    """Length and learning rates of one stage: linear warm-up, constant, then a linear decay to nothing.

    steps, warmup: optimizer steps. decay: share of the steps at the end over which the rate falls.
    muon, adamw: peak learning rates of the two optimizers; muon 0 gives every weight to AdamW.
    log_every, save_every: steps between rows of the curve and between checkpoints.
    """

    steps: int
    muon: float
    adamw: float
    warmup: int = 50
    decay: float = 0.4
    log_every: int = 50
    save_every: int = 200

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0.

        >>> s = Schedule(steps=100, muon=1, adamw=1, warmup=10, decay=0.4)
        >>> s.factor(0), s.factor(50), s.factor(80)
        (0.1, 1.0, 0.5)
        """
        falling = self.steps * self.decay
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / max(1.0, falling))


def make_optimizers(named: Iterable[tuple[str, torch.nn.Parameter]], schedule: Schedule) -> list[Any]:
    """Muon for the matrices inside the vision tower, that of its patches among them (print is learnt twice as fast as
    with AdamW for that one), and AdamW for the rest; the language model was seen to take off with AdamW."""
    import torch

    from vrag_lib.scale_optim import Muon

    matrices, rest = [], []
    for name, parameter in named:
        inner = parameter.ndim >= 2 and "visual" in name
        (matrices if inner and schedule.muon else rest).append(parameter)
    optimizers: list[Any] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=schedule.muon, momentum=0.95, weight_decay=0.01))
    fused = rest[0].device.type == "cuda"
    optimizers.append(torch.optim.AdamW(rest, lr=schedule.adamw, betas=(0.9, 0.98), weight_decay=0.01, fused=fused))
    return optimizers


Counts = Mapping[str, tuple[Any, Any]]
"""Hits and total of every metric: numbers, or tensors, which are not waited for before a row is written."""


class Tally:
    """Sums hits and totals.

    >>> tally = Tally()
    >>> tally.add({"digits": (3, 4)})
    >>> tally.add({"digits": (0, 4)})
    >>> tally.rates()
    {'digits': 0.375}
    """

    def __init__(self) -> None:
        self.sums: dict[str, list[Any]] = {}

    def add(self, counts: Counts) -> None:
        for key, (hit, total) in counts.items():
            entry = self.sums.setdefault(key, [0.0, 0.0])
            entry[0] += hit
            entry[1] += total

    def counts(self) -> Counts:
        return {key: (hit, total) for key, (hit, total) in self.sums.items()}

    def rates(self) -> dict[str, float]:
        return {key: float(hit) / float(total) for key, (hit, total) in self.sums.items() if total}


class Curve:
    """A CSV file that rows are appended to; on resuming, rows past the checkpoint are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = []
        if path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self.rows: list[dict[str, Any]] = kept

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and rewrite the file; columns are those of all rows in order of appearance."""
        self.rows.append({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
        columns = list(dict.fromkeys(key for r in self.rows for key in r))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


def batches(batch_of_step: Callable[[int], Any], start: int, stop: int, workers: int = 0) -> Iterator[Any]:
    """`batch_of_step(start)` to `batch_of_step(stop - 1)` in order, made ahead by `workers` processes (0: here, when
    asked for). Linux and macOS only when `workers` is not 0, because workers are forked."""
    from torch.utils.data import DataLoader

    if not workers:
        return map(batch_of_step, range(start, stop))
    ahead = {"num_workers": workers, "prefetch_factor": 4, "multiprocessing_context": "fork"}
    steps = _Steps(batch_of_step, start, stop)
    return iter(DataLoader(steps, batch_size=None, collate_fn=_as_it_is, worker_init_fn=_one_thread, **ahead))


@dataclass(frozen=True)
class _Steps:
    batch_of_step: Callable[[int], Any]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        return self.batch_of_step(self.start + index)


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_thread(worker: int) -> None:
    import torch

    torch.set_num_threads(1)


def train(
    name: str,
    modules: Mapping[str, torch.nn.Module],
    batch_of_step: Callable[[int], Any],
    loss_of_batch: Callable[[Any], tuple[torch.Tensor, Counts]],
    schedule: Schedule,
    folder: Path,
    curve_path: Path,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    eval_every: int = 200,
    workers: int = 0,
) -> None:
    """Train the parameters of `modules` that require gradients until `schedule.steps`, going on from `folder/name`.

    `batch_of_step(number)` makes the data of a step, in `workers` processes when there are any (inside `in_processes`
    each process makes its own, and their gradients are averaged); `loss_of_batch` returns its loss and the metrics'
    counts, which are summed between two rows of the curve; a multiple of `eval_every` steps and the last one get what
    `evaluate` measures as well. Afterwards the modules hold the trained weights, whether they were trained now or
    before.

    Raises RuntimeError when the losses since the last row of the curve are not finite.
    """
    import torch
    from tqdm import tqdm

    rank, world = process_rank()
    named = [(f"{m}.{n}", p) for m, module in modules.items() for n, p in module.named_parameters() if p.requires_grad]
    optimizers = make_optimizers(named, schedule)
    start, spent = _load(folder / name, modules, optimizers)
    if start >= schedule.steps:
        return
    curve = Curve(curve_path, start)
    peaks = [schedule.adamw if isinstance(o, torch.optim.AdamW) else schedule.muon for o in optimizers]
    began = time.monotonic() - spent
    tally, losses = Tally(), []
    bar = tqdm(
        range(start, schedule.steps), desc=name, initial=start, total=schedule.steps, mininterval=10, disable=rank > 0
    )
    data = batches(lambda step: batch_of_step(step * world + rank), start, schedule.steps, workers)
    for step, batch in zip(bar, data, strict=True):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule.factor(step)
        loss, counts = loss_of_batch(batch)
        loss.backward()
        if world > 1:
            _average([p for _, p in named])
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        tally.add(counts)
        done = step + 1
        last = done == schedule.steps
        save = done % schedule.save_every == 0 or last
        if done % schedule.log_every == 0 or save:
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean):
                raise RuntimeError(f"stage {name}: the loss up to step {step} is {mean}; lower the learning rate")
            row: dict[str, Any] = {
                "step": done,
                "seconds": round(time.monotonic() - began),
                "loss": mean,
            } | tally.rates()
            if rank == 0:
                if evaluate and (done % eval_every == 0 or last):
                    row |= evaluate()
                curve.add(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            tally, losses = Tally(), []
        if save and rank == 0:
            _save(folder / name, modules, optimizers, done, time.monotonic() - began)


def process_rank() -> tuple[int, int]:
    """This process's number among those of `in_processes`, and how many there are; (0, 1) outside."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Go on when every process of `in_processes` has come here."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function` with `arguments` in `count` processes that train together on the processor, each with as many
    threads as this one; with 1, here. The function must be importable by name and its arguments pickle."""
    import tempfile

    import torch

    if count == 1:
        function(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        torch.multiprocessing.spawn(
            _process, (count, meeting, torch.get_num_threads(), function, arguments), nprocs=count
        )


def _process(
    rank: int, count: int, meeting: str, threads: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    import signal

    import torch
    import torch.distributed as dist

    # When the parent dies torch interrupts its children; one started in the background would not hear of it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    try:
        function(*arguments)
        wait_for_all()
    finally:
        dist.destroy_process_group()


def _average(parameters: list[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over processes, in one message; one that a process lacks counts as zero."""
    import torch
    import torch.distributed as dist

    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter)


def _save(folder: Path, modules: Mapping[str, Any], optimizers: list[Any], step: int, seconds: float) -> None:
    from safetensors.torch import save_file

    tensors = {f"weights/{m}/{k}": v for m, module in modules.items() for k, v in module.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{index}/{key}": value for key, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "checkpoint.partial"
    about = {"state": json.dumps({"step": step, "seconds": seconds})}
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, partial, metadata=about)
    os.replace(partial, folder / "checkpoint.safetensors")


def _load(folder: Path, modules: Mapping[str, Any], optimizers: list[Any]) -> tuple[int, float]:
    """Restore a stage; returns its step and the seconds it had run, (0, 0) when there is nothing to restore."""
    from safetensors import safe_open

    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    weights: dict[str, dict[str, Any]] = {name: {} for name in modules}
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["state"])
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            kind, first, rest = key.split("/", 2)
            if kind == "weights":
                weights[first][rest] = file.get_tensor(key)
            else:
                index, name = rest.split("/")
                states[int(first)].setdefault(int(index), {})[name] = file.get_tensor(key)
    for name, module in modules.items():
        module.load_state_dict(weights[name])
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return about["step"], about["seconds"]
