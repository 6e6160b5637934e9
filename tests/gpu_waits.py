"""Counts where the CPU waits for a GPU."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def gpu_waits() -> Iterator[Counter[str]]:
    """Context that counts the waits by the file, with its folder, and the line outside torch that they come from."""
    waits: Counter[str] = Counter()

    def count(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            waits[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", "called a synchronizing CUDA operation")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    frame = sys._getframe(2)
    while "/torch/" in frame.f_code.co_filename or Path(frame.f_code.co_filename).name == "warnings.py":
        assert frame.f_back is not None
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
