"""Training on small images, for benchmarks that measure what a model learns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback, Trainer

from benchmarks.short_training import plain_trainer
from lit_lora import LoraDiffusion, WebDatasetDataModule
from lit_lora.datamodules import ImageDecoder


@dataclass(frozen=True)
class Learned:
    """A run that learned from images.

    Args:
        trainer: Trainer after the run.
        seconds: CPU time of the training, which does not depend on what else the machine does.
        loss: Loss on held-out images at fixed timesteps and noise.
    """

    trainer: Trainer
    seconds: float
    loss: float


def data_of(shards: Path, seed: int, batch_size: int = 48) -> WebDatasetDataModule:
    """Shards of images of 32 x 32 pixels, or their cache, of which 96 are held out.

    Args:
        shards: Folder of the shards.
        seed: Seed of the batches.
        batch_size: Images in a batch; defaults to 48.
    """
    return WebDatasetDataModule(
        str(shards),
        val_samples=96,
        batch_size=batch_size,
        resolution=32,
        decoder=ImageDecoder(center_crop=True),
        num_workers=0,
        seed=seed,
    )


def learn(module: LoraDiffusion, data: WebDatasetDataModule, steps: int, callbacks: Sequence[Callback] = ()) -> Learned:
    """Train a module, and validate it on what was held out.

    Args:
        module: Module to train.
        data: Its data.
        steps: Optimizer steps.
        callbacks: Callbacks of the training; defaults to none.
    """
    trainer = plain_trainer(max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0, callbacks=list(callbacks))
    started = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - started
    loss = plain_trainer().validate(module, data, verbose=False)[0]["val/loss"]
    return Learned(trainer, seconds, loss)
