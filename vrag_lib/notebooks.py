"""Running the numbered notebooks: what `vrag reproduce` and the tests do, and the first line of each notebook.

A notebook begins with

    config = start("00_quickstart")

which gives the config of this run: the laptop preset, or what `VRAG_PRESET` and `VRAG_OVERRIDES` say. Artefacts go to
`config.folder("00_quickstart")`. Notebooks run with the repository as working directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vrag_lib.config import Config, ConfigError, save_config, to_dict
from vrag_lib.presets import load_config


class NotebookError(RuntimeError):
    """A notebook that failed; the message holds its name and the cell's error."""


def start(stage: str, experiment: bool = False) -> Config:
    """The config of this notebook run, its snapshot written to the stage's results folder. Figures appear inline.

    experiment: the preset as the stages of the paper's experiment use it (`config.EXPERIMENTS`)."""
    from IPython import get_ipython

    # Bars of libraries would stay in the notebook as widgets, which only a running kernel can draw.
    for library in ("HF_HUB", "HF_DATASETS"):  # transformers heeds the first
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    os.chdir(repository())
    if (shell := get_ipython()) is not None:
        shell.run_line_magic("matplotlib", "inline")
    overrides = shlex.split(os.environ.get("VRAG_OVERRIDES", ""))
    config = load_config(os.environ.get("VRAG_PRESET", "laptop"), overrides, experiment)
    save_config(config, config.folder(stage))
    return config


@contextmanager
def live_curves(metrics: str | Path, columns: Mapping[str, Sequence[str]], every_s: float = 2.0) -> Iterator[None]:
    """Draw the `metrics.csv` of a training run in the cell as it grows, until the block is left (`plots.curves_figure`;
    columns: title -> columns drawn). It only reads the file, so a run started elsewhere can be followed, too."""
    import pandas as pd
    from IPython.display import display

    from vrag_lib.plots import curves_figure

    path = Path(metrics)
    handle = display("no step yet", display_id=True)
    left = threading.Event()

    def draw() -> None:
        if path.is_file():
            handle.update(curves_figure(pd.read_csv(path), columns))

    def follow() -> None:
        drawn = None
        while not left.wait(every_s):
            changed = path.stat().st_mtime_ns if path.is_file() else None
            if changed != drawn:
                draw()
                drawn = changed

    thread = threading.Thread(target=follow, name="live_curves", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
        draw()


def repository() -> Path:
    """The checkout: the nearest folder above this module or the working directory that holds `notebooks/`.

    Raises ConfigError when there is none, as when only the package was installed.
    """
    here = Path(__file__).resolve()
    for folder in [*here.parents, Path.cwd(), *Path.cwd().parents]:
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise ConfigError("no checkout with notebooks/ was found; run this inside a clone of the repository")


def notebook_paths(folder: Path | None = None) -> list[Path]:
    """The numbered notebooks in order."""
    return sorted((folder or repository() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def run_notebook(
    path: Path, target: Path, environment: Mapping[str, str] | None = None, timeout_s: float = 900
) -> float:
    """Run one notebook from top to bottom in a kernel of its own; write it with its outputs to `target`.

    The run's seconds are returned. Raises NotebookError naming the notebook and its failing cell; what ran before the
    failure is written to `target` all the same.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=timeout_s, kernel_name="python3", allow_errors=False, coalesce_streams=True
    )
    began = time.perf_counter()
    try:
        client.execute(cwd=str(repository()), env={**os.environ, **(environment or {})})
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise NotebookError(f"notebook {path.name} failed:\n{error}") from error
    finally:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
    return time.perf_counter() - began


def reproduce(
    config: Config, overrides: Sequence[str] = (), *, force: bool = False, save_outputs: bool = False
) -> list[Path]:
    """Run every notebook in order; one whose code, package and settings are unchanged since its last run is skipped.

    The executed notebooks are in `results/<preset>/notebooks/`; with `save_outputs` the ones in `notebooks/` are
    replaced by them. Raises NotebookError at the first that fails: later ones read its artefacts.
    """
    folder = config.folder("notebooks")
    done_file = folder / "done.json"
    done = json.loads(done_file.read_text()) if done_file.is_file() else {}
    settings = json.dumps(to_dict(config), sort_keys=True)
    environment = {"VRAG_PRESET": config.preset, "VRAG_OVERRIDES": shlex.join(overrides)}
    before = _package_hash()
    for path in notebook_paths():
        # A notebook reads what the ones before it wrote, so their hash is part of its own.
        before = _hash(before, settings, _sources(path))
        target = folder / path.name
        if not force and done.get(path.name, {}).get("hash") == before and target.is_file():
            print(f"{path.stem}: unchanged since its last run", file=sys.stderr)
            continue
        print(f"{path.stem}: running", file=sys.stderr, flush=True)
        seconds = run_notebook(path, target, environment)
        print(f"{path.stem}: {seconds:.0f} s", file=sys.stderr)
        done[path.name] = {"hash": before, "seconds": round(seconds, 1)}
        done_file.write_text(json.dumps(done, indent=1) + "\n")
        if save_outputs:
            path.write_bytes(target.read_bytes())
    return [folder / path.name for path in notebook_paths()]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def _package_hash() -> str:
    files = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".j2"))
    return _hash(*(path.read_text() for path in files))


def _sources(path: Path) -> str:
    """The code of a notebook without its outputs, which change from run to run."""
    cells = json.loads(path.read_text())["cells"]
    return "\x1e".join("".join(cell["source"]) for cell in cells)
