"""Runs of ``lit-lora train`` over several sets."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lit_lora.cli import main
from lit_lora.module import LoraDiffusion
from tests.warm_python import WarmPython


@pytest.mark.slow
def test_several_folders_with_their_own_splits(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are trained on as often as their names say, their validation images together give the loss, and both are cached."""
    for folder, count in (("a/train", 4), ("a/validation", 2), ("b/train", 2), ("b/test", 3), ("3_c", 2)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 20), (number * 50, 0, 99)).save(
                tmp_path / folder / f"{folder.replace('/', '')}{number}.png"
            )
    shown: dict[str, list[str]] = {"training_step": [], "validation_step": []}
    for name in shown:

        def recording(self: LoraDiffusion, batch: Any, batch_idx: int, name: str = name, step: Any = None) -> Any:
            pairs = zip(batch["key"], batch["weight"], strict=True)
            shown[name].extend(Path(key).name for key, weight in pairs if weight)
            assert "latents_mean" in batch
            return step(self, batch, batch_idx)

        monkeypatch.setattr(LoraDiffusion, name, partialmethod(recording, step=getattr(LoraDiffusion, name)))
    folders = [str(tmp_path / name) for name in ("a", "b", "3_c")]
    given = ["--base", str(sd_folder), "--out", str(tmp_path / "out"), "--device", "cpu", "--device_memory", "100"]
    short = ["--trigger", "sks", "--trainer.max_steps", "6", "--model.base_dtype=float32"]
    batches = [
        "--data.init_args.batch_size",
        "2",
        "--trainer.accumulate_grad_batches",
        "1",
        "--trainer.val_check_interval",
        "6",
    ]
    assert main(["train", *folders, *given, *short, *batches]) == 0
    screen = " ".join(capsys.readouterr().out.split())
    assert "images 8 + 5 those of 2 sets' own folders are for validation" in screen
    assert 'each after "sks"; alone where there is no file' in screen
    assert "best checkpoints/best-step=6.adapter" in screen
    expected = (
        {f"atrain{n}": 1 for n in range(4)} | {f"btrain{n}": 1 for n in range(2)} | {f"3_c{n}": 3 for n in range(2)}
    )
    assert Counter(shown["training_step"]) == expected
    validation = [*(f"avalidation{n}" for n in range(2)), *(f"btest{n}" for n in range(3))]
    assert Counter(shown["validation_step"]) == Counter(validation * 2), "before the first step, and after the last"
    tars = {path.parent for path in (tmp_path / "out").rglob("*.tar")}
    assert tars
    assert all((folder / "manifest.json").exists() for folder in tars)


