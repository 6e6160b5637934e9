"""Two gloo processes, the second with more memory in use, are measured: ``python ddp_memory_script.py FOLDER``."""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_lora.callbacks.memory_profiler import MemoryProfiler
from lit_lora.callbacks.run_report import RunReport


class Uneven(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def on_train_start(self) -> None:
        self.held = torch.ones(self.trainer.global_rank * 80 * 2**20 // 4)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=3,
        max_epochs=-1,
        default_root_dir=sys.argv[1],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[MemoryProfiler(), RunReport()],
    )
    trainer.fit(Uneven(), DataLoader(torch.ones(12, 1), batch_size=2))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
