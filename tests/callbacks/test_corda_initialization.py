from __future__ import annotations

from typing import Any, Literal

import peft
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

from lit_lora.adapters.ranked_layer import ranked_layers
from lit_lora.callbacks import CordaInitialization, LoraInjection
from tests.helpers import loader_of


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(6, 8)
        self.conv = nn.Conv2d(2, 8, 3, padding="same")

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.wide(batch["wide"]).square().mean() + self.conv(batch["image"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Kept(Callback):
    """The layers' first values, and what the base keeps."""

    values: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 2:
            self.values = {
                layer.name: tuple(
                    value.detach().clone() for value in (layer.a, layer.b, layer.layer.get_base_layer().weight)
                )
                for layer in ranked_layers(pl_module)
            }


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(2):
        wide = torch.randn(64, 6, generator=generator) * 0.5 ** torch.arange(6)
        made.append({"wide": wide, "image": torch.randn(4, 2, 8, 8, generator=generator)})
    return made


def trained(options: dict[str, Any], mode: Literal["ipm", "kpm"]) -> Kept:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["wide", "conv"])
    kept = Kept()
    callbacks = [LoraInjection(config), CordaInitialization(steps=2, mode=mode), kept]
    Trainer(**options | {"max_steps": 3, "callbacks": callbacks}).fit(Net(), loader_of(batches()))
    return kept


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_values_are_pefts(mode: Literal["ipm", "kpm"], trainer_options: dict[str, Any]) -> None:
    a, b, weight = trained(trainer_options, mode).values["wide"]
    model = nn.Sequential(Net().wide)
    rows = torch.cat([batch["wide"] for batch in batches()])
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["0"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    preprocess_corda(model, config, lambda: model(rows))
    layer: Any = peft.get_peft_model(model, config).get_submodule("base_model.model.0")
    expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(b @ a, expected.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weight, layer.get_base_layer().weight.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weight + 1.5 * b @ a, Net().wide.weight.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_convolutions_are_decomposed_by_patches(mode: Literal["ipm", "kpm"], trainer_options: dict[str, Any]) -> None:
    """The outputs of the chosen components on the inputs are the largest of rank ``r``, or the smallest."""
    a, b, weight = trained(trainer_options, mode).values["conv"]
    part = 1.5 * torch.einsum("orxy,rihw->oihw", b, a)
    original = Net().conv.weight.detach()
    torch.testing.assert_close(weight + part, original, rtol=1e-4, atol=1e-6)
    patches = torch.cat(
        [nn.functional.unfold(batch["image"], 3, padding=1).transpose(1, 2).flatten(0, 1) for batch in batches()]
    )
    covariance = patches.T @ patches / len(patches)
    of_part = torch.linalg.svdvals(part.flatten(1) @ covariance)
    of_all = torch.linalg.svdvals(original.flatten(1) @ covariance)
    chosen = of_all[:2] if mode == "ipm" else of_all[-2:]
    torch.testing.assert_close(of_part[:2], chosen, rtol=0.05, atol=1e-3)
