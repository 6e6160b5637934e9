"""One process of a run that the kill test starts again and again."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig, inject_adapter_in_model

from lit_lora.callbacks import AdapterCheckpoint
from lit_lora.datamodules import WebDatasetDataModule


class Recorder(LightningModule):
    """A LoRA over one frozen layer; writes down each batch that it is given."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3 * 8 * 8, 4))
        self.net: Any = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), net)
        self.log_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        line = {"step": self.global_step, "shown": list(zip(batch["key"], batch["slot"], strict=True))}
        os.write(self.log_file, (json.dumps(line) + "\n").encode())
        time.sleep(0.01)
        pixels = batch["pixel_values"].flatten(1).float() / 255
        return (self.net(pixels) ** 2).mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Lightning warns without it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


def run(rank: int, world_size: int, port: int, folder: Path, data: dict[str, Any], steps: int) -> None:
    """Train or go on training; the last checkpoint is in ``folder``."""
    if world_size > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "LOCAL_WORLD_SIZE": str(world_size),
            "TORCHELASTIC_RUN_ID": "test",
        }
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a process of a user
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    save = AdapterCheckpoint(folder, every_n_train_steps=4, save_last="link", enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[save],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Recorder(folder / f"shown-{rank}.jsonl"), WebDatasetDataModule(**data), ckpt_path="last")
    (folder / f"done-{rank}").touch()
