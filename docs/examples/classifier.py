"""An image classifier trained from WebDataset shards: ``python docs/examples/classifier.py``.

This example does not use diffusion: the module is a plain LightningModule, and the only part of this project is the
datamodule. A sample is an image with its class, ``000017.png`` and ``000017.cls``; batches hold the class as the caption. The
datamodule resumes, shuffles and divides the samples among processes as in any other training.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from lightning.pytorch import LightningModule, Trainer, seed_everything
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_lora.datamodules import Captions, CaptionSource, ImageDecoder, WebDatasetDataModule

CLASSES = ("circle", "square", "triangle", "cross")
SIDE = 32


def write_shards(folder: Path, num_shards: int = 4, samples_per_shard: int = 400) -> None:
    """Write shards with images of shapes at random positions, in random sizes and colours."""
    random = np.random.default_rng(0)
    for shard in range(num_shards):
        with webdataset.TarWriter(str(folder / f"shard-{shard:06}.tar"), mtime=0) as writer:
            for number in range(samples_per_shard):
                label = int(random.integers(len(CLASSES)))
                writer.write({"__key__": f"{shard:03}{number:03}", "png": draw(CLASSES[label], random), "cls": label})


def draw(shape: str, random: np.random.Generator) -> bytes:
    """Draw one shape and encode the image as PNG."""
    background = tuple(random.integers(110, size=3).tolist())
    colour = tuple(random.integers(130, 256, size=3).tolist())
    image = Image.new("RGB", (SIDE, SIDE), background)
    pen = ImageDraw.Draw(image)
    size = int(random.integers(10, 24))
    left, top = random.integers(SIDE - size, size=2).tolist()
    right, bottom = left + size, top + size
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), colour)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), colour)
    elif shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), (left + size // 2, top)], colour)
    else:
        pen.line((left, top, right, bottom), colour, width=4)
        pen.line((left, bottom, right, top), colour, width=4)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Classifier(LightningModule):
    """A small convolutional classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (SIDE // 8) ** 2, len(CLASSES)),
        )
        self.accuracy = MeanMetric()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits, labels = self._predict(batch)
        losses = F.cross_entropy(logits, labels, reduction="none")
        # A damaged sample is replaced by another one with weight 0.
        return (losses * batch["weight"]).mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        logits, labels = self._predict(batch)
        self.accuracy.update((logits.argmax(1) == labels).float(), batch["weight"])
        self.log("val/accuracy", self.accuracy, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-3)

    def _predict(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        pixels = batch["pixel_values"].float() / 127.5 - 1  # (B, 3, H, W)
        labels = torch.tensor([int(caption) for caption in batch["caption"]], device=self.device)
        return self.net(pixels), labels


def train(folder: Path, max_steps: int, num_workers: int = 2) -> float:
    """Train on the shards in ``folder``, which are written if there are none; return the accuracy on held-out samples."""
    if not any(folder.glob("*.tar")):
        write_shards(folder)
    seed_everything(0)
    torch.set_num_threads(1)  # more threads are slower for such a small network
    data = WebDatasetDataModule(
        str(folder),
        val_samples=320,
        batch_size=32,
        resolution=SIDE,
        decoder=ImageDecoder(random_flip=True, captions=Captions([CaptionSource("cls")])),
        num_workers=num_workers,
    )
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    trainer.fit(model, data)
    (metrics,) = trainer.validate(model, data, verbose=False)
    return metrics["val/accuracy"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--shards", type=Path, help="folder that keeps the shards; defaults to a temporary folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.shards or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        accuracy = train(folder, options.max_steps)
    print(f"accuracy on held-out images: {accuracy:.1%} (chance: {1 / len(CLASSES):.0%})")


if __name__ == "__main__":
    main()
