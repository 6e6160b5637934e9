"""The optimizer's step inside the backward pass: the same training, few gradients at once, and what cannot be so."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from peft import AdaLoraConfig, LoraConfig
from torch import Tensor, nn

from lit_lora.embedded import base_path
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.memory.optimizer_in_backward import OptimizerInBackward, check_optimizer_in_backward
from lit_lora.module import LoraDiffusion
from tests.helpers import loader_of, make_batches

Make = Callable[[Any], torch.optim.Optimizer]


def _adamw_8bit(parameters: Any) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=16)
    return optimizer


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "AdamW8bit": _adamw_8bit,
}


def make_model() -> nn.Module:
    torch.manual_seed(3)
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), shared, nn.Tanh(), shared, nn.LayerNorm(8), nn.Linear(8, 2))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: matrices, and vectors without weight decay."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim == 2]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def train(
    make: Make, bucket_bytes: int | None, clip_value: float = 0.0, steps: int = 4
) -> tuple[list[Tensor], dict[str, Any], int]:
    """Parameters and state at the end, and how many gradients there were at once."""
    model = make_model()
    optimizer = make(groups(model))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    if bucket_bytes is not None:
        OptimizerInBackward(optimizer, clip_value, bucket_bytes)
    most = 0
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: count())
    generator = torch.Generator().manual_seed(7)

    def count() -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    for _ in range(steps):

        def closure() -> Tensor:
            loss: Tensor = model(torch.randn(3, 4, generator=generator)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            if clip_value and bucket_bytes is None:
                torch.nn.utils.clip_grad_value_(model.parameters(), clip_value)
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        schedule.step()
    return [p.detach() for p in model.parameters()], optimizer.state_dict(), most


def assert_same(mine: Any, theirs: Any) -> None:
    assert type(mine) is type(theirs)
    if isinstance(mine, Tensor):
        assert torch.equal(mine, theirs)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_same(mine[key], theirs[key])
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
    else:
        assert mine == theirs


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_parameters_and_state(name: str, bucket_bytes: int) -> None:
    expected, expected_state, _ = train(OPTIMIZERS[name], None)
    parameters, state, most = train(OPTIMIZERS[name], bucket_bytes)
    assert_same(parameters, expected)
    assert_same(state, expected_state)
    if bucket_bytes == 1:
        assert most == 0  # counted after the step of the one gradient that there was
    else:
        assert most > 0


@pytest.mark.parametrize("bucket_bytes", [1, 100])
def test_clipping_by_value(bucket_bytes: int) -> None:
    expected = train(OPTIMIZERS["SGD"], None, clip_value=0.05)[0]
    assert_same(train(OPTIMIZERS["SGD"], bucket_bytes, clip_value=0.05)[0], expected)
    assert not torch.equal(expected[0], train(OPTIMIZERS["SGD"], None)[0][0])


def test_no_gradient_stays_after_a_step() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    OptimizerInBackward(optimizer, bucket_bytes=200)
    model(torch.randn(3, 4)).sum().backward()
    assert 0 < sum(p.grad is not None for p in model.parameters()) < 8
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


def test_a_state_that_is_loaded_goes_on() -> None:
    def trained(in_backward: bool) -> list[Tensor]:
        model = make_model()
        optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
        if in_backward:
            OptimizerInBackward(optimizer, bucket_bytes=1)
        for step in range(4):
            if step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                state["param_groups"][0]["lr"] = 0.3
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model(torch.full((3, 4), float(step))).sum().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert_same(trained(True), trained(False))


def test_the_hooks_can_be_removed() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    OptimizerInBackward(optimizer, bucket_bytes=1).remove()
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(3, 4)).sum().backward()
    assert_same([p.detach() for p in model.parameters()], before)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_gradient_changes_nothing(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused:  # as on a GPU, where the host does not wait for the decision
        monkeypatch.setattr("lit_lora.skipped_step._is_read", lambda _: False)

    def trained(*factors: float) -> tuple[list[Tensor], Any, list[bool]]:
        model = make_model()
        optimizer = torch.optim.AdamW(groups(model), lr=1e-2, fused=fused)
        in_backward, bad = OptimizerInBackward(optimizer, bucket_bytes=1), []
        for factor in factors:
            (model(torch.ones(3, 4)).sum() * factor).backward()
            bad.append(bool(in_backward.take_non_finite()))
        return [p.detach() for p in model.parameters()], optimizer.state_dict(), bad

    *found, bad = trained(1.0, float("nan"), 2.0)
    assert bad == [False, True, False]
    assert_same(found, list(trained(1.0, 2.0)[:2]))


class CountsTogether(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad)


def test_optimizers_that_need_all_parameters_at_once() -> None:
    model = make_model()
    with pytest.raises(UserError, match="LBFGS computes the gradients itself"):
        OptimizerInBackward(torch.optim.LBFGS(model.parameters()))
    optimizer = CountsTogether(model.parameters(), {})
    OptimizerInBackward(optimizer, bucket_bytes=1)
    (model(torch.randn(3, 4)).sum() * float("nan")).backward()  # a skipped step counts nothing
    assert "k" not in optimizer.param_groups[0]
    with pytest.raises(UserError, match="CountsTogether keeps k for all parameters together"):
        model(torch.randn(3, 4)).sum().backward()
    assert len(optimizer.param_groups[0]["params"]) == 8


def test_the_gradients_themselves_are_freed() -> None:
    """Not only the references of the parameters."""
    model = make_model()
    alive: set[int] = set()
    counts = []

    def watch(parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        alive.add(storage._cdata)
        weakref.finalize(storage, alive.discard, storage._cdata)
        counts.append(len(alive))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(watch)
    OptimizerInBackward(torch.optim.AdamW(model.parameters()), bucket_bytes=1)
    model(torch.randn(3, 4)).sum().backward()
    gc.collect()
    assert counts == [1] * 8
    assert not alive


class InBackward(LoraDiffusion):
    """What the module does with ``optimizer_in_backward``."""

    def on_fit_start(self) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        self.in_backward = OptimizerInBackward(optimizer, float(self.trainer.gradient_clip_val or 0), bucket_bytes=1)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Done in the backward pass."""

    def on_fit_end(self) -> None:
        self.in_backward.remove()


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []
        self.gradients: list[int] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients.append(sum(p.grad is not None for p in pl_module.parameters()))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(
    kind: type[LoraDiffusion], options: dict[str, Any], steps: int, ckpt_path: Path | None = None
) -> tuple[LoraDiffusion, Rates]:
    torch.manual_seed(0)
    module = kind(
        StableDiffusion(str(base_path())),
        LoraConfig(r=2, lora_alpha=2),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
    )
    rates = Rates()
    options = options | {"max_steps": steps, "callbacks": [rates, *options.get("callbacks", [])]}
    trainer = Trainer(**options)
    trainer.fit(module, loader_of(make_batches(6)), ckpt_path=ckpt_path)
    assert trainer.global_step == steps
    return module, rates


