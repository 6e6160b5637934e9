"""Optimizer settings of their own for some of the trained parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, PolynomialLR, ReduceLROnPlateau

from lit_lora.adapters.inject import ADAPTER_NAME
from lit_lora.argument_types import check_types
from lit_lora.errors import UserError, check_least

_WRAPPERS = re.compile(rf"^family\.|base_model\.model\.|\.{ADAPTER_NAME}(?=\.|$)")
"""What :class:`~lit_lora.LoraDiffusion` and PEFT put into the names of parameters."""


_ONE_RATE = ("prodigyopt", "dadaptation")
"""Packages of optimizers that stop in their first step if groups have other learning rates than each other's."""


@dataclass(frozen=True)
class ParameterGroup:
    """Learning rate and weight decay of the trained parameters whose names match a pattern.

    Names are those of the model, such as ``denoiser.up_blocks.1.attentions.0.proj_in.lora_A.weight``. LoRA+ (Hayou et al., 2024)
    is the group ``{pattern: '*.lora_B.*', lr_ratio: 16}``.

    Args:
        pattern: Glob pattern of whole names, such as ``denoiser.up_blocks.*`` or ``*.lora_B.*``.
        lr: Learning rate; defaults to the optimizer's.
        lr_ratio: Factor of the optimizer's learning rate, instead of ``lr``.
        weight_decay: Weight decay; defaults to the optimizer's.

    Raises:
        UserError: If both ``lr`` and ``lr_ratio`` are given, or none of the settings, or one is negative.
    """

    pattern: str
    lr: float | None = None
    lr_ratio: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        given = {name: value for name, value in vars(self).items() if name != "pattern" and value is not None}
        if not given:
            raise UserError(f"parameter group {self.pattern!r} sets nothing; give lr, lr_ratio or weight_decay")
        if self.lr is not None and self.lr_ratio is not None:
            raise UserError(
                f"parameter group {self.pattern!r} has both lr={self.lr} and lr_ratio={self.lr_ratio}; give one"
            )
        check_least(0, **{f"parameter group {self.pattern!r}: {name}": value for name, value in given.items()})


def plain_name(name: str) -> str:
    """The name of a layer or parameter in the model, such as ``denoiser.mid_block.…``, from its name in a module."""
    return _WRAPPERS.sub("", name)


def make_optimizer(
    make: Callable[[Any], Optimizer], module: nn.Module, groups: Sequence[ParameterGroup] = ()
) -> Optimizer:
    """Make an optimizer of a module's trained parameters, with groups of parameters that have settings of their own.

    A parameter is in the first group that matches; those that none matches form the last group, with the optimizer's settings.

    Args:
        make: Function from parameters or parameter groups to their optimizer, such as ``functools.partial(AdamW, lr=1e-4)``.
        module: Module with the parameters.
        groups: Groups; without any, the optimizer gets the parameters.

    Raises:
        UserError: If the optimizer refuses a value; if a group has no parameter, or the optimizer does not have the setting or
            takes one learning rate alone.
    """
    named = {plain_name(name): p for name, p in module.named_parameters() if p.requires_grad}
    if not groups:
        return _made(make, list(named.values()))
    divided = _divide(named, groups)
    settings: list[dict[str, Any]] = [
        {"params": parameters}
        | ({"lr": group.lr} if group and group.lr is not None else {})
        | ({"weight_decay": group.weight_decay} if group and group.weight_decay is not None else {})
        for group, parameters in divided
    ]
    optimizer = _made(make, settings)
    for (group, _), made in zip(divided, optimizer.param_groups, strict=True):
        if group is None:
            continue
        if group.weight_decay is not None and "weight_decay" not in optimizer.defaults:
            raise UserError(f"parameter group {group.pattern!r}: {type(optimizer).__name__} has no weight_decay")
        if group.lr_ratio is not None:
            if made["lr"] is None:
                raise UserError(
                    f"parameter group {group.pattern!r}: lr_ratio={group.lr_ratio} multiplies the lr of "
                    f"{type(optimizer).__name__}, which is null; give the optimizer an lr, or leave lr_ratio out"
                )
            made["lr"] = made["lr"] * group.lr_ratio
    _check_one_rate(optimizer)
    return optimizer


