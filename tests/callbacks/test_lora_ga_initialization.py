from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, LoraGAConfig, preprocess_loraga
from torch import nn

from lit_lora.adapters.ranked_layer import ranked_layers
from lit_lora.callbacks import LoraGaInitialization, LoraInjection
from lit_lora.errors import UserError
from tests.callbacks.test_corda_initialization import Kept, Net, batches
from tests.helpers import loader_of


def trained(options: dict[str, Any], *callbacks: Callback, rank: int = 2, **more: Any) -> None:
    config = LoraConfig(r=rank, lora_alpha=3, target_modules=["wide", "conv"])
    Trainer(**options | {"max_steps": 3, "callbacks": [LoraInjection(config), *callbacks]} | more).fit(
        Net(), loader_of(batches())
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"direction": "A2rBr", "scale": "weight_svd"}, {"direction": "ArBr", "scale": "gd_scale"}, {"scale": "unit"}],
)
def test_the_values_are_pefts(options: dict[str, Any], trainer_options: dict[str, Any]) -> None:
    kept = Kept()
    trained(trainer_options, LoraGaInitialization(steps=2, **options), kept)
    a, b, weight = kept.values["wide"]
    model = nn.Sequential(Net().wide)
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(**options),
    )

    def train_step() -> None:
        for one in batches():
            model(one["wide"].requires_grad_()).square().mean().backward()

    preprocess_loraga(model, config, train_step)
    layer: Any = peft.get_peft_model(model, config).get_submodule("base_model.model.0")
    # The signs of singular vectors are arbitrary.
    for ours, theirs in ((a, layer.lora_A["default"].weight), (b.T, layer.lora_B["default"].weight.T)):
        signs = (ours * theirs).sum(1, keepdim=True).sign()
        torch.testing.assert_close(ours, signs * theirs.detach(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(weight + 1.5 * b @ a, Net().wide.weight.detach(), rtol=1e-4, atol=1e-6)


def test_rows_of_a_are_the_directions_of_the_gradient(trainer_options: dict[str, Any]) -> None:
    kept = Kept()
    trained(trainer_options, LoraGaInitialization(steps=2), kept)
    a, b, _ = kept.values["conv"]
    net = Net()
    sum((net.conv(one["image"]).square().mean() for one in batches()), torch.tensor(0.0)).backward()
    assert net.conv.weight.grad is not None
    left, _, right = torch.linalg.svd(net.conv.weight.grad.flatten(1), full_matrices=False)
    for row, direction in zip(a.flatten(1), right[:2], strict=True):
        assert abs(row @ direction) > 0.999
    for column, direction in zip(b.flatten(1).T, left.T[2:4], strict=True):
        assert abs(column @ direction) / column.norm() > 0.999


def test_a_scaled_loss_changes_nothing(trainer_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training with float16, whose loss is multiplied so that gradients do not underflow."""
    found = []
    for scale in (1.0, 1024.0):
        kept, callback = Kept(), LoraGaInitialization(steps=2)
        monkeypatch.setattr(callback, "_loss_scale", lambda scale=scale: scale)

        class Scaled(Net):
            def training_step(self, batch: Any, batch_idx: int, scale: float = scale) -> torch.Tensor:
                return scale * super().training_step(batch, batch_idx)

        config = LoraConfig(r=2, lora_alpha=3, target_modules=["wide", "conv"])
        callbacks = [LoraInjection(config), callback, kept]
        Trainer(**trainer_options | {"max_steps": 3, "callbacks": callbacks}).fit(Scaled(), loader_of(batches()))
        found.append(kept.values["wide"])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_layers_with_too_few_singular_vectors(trainer_options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"wide with rank 4 has 6 \(6 inputs, 8 outputs\); lower r"):
        trained(trainer_options, LoraGaInitialization(steps=2), rank=4)
    with pytest.raises(UserError, match="stable_gamma=0 is too small"):
        LoraGaInitialization(stable_gamma=0)


def test_a_layer_without_gradients_keeps_its_usual_values(trainer_options: dict[str, Any]) -> None:
    class Unused(Net):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.wide(batch["wide"]).square().mean() + 0 * self.conv(batch["image"]).mean()
            return loss

    class Seen(Callback):
        zero: dict[str, bool]

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.zero = {layer.name: not layer.b.any() for layer in ranked_layers(pl_module)}

    seen = Seen()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["wide", "conv"])
    callbacks = [LoraInjection(config), LoraGaInitialization(steps=2), seen]
    with pytest.warns(UserWarning, match="zeros or NaN alone, for 1 of 2 layers, the first is conv"):
        Trainer(**trainer_options | {"max_steps": 3, "callbacks": callbacks}).fit(Unused(), loader_of(batches()))
    assert seen.zero == {"conv": True, "wide": False}


def test_the_random_numbers_of_the_training_stay(trainer_options: dict[str, Any]) -> None:
    class Randomness(Callback):
        def __init__(self) -> None:
            self.states: list[torch.Tensor] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.states.append(torch.get_rng_state())

    before, after = Randomness(), Randomness()
    trained(trainer_options, before, LoraGaInitialization(steps=1), after)
    assert torch.equal(before.states[0], after.states[0])
