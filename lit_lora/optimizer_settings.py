"""Settings of optimizers and learning rate schedules: what a resumed run changes, and applying it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from math import prod
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_lora.errors import UserError

_OF_THE_SCHEDULE = (
    "initial_lr",
    "params",
    "param_names",
    "initial_momentum",
    "max_lr",
    "min_lr",
    "max_momentum",
    "base_momentum",
)
"""Entries of a parameter group that are no settings of the optimizer, or that the schedule sets."""

_PROGRESS = ("last_epoch", "base_lrs", "best", "num_bad_epochs", "cooldown_counter", "mode_worse", "last_value")
"""Entries of a schedule's state that are no constants, beside those that begin with an underscore."""


class Setting(NamedTuple):
    """The place of a setting.

    Attributes:
        name: Its name, such as ``lr``.
        number: Number of the optimizer or schedule.
        group: Number of the optimizer's parameter group; None for a schedule.
    """

    name: str
    number: int
    group: int | None = None

    def __str__(self) -> str:
        if self.group is None:
            return f"lr_scheduler {self.number}: {self.name}"
        return f"optimizer {self.number}, group {self.group}: {self.name}"


Settings = dict[Setting, Any]


def optimizer_names(trainer: Trainer) -> list[str]:
    """Names of the classes of the run's optimizers."""
    return [type(_inner(optimizer)).__name__ for optimizer in trainer.optimizers]


def check_clipping(optimizer: Optimizer, trainer: Trainer | None) -> None:
    """Check that the run can clip gradients, which Lightning does not do where a fused optimizer takes them scaled.

    Args:
        optimizer: Optimizer of the run.
        trainer: Trainer of the run; None if there is none.

    Raises:
        UserError: If precision ``16-mixed`` scales the loss, gradients are clipped, and the optimizer is fused.
    """
    if trainer is None or not trainer.gradient_clip_val or trainer.precision not in ("16-mixed", "bf16-mixed"):
        return
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        raise UserError(
            f"trainer.precision={trainer.precision!r} cannot clip gradients (gradient_clip_val={trainer.gradient_clip_val}) of a "
            f"fused {type(optimizer).__name__}; set model.optimizer.init_args.fused to false"
        )


def schedule_names(trainer: Trainer) -> list[str]:
    """Names of the classes of the run's learning rate schedules, such as ``SequentialLR(LinearLR, ConstantLR)``."""
    return [_schedule_name(config.scheduler) for config in trainer.lr_scheduler_configs]


def _schedule_name(schedule: Any) -> str:
    inner = ", ".join(map(_schedule_name, getattr(schedule, "_schedulers", ())))
    return f"{type(schedule).__name__}({inner})" if inner else type(schedule).__name__


class ResumedOptimizers:
    """Compares the optimizers of a checkpoint with those of the run that resumes from it.

    Args:
        names: Class names of the checkpoint's ``optimizers`` and ``schedules``; without what the checkpoint does not tell.
        checkpoint: The checkpoint.
        keep: Whether the checkpoint's settings stay where the run's differ.
    """

    def __init__(self, names: Mapping[str, list[str]], checkpoint: Mapping[str, Any], keep: bool) -> None:
        self._names = names
        self._saved = settings(checkpoint.get("optimizer_states", []), checkpoint.get("lr_schedulers", []))
        self._keep = keep
        self._wanted: Settings = {}

    def compare(self, trainer: Trainer) -> None:
        """Warn of settings that differ, once the trainer has its optimizers and before their state is restored.

        Raises:
            UserError: If the checkpoint was trained with another optimizer, or another kind of schedule, a schedule that this run
                lacks, or without one.
        """
        for what, here in (("optimizers", optimizer_names(trainer)), ("schedules", schedule_names(trainer))):
            if (saved := self._names.get(what, here)) != here:
                before, now = (", ".join(names) or "no lr_scheduler" for names in (saved, here))
                raise UserError(
                    f"the checkpoint was trained with {before}, this run has {now}: resume with the same "
                    f"{'optimizer' if what == 'optimizers' else 'lr_scheduler'}, or start without ckpt_path"
                )
        own = own_settings(trainer)
        changed = {key: value for key, value in own.items() if key in self._saved and self._saved[key] != value}
        if not changed:
            return
        listed = "; ".join(
            f"{key} {self._saved[key]} in the checkpoint, {value} here" for key, value in changed.items()
        )
        if self._keep:
            rank_zero_warn(
                f"the checkpoint's optimizer settings stay: {listed}. keep_optimizer_settings: false of AdapterCheckpoint "
                f"applies those of this run"
            )
        else:
            rank_zero_info(f"this run's optimizer settings apply: {listed}")
            self._wanted = changed

    def apply(self, trainer: Trainer) -> None:
        """Apply the run's settings, if they are wanted, once the checkpoint is restored."""
        apply_settings(trainer, self._wanted)


