"""What SFT and GRPO share: LoRA, checkpoints, curves, merging.

Deviations from the Hugging Face Trainer that runs both: a checkpoint holds tensors as safetensors and everything else
as JSON, nothing pickled; a checkpoint that a kill left half-written is never resumed from; nothing is reported to
anyone. Under FSDP and DeepSpeed the optimizer's shards are in their own formats.
"""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vrag_lib.config import LORA_TARGETS, ConfigError
from vrag_lib.torch_setup import ensure_torchvision

if TYPE_CHECKING:
    import pandas as pd
    import torch

_STATE, _OPTIMIZER, _ADAPTER = "trainer_state.json", "optimizer.safetensors", "adapter_config.json"


def process_count() -> int:
    """Processes that train together, as `accelerate launch` and `torchrun` tell each of them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes what all of them share: the first one under a launcher, any without."""
    return os.environ.get("RANK", "0") == "0"


def use_own_card(device: str = "auto") -> None:
    """Under a launcher, let `cuda` mean this process's own card: else all would load their models on the first.

    Raises ConfigError for a `device` that names another card than the first: the trainers take that one.
    """
    import torch

    require_first_card("training", device)
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def require_first_card(what: str, device: str) -> None:
    """Raises ConfigError where `device` names another card than the first that is seen, which alone `what` can use."""
    if device.startswith("cuda:") and device != "cuda:0":
        raise ConfigError(
            f"{what} runs on the first card that it sees, not on policy.device={device}: show it that one alone "
            f"(CUDA_VISIBLE_DEVICES={device.removeprefix('cuda:')}) and leave policy.device=cuda"
        )


def on_one_card(arguments: Any) -> Any:
    """The trainer's arguments without the other cards of this machine: Transformers would spread a training that has no
    launcher over all that it sees, which TRL refuses."""
    if process_count() == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def lora_config(rank: int, alpha: int, targets: str = LORA_TARGETS) -> Any:
    """A PEFT LoraConfig without dropout, so that sampling and training see the same model; None for rank 0 (full)."""
    if rank == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")


