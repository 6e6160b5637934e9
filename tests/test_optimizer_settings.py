"""Resuming with other settings of optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from peft import LoraConfig
from torch import Tensor, nn

from lit_lora.callbacks import AdapterCheckpoint
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from tests.helpers import loader_of, make_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*ended before the epoch ended")


class Line(LightningModule):
    def __init__(self, optimizer: Callable[..., Any], schedule: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 1)
        self.make = optimizer, schedule
        self.rates: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.line(batch["x"]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = self.make[0](self.parameters())
        if self.make[1] is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make[1](optimizer), "interval": "step"}}


def adamw(lr: float, **options: Any) -> Callable[..., Any]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, **options)


def cosine(steps: int) -> Callable[..., Any]:
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def run(folder: Path, options: dict[str, Any], module: Line, max_steps: int, **more: Any) -> Line:
    resume = more.pop("resume", None)
    checkpoints = AdapterCheckpoint(folder, save_last=True, enable_version_counter=False, **more)
    options = options | {"enable_checkpointing": True, "max_steps": max_steps, "callbacks": [checkpoints]}
    batches: Any = [{"x": torch.full((2, 3), float(i))} for i in range(8)]
    Trainer(**options).fit(module, loader_of(batches), ckpt_path=resume)
    return module


def test_another_lr_is_said_and_the_checkpoints_stays(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, trainer_options, Line(adamw(0.1)), 2)
    expected = (
        r"optimizer 0, group 0: lr 0.1 in the checkpoint, 0.5 here.*weight_decay 0.01 in the checkpoint, 0.2 here"
    )
    with pytest.warns(UserWarning, match=expected):
        module = run(tmp_path, trainer_options, Line(adamw(0.5, weight_decay=0.2)), 4, resume=tmp_path / "last.ckpt")
    assert module.rates == [0.1, 0.1]


def test_another_lr_is_applied_on_request(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, trainer_options, Line(adamw(0.1)), 2)
    module = run(
        tmp_path,
        trainer_options,
        Line(adamw(0.5, weight_decay=0.2)),
        4,
        resume=tmp_path / "last.ckpt",
        keep_optimizer_settings=False,
    )
    assert module.rates == [0.5, 0.5]
    group = module.trainer.optimizers[0].param_groups[0]
    assert group["weight_decay"] == 0.2
    assert module.trainer.optimizers[0].state[module.line.weight]["step"] == 4  # the state goes on


@pytest.mark.parametrize("keep", [True, False])
def test_under_a_schedule_its_progress_goes_on(keep: bool, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, trainer_options, Line(adamw(0.1), cosine(8)), 4)
    module = Line(adamw(0.2), cosine(8))
    options = {"resume": tmp_path / "last.ckpt", "keep_optimizer_settings": keep}
    if keep:
        with pytest.warns(UserWarning, match=r"lr 0.1 in the checkpoint, 0.2 here"):
            run(tmp_path, trainer_options, module, 8, **options)
    else:
        run(tmp_path, trainer_options, module, 8, **options)
    whole = run(tmp_path / "whole", trainer_options, Line(adamw(0.1 if keep else 0.2), cosine(8)), 8)
    assert module.rates == pytest.approx(whole.rates[4:])


def test_the_length_of_a_schedule(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, trainer_options, Line(adamw(0.1), cosine(4)), 2)
    with pytest.warns(UserWarning, match=r"lr_scheduler 0: T_max 4 in the checkpoint, 8 here"):
        run(tmp_path, trainer_options, Line(adamw(0.1), cosine(8)), 3, resume=tmp_path / "last.ckpt")
    run(tmp_path / "b", trainer_options, Line(adamw(0.1), cosine(4)), 2)
    last = tmp_path / "b" / "last.ckpt"
    options = {"resume": last, "keep_optimizer_settings": False}
    module = run(tmp_path / "b", trainer_options, Line(adamw(0.1), cosine(8)), 3, **options)
    assert module.trainer.lr_scheduler_configs[0].scheduler.T_max == 8


def after_warmup(steps: int) -> Callable[..., Any]:
    schedules = torch.optim.lr_scheduler
    return lambda optimizer: schedules.SequentialLR(
        optimizer, [schedules.LinearLR(optimizer, 0.1, total_iters=2), cosine(steps)(optimizer)], [2]
    )


def chain(then: int) -> Callable[..., Any]:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        schedules = torch.optim.lr_scheduler
        parts = [schedules.LinearLR(optimizer, 0.1, total_iters=2), schedules.CosineAnnealingLR(optimizer, then)]
        return schedules.ChainedScheduler(parts, optimizer)

    return make


@pytest.mark.parametrize(("schedule", "warmup"), [(cosine, 0), (after_warmup, 2), (chain, 0)])
def test_a_run_that_has_ended_trains_longer(
    schedule: Callable[[int], Any], warmup: int, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """Its last learning rate is 0, from which torch's next ones would be computed."""
    run(tmp_path, trainer_options, Line(adamw(0.1), schedule(4)), 4 + warmup)
    options = {"resume": tmp_path / "last.ckpt", "keep_optimizer_settings": False}
    longer = run(tmp_path, trainer_options, Line(adamw(0.2), schedule(6)), 6 + warmup, **options)
    whole = run(tmp_path / "whole", trainer_options, Line(adamw(0.2), schedule(6)), 6 + warmup)
    assert longer.rates == pytest.approx(whole.rates[4 + warmup :])
    assert min(longer.rates) > 0


