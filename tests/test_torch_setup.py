"""torch_setup: torchvision imports beside a CPU-only torch, and a torchvision that works is left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vrag_lib import torch_setup


def python(code: str) -> str:
    """Run `code` in a fresh interpreter: what is imported in this one must not help."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transforms_work_after_the_call_and_a_second_call_changes_nothing():
    out = python(
        "from vrag_lib.torch_setup import ensure_torchvision as e\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "a = list(ThreadPoolExecutor(4).map(lambda _: e(), range(8)))\n"
        "assert all(m is a[0] for m in a) and e() is a[0]\n"
        "import torch, torchvision.transforms.v2.functional as F\n"
        "print(tuple(F.resize(torch.zeros(3, 8, 8), [4, 6]).shape))"
    )
    assert out == "(3, 4, 6)"


def test_a_torchvision_that_imports_is_not_touched(monkeypatch):
    works = torch_setup.ensure_torchvision()

    def never():
        raise AssertionError("operators were declared beside a working torchvision")

    monkeypatch.setattr(torch_setup, "_declare_operators", never)
    assert torch_setup.ensure_torchvision() is works


@pytest.mark.parametrize("missing", ["torch", "torchvision"])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, missing):
    find = torch_setup.importlib.util.find_spec
    monkeypatch.setattr(torch_setup.importlib.util, "find_spec", lambda n: None if n == missing else find(n))
    with pytest.raises(ImportError, match=rf"^{missing} is not installed; .*pip install torch=="):
        torch_setup.ensure_torchvision()


def test_another_fault_of_torchvision_is_passed_on(monkeypatch):
    def broken(name):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch_setup.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="something else"):
        torch_setup.ensure_torchvision()
