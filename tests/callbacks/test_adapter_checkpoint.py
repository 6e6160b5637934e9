from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lit_lora.callbacks import AdapterCheckpoint, AdapterEMA, LoraInjection
from lit_lora.datamodules import WebDatasetDataModule
from lit_lora.errors import UserError
from lit_lora.families import StableDiffusion
from lit_lora.formats.info import AdapterInfo
from lit_lora.module import LoraDiffusion
from tests.helpers import Classifier, loader_of, make_batches, processes


def module_for(folder: Path, **lora: Any) -> LoraDiffusion:
    config = LoraConfig(**({"r": 2, "lora_alpha": 2, "lora_dropout": 0.2} | lora))
    return LoraDiffusion(StableDiffusion(str(folder)), config, base_dtype="float32")


def fit(
    folder: Path,
    options: dict[str, Any],
    checkpoints: AdapterCheckpoint,
    *,
    max_steps: int,
    resume: str | None = None,
    first_batch: int = 0,
    ema: bool = False,
    **lora: Any,
) -> LoraDiffusion:
    torch.manual_seed(0)
    module = module_for(folder, **lora)
    callbacks = [checkpoints, AdapterEMA(0.9)] if ema else [checkpoints]
    trainer = Trainer(**options | {"enable_checkpointing": True, "max_steps": max_steps, "callbacks": callbacks})
    # Lightning does not rewind a plain list: what is left comes first, in a list as long as before.
    batches = make_batches(8)
    trainer.fit(module, loader_of(batches[first_batch:] + batches[:first_batch]), ckpt_path=resume)
    return module


