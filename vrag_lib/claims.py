"""What a folder of results depends on, written into it, so that nothing made with other settings goes on in it.

    claim(folder, {"seed": 0, "model": model_fingerprint("data/scale_policy"), "config": depends_on(config, "grpo")})

The first call writes `settings.json`; a later one with other settings raises and names those that differ. `alone_in`
keeps a second process out of a folder while the first one writes there.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vrag_lib.config import Config, to_dict
from vrag_lib.rendering import read_json, write_atomically

logger = logging.getLogger(__name__)

INDIFFERENT = ("rollout_batch_size", "device", "api_key_env", "concurrency", "workers", "results", "save_steps",
               "keep_checkpoints", "gradient_checkpointing", "micro_batch_size")  # fmt: skip
"""Settings that change where and how fast something is computed, not what; a run may go on with others. So is the
policy's `batch_size`, but not that of SFT."""


_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


class ClaimError(RuntimeError):
    """A folder that holds what was made with other settings."""


def claim(
    folder: Path,
    settings: Mapping[str, Any],
    file: str = "settings.json",
    error: type[Exception] = ClaimError,
    dropped: Collection[str] = (),
) -> None:
    """Write what a folder depends on, or make sure that it is what was written there. Raises `error` else.

    dropped: dotted names that earlier versions wrote and that change nothing; they may be there or not.
    """
    wanted = json.loads(json.dumps(settings))
    path = folder / file
    present = read_json(path)
    if present is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(wanted, indent=1) + "\n").encode())
        return
    present.pop("fingerprint", None)  # earlier versions wrote one
    compare(folder, {k: v for k, v in _flat(present).items() if k not in dropped}, wanted, error)


@contextmanager
def alone_in(folder: Path, error: type[Exception] = ClaimError, waits: bool = False) -> Iterator[None]:
    """Nobody else is in the folder while this lasts. Raises `error` where somebody is, or with `waits` lets them end. A
    process that is killed leaves it; where the file system knows no locks, nobody is kept out."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not waits:
            raise error(f"another process is writing to {folder}; let it end, or give another folder") from None
        logger.warning("waiting for another process that is writing to %s", folder)
        lock.acquire(poll_interval=1)
    except OSError as problem:
        if problem.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


def compare(
    folder: Path, present: Mapping[str, Any], wanted: Mapping[str, Any], error: type[Exception] = ClaimError
) -> None:
    """Raises `error`, naming the folder and what differs, unless both are the same settings."""
    if differing := differences(present, wanted):
        listed = ", ".join(differing[:4])
        raise error(
            f"{folder} holds what was made with other settings: {listed}; use those, give another folder, or remove it"
        )


def differences(present: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Settings that differ, by their dotted names; one that is missing is None.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2, "c": None}})
    ['a.b=1 not 2']
    """
    there, here = _flat(present), _flat(wanted)
    names = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
    return [f"{key}={there.get(key)!r} not {here.get(key)!r}" for key in names]


def depends_on(config: Config, *stages: str) -> dict[str, Any]:
    """The settings of these stages and of the documents that can change a result; which model it is, is known by its
    weights (`model_fingerprint`), not by where they lie."""
    whole = to_dict(config)
    del whole["policy"]["model"]
    del whole["policy"]["batch_size"]
    kept = {name: whole[name] for name in ("minidocs", *stages)} | {"data_seed": config.seed, "smoke": config.smoke}
    return {
        stage: {k: v for k, v in values.items() if k not in INDIFFERENT} if isinstance(values, dict) else values
        for stage, values in kept.items()
    }


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}


def text_fingerprint(value: Any) -> str:
    """16 hexadecimal digits of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def model_fingerprint(model: str) -> str:
    """A model by its weights, so that one trained anew in the same folder is another; a hub id by its name. A LoRA
    adapter also by its settings and by what it was trained on."""
    described = read_json(Path(model) / "adapter_config.json")
    if described is not None:
        base = str(described.pop("base_model_name_or_path", ""))
        gone = Path(base).is_absolute() and not Path(base).is_dir()
        return text_fingerprint([_tensors_fingerprint(model), described, "" if gone else _tensors_fingerprint(base)])
    return _tensors_fingerprint(model)


def _tensors_fingerprint(model: str) -> str:
    states = [(file, file.stat()) for file in sorted(Path(model).glob("*.safetensors"))]
    return _weights_fingerprint(tuple((file, s.st_size, s.st_mtime_ns) for file, s in states)) if states else model


@functools.cache
def _weights_fingerprint(states: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files with their sizes and times, so that what was read is read again only when it was written again."""
    digest = hashlib.sha256()
    for file, _, _ in states:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
