"""Schedule-free optimizers: which weights are trained, and which are validated, saved and drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lit_lora.callbacks import AdapterCheckpoint, LoraInjection, SampleImages, ScheduleFree
from lit_lora.callbacks.schedule_free import learned_weights
from tests.callbacks.foreign_modules import Classifier, images

schedulefree = pytest.importorskip("schedulefree")


class Averaging(Classifier):
    """A classifier with a schedule-free optimizer, which notes the mode of the optimizer in each hook."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: dict[str, set[bool]] = {}

    def configure_optimizers(self) -> Any:
        return schedulefree.AdamWScheduleFree(self.parameters(), lr=self.lr)

    def note(self, hook: str) -> None:
        if self.trainer.optimizers:
            mode = bool(self.trainer.optimizers[0].param_groups[0]["train_mode"])
            self.modes.setdefault(hook, set()).add(mode)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.note("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.note("validation")
        super().validation_step(batch, batch_idx)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[Image.Image]:
        self.note("generation")
        return [Image.new("RGB", (8, 8)) for _ in prompts]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self._trainer is not None and not kwargs.get("prefix"):
            self.note("saving")
        return super().state_dict(*args, **kwargs)


def fit(folder: Path, options: dict[str, Any], epochs: int, resume: Path | None = None) -> tuple[Averaging, Trainer]:
    """Train epochs of four steps, with a checkpoint, samples and a validation after each."""
    torch.manual_seed(0)
    module = Averaging()
    callbacks = [
        ScheduleFree(),
        LoraInjection(LoraConfig(r=2, lora_alpha=2, target_modules="conv"), "net"),
        SampleImages(["a"], every_n_steps=2),
        AdapterCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True, enable_version_counter=False),
    ]
    trainer = Trainer(**options | {"max_epochs": epochs, "enable_checkpointing": True}, callbacks=callbacks)
    trainer.fit(module, images(), images(), ckpt_path=resume)
    return module, trainer


def trained(module: Averaging) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_each_part_of_a_run_has_its_weights(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, trainer_options, 2)
    assert module.modes == {"training": {True}, "validation": {False}, "generation": {False}, "saving": {False}}
    learned = trained(module)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in learned.items():  # up to the rounding of one exchange
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-7)
    file = load_file(tmp_path / "last.adapter" / "adapter_model.safetensors")
    assert torch.equal(file["base_model.model.conv1.lora_B.weight"], saved["net.conv1.lora_B.default.weight"])
    # The learned weights are not those that gradients are computed at.
    [optimizer] = trainer.optimizers
    optimizer.train()  # type: ignore[attr-defined]
    assert all(
        (value - learned[name]).abs().max() > 1e-4 for name, value in trained(module).items() if "lora_B" in name
    )
    with learned_weights(trainer):
        for name, value in trained(module).items():
            torch.testing.assert_close(value, learned[name])
    assert optimizer.param_groups[0]["train_mode"]


def test_validation_afterwards_uses_what_was_learned(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, trainer_options, 2)
    inside, learned = float(trainer.callback_metrics["val/loss"]), trained(module)
    [after] = trainer.validate(module, images(), verbose=False)
    [again] = trainer.validate(module, images(), verbose=False)
    assert inside == after["val/loss"] == again["val/loss"]
    assert all(torch.equal(value, learned[name]) for name, value in trained(module).items())


def test_resuming_is_exact(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "whole", trainer_options, 3)
    fit(tmp_path / "first", trainer_options, 1)
    resumed, _ = fit(tmp_path / "first", trainer_options, 3, tmp_path / "first" / "last.ckpt")
    expected, found = trained(whole), trained(resumed)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_without_the_callback_the_optimizer_says_so(trainer_options: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="Optimizer was not in train mode"):
        Trainer(**trainer_options | {"max_epochs": 1}).fit(Averaging(), images())


def test_other_optimizers_are_left_alone(trainer_options: dict[str, Any]) -> None:
    trainer = Trainer(**trainer_options | {"max_epochs": 1}, callbacks=[ScheduleFree()])
    trainer.fit(Classifier(), images(), images())
    with learned_weights(trainer):
        pass
