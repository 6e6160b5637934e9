"""Number of samples in a batch."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size


def batch_size(batch: Any) -> int | None:
    """Number of samples in a batch of any datamodule; None if it cannot be told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captions make it ambiguous for Lightning
        try:
            return extract_batch_size(batch)
        except (MisconfigurationException, RecursionError):
            return None
