from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import schedulefree
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_lora.callbacks import AdapterEMA, ScheduleFree
from lit_lora.errors import UserError
from lit_lora.module import LoraDiffusion
from tests.helpers import loader_of, make_batches


class Counting(LightningModule):
    """Its only trainable weight is 1, 2, 3, … after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return -self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=1.0)


class Drawing(Counting):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return batch


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_follows_the_formula(accumulate: int, trainer_options: dict[str, Any]) -> None:
    ema, module = AdapterEMA(decay=0.5), Counting()
    batches = loader_of([torch.zeros(1)] * 4 * accumulate)  # type: ignore[list-item]
    options = trainer_options | {"max_steps": 4, "accumulate_grad_batches": accumulate}
    Trainer(callbacks=[ema], **options).fit(module, batches)
    average = 0.0
    for step in range(1, 5):
        decay = 0.0 if step == 1 else min(0.5, step / (9 + step))
        average = decay * average + (1 - decay) * step
    with ema.averaged(module):
        assert module.weight.item() == pytest.approx(average)
    assert module.weight.item() == 4


class Asking(Callback):
    """Asks for the average after each step, as SampleImages does."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module, None, None, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ema = AdapterEMA.of(trainer)
        assert ema is not None
        with ema.averaged(pl_module):
            self.seen.append(cast(Counting, pl_module).weight.item())


def test_callbacks_before_and_after_get_the_average_of_the_same_step(trainer_options: dict[str, Any]) -> None:
    before, ema, after = Asking(), AdapterEMA(decay=0.5), Asking()
    batches = loader_of([torch.zeros(1)] * 4)  # type: ignore[list-item]
    for _ in range(2):  # the second run begins anew
        Trainer(callbacks=[before, ema, after], **trainer_options | {"max_steps": 4}).fit(Counting(), batches)
    assert before.seen == after.seen
    assert before.seen[5:] == before.seen[:5]
    assert before.seen[:2] == [0.0, 1.0]


def test_the_average_is_restored_when_a_finished_run_continues(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    ema, batches = AdapterEMA(decay=0.5), loader_of([torch.zeros(1)] * 4)  # type: ignore[list-item]
    options = trainer_options | {"max_steps": 4}
    trainer = Trainer(callbacks=[ema], **options)
    trainer.fit(Counting(), batches)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    again = AdapterEMA(decay=0.5)
    Trainer(callbacks=[again], **options).fit(Counting(), batches, ckpt_path=tmp_path / "done.ckpt")
    assert torch.equal(again.state_dict()["shadow_params"], ema.state_dict()["shadow_params"])


def test_validation_with_and_without(sd_module: LoraDiffusion, trainer_options: dict[str, Any]) -> None:
    options = trainer_options | {"max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}
    sd_module.optimizer = lambda p: torch.optim.SGD(p, lr=10.0)
    trainer = Trainer(callbacks=[AdapterEMA()], **options)
    batches = loader_of(make_batches(2))
    trainer.fit(sd_module, batches, batches)
    assert trainer.callback_metrics["val/loss"] != trainer.callback_metrics["val/loss_ema"]


def test_what_does_not_use_the_average_says_so(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    batches = loader_of([torch.zeros(1)] * 2)  # type: ignore[list-item]
    trainer = Trainer(callbacks=[AdapterEMA()], **trainer_options | {"max_steps": 1})
    trainer.fit(Counting(), batches)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    trainer = Trainer(callbacks=[AdapterEMA()], **trainer_options)
    with pytest.warns(UserWarning, match="AdapterEMA: predict uses the weights of the last step, not their average"):
        trainer.predict(Drawing(), batches, ckpt_path=tmp_path / "done.ckpt")
    trainer = Trainer(callbacks=[AdapterEMA()], **trainer_options)
    with pytest.warns(UserWarning, match="AdapterEMA: validate uses the weights of the last step, not their average"):
        trainer.validate(Drawing(), batches, ckpt_path=tmp_path / "done.ckpt", verbose=False)


def test_a_checkpoint_is_not_validated_with_the_average_of_another_step(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    batches = loader_of(make_batches(2))
    trainer = Trainer(callbacks=[AdapterEMA()], **trainer_options | {"max_steps": 1})
    trainer.fit(sd_module, batches, batches)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    assert "val/loss_ema" in trainer.validate(sd_module, batches, verbose=False)[0]
    with pytest.warns(UserWarning, match="AdapterEMA: validate uses the weights of the last step, not their average"):
        found = trainer.validate(sd_module, batches, ckpt_path=tmp_path / "first.ckpt", verbose=False)[0]
    assert "val/loss" in found
    assert "val/loss_ema" not in found
    with pytest.warns(UserWarning, match="AdapterEMA: test uses the weights of the last step, not their average"):
        trainer.test(sd_module, batches, verbose=False)


def test_schedule_free_weights_are_an_average_already(trainer_options: dict[str, Any]) -> None:
    module = Counting()
    optimizer: Any = schedulefree.SGDScheduleFree(module.parameters(), lr=0.1)
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    trainer = Trainer(callbacks=[ScheduleFree(), AdapterEMA()], **trainer_options | {"max_steps": 1})
    with pytest.warns(
        UserWarning, match="not those that it has learned, which are an average already; remove AdapterEMA"
    ):
        trainer.fit(module, loader_of([torch.zeros(1)]))  # type: ignore[list-item]


def test_decay_out_of_range() -> None:
    with pytest.raises(UserError, match=r"decay must be in \[0, 1\), not 1.0"):
        AdapterEMA(1.0)


def test_only_trainable_parameters_are_copied(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    ema = AdapterEMA()
    Trainer(callbacks=[ema], **trainer_options | {"max_steps": 1}).fit(Counting(), loader_of([torch.zeros(1)]))  # type: ignore[list-item]
    assert ema.state_dict()["shadow_params"].numel() == 1


class UnfreezesLater(LightningModule):
    """Its second parameter is in the optimizer from the start, and trained from the third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
        self.second.requires_grad_(False)
        self.values: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            self.second.requires_grad_(True)
        return self.first.sum() + self.second.sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.values.append(self.second.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.first, self.second], lr=1.0)


def test_parameters_of_the_optimizer_that_are_unfrozen_later(trainer_options: dict[str, Any]) -> None:
    module, ema = UnfreezesLater(), AdapterEMA(0.5)
    trainer = Trainer(callbacks=[ema], **trainer_options | {"max_steps": 5})
    trainer.fit(module, loader_of([torch.zeros(1)] * 5))  # type: ignore[list-item]
    # It is averaged from the step on after which it is first seen to be trained.
    average = module.values[2]
    for number, value in enumerate(module.values[2:], 3):
        decay = min(0.5, number / (9 + number))
        average = decay * average + (1 - decay) * value
    with ema.averaged(module):
        assert torch.allclose(module.second, average)
        assert not torch.equal(module.second, module.values[-1])
    assert torch.equal(module.second, module.values[-1])
