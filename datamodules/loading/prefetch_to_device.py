"""Copying of batches to the GPU ahead of their steps."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_lora.datamodules.loading.device_copies import DeviceCopies
from lit_lora.datamodules.loading.loader import PlannedLoader
from lit_lora.errors import UserError


class PrefetchToDevice(Callback):
    """Copies training batches of ``WebDatasetDataModule`` to the GPU while earlier steps compute.

    Without it Lightning copies each batch, which is in pinned memory, between two steps. With it, the loader's threads begin the
    copy in a CUDA stream of its own when a batch is complete, so up to two batches per thread of ``num_workers`` wait in the
    GPU's memory, which the plan of memory does not count. Order, values and resuming are unchanged. On a CPU it does nothing.

    The gain has not been measured on a GPU. A batch of 16 images of 1024 px is 50 MB, about 2 ms at 25 GB/s.

    Raises:
        UserError: If training batches come from another loader.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.train_dataloader
        if not isinstance(loader, PlannedLoader):
            raise UserError(
                f"PrefetchToDevice copies batches of WebDatasetDataModule, not of a {type(loader).__name__}; remove the callback"
            )
        device = trainer.strategy.root_device
        if device.type == "cuda" and (loader.copies is None or loader.copies.device != device):
            loader.copies = DeviceCopies(device)
