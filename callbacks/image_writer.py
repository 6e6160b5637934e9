"""Predicted pictures as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lit_lora.files import atomic_file, writable_folder


class ImageWriter(BasePredictionWriter):
    """Writes what ``predict`` draws as ``KEY.png``, with the caption beside it in ``KEY.txt``.

    Args:
        output_dir: Where the files go; created if missing.
    """

    def __init__(self, output_dir: str) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            writable_folder(self.output_dir)

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
        for image, key, caption, weight in zip(
            prediction, batch["key"], batch["caption"], batch["weight"].tolist(), strict=True
        ):
            if weight == 0:  # a slot that only fills the batch
                continue
            with atomic_file(self.output_dir / f"{key}.png") as part:
                image.save(part, format="png")
            with atomic_file(self.output_dir / f"{key}.txt") as part:
                part.write_text(caption + "\n", encoding="utf-8")
