from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from peft import AdaLoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_lora.callbacks import AdapterCheckpoint, FiniteGradients
from lit_lora.callbacks.finite_gradients import check_trained
from lit_lora.errors import UserError
from lit_lora.finite import zero_where
from lit_lora.memory.options import MemoryOptions
from lit_lora.module import LoraDiffusion
from tests.helpers import diffusion_module, loader_of, make_batches

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


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """All tensors are equal, bit for bit."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


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


def test_gradients_alone_can_be_bad(trainer_options: dict[str, Any]) -> None:
    class Root(Product):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return (self.weight * batch["factor"]).sqrt().sum()  # infinite slope at 0, finite value

    module = Root()
    with pytest.warns(UserWarning, match=r"step 1 is skipped.*loss 0"):
        fit(module, batches(0.0, 1.0), trainer_options, FiniteGradients())
    assert torch.isfinite(module.weight).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.5}),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.5}),
        (torch.optim.Adagrad, {"weight_decay": 0.5}),
    ],
)
def test_a_skipped_step_leaves_weights_and_state_as_they_are(
    kind: Any, options: dict[str, Any], fused: bool, trainer_options: dict[str, Any]
) -> None:
    """By removed gradients, and in fused optimizers as under GradScaler, the way of GPUs."""

    def trained(*factors: float) -> dict[str, Any]:
        module = Product(kind, **options | {"lr": 0.1, "fused": fused})
        trainer = fit(module, batches(*factors), trainer_options, FiniteGradients())
        assert not hasattr(trainer.optimizers[0], "found_inf")
        return {"weight": module.weight.detach()} | trainer.optimizers[0].state[module.weight]

    expected = trained(1.0, 2.0)
    with pytest.warns(UserWarning, match="step 2 is skipped"):
        assert_equal(trained(1.0, NAN, 2.0), expected)


def test_without_a_way_to_leave_it_out_a_step_keeps_the_state_finite(
    trainer_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the host does not know of it."""
    monkeypatch.setattr("lit_lora.callbacks.finite_gradients.leave_out_where", _zero_gradients)
    module = Product(torch.optim.AdamW, lr=0.1)
    with pytest.warns(UserWarning, match="step 2 is skipped"):
        trainer = fit(module, batches(1.0, NAN, 1.0), trainer_options, FiniteGradients())
    state = trainer.optimizers[0].state[module.weight]
    assert all(torch.isfinite(value).all() for value in state.values())


def _zero_gradients(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    zero_where(bad, [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])


def test_importance_in_adalora_survives_a_skipped_step(sd_folder: Path, trainer_options: dict[str, Any]) -> None:
    adapter = AdaLoraConfig(init_r=3, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=4, target_modules=["to_q"])
    module = diffusion_module(sd_folder, adapter)
    good, bad = make_batches(2)
    bad["pixel_values"] = torch.full_like(bad["pixel_values"], NAN, dtype=torch.float32)
    with pytest.warns(UserWarning, match="step 2 is skipped"):
        fit(module, loader_of([good, bad, good, good]), trainer_options, FiniteGradients())
    allocator: Any = module.family.denoiser.base_model.rankallocator
    assert all(torch.isfinite(value).all() for value in allocator.exp_avg_ipt.values())


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


def test_steps_in_the_backward_pass(sd_module: LoraDiffusion, trainer_options: dict[str, Any]) -> None:
    sd_module.memory = MemoryOptions(optimizer_in_backward=True)
    good, bad = make_batches(2)
    bad["pixel_values"] = torch.full_like(bad["pixel_values"], NAN, dtype=torch.float32)
    guard = FiniteGradients()
    with pytest.warns(UserWarning, match="step 2 is skipped"):
        fit(sd_module, loader_of([good, bad, good]), trainer_options, guard)
    assert guard.skipped == 1
    assert all(torch.isfinite(p).all() for p in sd_module.parameters() if p.requires_grad)


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
