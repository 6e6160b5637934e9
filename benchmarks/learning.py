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


def learn(module: LoraDiffusion, shards: Path, seed: int, steps: int, callbacks: Sequence[Callback] = ()) -> Learned:
    """Train a module on shards of images of 32 x 32 pixels in batches of 48, and validate it on 96 that were held out.

    Args:
        module: Module to train.
        shards: Folder of the shards.
        seed: Seed of the batches.
        steps: Optimizer steps.
        callbacks: Callbacks of the training; defaults to none.
    """
    data = WebDatasetDataModule(
        str(shards),
        val_samples=96,
        batch_size=48,
        resolution=32,
        decoder=ImageDecoder(center_crop=True),
        num_workers=0,
        seed=seed,
    )
    trainer = plain_trainer(max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0, callbacks=list(callbacks))
    started = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - started
    loss = plain_trainer().validate(module, data, verbose=False)[0]["val/loss"]
    return Learned(trainer, seconds, loss)
