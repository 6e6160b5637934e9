from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import AdaLoraConfig, BOFTConfig, LoHaConfig, LoraConfig, PeftConfig, PeftModel

from lit_lora.adapters.methods import (
    BLOCK_BY_BLOCK,
    AdaLoraMethod,
    AdapterMethod,
    BlockByBlockMethod,
    LoraMethod,
    method_of,
)
from lit_lora.callbacks import AdapterCheckpoint
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.memory.optimizer_in_backward import check_optimizer_in_backward
from lit_lora.module import LoraDiffusion
from tests.helpers import loader_of, make_batches


class CountingMethod(AdapterMethod):
    """Keeps the gradient norm of each step on the model, where a checkpoint would otherwise lose it."""

    whole_gradients = True

    def after_step(self, model: PeftModel, step: int) -> None:
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        model.seen = getattr(model, "seen", {}) | {step: float(torch.stack(norms).norm())}

    def state(self, model: PeftModel) -> dict[str, Any]:
        return {"seen": model.seen}

    def restore(self, model: PeftModel, state: dict[str, Any]) -> None:
        model.seen = dict(state["seen"])


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (LoraConfig(), LoraMethod),
        (LoHaConfig(), BlockByBlockMethod),
        (AdaLoraConfig(total_step=10), AdaLoraMethod),
        (BOFTConfig(), AdapterMethod),
        (None, AdapterMethod),
    ],
)
def test_method_of_a_config(config: PeftConfig | None, method: type[AdapterMethod]) -> None:
    assert type(method_of(config)) is method


@pytest.mark.parametrize("config", BLOCK_BY_BLOCK)
def test_configs_that_are_named_as_a_choice_are_one(config: Any) -> None:
    assert method_of.dispatch(config)(None).block_by_block


def test_a_method_needs_nothing_unless_it_says_so() -> None:
    method = AdapterMethod()
    model: Any = object()
    method.after_step(model, 1)
    method.restore(model, {})
    assert (method.state(model), method.state_bytes(model)) == ({}, 0)
    assert (method.whole_gradients, method.elementwise, method.block_by_block) == (False, True, False)


def fit(
    config: PeftConfig, base: Path, folder: Path, options: dict[str, Any], steps: int, resume: Path | None = None
) -> Any:
    torch.manual_seed(0)
    module = LoraDiffusion(StableDiffusion(str(base)), config, base_dtype="float32")
    checkpoints = AdapterCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(**options | {"enable_checkpointing": True, "max_steps": steps, "callbacks": [checkpoints]})
    batches = make_batches(4)
    done = 0 if resume is None else 2  # Lightning does not rewind a plain list
    trainer.fit(module, loader_of(batches[done:] + batches[:done]), ckpt_path=resume)
    return module.family.denoiser


def test_a_method_sees_every_step_and_continues_from_a_checkpoint(
    make_config: Callable[[type[AdapterMethod]], PeftConfig],
    sd_folder: Path,
    trainer_options: dict[str, Any],
    tmp_path: Path,
) -> None:
    config = make_config(CountingMethod)
    complete = fit(config, sd_folder, tmp_path, trainer_options, 4).seen
    assert list(complete) == [1, 2, 3, 4]
    assert all(norm > 0 for norm in complete.values())
    resumed = fit(config, sd_folder, tmp_path, trainer_options, 4, tmp_path / "epoch=0-step=2.ckpt").seen
    assert resumed == pytest.approx(complete)


def test_a_method_with_whole_gradients_is_refused_where_they_are_freed(
    make_config: Callable[[type[AdapterMethod]], PeftConfig], trainer_options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"OwnConfig reads all gradients after each step; use peft\.LoraConfig"):
        check_optimizer_in_backward(Trainer(**trainer_options), make_config(CountingMethod))
