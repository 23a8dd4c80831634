"""Presets, overrides, snapshots and provenance: one frozen dataclass per stage, every field documented with its unit.

    config = load_config("laptop", ["environment.max_turns=4", "seed=1"])
    save_config(config, run_folder)

The command line and the notebooks take the same `key=value` overrides; a run folder holds the JSON snapshot.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import platform
import shlex
import subprocess
import sys
import types
import typing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vrag_lib.minidocs_documents import MiniDocsConfig


class ConfigError(ValueError):
    """An unknown preset or key, or a value of the wrong kind; the message names it and what is allowed."""


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"doc": text})


@dataclass(frozen=True)
class CorpusConfig:
    """From files to pages."""

    dpi: int = _doc(150, "resolution at which PDF pages are rendered, dots per inch")
    workers: int = _doc(2, "processes that render and read pages")
    ocr: str = _doc("no_text", "pages to read by OCR: none, no_text (those without a text layer) or all")


@dataclass(frozen=True)
class RetrievalConfig:
    """How pages are found."""

    kind: str = _doc("text", "text (the default fusion), bm25, dense, visual or remote")
    model: str = _doc("", "visual: path or hub id of a ColPali-family checkpoint; empty: the laptop's own")
    device: str = _doc("auto", "visual: auto, cpu or cuda")
    url: str = _doc("", "remote: base URL of a search server")
    depth: int = _doc(10, "pages ranked per query; one of them is shown (the authors' server returns 10)")


@dataclass(frozen=True)
class EnvironmentConfig:
    """What the agent may do and what it sees. The same in training, evaluation and demo."""

    max_turns: int = _doc(5, "replies per trajectory, the answer included (released code: 4 + 1 final)")
    max_invalid_streak: int = _doc(3, "invalid replies in a row that end a trajectory; 0: never")
    allow_search: bool = _doc(True, "whether the search action exists")
    allow_crop: bool = _doc(True, "whether the crop action exists")
    min_pixels: int = _doc(256 * 28 * 28, "least area of a shown image, pixels (256 vision tokens)")
    max_pixels: int = _doc(512 * 28 * 28, "largest area of a shown image, pixels (512 vision tokens)")
    crop_padding: float = _doc(0.0, "margin added round every crop box, shown pixels (released training: 0)")
    search_depth: int = _doc(10, "ranked pages asked of the retriever for each search")


@dataclass(frozen=True)
class PolicyConfig:
    """Who writes the replies."""

    kind: str = _doc("extractive", "extractive, transformers, openai")
    model: str = _doc("", "transformers: path or hub id; openai: the model's name at the endpoint")
    base_url: str = _doc("", "openai: endpoint, up to and including /v1")
    api_key_env: str = _doc("OPENAI_API_KEY", "openai: name of the environment variable that holds the key")
    temperature: float = _doc(1.0, "sampling temperature; 0 is greedy")
    top_p: float = _doc(1.0, "nucleus of the sampling distribution")
    max_reply_tokens: int = _doc(2048, "longest reply, tokens (paper Table 6)")
    max_context_tokens: int = _doc(10240, "longest context with its reply, tokens, image tokens counted")
    batch_size: int = _doc(8, "conversations generated together")
    device: str = _doc("auto", "auto, cpu or cuda")
    dtype: str = _doc("auto", "auto, float32 or bfloat16")


@dataclass(frozen=True)
class Config:
    """Everything one run depends on."""

    preset: str = _doc("laptop", "name of the preset this started from")
    seed: int = _doc(0, "seed of everything random")
    results: str = _doc("results", "folder that results/<preset>/<stage>/ is written in")
    smoke: bool = _doc(False, "shrink every run to seconds: for tests of the pipeline, not for results")
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    minidocs: MiniDocsConfig = field(default_factory=MiniDocsConfig)

    def folder(self, stage: str) -> Path:
        """Where the results of one stage lie."""
        return Path(self.results) / self.preset / stage


def _gpu(preset: str, model: str, **policy: Any) -> Config:
    return Config(
        preset=preset,
        retrieval=RetrievalConfig(kind="visual", model="vidore/colqwen2-v1.0"),
        policy=PolicyConfig(kind="transformers", model=model, device="cuda", dtype="bfloat16", **policy),
    )


PRESETS: dict[str, Config] = {
    "laptop": Config(),
    "gpu_3b": _gpu("gpu_3b", "Qwen/Qwen2.5-VL-3B-Instruct"),
    "gpu_7b": _gpu("gpu_7b", "Qwen/Qwen2.5-VL-7B-Instruct"),
    "paper": _gpu("paper", "Qwen/Qwen2.5-VL-7B-Instruct", batch_size=32),
}
"""`laptop` needs no GPU and no model hub; `gpu_*` one card; `paper` the published 8xA100 settings."""


def load_config(preset: str = "laptop", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The preset with `key=value` overrides applied, dotted keys for stages.

    >>> load_config("laptop", ["environment.max_turns=4"]).environment.max_turns
    4

    Raises ConfigError for an unknown preset or key (with the nearest known one) or a value of the wrong kind.
    """
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; presets are {', '.join(PRESETS)}")
    config = PRESETS[preset]
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"an override is written key=value, for example seed=1; got {text!r}")
        config = _replace(config, key.strip().split("."), value.strip(), key.strip())
    return config


