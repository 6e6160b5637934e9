from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from peft import AdaLoraConfig, LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_lora.callbacks import AdapterCheckpoint, FiniteGradients, LoraInjection
from lit_lora.callbacks.finite_gradients import check_trained
from lit_lora.errors import UserError
from lit_lora.memory.optimizer_in_backward import OptimizerInBackward
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from tests.helpers import Classifier, diffusion_module, loader_of, make_batches

NAN = float("nan")


class Product(LightningModule):
    """Each step subtracts the batch's factor from the weight; a factor that is not finite spoils loss and gradient."""

    def __init__(self, optimizer: Any = torch.optim.SGD, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.make = lambda: optimizer([self.weight], **({"lr": 1.0} | options))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return (self.weight * batch["factor"]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.make()
        return optimizer


def batches(*factors: float) -> DataLoader[Any]:
    return loader_of([{"factor": torch.tensor(factor), "key": [f"sample {i}"]} for i, factor in enumerate(factors)])


def fit(
    module: LightningModule, loader: DataLoader[Any], options: dict[str, Any], *callbacks: Any, **more: Any
) -> Trainer:
    trainer = Trainer(**options | {"max_epochs": 1, "max_steps": -1, "callbacks": list(callbacks)} | more)
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_a_bad_step_changes_nothing_and_is_counted(bad: float, trainer_options: dict[str, Any]) -> None:
    guard, module = FiniteGradients(), Product()
    with pytest.warns(UserWarning, match=r"optimizer step 2 is skipped.*loss -?(nan|inf), samples sample 1"):
        trainer = fit(module, batches(0.25, bad, 0.5), trainer_options, guard)
    assert module.weight.tolist() == [0.25, 0.25]
    assert guard.skipped == 1
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    fit(Product(), batches(0.25), trainer_options, guard)
    assert guard.skipped == 0, "a second fit counts its own"


def test_gradients_alone_can_be_bad(trainer_options: dict[str, Any]) -> None:
    class Root(Product):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return (self.weight * batch["factor"]).sqrt().sum()  # infinite slope at 0, finite value

    module = Root()
    with pytest.warns(UserWarning, match=r"step 1 is skipped.*loss 0"):
        fit(module, batches(0.0, 1.0), trainer_options, FiniteGradients())
    assert torch.isfinite(module.weight).all()


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))


