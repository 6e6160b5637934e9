"""Settings of optimizers and learning rate schedules: what a resumed run changes, and applying it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_lora.errors import UserError
from lit_lora.replayed_schedule import OF_THE_SCHEDULE, ReplayedSchedule, cycled

_BETA2 = "betas[1]"
"""Of the betas, the one that no schedule changes."""

_REPLAYED = ("ends of phases", "lr_lambdas")
"""Ends of the names of constants that a schedule takes from a checkpoint unless it is replayed."""

_OWN_STEPS = "the module's own lr_scheduler_step may step it by other rules"
"""Why a schedule is not replayed that its module steps itself."""

_PROGRESS = (
    "last_epoch",
    "base_lrs",
    "best",
    "num_bad_epochs",
    "cooldown_counter",
    "mode_worse",
    "last_value",
    "T_cur",
    "T_i",
)
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
        self._replayed: list[ReplayedSchedule | str] = []

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
        if not self._keep:
            # A module that steps its schedules itself may do it by other rules.
            plain = not is_overridden("lr_scheduler_step", trainer.lightning_module)
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            self._replayed = [ReplayedSchedule.of(one) if plain else _OWN_STEPS for one in schedules]
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
        anew = {number for number, one in enumerate(self._replayed) if isinstance(one, ReplayedSchedule)}
        apply_settings(
            trainer, {key: self._wanted[key] for key in self._wanted if key.group is not None or key.number not in anew}
        )
        for number, replayed in enumerate(self._replayed):
            schedule = trainer.lr_scheduler_configs[number].scheduler
            if isinstance(replayed, ReplayedSchedule):
                replayed.hand_over(schedule)
                continue
            constants = [key for key in self._wanted if key.group is None and key.number == number]
            for key in [] if isinstance(schedule, ReduceLROnPlateau) else constants:
                told = (
                    "stays as in the checkpoint"
                    if key.name.endswith(_REPLAYED)
                    else f"applies from the next step on, which {type(schedule).__name__} computes from the learning rate that "
                    f"the checkpoint has"
                )
                rank_zero_warn(f"{key} {told}, since {replayed}")


def settings(optimizer_states: list[dict[str, Any]], scheduler_states: list[dict[str, Any]]) -> Settings:
    """Settings such as ``lr`` and ``weight_decay`` of each parameter group, and the constants of each schedule."""
    found: Settings = {}
    for number, state in enumerate(optimizer_states):
        for place, group in enumerate(state["param_groups"]):
            others = {"params", "param_names", *OF_THE_SCHEDULE, *cycled(group)}
            values = {name: value for name, value in group.items() if name not in others}
            values["lr"] = group.get("initial_lr", group["lr"])
            if "betas" in cycled(group):
                values[_BETA2] = group["betas"][1]
            found |= {Setting(name, number, place): _plain(value) for name, value in values.items()}
    for number, state in enumerate(scheduler_states):
        found |= {Setting(name, number): value for name, value in _constants(state)}
    return found


def _constants(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a schedule's constants, those of schedules inside as ``schedulers.1.T_max``."""
    for place, inner in enumerate(state.get("_schedulers", ())):
        yield from ((f"schedulers.{place}.{name}", value) for name, value in _constants(inner))
    for name, value in state.items():
        if name == "_schedule_phases":  # of OneCycleLR
            yield "ends of phases", [phase["end_step"] for phase in value]
        told = name.removeprefix("_") if name == "_milestones" else name  # of SequentialLR
        if isinstance(value, int | float | str | list | tuple) and not told.startswith("_") and told not in _PROGRESS:
            yield told, value


def own_settings(trainer: Trainer) -> Settings:
    """The settings that this run's config gives, before a checkpoint is restored."""
    groups = [{"param_groups": _configured(_inner(optimizer))} for optimizer in trainer.optimizers]
    return settings(groups, [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs])


def apply_settings(trainer: Trainer, wanted: Settings) -> None:
    """Give optimizers and schedules other settings in the middle of a run; their progress stays.

    A learning rate that the schedule has reduced to a fraction becomes the same fraction of the new one.

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
        if name == _BETA2:
            group["betas"] = (group["betas"][0], value)
            continue
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


def _set_constant(schedule: Any, name: str, value: Any) -> None:
    """Set a constant of a schedule, or of one inside, by its name: see :func:`_constants`."""
    if name.endswith(_REPLAYED):
        return
    *path, last = name.split(".")
    for place in path[1::2]:
        schedule = schedule._schedulers[int(place)]
    setattr(schedule, "_milestones" if last == "milestones" and hasattr(schedule, "_milestones") else last, value)


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
    known = {*parameters, "lr", "initial_lr", "max_momentum"}
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
