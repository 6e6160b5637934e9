"""Resumed with other constants, a schedule gives the learning rates of an uninterrupted run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_lora.errors import UserError
from lit_lora.replayed_schedule import ReplayedSchedule
from tests.test_optimizer_settings import Line, adamw, run

pytestmark = pytest.mark.filterwarnings("ignore:.*ended before the epoch ended")


def longer_warm_up(steps: int) -> Callable[..., Any]:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        schedules = torch.optim.lr_scheduler
        parts = [schedules.LinearLR(optimizer, 0.1, total_iters=steps), schedules.CosineAnnealingLR(optimizer, 12)]
        return schedules.SequentialLR(optimizer, parts, milestones=[steps])

    return make


class Warmup:
    """A function of LambdaLR whose constants are in its checkpoints."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)


def of_torch(name: str, **options: Any) -> Callable[..., Any]:
    return lambda optimizer: getattr(torch.optim.lr_scheduler, name)(optimizer, **options)


def one_cycle(steps: int, highest: float = 0.4) -> Callable[..., Any]:
    return of_torch("OneCycleLR", max_lr=highest, total_steps=steps)


def restarts(first: int) -> Callable[..., Any]:
    return of_torch("CosineAnnealingWarmRestarts", T_0=first, T_mult=2, eta_min=0.01)


def sequence(first: Callable[..., Any], then: Callable[..., Any], milestone: int = 2) -> Callable[..., Any]:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        parts = [first(optimizer), then(optimizer)]
        return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [milestone])

    return make


def chained(*parts: Callable[..., Any]) -> Callable[..., Any]:
    return lambda optimizer: torch.optim.lr_scheduler.ChainedScheduler([part(optimizer) for part in parts], optimizer)


FLAT = of_torch("ConstantLR", factor=0.5, total_iters=3)
CHANGED = {
    "milestones later": (longer_warm_up(2), longer_warm_up(8)),
    "milestones earlier": (longer_warm_up(8), longer_warm_up(2)),
    "LambdaLR": (of_torch("LambdaLR", lr_lambda=Warmup(9)), of_torch("LambdaLR", lr_lambda=Warmup(4))),
    "LambdaLR of functions": (
        of_torch("LambdaLR", lr_lambda=lambda step: 0.9**step),
        of_torch("LambdaLR", lr_lambda=lambda step: 0.7**step),
    ),
    "MultiplicativeLR": (
        of_torch("MultiplicativeLR", lr_lambda=lambda _: 0.9),
        of_torch("MultiplicativeLR", lr_lambda=lambda _: 0.7),
    ),
    "OneCycleLR longer": (one_cycle(8), one_cycle(12)),
    "OneCycleLR higher": (one_cycle(12), one_cycle(12, 0.8)),
    "CyclicLR": tuple(
        of_torch("CyclicLR", base_lr=0.1, max_lr=0.4, step_size_up=size, cycle_momentum=False) for size in (2, 3)
    ),
    "warm restarts": (restarts(2), restarts(3)),
    "warm restarts in a sequence": (sequence(FLAT, restarts(2)), sequence(FLAT, restarts(3))),
    "a chain with eta_min": (
        chained(FLAT, of_torch("CosineAnnealingLR", T_max=4, eta_min=0.01)),
        chained(FLAT, of_torch("CosineAnnealingLR", T_max=8, eta_min=0.01)),
    ),
    "warm restarts in a chain": (chained(FLAT, restarts(2)), chained(FLAT, restarts(3))),
}


def resumed(folder: Path, options: dict[str, Any], before: Any, now: Any, steps: int, keep: bool = False) -> Line:
    run(folder, options, Line(adamw(0.1), before), steps)
    module = Line(adamw(0.1), now)
    return run(folder, options, module, 8, resume=folder / "last.ckpt", keep_optimizer_settings=keep)


