"""An adapter in an existing Lightning project: ``python docs/examples/injection.py``.

``Classifier`` and its data are an ordinary project, a ResNet of torchvision with BatchNorm. It first learns to tell stripes by
their direction. Then the same module gets LoRA by one callback and learns noisy, inverted stripes, with its own weights frozen.
At the end plain PEFT, without Lightning, loads the adapter into the first network.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

from lit_lora import AdapterCheckpoint, LoraInjection

SIDE = 32
CLASSES = 4


def stripes(count: int, seed: int, noisy: bool = False) -> TensorDataset:
    """Images of stripes in four directions, and their directions; noisy ones are inverted."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    phases = torch.rand(count, generator=generator)[:, None, None] * 6.28
    angles = labels[:, None, None] * torch.pi / CLASSES
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images = (0.5 + 0.5 * torch.sin(angles.cos() * x + angles.sin() * y + phases))[:, None].expand(-1, 3, -1, -1)
    if noisy:
        images = 1 - images * torch.tensor([1.0, 0.2, 0.2])[:, None, None]
        images = images + 0.5 * torch.randn(images.shape, generator=generator)
    return TensorDataset(images, labels)


class Classifier(LightningModule):
    """Any LightningModule; nothing in it knows of adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-3)


def fit(module: Classifier, data: TensorDataset, epochs: int, callbacks: list[Callback], folder: Path) -> None:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True))


@torch.no_grad()
def accuracy(net: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    return (net.eval()(images).argmax(1) == labels).float().mean().item()


def train(folder: Path, epochs: int, samples: int = 512) -> dict[str, Any]:
    """Train the network and then its adapter, and return accuracies on held-out noisy stripes."""
    seed_everything(0)
    torch.set_num_threads(1)
    held_out = stripes(256, seed=1, noisy=True)
    module = Classifier()
    fit(module, stripes(samples, seed=2), epochs, [], folder)
    base = copy.deepcopy(module.net)

    injection = LoraInjection(LoraConfig(r=8, lora_alpha=8, target_modules="conv"), module="net")
    module.train()
    fit(
        module,
        stripes(samples, seed=3, noisy=True),
        epochs,
        [injection, AdapterCheckpoint(folder, save_last=True)],
        folder,
    )

    before = accuracy(base, held_out)
    with_adapter = accuracy(module.net, held_out)
    loaded = PeftModel.from_pretrained(base, folder / "last.adapter")
    size = (folder / "last.adapter" / "adapter_model.safetensors").stat().st_size
    return {"before": before, "adapter": with_adapter, "plain PEFT": accuracy(loaded, held_out), "bytes": size}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = train(Path(folder), options.epochs)
    print(f"accuracy on noisy stripes: {found['before']:.1%} before, {found['adapter']:.1%} with the adapter, ", end="")
    print(f"{found['plain PEFT']:.1%} in plain PEFT; its file has {found['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