def warm_up(first: int, then: int) -> Callable[..., Any]:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        schedules = torch.optim.lr_scheduler
        parts = [schedules.LinearLR(optimizer, 0.1, total_iters=2), schedules.CosineAnnealingLR(optimizer, then)]
        return schedules.SequentialLR(optimizer, parts, milestones=[first])

    return make


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (
            warm_up(2, 4),
            warm_up(2, 8),
            r"lr_scheduler 0: schedulers\.1\.T_max 4 in the checkpoint, 8 here\. keep_optim",
        ),
        (warm_up(6, 4), warm_up(5, 4), r"lr_scheduler 0: milestones \[6\] in the checkpoint, \[5\] here\. keep_optim"),
        (chain(4), chain(8), r"lr_scheduler 0: schedulers\.1\.T_max 4 in the checkpoint, 8 here\. keep_optim"),
    ],
)
def test_schedules_inside_a_schedule(
    before: Any, now: Any, told: str, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    run(tmp_path, trainer_options, Line(adamw(0.1), before), 3)
    last = {"resume": tmp_path / "last.ckpt"}
    run(tmp_path, trainer_options, Line(adamw(0.1), before), 4, **last)  # a warning would be an error
    with pytest.warns(UserWarning, match=told):
        kept = run(tmp_path, trainer_options, Line(adamw(0.1), now), 7, **last)
    whole = run(tmp_path / "whole", trainer_options, Line(adamw(0.1), before), 7)
    assert kept.rates == pytest.approx(whole.rates[4:])


def test_constants_and_lr_of_schedules_inside_a_schedule_are_applied(
    trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    run(tmp_path, trainer_options, Line(adamw(0.1), warm_up(4, 4)), 1)
    options = {"resume": tmp_path / "last.ckpt", "keep_optimizer_settings": False}
    module = run(tmp_path, trainer_options, Line(adamw(0.2), warm_up(3, 8)), 8, **options)
    whole = run(tmp_path / "whole", trainer_options, Line(adamw(0.2), warm_up(3, 8)), 8)
    assert module.rates == pytest.approx(whole.rates[1:])


def test_another_schedule_inside_a_schedule_is_refused(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, trainer_options, Line(adamw(0.1), warm_up(2, 4)), 2)
    schedules = torch.optim.lr_scheduler
    other = Line(adamw(0.1), lambda made: schedules.SequentialLR(made, [schedules.LinearLR(made)] * 2, milestones=[2]))
    with pytest.raises(
        UserError, match=r"with SequentialLR\(LinearLR, CosineAnnealingLR\), this run has SequentialLR\("
    ):
        run(tmp_path, trainer_options, other, 4, resume=tmp_path / "last.ckpt")


def test_the_same_settings_say_nothing(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, trainer_options, Line(adamw(0.1), cosine(8)), 2)
    run(tmp_path, trainer_options, Line(adamw(0.1), cosine(8)), 4, resume=tmp_path / "last.ckpt")


def test_another_optimizer_is_refused(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, trainer_options, Line(adamw(0.1)), 2)
    module = Line(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    with pytest.raises(UserError, match="trained with AdamW, this run has SGD: resume with the same optimizer"):
        run(tmp_path, trainer_options, module, 4, resume=tmp_path / "last.ckpt")


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("here", ["LinearLR", "no lr_scheduler", "CosineAnnealingLR"])
def test_another_kind_of_schedule_is_refused(
    there: bool, here: str, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    before = "CosineAnnealingLR" if there else "no lr_scheduler"
    run(tmp_path, trainer_options, Line(adamw(0.1), cosine(8) if there else None), 2)
    schedules = {"LinearLR": lambda made: torch.optim.lr_scheduler.LinearLR(made), "CosineAnnealingLR": cosine(8)}
    module = Line(adamw(0.1), schedules.get(here))
    if here == before:
        run(tmp_path, trainer_options, module, 4, resume=tmp_path / "last.ckpt")
        return
    with pytest.raises(
        UserError, match=f"trained with {before}, this run has {here}: resume with the same lr_scheduler"
    ):
        run(tmp_path, trainer_options, module, 4, resume=tmp_path / "last.ckpt")


@pytest.mark.parametrize("as_callback", [True, False])
def test_the_lr_finder_is_refused_where_it_would_set_what_is_not_there(
    as_callback: bool, sd_module: LoraDiffusion, trainer_options: dict[str, Any]
) -> None:
    finders = [LearningRateFinder(num_training_steps=3)] if as_callback else []
    trainer = Trainer(max_steps=2, callbacks=finders, **trainer_options)
    with pytest.raises(UserError, match=r"LearningRateFinder sets an attribute lr .* LoraDiffusion has none"):
        if as_callback:
            trainer.fit(sd_module, loader_of(make_batches(4)))
        else:
            Tuner(trainer).lr_find(sd_module, loader_of(make_batches(4)), num_training=3)


def test_the_lr_finder_suggests_where_it_sets_nothing(
    sd_module: LoraDiffusion, trainer_options: dict[str, Any]
) -> None:
    trainer = Trainer(max_steps=2, **trainer_options)
    found = Tuner(trainer).lr_find(
        sd_module, loader_of(make_batches(40)), num_training=30, update_attr=False, early_stop_threshold=None
    )
    assert found is not None
    assert 1e-8 < found.suggestion() < 1
    assert sd_module.trainer.optimizers[0].param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("precision", "clip", "refused"), [("bf16-mixed", 1.0, True), ("bf16-mixed", 0.0, False), ("32-true", 1.0, False)]
)
def test_a_fused_optimizer_that_lightning_cannot_clip_is_refused(
    sd_folder: Path, trainer_options: dict[str, Any], precision: Any, clip: float, refused: bool
) -> None:
    module = LoraDiffusion(
        StableDiffusion(str(sd_folder)), LoraConfig(r=2), base_dtype="float32", optimizer=adamw(1e-3, fused=True)
    )
    trainer = Trainer(**trainer_options | {"precision": precision, "gradient_clip_val": clip, "max_steps": 1})
    if not refused:
        trainer.fit(module, loader_of(make_batches(1)))
        return
    with pytest.raises(UserError, match=r"gradient_clip_val=1\.0\) of a fused AdamW; set .*\.fused to false"):
        trainer.fit(module, loader_of(make_batches(1)))
