"""Presets, overrides and snapshots: one frozen dataclass per stage."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where rendered pages, OCR and embeddings are kept: `$VRAG_CACHE`, else `~/.cache/vrag_lib`."""
    return Path(os.environ.get("VRAG_CACHE") or Path.home() / ".cache" / "vrag_lib")