@pytest.mark.slow
def test_a_pass_over_two_sets_shows_each_image_as_often_as_its_set_says(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, count in (("3_red", 2), ("1_blue", 4)):
        (tmp_path / "sets" / folder).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 20), folder[2:]).save(tmp_path / "sets" / folder / f"{folder[2:]}{number}.png")
    shown: list[str] = []
    step = LoraDiffusion.training_step

    def recording(self: LoraDiffusion, batch: Any, batch_idx: int) -> Any:
        shown.extend(batch["key"])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LoraDiffusion, "training_step", recording)
    given = ["--base", str(sd_folder), "--out", str(tmp_path / "out"), "--device", "cpu", "--device_memory", "100"]
    step_of_two = ["--data.init_args.batch_size", "2", "--trainer.accumulate_grad_batches", "1"]
    whole = ["--data.init_args.val_samples", "0", "--trainer.max_steps", "10", "--model.base_dtype=float32"]
    assert main(["train", str(tmp_path / "sets"), *given, *step_of_two, *whole]) == 0
    table = capsys.readouterr().out.splitlines()
    assert ["3_red", "2", "3", "6"] in [line.split() for line in table]
    for one in (shown[:10], shown[10:]):
        assert Counter(one) == Counter(["red0", "red1"] * 3 + [f"blue{number}" for number in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_resumed_run_of_one_and_two_processes_shows_sets_as_planned(
    sd_folder: Path, tmp_path: Path, devices: int
) -> None:
    """Two passes of ten images, stopped in the middle of the first one: each pass shows each image as often as its set says."""
    for folder, count in (("3_red", 2), ("1_blue", 4)):
        (tmp_path / "sets" / folder).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 20), folder[2:]).save(tmp_path / "sets" / folder / f"{folder[2:]}{number}.png")
    diaries = tmp_path / "diaries"
    diaries.mkdir()
    callbacks = [
        {"class_path": "tests.job_callbacks.Diary", "init_args": {"folder": str(diaries)}},
        {"class_path": "tests.job_callbacks.StopOnce", "init_args": {"step": 3}},
        {"class_path": "AdapterCheckpoint", "init_args": {"every_n_train_steps": 1, "save_last": True}},
    ]
    command = [
        "-m",
        "lit_lora.cli",
        "train",
        str(tmp_path / "sets"),
        "--base",
        str(sd_folder),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--device", "cpu", "--device_memory", "100", "--data.init_args.batch_size", str(2 // devices)]
    command += [
        "--data.init_args.val_samples",
        "0",
        "--trainer.max_steps",
        "10",
        "--trainer.accumulate_grad_batches",
        "1",
    ]
    command += ["--model.base_dtype=float32", "--trainer.devices", str(devices), "--trainer.strategy", "ddp"]
    command += ["--trainer.accelerator", "cpu", "--trainer.callbacks", json.dumps(callbacks)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    of_runs: list[list[list[list[str]]]] = []  # by run, process, step
    for number in range(2):
        process = WarmPython(command, environment, tmp_path / "output", tmp_path / "errors", spares=devices - 1)
        assert process.wait() == 0, (tmp_path / "errors").read_text()[-3000:]
        assert ("resuming" in (tmp_path / "output").read_text()) == (number == 1)
        new = sorted(diaries.glob("*.diary"), key=lambda path: path.read_text())
        of_runs.append([[line.split() for line in path.read_text().splitlines()] for path in new])
        for path in new:
            path.unlink()
    assert [[len(steps) for steps in run] for run in of_runs] == [[3] * devices, [7] * devices]
    steps = [[key for line in lines for key in line[1:]] for run in of_runs for lines in zip(*run, strict=True)]
    expected = Counter(["red0", "red1"] * 3 + [f"blue{number}" for number in range(4)])
    for one in (steps[:5], steps[5:]):
        assert Counter(key for step in one for key in step) == expected


@pytest.mark.slow
def test_repeats_and_class_images_of_the_command(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass shows each set as often as the command says, and as many class images, whose captions lack the trigger."""
    for folder, count in (("red", 2), ("blue", 4), ("5_any dog", 5)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            Image.new("RGB", (20, 20), (number * 50, 0, 99)).save(tmp_path / folder / f"{folder}{number}.png")
    (tmp_path / "5_any dog" / "5_any dog0.txt").write_text("a poodle")
    shown: list[tuple[str, bool]] = []
    step = LoraDiffusion.training_step

    def recording(self: LoraDiffusion, batch: Any, batch_idx: int) -> Any:
        shown.extend(zip((Path(key).name for key in batch["key"]), batch["prior"], strict=True))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LoraDiffusion, "training_step", recording)
    folders = [str(tmp_path / "red"), str(tmp_path / "blue"), "--class_images", str(tmp_path / "5_any dog")]
    given = ["--base", str(sd_folder), "--out", str(tmp_path / "out"), "--device", "cpu", "--device_memory", "100"]
    length = ["--batch_size", "2", "--trainer.accumulate_grad_batches", "1", "--steps", "10"]
    whole = ["--data.init_args.val_samples", "0", "--model.base_dtype=float32", "--trigger", "sks"]
    assert main(["train", *folders, "--repeats", "3", "1", *given, *length, *whole]) == 0
    assert "class images 5 2 10 class images" in " ".join(capsys.readouterr().out.split())
    subject = ["red0", "red1"] * 3 + [f"blue{number}" for number in range(4)]
    classes = [f"5_any dog{number}" for number in range(5)] * 2
    assert Counter(shown) == Counter([(one, False) for one in subject] + [(one, True) for one in classes])
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["model"]["objective"]["init_args"]["prior"]["class_path"].endswith("PriorPreservation")
    captions = {
        path.parts[-2]: caption_texts(path) for path in (tmp_path / "out" / "shards").glob("*/shard-000000.tar")
    }
    assert captions == {"red": {""}, "blue": {""}, "class images": {"any dog", "a poodle"}}
    decoders = [one.get("decoder") for one in config["data"]["init_args"]["train_sets"]]
    assert decoders[:2] == [None, None]
    assert "captions" not in decoders[2]["init_args"], "class images have no trigger"


def caption_texts(shard: Path) -> set[str]:
    """The captions of a shard."""
    with tarfile.open(shard) as archive:
        files = (archive.extractfile(one) for one in archive if one.name.endswith(".txt"))
        return {file.read().decode() for file in files if file is not None}


@pytest.mark.slow
def test_pairs_of_two_sets(flux_kontext_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each folder has its own folder of sources; a single one for both is refused."""
    for place, folder in enumerate(("a", "b", "sa", "sb")):
        (tmp_path / folder).mkdir()
        for number in range(4):
            Image.new("RGB", (24, 24), (place * 60, number * 12, 0)).save(tmp_path / folder / f"{number}.png")
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    given = ["--base", str(flux_kontext_folder), "--out", str(tmp_path / "out"), "--device", "cpu", "--dry_run"]
    given += ["--device_memory", "100", "--captions", "names", "--data.init_args.resolution", "16"]
    assert main(["train", *folders, "--sources", str(tmp_path / "sa"), *given]) == 2
    assert "sources has 1 value for 2 sets; give one for each of a, b" in " ".join(capsys.readouterr().err.split())
    sources = ["--sources", str(tmp_path / "sa"), str(tmp_path / "sb")]
    assert main(["train", *folders, *sources, *given]) == 0
    for name, red in (("a", 120), ("b", 180)):
        with tarfile.open(tmp_path / "out" / "shards" / name / "shard-000000.tar") as archive:
            for number in range(4):
                with Image.open(archive.extractfile(f"{number}.source.png") or "") as source:
                    assert source.getpixel((0, 0)) == (red, number * 12, 0)
