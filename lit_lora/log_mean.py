"""Means over the samples of all batches and processes, weighted by how many samples count."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor


def log_mean(module: LightningModule, name: str, value: Tensor, count: int, **options: Any) -> None:
    """Log a batch's mean, so that the epoch's value is the mean over all samples that count.

    Args:
        module: Module that logs.
        name: Name of the metric.
        value: Mean over the batch.
        count: Number of samples in the batch that count; it may differ between processes. The mean is nan if no sample counts
            in any process.
        **options: Options of ``LightningModule.log``.
    """
    # Lightning averages the counts of the processes in their own dtype: the mean of the integers 3 and 2 would be 2.
    counted: Any = float(count)
    module.log(name, value, batch_size=counted, sync_dist=True, **options)
