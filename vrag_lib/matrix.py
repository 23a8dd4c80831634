"""The experiment matrix: every cell of `matrix_cells`, with every seed, trained and measured by one resumable call.

    outcomes = run_matrix(load_config("laptop", experiment=True), seeds=5)
    rows = read_rows(config)                  # {cell: a row per question and seed}

A cell's results lie in `results/<preset>/matrix/<cell>/seed_<n>/`: `questions.parquet`, a row per question, and
`settings.json`, what they depend on, and `cell.json` with provenance and seconds, written last: a cell that has it is
finished and is skipped. After RL its curves, `metrics.csv`, lie there too, with a sample of trajectories.
A cell that was killed goes on; one that fails leaves `error.txt`, is named, and does not stop the others.

All seeds of the cheap cells would be of no use without the dear ones: seed 0 of every cell comes first, then seed 1,
and so on, so that whatever has been run can be compared. Evaluation is greedy, as in the released code's validation, on
the answerable questions of MiniDocs' test split; what fails or gives no answer is wrong.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vrag_lib.agents import questions_for
from vrag_lib.claims import claim, depends_on, model_fingerprint
from vrag_lib.config import Config
from vrag_lib.evaluate import run
from vrag_lib.factory import make_policy
from vrag_lib.matrix_cells import Cell, cell_config, find_cells
from vrag_lib.matrix_training import MatrixError, Workbench
from vrag_lib.provenance import provenance
from vrag_lib.rendering import read_json, write_atomically
from vrag_lib.trajectory import read_trajectories

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

SEEDS = 5
"""Training seeds of every trained cell."""

KEPT = (
    "uid", "source_type", "query_type", "template", "answer", "stop_reason", "error", "answered", "failed", "judge",
    "judge_gated", "exact", "f1", "anls", "ndcg", "gold_recall", "gold_page_seen", "first_gold", "pages", "noise_pages",
    "searches", "crops", "replies", "invalid", "crop_iou", "wrong_actions", "tokens_sampled", "seconds_generate",
    "seconds_retrieve",
)  # fmt: skip
"""Columns of a cell's rows: those of `evaluate.evaluate_trajectories`, and `first_gold`, whether the first page shown
was a gold page (NaN where the question has none; 0 where no page was shown)."""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell with one seed: `finished`, `skipped` (it was finished before), `failed` with the error."""

    cell: str
    seed: int
    state: str
    error: str = ""


def run_matrix(
    config: Config,
    cells: Sequence[str] | None = None,
    seeds: int = SEEDS,
    format_trajectories: int | None = None,
    first_seed: int = 0,
    cold_starts: int = 1,
) -> list[Outcome]:
    """Run these cells (default: all) with `seeds` seeds each, and whatever training they need; returns every outcome.

    format_trajectories: default what the preset needs, see `matrix_training.FORMAT_TRAJECTORIES`. first_seed: leave out
    the seeds before it, for a part of the matrix on another machine. cold_starts: trainings of SFT that the seeds of RL
    begin with in turn.

    Raises ConfigError for an unknown cell, for other documents than MiniDocs and where there is no policy to start
    from, ValueError for fewer seeds than one or a first seed that is none of them. What happens inside a cell is
    caught.
    """
    from tqdm import tqdm

    if seeds < 1:
        raise ValueError(f"the matrix needs at least one seed, not {seeds}")
    if not 0 <= first_seed < seeds:
        raise ValueError(f"the first of {seeds} seeds is between 0 and {seeds - 1}, not {first_seed}")
    wanted = find_cells(cells)
    bench = Workbench(config, format_trajectories, cold_starts)
    if config.policy.kind == "transformers":
        bench.raw()
    units = [(cell, seed) for seed in range(first_seed, seeds) for cell in wanted if seed in cell.seeds(seeds)]
    outcomes = []
    # No remaining time: the first cells take minutes and the last hours, so the bar would be wrong all the way.
    with tqdm(units, unit="cell", bar_format="{desc} |{bar}| {n_fmt} of {total_fmt} cells, {elapsed}") as bar:
        for cell, seed in bar:
            bar.set_description(f"{cell.name}, seed {seed}")
            outcomes.append(_attempt(bench, cell, seed))
    return outcomes


def _attempt(bench: Workbench, cell: Cell, seed: int) -> Outcome:
    folder = cell_folder(bench.config, cell.name, seed)
    try:
        state = run_cell(bench, cell, seed)
    except Exception as error:  # whatever goes wrong in one cell must not cost the others
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "error.txt", traceback.format_exc().encode())
        logger.warning("cell %s, seed %d failed: %s", cell.name, seed, error)
        return Outcome(cell.name, seed, "failed", f"{type(error).__name__}: {error}")
    (folder / "error.txt").unlink(missing_ok=True)
    return Outcome(cell.name, seed, state)


