"""Every notebook runs from top to bottom at smoke size, is committed as one clean run, and defines nothing."""

from __future__ import annotations

import ast
import json
import os
import queue
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from vrag_lib.config import Config
from vrag_lib.notebooks import NotebookError, live_curves, notebook_paths, repository, reproduce, run_notebook
from vrag_lib.presets import load_config
from vrag_lib.training import MetricsFile

NOTEBOOKS = notebook_paths()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS][:1] == ["00_quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_at_smoke_size(path, results):
    environment = {"VRAG_PRESET": "laptop", "VRAG_OVERRIDES": f"smoke=true results={results}", "OMP_NUM_THREADS": "1"}
    run_notebook(path, results / path.name, environment, timeout_s=240)
    assert any(p.is_file() for p in (results / "laptop" / path.stem).rglob("*"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_as_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any(o.output_type == "display_data" or o.output_type == "execute_result" for o in outputs)
    assert path.stat().st_size < 4_000_000
    text = path.read_text()
    assert str(Path.home()) not in text and str(repository()) not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_defines_nothing_the_package_should_hold(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)], cell.source
            assert len(cell.source.splitlines()) <= 20, cell.source


def checkout(folder: Path, *cells: str) -> Config:
    """A checkout with one notebook, 00_note, of these code cells."""
    (folder / "notebooks").mkdir()
    (folder / "pyproject.toml").touch()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, folder / "notebooks" / "00_note.ipynb")
    return load_config("laptop", [f"results={folder / 'results'}"])


def test_an_unchanged_notebook_is_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vrag_lib.notebooks.repository", lambda: tmp_path)
    config = checkout(tmp_path, "import os; print(os.environ['VRAG_PRESET'])")
    target = reproduce(config)[0]
    assert json.loads(target.read_text())["cells"][0]["outputs"][0]["text"] == ["laptop\n"]
    capsys.readouterr()
    reproduce(config)
    assert "unchanged since its last run" in capsys.readouterr().err
    checkout_file = tmp_path / "notebooks" / "00_note.ipynb"
    checkout_file.write_text(checkout_file.read_text().replace("VRAG_PRESET", "PATH"))
    reproduce(config)
    assert "00_note: running" in capsys.readouterr().err


def test_a_failing_notebook_is_named_and_keeps_what_it_did(tmp_path):
    checkout(tmp_path, "print('before')", "1 / 0")
    target = tmp_path / "out.ipynb"
    with pytest.raises(NotebookError, match=r"00_note\.ipynb failed:[\s\S]*ZeroDivisionError"):
        run_notebook(tmp_path / "notebooks" / "00_note.ipynb", target, dict(os.environ))
    assert "before" in target.read_text()


def test_curves_are_drawn_while_a_run_goes_on_and_once_more_at_its_end(tmp_path, monkeypatch):
    drawn = queue.Queue()
    handle = SimpleNamespace(update=lambda figure: drawn.put(list(figure.axes[0].lines[0].get_xdata())))
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: handle)
    curve = MetricsFile(tmp_path / "run" / "metrics.csv")
    with live_curves(curve.path, {"reward": ["reward"]}, every_s=0.01):
        curve.add(1, {"reward": 0.1})
        assert drawn.get(timeout=30) == [1]
        curve.add(2, {"reward": 0.2})
        assert drawn.get(timeout=30) == [1, 2]
    assert drawn.get(timeout=1) == [1, 2] and drawn.empty()
    with live_curves(tmp_path / "nothing.csv", {"reward": ["reward"]}):
        pass
    assert drawn.empty()