def _replace(node: Any, path: list[str], value: str, key: str) -> Any:
    names = {f.name: f for f in dataclasses.fields(node)}
    if path[0] not in names:
        near = difflib.get_close_matches(path[0], names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(names)}"
        raise ConfigError(f"there is no setting {key!r}{hint}")
    current = getattr(node, path[0])
    if dataclasses.is_dataclass(current):
        if len(path) == 1:
            inner = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(current))
            raise ConfigError(f"{key!r} is a stage, not a setting; its settings are {inner}")
        return dataclasses.replace(node, **{path[0]: _replace(current, path[1:], value, key)})
    if len(path) > 1:
        raise ConfigError(f"there is no setting {key!r}: {path[0]!r} has no parts")
    kind = typing.get_type_hints(type(node))[path[0]]
    return dataclasses.replace(node, **{path[0]: _read(value, kind, key)})


def _read(value: str, kind: Any, key: str) -> Any:
    """One override value as `kind`: bool, int, float, str, or one of these or None."""
    if isinstance(kind, types.UnionType):
        if value.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if kind is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise ConfigError(f"{key} is true or false, not {value!r}")
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{key} needs a value of type {kind.__name__}, not {value!r}") from None


def describe(config: Config | None = None) -> str:
    """Every setting with its value and documentation, one line each; what `vrag config` prints."""
    lines = []

    def walk(node: Any, prefix: str) -> None:
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            if dataclasses.is_dataclass(value):
                walk(value, f"{prefix}{f.name}.")
            else:
                lines.append(f"{prefix}{f.name}={value}  # {f.metadata['doc']}")

    walk(config or PRESETS["laptop"], "")
    return "\n".join(lines)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(data: dict[str, Any]) -> Config:
    """The inverse of `to_dict`. Raises ConfigError for a key this version does not know."""

    def build(cls: type, values: dict[str, Any]) -> Any:
        known = typing.get_type_hints(cls)
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"a snapshot of another version: {cls.__name__} has no {', '.join(unknown)}")
        return cls(**{k: build(known[k], v) if dataclasses.is_dataclass(known[k]) else v for k, v in values.items()})

    return build(Config, data)


def save_config(config: Config, folder: str | Path) -> Path:
    """Write `config.json`, the snapshot with its provenance, into a run folder."""
    path = Path(folder) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": to_dict(config), "provenance": provenance(config.seed)}, indent=1) + "\n")
    return path


def read_config(folder: str | Path) -> Config:
    """The config of a run folder. Raises ConfigError when there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no config.json; is it a run folder?")
    return from_dict(json.loads(path.read_text())["config"])


_RECORDED = ("torch", "transformers", "trl", "peft", "colpali-engine", "byaldi", "numpy", "numba", "pillow", "vllm")


def provenance(seed: int | None = None) -> dict[str, Any]:
    """What a number needs to be measured again: command, seed, commit, versions, hardware, time (UTC)."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        "seed": seed,
        "commit": _git_commit(),
        "versions": {"python": platform.python_version(), **_versions(_RECORDED)},
        "hardware": {"cpus": os.cpu_count(), "machine": platform.machine(), "processor": _processor()},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str:
    """The commit of the checkout, `+` appended when tracked files differ from it; `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "vrag_lib").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def cache_dir() -> Path:
    """Where rendered pages, OCR and embeddings are kept: `$VRAG_CACHE`, else `~/.cache/vrag_lib`."""
    return Path(os.environ.get("VRAG_CACHE") or Path.home() / ".cache" / "vrag_lib")
