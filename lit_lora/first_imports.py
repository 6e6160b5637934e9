"""The first imports of the heavy libraries, which a command makes when it runs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def first_imports() -> Iterator[None]:
    """A context for the first imports of the libraries, which takes a fifth less time without collections of garbage.

    What is imported stays until the process ends, so that later collections leave it out.
    """
    from lit_lora.console import plain_warnings

    if "torch" in sys.modules or not gc.isenabled():
        yield
        plain_warnings()
        return
    gc.disable()
    try:
        yield
        plain_warnings()  # Lightning has set its own way to show them
    finally:
        gc.freeze()
        gc.enable()
