"""Gradients are freed before the next forward pass, and kept within accumulated batches."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_lora import LoraDiffusion
from tests.helpers import loader_of, make_batches


class Held(Callback):
    """Whether there are gradients at the beginning and at the end of each batch."""

    def __init__(self) -> None:
        self.at_start: list[bool] = []
        self.at_end: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.at_start.append(_has_gradients(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.at_end.append(_has_gradients(pl_module))


def _has_gradients(module: LightningModule) -> bool:
    return any(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(("accumulated", "expected"), [(1, [False] * 4), (2, [False, True, False, True])])
def test_gradients_are_freed_after_the_step(
    accumulated: int, expected: list[bool], sd_module: LoraDiffusion, trainer_options: dict[str, Any]
) -> None:
    held = Held()
    options = trainer_options | {"max_steps": 4 // accumulated, "accumulate_grad_batches": accumulated}
    Trainer(**options, callbacks=[held]).fit(sd_module, loader_of(make_batches(4)))
    assert held.at_start == expected
    assert held.at_end == [True] * 4, "callbacks can read them"
    assert not _has_gradients(sd_module)
