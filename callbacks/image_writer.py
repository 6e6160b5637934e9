"""Writes predicted images as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.draws import slots_of
from lit_lora.errors import UserError
from lit_lora.files import atomic_file, writable_folder
from lit_lora.folder_lock import FolderLock


class _Image(NamedTuple):
    name: str
    inode: int
    mtime_ns: int


class ImageWriter(BasePredictionWriter):
    """Writes the images of ``predict`` as ``NUMBER-KEY.png``, each with its caption in ``NUMBER-KEY.txt``.

    With several dataloaders the names begin with the dataloader's number. Files of these names are replaced; the end of a
    run says where its images are, and warns of other images that the folder held before.

    Args:
        output_dir: Folder for the files; created if missing.

    Raises:
        UserError: If another run writes images into the folder, or it cannot be written to.
    """

    def __init__(self, output_dir: str) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir)
        self._lock: FolderLock | None = None
        self._before: set[_Image] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            lock = FolderLock(writable_folder(self.output_dir))
            if trainer.is_global_zero and (other := lock.take()):
                raise UserError(
                    f"{other} writes its images to {self.output_dir} too; wait until it has ended, or name another output_dir"
                )
            self._lock = lock
            self._before = self._images() if trainer.is_global_zero else set()

    def _tell(self) -> None:
        """Say where the images are, and warn of others there."""
        there = self._images()
        written = len(there - self._before)
        # Not through the log: above the bar of rich is what is printed.
        print(f"{written:,} {'image' if written == 1 else 'images'} with captions: {self.output_dir}", flush=True)
        if left := sorted(image.name for image in there & self._before):
            rank_zero_warn(
                f"{self.output_dir} also holds {len(left):,} images from before this run, such as {left[0]}; remove them or name "
                f"another output_dir, lest they are taken for images of this run"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            trainer.strategy.barrier()  # the other processes write too
            if trainer.is_global_zero:
                self._tell()
        self._release()

    def _images(self) -> set[_Image]:
        """The images in the folder; one that is written anew is another."""
        stats = [(path.name, path.stat()) for path in self.output_dir.glob("*.png")]
        return {_Image(name, stat.st_ino, stat.st_mtime_ns) for name, stat in stats}

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        count = len(prediction)
        slots = slots_of(batch, batch_idx, trainer, dataloader_idx)
        keys = batch.get("key", [""] * count)
        weights = batch["weight"].tolist() if "weight" in batch else [1.0] * count
        for image, slot, key, caption, weight in zip(prediction, slots, keys, batch["caption"], weights, strict=True):
            if weight == 0:  # the sample only pads the batch
                continue
            # The number distinguishes equal keys of different shards. A key may hold any character.
            name = f"{int(slot):06d}-" + re.sub(r"[^\w-]+", "_", key)
            if len(trainer.num_predict_batches) > 1:  # several loaders may count from 0 each
                name = f"{dataloader_idx}-{name}"
            with atomic_file(self.output_dir / f"{name}.png") as part:
                image.save(part, format="png")
            with atomic_file(self.output_dir / f"{name}.txt") as part:
                part.write_text(caption + "\n", encoding="utf-8")