def _made(make: Callable[[Any], Optimizer], parameters: Any) -> Optimizer:
    try:
        return make(parameters)
    except ValueError as error:
        raise UserError(f"the optimizer refuses a value: {error}; correct model.optimizer") from error


def _check_one_rate(optimizer: Optimizer) -> None:
    rates = sorted({group["lr"] for group in optimizer.param_groups if group["lr"]})
    if type(optimizer).__module__.partition(".")[0] in _ONE_RATE and len(rates) > 1:
        raise UserError(
            f"{type(optimizer).__name__} finds one step size for all parameters, and the lr of parameter_groups are {rates}; "
            f"give all groups the same lr, or 0 to those that are not to be trained"
        )


def make_schedule(make: LRSchedulerCallable, optimizer: Optimizer, steps: int = -1) -> LRSchedulerConfigType:
    """Make a learning rate schedule and say when Lightning steps it: after each optimizer step.

    ``ReduceLROnPlateau`` is stepped after each epoch that has a value of what it monitors, which defaults to ``val/loss``.

    Args:
        make: Function from the optimizer to its schedule.
        optimizer: The optimizer.
        steps: Number of optimizer steps; -1, the default, if it is unknown.

    Raises:
        UserError: See :func:`check_schedule`.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = make(optimizer)
    check_schedule(rates, optimizer, schedule, steps)
    if isinstance(schedule, ReduceLROnPlateau):
        monitor = getattr(schedule, "monitor", "val/loss")
        return {"scheduler": schedule, "interval": "epoch", "monitor": monitor, "strict": False}
    return {"scheduler": schedule, "interval": "step"}


def check_schedule(rates: Sequence[Any], optimizer: Optimizer, schedule: object, steps: int = -1) -> None:
    """Check that a schedule has not given all groups the same learning rate, and warn if it ends before the training.

    Args:
        rates: Learning rates of the groups before the schedule was made.
        optimizer: Optimizer of the schedule.
        schedule: The schedule, which has just been made.
        steps: Number of optimizer steps; -1, the default, if it is unknown.

    Raises:
        UserError: If the groups had different learning rates and have the same now, as OneCycleLR makes them, or the
            period of ``CosineAnnealingLR`` is no number of steps.
    """
    if isinstance(schedule, CosineAnnealingLR):
        check_least(1, **{"lr_scheduler T_max": schedule.T_max})
    now = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if len(set(map(float, rates))) > 1 and len(set(map(float, now))) == 1:
        raise UserError(
            f"{type(schedule).__name__} gives all {len(now)} parameter groups the learning rate {float(now[0]):g}; give it a "
            f"list with a value for each group, such as max_lr, or use a schedule that multiplies, such as LinearLR"
        )
    for name, then in (("T_max", "rises again"), ("total_iters", "stays at 0")):
        kind = CosineAnnealingLR if name == "T_max" else PolynomialLR
        if type(schedule) is kind and (end := getattr(schedule, name)) < steps:
            rank_zero_warn(
                f"the learning rate of {kind.__name__} {then} after {name}={end} of {steps} optimizer steps; set {name} to "
                f"{steps}, as trainer.max_steps"
            )


def _divide(
    named: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup]
) -> list[tuple[ParameterGroup | None, list[nn.Parameter]]]:
    """The parameters of each group, and last those of none."""
    left = dict(named)
    divided: list[tuple[ParameterGroup | None, list[nn.Parameter]]] = []
    for group in groups:
        names = [name for name in left if fnmatchcase(name, group.pattern)]
        if not names:
            taken = any(fnmatchcase(name, group.pattern) for name in named)
            reason = "only parameters that earlier groups have" if taken else "no trained parameter"
            raise UserError(
                f"parameter group {group.pattern!r} matches {reason}; correct or remove it. The first of {len(named)} names is "
                f"{next(iter(named), 'none')}"
            )
        divided.append((group, [left.pop(name) for name in names]))
    return [*divided, (None, list(left.values()))] if left else list(divided)
