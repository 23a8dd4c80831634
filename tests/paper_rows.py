"""Hand-made rows of the matrix for tests of tables, figures and report: no model, no documents."""

from __future__ import annotations

import numpy as np
import pandas as pd

from vrag_lib.config import Config
from vrag_lib.matrix import KEPT, cell_folder
from vrag_lib.matrix_cells import CELLS
from vrag_lib.rendering import write_atomically

SOURCES = ("Text", "Table", "Chart", "2d_layout")


def rows_of(right: np.ndarray, seed: int = 0, **columns) -> pd.DataFrame:
    """Rows of one seed: `right` (questions,) is the judge's verdict; other columns by name or as here."""
    n = len(right)
    base = {
        "uid": [f"q{i:03d}" for i in range(n)],
        "source_type": [SOURCES[i % 4] for i in range(n)],
        "query_type": ["Multi-Hop" if i % 3 == 0 else "Single-Hop" for i in range(n)],
        "template": "t",
        "answer": "7",
        "stop_reason": "answer",
        "error": "",
        "answered": True,
        "failed": False,
        **dict.fromkeys(("judge", "exact", "f1", "anls"), np.asarray(right, dtype=float)),
        "replies": 3,
        "invalid": 0,
        "searches": 1,
        "crops": 1,
        "crop_iou": np.nan,
        "seconds_generate": 1.0,
        "seconds_retrieve": 0.25,
        "tokens_sampled": 60.0,
        "pages": 1,
        "noise_pages": 0,
    }
    frame = pd.DataFrame(base | columns)
    return frame.reindex(columns=[*KEPT], fill_value=1.0).assign(seed=seed, cold_start=0)


def made_up(questions: int = 80, seeds: int = 3, cells=tuple(CELLS)) -> dict[str, pd.DataFrame]:
    """Rows of every cell, drawn with an accuracy that depends on the cell's place in the matrix."""
    rows = {}
    hard = np.random.default_rng(0).random(questions)
    for number, name in enumerate(cells):
        cell, parts = CELLS[name], []
        for seed in cell.seeds(seeds):
            rng = np.random.default_rng([number, seed])
            right = hard * 0.7 + 0.3 * rng.random(questions) < 0.15 + 0.02 * number
            ended = rng.random(questions) < 0.9
            invalid = rng.poisson(0.3, questions)
            searches = rng.integers(1, 4, questions) if cell.find_agent().allow_search else 0
            crops = rng.integers(0, 3, questions) if cell.find_agent().allow_crop else 0
            parts.append(
                rows_of(
                    right & ended, seed, answered=ended, failed=~ended,
                    stop_reason=np.where(ended, "answer", "max_turns"),
                    answer=np.random.default_rng(seed).integers(0, 20, questions).astype(str),
                    first_gold=(rng.random(questions) < 0.6).astype(float), searches=searches, crops=crops,
                    invalid=invalid, replies=np.maximum(invalid + searches + crops + ended, 1),
                    seconds_generate=rng.gamma(4, 0.3, questions), seconds_retrieve=rng.gamma(2, 0.1, questions),
                )
            )  # fmt: skip
        rows[name] = pd.concat(parts, ignore_index=True)
    return rows


def store(rows: dict[str, pd.DataFrame], config: Config) -> None:
    """Write rows as finished cells leave them."""
    for name, frame in rows.items():
        for seed, part in frame.groupby("seed"):
            folder = cell_folder(config, name, seed)
            folder.mkdir(parents=True)
            part.drop(columns="seed").to_parquet(folder / "questions.parquet", index=False)
            write_atomically(folder / "cell.json", b"{}")