def freeze_vision(model: Any) -> int:
    """Stop gradients into the vision tower and its projector; returns the number of parameters frozen."""
    frozen = [p for name, p in model.named_parameters() if "visual." in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sum(p.numel() for p in frozen)


def merge_adapter(checkpoint: str | Path, adapter: str | Path, output: str | Path, dtype: str = "auto") -> Path:
    """Add a LoRA adapter to the checkpoint it was trained on and write an ordinary checkpoint, processor included, in
    `dtype`: float32, bfloat16, or auto, the checkpoint's own. In bfloat16 much of what RL changes is less than half a
    step of the numbers and is lost: policies take such an adapter as it is.

    Raises FileNotFoundError when `adapter` holds none.
    """
    ensure_torchvision()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not (Path(adapter) / _ADAPTER).is_file():
        raise FileNotFoundError(f"{adapter} holds no LoRA adapter; it is the `final` folder of a training run")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
    with torch.no_grad():
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    merged.save_pretrained(output)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(output)
    return Path(output)


def checkpoint_and_adapter(path: str | Path) -> tuple[str | Path, Path | None]:
    """What a model is loaded from: its checkpoint, and the LoRA adapter where `path` is one. Raises as `base_of`."""
    if (Path(path) / _ADAPTER).is_file():
        return base_of(path), Path(path)
    return path, None


def check_checkpoint(path: str | Path) -> None:
    """Raises CheckpointError for a folder that is not there or holds no model; a hub id is left to who loads it."""
    from vrag_lib.policy_chat import CheckpointError

    folder = Path(path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", _ADAPTER)):
            raise CheckpointError(f"{path} holds no model: it has neither config.json nor {_ADAPTER}")
    elif not _may_be_hub_id(path):
        raise CheckpointError(f"{path} is not there; a checkpoint is a folder, or a hub id like Qwen/Qwen2.5-VL-3B")


def _may_be_hub_id(path: str | Path) -> bool:
    """Whether what is no folder has the form owner/name, and no folder of that owner's name is there."""
    return len(Path(path).parts) == 2 and not Path(path).parent.is_dir() and not str(path).startswith((".", "/", "~"))


def whole_checkpoint(path: str | Path, merged: Path) -> str | Path:
    """The checkpoint itself; for a LoRA adapter the model it makes, written to `merged` once. Training that started
    from an adapter would replace it, and its own adapter would be one of the model below both.

    Raises ConfigError for an adapter that several processes would merge at once.
    """
    if not (Path(path) / _ADAPTER).is_file():
        return path
    if not (merged / "config.json").is_file():
        if process_count() > 1:
            raise ConfigError(f"{path} is an adapter: merge it first, `vrag merge {path} OUT`, and start from OUT")
        # Not under its name before it is whole: a kill would leave one that looks finished.
        merge_adapter(base_of(path), path, merged.with_suffix(".partial")).rename(merged)
    return merged


def base_of(adapter: str | Path, named: str | None = None) -> str:
    """The checkpoint to add an adapter to: the one named, else the one that the adapter says it was trained on.

    Raises ConfigError where there is no adapter, or no whole checkpoint for it.
    """
    path = Path(adapter) / _ADAPTER
    if not path.is_file():
        if (Path(adapter) / "config.json").is_file():
            raise ConfigError(f"{adapter} is a whole checkpoint, not a LoRA adapter, and is used as it is")
        raise ConfigError(f"{adapter} holds no LoRA adapter; name the `final` folder of a training run with LoRA")
    base = named or json.loads(path.read_text()).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{path} does not say what the adapter was trained on; `vrag merge --checkpoint` does")
    if not Path(base).is_dir() and not _may_be_hub_id(base):
        start = Path(adapter).parent / "start"
        if named is None and (start / "config.json").is_file():  # moved together with what it began from
            return str(start)
        raise ConfigError(
            f"{base}, what {adapter} was trained on, is not there; `vrag merge --checkpoint` says where it is"
        )
    if (Path(base) / _ADAPTER).is_file():
        raise ConfigError(f"{base} is a LoRA adapter, too; merge that one first, then name the model with --checkpoint")
    return base


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete `checkpoint-N` in a run folder, None if there is none. The trainer's state is written last,
    so one without it was cut short."""
    complete = []
    for path in Path(folder).glob("checkpoint-*"):
        try:
            step = json.loads((path / _STATE).read_text())["global_step"]
        except (OSError, ValueError, KeyError):
            continue
        complete.append((step, path))
    return max(complete)[1] if complete else None


class MetricsFile:
    """A CSV file with one row per step; opening it drops rows past `step`, so a resumed run goes on where it stopped.

    Rows are replaced as a whole, so a kill leaves the file readable. Columns are those of all rows, as they appear.
    """

    def __init__(self, path: str | Path, step: int = 0):
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the row of a step, which is the last one or new."""
        if not self.rows or int(self.rows[-1]["step"]) != step:
            self.rows.append({"step": step})
        self.rows[-1].update(values)
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)


def read_runs(folder: str | Path) -> pd.DataFrame:
    """The curves of all training runs below `folder` that are named `<run>_seed_<seed>`, as `vrag grpo` and `vrag sft`
    name them: their `metrics.csv` one below the other, with columns `run` and `seed` in front. Empty without any."""
    import pandas as pd

    tables = []
    for path in sorted(Path(folder).glob("*_seed_*/metrics.csv")):
        run, _, seed = path.parent.name.rpartition("_seed_")
        if seed.isdecimal():
            table = pd.read_csv(path)
            tables.append(pd.concat([pd.DataFrame({"run": run, "seed": int(seed)}, table.index), table], axis=1))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


class RunFolder:
    """Goes before a Hugging Face Trainer among the bases: curves to `metrics.csv`, checkpoints without pickle, progress
    on stderr. The trainer calls `start_run` before `train`."""

    metrics_file: MetricsFile
    _bar: Any = None

    def start_run(self, folder: str | Path, checkpoint: Path | None, title: str) -> None:
        """Open the curves at the checkpoint's step and take the place of the Trainer's own printing."""
        from tqdm import tqdm
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        step = 0 if checkpoint is None else json.loads((checkpoint / _STATE).read_text())["global_step"]
        self.metrics_file = MetricsFile(Path(folder) / "metrics.csv", step)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        main = self.is_world_process_zero()
        self._bar = tqdm(desc=title, initial=step, total=self.args.max_steps, mininterval=5, disable=not main)

    def step_metrics(self) -> dict[str, float]:
        """What a subclass adds to the row of the step just made."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs.update(self.step_metrics())
        super().log(logs, start_time)
        if "train_runtime" in logs:  # the summary at the end
            self._bar.close()
            return
        if not self.is_world_process_zero():
            return
        kept = {name: value for name, value in logs.items() if name != "num_tokens"}  # TRL's count forgets a resume
        self.metrics_file.add(self.state.global_step, kept)
        self._bar.update(self.state.global_step - self._bar.n)
        self._bar.set_postfix({k: f"{logs[k]:.3f}" for k in ("loss", "reward") if logs.get(k) is not None})

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = model if model is not None else self.model
        if hasattr(model, "peft_config") or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # The Trainer reads the file's tensors by name, but transformers stores Qwen2.5-VL under other names than its
        # modules have; nothing would be loaded, with a warning. Loading the checkpoint as a model knows both.
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
        return None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return None
        from safetensors.torch import save_file

        state = self.optimizer.state_dict()
        tensors, plain = {}, {}
        for index, values in state["state"].items():
            for name, value in values.items():
                (tensors if hasattr(value, "untyped_storage") else plain)[f"{index}/{name}"] = value
        about = {"plain": plain, "groups": state["param_groups"], "scheduler": self.lr_scheduler.state_dict()}
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, Path(output_dir) / _OPTIMIZER, metadata={"state": json.dumps(about)})
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        from safetensors import safe_open

        state: dict[int, dict[str, Any]] = {}
        with safe_open(Path(checkpoint) / _OPTIMIZER, framework="pt") as file:
            about = json.loads(file.metadata()["state"])
            entries = [(key, file.get_tensor(key)) for key in file.keys()]  # noqa: SIM118 - not a dictionary
        for key, value in [*entries, *about["plain"].items()]:
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": about["groups"]})
        self.lr_scheduler.load_state_dict(about["scheduler"])
        return None

    def _save_rng_state(self, output_dir: str) -> None:
        from safetensors.torch import save_file

        Path(output_dir).mkdir(parents=True, exist_ok=True)
        kind, keys, *rest = np.random.get_state()
        about = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
        save_file(_device_rng_states(), self._rng_file(output_dir), metadata={"state": json.dumps(about)})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        import torch
        from safetensors import safe_open

        if checkpoint is None or not self._rng_file(checkpoint).is_file():
            return  # resumed with more processes than it was saved with: theirs start from the seed
        with safe_open(self._rng_file(checkpoint), framework="pt") as file:
            about = json.loads(file.metadata()["state"])
            states = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
        version, internal, gauss = about["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = about["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(states.pop("cpu"))
        for name, state in states.items():
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda")))

    def _rng_file(self, folder: str) -> Path:
        return Path(folder) / f"rng_{self.args.process_index}.safetensors"

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: a run is described by its config.json."""

    def _send_telemetry(self) -> None:
        """Nothing is reported."""


def _device_rng_states() -> dict[str, torch.Tensor]:
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states