@pytest.mark.parametrize("name", CHANGED)
def test_other_constants_give_the_rates_of_an_uninterrupted_run(
    name: str, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    before, now = CHANGED[name]
    module = resumed(tmp_path, trainer_options, before, now, 5)
    whole = run(tmp_path / "whole", trainer_options, Line(adamw(0.1), now), 8)
    assert module.rates == pytest.approx(whole.rates[5:])
    (ours, first), (theirs, second) = (
        (one.trainer.optimizers[0].param_groups[0], one.trainer.lr_scheduler_configs[0].scheduler)
        for one in (module, whole)
    )
    assert ours["betas"] == pytest.approx(theirs["betas"])  # OneCycleLR changes them too
    assert first.get_last_lr() == pytest.approx(second.get_last_lr())


@pytest.mark.parametrize("name", ["OneCycleLR longer", "warm restarts in a sequence", "warm restarts in a chain"])
def test_the_same_constants_say_nothing_in_the_middle_of_a_schedule(
    name: str, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    schedule, _ = CHANGED[name]
    module = resumed(tmp_path, trainer_options, schedule, schedule, 3, keep=True)  # a warning would be an error
    whole = run(tmp_path / "whole", trainer_options, Line(adamw(0.1), schedule), 8)
    assert module.rates == whole.rates[3:]


def test_another_shape_of_one_cycle_is_said(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    now = of_torch("OneCycleLR", max_lr=0.4, total_steps=8, pct_start=0.5)
    with pytest.warns(UserWarning, match=r"ends of phases \[1\.4.*, 7.*\] in the checkpoint, \[3\.0, 7\] here"):
        resumed(tmp_path, trainer_options, one_cycle(8), now, 3, keep=True)


def test_a_schedule_that_ends_before_the_checkpoint_is_refused(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"OneCycleLR of this run ends before step 5 of the checkpoint: .*give it more"):
        resumed(tmp_path, trainer_options, one_cycle(8), one_cycle(3), 5)


class Factors(nn.Module):
    """A module whose method is a function of LambdaLR; a copy of it would be one of the base."""

    def factor(self, step: int, base: float) -> float:
        return base**step

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the module was copied")


def test_the_module_of_a_method_is_not_copied() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    replayed = ReplayedSchedule.of(torch.optim.lr_scheduler.LambdaLR(optimizer, partial(Factors().factor, base=0.5)))
    assert isinstance(replayed, ReplayedSchedule)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    schedule.last_epoch = 3
    replayed.hand_over(schedule)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_a_schedule_that_cannot_be_copied_is_not_replayed() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, 4)
    schedule.lock = threading.Lock()
    assert ReplayedSchedule.of(schedule) == "it cannot be copied (TypeError: cannot pickle '_thread.lock' object)"


def test_the_beta_that_no_schedule_changes_is_said(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    optimizers = [adamw(0.1, betas=(0.9, beta)) for beta in (0.999, 0.9)]
    run(tmp_path, trainer_options, Line(optimizers[0], one_cycle(8)), 2)
    with pytest.warns(UserWarning, match=r"betas\[1\] 0.999 in the checkpoint, 0.9 here"):
        run(tmp_path, trainer_options, Line(optimizers[1], one_cycle(8)), 4, resume=tmp_path / "last.ckpt")


class OfModule(torch.optim.lr_scheduler.ExponentialLR):
    """A schedule that may depend on more than its steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module, gamma: float) -> None:
        self.module = module
        super().__init__(optimizer, gamma)

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "module"}


def test_a_schedule_that_cannot_be_replayed_says_so(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    before, now = (lambda made, gamma=gamma: OfModule(made, nn.Identity(), gamma) for gamma in (0.5, 0.9))
    with pytest.warns(
        UserWarning,
        match=r"lr_scheduler 0: gamma applies from the next step on, which OfModule computes .*, since its learning "
        "rates may depend on the module that it keeps as module",
    ):
        module = resumed(tmp_path, trainer_options, before, now, 2)
    assert module.rates == pytest.approx([0.025 * 0.9**step for step in range(6)])


def test_a_group_that_was_added_after_the_schedule_keeps_its_lr() -> None:
    """As Lightning's BackboneFinetuning adds them."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    replayed = ReplayedSchedule(torch.optim.lr_scheduler.StepLR(optimizer, 4))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.3})
    schedule.last_epoch, optimizer.param_groups[0]["lr"] = 3, 0.1
    replayed.hand_over(schedule)
    assert [group["lr"] for group in optimizer.param_groups] == schedule.get_last_lr() == [1.0, 0.3]
    assert schedule.step_size == 4
