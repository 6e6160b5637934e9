"""Messages of others beside a progress bar."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


@contextmanager
def messages_above_bar() -> Iterator[None]:
    """Have Lightning's messages, and warnings that would go to stderr, printed above the bar, and not in its line.

    Warnings that are recorded stay with their recorder.
    """
    show = warnings.showwarning

    def show_above(*args: Any, **kwargs: Any) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            show(*args, **kwargs)

    warnings.showwarning = show_above
    try:
        with logging_redirect_tqdm([logging.getLogger("lightning.pytorch")]):
            yield
    finally:
        if warnings.showwarning is show_above:
            warnings.showwarning = show
