"""Lightning's tuner tries batches of the data; the training that follows must not miss them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor

from lit_lora.callbacks import AdapterCheckpoint
from lit_lora.datamodules import WebDatasetDataModule, WebDatasetStreamDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*can't be pickled:UserWarning"),
]


class Number(LightningModule):
    """Trains one number and notes the samples that the final training sees."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.1
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys: list[str] = []

    def on_train_start(self) -> None:
        self.keys = []  # the last start is that of the real training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.keys += batch["key"]
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The tuner asks for it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def finders() -> dict[str, Callback]:
    return {
        "batch size": BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=2),
        "learning rate": LearningRateFinder(num_training_steps=2),
    }


def fit(folder: Path, options: dict[str, Any], data: Any, *callbacks: Callback, **more: Any) -> list[str]:
    module = Number()
    resume = more.pop("ckpt_path", None)
    checkpoints = AdapterCheckpoint(folder, save_last=True, enable_version_counter=False)
    options = options | {"enable_checkpointing": True, "num_sanity_val_steps": 0} | more
    Trainer(**options | {"callbacks": [*callbacks, checkpoints]}).fit(module, data, ckpt_path=resume)
    return module.keys


def planned(shards: Path) -> WebDatasetDataModule:
    return WebDatasetDataModule(str(shards), batch_size=4, resolution=16, num_workers=0)


@pytest.mark.parametrize("finder", finders())
def test_the_pass_is_complete(
    finder: str, session_shards: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    expected = fit(tmp_path / "a", trainer_options, planned(session_shards), max_epochs=1, max_steps=-1)
    found = fit(tmp_path / "b", trainer_options, planned(session_shards), finders()[finder], max_epochs=1, max_steps=-1)
    assert found == expected
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("finder", finders())
def test_the_position_of_a_checkpoint_stays(
    finder: str, session_shards: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    whole = fit(tmp_path / "a", trainer_options, planned(session_shards), max_epochs=1, max_steps=-1)
    first = fit(tmp_path / "b", trainer_options, planned(session_shards), max_epochs=1, max_steps=2)
    rest = fit(
        tmp_path / "b",
        trainer_options,
        planned(session_shards),
        finders()[finder],
        max_epochs=1,
        max_steps=-1,
        ckpt_path=tmp_path / "b" / "last.ckpt",
    )
    assert first + rest == whole


def test_a_stream_starts_over(session_shards: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def stream() -> WebDatasetStreamDataModule:
        return WebDatasetStreamDataModule(
            str(session_shards), batch_size=4, resolution=16, num_workers=0, batches_per_epoch=4
        )

    expected = fit(tmp_path / "a", trainer_options, stream(), max_epochs=1, max_steps=-1)
    found = fit(tmp_path / "b", trainer_options, stream(), finders()["learning rate"], max_epochs=1, max_steps=-1)
    assert found == expected
