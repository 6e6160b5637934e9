"""Means over the samples of all batches and processes, in which some may not count."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor


def log_mean(module: LightningModule, name: str, value: Tensor, count: int, **options: Any) -> None:
    """Log a batch's mean towards the mean over all samples.

    Args:
        module: That logs.
        name: Of the metric.
        value: The mean of the batch.
        count: How many of its samples count; they need not be as many in each process. If none counts anywhere, the mean
            is nan.
        **options: Of ``LightningModule.log``.
    """
    # Lightning averages the counts over the processes, integers as integers: 3 and 2 would become 2.
    counted: Any = float(count)
    module.log(name, value, batch_size=counted, sync_dist=True, **options)
