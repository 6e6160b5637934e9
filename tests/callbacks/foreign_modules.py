"""LightningModules as other projects write them, without any knowledge of adapters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 40


def loader(data: TensorDataset, batch_size: int) -> DataLoader[Any]:
    """A loader that draws nothing from the global random numbers, so that a resumed run can be the same."""
    return DataLoader(data, batch_size=batch_size, generator=torch.Generator())


def images(count: int = 16, batch_size: int = 4) -> DataLoader[Any]:
    """Images of 16 px of which the last columns tell their class."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.arange(count) % 4
    pixels[:, :, :, -4:] += labels[:, None, None, None]
    return loader(TensorDataset(pixels, labels), batch_size)


def sentences(count: int = 16, batch_size: int = 4) -> DataLoader[Any]:
    """Sequences of tokens in a row."""
    starts = torch.arange(count)[:, None]
    return loader(TensorDataset((starts + torch.arange(8)) % VOCABULARY), batch_size)


def tiny_resnet() -> ResNet:
    """The ResNet of torchvision with one small block in each of two layers."""
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    net.layer3, net.layer4 = nn.Sequential(), nn.Sequential()
    net.fc = nn.Linear(128, 4)
    return net


class Classifier(LightningModule):
    """A ResNet with BatchNorm; the optimizer gets all parameters."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.net = tiny_resnet()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits: Tensor = self.net(batch[0])
        return logits

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def tiny_language_model() -> LlamaForCausalLM:
    """A language model of transformers with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


class LanguageModel(LightningModule):
    """A language model that is built late, with a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(0)
            self.model = tiny_language_model()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[0]).loss
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model(input_ids=batch[0], labels=batch[0]).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Adversarial(LightningModule):
    """A generator and a discriminator that are trained by hand, each with its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        real = batch[0].flatten(1)[:, :8]
        noise = torch.randn(len(real), 4)
        for number, optimizer in enumerate(optimizers):
            fake = self.generator(noise)
            logits = self.discriminator(fake if number == 0 else torch.cat([real, fake.detach()]))
            wanted = torch.zeros_like(logits)
            wanted[: len(real)] = 1
            optimizer.zero_grad()
            self.manual_backward(F.binary_cross_entropy_with_logits(logits, wanted))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-2),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-2),
        ]
