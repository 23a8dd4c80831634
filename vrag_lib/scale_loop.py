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
from collections.abc import Callable, Iterable, Mapping
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
    """Muon for the matrices inside the vision tower and AdamW for the rest; the language model was seen to take off
    with AdamW."""
    import torch

    from vrag_lib.scale_optim import Muon

    matrices, rest = [], []
    for name, parameter in named:
        inner = parameter.ndim == 2 and "visual" in name
        (matrices if inner and schedule.muon else rest).append(parameter)
    optimizers: list[Any] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=schedule.muon, momentum=0.95, weight_decay=0.01))
    optimizers.append(torch.optim.AdamW(rest, lr=schedule.adamw, betas=(0.9, 0.98), weight_decay=0.01))
    return optimizers


Counts = Mapping[str, tuple[float, float]]
"""Hits and total of every metric."""


class Tally:
    """Sums hits and totals.

    >>> tally = Tally()
    >>> tally.add({"digits": (3, 4)})
    >>> tally.add({"digits": (0, 4)})
    >>> tally.rates()
    {'digits': 0.375}
    """

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, counts: Counts) -> None:
        for key, (hit, total) in counts.items():
            entry = self.sums.setdefault(key, [0.0, 0.0])
            entry[0] += hit
            entry[1] += total

    def counts(self) -> dict[str, tuple[float, float]]:
        return {key: (hit, total) for key, (hit, total) in self.sums.items()}

    def rates(self) -> dict[str, float]:
        return {key: hit / total for key, (hit, total) in self.sums.items() if total}


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


def train(
    name: str,
    modules: Mapping[str, torch.nn.Module],
    loss_of_step: Callable[[int], tuple[torch.Tensor, Counts]],
    schedule: Schedule,
    folder: Path,
    curve_path: Path,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    eval_every: int = 200,
) -> None:
    """Train the parameters of `modules` that require gradients until `schedule.steps`, going on from `folder/name`.

    `loss_of_step(step)` returns the loss and the metrics' counts, which are summed between two rows of the curve; a
    multiple of `eval_every` steps and the last one get what `evaluate` measures as well. Afterwards the modules hold
    the trained weights, whether they were trained now or before.

    Raises RuntimeError when a loss is not finite.
    """
    import torch
    from tqdm import tqdm

    named = [(f"{m}.{n}", p) for m, module in modules.items() for n, p in module.named_parameters() if p.requires_grad]
    optimizers = make_optimizers(named, schedule)
    start, spent = _load(folder / name, modules, optimizers)
    curve = Curve(curve_path, start)
    peaks = [schedule.adamw if isinstance(o, torch.optim.AdamW) else schedule.muon for o in optimizers]
    began = time.process_time() - spent
    tally, losses = Tally(), []
    bar = tqdm(range(start, schedule.steps), desc=name, initial=start, total=schedule.steps, mininterval=10)
    for step in bar:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule.factor(step)
        loss, counts = loss_of_step(step)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"stage {name}: the loss of step {step} is {loss.item()}; lower the learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        tally.add(counts)
        done = step + 1
        last = done == schedule.steps
        if done % schedule.log_every == 0 or last:
            row = {"step": done, "cpu_seconds": round(time.process_time() - began), "loss": sum(losses) / len(losses)}
            row |= tally.rates()
            if evaluate and (done % eval_every == 0 or last):
                row |= evaluate()
            curve.add(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            tally, losses = Tally(), []
        if done % schedule.save_every == 0 or last:
            _save(folder / name, modules, optimizers, done, time.process_time() - began)


def _save(folder: Path, modules: Mapping[str, Any], optimizers: list[Any], step: int, seconds: float) -> None:
    from safetensors.torch import save_file

    tensors = {f"weights/{m}/{k}": v for m, module in modules.items() for k, v in module.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{index}/{key}": value for key, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "checkpoint.partial"
    about = {"state": json.dumps({"step": step, "seconds": seconds})}
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, partial, metadata=about)
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
