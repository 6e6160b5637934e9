"""Learning rate schedules as they would be in an uninterrupted run, for runs that are resumed with other settings."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_lora.errors import UserError

OF_THE_SCHEDULE = ("initial_lr", "initial_momentum", "max_lr", "min_lr", "max_momentum", "base_momentum")
"""Entries of a parameter group that a schedule makes."""


class ReplayedSchedule:
    """A copy of a schedule before its first step, over an optimizer of the same settings that trains nothing.

    Args:
        schedule: Schedule as a run's config makes it, which depends on nothing but its settings and its steps.
    """

    @classmethod
    def of(cls, schedule: Any) -> ReplayedSchedule | str:
        """The copy of a schedule, or why there is none: its rates depend on more than settings and steps, or copying fails."""
        if other := _depends_on(schedule):
            return f"its learning rates may depend on {other}"
        try:
            return cls(schedule)
        except Exception as error:  # what a schedule of one's own holds may be anything
            return f"it cannot be copied ({type(error).__name__}: {error})"

    def __init__(self, schedule: Any) -> None:
        groups = [
            {name: copy.copy(value) for name, value in group.items() if name != "param_names"}
            | {"params": [nn.Parameter(torch.zeros(1))]}
            for group in schedule.optimizer.param_groups
        ]
        self._optimizer = Optimizer(groups, {})
        shared: dict[int, Any] = {id(schedule.optimizer): self._optimizer}
        # A copy of a module's method would copy the module.
        functions = [function for one in _parts(schedule) for function in getattr(one, "lr_lambdas", ())]
        shared |= {id(function): function for function in functions if isinstance(function, MethodType | partial)}
        self._schedule = copy.deepcopy(schedule, shared)

    def hand_over(self, schedule: Any) -> None:
        """Give a resumed schedule and its optimizer the state of this one after as many steps.

        Parameter groups that were added later, as by Lightning's BackboneFinetuning, come last and stay as they are.

        Args:
            schedule: Schedule after its checkpoint was restored.

        Raises:
            UserError: If the schedule ends before that step.
        """
        steps = next(one.last_epoch for one in _parts(schedule) if hasattr(one, "last_epoch"))  # a chain has none
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps
            for _ in range(steps):
                try:
                    self._schedule.step()
                except ValueError as error:
                    raise UserError(
                        f"{type(schedule).__name__} of this run ends before step {steps} of the checkpoint: {error}; give it "
                        f"more steps"
                    ) from error
        schedule.load_state_dict(copy.deepcopy(self._schedule.state_dict()))
        groups = schedule.optimizer.param_groups
        for group, own in zip(groups, self._optimizer.param_groups, strict=False):
            for name in own.keys() & {"lr", *OF_THE_SCHEDULE, *cycled(own)}:
                if isinstance(group.get(name), Tensor):
                    group[name].fill_(own[name])
                else:
                    group[name] = own[name]
        for one in _parts(schedule):
            one._last_lr = [group["lr"] for group in groups]


def _depends_on(schedule: Any) -> str:
    """What the rates of a schedule may depend on beside its settings and its steps; empty if nothing."""
    for one in _parts(schedule):
        if isinstance(one, ReduceLROnPlateau):
            return "what it has measured"
        if not isinstance(one, LRScheduler):
            return f"what {type(one).__name__}, no schedule of torch, has seen"
        if module := next((name for name, value in vars(one).items() if isinstance(value, nn.Module)), None):
            return f"the module that it keeps as {module}"
    return ""


def cycled(group: dict[str, Any]) -> tuple[str, ...]:
    """Settings of a parameter group that OneCycleLR and CyclicLR change at each step."""
    return ("momentum", "betas") if "max_momentum" in group else ()


def _parts(schedule: Any) -> list[Any]:
    """A schedule, and those inside."""
    return [schedule, *(part for inner in getattr(schedule, "_schedulers", ()) for part in _parts(inner))]
