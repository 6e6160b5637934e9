"""That AdapterCheckpoint keeps all that training changes, and refuses what is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_lora.callbacks import AdapterCheckpoint, AdapterEMA
from lit_lora.errors import UserError
from tests.helpers import Classifier, loader_of, make_batches


def images(count: int) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))), batch_size=4
    )


class Network(LightningModule):
    """A frozen network with running statistics and a LoRA, and counters beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))
        self.net = get_peft_model(body, LoraConfig(r=2, target_modules=["0"]))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.frozen.register_buffer("constant", torch.ones(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen += len(batch[0])
        self.scratch += 1
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def run(folder: Path, options: dict[str, Any], module: LightningModule, *callbacks: Callback, **more: Any) -> Trainer:
    resume = more.pop("resume", None)
    checkpoints = AdapterCheckpoint(folder, save_last=True, save_top_k=0, enable_version_counter=False)
    options = options | {"enable_checkpointing": True, "max_epochs": -1} | more
    trainer = Trainer(**options | {"callbacks": [*callbacks, checkpoints]})
    trainer.fit(module, images(8), ckpt_path=resume)
    return trainer


def test_buffers_that_training_changes_are_in_the_checkpoint(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module = Network()
    trainer = run(tmp_path, trainer_options, module, max_epochs=3)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    adapter = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    statistics = {f"net.base_model.model.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(state) == adapter | statistics | {"seen"}
    trained = trainer.validate(module, images(4), verbose=False)[0]["val/loss"]
    fresh = Trainer(
        **trainer_options | {"enable_checkpointing": True, "callbacks": [AdapterCheckpoint(tmp_path / "x")]}
    )
    with pytest.warns(UserWarning, match="dirpath has changed"):
        again = fresh.validate(Network(), images(4), ckpt_path=tmp_path / "last.ckpt", verbose=False)[0]["val/loss"]
    assert again == trained


def test_buffers_go_on_where_they_were(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    whole = Network()
    run(tmp_path / "whole", trainer_options, whole, max_epochs=4)
    run(tmp_path / "first", trainer_options, Network(), max_epochs=2)
    resumed = Network()
    run(tmp_path / "first", trainer_options, resumed, max_epochs=4, resume=tmp_path / "first" / "last.ckpt")
    state = resumed.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert whole.seen == 32
    # A checkpoint of the resumed run holds them too, though nothing changed them since they were loaded.
    state = torch.load(tmp_path / "first" / "last.ckpt", weights_only=True)["state_dict"]
    assert "net.base_model.model.1.running_mean" in state


class Backbone(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.head(self.backbone(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Thaws(BaseFinetuning):
    """Trains the backbone from epoch 1 to before ``until``."""

    def __init__(self, until: int = 100) -> None:
        super().__init__()
        self.until = until

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.backbone)  # type: ignore[arg-type]

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=1e-2, train_bn=False)  # type: ignore[arg-type]
        if epoch == self.until:
            self.freeze(pl_module.backbone)  # type: ignore[arg-type]


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_layers_that_are_unfrozen_later(epochs: int, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    whole, whole_ema = Backbone(), AdapterEMA(0.5)
    run(tmp_path / "whole", trainer_options, whole, Thaws(), whole_ema, max_epochs=4)
    run(tmp_path / "first", trainer_options, Backbone(), Thaws(), AdapterEMA(0.5), max_epochs=epochs)
    last = tmp_path / "first" / "last.ckpt"
    assert ("backbone.1.weight" in torch.load(last, weights_only=True)["state_dict"]) == (epochs > 1)
    resumed, ema = Backbone(), AdapterEMA(0.5)
    run(tmp_path / "first", trainer_options, resumed, Thaws(), ema, max_epochs=4, resume=last)
    state = resumed.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, state[name]), name
    averages, again = whole_ema.state_dict(), ema.state_dict()
    assert averages["names"] == again["names"] == ["head.weight", "head.bias", "backbone.1.weight", "backbone.1.bias"]
    assert torch.equal(averages["shadow_params"], again["shadow_params"])


def test_lightnings_own_finetuning_resumes(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def unfreezing() -> BackboneFinetuning:
        return BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)

    trained, resumed = Backbone(), Backbone()
    run(tmp_path, trainer_options, trained, unfreezing(), max_epochs=3)
    last = tmp_path / "last.ckpt"
    run(tmp_path, trainer_options, resumed, unfreezing(), max_epochs=3, resume=last)
    state = resumed.state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_layers_that_were_trained_for_a_while(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module = Backbone()
    run(tmp_path, trainer_options, module, Thaws(until=2), max_epochs=4)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["backbone.1.weight"], module.backbone[1].weight)


def test_weights_that_are_not_finite_never_replace_a_checkpoint(
    trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if trainer.global_step == 2:
                pl_module.head.weight.data[0, 0] = float("inf")  # type: ignore[union-attr,index,operator]

    with pytest.raises(UserError, match=r"nothing is saved at step 2: 1 tensors .* the first is head.weight"):
        run(tmp_path, trainer_options, Backbone(), max_epochs=1)
        run(tmp_path, trainer_options, Backbone(), Breaks(), max_epochs=1)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.isfinite(state["head.weight"]).all()


def test_after_an_error_they_are_not_written_either(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            pl_module.head.weight.data[0, 0] = float("nan")  # type: ignore[union-attr,index,operator]
            raise RuntimeError("on purpose")

    options = trainer_options | {"enable_checkpointing": True, "max_epochs": 1}
    trainer = Trainer(**options | {"callbacks": [Breaks(), AdapterCheckpoint(tmp_path, save_on_exception=True)]})
    with pytest.warns(UserWarning, match="nothing is saved at step 1"), pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Backbone(), images(8))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_not_finite_is_refused(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, trainer_options, Backbone(), max_epochs=1)
    for place in ("weights", "optimizer"):
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        if place == "weights":
            checkpoint["state_dict"]["head.bias"][0] = float("nan")
        else:
            checkpoint["optimizer_states"][0]["state"][0]["exp_avg"][0] = float("nan")
        torch.save(checkpoint, tmp_path / f"{place}.ckpt")
        with pytest.raises(UserError, match=r"hold NaN or Inf.*; resume from an earlier checkpoint"):
            run(tmp_path, trainer_options, Backbone(), max_epochs=2, resume=tmp_path / f"{place}.ckpt")


class CompilesItself(Classifier):
    def on_fit_start(self) -> None:
        self.net: Any = torch.compile(self.net, backend="eager")


@pytest.mark.parametrize("resumed", [CompilesItself, Classifier])
def test_a_module_that_compiles_itself_resumes(
    resumed: type[Classifier], trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """In its checkpoints the layers have other names than when they are read."""

    def fit(module: Classifier, steps: int, folder: str, checkpoint: Path | None = None) -> tuple[list[Tensor], Any]:
        saving = AdapterCheckpoint(tmp_path / folder, save_last=True, save_top_k=0, enable_version_counter=False)
        ema = AdapterEMA(0.5)
        options = trainer_options | {"enable_checkpointing": True, "max_steps": steps, "callbacks": [saving, ema]}
        Trainer(**options).fit(module, loader_of(make_batches(1)), ckpt_path=checkpoint)
        saved = torch.load(tmp_path / folder / "last.ckpt", weights_only=True)
        return [parameter.detach() for parameter in module.parameters()], saved["callbacks"]["AdapterEMA"]

    expected, average = fit(CompilesItself(), 3, "whole")
    fit(CompilesItself(), 2, "parts")
    found, again = fit(resumed(), 3, "parts", tmp_path / "parts" / "last.ckpt")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(again["shadow_params"], average["shadow_params"], rtol=0, atol=0)
