"""A step that takes minutes: ``python slow_step_script.py FOLDER``."""

import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_lora.callbacks import AdapterCheckpoint, Preemption


class Slow(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        (Path(self.trainer.default_root_dir) / "in a step").touch()
        time.sleep(600)
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    folder = sys.argv[1]
    trainer = Trainer(
        accelerator="cpu", max_steps=2, default_root_dir=folder, callbacks=[AdapterCheckpoint(folder), Preemption()]
    )
    trainer.fit(Slow(), DataLoader(torch.ones(8, 1)))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
