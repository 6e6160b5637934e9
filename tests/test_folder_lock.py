"""One run at a time of a command that writes into a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lit_lora.callbacks import ImageWriter
from lit_lora.datamodules import ImageDecoder, WebDatasetDataModule
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.errors import UserError
from lit_lora.folder_lock import only_run_in
from lit_lora.module import LoraDiffusion
from lit_lora.tools.cache import cache_shards
from lit_lora.tools.demo import demo
from lit_lora.tools.sample import SampleOptions
from lit_lora.tools.sampling import draw_samples
from tests.helpers import loader_of, make_batches

Hold = Callable[[Path, str], "subprocess.Popen[str]"]

HOLD = """
import sys, time
from pathlib import Path
from lit_lora.folder_lock import FolderLock, only_run_in
folder, command = Path(sys.argv[1]), sys.argv[2]
folder.mkdir(exist_ok=True)
lock = FolderLock(folder)
if command:
    lock = only_run_in(folder, command)
    lock.__enter__()
else:
    lock.take()
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Start a process that holds the lock of a command in a folder; without a command, that of a run."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path, command: str) -> subprocess.Popen[str]:
        holder = subprocess.Popen([sys.executable, "-c", HOLD, folder, command], stdout=subprocess.PIPE, text=True)
        started.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        return holder

    yield start
    for holder in started:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


@pytest.fixture
def images(tmp_path: Path, encode_image: Callable[..., bytes]) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(encode_image())
    (tmp_path / "images" / "a.txt").write_text("a")
    return tmp_path / "images"


def test_a_second_pack_is_refused_and_leaves_the_first_alone(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with only_run_in(out, "pack"):
        part = out / "shard-000000.tar.1-abc.part"
        part.write_bytes(b"of the first")
        message = rf"another run of pack writes into .*out \(process {os.getpid()} on .*\); wait"
        with pytest.raises(UserError, match=message):
            pack_folder(images, out)
        assert part.read_bytes() == b"of the first"
        assert not (out / "plan.json").exists()
    assert pack_folder(images, out).samples == 1
    assert not (out / "pack.lock").exists()
    assert not part.exists()


def test_the_lock_of_a_killed_process_is_free(images: Path, tmp_path: Path, hold: Hold) -> None:
    out = tmp_path / "out"
    holder = hold(out, "pack")
    with pytest.raises(UserError, match=f"process {holder.pid} on"):
        pack_folder(images, out)
    holder.kill()
    holder.wait()
    assert (out / "pack.lock").exists()
    assert pack_folder(images, out).samples == 1
    assert not (out / "pack.lock").exists()


def test_a_second_cache_is_refused_and_leaves_the_first_alone(
    sd_module: LoraDiffusion, make_shards: Callable[..., list[Path]], hold: Hold
) -> None:
    folder = make_shards(2)[0].parent / "cache"
    data = WebDatasetDataModule(str(folder.parent), resolution=16, decoder=ImageDecoder(center_crop=True))
    holder = hold(folder, "cache")
    part = folder / "shard-000000.tar.1-abc.part"
    part.write_bytes(b"of the first")
    with pytest.raises(UserError, match=f"another run of cache writes into .*cache .process {holder.pid} on"):
        cache_shards(sd_module, data, device="cpu")
    assert sorted(path.name for path in folder.iterdir()) == ["cache.lock", part.name]
    holder.kill()
    holder.wait()
    assert cache_shards(sd_module, data, device="cpu").samples == 2
    assert not part.exists()
    assert not (folder / "cache.lock").exists()


def test_a_second_sample_or_demo_is_refused(tmp_path: Path) -> None:
    with only_run_in(tmp_path, "sample"), pytest.raises(UserError, match="another run of sample"):
        draw_samples(SampleOptions(base="embedded", prompts="a seven", out=str(tmp_path)))
    with only_run_in(tmp_path, "demo"), pytest.raises(UserError, match="another run of demo"):
        demo(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_refused_command_leaves_no_folder_behind(tmp_path: Path) -> None:
    for out in ("new/of/images", "new/grid.png"):
        options = SampleOptions(base="embedded", prompts="a seven", out=str(tmp_path / out), width=3)
        with pytest.raises(UserError, match="multiples of 4 px"):
            draw_samples(options)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), only_run_in(tmp_path / "new", "pack"):
        (tmp_path / "new" / "kept").touch()
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]


def test_a_second_predict_is_refused(sd_module: LoraDiffusion, tmp_path: Path, hold: Hold) -> None:
    out = tmp_path / "out"
    holder = hold(out, "")

    def predict() -> None:
        writer = ImageWriter(str(out))
        trainer = Trainer(accelerator="cpu", logger=False, callbacks=[writer], enable_progress_bar=False)
        trainer.predict(sd_module, loader_of(make_batches(1)), return_predictions=False)

    with pytest.raises(UserError, match=f"process {holder.pid} on .* writes its images to .*out too; wait"):
        predict()
    assert not list(out.glob("*.png"))
    holder.kill()
    holder.wait()
    predict()
    assert len(list(out.iterdir())) == 4