def settings(optimizer_states: list[dict[str, Any]], scheduler_states: list[dict[str, Any]]) -> Settings:
    """Settings such as ``lr`` and ``weight_decay`` of each parameter group, and the constants of each schedule."""
    found: Settings = {}
    for number, state in enumerate(optimizer_states):
        for place, group in enumerate(state["param_groups"]):
            values = {name: value for name, value in group.items() if name not in _OF_THE_SCHEDULE}
            values["lr"] = group.get("initial_lr", group["lr"])
            found |= {Setting(name, number, place): _plain(value) for name, value in values.items()}
    for number, state in enumerate(scheduler_states):
        found |= {Setting(name, number): value for name, value in _constants(state)}
    return found


def _constants(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a schedule's constants, those of schedules inside as ``schedulers.1.T_max``."""
    for place, inner in enumerate(state.get("_schedulers", ())):
        yield from ((f"schedulers.{place}.{name}", value) for name, value in _constants(inner))
    for name, value in state.items():
        told = name.removeprefix("_") if name == "_milestones" else name  # of SequentialLR
        if isinstance(value, int | float | str | list | tuple) and not told.startswith("_") and told not in _PROGRESS:
            yield told, value


def own_settings(trainer: Trainer) -> Settings:
    """The settings that this run's config gives, before a checkpoint is restored."""
    groups = [{"param_groups": _configured(_inner(optimizer))} for optimizer in trainer.optimizers]
    return settings(groups, [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs])


def apply_settings(trainer: Trainer, wanted: Settings) -> None:
    """Give optimizers and schedules other settings in the middle of a run; their progress stays.

    A learning rate that the schedule has reduced to a fraction becomes the same fraction of the new one. After another constant,
    such as ``T_max``, it is what the schedule's formula gives at this step; a schedule without a closed formula, such as
    ``LambdaLR``, and a chain that has one inside, or an ``eta_min``, go on from the learning rate that they have.

    Args:
        trainer: Trainer whose state is restored.
        wanted: Values of the settings.
    """
    for (name, number, place), value in wanted.items():
        if place is None:
            _set_constant(trainer.lr_scheduler_configs[number].scheduler, name, value)
            continue
        optimizer = _inner(trainer.optimizers[number])
        group = optimizer.param_groups[place]
        if name != "lr":
            group[name] = value
            continue
        before = group.get("initial_lr", group["lr"])
        group["lr"] = value * (float(group["lr"]) / float(before)) if before else value
        if "initial_lr" in group:
            group["initial_lr"] = value
            for config in trainer.lr_scheduler_configs:
                if _inner(config.scheduler.optimizer) is optimizer:
                    _set_base_rate(config.scheduler, place, value)
    for number in {setting.number for setting in wanted if setting.group is None}:
        _follow_formula(trainer.lr_scheduler_configs[number].scheduler)


def _set_constant(schedule: Any, name: str, value: Any) -> None:
    """Set a constant of a schedule, or of one inside, by its name: see :func:`_constants`."""
    *path, last = name.split(".")
    for place in path[1::2]:
        schedule = schedule._schedulers[int(place)]
    setattr(schedule, "_milestones" if last == "milestones" and hasattr(schedule, "_milestones") else last, value)


def _follow_formula(schedule: Any) -> None:
    """Set the learning rates to those of a schedule's formula, as torch computes each from the one before: one that an ended
    schedule has left at 0 would stay there. Without a formula, they stay.
    """
    groups = _inner(schedule.optimizer).param_groups
    # Groups that were added later, as by BackboneFinetuning, come last and have none.
    for group, rate in zip(groups, _formula(schedule) or (), strict=False):
        group["lr"] = rate
    _tell_rates(schedule, [group["lr"] for group in groups])


def _formula(schedule: Any) -> list[float] | None:
    """The learning rates of a schedule at its step by its closed formula; None if it has none.

    The schedule inside a sequence gets the step that the sequence's milestones give it. A chain multiplies the learning rate by
    the factors of its schedules; with an ``eta_min`` there are none.
    """
    inner = getattr(schedule, "_schedulers", ())
    if inner and hasattr(schedule, "_milestones"):
        number = bisect_right(schedule._milestones, schedule.last_epoch)
        _set_step(inner[number], schedule.last_epoch - [0, *schedule._milestones][number])
        return _formula(inner[number])
    if inner:
        parts = [None if getattr(part, "eta_min", 0) else _formula(part) for part in inner]
        bases = [group["initial_lr"] for group in _inner(schedule.optimizer).param_groups if "initial_lr" in group]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return [
            base * prod(rate / base for rate in rates) if base else base
            for base, *rates in zip(bases, *known, strict=False)
        ]
    return list(schedule._get_closed_form_lr()) if hasattr(schedule, "_get_closed_form_lr") else None


def _set_step(schedule: Any, step: int) -> None:
    """Set the step of a schedule, or of those in a chain. A sequence within a sequence keeps its own, which torch counts anew."""
    if hasattr(schedule, "_milestones"):
        return
    if hasattr(schedule, "last_epoch"):
        schedule.last_epoch = step
    for inner in getattr(schedule, "_schedulers", ()):
        _set_step(inner, step)


def _tell_rates(schedule: Any, rates: list[float]) -> None:
    """Give a schedule and those inside the learning rates that they tell loggers."""
    schedule._last_lr = rates
    for inner in getattr(schedule, "_schedulers", ()):
        _tell_rates(inner, rates)


def _set_base_rate(schedule: Any, place: int, value: float) -> None:
    """Set the learning rate that a schedule and those inside multiply."""
    for inner in getattr(schedule, "_schedulers", ()):
        _set_base_rate(inner, place, value)
    if hasattr(schedule, "base_lrs"):
        schedule.base_lrs[place] = value


def _configured(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups without what the optimizer counts there, such as ``d`` and ``k`` of Prodigy."""
    parameters = signature(type(optimizer).__init__).parameters
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return list(optimizer.param_groups)
    known = {*parameters, "lr", "initial_lr"}
    return [{name: value for name, value in group.items() if name in known} for group in optimizer.param_groups]


def _inner(optimizer: Any) -> Any:
    """The torch optimizer that Lightning or DeepSpeed wraps."""
    wrapped = getattr(optimizer, "optimizer", None)
    return optimizer if wrapped is None else wrapped


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def check_lr_finder(trainer: Trainer, module: LightningModule) -> None:
    """Refuse Lightning's LearningRateFinder where it would set an attribute that the module does not have.

    Raises:
        UserError: If it would.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for finder in callbacks:
        if not isinstance(finder, LearningRateFinder) or not finder._update_attr:
            continue
        if not any(hasattr(module, name) for name in (finder._attr_name, "lr", "learning_rate") if name):
            raise UserError(
                f"LearningRateFinder sets an attribute lr of the module, and {type(module).__name__} has none: its optimizer has "
                f"the lr; call Tuner(trainer).lr_find(module, data, update_attr=False), and set the lr of model.optimizer to "
                f"the suggestion"
            )
