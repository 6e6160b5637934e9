"""What EVA, CorDA, LoRA-GA and LoftQ have in common: what they refuse, so that no values are lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig

from lit_lora import FromFile
from lit_lora.callbacks import (
    AdapterCheckpoint,
    CordaInitialization,
    EvaInitialization,
    LoftqInitialization,
    LoraGaInitialization,
    LoraInjection,
)
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from lit_lora.quantization import Int8
from tests.helpers import Classifier, loader_of, make_batches, save_adapter

CONFIG = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"])
KINDS = [EvaInitialization, CordaInitialization, LoraGaInitialization, LoftqInitialization]
FIRST_STEPS = KINDS[:3]


def fit(module: Any, options: dict[str, Any], *callbacks: Callback, steps: int = 3, resume: Path | None = None) -> None:
    options = options | {"max_steps": steps, "callbacks": [*callbacks]}
    Trainer(**options).fit(module, loader_of(make_batches(steps)), ckpt_path=resume)


def diffusion(base: Path, adapter: Any = CONFIG, **options: Any) -> LoraDiffusion:
    return LoraDiffusion(StableDiffusion(str(base)), adapter, base_dtype="float32", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_values_from_a_file_are_not_replaced(
    kind: type[Callback], sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    family = StableDiffusion(str(sd_folder))
    family.load(torch.float32)
    family.add_adapter(CONFIG)
    save_adapter(family, tmp_path)
    module = diffusion(sd_folder, FromFile(path=str(tmp_path)), quantization=Int8())
    with pytest.raises(
        UserError, match=r"would replace those of .*, with which FromFile goes on; remove " + kind.__name__
    ):
        fit(module, trainer_options, kind())


@pytest.mark.parametrize("kind", KINDS)
def test_other_first_values_are_not_replaced(
    kind: type[Callback], sd_folder: Path, trainer_options: dict[str, Any]
) -> None:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights="orthogonal")
    module = diffusion(sd_folder, config, quantization=Int8() if kind is LoftqInitialization else None)
    options = {} if kind is LoftqInitialization else {"steps": 1}
    with pytest.raises(UserError, match=r"to_q has values already.*init_lora_weights='orthogonal'; leave that out"):
        fit(module, trainer_options, kind(**options))


@pytest.mark.parametrize("kind", FIRST_STEPS)
def test_training_that_ends_within_the_steps(kind: Any, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def callbacks(steps: int) -> list[Callback]:
        return [LoraInjection(LoraConfig(r=2, lora_alpha=2, target_modules=["0", "3"])), kind(steps=steps)]

    with pytest.raises(UserError, match=r"after steps=3 optimizer steps, and training ends after 3, .* lower steps"):
        fit(Classifier(), trainer_options, *callbacks(3))
    epochs = trainer_options | {"max_epochs": 2, "accumulate_grad_batches": 2}
    with pytest.raises(UserError, match=r"after steps=4 optimizer steps, and training ends after 4"):
        Trainer(**epochs, callbacks=callbacks(4)).fit(Classifier(), loader_of(make_batches(4)))

    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = True

    with pytest.warns(
        UserWarning, match=r"ended at step 1, and .* at step 2: what was saved is not initialized; resume"
    ):
        fit(Classifier(), trainer_options, *callbacks(2), Stops())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_without_the_callback_is_not_replaced(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    saving = AdapterCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = trainer_options | {"enable_checkpointing": True}
    fit(diffusion(sd_folder), options, saving, steps=2)
    with pytest.raises(
        UserError, match=r"step 2 was saved without EvaInitialization, which begins with the first step"
    ):
        fit(diffusion(sd_folder), options, EvaInitialization(steps=1), saving, resume=tmp_path / "step=2.ckpt")
