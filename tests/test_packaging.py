"""One set of pins, one test command, modules of readable size."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(pin: str) -> str:
    name, _, version = pin.partition("==")
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"


def test_environment_yml_carries_the_pins_of_pyproject():
    text = (ROOT / "environment.yml").read_text()
    pins = re.findall(r"^ {6}- (\S+==\S+)$", text, re.M)
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    assert sorted(map(normal, pins)) == sorted(map(normal, wanted))
    assert "python=3.11" in text
    for line in ("-c constraints.txt", "-e .[dev]"):
        assert f"      - {line}\n" in text


def test_make_asks_for_the_python_of_pyproject():
    bounds = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"])
    assert f"(3, {bounds[1]}) <= sys.version_info < (3, {bounds[2]})" in (ROOT / "Makefile").read_text()


def test_every_dependency_is_pinned_and_locked_at_the_same_version():
    locked = {normal(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for pin in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        assert normal(pin) in locked, pin
    assert any(pin.startswith("vllm==") for pin in PROJECT["optional-dependencies"]["gpu"])


def test_the_lock_holds_no_gpu_packages():
    assert not re.search(r"^(nvidia|cuda|triton)", (ROOT / "constraints.txt").read_text(), re.M)


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    assert "make test" in readme and "make reproduce" in readme


def test_the_readmes_table_is_that_of_the_results():
    readme = (ROOT / "README.md").read_text()
    results = pd.read_csv(ROOT / "results/laptop/retrieval_mmlongbench/metrics.csv").set_index("method")
    for method in ("BM25, text layer, unstemmed", "BM25, layer and OCR", "Dense", "RRF", "Hybrid + GMM", "Default"):
        row = results.loc[method]
        cells = [
            f"{row[m]:.1f} [{row[m + '_low']:.1f}, {row[m + '_high']:.1f}]" for m in ("R@1", "R@5", "R@10", "MRR@5")
        ]
        assert " | ".join(cells) in readme, method


def test_every_module_can_be_imported():
    """Trap S1: a backslash before a space keeps the released reward module from being imported at all. Imports run in
    a process of their own, where no other test has loaded anything yet."""
    modules = sorted(f"vrag_lib.{path.stem}" for path in (ROOT / "vrag_lib").glob("[!_]*.py"))
    assert len(modules) > 50
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_module_compiles_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (ROOT / "vrag_lib").glob("*.py"):
            compile(path.read_text(), path, "exec", dont_inherit=True)


def test_the_readmes_table_names_every_module():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w*]+)`", row.split("|")[1])}
    families = tuple(name.removesuffix("*") for name in named if name.endswith("*"))
    modules = {path.stem for path in (ROOT / "vrag_lib").glob("*.py")} - {"__init__"}
    assert not {name for name in modules - named if not name.startswith(families)}


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {PROJECT['version']}\n" in citation and f"license: {PROJECT['license']}\n" in citation
    assert f"version = {{{PROJECT['version']}}}" in (ROOT / "README.md").read_text()


def test_modules_stay_readable():
    long = {p.name: n for p in (ROOT / "vrag_lib").glob("*.py") if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_no_tracked_file_names_a_machine():
    """Paths of the machine a result was made on do not belong in the repository."""
    names = "|".join(f"/{top}/" for top in ("work", "root", "home", "Users"))
    found = subprocess.run(
        ["git", "grep", "-nIE", f"(^|[^A-Za-z.~_])({names})[A-Za-z]", "--", ":!constraints.txt"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode in (0, 1, 128), found.stderr
    assert not found.stdout, found.stdout
