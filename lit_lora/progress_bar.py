"""What a progress bar shows, and messages of others beside it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


def shows_logged(trainer: Trainer) -> bool:
    """Whether the trainer has a progress bar that shows only what is logged with ``prog_bar=True``, as Lightning's bars do.

    Lightning reads such values in each step, and waits for the GPU to compute them; so they are logged for such a bar alone.
    """
    bar = trainer.progress_bar_callback
    return bar is not None and not getattr(bar, "reads_all_metrics", False)


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