def trained_values(module: nn.Module) -> list[Tensor]:
    return [p.detach() for p in module.parameters() if p.requires_grad]


def test_a_run_is_the_same(trainer_options: dict[str, Any]) -> None:
    options = trainer_options | {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}
    plain, plain_rates = fit(LoraDiffusion, options, 3)
    in_backward, rates = fit(InBackward, options, 3)
    assert_same(trained_values(in_backward), trained_values(plain))
    assert rates.rates == plain_rates.rates
    assert len(set(rates.rates)) == 3
    assert set(rates.gradients) == {0}
    assert set(plain_rates.gradients) == {len(trained_values(plain))}


def test_a_resumed_run_is_the_same(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    options = trainer_options | {"enable_checkpointing": True}
    saved, saved_rates = fit(InBackward, options | {"callbacks": [_saving(tmp_path)]}, 2)
    results = []
    for kind in (LoraDiffusion, InBackward):
        resumed, rates = fit(kind, options | {"callbacks": [_saving(tmp_path)]}, 4, tmp_path / "step=2.ckpt")
        results.append((trained_values(resumed), rates.rates, resumed.trainer.optimizers[0].state_dict()))
    assert_same(*results)
    assert results[0][1][0] > saved_rates.rates[-1]
    assert not torch.equal(results[0][0][1], trained_values(saved)[1])


def _saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 1.0}, r"gradient_clip_val=1.0 clips by the norm .* gradient_clip_algorithm to 'value'"),
        ({"gradient_clip_val": 1, "gradient_clip_algorithm": "norm"}, "gradient_clip_val=1 clips by the norm"),
        ({"accumulate_grad_batches": 4}, "accumulate over 4 batches; set accumulate_grad_batches to 1"),
        ({"callbacks": [GradientAccumulationScheduler({2: 8})]}, "accumulate over 8 batches"),
        ({"devices": 2, "strategy": "ddp"}, "2 processes average their gradients .* set devices to 1"),
    ],
)
def test_runs_that_need_all_gradients_at_once(
    options: dict[str, Any], message: str, trainer_options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        check_optimizer_in_backward(Trainer(**trainer_options | options))


def test_scaled_losses_and_adalora_are_refused(
    trainer_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(**trainer_options)
    with pytest.raises(UserError, match=r"AdaLoraConfig reads all gradients .* use peft.LoraConfig"):
        check_optimizer_in_backward(trainer, AdaLoraConfig(total_step=10))
    monkeypatch.setattr(type(trainer), "precision", "16-mixed")  # which a CPU does not do
    with pytest.raises(UserError, match=r"precision 16-mixed .* model.base_dtype to 'bfloat16'"):
        check_optimizer_in_backward(trainer)


def test_runs_that_do_without(trainer_options: dict[str, Any]) -> None:
    options = trainer_options | {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
    check_optimizer_in_backward(Trainer(**options), LoraConfig())
    check_optimizer_in_backward(Trainer(**trainer_options))
