"""Makes torchvision importable beside a CPU-only torch, and glibc keep memory for it.

torchvision's wheels on PyPI are linked against CUDA libraries. Beside a CPU build of torch its compiled
operators do not load, and `import torchvision` stops with `operator torchvision::nms does not exist`;
transformers' Qwen processors, qwen_vl_utils, colpali-engine and byaldi all import it. Only two operators are
looked up while torchvision is being imported, and only by name: declaring their signatures is enough for
everything written in Python, which is all that those libraries use. Box operators (nms, roi_align) and
torchvision's image decoders stay unavailable.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
import threading
from types import ModuleType

REMEDY = "install both with: pip install torch==2.13.0 torchvision==0.28.0"

_OPERATORS_NEEDED_BY_NAME = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_lock = threading.Lock()
_declared: list[object] = []  # a torch.library.Library withdraws its operators when it is collected


def ensure_torchvision() -> ModuleType:
    """Import torchvision and return it, declaring its missing operators where its own library does not load.

    Call it before the first import of transformers, colpali_engine, byaldi or qwen_vl_utils. It may be called
    any number of times, from any thread, and changes nothing where torchvision imports by itself.

    Raises ImportError, with the command that helps, when torch or torchvision is not installed. Any other
    fault of torchvision's import is passed on as it is.
    """
    with _lock:
        for name in ("torch", "torchvision"):
            if importlib.util.find_spec(name) is None:
                raise ImportError(f"{name} is not installed; {REMEDY}")
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # half-imported: a second import would otherwise continue in the middle
        _declare_operators()
        return importlib.import_module("torchvision")


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS_NEEDED_BY_NAME:
        if not hasattr(torch.ops.torchvision, name):  # somebody else may have declared one already
            library.define(name + _SIGNATURE)
    _declared.append(library)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of giving them back to the system: activations of every step then need
    no fresh pages, which halves the time of a step on a CPU. Does nothing elsewhere."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(option, 2**31 - 1)