def adapter_of(module: LightningModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def every(steps: int, folder: Path, **options: Any) -> AdapterCheckpoint:
    return AdapterCheckpoint(folder, every_n_train_steps=steps, enable_version_counter=False, **options)


def test_a_checkpoint_holds_the_adapter_alone_and_its_files_are_beside_it(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    module = fit(sd_folder, trainer_options, every(2, tmp_path, save_last="link"), max_steps=4)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["epoch=0-step=4.adapter", "epoch=0-step=4.ckpt", "last.adapter", "last.ckpt"]
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == adapter_of(module).keys()
    assert set(load_file(tmp_path / "last.adapter" / "adapter_model.safetensors")) == {
        name.removeprefix("family.denoiser.").replace(".default", "") for name in adapter_of(module)
    }
    # The module itself is whole again when the callback has gone.
    assert any("vae" in key for key in module.state_dict())


def test_size_is_bounded_by_the_adapters(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    fit(sd_folder, trainer_options, every(2, tmp_path), max_steps=2, ema=True, r=16, lora_alpha=16)
    adapter = (tmp_path / "epoch=0-step=2.adapter" / "adapter_model.safetensors").stat().st_size
    assert (tmp_path / "epoch=0-step=2.ckpt").stat().st_size <= 4 * adapter + 200_000


@pytest.mark.parametrize("ema", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(
    ema: bool, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    whole = fit(sd_folder, trainer_options, every(2, tmp_path / "a"), max_steps=6, ema=ema)
    fit(sd_folder, trainer_options, every(2, tmp_path / "b"), max_steps=4, ema=ema)
    torch.rand(7)  # what other code drew must not matter
    resumed = fit(
        sd_folder,
        trainer_options,
        every(2, tmp_path / "b"),
        max_steps=6,
        ema=ema,
        first_batch=4,
        resume=str(tmp_path / "b" / "epoch=0-step=4.ckpt"),
    )
    for name, value in adapter_of(whole).items():
        assert torch.equal(value, adapter_of(resumed)[name]), name
    if ema:
        folders = [tmp_path / run / "epoch=0-step=6.ema.adapter" for run in "ab"]
        averages = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        assert all(torch.equal(averages[0][key], averages[1][key]) for key in averages[0])
        raw = load_file(tmp_path / "a" / "epoch=0-step=6.adapter" / "adapter_model.safetensors")
        assert any(not torch.equal(averages[0][key], raw[key]) for key in raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 4, "lora_alpha": 4}, "r is 4, in the checkpoint 2"),
        ({"target_modules": ["to_q"]}, "tensors of the checkpoint are not in this adapter"),
        ({"lora_alpha": 4}, "lora_alpha is 4, in the checkpoint 2"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(
    change: dict[str, Any], message: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    fit(sd_folder, trainer_options, every(2, tmp_path), max_steps=2)
    resume = str(tmp_path / "epoch=0-step=2.ckpt")
    with pytest.raises(UserError, match=message):
        fit(sd_folder, trainer_options, every(2, tmp_path / "new"), max_steps=4, resume=resume, **change)


def test_old_checkpoints_are_removed_with_their_folders(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    fit(sd_folder, trainer_options, every(1, tmp_path, save_top_k=-1), max_steps=3, ema=True)
    assert len(list(tmp_path.iterdir())) == 9
    fit(sd_folder, trainer_options, every(1, tmp_path / "one", save_top_k=1), max_steps=3, ema=True)
    assert sorted(p.suffix for p in (tmp_path / "one").iterdir()) == [".adapter", ".adapter", ".ckpt"]


def test_unfinished_files_of_a_killed_run_are_removed(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "epoch=0-step=9.ckpt.part").write_text("")
    (tmp_path / "epoch=0-step=9.ckpt.part.01234567-89-01234567.part").write_text("")
    (tmp_path / "epoch=0-step=9.ema.adapter.77.part").mkdir()
    (tmp_path / "mine.part").write_text("")
    (tmp_path / "last.adapter.77.old").mkdir()  # the new one had not taken its place yet
    fit(sd_folder, trainer_options, every(1, tmp_path), max_steps=1)
    assert sorted(p.name for p in tmp_path.glob("*.part")) == ["mine.part"]
    assert (tmp_path / "last.adapter").is_dir()


def test_the_last_link_is_never_broken(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When an old checkpoint is removed, ``last.ckpt`` already points to the new one."""
    seen = []
    original = AdapterCheckpoint._remove_checkpoint

    def remove(self: AdapterCheckpoint, trainer: Trainer, filepath: str) -> None:
        original(self, trainer, filepath)
        seen.append((tmp_path / "last.ckpt").exists())

    monkeypatch.setattr(AdapterCheckpoint, "_remove_checkpoint", remove)
    fit(sd_folder, trainer_options, every(1, tmp_path, save_last="link"), max_steps=3)
    assert seen == [True, True]


@pytest.mark.parametrize("killed_in", ["_remove_checkpoint", "_link_checkpoint"])
def test_a_save_that_was_killed_is_finished_by_the_resumed_run(
    killed_in: str, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the new checkpoint and the removal of the old one, or the first link to it."""
    options = {"every_n_train_steps": 1, "save_last": "link"}
    fit(sd_folder, trainer_options, AdapterCheckpoint(tmp_path / "whole", **options), max_steps=3)

    def kill(*_: Any) -> None:
        raise SystemExit

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(AdapterCheckpoint, killed_in, kill)
        fit(sd_folder, trainer_options, AdapterCheckpoint(killed, **options), max_steps=3)
    assert len(list(killed.glob("epoch*.ckpt"))) == (2 if killed_in == "_remove_checkpoint" else 1)
    fit(sd_folder, trainer_options, AdapterCheckpoint(killed, **options), max_steps=3, resume="last")
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert (killed / "last.ckpt").readlink() == Path("epoch=0-step=3.ckpt")


@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_last_save_that_was_killed_is_finished_though_nothing_is_left_to_train(
    save_last: Any, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"every_n_train_steps": 1, "save_last": save_last}
    fit(sd_folder, trainer_options, AdapterCheckpoint(tmp_path / "whole", **options), max_steps=2)
    killed = tmp_path / "killed"

    def kill(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(AdapterCheckpoint, "_remove_checkpoint", kill)
        fit(sd_folder, trainer_options, AdapterCheckpoint(killed, **options), max_steps=2)
    assert torch.load(killed / "last.ckpt", weights_only=True)["global_step"] == 1
    for _ in range(2):
        fit(sd_folder, trainer_options, AdapterCheckpoint(killed, **options), max_steps=2, resume="last")
        assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
        assert torch.load(killed / "last.ckpt", weights_only=True)["global_step"] == 2
        weights = [load_file(f / "last.adapter" / "adapter_model.safetensors") for f in (killed, tmp_path / "whole")]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_checkpoint_of_the_same_name_is_kept_by_the_resumed_run(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """Each checkpoint replaces the one before under the same name, in a folder that is named by a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    options = trainer_options | {"default_root_dir": tmp_path / "link"}
    saved = tmp_path / "link" / "checkpoints" / "fixed.ckpt"
    for steps, resume in ((2, None), (3, str(saved))):
        checkpoints = AdapterCheckpoint(filename="fixed", every_n_train_steps=2)
        fit(sd_folder, options, checkpoints, max_steps=steps, resume=resume)
        assert saved.exists()


def test_another_run_in_the_same_folder_is_named(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """Its unfinished files stay."""
    (tmp_path / "epoch=0-step=9.ckpt.part").touch()
    program = (
        f"from lit_lora.folder_lock import *; FolderLock(Path({str(tmp_path)!r})).take(); print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.warns(UserWarning, match=rf"process {other.pid} on .* saves its checkpoints in {tmp_path} too"):
            fit(sd_folder, trainer_options, every(1, tmp_path), max_steps=1)
        other.kill()
    assert (tmp_path / "epoch=0-step=9.ckpt.part").exists()
    fit(sd_folder, trainer_options, every(1, tmp_path), max_steps=1)  # the lock is free again
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & {"epoch=0-step=9.ckpt.part", ".run.lock"}


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_the_end_is_saved_if_what_is_monitored_was_never_logged(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """The best of nothing would be nothing: all that was trained would be lost."""
    checkpoints = AdapterCheckpoint(tmp_path, monitor="val/loss", enable_version_counter=False)
    with pytest.warns(UserWarning, match="val/loss was never logged.*the end of training is saved as last"):
        module = fit(sd_folder, trainer_options, checkpoints, max_steps=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.adapter", "last.ckpt"]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in adapter_of(module).items())


def test_options_that_save_nothing_are_told(sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="AdapterCheckpoint saves nothing, since save_top_k is 0"):
        fit(sd_folder, trainer_options, every(1, tmp_path, save_top_k=0), max_steps=1)


def test_a_checkpoint_from_the_future_is_named(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    """The clock has been set back, so that the newest checkpoint has not the latest time."""
    fit(sd_folder, trainer_options, every(1, tmp_path, save_last="link", save_top_k=-1), max_steps=2)
    tomorrow = time.time() + 86_400
    os.utime(tmp_path / "epoch=0-step=1.ckpt", (tomorrow, tomorrow))
    with pytest.warns(UserWarning, match=r"step=1.ckpt was saved in the future .* not be the newest of 3 checkpoints"):
        fit(sd_folder, trainer_options, every(1, tmp_path, save_last="link"), max_steps=3, resume="last")


def test_weights_only_checkpoints_are_adapter_only_too(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    module = fit(sd_folder, trainer_options, every(2, tmp_path, save_weights_only=True), max_steps=2)
    checkpoint = torch.load(tmp_path / "epoch=0-step=2.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == adapter_of(module).keys()
    assert "optimizer_states" not in checkpoint


def test_an_unwritable_folder_is_found_before_training(
    sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the folder"):
        fit(sd_folder, trainer_options, every(1, tmp_path / "file" / "below"), max_steps=1)


@pytest.mark.parametrize("save_last", ["link", True])
def test_the_average_of_an_earlier_run_does_not_stay_beside_a_later_checkpoint(
    save_last: Any, sd_folder: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    fit(sd_folder, trainer_options, every(2, tmp_path, save_last=save_last), max_steps=2, ema=True)
    assert (tmp_path / "last.ema.adapter").exists()
    with pytest.warns(UserWarning, match="AdapterEMA"):  # Lightning's own, of callbacks that are not there
        fit(
            sd_folder,
            trainer_options,
            every(2, tmp_path, save_last=save_last),
            max_steps=4,
            resume=str(tmp_path / "last.ckpt"),
        )
    assert (tmp_path / "last.adapter").exists()
    assert not os.path.lexists(tmp_path / "last.ema.adapter")


class Plain(LightningModule):
    """A module with PEFT layers that does not use this package."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        self.net = get_peft_model(body, LoraConfig(r=2, target_modules=["0"]))
        self.head = nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.head(self.net(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


def test_any_module_with_peft_layers(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def run(max_steps: int, resume: str | None = None) -> Plain:
        torch.manual_seed(0)
        module = Plain()
        checkpoints = every(1, tmp_path, save_top_k=-1)
        options = trainer_options | {"enable_checkpointing": True, "max_steps": max_steps}
        batches = [torch.ones(3, 4)] * (max_steps - (2 if resume else 0))
        Trainer(callbacks=[checkpoints], **options).fit(module, loader_of(batches), ckpt_path=resume)  # type: ignore[arg-type]
        return module

    whole = run(4)
    checkpoint = torch.load(tmp_path / "epoch=0-step=2.ckpt", weights_only=True)
    assert sorted(checkpoint["state_dict"]) == sorted(adapter_of(whole))
    assert "head.weight" in checkpoint["state_dict"]
    resumed = run(4, str(tmp_path / "epoch=0-step=2.ckpt"))
    assert all(torch.equal(value, adapter_of(resumed)[name]) for name, value in adapter_of(whole).items())


def test_options_that_would_have_no_effect(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    options = trainer_options | {"enable_checkpointing": True, "max_steps": 1}

    def fit_with(*callbacks: Callback, **more: Any) -> None:
        Trainer(**options, callbacks=[*callbacks, AdapterCheckpoint(tmp_path, **more)]).fit(
            Classifier(), loader_of(make_batches(1))
        )

    injection = LoraInjection(LoraConfig(r=2, lora_alpha=2, target_modules=["3"]))
    with pytest.raises(
        UserError, match="formats of AdapterCheckpoint has no effect here: LoraInjection writes PEFT's files"
    ):
        fit_with(injection, formats=["kohya"])
    with pytest.raises(UserError, match="info of AdapterCheckpoint has no effect here: no adapter's files are written"):
        fit_with(info=AdapterInfo(title="A"))


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_a_single_chunk_has_no_end_to_save_at(
    sd_folder: Path, session_shards: Path, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    data = WebDatasetDataModule(str(session_shards), batch_size=8, resolution=16, num_workers=0)
    options = trainer_options | {"enable_checkpointing": True, "max_steps": 1}
    trainer = Trainer(**options, callbacks=[AdapterCheckpoint(tmp_path, save_on_chunk_end=True)])
    with pytest.warns(
        UserWarning, match="save_on_chunk_end of AdapterCheckpoint saves nothing, since .* are one chunk"
    ):
        trainer.fit(module_for(sd_folder), data)


@pytest.mark.slow
def test_two_processes_keep_their_own_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A seed that another test set would be set anew in both processes.
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    for phase in ("whole", "first", "rest"):
        processes([Path(__file__).with_name("ddp_rng_script.py"), tmp_path, phase], 2, tmp_path)
    draws = {name: (tmp_path / name).read_text() for name in ("whole-0", "whole-1", "rest-0", "rest-1")}
    assert draws["whole-0"] != draws["whole-1"]
    assert draws["rest-0"] == draws["whole-0"]
    assert draws["rest-1"] == draws["whole-1"]
