from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lit_lora import BaseLoss, LoraDiffusion, WebDatasetDataModule
from lit_lora.errors import UserError
from lit_lora.formats.from_file import FromFile

Make = Any


def _trainer(folder: Path, base_loss: BaseLoss, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_steps": 2, "val_check_interval": 1, "num_sanity_val_steps": -1}
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = CSVLogger(folder, flush_logs_every_n_steps=1)
    return Trainer(accelerator="cpu", logger=logger, callbacks=[base_loss], **(defaults | quiet | options))


def test_the_loss_of_the_base_is_measured_before_the_first_step(
    sd_module: LoraDiffusion, make_shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = WebDatasetDataModule(
        str(make_shards(8)[0].parent), val_samples=3, batch_size=2, resolution=16, num_workers=0
    )
    base_loss = BaseLoss()
    trainer = _trainer(tmp_path, base_loss)
    alone = trainer.validate(sd_module, data, verbose=False)[0]["val/loss"]
    base_loss.least = 0.0  # of a fit before, with the same callback
    trainer.fit(sd_module, data)
    assert base_loss.base == pytest.approx(alone, rel=1e-6)
    assert base_loss.least
    out = capsys.readouterr().out
    assert f"step 0: val/loss {alone:.4f}, that of the base" in out
    assert "step 2: val/loss" in out
    assert "% against the base" in out
    header, first, *_ = (Path(str(trainer.log_dir)) / "metrics.csv").read_text().splitlines()
    logged = dict(zip(header.split(","), first.split(","), strict=True))
    assert (float(logged["val/loss"]), logged["step"]) == (pytest.approx(alone, rel=1e-6), "0")
    restored = BaseLoss()
    restored.load_state_dict(base_loss.state_dict())
    assert restored.base == base_loss.base


def test_a_part_of_the_validation_data_is_refused(sd_module: LoraDiffusion, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_sanity_val_steps=2 leaves out validation data"):
        BaseLoss().setup(_trainer(tmp_path, BaseLoss(), num_sanity_val_steps=2), sd_module, "fit")


def test_a_loss_that_is_not_logged_is_named(sd_module: LoraDiffusion, make_shards: Make, tmp_path: Path) -> None:
    data = WebDatasetDataModule(
        str(make_shards(8)[0].parent), val_samples=3, batch_size=2, resolution=16, num_workers=0
    )
    with pytest.warns(UserWarning, match="logged no val/los: set monitor to one of val/loss, val/loss_q1"):
        _trainer(tmp_path, BaseLoss("val/los"), max_steps=1).fit(sd_module, data)


def test_a_run_that_never_falls_below_the_base_says_so(
    sd_module: LoraDiffusion, make_shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sd_module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    data = WebDatasetDataModule(
        str(make_shards(8)[0].parent), val_samples=3, batch_size=2, resolution=16, num_workers=0
    )
    base_loss = BaseLoss()
    trainer = _trainer(tmp_path, base_loss)
    trainer.fit(sd_module, data)
    said = f"val/loss never fell below that of the base, {base_loss.base:.4f}: {base_loss.base:.4f} at best"
    assert said in capsys.readouterr().out
    restored = BaseLoss()
    restored.load_state_dict(base_loss.state_dict())
    restored.on_train_end(trainer, sd_module)
    assert said in capsys.readouterr().out
    assert base_loss.base is not None
    restored.least = base_loss.base - 0.01
    restored.on_train_end(trainer, sd_module)
    assert not capsys.readouterr().out
    restored.load_state_dict({"base": 0.5})  # of older checkpoints
    assert (restored.base, restored.least) == (0.5, None)
    sd_module.saved, restored.least = FromFile("an.adapter"), 0.5
    restored.on_train_end(trainer, sd_module)
    assert "never fell below that of the adapter at the start" in capsys.readouterr().out
    other = LightningModule()
    other.saved = 3  # type: ignore[assignment]  # another project's, of which the callback knows nothing
    restored.on_train_end(trainer, other)
    assert "never fell below that of the base" in capsys.readouterr().out