@pytest.mark.parametrize(
    ("bad", "options"),
    [
        ([NAN], dict),
        ([NAN, 9.0], lambda: {"accumulate_grad_batches": 2}),
        ([NAN], lambda: {"gradient_clip_val": 0.5}),
        ([NAN], lambda: {"plugins": [scaler()]}),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_is_that_without_its_skipped_steps(
    fused: bool,
    bad: list[float],
    options: Callable[[], dict[str, Any]],
    trainer_options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights with momentum and weight decay, and the optimizer's state; fused as on a GPU, where nothing waits for it."""
    if fused:
        monkeypatch.setattr("lit_lora.skipped_step._is_read", lambda _: False)

    def trained(*factors: float) -> tuple[Tensor, Any]:
        module = Product(torch.optim.AdamW, lr=0.1, weight_decay=0.1, fused=fused)
        trainer = fit(module, batches(*factors), trainer_options, FiniteGradients(), **options())
        return module.weight.detach(), trainer.optimizers[0].state_dict()

    expected = trained(1.0, 3.0, 2.0, 1.0)
    with pytest.warns(UserWarning, match="is skipped"):
        found = trained(1.0, 3.0, *bad, 2.0, 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_one_bad_batch_spoils_the_step_that_it_belongs_to(trainer_options: dict[str, Any]) -> None:
    module = Product()
    with pytest.warns(UserWarning, match=r"step 2 is skipped.*samples sample 2, sample 3"):
        fit(
            module, batches(1.0, 1.0, NAN, 1.0, 1.0, 1.0), trainer_options, FiniteGradients(), accumulate_grad_batches=2
        )
    assert module.weight.tolist() == [-1.0, -1.0]


def test_the_run_ends_when_it_stays_bad(trainer_options: dict[str, Any]) -> None:
    expected = (
        r"not finite in 3 steps in a row, up to step 6, at lr 1; loss nan, samples sample 5.*Checkpoints.*before step 4"
    )
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(UserError, match=expected),
    ):
        fit(Product(), batches(1.0, NAN, 1.0, NAN, NAN, NAN, 1.0), trainer_options, FiniteGradients(patience=3))


def test_a_run_cannot_end_well_on_a_bad_step(trainer_options: dict[str, Any]) -> None:
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(UserError, match="in the last 2 steps of the run"),
    ):
        fit(Product(), batches(1.0, NAN, NAN), trainer_options, FiniteGradients())


def test_the_error_names_frozen_weights_that_are_bad(trainer_options: dict[str, Any]) -> None:
    class Scaled(Product):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(NAN))

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.scale

    with pytest.raises(
        UserError, match="replace the base's files: 1 frozen tensors hold NaN or Inf, the first is scale"
    ):
        fit(Scaled(), batches(1.0), trainer_options, FiniteGradients(patience=1))


def test_the_error_names_trained_weights_that_are_bad(trainer_options: dict[str, Any]) -> None:
    module = Product()
    module.weight.data[1] = NAN
    with pytest.raises(
        UserError, match="resume from an earlier checkpoint: 1 trained tensors hold NaN or Inf, such as weight"
    ):
        fit(module, batches(1.0), trainer_options, FiniteGradients(patience=1))


def test_checkpoints_are_of_good_steps_only(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    checkpoints = AdapterCheckpoint(tmp_path, every_n_train_steps=1, save_last=True, enable_version_counter=False)
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(UserError, match="training has diverged"):
        fit(
            Product(),
            batches(1.0, 1.0, NAN, NAN, NAN),
            trainer_options | {"enable_checkpointing": True},
            checkpoints,
            FiniteGradients(patience=3),
        )
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=0-step=2.ckpt", "last.ckpt"]
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert last["state_dict"]["weight"].tolist() == [-1.0, -1.0]


def test_a_checkpoint_that_is_due_at_a_bad_step_comes_with_the_next(
    trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    checkpoints = AdapterCheckpoint(tmp_path, every_n_train_steps=2, save_last=True, enable_version_counter=False)
    with pytest.warns(UserWarning, match="step 2 is skipped"):
        fit(
            Product(),
            batches(1.0, NAN, 1.0),
            trainer_options | {"enable_checkpointing": True},
            checkpoints,
            FiniteGradients(),
        )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("of_gradients", [False, True])
def test_steps_in_the_backward_pass(
    of_gradients: bool, sd_folder: Path, trainer_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = make_batches(2)
    # Steps are taken within the pass, as with many parameters.
    monkeypatch.setattr("lit_lora.module.OptimizerInBackward", partial(OptimizerInBackward, bucket_bytes=1))
    if of_gradients:  # the loss stays finite

        class Spoilt(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, loss: Tensor) -> Tensor:
                return loss.clone()

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> Any:
                return gradients[0] * NAN

        step = LoraDiffusion.training_step

        def spoilt(module: LoraDiffusion, batch: dict[str, Any], batch_idx: int) -> Tensor:
            loss = step(module, batch, batch_idx)
            return Spoilt.apply(loss) if batch["key"] == bad["key"] else loss  # type: ignore[no-any-return, no-untyped-call]

        bad["key"] = ["bad"] * len(bad["key"])
        monkeypatch.setattr(LoraDiffusion, "training_step", spoilt)
    else:
        bad["pixel_values"] = torch.full_like(bad["pixel_values"], NAN, dtype=torch.float32)

    def trained(*given: dict[str, Any]) -> list[Tensor]:
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"])
        module = diffusion_module(sd_folder, config, memory=MemoryOptions(optimizer_in_backward=True))
        fit(module, loader_of(list(given)), trainer_options, FiniteGradients())
        return [parameter.detach() for parameter in module.parameters() if parameter.requires_grad]

    with pytest.warns(UserWarning, match="step 2 is skipped"):
        found = trained(good, bad, good)
    torch.testing.assert_close(found, trained(good, good), rtol=0, atol=0)


def test_what_reads_gradients_after_a_skipped_step(trainer_options: dict[str, Any]) -> None:
    """AdaLoRA's schedule goes on, and LoraInjection does not take the layers for unused ones."""
    options = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8}
    module = Classifier()
    injection = LoraInjection(AdaLoraConfig(**options, target_modules=["3"]))
    first, bad, *later = make_batches(8)
    bad["pixel_values"] = bad["pixel_values"].float() + NAN
    with pytest.warns(UserWarning, match="is skipped") as warned:
        fit(module, loader_of([bad, first, bad, *later]), trainer_options, FiniteGradients(), injection, max_steps=8)
    assert not [str(warning.message) for warning in warned if "have no gradient" in str(warning.message)]
    assert sum(int((p != 0).sum()) for name, p in module.named_parameters() if "lora_E" in name) == 2


def test_skipped_steps_are_counted_on_in_a_resumed_run(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def run(*factors: float, **more: Any) -> FiniteGradients:
        guard, saving = FiniteGradients(), AdapterCheckpoint(tmp_path, save_last=True, save_top_k=0)
        options = trainer_options | {"enable_checkpointing": True, "max_steps": more.pop("steps")}
        with pytest.warns(UserWarning, match="is skipped"):
            Trainer(**options, callbacks=[guard, saving]).fit(Product(), batches(*factors), **more)
        return guard

    assert run(NAN, NAN, 1.0, steps=3).skipped == 2
    assert run(NAN, 1.0, 1.0, 1.0, 1.0, steps=5, ckpt_path=tmp_path / "last.ckpt").skipped == 3


def test_patience_has_a_bound() -> None:
    with pytest.raises(UserError, match="patience=0 is too small"):
        FiniteGradients(patience=0)


def test_the_padding_of_a_shard_may_hold_anything(trainer_options: dict[str, Any]) -> None:
    """DeepSpeed's ZeRO-3 pads the last shard of a parameter, and does not initialize the padding."""
    module = Product()
    trainer = fit(module, batches(0.25), trainer_options)
    sharded: Any = module.weight
    sharded.ds_numel, sharded.ds_tensor = 2, torch.tensor([1.0, 2.0, NAN])
    check_trained(trainer)
    sharded.ds_tensor = torch.tensor([1.0, NAN, NAN])
    with pytest.raises(UserError, match="1 tensors of weights or optimizer state hold NaN or Inf, the first is weight"):
        check_trained(trainer)
