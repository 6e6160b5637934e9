"""Two gloo processes: each one's last random number, of a whole run and of one stopped and resumed half-way."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_lora.callbacks import AdapterCheckpoint


class Noisy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.drawn = torch.rand(())
        return self.layer(batch).mean() * self.drawn

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    folder, phase = Path(sys.argv[1]), sys.argv[2]
    run = folder / ("a" if phase == "whole" else "b")
    steps = 2 if phase == "first" else 4
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[AdapterCheckpoint(run, every_n_train_steps=2, enable_version_counter=False)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(1 + trainer.global_rank)
    module = Noisy()
    resume = str(run / "epoch=0-step=2.ckpt") if phase == "rest" else None
    data = DataLoader(torch.ones(8, 1), batch_size=1, generator=torch.Generator())  # type: ignore[arg-type]
    trainer.fit(module, data, ckpt_path=resume)
    (folder / f"{phase}-{trainer.global_rank}").write_text(f"{module.drawn.item()} {torch.rand(()).item()}")


if __name__ == "__main__":
    main()
