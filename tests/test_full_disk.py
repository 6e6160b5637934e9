"""A disk that is full ends a command with one message that names the file, and keeps what is complete."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig

from lit_lora import console
from lit_lora.callbacks import AdapterCheckpoint
from lit_lora.checkpoint_io import SafeCheckpointIO
from lit_lora.cli import main
from lit_lora.families import StableDiffusion
from lit_lora.module import LoraDiffusion
from tests.helpers import largest_file, loader_of, make_batches


def test_pack(tmp_path: Path, encode_image: Callable[..., bytes], capsys: pytest.CaptureFixture[str]) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(40):
        (images / f"{number:02}.png").write_bytes(encode_image(format="PNG"))
        (images / f"{number:02}.txt").write_text("an image")
    arguments = ["shards", "pack", str(images), str(out), "--samples_per_shard", "40"]
    with largest_file(20_000):
        assert main(arguments) == 2
    assert (
        f"cannot write {out}/shard-000000.tar: File too large; raise the limit of a file's size"
        in capsys.readouterr().err
    )
    assert [path.name for path in out.iterdir()] == ["plan.json"]
    assert main(arguments) == 0


def test_index(
    tmp_path: Path,
    shards_in: Callable[..., list[Path]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards_in(tmp_path / "shards", 3, 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["shards", "index", str(tmp_path / "shards")]
    with largest_file(500):
        assert main(arguments) == 2
    assert f"the index can be saved neither in {tmp_path}/shards nor in {tmp_path}/cache" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["shard-000000.tar", "shard-000001.tar"]
    assert main(arguments) == 0


@pytest.mark.parametrize(("size", "name"), [(100_000, "epoch=0-step=4.ckpt"), (19_000, "epoch=0-step=4.adapter")])
@pytest.mark.parametrize("plugins", [[], [SafeCheckpointIO()]])
def test_checkpoint(
    size: int,
    name: str,
    plugins: list[Any],
    sd_folder: Path,
    trainer_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The previous checkpoint stays, and the new one leaves nothing."""

    def fit(max_steps: int, resume: str | None = None) -> None:
        module = LoraDiffusion(StableDiffusion(str(sd_folder)), LoraConfig(r=2, lora_alpha=2), base_dtype="float32")
        save = AdapterCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_last="link")
        options = trainer_options | {"enable_checkpointing": True, "callbacks": [save], "plugins": plugins}
        Trainer(max_steps=max_steps, **options).fit(module, loader_of(make_batches(4)), ckpt_path=resume)

    fit(2)
    before = sorted((tmp_path / "saved").iterdir())
    if size < 100_000:
        monkeypatch.setattr(Trainer, "save_checkpoint", lambda _, path, *__: Path(path).touch())
    with largest_file(size), pytest.raises(OSError, match="File too large") as caught:
        fit(4, "last")
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "saved" / name))
    assert sorted((tmp_path / "saved").iterdir()) == before
    assert torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_logs_of_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One message, and no traceback from the thread that writes."""
    console.quiet_libraries()
    logger = TensorBoardLogger(str(tmp_path))
    with largest_file(500), pytest.raises(OSError, match="File too large") as caught:
        for step in range(1000):
            logger.log_metrics({"loss": 1.0}, step)
            logger.experiment.flush()
    assert console.report(caught.value) == 2
    printed = capsys.readouterr().err
    assert "cannot write the logs of TensorBoard: File too large; raise the limit of a file's size" in printed
    assert "Traceback" not in printed
    shutil.rmtree(tmp_path / "lightning_logs")