def run_cell(bench: Workbench, cell: Cell, seed: int) -> str:
    """Train what the cell needs and measure it; `skipped` when that was done before, else `finished`.

    Raises MatrixError when the folder was made with other settings, or the policy is none that can be trained; else
    what training and evaluation raise.
    """
    folder = cell_folder(bench.config, cell.name, seed)
    config = cell_config(cell, bench.config)
    config = replace(config, policy=replace(config.policy, temperature=0.0))
    settings = _settings(bench, cell, config, seed)
    claim(folder, settings, error=MatrixError)
    if (folder / "cell.json").is_file():
        return "skipped"
    began = time.monotonic()
    if config.policy.kind == "transformers":
        config = replace(config, policy=replace(config.policy, model=bench.checkpoint(cell, seed)))
        if "grpo" in cell.chain:
            _keep_curves(bench.training_folder(cell, seed), folder, config.grpo.group_size)
    elif cell.trained:
        raise MatrixError(f"{cell.name} is trained, which a policy of kind {config.policy.kind} cannot be")
    trained = time.monotonic()
    frame = run(
        make_policy(bench.test.corpus, config),
        questions_for(cell.find_agent(), bench.test.questions),
        bench.test.corpus,
        bench.test.retriever,
        config.environment,
        folder / "evaluation",
        seeds=(seed,),
        batch_size=config.policy.batch_size,
        preset=config.preset,
        settings={"cell": cell.name},
    )
    first = {t.id: _first_gold(t) for t in read_trajectories(folder / "evaluation" / "trajectories.parquet")}
    rows = io.BytesIO()
    frame.assign(first_gold=frame["id"].map(first))[list(KEPT)].to_parquet(rows, index=False, compression="zstd")
    write_atomically(folder / "questions.parquet", rows.getvalue())
    record = {
        "about": cell.about,
        "seconds_training": round(trained - began, 1),  # of what was not there yet, shared stages included
        "seconds_evaluation": round(time.monotonic() - trained, 1),
        "provenance": provenance(seed),
    }
    write_atomically(folder / "cell.json", (json.dumps(record, indent=1) + "\n").encode())
    return "finished"


def _keep_curves(run: Path, folder: Path, group_size: int) -> None:
    """A checkpoint can be made again and is not kept for good; how it came about is."""
    from vrag_lib.grpo_runs import keep_sample

    for file in (run / "metrics.csv", keep_sample(run, group_size)):
        write_atomically(folder / file.name, file.read_bytes())


def _settings(bench: Workbench, cell: Cell, config: Config, seed: int) -> dict:
    """What the rows of a cell depend on."""
    described = asdict(cell) | {"agent": cell.find_agent().name}
    described.pop("about")
    formatted = cell.starts_formatted and bench.format_trajectories > 0
    stages = ["policy", "environment", "retrieval"]
    stages += ["sft", "synthesis"] if formatted or cell.trained else []
    stages += ["grpo"] if "grpo" in cell.chain else []
    begun = {"cold_start": seed % bench.cold_starts} if cell.chain == "sft+grpo" else {}
    return begun | {
        "cell": described,
        "seed": seed,
        "model": model_fingerprint(bench.raw()) if config.policy.kind == "transformers" else config.policy.model,
        "format_trajectories": bench.format_trajectories,
        "config": depends_on(config, *stages),
    }


def _first_gold(trajectory) -> float:
    if not trajectory.gold_page_ids:
        return math.nan
    return float(bool(trajectory.shown_pages) and trajectory.shown_pages[0] in trajectory.gold_page_ids)


def cell_folder(config: Config, cell: str, seed: int) -> Path:
    """Where the results of a cell with one seed lie."""
    return config.folder("matrix") / cell / f"seed_{seed}"


def states(config: Config, cells: Sequence[str] | None = None, seeds: int = SEEDS) -> list[Outcome]:
    """What there is of each cell and seed: `finished`, `failed` with the last line of its error, `begun`, `missing`."""
    found = []
    for cell in find_cells(cells):
        for seed in cell.seeds(seeds):
            folder = cell_folder(config, cell.name, seed)
            error = folder / "error.txt"
            if (folder / "cell.json").is_file():
                found.append(Outcome(cell.name, seed, "finished"))
            elif error.is_file():
                last = error.read_text().strip().splitlines()[-1]
                found.append(Outcome(cell.name, seed, "failed", last))
            else:
                found.append(Outcome(cell.name, seed, "begun" if folder.is_dir() else "missing"))
    return found


def read_rows(config: Config, cells: Sequence[str] | None = None) -> dict[str, pd.DataFrame]:
    """The rows of all finished cells, those of each cell's seeds together, with columns `seed` and, for RL after SFT,
    `cold_start`: the seed of the SFT that it began with."""
    import pandas as pd

    rows = {}
    for cell in find_cells(cells):
        folders = sorted(
            (path.parent for path in (config.folder("matrix") / cell.name).glob("seed_*/cell.json")),
            key=lambda path: int(path.name.removeprefix("seed_")),
        )
        parts = []
        for folder in folders:
            began = (read_json(folder / "settings.json") or {}).get("cold_start", math.nan)
            seed = int(folder.name.removeprefix("seed_"))
            measured = pd.read_parquet(folder / "questions.parquet").reindex(columns=list(KEPT))  # NaN: not kept then
            parts.append(measured.assign(seed=seed, cold_start=began))
        if parts:
            rows[cell.name] = pd.concat(parts, ignore_index=True)
    return rows


def read_records(config: Config, cells: Sequence[str] | None = None) -> Mapping[tuple[str, int], dict]:
    """`cell.json` of all finished cells, by cell and seed."""
    found = {}
    for cell in find_cells(cells):
        for path in (config.folder("matrix") / cell.name).glob("seed_*/cell.json"):
            found[cell.name, int(path.parent.name.removeprefix("seed_"))] = read_json(path)
    return found


def read_curves(config: Config, cells: Sequence[str] | None = None) -> pd.DataFrame:
    """The curves of all finished cells that RL trained, a row per seed and step, with columns `cell` and `seed` in
    front. Empty without any."""
    import pandas as pd

    parts = []
    for cell, seed in read_records(config, cells):
        path = cell_folder(config, cell, seed) / "metrics.csv"
        if path.is_file():
            curve = pd.read_csv(path)
            parts.append(pd.concat([pd.DataFrame({"cell": cell, "seed": seed}, curve.index), curve], axis=1))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
